"""Rows where the copy engine and 128-bit loads can take them: each in one piece that starts on 16 bytes. Shape letters: see `bits.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_ALIGN = 16  # bytes: a row starts where a 128-bit load may, whatever D is
_LINE = 128  # bytes of a cache line: where rows that are made here start, so that the copy engine's 128 bytes are one line and not two halves

# Kernel tile, rows × 64-bit words: half a warp on 256 bytes of a row, 16 loads in flight from each thread.
_TILE = {"BLOCK_N": 32, "BLOCK_W": 32, "num_warps": 4}


@triton.jit(
    do_not_specialize=["low", "high", "N", "D", "quads", "pitch", "strips", "stride_g", "stride_n"]
)  # nothing to gain: one kernel to compile
def _copy_kernel(
    rows_ptr,  # uint8 [G, N, D], strides stride_g, stride_n, 1, from any byte on
    lines_ptr,  # uint64 [G, N, 2 · quads], out, the rows `pitch` apart
    low,  # address of the first byte that may be read
    high,  # of the one after the last
    N,
    D,
    quads,  # ⌈D/16⌉
    pitch,
    strips,  # of BLOCK_W words in a line
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
        # 8 bytes of the row lie in two words that start on 8 bytes: both are read, the second mostly from the L1 cache, and shifted together.
        row = group + n * stride_n
        skew = row & 7
        words = (row - skew + d).to(tl.pointer_type(tl.uint64))
        left = tl.load(words, mask=(n < N) & (d < D), other=0)
        right = tl.load(words + 1, mask=(n < N) & (d + 8 - skew < D), other=0)
        shift = (8 * skew).to(tl.uint64)
        line = (left >> shift) | ((right << 1) << (63 - shift))
        past = 8 - tl.minimum(tl.maximum(D - d, 1), 8)  # bytes of the row's last word that are not the row's
        line &= tl.full([1, BLOCK_W], 0xFFFFFFFFFFFFFFFF, tl.uint64) >> (8 * past).to(tl.uint64)
    else:  # such words would reach beyond the tensor's memory
        line = tl.zeros([BLOCK_N, BLOCK_W], tl.uint64)
        for j in tl.static_range(8):
            byte = tl.load(rows_ptr + g * stride_g + n * stride_n + d + j, mask=(n < N) & (d + j < D), other=0)
            line |= byte.to(tl.uint64) << (8 * j)
    tl.store(lines_ptr + (g * N + n) * pitch + w, line, mask=(n < N) & (w < 2 * quads))


def empty_lines(G: int, N: int, length: int, device: torch.device) -> Tensor:
    """uint8 [G, N, length], a multiple of 16, of unknown content: rows that start on cache lines, with unused bytes between them if need be."""
    pitch = -(-length // _LINE) * _LINE
    return torch.empty((G, N, pitch), dtype=torch.uint8, device=device)[..., :length]


def whole_lines(rows: Tensor) -> Tensor:
    """uint8 [G, N, D] → itself where D and the strides of groups and rows are multiples of 16, rows start on 16 bytes, each in one piece, and none
    is another one too.

    Else a copy [G, N, D rounded up to 16], zero at the end, by a Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.
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
    lines = empty_lines(G, N, ROW_ALIGN * quads, rows.device)
    if lines.numel():
        strips, memory = triton.cdiv(2 * quads, tile["BLOCK_W"]), rows.untyped_storage()
        bounds = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        with torch.cuda.device_of(rows):
            grid = (triton.cdiv(N, tile["BLOCK_N"]) * strips, G)
            words = lines.view(torch.uint64)
            _copy_kernel[grid](
                rows, words, *bounds, N, D, quads, words.stride(1), strips, rows.stride(0), rows.stride(1), **tile
            )
    return lines


def row_words(rows: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [G, N, W] → its `whole_lines` as int32 [G, N, ⌈W/16⌉ · 4], and strides of groups and rows in units of 16 bytes: so a kernel
    that multiplies them by 4 words knows that it may load 128 bits.
    """
    lines = whole_lines(rows)
    return lines.view(torch.int32), (lines.stride(0) // ROW_ALIGN, lines.stride(1) // ROW_ALIGN)
