"""The score from which on a layer's neurons are kept, so that tokens keep as many as they need and the layer as many as masks of a fixed size do.

Scores are counted while the model runs under masks of fixed size, first by the upper bits of what orders them, then, of those that agree in these with the
threshold, by the lower ones: memory does not grow with the text, the threshold is exact, and so are sums over ranks.
"""

import torch
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import GatedFFN
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import MaskDecision, MaskInputs
from apc.sparse.policies.neurons import NeuronPredictor
from apc.utils import distributed

_UPPER, _LOWER = 18, 14  # bits of a float32


class _Counter(MaskedForward):
    """counts int64 [L, 2^bits] of the keys seen: of their upper bits, or where those are given, int64 [L], of the lower bits of the keys that have them."""

    def __init__(self, ffns: list[GatedFFN], policy: NeuronPredictor, device: torch.device, upper: Tensor | None):
        super().__init__(ffns, policy)
        self.upper = upper
        self.counts = torch.zeros(
            len(ffns), 1 << (_UPPER if upper is None else _LOWER), dtype=torch.int64, device=device
        )

    def see(self, tokens: MaskInputs) -> MaskDecision:
        keys = ordered(self.policy.outputs(tokens)[0])
        found = keys >> _LOWER
        if self.upper is not None:
            found = keys[found == self.upper[tokens.layer]] & ((1 << _LOWER) - 1)
        self.counts[tokens.layer] += torch.bincount(found.flatten(), minlength=self.counts.shape[1])
        return super().see(tokens)


def ordered(values: Tensor) -> Tensor:
    """float32 → int64 from 0 to 2**32 - 1 that rise with the values; −0 is below 0."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def unordered(keys: Tensor) -> Tensor:
    """What `ordered` gave the keys for."""
    return torch.where(keys < 1 << 31, -1 - keys, keys - (1 << 31)).int().view(torch.float32)


@torch.no_grad()
def find_thresholds(
    model: nn.Module,
    ffns: list[GatedFFN],
    codebook: Codebook,
    predictor: Predictor,
    windows: Tensor,
    batch_windows: int = 1,
) -> Tensor:
    """float32 [L], on the host: of each layer the least number that, over the tokens of `windows` (int64 [n, S]), no more scores reach than masks of the
    codebook's fixed size keep. With several ranks each runs its share, twice."""
    device = ffns[0].down.weight.device
    policy = NeuronPredictor(codebook.to(device), predictor.to(device), 0)
    first, last = distributed.share(len(windows))

    def counted(upper: Tensor | None) -> Tensor:
        counter = _Counter(ffns, policy, device, upper)
        hooks = counter.hook()
        try:
            for start in range(first, last, batch_windows):
                model.base_model(
                    input_ids=windows[start : min(start + batch_windows, last)].to(device), use_cache=False
                )
        finally:
            hooks.remove()
        return distributed.all_sum(counter.counts).cpu()

    sizes = torch.tensor([codebook.size("neuron", layer) for layer in range(codebook.layers)])
    allowed = sizes * windows.numel()
    upper, beyond = _reached(counted(None), allowed)
    lower, _ = _reached(counted(upper.to(device)), allowed - beyond, inside=True)
    return unordered((upper << _LOWER) + lower)


def _reached(counts: Tensor, allowed: Tensor, inside: bool = False) -> tuple[Tensor, Tensor]:
    """counts [L, B], allowed [L] → of each row the bin where the counts from above come to more than is allowed, and what those above it come to;
    inside: the next bin, which still is allowed."""
    above = counts.flip(1).cumsum(1).flip(1)
    bins = ((above > allowed.unsqueeze(1)).sum(1) - 1).clamp(min=0)
    at = above.gather(1, bins.unsqueeze(1)).squeeze(1) - counts.gather(1, bins.unsqueeze(1)).squeeze(1)
    return bins + inside, at
