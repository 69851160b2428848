"""The definition of every exact operation of `apc.ops` in plain torch, with the same names and signatures.

The tests require the fast implementations to agree exactly. Shape letters: see `apc.ops`; a leading G is allowed.
"""

import torch
from torch import Tensor

from apc.ops.bits import mask_size, row_bytes

__all__ = [
    "accumulate",
    "accumulate_weighted",
    "assign",
    "assign_hamming",
    "assign_weighted",
    "assign_with_capacity",
    "binarize",
    "cut_or_fill",
    "mask_size",
    "pack",
    "popcount",
    "row_bytes",
    "row_scales",
    "row_totals",
    "top_mask",
    "unpack",
]


def pack(active: Tensor) -> Tensor:
    """Packed rows: bool [..., D] → uint8 [..., W]; bit j of byte w is neuron 8w + j."""
    D = active.shape[-1]
    padded = torch.zeros((*active.shape[:-1], 8 * row_bytes(D)), dtype=torch.int64, device=active.device)
    padded[..., :D] = active
    place = 2 ** torch.arange(8, device=active.device)
    return (padded.unflatten(-1, (-1, 8)) * place).sum(-1).to(torch.uint8)


def unpack(rows: Tensor, D: int) -> Tensor:
    """The bits of packed rows: uint8 [..., W] → bool [..., D]."""
    place = 2 ** torch.arange(8, device=rows.device)
    return (rows.unsqueeze(-1).to(torch.int64) // place % 2).flatten(-2)[..., :D] == 1


def popcount(rows: Tensor) -> Tensor:
    """The number of ones in each row: uint8 [..., W] → int32 [...]."""
    return unpack(rows, 8 * rows.shape[-1]).sum(-1).to(torch.int32)


def top_mask(values: Tensor, m: int) -> Tensor:
    """The mask of the m largest, ties to the lowest index: [..., D] → bool [..., D]."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[..., :m], True)


def cut_or_fill(active: Tensor, m: int, importance: Tensor | None = None, frequency: Tensor | None = None) -> Tensor:
    """The first m neurons by active, then importance, then frequency, then index: bool [..., D] → uint8 [..., W]."""
    order = torch.arange(active.shape[-1], device=active.device).expand(active.shape)
    for key in (frequency, importance, active.to(torch.uint8)):  # stable sorts, least significant key first
        if key is not None:
            in_order = key.expand(active.shape).gather(-1, order)
            order = order.gather(-1, in_order.sort(dim=-1, descending=True, stable=True).indices)
    return pack(torch.zeros_like(active).scatter(-1, order[..., :m], True))


def assign(rows: Tensor, centroids: Tensor, *, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """The centroid at the smallest |x ∧ ¬c| from each row, ties to the lowest id, and the overlap |x ∧ c|.

    uint8 [N, W], uint8 [K, W] → ids int64 [N], overlaps int32 [N] or None.
    """
    bits = 8 * rows.shape[-1]
    return _best(unpack(rows, bits).double() @ unpack(centroids, bits).double().mT, scores)


def assign_weighted(
    importance: Tensor, centroids: Tensor, power: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The centroid with the largest Σ_{i∈c} importance_i^power for each row, ties to the lowest id, and that sum.

    uint8 [N, D], uint8 [K, W] → ids int64 [N], sums int32 [N] or None.
    """
    return _best(importance.double() ** power @ unpack(centroids, importance.shape[-1]).double().mT, scores)


def assign_hamming(
    rows: Tensor, centroids: Tensor, penalty: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The centroid at the smallest distance penalty · |x ∧ ¬c| + |¬x ∧ c|, ties to the lowest id, and that distance.

    uint8 [N, W], uint8 [K, W] → ids int64 [N], distances int64 [N] or None.
    """
    x, c = unpack(rows, 8 * rows.shape[-1]).double(), unpack(centroids, 8 * rows.shape[-1]).double().mT
    distance = penalty * x @ (1 - c) + (1 - x) @ c
    ids = _best(-distance, False)[0]
    return ids, distance.gather(-1, ids.unsqueeze(-1)).squeeze(-1).long() if scores else None


def _best(products: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """The id of each row's largest product, ties to the lowest, and that product or None; from [..., N, K]."""
    K = products.shape[-1]
    best = products.amax(-1, keepdim=True)
    ids = torch.where(products == best, torch.arange(K, device=products.device), K).amin(-1)
    return ids, best.squeeze(-1).to(torch.int32) if scores else None


def accumulate(
    rows: Tensor, ids: Tensor, K: int, D: int, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How often each neuron is active in each cluster's rows, and each cluster's number of rows.

    uint8 [N, W], int64 [N] → sums int64 [K, D], sizes int64 [K], added to `out` if there is one.
    """
    return _added(out, _sum_by_id(unpack(rows, D).to(torch.int64), ids, K))


def row_totals(importance: Tensor, power: int = 1) -> Tensor:
    """The total of each row, Σ_i importance_i^power: uint8 [N, D] → int64 [N]."""
    return (importance.to(torch.int64) ** power).sum(-1)


def row_scales(importance: Tensor, power: int = 1) -> Tensor:
    """The scale 2³⁶ / total of each row, rounded half up, 0 for an all-zero row: uint8 [N, D] → int64 [N]."""
    totals = row_totals(importance, power)
    scales = [(2 * 2**36 + total) // (2 * total) if total else 0 for total in totals.flatten().tolist()]
    return torch.tensor(scales, dtype=torch.int64, device=importance.device).view(totals.shape)


def accumulate_weighted(
    importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The sums of scales[n] · importance[n, i]^power over each cluster's rows, and each cluster's number of rows.

    uint8 [N, D], int64 [N], int64 [N] → sums int64 [K, D], sizes int64 [K], added to `out` if there is one.
    """
    return _added(out, _sum_by_id(scales.unsqueeze(-1) * importance.to(torch.int64) ** power, ids, K))


def _added(out: tuple[Tensor, Tensor] | None, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`out` after the results are added in place; the results if `out` is None."""
    return results if out is None else (out[0].add_(results[0]), out[1].add_(results[1]))


def _sum_by_id(values: Tensor, ids: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The sums by id and the number of rows of each id: int64 [..., N, D], [..., N] → int64 [..., K, D], [..., K]."""
    if values.dim() == 3:
        groups = [_sum_by_id(*group, K) for group in zip(values, ids, strict=True)]
        return torch.stack([sums for sums, _ in groups]), torch.stack([sizes for _, sizes in groups])
    sums = torch.zeros((K, values.shape[1]), dtype=torch.int64, device=values.device).index_add(0, ids, values)
    return sums, torch.zeros(K, dtype=torch.int64, device=values.device).index_add(0, ids, torch.ones_like(ids))


def binarize(sums: Tensor, density: float) -> Tensor:
    """The mask of the mask_size(D, density) largest sums, ties to the lowest neuron: int64 [K, D] → uint8 [K, W]."""
    return pack(top_mask(sums, mask_size(sums.shape[-1], density)))


def assign_with_capacity(rows: Tensor, centroids: Tensor, capacity: int) -> Tensor:
    """The cluster of each row: in the order of ids, each cluster takes its `capacity` nearest free rows.

    uint8 [N, W], uint8 [K, W] → ids int64 [N]; −1 for a row without a cluster.
    """
    ids = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    for k, centroid in enumerate(centroids):
        distance = popcount(rows & ~centroid)
        free = (ids < 0).nonzero().flatten()
        order = distance[free].sort(stable=True).indices
        ids[free[order[:capacity]]] = k
    return ids
