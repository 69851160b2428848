"""Assignment: the nearest centroid of every pattern, with its captured sum, and no N × K matrix.

Nearest by the masked distance |x ∧ ¬c| = |x| − |x ∧ c|, so the greatest overlap; weighted, the greatest Σ_{i∈c} importance_i^power.
Every sum is an exact integer and ties go to the lowest cluster id, so both devices and `reference.py` give the same answer.
Shape letters: see `bits.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc.ops.bits import ROW_ALIGN, describe, grouped, on_cpu, popcount, require, row_bytes, unpack

# Kernel tiles, as rows × clusters × bytes or neurons. Powers of two; tl.dot on int8 needs at least 16 × 16 × 32.
_TILE = {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_W": 64}
_WEIGHTED_TILE = {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_D": 64}  # two int32 accumulators, for the halves of importance²

_CPU_BLOCK = 2**21  # floats of rows expanded at a time: 8 MB, which stays in the last-level cache
_CPU_CLUSTERS = 1024  # clusters expanded at a time
_FLOAT_EXACT = 2**24  # float32 sums of integers are exact up to here, in any order
_MAX_CLUSTERS = 2**22  # the CPU's key, score·K + (K − 1 − id), is exact in float64 while score < 2³¹ and K ≤ 2²²


def _check(rows: Tensor, centroids: Tensor) -> None:
    _check_dim(rows, "rows", centroids)
    if rows.shape[-1] % ROW_ALIGN:
        raise ValueError(f"rows {describe(rows)}, with centroids {describe(centroids)}: W must be a multiple of {ROW_ALIGN}")
    require(centroids, "centroids", torch.uint8, (*rows.shape[:-2], None, rows.shape[-1]), rows, "rows")
    _check_clusters(rows, "rows", centroids)


def _check_weighted(importance: Tensor, centroids: Tensor, power: int = 1) -> None:
    _check_dim(importance, "importance", centroids)
    D = importance.shape[-1]
    require(centroids, "centroids", torch.uint8, (*importance.shape[:-2], None, row_bytes(D)), importance, "importance")
    _check_clusters(importance, "importance", centroids)
    check_power(power, D)


def _check_dim(tensor: Tensor, name: str, centroids: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() not in (2, 3) or not tensor.shape[-1]:
        raise ValueError(f"{name} {describe(tensor)} must be uint8 with 2 or 3 dimensions, to go with centroids {describe(centroids)}")


def _check_clusters(tensor: Tensor, name: str, centroids: Tensor) -> None:
    if not 1 <= centroids.shape[-2] <= _MAX_CLUSTERS:
        raise ValueError(f"centroids {describe(centroids)} for {name} {describe(tensor)}: K must be from 1 to {_MAX_CLUSTERS}")


def check_power(power: int, D: int) -> None:
    """Raises ValueError unless power is 1 or 2 and a row's largest sum, 255^power·D, is below 2³¹."""
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (importance) or 2 (its square), got {power}")
    if 255**power * D >= 2**31:
        raise ValueError(f"power {power} needs {255**power}·D < 2^31, got D = {D}")


