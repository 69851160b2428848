"""Assignment with a capacity, as the APC paper fills its clusters: in the order of their ids, each with the nearest rows that are left.

Shape letters: see `bits.py`.
"""

import math

import torch
from torch import Tensor

from apc.ops.bits import describe, on_cpu, popcount, require, unpack

_CANDIDATES = 8192  # rows that a batch of clusters chooses from, for each of them, at most
_ENTRIES = 1 << 20  # of those, for all clusters of a batch
_ROUNDS = 4  # of a matching between two looks at whether it is done, each of which waits for the device
_TAKEN = torch.iinfo(torch.int64).max


def assign_with_capacity(rows: Tensor, centroids: Tensor, capacity: int) -> Tensor:
    """uint8 [N, W], uint8 [K, W] → ids int64 [N]: each cluster's `capacity` rows, −1 for the N − K·capacity rows that none takes.

    Cluster 0 takes the rows that are nearest to it by the masked distance |x ∧ ¬c|, ties to the lowest row; then cluster 1 of the others, and
    so on (Dhar et al., 2025). Raises ValueError where shapes, dtypes or devices do not match, and unless 1 ≤ capacity ≤ N / K.

    That is the one stable matching where every row likes a cluster with a lower id better (Gale and Shapley, 1962), so clusters may ask all at
    the same time: each row goes to the lowest of those that ask, and the others ask for their next. Clusters are matched in batches, and one
    of B needs to look at no more than its B · capacity nearest rows, since the others of the batch take fewer.
    """
    if rows.dtype != torch.uint8 or rows.dim() != 2:
        raise ValueError(f"rows {describe(rows)} must be uint8 [N, W], to go with centroids {describe(centroids)}")
    require(centroids, "centroids", torch.uint8, (None, rows.shape[1]), rows, "rows")
    N, K = len(rows), len(centroids)
    if not (K and 1 <= capacity <= N // K):
        raise ValueError(
            f"capacity must be from 1 to N / K for rows {describe(rows)} and centroids {describe(centroids)}, got {capacity}"
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
    """int64 [B, C], each cluster's candidates, nearest first → int64 [N]: which of the B takes each row, B where none does."""
    B = len(nearest)
    cluster = torch.arange(B, device=nearest.device).unsqueeze(1)
    owner = torch.full((N,), B, dtype=torch.int64, device=nearest.device)
    while True:  # after t rounds the first t clusters have their rows
        for _ in range(_ROUNDS):
            before, free = owner, owner[nearest] >= cluster
            asked = free & (free.cumsum(1) <= capacity)
            owner = torch.full_like(before, B)
            owner.scatter_reduce_(0, nearest.flatten(), torch.where(asked, cluster, B).flatten(), "amin")
        if torch.equal(before, owner):
            return owner


def _planes(packed: Tensor) -> Tensor:
    """uint8 [n, W] → each bit as a number that `_overlaps` multiplies exactly: float32 [n, 8W] on a CPU, int8 on a GPU, n there a multiple of 32."""
    bits = unpack(packed, 8 * packed.shape[1])
    if on_cpu(packed):
        return bits.float()
    return torch.nn.functional.pad(bits.to(torch.int8), (0, 0, 0, -len(bits) % 32))


def _overlaps(centroids: Tensor, planes: Tensor) -> Tensor:
    """uint8 [B, W], planes of n rows → int64 [B, n]: |x ∧ c|."""
    own = _planes(centroids)
    if on_cpu(centroids):
        return (own @ planes.T).long()  # float32 holds sums of ones below 2²⁴
    return torch._int_mm(own, planes.T)[: len(centroids)].long()
