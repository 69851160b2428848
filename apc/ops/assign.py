"""The nearest centroid of every pattern, and the sum it captures, without an N × K matrix.

Nearest means the smallest masked distance |x ∧ ¬c| = |x| − |x ∧ c|, that is, the largest overlap |x ∧ c|. With
importances it means the largest Σ_{i∈c} importance_i^power. Every sum is an exact integer and ties go to the
lowest cluster id, so all implementations agree with `reference.py`: lookup tables on the CPU (`assign_cpu.py`),
CUDA C++ on tensor cores that have the instructions (`assign_cuda.py`), and Triton on any other GPU (here). Shape
letters: see `apc.ops`.
"""

import functools
import warnings

import torch
from torch import Tensor

from apc.ops import assign_cuda
from apc.ops._triton import TensorDescriptor, tl, triton
from apc.ops.alignment import ROW_ALIGN, align_rows, empty_aligned
from apc.ops.bits import check_tensor, describe, empty_results, grouped, on_cpu, popcount, row_bytes

# Kernel tiles, rows × clusters × bytes, measured on an H100. Several blocks share a multiprocessor, so that
# one multiplies while another expands its rows.
_TILE = {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_W": 128, "num_warps": 8, "num_stages": 4}
_WEIGHTED_TILES = {
    1: {"BLOCK_N": 64, "BLOCK_K": 256, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3},
    2: {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3},  # two accumulators
}
_EXPAND_TILE = {"BLOCK_R": 16, "BLOCK_W": 128}
_SQUARES_TILE = {"BLOCK_N": 16, "BLOCK_D": 512, "num_warps": 4}
# With at least this many clusters, storing the squares for the tensor-core kernel is faster (on an H100) than the
# Triton kernel, which squares in registers.
_SQUARES_LEAST_K = 320
# Bytes of squares stored at a time: more rows than all multiprocessors work on, and little beside the importances.
_SQUARES_BYTES = 2**30
_LEAST_K = 32  # the narrowest tile of clusters

_MAX_CLUSTERS = 2**22
_MAX_NEURONS = 2**22  # a kernel's int32 key is an overlap and, below it, 8 bits for the cluster in its tile


def _check(rows: Tensor, centroids: Tensor, *, scores: bool = True) -> None:
    _check_both(rows, "rows", centroids, packed=True)
    if rows.shape[-1] % ROW_ALIGN:
        raise ValueError(
            f"rows {describe(rows)}, with centroids {describe(centroids)}: W must be a multiple of {ROW_ALIGN}"
        )
    if 8 * rows.shape[-1] > _MAX_NEURONS:
        raise ValueError(
            f"rows {describe(rows)}, with centroids {describe(centroids)}: W must be at most {_MAX_NEURONS // 8}"
        )


def _check_weighted(importance: Tensor, centroids: Tensor, power: int = 1, *, scores: bool = True) -> None:
    _check_both(importance, "importance", centroids, packed=False)
    check_power(power, importance.shape[-1])


def _check_both(tensor: Tensor, name: str, centroids: Tensor, packed: bool) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() not in (2, 3) or not tensor.shape[-1]:
        raise ValueError(
            f"{name} {describe(tensor)} must be uint8 with 2 or 3 dimensions to go with centroids {describe(centroids)}"
        )
    W = tensor.shape[-1] if packed else row_bytes(tensor.shape[-1])
    check_tensor(centroids, "centroids", torch.uint8, (*tensor.shape[:-2], None, W), tensor, name)
    if not 1 <= centroids.shape[-2] <= _MAX_CLUSTERS:
        raise ValueError(
            f"centroids {describe(centroids)} for {name} {describe(tensor)}: K must be from 1 to {_MAX_CLUSTERS}"
        )


def check_power(power: int, D: int) -> None:
    """Check that power is 1 or 2 and that a row's largest sum, 255^power·D, is below 2³¹. Raises ValueError."""
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (importance) or 2 (its square), got {power}")
    if 255**power * D >= 2**31:
        raise ValueError(f"power {power} needs {255**power}·D < 2^31, got D = {D}")


@grouped(_check)
def assign(rows: Tensor, centroids: Tensor, *, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """The nearest centroid of each row, with its overlap.

    Args:
        rows: packed patterns, uint8 [N, W] or [G, N, W].
        centroids: uint8 [K, W] or [G, K, W].
        scores: whether to return the overlaps.

    Returns:
        ids int64 [N], and the overlaps |x ∧ c| int32 [N] or None; with a leading G if the rows have one.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match.

    On CUDA this is `assign_b1` where that runs, else `assign_triton` with one warning that gives the reason.
    """
    if on_cpu(rows):
        from apc.ops.assign_cpu import assign_cpu  # imports numba, so only where it is needed

        return assign_cpu(rows, centroids, scores)
    if reason := assign_cuda.unavailable(rows.device.index):
        _warn_once(f"patterns are assigned by the int8 kernel, several times slower than b1 tensor cores: {reason}")
        return assign_triton(rows, centroids, scores=scores)
    return assign_cuda.assign_b1(rows, centroids, scores)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@grouped(_check)
def assign_b1(rows: Tensor, centroids: Tensor, *, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """`assign` on the b1 tensor cores of a CUDA device. Raises `nvrtc.Unavailable` with the reason if it has none."""
    return assign_cuda.assign_b1(rows, centroids, scores)


@grouped(_check_weighted)
def assign_weighted(
    importance: Tensor, centroids: Tensor, power: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The centroid that captures the most importance of each row, with the sum it captures.

    Args:
        importance: uint8 [N, D] or [G, N, D].
        centroids: uint8 [K, W] or [G, K, W].
        power: 1 (importance) or 2 (energy, its square).
        scores: whether to return the captured sums.

    Returns:
        ids int64 [N] with the largest Σ_{i∈c} importance_i^power, and that sum, int32 [N], or None; with a leading G if
        importance has one.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, and if 255^power·D reaches 2³¹.

    On CUDA this runs on Hopper's uint8 tensor cores where they are available (for energies only if K is large enough),
    else in Triton.
    """
    if on_cpu(importance):
        from apc.ops.assign_cpu import assign_weighted_cpu

        return assign_weighted_cpu(importance, centroids, power, scores)
    fits = assign_cuda.score_fits(255 * importance.shape[-1]) if power == 1 else centroids.shape[-2] >= _SQUARES_LEAST_K
    reason = assign_cuda.unavailable(importance.device.index, "u8") if fits else None
    if reason:
        _warn_once(f"importances are assigned by the Triton kernel, slower than uint8 tensor cores: {reason}")
    if reason or not fits:
        return assign_weighted_triton(importance, centroids, power, scores=scores)
    importance = align_rows(importance)
    planes = _expand(centroids, importance.shape[-1])
    return (
        assign_cuda.assign_u8(importance, planes, scores) if power == 1 else _assign_squares(importance, planes, scores)
    )


def _assign_squares(importance: Tensor, planes: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """`assign_cuda.assign_u8` of the squared importances, computed piece by piece.

    importance: uint8 [G, N, D]; planes: uint8 [G, K, D]; D is a multiple of 16.
    """
    G, N, D = importance.shape
    ids, captured = empty_results(importance, scores)
    rows_at_once = max(1, _SQUARES_BYTES // (2 * D))
    groups_at_once = max(1, rows_at_once // max(N, 1))
    for g in range(0, G, groups_at_once):
        for n in range(0, N, rows_at_once):
            piece = slice(g, g + groups_at_once), slice(n, n + rows_at_once)
            ids[piece], piece_sums = assign_cuda.assign_u8(_squares(importance[piece]), planes[piece[0]], scores)
            if captured is not None and piece_sums is not None:
                captured[piece] = piece_sums
    return ids, captured


@triton.jit
def _squares_kernel(
    importance_ptr,  # uint8 [G, N, D], strides 16 · stride_g, 16 · stride_n, 1
    squares_ptr,  # uint8 [2, G, N, D], out, rows `pitch` apart: the high bytes, then the low bytes
    N,
    quads,  # D/16
    stride_g,
    stride_n,
    pitch,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g, groups = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (n < N) & (d < quads * 16)
    q = tl.load(importance_ptr + (g * stride_g + n * stride_n) * 16 + d, mask=inside, other=0).to(tl.uint16)
    to = squares_ptr + (g * N + n) * pitch + d
    tl.store(to, (q * q >> 8).to(tl.uint8), mask=inside)
    tl.store(to + groups.to(tl.int64) * N * pitch, (q * q).to(tl.uint8), mask=inside)


def _squares(importance: Tensor) -> Tensor:
    """The high bytes, then the low bytes of the squares: aligned uint8 [G, N, D] → uint8 [2 · G, N, D]."""
    G, N, D = importance.shape
    squares = empty_aligned(2 * G, N, D, importance.device)
    if squares.numel():
        tile = dict(_SQUARES_TILE)
        grid = (triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(D, tile["BLOCK_D"]), G)
        strides = importance.stride(0) // ROW_ALIGN, importance.stride(1) // ROW_ALIGN, squares.stride(1)
        with torch.cuda.device_of(importance):
            _squares_kernel[grid](importance, squares, N, D // ROW_ALIGN, *strides, **tile)
    return squares


@triton.jit
def _expand_kernel(
    centroids_ptr,  # uint8 [R, W]
    words_ptr,  # uint64 [R, words], out, rows `pitch` apart: word w is byte w of a row, one byte per bit
    R,
    W,
    words,
    pitch,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    inside = (r < R) & (w < words)
    c = tl.load(centroids_ptr + r * W + w, mask=inside, other=0).to(tl.uint64)
    # Copy the eight bits to all bytes, keep bit j in byte j, and add 127 to carry it to the byte's top bit.
    word = ((c * 0x0101010101010101) & 0x8040201008040201) + 0x7F7F7F7F7F7F7F7F
    tl.store(words_ptr + r * pitch + w, (word >> 7) & 0x0101010101010101, mask=inside)


def _expand(centroids: Tensor, D: int) -> Tensor:
    """Each neuron's bit as a byte: uint8 [G, K, W] → uint8 [G, K, D]; D is a multiple of 16."""
    (G, K, W), centroids = centroids.shape, centroids.contiguous()
    planes = empty_aligned(G, K, D, centroids.device)
    if G:
        words = planes.view(torch.uint64)
        grid = (triton.cdiv(G * K, _EXPAND_TILE["BLOCK_R"]), triton.cdiv(D // 8, _EXPAND_TILE["BLOCK_W"]))
        with torch.cuda.device_of(centroids):
            _expand_kernel[grid](centroids, words, G * K, W, D // 8, words.stride(1), **_EXPAND_TILE)
    return planes


@triton.jit
def _expand_by_bit_kernel(
    centroids_ptr,  # uint8 [R, W]
    planes_ptr,  # int8 [R, 8, W], out
    R,
    W,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    inside = (r < R) & (w < W)
    c = tl.load(centroids_ptr + r * W + w, mask=inside, other=0)
    for j in tl.static_range(8):
        value = ((c >> j) & 1).to(tl.int32) * (-(2 ** (7 - j)) if j < 7 else 1)
        tl.store(planes_ptr + (r * 8 + j) * W + w, value.to(tl.int8), mask=inside)


def _expand_by_bit(centroids: Tensor) -> Tensor:
    """The factors for bits in `_assign_kernel`: uint8 [G, K, W] → int8 [G, K, 8 · W], bit 0 of all bytes first.

    A set bit j becomes −2^(7−j), or 1 for j = 7. Times the same bit of an int8 row byte, worth 2^j (−128 for j =
    7), this is always −128.
    """
    (G, K, W), centroids = centroids.shape, centroids.contiguous()
    planes = torch.empty((G, K, 8 * W), dtype=torch.int8, device=centroids.device)
    if G:
        grid = (triton.cdiv(G * K, _EXPAND_TILE["BLOCK_R"]), triton.cdiv(W, _EXPAND_TILE["BLOCK_W"]))
        with torch.cuda.device_of(centroids):
            _expand_by_bit_kernel[grid](centroids, planes, G * K, W, **_EXPAND_TILE)
    return planes


def _tile_for(tile: dict[str, int], K: int) -> dict[str, int]:
    """The tile, made narrower if K does not fill it."""
    return tile | {"BLOCK_K": max(_LEAST_K, min(tile["BLOCK_K"], triton.next_power_of_2(K)))}


def _descriptor(tensor: Tensor, rows: int, length: int) -> TensorDescriptor:
    """A TMA descriptor of [G, N, total length] for blocks of rows × length; elements outside read as zero."""
    return TensorDescriptor.from_tensor(tensor, [1, rows, length])


@triton.jit
def _assign_kernel(
    rows,  # descriptor of int8 [G, N, W], blocks [1, BLOCK_N, BLOCK_W]
    planes,  # descriptor of int8 [G, K, 8 · W], blocks [1, BLOCK_K, BLOCK_W]: see _expand_by_bit
    bits_ptr,  # int8 [8], only bit j set
    ids_ptr,  # int64 [G, N], out
    overlap_ptr,  # int32 [G, N], out, or None
    N,
    K,
    W,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Bit j of each byte is masked in place: one operation for the four neurons of a register. A set bit is then
    # worth 2^j (−128 for j = 7), and the factor in the centroid's plane makes it −128. Where a block of planes
    # reaches into the next bit's plane, the rows read as zero. The bit masks are loaded, not computed: with
    # computed ones the compiler moves the rows from shared memory to registers and back.
    g = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    column = BLOCK_K - 1 - tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_N], -1, tl.int32)
    best_tile = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for w0 in tl.range(0, W, BLOCK_W, flatten=True):
            x = rows.load([g, n0, w0]).reshape(BLOCK_N, BLOCK_W)
            for j in range(8):
                c = planes.load([g, k0, j * W + w0]).reshape(BLOCK_K, BLOCK_W)
                bit = tl.load(bits_ptr + j + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :])
                sums = tl.dot(x & bit, c.T, sums, out_dtype=tl.int32)
        # The key orders by overlap, then by the lower column. Clusters past K have overlap 0 and the highest
        # ids, so they never win.
        top = tl.max((sums >> 7) * -BLOCK_K + column[None, :], axis=1)
        # Strictly greater: on a tie the earlier tile keeps the row, as its ids are lower.
        better = (top | (BLOCK_K - 1)) > (best | (BLOCK_K - 1))
        best = tl.where(better, top, best)
        best_tile = tl.where(better, k0, best_tile)
    n = n0 + tl.arange(0, BLOCK_N)
    to = g.to(tl.int64) * N + n
    tl.store(ids_ptr + to, (best_tile + (BLOCK_K - 1 - best % BLOCK_K)).to(tl.int64), mask=n < N)
    if overlap_ptr is not None:
        tl.store(overlap_ptr + to, best // BLOCK_K, mask=n < N)


@grouped(_check)
def assign_triton(rows: Tensor, centroids: Tensor, *, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """`assign` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    rows = align_rows(rows)
    (G, N, W), K = rows.shape, centroids.shape[1]
    ids, overlap = empty_results(rows, scores)
    if N and G:
        tile = _tile_for(_TILE, K)
        row_blocks = _descriptor(rows.view(torch.int8), tile["BLOCK_N"], tile["BLOCK_W"])
        planes = _descriptor(_expand_by_bit(centroids), tile["BLOCK_K"], tile["BLOCK_W"])
        with torch.cuda.device_of(rows):
            _assign_kernel[(triton.cdiv(N, tile["BLOCK_N"]), G)](
                row_blocks, planes, _bits(rows.device), ids, overlap, N, K, W, **tile
            )
    return ids, overlap


@functools.cache
def _bits(device: torch.device) -> Tensor:
    """int8 [8] on the device: 1, 2, … 64, −128."""
    return torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=device).view(torch.int8)


@triton.jit
def _assign_weighted_kernel(
    importance,  # descriptor of uint8 [G, N, D], blocks [1, BLOCK_N, BLOCK_D]
    planes,  # descriptor of int8 [G, K, D], blocks [1, BLOCK_K, BLOCK_D]: the centroids' bits
    ones_ptr,  # int32 [G, K], number of set bits
    ids_ptr,  # int64 [G, N], out
    captured_ptr,  # int32 [G, N], out, or None
    N,
    K,
    D,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int8 has −128 … 127, so 128 is subtracted from an importance, or from either byte of its square.
    # Afterwards 128 per set bit of the centroid is added back.
    g = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    best = tl.full([BLOCK_N], -1, tl.int32)
    best_id = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        low = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        high = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for d0 in range(0, D, BLOCK_D):
            q = importance.load([g, n0, d0]).reshape(BLOCK_N, BLOCK_D)
            c = planes.load([g, k0, d0]).reshape(BLOCK_K, BLOCK_D).T
            if POWER == 1:
                low = tl.dot((q ^ 128).to(tl.int8, bitcast=True), c, low, out_dtype=tl.int32)
            else:
                square = q.to(tl.uint16) * q.to(tl.uint16)
                low = tl.dot((square.to(tl.uint8) ^ 128).to(tl.int8, bitcast=True), c, low, out_dtype=tl.int32)
                high = tl.dot(((square >> 8).to(tl.uint8) ^ 128).to(tl.int8, bitcast=True), c, high, out_dtype=tl.int32)
        ones = tl.load(ones_ptr + g * K + k, mask=k < K, other=0)[None, :]
        captured = low + 128 * ones
        if POWER == 2:
            captured += 256 * (high + 128 * ones)
        # Clusters past K capture nothing and have the highest ids, so they never win.
        tile_best = tl.max(captured, axis=1)
        tile_id = tl.min(tl.where(captured == tile_best[:, None], k[None, :], k0 + BLOCK_K), axis=1)
        better = tile_best > best  # strictly greater: on a tie the earlier tile keeps the row, as its ids are lower
        best = tl.where(better, tile_best, best)
        best_id = tl.where(better, tile_id, best_id)
    n = n0 + tl.arange(0, BLOCK_N)
    to = g.to(tl.int64) * N + n
    tl.store(ids_ptr + to, best_id.to(tl.int64), mask=n < N)
    if captured_ptr is not None:
        tl.store(captured_ptr + to, best, mask=n < N)


@grouped(_check_weighted)
def assign_weighted_triton(
    importance: Tensor, centroids: Tensor, power: int = 1, *, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`assign_weighted` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    importance = align_rows(importance)
    (G, N, D), K = importance.shape, centroids.shape[1]
    ids, captured = empty_results(importance, scores)
    if N and G:
        tile = _tile_for(_WEIGHTED_TILES[power], K)
        row_blocks = _descriptor(importance, tile["BLOCK_N"], tile["BLOCK_D"])
        planes = _descriptor(_expand(centroids, D).view(torch.int8), tile["BLOCK_K"], tile["BLOCK_D"])
        with torch.cuda.device_of(importance):
            grid = (triton.cdiv(N, tile["BLOCK_N"]), G)
            _assign_weighted_kernel[grid](
                row_blocks, planes, popcount(centroids), ids, captured, N, K, D, POWER=power, **tile
            )
    return ids, captured
