"""Update: what each cluster's rows add up to, and the centroids that follow from it.

All sums are integers in int64, so their order does not matter: any split of the rows over blocks, devices or ranks gives one answer.
Shape letters: see `bits.py`.
"""

import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc.ops.assign import check_power
from apc.ops.bits import describe, grouped, mask_size, on_cpu, pack, require, row_bytes, top_mask, unpack

ROW_UNIT = 2**36  # what a weighted row sums to after scaling

# Kernel tiles, rows × bytes or neurons: the weighted one holds int64 values in registers, so it is small.
_TILE = {"BLOCK_N": 128, "BLOCK_W": 64}
_WEIGHTED_TILE = {"BLOCK_N": 32, "BLOCK_D": 128}

_BLOCK = 2**21  # numbers of rows expanded at a time, which stay in a CPU's last-level cache
_CPU_SPAN = 2**16  # rows that floats add up before int64 does: 2¹⁶ rows of about 2³⁶ stay below 2⁵³, 2¹⁶ ones below 2²⁴


def _check(rows: Tensor, ids: Tensor, K: int, D: int) -> None:
    W = row_bytes(D)
    if rows.dtype != torch.uint8 or rows.dim() not in (2, 3) or rows.shape[-1] != W or D < 1:
        raise ValueError(f"rows {describe(rows)} must be uint8 [N, {W}] or [G, N, {W}] for D = {D}, to go with ids {describe(ids)}")
    require(ids, "ids", torch.int64, tuple(rows.shape[:-1]), rows, "rows")
    _check_ids(ids, K)


def _check_weighted(importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1) -> None:
    if importance.dtype != torch.uint8 or importance.dim() not in (2, 3) or not importance.shape[-1]:
        raise ValueError(f"importance {describe(importance)} must be uint8 [N, D] or [G, N, D], to go with ids {describe(ids)}")
    require(ids, "ids", torch.int64, tuple(importance.shape[:-1]), importance, "importance")
    require(scales, "scales", torch.int64, tuple(importance.shape[:-1]), importance, "importance")
    check_power(power, importance.shape[-1])
    _check_ids(ids, K)


def _check_ids(ids: Tensor, K: int) -> None:
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
    # On a GPU this look would wait for it; there an id out of range trips scatter_add_'s own assertion.
    if ids.device.type == "cpu" and ids.numel() and (ids.min() < 0 or ids.max() >= K):
        raise ValueError(f"ids {describe(ids)} must be from 0 to K - 1 = {K - 1}, got {int(ids.min())} to {int(ids.max())}")