@grouped(_check)
def assign(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, W], uint8 [K, W] → ids int64 [N] of the nearest centroids, overlap |x ∧ c| int32 [N].

    With groups: [G, N, W], [G, K, W] → [G, N], [G, N]. Raises ValueError where shapes, dtypes or devices do not match.
    """
    if not on_cpu(rows):
        return assign_triton(rows, centroids)
    W = rows.shape[-1]

    def load(group: int, first: int, block: Tensor) -> None:
        block.copy_(unpack(rows[group, first : first + len(block)], 8 * W).view(torch.uint8))

    return _nearest_cpu(load, rows.shape[1], centroids, 8 * W, most=1)


@grouped(_check_weighted)
def assign_weighted(importance: Tensor, centroids: Tensor, power: int = 1) -> tuple[Tensor, Tensor]:
    """uint8 [N, D], uint8 [K, W] → ids int64 [N] of the most Σ_{i∈c} importance_i^power, captured int32 [N], that sum.

    power: 1 (importance) or 2 (energy, its square). With groups: [G, N, D], [G, K, W] → [G, N], [G, N].
    Raises ValueError where shapes, dtypes or devices do not match, and where 255^power·D reaches 2³¹.
    """
    if not on_cpu(importance):
        return assign_weighted_triton(importance, centroids, power)

    def load(group: int, first: int, block: Tensor) -> None:
        block.copy_(importance[group, first : first + len(block)])
        if power == 2:
            block.mul_(block)

    return _nearest_cpu(load, importance.shape[1], centroids, importance.shape[2], most=255**power)


def _nearest_cpu(load: Callable[[int, int, Tensor], None], N: int, centroids: Tensor, D: int, most: int) -> tuple[Tensor, Tensor]:
    """Blocks of rows against blocks of centroids by float32 matrix products over so few neurons that every sum is exact.

    load(group, first, block): fills float32 block [n, D] with the integers of rows first … first+n-1; most: the largest there can be.
    """
    G, K, _ = centroids.shape
    rows_at_once = min(max(32, min(2048, _CPU_BLOCK // D)), max(N, 1))
    clusters_at_once = min(K, _CPU_CLUSTERS)
    exact = min(D, 256 if most == 255**2 else _FLOAT_EXACT // most)  # 256 · 255² < 2²⁴
    # Fresh pages cost more than the products, so the buffers are allocated once and cut to size.
    values = torch.empty(rows_at_once * D, dtype=torch.float32)
    partial = torch.empty(rows_at_once * clusters_at_once, dtype=torch.float32)
    keys = torch.empty(rows_at_once * clusters_at_once, dtype=torch.float64)
    best = torch.full((G, N), -1, dtype=torch.float64)
    with _full_float32():
        for group in range(G):
            for k in range(0, K, clusters_at_once):
                planes = unpack(centroids[group, k : k + clusters_at_once], D).view(torch.uint8).to(torch.float32)
                # The key orders by score, then by the lower id: ties are settled by arithmetic, not by how a reduction walks.
                low = (K - 1 - torch.arange(k, k + len(planes))).double()
                for n in range(0, N, rows_at_once):
                    size = min(rows_at_once, N - n)
                    block = values[: size * D].view(size, D)
                    load(group, n, block)
                    product = partial[: size * len(planes)].view(size, -1)
                    key = keys[: size * len(planes)].view(size, -1)
                    for d in range(0, D, exact):
                        torch.mm(block[:, d : d + exact], planes[:, d : d + exact].T, out=product)
                        key.copy_(product) if d == 0 else key.add_(product)
                    torch.add(low, key, alpha=K, out=key)
                    rows_best = best[group, n : n + size]
                    torch.maximum(rows_best, key.amax(1), out=rows_best)
    best = best.to(torch.int64)
    return K - 1 - best % K, (best // K).to(torch.int32)


@contextmanager
def _full_float32() -> Iterator[None]:
    """`torch.set_float32_matmul_precision("medium")` lets a CPU round the factors to bfloat16, and 255² is not one: not in here."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@triton.jit
def _keep_best(scores, k, K, best, best_id):
    """Folds a tile of scores int32 [BLOCK_N, BLOCK_K] for clusters k [BLOCK_K] into the best so far, int32 [BLOCK_N] each."""
    scores = tl.where((k < K)[None, :], scores, -1)
    tile_best = tl.max(scores, axis=1)
    tile_id = tl.min(tl.where(scores == tile_best[:, None], k[None, :], K), axis=1)
    better = tile_best > best  # strictly: on a tie the earlier tile, whose ids are lower, keeps the row
    return tl.where(better, tile_best, best), tl.where(better, tile_id, best_id)


