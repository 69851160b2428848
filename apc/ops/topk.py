"""Masks of the m largest numbers of each row, without or with a gradient. Shape letters: see `apc.ops`; n rows."""

import numpy as np
import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.bits import describe, on_cpu

LONGEST = 2**15  # numbers that one program can keep in registers; longer rows use torch.topk
_NUMBERS_PER_THREAD = 16


@triton.jit
def largest(height, m):
    """The mask bool [BLOCK] of exactly the m largest of unsigned integers [BLOCK], ties to the lowest index."""
    # Bisection: the m-th largest is from `low` to `high`, as at least m are ≥ low and fewer than m are > high.
    low = tl.min(height, axis=0)
    high = tl.max(height, axis=0)
    while low < high:
        middle = high - ((high - low) >> 1)
        count = tl.sum((height >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= m, middle, low)
        # With exactly m numbers ≥ middle the bisection ends: the m-th largest itself is not needed.
        high = tl.where(count > m, high, tl.where(count == m, middle, middle - 1))
    mask = height >= low
    if tl.sum(mask.to(tl.int32), axis=0) > m:
        above = height > low
        tie = (height == low).to(tl.int32)
        room = m - tl.sum(above.to(tl.int32), axis=0)
        mask = above | ((tie > 0) & (tl.cumsum(tie, axis=0) <= room))
    return mask


@triton.jit
def _top_kernel(
    values_ptr,  # float [n, D]
    mask_ptr,  # any type [n, D], out: 1 and 0
    least_ptr,  # float32 [n], out: the m-th largest
    m,
    D,
    stride,  # between rows of values
    SPREAD_NAN: tl.constexpr,  # whether the mask of a row with a NaN is NaN
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    values = tl.load(values_ptr + n * stride + d, mask=d < D, other=float("-inf")).to(tl.float32) + 0.0  # -0.0 → 0.0
    nan = values != values
    values = tl.where(nan, float("-inf"), values)
    bits = values.to(tl.uint32, bitcast=True)
    # Unsigned integers in the order of the floats; 0 is below −∞.
    height = tl.where(d < D, bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000), 0)
    mask = largest(height, m)
    tl.store(least_ptr + n, tl.min(tl.where(mask, values, float("inf")), axis=0))
    kept = mask.to(tl.float32)
    if SPREAD_NAN:
        kept = tl.where(tl.sum(nan.to(tl.int32), axis=0) > 0, float("nan"), kept)
    tl.store(mask_ptr + n * D + d, kept.to(mask_ptr.dtype.element_ty), mask=d < D)


def warps_for(block: int) -> int:
    """The warps of a program that keeps `block` numbers in registers."""
    return min(max(block // (32 * _NUMBERS_PER_THREAD), 1), 32)


def _top_triton(values: Tensor, m: int, dtype: torch.dtype, spread_nan: bool = False) -> tuple[Tensor, Tensor]:
    """The mask of `dtype` [..., D] and the m-th largest float32 [..., 1]."""
    D = values.shape[-1]
    rows = values.reshape(-1, D) if values.stride(-1) == 1 else values.contiguous().view(-1, D)
    mask = torch.empty(values.shape, dtype=dtype, device=values.device)
    least = torch.empty((*values.shape[:-1], 1), dtype=torch.float32, device=values.device)
    if mask.numel():
        block = triton.next_power_of_2(D)
        out = mask.view(torch.uint8) if dtype == torch.bool else mask
        with torch.cuda.device_of(values):
            _top_kernel[(len(rows),)](
                rows, out, least, m, D, rows.stride(0), SPREAD_NAN=spread_nan, BLOCK_D=block, num_warps=warps_for(block)
            )
    return mask, least


def _check(values: Tensor, m: int) -> None:
    if not 1 <= m <= values.shape[-1]:
        raise ValueError(f"m must be from 1 to D = {values.shape[-1]}, got {m} for values {describe(values)}")


def _check_nan(values: Tensor) -> None:
    if values.is_floating_point() and values.isnan().any():
        raise ValueError(f"values {describe(values)} contain NaN")


def top_mask(values: Tensor, m: int, check: bool = True) -> Tensor:
    """The mask of exactly the m largest numbers of each row, ties to the lowest index: [..., D] → bool [..., D].

    Raises ValueError unless 1 ≤ m ≤ D, and for NaN. check=False skips the check for NaN, so that the host does not
    wait for the GPU; NaN then counts as −∞.
    """
    _check(values, m)
    if check:
        _check_nan(values)
    elif on_cpu(values) and values.is_floating_point():
        values = values.masked_fill(values.isnan(), -torch.inf)
    if (
        not on_cpu(values)
        and values.is_floating_point()
        and values.dtype != torch.float64
        and values.shape[-1] <= LONGEST
    ):
        return _top_triton(values, m, torch.bool)[0]
    return _top_torch(values, m)


def top_mask_triton(values: Tensor, m: int) -> Tensor:
    """`top_mask` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.

    It takes floats of at most 32 bits and rows of up to 32,768.
    """
    _check(values, m)
    _check_nan(values)
    if not values.is_floating_point() or values.dtype == torch.float64 or values.shape[-1] > LONGEST:
        raise ValueError(
            f"top_mask_triton takes floats of at most 32 bits [..., D ≤ {LONGEST}], got values {describe(values)}"
        )
    return _top_triton(values, m, torch.bool)[0]


def _top_torch(values: Tensor, m: int) -> Tensor:
    """`top_mask` of values without NaN."""
    least = _mth_largest(values, m)
    mask = values >= least
    if (mask.sum(-1) == m).all():  # no ties at the m-th: usual for floats, and it saves a cumulative sum
        return mask
    above = values > least
    ties = mask & ~above
    room = m - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def _mth_largest(values: Tensor, m: int) -> Tensor:
    """The m-th largest of each row: [..., D] → [..., 1].

    On a CPU numpy's partition is five times as fast as torch.topk at D = 1,536, m = 768.
    """
    if values.device.type == "cpu":
        ranked = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        position = values.shape[-1] - m
        least = np.partition(ranked.detach().numpy(), position, axis=-1)[..., position : position + 1]
        return torch.from_numpy(least).to(values.dtype)
    return values.topk(m, dim=-1, sorted=False).values.amin(-1, keepdim=True)


@triton.jit
def _slope_kernel(
    gradient_ptr,  # float [n, D], of the masks
    scores_ptr,  # float32 [n, D]
    least_ptr,  # float32 [n]
    out_ptr,  # float32 [n, D], out: the gradient of the scores
    steepness,  # 1 / temperature
    D,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    scores = tl.load(scores_ptr + n * D + d, mask=inside, other=0.0)
    share = tl.sigmoid((scores - tl.load(least_ptr + n)) * steepness)
    gradient = tl.load(gradient_ptr + n * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + d, gradient * share * (1 - share) * steepness, mask=inside)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, m: int, temperature: float, dtype: torch.dtype, by_triton: bool) -> Tensor:
        ctx.temperature, ctx.by_triton = temperature, by_triton
        if by_triton:
            mask, least = _top_triton(scores, m, dtype, spread_nan=True)
        else:
            bad = scores.isnan()
            ranked = scores.masked_fill(bad, -torch.inf)
            kept = _top_torch(ranked, m)
            least = ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            mask = kept.to(dtype).masked_fill(bad.any(-1, keepdim=True), torch.nan)
        ctx.save_for_backward(scores, least)
        return mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, least = ctx.saved_tensors
        if not ctx.by_triton:
            share = torch.sigmoid((scores - least) / ctx.temperature)
            return gradient.float() * share * (1 - share) / ctx.temperature, None, None, None, None
        out, D = torch.empty_like(scores), scores.shape[-1]
        if out.numel():
            block = min(1024, triton.next_power_of_2(D))
            with torch.cuda.device_of(scores):
                grid = (out.numel() // D, triton.cdiv(D, block))
                _slope_kernel[grid](gradient.contiguous(), scores, least, out, 1 / ctx.temperature, D, BLOCK_D=block)
        return out, None, None, None, None


def straight_through(scores: Tensor, m: int, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of each row's m largest scores as 0 and 1, with a straight-through gradient.

    float32 [..., D] → `dtype` [..., D]. The gradient is that of σ((score − m-th largest) / temperature), the
    estimator of Bengio et al. (2013). A row with NaN gets a mask of NaN; an error instead would make the host wait for
    the device. Raises ValueError unless 1 ≤ m ≤ D and the scores are float32.
    """
    return _straight_through(scores, m, temperature, dtype, not on_cpu(scores) and scores.shape[-1] <= LONGEST)


def straight_through_triton(scores: Tensor, m: int, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`straight_through` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    return _straight_through(scores, m, temperature, dtype, True)


def _straight_through(scores: Tensor, m: int, temperature: float, dtype: torch.dtype, by_triton: bool) -> Tensor:
    _check(scores, m)
    if scores.dtype != torch.float32:
        raise ValueError(f"straight_through wants scores as float32 [..., D], got {describe(scores)}")
    return _StraightThrough.apply(scores.contiguous(), m, temperature, dtype, by_triton)
