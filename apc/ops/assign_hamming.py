"""Assignment by the Hamming distance, for centroids of any number of ones, through the kernels of `assign`. Shape letters: see `bits.py`."""

import torch
from torch import Tensor

from apc.ops.assign import assign
from apc.ops.bits import describe, grouped, pack, popcount, require, row_bytes

_TILE_BYTES = 2**28  # of lengthened rows made at a time


def _check(rows: Tensor, centroids: Tensor, penalty: int = 1, *, scores: bool = True) -> None:
    if rows.dtype != torch.uint8 or rows.dim() not in (2, 3):
        raise ValueError(
            f"rows {describe(rows)} must be uint8 [N, W] or [G, N, W], to go with centroids {describe(centroids)}"
        )
    require(centroids, "centroids", torch.uint8, (*rows.shape[:-2], None, rows.shape[-1]), rows, "rows")
    if penalty < 1:
        raise ValueError(f"penalty must be at least 1, got {penalty}")


@grouped(_check)
def assign_hamming(
    rows: Tensor, centroids: Tensor, penalty: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """uint8 [N, W], uint8 [K, W] → ids int64 [N] of the least penalty · |x ∧ ¬c| + |¬x ∧ c|, that distance int64 [N], or None without scores.

    penalty: how many times worse a one that the centroid lacks is than a one too many; 1: the Hamming distance. Ties go to the lowest id.
    With groups: [G, N, W], [G, K, W] → [G, N], [G, N]. Raises ValueError where shapes, dtypes or devices do not match, and for penalty < 1.

    The distance is penalty · |x| + |c| − s |x ∧ c| with s = penalty + 1, so the greatest s |x ∧ c| + q wins, where q is 8W − |c|. `assign` finds
    the greatest overlap: it gets rows lengthened by ones, and centroids lengthened by ⌊q / s⌋ of them. Overlaps that are then alike differ by
    q mod s at most, and since `assign` gives ties to the lowest, the centroids are put in descending order of that first.
    """
    bits, scale = 8 * rows.shape[-1], penalty + 1
    zeros = bits - popcount(centroids).long()
    quotient, rest = zeros // scale, zeros % scale
    order = rest.sort(dim=1, descending=True, stable=True).indices
    most = bits // scale
    added = pack(torch.arange(most, device=rows.device) < quotient.gather(1, order).unsqueeze(2))
    ordered = torch.cat([centroids.gather(1, order.unsqueeze(2).expand_as(centroids)), added], dim=2)
    tile = max(1, _TILE_BYTES // (len(rows) * ordered.shape[2]))
    ones = torch.full(
        (len(rows), min(tile, rows.shape[1]), row_bytes(most)), 255, dtype=torch.uint8, device=rows.device
    )
    found = [
        assign(torch.cat([part, ones[:, : part.shape[1]]], dim=2), ordered, scores=scores)
        for part in rows.split(tile, dim=1)
    ]
    places = torch.cat([ids for ids, _ in found], dim=1)
    ids = order.gather(1, places)
    if not scores:
        return ids, None
    overlap = torch.cat([overlap for _, overlap in found], dim=1).long()
    return ids, penalty * popcount(rows).long() + bits - scale * overlap - rest.gather(1, ids)
