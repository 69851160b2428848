"""Bit-packed patterns: pack, unpack and count bits. Also the argument checks that all operations share.

Bit j of byte w is neuron 8w + j; padding bits are zero. Shape letters: see `apc.ops`.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.alignment import ROW_ALIGN, aligned_words

# Kernel tile, rows × 32-bit words: each program has 8 KB in flight. Short rows are read in full 32-byte sectors too.
_POPCOUNT_TILE = {"BLOCK_N": 32, "BLOCK_W": 64, "num_warps": 4}


def row_bytes(D: int) -> int:
    """W, the bytes of a packed row of D neurons."""
    return (D + 8 * ROW_ALIGN - 1) // (8 * ROW_ALIGN) * ROW_ALIGN


def pack(active: Tensor) -> Tensor:
    """Packed rows of `active`: bool [..., D] → uint8 [..., W]. Raises ValueError for another dtype."""
    if active.dtype != torch.bool:
        raise ValueError(f"pack wants bool [..., D], got {describe(active)}")
    if not on_cpu(active):
        return pack_triton(active)
    D = active.shape[-1]
    rows = torch.zeros((*active.shape[:-1], row_bytes(D)), dtype=torch.uint8)
    # numpy packs 8,192 × 1,536 bits in 1 ms; shifts in torch take 14 ms.
    rows[..., : (D + 7) // 8] = torch.from_numpy(np.packbits(active.numpy(), axis=-1, bitorder="little"))
    return rows


@triton.jit
def _pack_kernel(
    active_ptr,  # uint8 [N, D] of 0 and 1, rows `stride` apart
    rows_ptr,  # uint8 [N, W], out
    D,
    W,
    stride,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    j = tl.arange(0, 8)
    d = 8 * w[:, None] + j[None, :]
    bits = tl.load(active_ptr + n * stride + d, mask=d < D, other=0).to(tl.int32) << j[None, :]
    tl.store(rows_ptr + n * W + w, tl.sum(bits, axis=1).to(tl.uint8), mask=w < W)


def pack_triton(active: Tensor) -> Tensor:
    """`pack` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    D = active.shape[-1]
    W = row_bytes(D)
    rows = torch.empty((*active.shape[:-1], W), dtype=torch.uint8, device=active.device)
    if rows.numel():
        flat = active.reshape(-1, D) if active.stride(-1) == 1 else active.contiguous().view(-1, D)
        block = min(256, triton.next_power_of_2(W))
        with torch.cuda.device_of(active):
            _pack_kernel[(len(flat), triton.cdiv(W, block))](
                flat.view(torch.uint8), rows, D, W, flat.stride(0), BLOCK_W=block
            )
    return rows


def unpack(rows: Tensor, D: int) -> Tensor:
    """The bits of packed rows: uint8 [..., W] → bool [..., D]. Raises ValueError unless W is `row_bytes(D)`."""
    if rows.dtype != torch.uint8 or rows.shape[-1] != row_bytes(D):
        raise ValueError(f"unpack wants uint8 [..., {row_bytes(D)}] for D = {D}, got {describe(rows)}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # which can't trace numpy's function
        return torch.from_numpy(np.unpackbits(rows.numpy(), axis=-1, count=D, bitorder="little")).view(torch.bool)
    bits = (rows.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=rows.device)) & 1
    return bits.flatten(-2)[..., :D].bool()