@triton.jit
def _assign_kernel(
    rows_ptr,  # uint8 [G, N, W], strides stride_g, stride_n, 1
    centroids_ptr,  # uint8 [G, K, W]
    ids_ptr,  # int64 [G, N], out
    overlap_ptr,  # int32 [G, N], out
    N,
    K,
    W,
    stride_g,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    row_ptrs = rows_ptr + g * stride_g + n[:, None] * stride_n + w[None, :]
    best = tl.full([BLOCK_N], -1, tl.int32)
    best_id = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        centroid_ptrs = centroids_ptr + (g * K + k[:, None]) * W + w[None, :]
        overlap = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for w0 in range(0, W, BLOCK_W):
            in_w = (w0 + w < W)[None, :]
            x = tl.load(row_ptrs + w0, mask=(n < N)[:, None] & in_w, other=0)
            c = tl.load(centroid_ptrs + w0, mask=(k < K)[:, None] & in_w, other=0)
            # Bit j of all bytes at a time: the order of neurons does not matter to a sum, and each byte is loaded once.
            for j in tl.static_range(8):
                x_bit = ((x >> j) & 1).to(tl.int8)
                c_bit = ((c >> j) & 1).to(tl.int8)
                overlap = tl.dot(x_bit, tl.trans(c_bit), overlap, out_dtype=tl.int32)
        best, best_id = _keep_best(overlap, k, K, best, best_id)
    tl.store(ids_ptr + g * N + n, best_id.to(tl.int64), mask=n < N)
    tl.store(overlap_ptr + g * N + n, best, mask=n < N)


@grouped(_check)
def assign_triton(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """`assign` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    rows, centroids = _dense_rows(rows), centroids.contiguous()
    (G, N, W), K = rows.shape, centroids.shape[1]
    ids = torch.empty((G, N), dtype=torch.int64, device=rows.device)
    overlap = torch.empty((G, N), dtype=torch.int32, device=rows.device)
    if N and G:
        grid = (triton.cdiv(N, _TILE["BLOCK_N"]), G)
        with torch.cuda.device_of(rows):
            _assign_kernel[grid](rows, centroids, ids, overlap, N, K, W, rows.stride(0), rows.stride(1), **_TILE, num_warps=8)
    return ids, overlap


@triton.jit
def _assign_weighted_kernel(
    importance_ptr,  # uint8 [G, N, D], strides stride_g, stride_n, 1
    planes_ptr,  # int8 [G, K, D], the centroids' bits
    ones_ptr,  # int32 [G, K], how many of them are set
    ids_ptr,  # int64 [G, N], out
    captured_ptr,  # int32 [G, N], out
    N,
    K,
    D,
    stride_g,
    stride_n,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int8 holds -128 … 127: an importance, or either byte of its square, goes in less 128, and 128 per set bit is added back.
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row_ptrs = importance_ptr + g * stride_g + n[:, None] * stride_n + d[None, :]
    best = tl.full([BLOCK_N], -1, tl.int32)
    best_id = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        plane_ptrs = planes_ptr + (g * K + k[:, None]) * D + d[None, :]
        low = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        high = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for d0 in range(0, D, BLOCK_D):
            in_d = (d0 + d < D)[None, :]
            q = tl.load(row_ptrs + d0, mask=(n < N)[:, None] & in_d, other=0).to(tl.int32)
            c = tl.trans(tl.load(plane_ptrs + d0, mask=(k < K)[:, None] & in_d, other=0))
            if POWER == 1:
                low = tl.dot((q - 128).to(tl.int8), c, low, out_dtype=tl.int32)
            else:
                square = q * q
                low = tl.dot(((square & 255) - 128).to(tl.int8), c, low, out_dtype=tl.int32)
                high = tl.dot(((square >> 8) - 128).to(tl.int8), c, high, out_dtype=tl.int32)
        ones = tl.load(ones_ptr + g * K + k, mask=k < K, other=0)[None, :]
        captured = low + 128 * ones
        if POWER == 2:
            captured += 256 * (high + 128 * ones)
        best, best_id = _keep_best(captured, k, K, best, best_id)
    tl.store(ids_ptr + g * N + n, best_id.to(tl.int64), mask=n < N)
    tl.store(captured_ptr + g * N + n, best, mask=n < N)


@grouped(_check_weighted)
def assign_weighted_triton(importance: Tensor, centroids: Tensor, power: int = 1) -> tuple[Tensor, Tensor]:
    """`assign_weighted` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    importance = _dense_rows(importance)
    (G, N, D), K = importance.shape, centroids.shape[1]
    planes, ones = unpack(centroids, D).contiguous().view(torch.int8), popcount(centroids)
    ids = torch.empty((G, N), dtype=torch.int64, device=importance.device)
    captured = torch.empty((G, N), dtype=torch.int32, device=importance.device)
    if N and G:
        grid = (triton.cdiv(N, _WEIGHTED_TILE["BLOCK_N"]), G)
        strides = importance.stride(0), importance.stride(1)
        with torch.cuda.device_of(importance):
            _assign_weighted_kernel[grid](importance, planes, ones, ids, captured, N, K, D, *strides, POWER=power, **_WEIGHTED_TILE, num_warps=8)
    return ids, captured


def _dense_rows(rows: Tensor) -> Tensor:
    """The kernels take any stride between rows and groups, but the bytes of a row side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
