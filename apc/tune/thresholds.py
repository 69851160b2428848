"""Each layer's threshold: the least score with which a neuron is kept.

With a threshold each token keeps as many neurons as it needs, and on average over the text the layer keeps as many as
masks of a fixed size do. To find the threshold, scores are counted while the model runs under masks of fixed size. Each
score becomes an integer key of the same order. One pass counts keys by their upper bits; a second pass counts, by their
lower bits, the keys whose upper bits are the threshold's. So memory does not grow with the text, and thresholds and
sums over ranks are exact.

Shape letters: L layers, n windows, S tokens in a window.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apc.cluster.codebook import Codebook
from apc.data.ffn import GatedFFN
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import MaskDecision, MaskInputs
from apc.sparse.policies.neurons import NeuronPredictor
from apc.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UPPER, _LOWER = 18, 14  # bits of a key, 32 in all


class _Counter(MaskedForward):
    """Counts keys while the model runs under a policy's masks: `counts` int64 [L, 2^bits].

    upper: None counts the keys' upper bits; int64 [L] counts the lower bits of the keys that have these upper bits.
    """

    policy: NeuronPredictor

    def __init__(self, ffns: list[GatedFFN], policy: NeuronPredictor, device: torch.device, upper: Tensor | None):
        super().__init__(ffns, policy)
        self.upper = upper
        bins = 1 << (_UPPER if upper is None else _LOWER)
        self.counts = torch.zeros(len(ffns), bins, dtype=torch.int64, device=device)

    def see(self, tokens: MaskInputs) -> MaskDecision:
        """The policy's decision."""
        keys = ordered(self.policy.outputs(tokens)[0])
        bins = keys >> _LOWER
        if self.upper is not None:
            bins = keys[bins == self.upper[tokens.layer]] & ((1 << _LOWER) - 1)
        self.counts[tokens.layer] += torch.bincount(bins.flatten(), minlength=self.counts.shape[1])
        return super().see(tokens)


def ordered(values: Tensor) -> Tensor:
    """Integer keys that rise with float32 values, int64 from 0 to 2**32 - 1; the key of −0 is below that of 0."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def unordered(keys: Tensor) -> Tensor:
    """The float32 values whose keys `ordered` returned."""
    return torch.where(keys < 1 << 31, -1 - keys, keys - (1 << 31)).int().view(torch.float32)


@torch.no_grad()
def find_thresholds(
    model: "PreTrainedModel",
    ffns: list[GatedFFN],
    codebook: Codebook,
    predictor: Predictor,
    windows: Tensor,
    batch_windows: int = 1,
) -> Tensor:
    """Each layer's threshold, float32 [L], on the host.

    It is the least number that no more scores reach, over the tokens of `windows` int64 [n, S], than masks of the
    codebook's fixed size keep. Each rank runs its share of the windows, twice.
    """
    device = ffns[0].down.weight.device
    policy = NeuronPredictor(codebook.to(device), predictor.to(device), 0)
    first, last = distributed.share(len(windows))

    def count(upper: Tensor | None) -> Tensor:
        counter = _Counter(ffns, policy, device, upper)
        hooks = counter.hook()
        try:
            for start in range(first, last, batch_windows):
                batch = windows[start : min(start + batch_windows, last)].to(device)
                model.base_model(input_ids=batch, use_cache=False)
        finally:
            hooks.remove()
        return distributed.all_sum(counter.counts).cpu()

    sizes = torch.tensor([codebook.size("neuron", layer) for layer in range(codebook.layers)])
    allowed = sizes * windows.numel()
    upper, above = _threshold_bin(count(None), allowed)
    last_excess, _ = _threshold_bin(count(upper.to(device)), allowed - above)
    lower = last_excess + 1  # the least key whose count is allowed
    return unordered((upper << _LOWER) + lower)


def _threshold_bin(counts: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The highest bin of each row at which the count of it and all bins above exceeds what is allowed.

    Returns the bins and the counts above them, int64 [L] each. counts: [L, bins]; allowed: [L].
    """
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = ((at_least > allowed.unsqueeze(1)).sum(1) - 1).clamp(min=0)
    above = at_least.gather(1, bins.unsqueeze(1)).squeeze(1) - counts.gather(1, bins.unsqueeze(1)).squeeze(1)
    return bins, above
