"""Counts values of each layer, to find the least value that a given share of them reaches.

Each value becomes an integer key of the same order. A first pass counts keys by their upper bits. A second pass takes
only keys with the threshold's upper bits, and counts them by their lower bits. So memory does not grow with the text,
and thresholds and sums over ranks are exact.
"""

import torch
from torch import Tensor

from apc.utils import distributed

_UPPER, _LOWER = 18, 14  # bits of a key, 32 in all


def ordered(values: Tensor) -> Tensor:
    """Integer keys that rise with float32 values, int64 from 0 to 2**32 - 1; the key of −0 is below that of 0."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def unordered(keys: Tensor) -> Tensor:
    """The float32 values whose keys `ordered` returned."""
    return torch.where(keys < 1 << 31, -1 - keys, keys - (1 << 31)).int().view(torch.float32)


class ThresholdFinder:
    """Finds each layer's threshold from two passes over the same values.

    Call `add` with all values, then `narrow`; `add` with the same values again, then `thresholds`.
    """

    def __init__(self, layers: int, device: torch.device):
        self._counts = torch.zeros(layers, 1 << _UPPER, dtype=torch.int64, device=device)
        self._upper: Tensor | None = None  # int64 [L], the upper bits of each threshold, from `narrow` on

    def add(self, layer: int, values: Tensor) -> None:
        """Counts the float32 values, of any shape, of one layer."""
        keys = ordered(values)
        bins = keys >> _LOWER
        if self._upper is not None:
            bins = keys[bins == self._upper[layer]] & ((1 << _LOWER) - 1)
        self._counts[layer] += torch.bincount(bins.flatten(), minlength=self._counts.shape[1])

    def narrow(self, shares: Tensor) -> None:
        """Ends the first pass. shares: float64 [L], of the values of all ranks that may reach the threshold."""
        counts = distributed.all_sum(self._counts).cpu()
        total = counts.sum(1)
        allowed = (shares * total).round().long()
        upper, above = _threshold_bin(counts, allowed)
        self._all, self._rest, self._upper = allowed >= total, allowed - above, upper.to(self._counts.device)
        self._counts = torch.zeros(len(counts), 1 << _LOWER, dtype=torch.int64, device=self._counts.device)

    def thresholds(self) -> Tensor:
        """The least value of each layer that at most the allowed share of its values reach, float32 [L], on the host.

        It is −inf for a share of 1, and for a layer without values.
        """
        assert self._upper is not None  # `narrow` sets it
        lower, _ = _threshold_bin(distributed.all_sum(self._counts).cpu(), self._rest)
        keys = (self._upper.cpu() << _LOWER) + lower + 1  # the least whose count is allowed
        return torch.where(self._all, -torch.inf, unordered(keys))


def _threshold_bin(counts: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The highest bin of each row for which the total count of this bin and all above exceeds `allowed`.

    Returns the bins and the counts above them, int64 [L] each. counts: [L, bins]; allowed: [L].
    """
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = ((at_least > allowed.unsqueeze(1)).sum(1) - 1).clamp(min=0)
    return bins, (at_least - counts).gather(1, bins.unsqueeze(1)).squeeze(1)