@grouped(_check)
def accumulate(rows: Tensor, ids: Tensor, K: int, D: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, W], int64 [N] → sums int64 [K, D]: how often each neuron is active in each cluster's rows; sizes int64 [K], its rows.

    With groups: [G, N, W], [G, N] → [G, K, D], [G, K]. Raises ValueError where shapes, dtypes or devices do not match, and on a CPU for ids
    outside 0 … K-1.
    """
    if not on_cpu(rows):
        return accumulate_triton(rows, ids, K, D)

    def load(group: int, span: slice, neurons: slice, block: Tensor) -> None:
        first = neurons.start // 8
        width = neurons.stop - neurons.start
        block.copy_(unpack(rows[group, span, first : first + row_bytes(width)], width).view(torch.uint8))

    return _sum_cpu(load, ids, torch.ones(ids.shape, dtype=torch.float32), K, D), _sizes(ids, K)


def row_totals(importance: Tensor, power: int = 1) -> Tensor:
    """uint8 [N, D] → int64 [N], or [G, N, D] → [G, N]: Σ_i importance_i^power, all that a mask could capture of each row.

    Raises ValueError for other dtypes and dimensions, a power other than 1 and 2, and where 255^power·D reaches 2³¹.
    """
    if importance.dtype != torch.uint8 or importance.dim() not in (2, 3) or not importance.shape[-1]:
        raise ValueError(f"importance {describe(importance)} must be uint8 [N, D] or [G, N, D]")
    if importance.dim() == 2:
        return row_totals(importance.unsqueeze(0), power).squeeze(0)
    G, N, D = importance.shape
    check_power(power, D)
    rows_at_once = max(1, min(_BLOCK // D, N))
    totals = torch.empty((G, N), dtype=torch.int64, device=importance.device)
    block = torch.empty((rows_at_once, D), dtype=torch.int32, device=importance.device)
    for group in range(G):
        for n in range(0, N, rows_at_once):
            values = block[: min(rows_at_once, N - n)].copy_(importance[group, n : n + rows_at_once])
            if power == 2:
                values.mul_(values)
            totals[group, n : n + rows_at_once] = values.sum(-1, dtype=torch.int32)
    return totals


def scales_of(totals: Tensor) -> Tensor:
    """int64 [...] of `row_totals` → int64 [...]: 2³⁶ / total, rounded half up; 0 for an empty row.

    scale · importance^power is the row normalised to a sum of about 2³⁶, in integers: off by at most total / 2³⁷, so less than 2 %
    while total < 2³¹. Which centroid captures most of a row does not depend on a factor of that row, so `assign_weighted` needs no
    scales, and assignment and update raise exactly the same integer objective Σ_n scale_n · captured_n. A sum over 10⁸ rows (nearly
    2²⁷) fits int64 even where one neuron holds all of every row.
    """
    scales = (2 * ROW_UNIT + totals) // (2 * totals).clamp_min(1)
    return scales.masked_fill_(totals == 0, 0)


def row_scales(importance: Tensor, power: int = 1) -> Tensor:
    """`scales_of` the `row_totals` of importance, uint8 [N, D] → int64 [N], or [G, N, D] → [G, N]. Raises as `row_totals` does."""
    return scales_of(row_totals(importance, power))


@grouped(_check_weighted)
def accumulate_weighted(importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1) -> tuple[Tensor, Tensor]:
    """uint8 [N, D], int64 [N], int64 [N] → sums int64 [K, D] of scales[n]·importance[n, i]^power over each cluster's rows; sizes int64 [K].

    scales: as `row_scales` gives them for the same power. With groups: [G, N, D], [G, N], [G, N] → [G, K, D], [G, K].
    Raises ValueError where shapes, dtypes or devices do not match, and on a CPU for ids outside 0 … K-1 and for scales far above those of
    `row_scales`.
    """
    if not on_cpu(importance):
        return accumulate_weighted_triton(importance, ids, scales, K, power)
    if scales.numel() and (scales.min() < 0 or scales.max() > ROW_UNIT):
        raise ValueError(f"scales {describe(scales)} of importance {describe(importance)} must be from 0 to 2^36: see row_scales")

    def load(group: int, span: slice, neurons: slice, block: Tensor) -> None:
        block.copy_(importance[group, span, neurons])
        if power == 2:
            block.mul_(block)

    return _sum_cpu(load, ids, scales.double(), K, importance.shape[2]), _sizes(ids, K)


def _sum_cpu(load: Callable[[int, slice, slice, Tensor], None], ids: Tensor, weights: Tensor, K: int, D: int) -> Tensor:
    """Sums by cluster: sparse matrices [K, n], weights where a row is a member, times blocks of rows [n, D]. Each row is read once.

    load(group, span, neurons, block): fills block [n, d] with these rows' and neurons' integers. ids: int64 [G, N]. weights: float32 or
    float64 [G, N], in which type the sums of `_CPU_SPAN` rows are exact. Three times as fast as index_add_ in int64.
    """
    G, N = ids.shape
    dtype, exact = weights.dtype, 2**53 if weights.dtype == torch.float64 else 2**24
    # Each product also passes over its K sums, so many clusters want many rows at a time, and then fewer neurons.
    rows_at_once = min(max(1024, 4 * K), 8192)
    neurons_at_once = min(_BLOCK // rows_at_once // 128 * 128, 8 * row_bytes(D))  # whole packed rows of 16 bytes
    buffer = torch.empty(min(rows_at_once, N) * neurons_at_once, dtype=dtype)
    partial = torch.empty(K * neurons_at_once, dtype=dtype)
    sums = torch.zeros((G, K, D), dtype=torch.int64)
    for group in range(G):
        for start in range(0, N, _CPU_SPAN):
            stop = min(start + _CPU_SPAN, N)
            spans = [slice(n, min(n + rows_at_once, stop)) for n in range(start, stop, rows_at_once)]
            members = [_membership(ids[group, span], weights[group, span], K) for span in spans]
            for d in range(0, D, neurons_at_once):
                neurons = slice(d, min(d + neurons_at_once, D))
                width = neurons.stop - d
                totals = partial[: K * width].view(K, width).zero_()
                for span, member in zip(spans, members, strict=True):
                    block = buffer[: (span.stop - span.start) * width].view(-1, width)
                    load(group, span, neurons, block)
                    torch.addmm(totals, member, block, out=totals)
                if totals.max() >= exact:  # nothing is negative, so a total below the bound had only exact terms
                    raise ValueError(f"the sums of {stop - start} rows reach {exact}: these scales are not row_scales of this importance")
                sums[group, :, neurons] += totals.to(torch.int64)
    return sums


def _membership(ids: Tensor, weights: Tensor, K: int) -> Tensor:
    """int64 [n], float [n] → sparse CSR [K, n]: entry (ids[j], j) is weights[j]."""
    starts = torch.zeros(K + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(ids, minlength=K), 0, out=starts[1:])
    order = ids.argsort(stable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts, order, weights[order], (K, len(ids)), check_invariants=False)


def _sizes(ids: Tensor, K: int) -> Tensor:
    """int64 [G, N] → int64 [G, K]."""
    return torch.zeros((len(ids), K), dtype=torch.int64, device=ids.device).scatter_add_(1, ids, torch.ones_like(ids))


def binarize(sums: Tensor, density: float) -> Tensor:
    """int64 [K, D] → uint8 [K, W], with any leading dimensions: each row's m = mask_size(D, density) neurons with the largest sum.

    Ties go to the lowest index. Raises ValueError for another dtype, and unless 0 < density ≤ 1.
    """
    if sums.dtype != torch.int64:
        raise ValueError(f"binarize wants sums as int64 [K, D], got {describe(sums)}")
    return pack(top_mask(sums, mask_size(sums.shape[-1], density)))


@triton.jit
def _accumulate_kernel(
    rows_ptr,  # uint8 [G, N, W], strides stride_g, stride_n, 1
    order_ptr,  # int64 [G, N], the rows sorted by cluster
    ids_ptr,  # int64 [G, N], their clusters, ascending
    sums_ptr,  # int64 [G, K, D], added to
    N,
    K,
    D,
    stride_g,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = tl.load(order_ptr + g * N + n, mask=n < N, other=0)
    ids = tl.load(ids_ptr + g * N + n, mask=n < N, other=-1)
    in_row = (n < N)[:, None] & (8 * w < D)[None, :]
    x = tl.load(rows_ptr + g * stride_g + row[:, None] * stride_n + w[None, :], mask=in_row, other=0)
    lowest = tl.load(ids_ptr + g * N + first)
    highest = tl.load(ids_ptr + g * N + tl.minimum(first + BLOCK_N, N) - 1)
    for k in range(lowest, highest + 1):  # sorted, so nearly always one cluster, and over all blocks at most K more
        member = (ids == k).to(tl.int32)
        if tl.sum(member, axis=0) > 0:
            for j in tl.static_range(8):
                count = tl.sum(((x >> j) & 1).to(tl.int32) * member[:, None], axis=0)
                d = 8 * w + j
                tl.atomic_add(sums_ptr + (g * K + k) * D + d, count.to(tl.int64), mask=d < D, sem="relaxed")


@grouped(_check)
def accumulate_triton(rows: Tensor, ids: Tensor, K: int, D: int) -> tuple[Tensor, Tensor]:
    """`accumulate` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    G, N, _ = rows.shape
    sizes = _sizes(ids, K)  # first: on a GPU its assertion stops ids out of range before the kernel writes by them
    sums = torch.zeros((G, K, D), dtype=torch.int64, device=rows.device)
    if G and N:
        sorted_ids, order = ids.sort(dim=1, stable=True)
        grid = (triton.cdiv(N, _TILE["BLOCK_N"]), triton.cdiv(D, 8 * _TILE["BLOCK_W"]), G)
        with torch.cuda.device_of(rows):
            _accumulate_kernel[grid](rows, order, sorted_ids, sums, N, K, D, rows.stride(0), rows.stride(1), **_TILE, num_warps=4)
    return sums, sizes


