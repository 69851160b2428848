"""The sums of each cluster's rows, for the update step of k-means.

All sums are integers, so the order of additions does not matter: every split of the rows over blocks, devices or ranks
gives the same sums. `accumulate_cpu.py` uses sparse matrix products; the Triton kernels are here. Shape letters: see
`apc.ops`.

On a GPU, `_order` lists the rows cluster by cluster (a counting sort), `_plan` cuts these lists into pieces,
and a kernel adds up the rows of each piece. Nothing waits for the GPU: the host only knows an upper bound on
the number of pieces, and programs past the last piece do nothing.
"""

import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.accumulate_cpu import accumulate_cpu, accumulate_weighted_cpu, row_totals_cpu
from apc.ops.alignment import ROW_ALIGN, aligned_words
from apc.ops.assign import check_power
from apc.ops.bits import check_tensor, describe, grouped, on_cpu, row_bytes

ROW_UNIT = 2**36  # the sum of a weighted row after scaling

# Kernel tiles. A program adds up at most PIECE rows of one cluster. A larger cluster is cut into several pieces,
# which keeps many multiprocessors busy. A program is one warp and reads a strip of each row: BLOCK_W words of 32
# neurons (weighted: 4). It has UNROLL rows in flight, a power of two. At the end it turns BITS bits of each
# word into sums at a time: at least 4 sums, which fill a sector of 32 bytes.
_TILE = {"PIECE": 1024, "BLOCK_W": 64, "UNROLL": 8, "BITS": 4, "num_warps": 1}
_WEIGHTED_TILE = {"PIECE": 1024, "BLOCK_W": 128, "UNROLL": 4, "num_warps": 1}
_TOTALS_TILE = {"BLOCK_N": 16, "BLOCK_D": 256, "num_warps": 4}
_SORT_BLOCK = 1024  # rows per program of the sort
_PLAN_BLOCK = 128  # pieces per program of the plan
_ZERO_BLOCK = 1024  # sums zeroed at a time
# Counters of the sort. Each cluster has several, so that a large cluster's rows do not queue for one address.
_COUNTERS = 2**18  # in all
_COPIES = 64  # per cluster, at most

# Sums int64 [K, D] (int32 is allowed in `out` of `accumulate`) and sizes int64 [K], or both with a leading G.
Sums = tuple[Tensor, Tensor]


def _check(rows: Tensor, ids: Tensor, K: int, D: int, *, out: Sums | None = None) -> None:
    W = row_bytes(D)
    if rows.dtype != torch.uint8 or rows.dim() not in (2, 3) or rows.shape[-1] != W or D < 1:
        raise ValueError(
            f"rows {describe(rows)} must be uint8 [N, {W}] or [G, N, {W}] for D = {D}, to go with ids {describe(ids)}"
        )
    _check_clusters(rows, "rows", ids, K, D, out, (torch.int64, torch.int32))


def _check_weighted(
    importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1, *, out: Sums | None = None
) -> None:
    _check_totals(importance, power, f", to go with ids {describe(ids)}")
    check_tensor(scales, "scales", torch.int64, tuple(importance.shape[:-1]), importance, "importance")
    _check_clusters(importance, "importance", ids, K, importance.shape[-1], out)
    if scales.device.type == "cpu" and scales.numel() and (scales.min() < 0 or scales.max() > ROW_UNIT):
        raise ValueError(
            f"scales {describe(scales)} of importance {describe(importance)} must be from 0 to 2^36: see row_scales"
        )


def _check_totals(importance: Tensor, power: int, also: str = "") -> None:
    if importance.dtype != torch.uint8 or importance.dim() not in (2, 3) or not importance.shape[-1]:
        raise ValueError(f"importance {describe(importance)} must be uint8 [N, D] or [G, N, D]{also}")
    check_power(power, importance.shape[-1])


