"""Rows aligned to 16 bytes, as TMA copies and 128-bit loads need them. Shape letters: see `apc.ops`."""

import torch
from torch import Tensor

from apc.ops._triton import tl, triton

ROW_ALIGN = 16  # bytes: the alignment of a 128-bit load, kept for every row whatever D is
# Bytes of a cache line. Rows allocated here start on one, so a TMA copy of 128 bytes reads one line, not two halves.
_LINE = 128

# Kernel tile, rows × 64-bit words: half a warp copies 256 bytes of a row, and each thread has 16 loads in flight.
_TILE = {"BLOCK_N": 32, "BLOCK_W": 32, "num_warps": 4}


@triton.jit(
    do_not_specialize=["low", "high", "N", "D", "quads", "pitch", "strips", "stride_g", "stride_n"]
)  # specialising gains nothing and compiles more kernels
def _copy_kernel(
    rows_ptr,  # uint8 [G, N, D], strides stride_g, stride_n, 1; any alignment
    lines_ptr,  # uint64 [G, N, 2 · quads], out; rows `pitch` words apart
    low,  # address of the first readable byte
    high,  # address after the last readable byte
    N,
    D,
    quads,  # ⌈D/16⌉
    pitch,
    strips,  # blocks of BLOCK_W words in a row
    stride_g,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n0 = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    w = ((tl.program_id(0) % strips) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    d = 8 * w
    group = rows_ptr.to(tl.int64) + g * stride_g
    end = group + (tl.minimum(n0 + BLOCK_N, N) - 1) * stride_n + D
    if (((group + n0 * stride_n) & -8) >= low) & (((end + 7) & -8) <= high):
        # 8 bytes of the row lie in two aligned words. Load both (the second mostly hits L1) and shift them together.
        row = group + n * stride_n
        skew = row & 7
        words = (row - skew + d).to(tl.pointer_type(tl.uint64))
        left = tl.load(words, mask=(n < N) & (d < D), other=0)
        right = tl.load(words + 1, mask=(n < N) & (d + 8 - skew < D), other=0)
        shift = (8 * skew).to(tl.uint64)
        line = (left >> shift) | ((right << 1) << (63 - shift))
        past = 8 - tl.minimum(tl.maximum(D - d, 1), 8)  # bytes of the last word beyond the row's end
        line &= tl.full([1, BLOCK_W], 0xFFFFFFFFFFFFFFFF, tl.uint64) >> (8 * past).to(tl.uint64)
    else:  # aligned words would reach beyond the tensor's memory: load single bytes
        line = tl.zeros([BLOCK_N, BLOCK_W], tl.uint64)
        for j in tl.static_range(8):
            byte = tl.load(rows_ptr + g * stride_g + n * stride_n + d + j, mask=(n < N) & (d + j < D), other=0)
            line |= byte.to(tl.uint64) << (8 * j)
    tl.store(lines_ptr + (g * N + n) * pitch + w, line, mask=(n < N) & (w < 2 * quads))


def empty_aligned(G: int, N: int, length: int, device: torch.device) -> Tensor:
    """Uninitialised uint8 [G, N, length] whose rows start on cache lines. `length` must be a multiple of 16."""
    pitch = -(-length // _LINE) * _LINE
    return torch.empty((G, N, pitch), dtype=torch.uint8, device=device)[..., :length]


def align_rows(rows: Tensor) -> Tensor:
    """Rows that TMA can read: `rows` itself, uint8 [G, N, D], if aligned, else an aligned copy.

    Aligned means: D, both strides and the address are multiples of 16, the bytes of a row are contiguous, and no two
    rows share memory. The copy is [G, N, D rounded up to 16] with zeros at the end. A Triton kernel makes it: for CUDA
    tensors, or CPU tensors under TRITON_INTERPRET=1.
    """
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    G, N, D = rows.shape
    repeats = (G > 1 and not rows.stride(0)) or (N > 1 and not rows.stride(1))
    if not (
        D % ROW_ALIGN
        or rows.stride(0) % ROW_ALIGN
        or rows.stride(1) % ROW_ALIGN
        or rows.data_ptr() % ROW_ALIGN
        or repeats
    ):
        return rows
    quads, tile = triton.cdiv(D, ROW_ALIGN), dict(_TILE)
    aligned = empty_aligned(G, N, ROW_ALIGN * quads, rows.device)
    if aligned.numel():
        strips, memory = triton.cdiv(2 * quads, tile["BLOCK_W"]), rows.untyped_storage()
        bounds = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        with torch.cuda.device_of(rows):
            grid = (triton.cdiv(N, tile["BLOCK_N"]) * strips, G)
            words = aligned.view(torch.uint64)
            _copy_kernel[grid](
                rows, words, *bounds, N, D, quads, words.stride(1), strips, rows.stride(0), rows.stride(1), **tile
            )
    return aligned


def aligned_words(rows: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [G, N, W] → `align_rows` of it as int32 [G, N, ⌈W/16⌉ · 4], and the strides of groups and rows.

    The strides count units of 16 bytes. A kernel multiplies them by 4 words, so the compiler sees that it may load
    128 bits at a time.
    """
    aligned = align_rows(rows)
    return aligned.view(torch.int32), (aligned.stride(0) // ROW_ALIGN, aligned.stride(1) // ROW_ALIGN)
