"""Assignment with a capacity, as in the APC paper: in the order of ids, each cluster takes its nearest free rows.

Shape letters: see `apc.ops`.
"""

import math

import torch
from torch import Tensor

from apc.ops.bits import check_tensor, describe, on_cpu, popcount, unpack

_CANDIDATES = 8192  # candidate rows per cluster of a batch, at most
_ENTRIES = 1 << 20  # candidate rows of all clusters of a batch together, at most
_ROUNDS = 4  # rounds of a matching between two checks whether it has converged; a check waits for the device
_TAKEN = torch.iinfo(torch.int64).max  # the key of a row that already has a cluster


def assign_with_capacity(rows: Tensor, centroids: Tensor, capacity: int) -> Tensor:
    """The cluster of each row: uint8 [N, W], uint8 [K, W] → ids int64 [N]. The N − K·capacity rows left over get −1.

    Cluster 0 takes the `capacity` rows nearest to it by the masked distance |x ∧ ¬c|, ties to the lowest row.
    Then cluster 1 takes its nearest of the remaining rows, and so on (Dhar et al., 2025). Raises ValueError
    for shapes, dtypes or devices that do not match, and unless 1 ≤ capacity ≤ N / K.

    The result is the unique stable matching in which every row prefers lower cluster ids (Gale and Shapley,
    1962). So all clusters can propose at the same time: each row accepts the lowest proposing cluster, and
    the others propose to their next rows. Clusters are matched in batches. In a batch of B clusters, each
    needs only its B · capacity nearest rows as candidates, since the other clusters of the batch take fewer
    than that.
    """
    if rows.dtype != torch.uint8 or rows.dim() != 2:
        raise ValueError(f"rows {describe(rows)} must be uint8 [N, W], to go with centroids {describe(centroids)}")
    check_tensor(centroids, "centroids", torch.uint8, (None, rows.shape[1]), rows, "rows")
    N, K = len(rows), len(centroids)
    if not (K and 1 <= capacity <= N // K):
        raise ValueError(
            f"capacity must be from 1 to N / K for rows {describe(rows)} and centroids {describe(centroids)}, "
            f"got {capacity}"
        )
    batch = max(1, min(_CANDIDATES // capacity, math.isqrt(_ENTRIES // capacity)))
    planes, ones, number = _planes(rows), popcount(rows).long(), torch.arange(N, device=rows.device)
    ids = torch.full((N,), -1, dtype=torch.int64, device=rows.device)
    for first in range(0, K, batch):
        overlap = _overlaps(centroids[first : first + batch], planes)[:, :N]
        keys = ((ones - overlap) * N + number).masked_fill_(ids >= 0, _TAKEN)  # orders by distance, then by row
        candidates = min(len(overlap) * capacity, N - first * capacity)
        nearest = keys.topk(candidates, dim=1, largest=False, sorted=True).indices
        owner = _match(nearest, capacity, N)
        ids = torch.where(owner < len(overlap), owner + first, ids)
    return ids


def _match(nearest: Tensor, capacity: int, N: int) -> Tensor:
    """The cluster that takes each row: candidates int64 [B, C], nearest first → int64 [N]; B for a free row."""
    B = len(nearest)
    cluster = torch.arange(B, device=nearest.device).unsqueeze(1)
    owner = torch.full((N,), B, dtype=torch.int64, device=nearest.device)
    while True:  # after t rounds the first t clusters have their final rows
        for _ in range(_ROUNDS):
            before, free = owner, owner[nearest] >= cluster
            asked = free & (free.cumsum(1) <= capacity)
            owner = torch.full_like(before, B)
            owner.scatter_reduce_(0, nearest.flatten(), torch.where(asked, cluster, B).flatten(), "amin")
        if torch.equal(before, owner):
            return owner


def _planes(packed: Tensor) -> Tensor:
    """Each bit as a number that `_overlaps` multiplies exactly: uint8 [n, W] → float32 [n, 8W] on a CPU.

    On a GPU int8 [n rounded up to a multiple of 32, 8W].
    """
    bits = unpack(packed, 8 * packed.shape[1])
    if on_cpu(packed):
        return bits.float()
    return torch.nn.functional.pad(bits.to(torch.int8), (0, 0, 0, -len(bits) % 32))


def _overlaps(centroids: Tensor, planes: Tensor) -> Tensor:
    """The overlaps |x ∧ c|: uint8 [B, W] and the planes of n rows → int64 [B, n]."""
    own = _planes(centroids)
    if on_cpu(centroids):
        return (own @ planes.T).long()  # exact: float32 represents every count below 2²⁴
    return torch._int_mm(own, planes.T)[: len(centroids)].long()
