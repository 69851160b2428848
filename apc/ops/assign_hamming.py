"""Assignment by the Hamming distance, for centroids of any size, with the kernels of `assign`.

Shape letters: see `apc.ops`.
"""

import torch
from torch import Tensor

from apc.ops.assign import assign
from apc.ops.bits import check_tensor, describe, grouped, pack, popcount, row_bytes

_TILE_BYTES = 2**28  # bytes of extended rows allocated at a time


def _check(rows: Tensor, centroids: Tensor, penalty: int = 1, *, scores: bool = True) -> None:
    if rows.dtype != torch.uint8 or rows.dim() not in (2, 3):
        raise ValueError(
            f"rows {describe(rows)} must be uint8 [N, W] or [G, N, W], to go with centroids {describe(centroids)}"
        )
    check_tensor(centroids, "centroids", torch.uint8, (*rows.shape[:-2], None, rows.shape[-1]), rows, "rows")
    if penalty < 1:
        raise ValueError(f"penalty must be at least 1, got {penalty}")


@grouped(_check)
def assign_hamming(
    rows: Tensor, centroids: Tensor, penalty: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The centroid at the smallest distance penalty · |x ∧ ¬c| + |¬x ∧ c| from each row, ties to the lowest id.

    Args:
        rows: packed patterns, uint8 [N, W] or [G, N, W].
        centroids: uint8 [K, W] or [G, K, W].
        penalty: cost of a one that the centroid lacks; a surplus one costs 1. 1 gives the Hamming distance.
        scores: whether to return the distances.

    Returns:
        ids int64 [N], and the distances int64 [N] or None; with a leading G if the rows have one.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, and for penalty < 1.

    The distance is penalty · |x| + |c| − s |x ∧ c| with s = penalty + 1. So the nearest centroid has the largest s
    |x ∧ c| + q, with q = 8W − |c|. To let `assign` find it, rows are extended by ones, and each centroid by ⌊q /
    s⌋ ones, which adds ⌊q / s⌋ to the overlap. Centroids with equal extended overlap then differ only by q mod s.
    As `assign` gives ties to the lowest id, centroids are first sorted by descending q mod s.
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
    tiles = [
        assign(torch.cat([part, ones[:, : part.shape[1]]], dim=2), ordered, scores=scores)
        for part in rows.split(tile, dim=1)
    ]
    ids = order.gather(1, torch.cat([tile_ids for tile_ids, _ in tiles], dim=1))
    overlaps = [overlap for _, overlap in tiles if overlap is not None]
    if not overlaps:
        return ids, None
    overlap = torch.cat(overlaps, dim=1).long()
    return ids, penalty * popcount(rows).long() + bits - scale * overlap - rest.gather(1, ids)
