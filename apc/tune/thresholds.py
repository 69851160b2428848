"""Each layer's threshold: the least score with which a neuron is kept.

The number of neurons kept varies by token; its average over the text equals the size of a fixed mask. To find the
threshold, scores are counted while the model runs under such masks. Each score becomes an integer key of the same
order. A first pass counts keys by their upper bits. A second pass takes only keys with the threshold's upper bits, and
counts them by their lower bits. So memory does not grow with the text, and thresholds and sums over ranks are exact.

Shape letters: L layers, n windows, S tokens in a window.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import MaskDecision, MaskInputs
from apc.sparse.policies.neurons import NeuronPredictor
from apc.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UPPER, _LOWER = 18, 14  # bits of a key, 32 in all


class _Counter(MaskedForward):
    """Counts keys by their upper bits; with `upper` int64 [L], only keys with these upper bits, by their lower bits."""

    policy: NeuronPredictor

    def __init__(self, ffns: list[FFN], policy: NeuronPredictor, upper: Tensor | None):
        super().__init__(ffns, policy)
        self.upper = upper
        shape = (len(ffns), 1 << (_UPPER if upper is None else _LOWER))
        self.counts = torch.zeros(shape, dtype=torch.int64, device=ffns[0].device)

    def see(self, tokens: MaskInputs) -> MaskDecision:
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
    ffns: list[FFN],
    codebook: Codebook,
    predictor: Predictor,
    windows: Tensor,
    batch_windows: int = 1,
) -> Tensor:
    """Each layer's threshold, float32 [L], on the host; each rank runs its share of the windows int64 [n, S], twice.

    Over all tokens, masks of the codebook's fixed size keep a certain number of neurons. The threshold is the smallest
    value that at most this number of scores reach. An expert that gets none of these tokens keeps all neurons: −inf.
    """
    device = ffns[0].device
    policy = NeuronPredictor(codebook.to(device), predictor.to(device), 0)
    first, last = distributed.share(len(windows))

    def count(upper: Tensor | None) -> Tensor:
        counter = _Counter(ffns, policy, upper)
        hooks = counter.hook()
        try:
            for start in range(first, last, batch_windows):
                batch = windows[start : min(start + batch_windows, last)].to(device)
                model.base_model(input_ids=batch, use_cache=False)
        finally:
            hooks.remove()
        return distributed.all_sum(counter.counts).cpu()

    sizes = torch.tensor([codebook.size("neuron", layer) for layer in range(codebook.layers)])
    counts = count(None)
    allowed = sizes * (counts.sum(1) // codebook.widths["neuron"])  # times the tokens that the FFN got
    upper, above = _threshold_bin(counts, allowed)
    lower, _ = _threshold_bin(count(upper.to(device)), allowed - above)
    found = unordered((upper << _LOWER) + lower + 1)  # the least key whose count is allowed
    return torch.where(counts.sum(1) > 0, found, -torch.inf)


def _threshold_bin(counts: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The highest bin of each row for which the total count of this bin and all above exceeds `allowed`.

    Returns the bins and the counts above them, int64 [L] each. counts: [L, bins]; allowed: [L].
    """
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = ((at_least > allowed.unsqueeze(1)).sum(1) - 1).clamp(min=0)
    return bins, (at_least - counts).gather(1, bins.unsqueeze(1)).squeeze(1)