@triton.jit
def _accumulate_weighted_kernel(
    importance_ptr,  # uint8 [G, N, D], strides stride_g, stride_n, 1
    scales_ptr,  # int64 [G, N]
    order_ptr,  # int64 [G, N], the rows sorted by cluster
    ids_ptr,  # int64 [G, N], their clusters, ascending
    sums_ptr,  # int64 [G, K, D], added to
    N,
    K,
    D,
    stride_g,
    stride_n,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(order_ptr + g * N + n, mask=n < N, other=0)
    ids = tl.load(ids_ptr + g * N + n, mask=n < N, other=-1)
    scale = tl.load(scales_ptr + g * N + row, mask=n < N, other=0)
    in_row = (n < N)[:, None] & (d < D)[None, :]
    q = tl.load(importance_ptr + g * stride_g + row[:, None] * stride_n + d[None, :], mask=in_row, other=0).to(tl.int32)
    if POWER == 2:
        q = q * q
    weight = q.to(tl.int64) * scale[:, None]
    lowest = tl.load(ids_ptr + g * N + first)
    highest = tl.load(ids_ptr + g * N + tl.minimum(first + BLOCK_N, N) - 1)
    for k in range(lowest, highest + 1):
        member = ids == k
        if tl.sum(member.to(tl.int32), axis=0) > 0:
            total = tl.sum(tl.where(member[:, None], weight, 0), axis=0)
            tl.atomic_add(sums_ptr + (g * K + k) * D + d, total, mask=d < D, sem="relaxed")


@grouped(_check_weighted)
def accumulate_weighted_triton(importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1) -> tuple[Tensor, Tensor]:
    """`accumulate_weighted` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    importance = importance if importance.stride(-1) == 1 else importance.contiguous()
    G, N, D = importance.shape
    sizes = _sizes(ids, K)  # first: on a GPU its assertion stops ids out of range before the kernel writes by them
    sums = torch.zeros((G, K, D), dtype=torch.int64, device=importance.device)
    if G and N:
        sorted_ids, order = ids.sort(dim=1, stable=True)
        grid = (triton.cdiv(N, _WEIGHTED_TILE["BLOCK_N"]), triton.cdiv(D, _WEIGHTED_TILE["BLOCK_D"]), G)
        strides = importance.stride(0), importance.stride(1)
        with torch.cuda.device_of(importance):
            _accumulate_weighted_kernel[grid](
                importance, scales.contiguous(), order, sorted_ids, sums, N, K, D, *strides, POWER=power, **_WEIGHTED_TILE, num_warps=4
            )
    return sums, sizes