def popcount(rows: Tensor) -> Tensor:
    """The number of ones in each row: uint8 [..., W] → int32 [...] (Warren, Hacker's Delight, figure 5-2, on bytes)."""
    _check_popcount(rows)
    if not on_cpu(rows):
        return popcount_triton(rows)
    pairs = rows - ((rows >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1, dtype=torch.int32)


def _check_popcount(rows: Tensor) -> None:
    if rows.dtype != torch.uint8:
        raise ValueError(f"popcount wants uint8 [..., W], got {describe(rows)}")


@triton.jit
def popcount_words(x):
    """The number of ones in each word, int32: x is uint32 (Warren, Hacker's Delight, figure 5-2)."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _popcount_kernel(
    rows_ptr,  # int32 [G, N, W/4], strides 4·stride_g, 4·stride_n, 1
    counts_ptr,  # int32 [G, N], out
    N,
    quads,  # W/16
    stride_g,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    row_ptrs = rows_ptr + (g * stride_g + n[:, None] * stride_n) * 4 + w[None, :]
    counts = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
    for w0 in range(0, quads * 4, BLOCK_W):
        x = tl.load(row_ptrs + w0, mask=(n < N)[:, None] & (w0 + w < quads * 4)[None, :], other=0).to(
            tl.uint32, bitcast=True
        )
        counts += popcount_words(x)
    tl.store(counts_ptr + g * N + n, tl.sum(counts, axis=1), mask=n < N)


def popcount_triton(rows: Tensor) -> Tensor:
    """`popcount` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    _check_popcount(rows)
    lead = rows.shape[:-1]
    counts = torch.empty(lead, dtype=torch.int32, device=rows.device)
    if not rows.numel():
        return counts.zero_()
    rows = rows if rows.dim() == 3 else rows.unsqueeze(0) if rows.dim() == 2 else rows.reshape(1, -1, rows.shape[-1])
    words, strides = aligned_words(rows)
    G, N, W = words.shape
    tile = dict(_POPCOUNT_TILE)
    grid = (triton.cdiv(N, tile["BLOCK_N"]), G)
    with torch.cuda.device_of(rows):
        _popcount_kernel[grid](words, counts, N, W // 4, *strides, **tile)
    return counts


def mask_size(D: int, density: float) -> int:
    """m, the number of ones in every centroid: max(1, ⌊density·D + ½⌋). Raises ValueError unless 0 < density ≤ 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    return max(1, math.floor(density * D + 0.5))


def describe(tensor: Tensor) -> str:
    """The dtype and shape of a tensor, for error messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_tensor(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple, other: Tensor, other_name: str) -> None:
    """Check that `tensor` has this dtype and shape (None: any size) and is on the device of `other`.

    Raises ValueError that states both shapes.
    """
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        want = [size if size is not None else "any" for size in shape]
        dtype_name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} {describe(tensor)} must be {dtype_name} {want} to go with {other_name} {describe(other)}"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} {describe(tensor)} is on {tensor.device}, {other_name} {describe(other)} on {other.device}"
        )


def empty_results(rows: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """Uninitialised results for rows [G, N, ...], on their device: ids int64 [G, N]; scores int32 [G, N] or None."""
    lead, device = rows.shape[:2], rows.device
    ids = torch.empty(lead, dtype=torch.int64, device=device)
    return ids, torch.empty(lead, dtype=torch.int32, device=device) if scores else None


def grouped(check: Callable) -> Callable:
    """Decorator that lets a function of tensors [G, ...] also take tensors without G.

    It first calls `check` with the same arguments. If the caller passes `out`, a tuple of tensors to write to,
    that same tuple is returned.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            check(*args, **kwargs)
            if any(isinstance(value, Tensor) and value.dim() == 3 for value in (*args, *kwargs.values())):
                return function(*args, **kwargs)
            results = function(*map(_lift, args), **{name: _lift(value) for name, value in kwargs.items()})
            out = kwargs.get("out")
            return _drop(results) if out is None else out

        return call

    return decorate


def _lift(value):
    """The value with a group dimension of 1 added to every tensor in it."""
    if isinstance(value, tuple):
        return tuple(map(_lift, value))
    return value.unsqueeze(0) if isinstance(value, Tensor) else value


def _drop(value):
    """The value with the group dimension removed from every tensor in it."""
    if isinstance(value, tuple):
        return tuple(map(_drop, value))
    return value.squeeze(0) if isinstance(value, Tensor) else value


def on_cpu(tensor: Tensor) -> bool:
    """True for a CPU tensor, False for a CUDA one. Raises ValueError for any other device: no operation runs there."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"apc.ops run on cpu and cuda, got {describe(tensor)} on {tensor.device}")
    return tensor.device.type == "cpu"