def _check_clusters(
    rows: Tensor,
    name: str,
    ids: Tensor,
    K: int,
    D: int,
    out: Sums | None,
    types: tuple[torch.dtype, ...] = (torch.int64,),
) -> None:
    check_tensor(ids, "ids", torch.int64, tuple(rows.shape[:-1]), rows, name)
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
    # On a GPU this check would wait for the device. There `_order` asserts on the device that every id is in range.
    if ids.device.type == "cpu" and ids.numel() and (ids.min() < 0 or ids.max() >= K):
        raise ValueError(
            f"ids {describe(ids)} must be from 0 to K - 1 = {K - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    if out is None:
        return
    sums, sizes = out
    check_tensor(
        sums, "out sums", sums.dtype if sums.dtype in types else torch.int64, (*rows.shape[:-2], K, D), rows, name
    )
    check_tensor(sizes, "out sizes", torch.int64, (*rows.shape[:-2], K), rows, name)
    if not (sums.is_contiguous() and sizes.is_contiguous()):
        raise ValueError(
            f"out sums {describe(sums)} and sizes {describe(sizes)} for {name} {describe(rows)} must be contiguous"
        )


@grouped(_check)
def accumulate(rows: Tensor, ids: Tensor, K: int, D: int, *, out: Sums | None = None) -> Sums:
    """How often each neuron is active in each cluster's rows, and each cluster's number of rows.

    Args:
        rows: packed patterns, uint8 [N, W] or [G, N, W].
        ids: the cluster of each row, int64 [N] or [G, N].
        K: clusters.
        D: neurons.
        out: (sums, sizes) to add to in place. Its sums may be int32 if no sum reaches 2³¹.

    Returns:
        sums int64 [K, D] and sizes int64 [K], with a leading G if the rows have one; or `out`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match; on a CPU also for ids outside 0 … K-1. On a GPU
            such ids fail an assertion on the device.
    """
    if on_cpu(rows):
        return accumulate_cpu(rows, ids, out or _zeros(ids, K, D))
    return accumulate_triton(rows, ids, K, D, out=out)


def _zeros(ids: Tensor, K: int, D: int) -> Sums:
    shapes = (len(ids), K, D), (len(ids), K)
    sums, sizes = (torch.zeros(shape, dtype=torch.int64, device=ids.device) for shape in shapes)
    return sums, sizes


@grouped(_check_totals)
def row_totals(importance: Tensor, power: int = 1) -> Tensor:
    """The total of each row, Σ_i importance_i^power: uint8 [N, D] → int64 [N], or [G, N, D] → [G, N].

    It is the largest sum that any mask can capture of the row.
    Raises ValueError for other dtypes and dimensions, a power other than 1 and 2, and where 255^power·D reaches 2³¹.
    """
    return row_totals_cpu(importance, power) if on_cpu(importance) else row_totals_triton(importance, power)


@triton.jit
def _totals_kernel(
    importance_ptr,  # uint8 [G, N, D], strides stride_g, stride_n, 1
    totals_ptr,  # int64 [G, N], out
    N,
    D,
    stride_g,
    stride_n,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row_ptrs = importance_ptr + g * stride_g + n[:, None] * stride_n + d[None, :]
    totals = tl.zeros([BLOCK_N, BLOCK_D], tl.int32)
    for d0 in range(0, D, BLOCK_D):
        q = tl.load(row_ptrs + d0, mask=(n < N)[:, None] & (d0 + d < D)[None, :], other=0).to(tl.int32)
        totals += q * q if POWER == 2 else q
    tl.store(totals_ptr + g * N + n, tl.sum(totals, axis=1).to(tl.int64), mask=n < N)


@grouped(_check_totals)
def row_totals_triton(importance: Tensor, power: int = 1) -> Tensor:
    """`row_totals` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    importance = importance if importance.stride(-1) == 1 else importance.contiguous()
    G, N, D = importance.shape
    totals = torch.empty((G, N), dtype=torch.int64, device=importance.device)
    if G and N:
        tile = dict(_TOTALS_TILE)
        grid = (triton.cdiv(N, tile["BLOCK_N"]), G)
        with torch.cuda.device_of(importance):
            _totals_kernel[grid](
                importance, totals, N, D, importance.stride(0), importance.stride(1), POWER=power, **tile
            )
    return totals


def scales_of(totals: Tensor) -> Tensor:
    """The scale 2³⁶ / total of each row, rounded half up: int64 [...] `row_totals` → int64 [...]; 0 for total 0.

    scale · importance^power is the row in integers, normalised to a sum of about 2³⁶. The relative error is at most
    total / 2³⁷, less than 2 % while total < 2³¹. Scaling a row does not change its best centroid, so
    `assign_weighted` needs no scales. Assignment and update therefore both increase one integer objective, Σ_n
    scale_n · captured_n. A sum over 10⁸ rows (nearly 2²⁷) fits int64, even if one neuron has the total of every
    row.
    """
    scales = (2 * ROW_UNIT + totals) // (2 * totals).clamp_min(1)
    return scales.masked_fill_(totals == 0, 0)


def row_scales(importance: Tensor, power: int = 1) -> Tensor:
    """Each row's scale, see `scales_of`: uint8 [N, D] → int64 [N], or [G, N, D] → [G, N]. Raises as `row_totals`."""
    return scales_of(row_totals(importance, power))


@grouped(_check_weighted)
def accumulate_weighted(
    importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1, *, out: Sums | None = None
) -> Sums:
    """The sums of scales[n] · importance[n, i]^power over each cluster's rows, and each cluster's number of rows.

    Args:
        importance: uint8 [N, D] or [G, N, D].
        ids: the cluster of each row, int64 [N] or [G, N].
        scales: `row_scales` of importance for the same power, int64 [N] or [G, N].
        K: clusters.
        power: 1 or 2.
        out: (sums, sizes) to add to in place.

    Returns:
        sums int64 [K, D] and sizes int64 [K], with a leading G if the rows have one; or `out`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match; on a CPU also for ids outside 0 … K-1 and for
            scales far above those of `row_scales`. On a GPU such ids fail an assertion on the device.
    """
    if on_cpu(importance):
        return accumulate_weighted_cpu(importance, ids, scales, power, out or _zeros(ids, K, importance.shape[-1]))
    return accumulate_weighted_triton(importance, ids, scales, K, power, out=out)


@triton.jit
def _rank_kernel(
    ids_ptr,  # int64 [G, N]
    counts_ptr,  # int32 or int64 [COPIES, G·K], added to
    ranks_ptr,  # same type as counts, [G, N], out: how many rows reached the same counter before
    N,
    K,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(ids_ptr + g * N + n, mask=n < N, other=-1)
    inside = (k >= 0) & (k < K)
    counter = (n % COPIES) * tl.num_programs(1) * K + g * K + k
    one = tl.full([BLOCK], 1, counts_ptr.dtype.element_ty)
    rank = tl.atomic_add(counts_ptr + counter, one, mask=inside, sem="relaxed")
    tl.store(ranks_ptr + g * N + n, rank, mask=inside)


@triton.jit
def _place_kernel(
    ids_ptr,  # int64 [G, N]
    ranks_ptr,  # int32 or int64 [G, N]
    starts_ptr,  # same type as ranks, [G·K, COPIES]
    order_ptr,  # same type as ranks, [G·N], out
    N,
    K,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(ids_ptr + g * N + n, mask=n < N, other=-1)
    inside = (k >= 0) & (k < K)
    start = tl.load(starts_ptr + (g * K + k) * COPIES + n % COPIES, mask=inside, other=0)
    rank = tl.load(ranks_ptr + g * N + n, mask=inside, other=0)
    tl.store(order_ptr + start + rank, n.to(order_ptr.dtype.element_ty), mask=inside)


def _order(ids: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [G, N] → the row numbers sorted by cluster, [G·N], and the start of each cluster among them, [G·K + 1].

    Both are int32, or int64 if G·N needs it. An id outside 0 … K-1 fails an assertion on the device. This is a counting
    sort by atomics: two passes over the ids, where torch.sort moves keys and int64 indices in two to four passes. The
    order of rows within a cluster can change from call to call; integer sums do not depend on it.
    """
    ids = ids.contiguous()
    (G, N), device = ids.shape, ids.device
    dtype = torch.int32 if G * N < 2**31 else torch.int64
    # A power of two, so that few kernels are compiled.
    copies = min(_COPIES, 1 << (max(1, _COUNTERS // (G * K)).bit_length() - 1))
    counts = torch.zeros((copies, G * K), dtype=dtype, device=device)
    ranks = torch.empty((G, N), dtype=dtype, device=device)
    order = torch.empty(G * N, dtype=dtype, device=device)
    starts = torch.zeros(G * K * copies + 1, dtype=dtype, device=device)
    grid = (triton.cdiv(N, _SORT_BLOCK), G)
    _rank_kernel[grid](ids, counts, ranks, N, K, COPIES=copies, BLOCK=_SORT_BLOCK, num_warps=4)
    torch.cumsum(counts.T.flatten(), 0, dtype=dtype, out=starts[1:])
    _place_kernel[grid](ids, ranks, starts, order, N, K, COPIES=copies, BLOCK=_SORT_BLOCK, num_warps=4)
    torch._assert_async(starts[-1] == G * N, f"ids must be from 0 to K - 1 = {K - 1}")
    return order, starts[::copies]


@triton.jit
def _plan_kernel(
    starts_ptr,  # int32 or int64 [G·K + 1], stride `step`
    ends_ptr,  # int64 [G·K], number of pieces up to the end of each cluster
    plan_ptr,  # int64 [pieces, 4], out: cluster, first row in the order, end of its rows, pieces of the cluster
    step,
    clusters,  # G·K
    pieces,
    STEPS: tl.constexpr,  # 2^STEPS > G·K
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Bisection for the first cluster whose pieces end after p; G·K for a program past the last piece.
    low = tl.zeros([BLOCK], tl.int64)
    high = low + clusters
    for _ in range(STEPS):
        middle = (low + high) >> 1
        after = tl.load(ends_ptr + middle, mask=middle < clusters, other=0x7FFFFFFFFFFFFFFF) > p
        high = tl.where(after, middle, high)
        low = tl.where(after | (low == high), low, middle + 1)
    used = low < clusters
    first = tl.load(ends_ptr + low - 1, mask=used & (low > 0), other=0)
    count = tl.load(ends_ptr + low, mask=used, other=1) - first
    start = tl.load(starts_ptr + low * step, mask=used, other=0).to(tl.int64)
    size = tl.load(starts_ptr + (low + 1) * step, mask=used, other=0).to(tl.int64) - start
    entry = plan_ptr + p * 4
    tl.store(entry, low, mask=p < pieces)
    tl.store(entry + 1, start + size * (p - first) // count, mask=p < pieces)
    tl.store(entry + 2, start + size * (p - first + 1) // count, mask=p < pieces)
    tl.store(entry + 3, count, mask=p < pieces)


@triton.jit
def _zero_kernel(
    sums_ptr,  # int64 [G·K, D], out: zeros for each cluster of more than one piece
    starts_ptr,  # int32 or int64 [G·K + 1], stride `step`
    step,
    D,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cluster = tl.program_id(0).to(tl.int64)
    size = tl.load(starts_ptr + (cluster + 1) * step) - tl.load(starts_ptr + cluster * step)
    if size > PIECE:
        for d0 in range(0, D, BLOCK):
            d = d0 + tl.arange(0, BLOCK)
            tl.store(sums_ptr + cluster * D + d, tl.zeros([BLOCK], tl.int64), mask=d < D)


def _plan(starts: Tensor, rows: int, piece: int, out: Sums | None, shape: tuple[int, int, int]) -> tuple[Tensor, Sums]:
    """The plan int64 [pieces, 4] of `_plan_kernel`, and the (sums, sizes) that the accumulate kernel writes to.

    With `out`, the sums are its own. Without `out` they are a new int64 tensor of `shape` [G, K, D]: zero for
    clusters with several pieces, uninitialised for the others, which the kernel overwrites. The sizes are already
    complete.
    """
    G, K, D = shape
    step = starts.stride(0)
    sizes = starts.diff().to(torch.int64)
    ends = sizes.add(piece - 1).div_(piece, rounding_mode="floor").clamp_(min=1).cumsum(0)
    pieces = rows // piece + G * K  # ⌈size/piece⌉ ≤ 1 + ⌊(size - 1)/piece⌋, and 1 for an empty cluster
    plan = torch.empty((pieces, 4), dtype=torch.int64, device=starts.device)
    grid = (triton.cdiv(pieces, _PLAN_BLOCK),)
    _plan_kernel[grid](
        starts, ends, plan, step, G * K, pieces, STEPS=(G * K).bit_length(), BLOCK=_PLAN_BLOCK, num_warps=4
    )
    if out is not None:
        return plan, (out[0], out[1].add_(sizes.view(G, K)))
    sums = torch.empty(shape, dtype=torch.int64, device=starts.device)
    if rows > piece:
        _zero_kernel[(G * K,)](sums, starts, step, D, PIECE=piece, BLOCK=_ZERO_BLOCK, num_warps=4)
    return plan, (sums, sizes.view(G, K))


@triton.jit
def _row_numbers(
    order_ptr,  # int32 or int64 [size]
    i,
    size,
    UNROLL: tl.constexpr,
):
    """Entries i … i + UNROLL - 1 of the order, as a tuple; 0 beyond `size`."""
    numbers = ()
    for u in tl.static_range(UNROLL):
        numbers = numbers + (tl.load(order_ptr + i + u, mask=i + u < size, other=0),)  # type: ignore[assignment]
    return numbers


@triton.jit
def _put(
    ptrs,  # [...], pointers to the type of values
    values,
    mask,
    pieces,
    ADD: tl.constexpr,
):
    """Store the sums of a cluster's only piece (ADD: add to what is there); add atomically if there are more pieces."""
    if pieces > 1:
        tl.atomic_add(ptrs, values, mask=mask, sem="relaxed")
    else:
        if ADD:
            values += tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, values, mask=mask)


@triton.jit
def _accumulate_kernel(
    rows_ptr,  # int32 [G, N, W/4], strides 4·stride_g, 4·stride_n, 1
    order_ptr,  # int32 or int64 [G·N]
    plan_ptr,  # int64 [pieces, 4]
    sums_ptr,  # int64 or int32 [G, K, D], out
    K,
    D,
    clusters,  # G·K
    quads,  # W/16
    strips,  # blocks of BLOCK_W words in a row
    stride_g,
    stride_n,
    ADD: tl.constexpr,
    PLANES: tl.constexpr,  # bits of a count
    LEVELS: tl.constexpr,  # UNROLL is 2^LEVELS
    UNROLL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BITS: tl.constexpr,
):
    entry = plan_ptr + (tl.program_id(0) // strips).to(tl.int64) * 4
    cluster, start, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
    size = (tl.load(entry + 2) - start).to(tl.int32)
    order_ptr += start
    if (cluster < clusters) & ((size > 0) | (not ADD)):
        w = (tl.program_id(0) % strips) * BLOCK_W + tl.arange(0, BLOCK_W)
        row_ptrs = rows_ptr + (cluster // K) * stride_g * 4 + w
        # Counters are bit-sliced: word w of plane b has bit b of the counts of neurons 32w … 32w + 31. A full
        # adder turns three words of one weight into a sum and a carry, so UNROLL rows take about two
        # operations per word (Harley and Seal).
        planes = ()
        for _ in tl.static_range(PLANES):
            planes = planes + (tl.zeros([BLOCK_W], tl.int32),)  # type: ignore[assignment]
        numbers = _row_numbers(order_ptr, 0, size, UNROLL)
        for i in range(0, size, UNROLL):
            upcoming = _row_numbers(order_ptr, i + UNROLL, size, UNROLL)  # prefetch for the next rows
            words = ()
            for u in tl.static_range(UNROLL):
                in_row = (i + u < size) & (w < quads * 4)
                words = words + (  # type: ignore[assignment]
                    tl.load(row_ptrs + numbers[u].to(tl.int64) * stride_n * 4, mask=in_row, other=0),
                )
            added = ()
            for b in tl.static_range(PLANES):
                plane = planes[b]  # type: ignore[var-annotated]
                carries = ()
                for pair in tl.static_range(max(UNROLL >> b, 1) // 2):
                    x, y = words[2 * pair], words[2 * pair + 1]  # type: ignore[var-annotated]
                    carries = carries + ((plane & x) | (y & (plane | x)),)  # type: ignore[assignment]
                    plane = plane ^ x ^ y
                if b >= LEVELS:
                    carries = (plane & words[0],)  # type: ignore[assignment, misc]
                    plane = plane ^ words[0]  # type: ignore[misc]
                words = carries
                added = added + (plane,)  # type: ignore[assignment]
            planes = added
            numbers = upcoming
        for j in tl.static_range(0, 32, BITS):
            bit = j + tl.arange(0, BITS)
            count = tl.zeros([BLOCK_W, BITS], tl.int32)
            for b in tl.static_range(PLANES):
                count += ((planes[b][:, None] >> bit[None, :]) & 1) << b
            d = w[:, None] * 32 + bit[None, :]
            _put(sums_ptr + cluster * D + d, count.to(sums_ptr.dtype.element_ty), d < D, pieces, ADD)


@grouped(_check)
def accumulate_triton(rows: Tensor, ids: Tensor, K: int, D: int, *, out: Sums | None = None) -> Sums:
    """`accumulate` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    (G, N, W), tile = rows.shape, dict(_TILE)
    piece, unroll = tile.pop("PIECE"), tile["UNROLL"]
    if not G * N:
        return out or _zeros(ids, K, D)
    words, strides = aligned_words(rows)
    with torch.cuda.device_of(rows):
        order, starts = _order(ids, K)
        plan, (sums, sizes) = _plan(starts, G * N, piece, out, (G, K, D))
        strips = triton.cdiv(triton.cdiv(D, 32), tile["BLOCK_W"])
        constants = {"ADD": out is not None, "PLANES": piece.bit_length(), "LEVELS": unroll.bit_length() - 1}
        _accumulate_kernel[(len(plan) * strips,)](
            words, order, plan, sums, K, D, G * K, W // ROW_ALIGN, strips, *strides, **constants, **tile
        )
    return sums, sizes


@triton.jit
def _scaled_sums(
    row_ptrs,  # int32 [BLOCK_W], of row 0
    scales_ptr,  # int32 [N, 2]
    order_ptr,  # int32 or int64 [size]
    size,
    in_row,  # bool [BLOCK_W]
    stride_n,
    HALF: tl.constexpr,
    POWER: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The sums of importance^POWER times one half of each row's scale; also the bitwise OR of all high halves, uint32.

    HALF: 0 for the low 32 bits of a scale, 1 for the high ones. The sums are four uint64 [BLOCK_W], one for
    each byte of a word.
    """
    totals = ()
    for _ in tl.static_range(4):
        totals = totals + (tl.zeros([BLOCK_W], tl.uint64),)  # type: ignore[assignment]
    high = tl.zeros([], tl.uint32)
    numbers = _row_numbers(order_ptr, 0, size, UNROLL)
    for i in range(0, size, UNROLL):
        upcoming = _row_numbers(order_ptr, i + UNROLL, size, UNROLL)  # prefetch for the next rows
        words = ()
        scales = ()
        for u in tl.static_range(UNROLL):
            n = numbers[u].to(tl.int64)
            words = words + (  # type: ignore[assignment]
                tl.load(row_ptrs + n * stride_n * 4, mask=(i + u < size) & in_row, other=0).to(tl.uint32, bitcast=True),
            )
            scales = scales + (  # type: ignore[assignment]
                tl.load(scales_ptr + 2 * n + HALF, mask=i + u < size, other=0).to(tl.uint32, bitcast=True),
            )
            if HALF == 0:
                high |= tl.load(scales_ptr + 2 * n + 1, mask=i + u < size, other=0).to(tl.uint32, bitcast=True)
        for u in tl.static_range(UNROLL):
            added = ()
            for byte in tl.static_range(4):
                q = (words[u] >> (8 * byte)) & 0xFF
                if POWER == 2:
                    q = q * q
                # 32 × 32 bits added to 64 bits is one instruction if the compiler sees that no operand is wider: so
                # scales are read in halves.
                added = added + (totals[byte] + q.to(tl.uint64) * scales[u].to(tl.uint64),)  # type: ignore[assignment]
            totals = added
        numbers = upcoming
    return totals, high


@triton.jit
def _accumulate_weighted_kernel(
    importance_ptr,  # int32 [G, N, quads·4], 4 neurons a word; strides 4·stride_g, 4·stride_n, 1
    scales_ptr,  # int32 [G, N, 2], low and high halves
    order_ptr,  # int32 or int64 [G·N]
    plan_ptr,  # int64 [pieces, 4]
    sums_ptr,  # int64 [G, K, D], out
    N,
    K,
    D,
    clusters,  # G·K
    quads,  # ⌈D/16⌉
    strips,  # blocks of BLOCK_W words in a row
    stride_g,
    stride_n,
    ADD: tl.constexpr,
    POWER: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    entry = plan_ptr + (tl.program_id(0) // strips).to(tl.int64) * 4
    cluster, start, pieces = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
    size = (tl.load(entry + 2) - start).to(tl.int32)
    order_ptr += start
    if (cluster < clusters) & ((size > 0) | (not ADD)):
        g = cluster // K
        strip = tl.program_id(0) % strips
        w = strip * BLOCK_W + tl.arange(0, BLOCK_W)
        row_ptrs = importance_ptr + g * stride_g * 4 + w
        scales_ptr += g * N * 2
        totals, high = _scaled_sums(
            row_ptrs, scales_ptr, order_ptr, size, w < quads * 4, stride_n, 0, POWER, UNROLL, BLOCK_W
        )
        if high > 0:  # a row whose total is below 16 has a scale beyond 32 bits: read all rows a second time
            more, _ = _scaled_sums(
                row_ptrs, scales_ptr, order_ptr, size, w < quads * 4, stride_n, 1, POWER, UNROLL, BLOCK_W
            )
            totals = (
                totals[0] + (more[0] << 32),
                totals[1] + (more[1] << 32),
                totals[2] + (more[2] << 32),
                totals[3] + (more[3] << 32),
            )
        # [BLOCK_W, 2, 2], whose last two dimensions are bytes 0 1, 2 3.
        together = tl.join(tl.join(totals[0], totals[2]), tl.join(totals[1], totals[3]))
        d = strip * (4 * BLOCK_W) + tl.arange(0, 4 * BLOCK_W)
        _put(sums_ptr + cluster * D + d, tl.reshape(together, [4 * BLOCK_W]).to(tl.int64), d < D, pieces, ADD)


@grouped(_check_weighted)
def accumulate_weighted_triton(
    importance: Tensor, ids: Tensor, scales: Tensor, K: int, power: int = 1, *, out: Sums | None = None
) -> Sums:
    """`accumulate_weighted` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    (G, N, D), tile = importance.shape, dict(_WEIGHTED_TILE)
    piece = tile.pop("PIECE")
    if not G * N:
        return out or _zeros(ids, K, D)
    words, strides = aligned_words(importance)
    with torch.cuda.device_of(importance):
        order, starts = _order(ids, K)
        plan, (sums, sizes) = _plan(starts, G * N, piece, out, (G, K, D))
        quads, strips = triton.cdiv(D, ROW_ALIGN), triton.cdiv(D, 4 * tile["BLOCK_W"])
        tensors = words, scales.contiguous().view(torch.int32), order, plan, sums
        numbers = N, K, D, G * K, quads, strips, *strides
        _accumulate_weighted_kernel[(len(plan) * strips,)](*tensors, *numbers, ADD=out is not None, POWER=power, **tile)
    return sums, sizes
