"""Packed masks of exactly m ones, from sums or from patterns. Shape letters: see `apc.ops`."""

import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.bits import describe, mask_size, on_cpu, pack, row_bytes
from apc.ops.topk import LONGEST, largest, top_mask, warps_for

# The kernel keeps a row in the registers of one program. A row of 16,384 int64 takes half of a
# multiprocessor's 256 KB. One of 32,768 (`LONGEST`) takes all of it, and about half spills to the L1 cache.
# int32 takes half as much. Longer rows go through `top_mask`.

_FREQUENCY_BITS = 31  # bits of the count in `cut_or_fill`'s keys, below 31 bits of importance and one of activity


def binarize(sums: Tensor, density: float) -> Tensor:
    """The mask of the m = mask_size(D, density) neurons with the largest sums in each row, ties to the lowest index.

    int64 or int32 [..., D] → uint8 [..., W]. Raises ValueError for another dtype, and unless 0 < density ≤ 1.
    """
    return _pack_top(sums, _check(sums, density))


def _pack_top(values: Tensor, m: int) -> Tensor:
    if on_cpu(values) or 8 * row_bytes(values.shape[-1]) > LONGEST:
        return pack(top_mask(values, m))
    return _pack_top_triton(values, m)


def _check(sums: Tensor, density: float) -> int:
    """Check the arguments of `binarize`, and return m, the number of ones in each row."""
    if sums.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"binarize wants sums as int64 or int32 [K, D], got {describe(sums)}")
    return mask_size(sums.shape[-1], density)


@triton.jit
def _binarize_kernel(
    sums_ptr,  # int64 or int32 [K, D]
    centroids_ptr,  # uint8 [K, W], out
    m,
    D,
    W,
    LARGEST: tl.constexpr,  # the largest number of the sums' type
    HEIGHT: tl.constexpr,  # the unsigned type of the same size
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    sums = tl.load(sums_ptr + k * D + d, mask=d < D, other=LARGEST)
    least = tl.min(sums, axis=0)
    # A sum's height is its distance from the row's smallest sum, as an unsigned number. Past D it is 0; ties go to
    # the lowest index, so these elements never enter the mask.
    height = tl.where(d < D, sums - least, 0).to(HEIGHT, bitcast=True)
    mask = largest(height, m)
    bits = tl.reshape(mask.to(tl.int32), [BLOCK_D // 8, 8]) << tl.arange(0, 8)[None, :]
    w = tl.arange(0, BLOCK_D // 8)
    tl.store(centroids_ptr + k * W + w, tl.sum(bits, axis=1).to(tl.uint8), mask=w < W)


def binarize_triton(sums: Tensor, density: float) -> Tensor:
    """`binarize` of up to 32,768 neurons by its Triton kernel: for CUDA, or for the CPU under TRITON_INTERPRET=1."""
    return _pack_top_triton(sums, _check(sums, density))


def _pack_top_triton(sums: Tensor, m: int) -> Tensor:
    D = sums.shape[-1]
    W = row_bytes(D)
    block = triton.next_power_of_2(8 * W)
    if block > LONGEST:
        raise ValueError(f"binarize_triton takes up to {LONGEST} neurons, got sums {describe(sums)}")
    centroids = torch.empty((*sums.shape[:-1], W), dtype=torch.uint8, device=sums.device)
    if centroids.numel():
        with torch.cuda.device_of(sums):
            height = tl.uint32 if sums.dtype == torch.int32 else tl.uint64
            constants = {"LARGEST": torch.iinfo(sums.dtype).max, "HEIGHT": height, "BLOCK_D": block}
            _binarize_kernel[(centroids.numel() // W,)](
                sums.contiguous(), centroids, m, D, W, **constants, num_warps=warps_for(block)
            )
    return centroids


def cut_or_fill(active: Tensor, m: int, importance: Tensor | None = None, frequency: Tensor | None = None) -> Tensor:
    """Packed patterns cut or filled to exactly m ones: bool [..., D] → uint8 [..., W].

    Keeps the first m neurons in this order: active before inactive, then higher importance, then higher frequency,
    then lower index.

    Args:
        active: bool [..., D].
        m: number of ones in each mask.
        importance: uint8 or float of up to 32 bits [..., D], not negative.
        frequency: integers [D], or any shape that broadcasts to active's; counts above 2³¹ − 1 rank as 2³¹ − 1.

    Raises:
        ValueError: for other shapes or dtypes, and for negative or NaN importance.
    """
    if active.dtype != torch.bool:
        raise ValueError(f"cut_or_fill wants active as bool [..., D], got {describe(active)}")
    key = active.to(torch.int64) << 62
    if importance is not None:
        key |= _rank_bits(active, importance).to(torch.int64) << _FREQUENCY_BITS
    if frequency is not None:
        if frequency.is_floating_point() or not _broadcasts(frequency.shape, active.shape):
            raise ValueError(
                f"frequency {describe(frequency)} must be integers that broadcast to active {describe(active)}"
            )
        key |= frequency.to(torch.int64).clamp(0, 2**_FREQUENCY_BITS - 1)
    if not 1 <= m <= active.shape[-1]:
        raise ValueError(f"m must be from 1 to D = {active.shape[-1]}, got {m} for active {describe(active)}")
    return _pack_top(key, m)


def _rank_bits(active: Tensor, importance: Tensor) -> Tensor:
    """Importance as int32 of the same order: the bits of a non-negative IEEE float32 increase with its value."""
    if (
        importance.dtype not in (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
        or importance.shape != active.shape
    ):
        raise ValueError(
            f"importance {describe(importance)} must be uint8 or a float of up to 32 bits, "
            f"and shaped like active {describe(active)}"
        )
    if not (importance >= 0).all():
        raise ValueError(f"importance {describe(importance)} has negative values or NaN")
    return importance.float().abs().contiguous().view(torch.int32)  # abs clears the sign bit of -0.0


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
