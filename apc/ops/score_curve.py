"""Scores of neurons from the products of their low-bit weights with an input. Shape letters: see `apc.ops`."""

from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.bits import describe, on_cpu

_TILE = {"BLOCK_N": 16, "BLOCK_D": 128}
_SLAB = 128  # tokens whose gradients one program adds up; the order of additions is fixed


class ScoreCurve(NamedTuple):
    """The parameters of the score curve of one layer (`score_curve` takes those of G layers)."""

    scale: Tensor  # float32 [P, D]
    slope: Tensor  # float32 [P, D]
    power: Tensor  # float32 [P, D]
    bias: Tensor  # float32 [D]


@triton.jit
def _curve_kernel(
    products_ptr,  # float [G, n, P, D]
    scale_ptr,  # float32 [G, P, D]
    slope_ptr,  # float32 [G, P, D]
    power_ptr,  # float32 [G, P, D]
    bias_ptr,  # float32 [G, D]
    scores_ptr,  # float32 [G, n, D], out
    N,
    D,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    row = g * N + n.to(tl.int64)
    score = tl.load(bias_ptr + g * D + d, mask=d < D, other=0.0)[None, :] + tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for p in tl.static_range(P):
        at = (g * P + p) * D + d
        z = tl.load(products_ptr + (row[:, None] * P + p) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        z *= tl.load(scale_ptr + at, mask=d < D, other=0.0)[None, :]
        score += tl.load(slope_ptr + at, mask=d < D, other=0.0)[None, :] * z
        score += tl.load(power_ptr + at, mask=d < D, other=0.0)[None, :] * tl.log(1 + z * z)
    tl.store(scores_ptr + row[:, None] * D + d[None, :], score, mask=inside)


@triton.jit
def _curve_gradient_kernel(
    gradient_ptr,  # float32 [G, n, D]: the gradient of the scores
    products_ptr,  # float [G, n, P, D]
    scale_ptr,  # float32 [G, P, D]
    slope_ptr,  # float32 [G, P, D]
    power_ptr,  # float32 [G, P, D]
    out_ptr,  # float [G, n, P, D], out: the gradient of the products
    sums_ptr,  # float32 [slabs, G, 3P + 1, D], out: gradients of scale, slope, power per projection, then of bias
    N,
    D,
    groups,
    P: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = sums_ptr + ((tl.program_id(0).to(tl.int64) * groups + g) * (3 * P + 1)) * D + d
    for p in tl.static_range(P):
        at = (g * P + p) * D + d
        scale = tl.load(scale_ptr + at, mask=d < D, other=0.0)[None, :]
        slope = tl.load(slope_ptr + at, mask=d < D, other=0.0)[None, :]
        power = tl.load(power_ptr + at, mask=d < D, other=0.0)[None, :]
        of_scale = tl.zeros([BLOCK_D], tl.float32)
        of_slope = tl.zeros([BLOCK_D], tl.float32)
        of_power = tl.zeros([BLOCK_D], tl.float32)
        of_bias = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, SLAB, BLOCK_N):
            n = tl.program_id(0) * SLAB + start + tl.arange(0, BLOCK_N)
            inside = (n < N)[:, None] & (d < D)[None, :]
            row = (g * N + n.to(tl.int64))[:, None]
            gradient = tl.load(gradient_ptr + row * D + d[None, :], mask=inside, other=0.0)
            product = tl.load(products_ptr + (row * P + p) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            z = scale * product
            of_z = gradient * (slope + power * 2 * z / (1 + z * z))
            tl.store(out_ptr + (row * P + p) * D + d[None, :], (of_z * scale).to(out_ptr.dtype.element_ty), mask=inside)
            of_scale += tl.sum(of_z * product, axis=0)
            of_slope += tl.sum(gradient * z, axis=0)
            of_power += tl.sum(gradient * tl.log(1 + z * z), axis=0)
            of_bias += tl.sum(gradient, axis=0)
        tl.store(sums + (3 * p) * D, of_scale, mask=d < D)
        tl.store(sums + (3 * p + 1) * D, of_slope, mask=d < D)
        tl.store(sums + (3 * p + 2) * D, of_power, mask=d < D)
        if p == 0:
            tl.store(sums + (3 * P) * D, of_bias, mask=d < D)


class _Curve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor) -> Tensor:
        G, N, P, D = products.shape
        scores = torch.empty((G, N, D), dtype=torch.float32, device=products.device)
        if scores.numel():
            grid = (triton.cdiv(N, _TILE["BLOCK_N"]), triton.cdiv(D, _TILE["BLOCK_D"]), G)
            with torch.cuda.device_of(products):
                _curve_kernel[grid](products, scale, slope, power, bias, scores, N, D, P=P, **_TILE)
        ctx.save_for_backward(products, scale, slope, power)
        return scores

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        products, scale, slope, power = ctx.saved_tensors
        G, N, P, D = products.shape
        out, slabs = torch.empty_like(products), triton.cdiv(N, _SLAB)
        sums = torch.empty((slabs, G, 3 * P + 1, D), dtype=torch.float32, device=products.device)
        if out.numel():
            with torch.cuda.device_of(products):
                grid = (slabs, triton.cdiv(D, _TILE["BLOCK_D"]), G)
                _curve_gradient_kernel[grid](
                    gradient.contiguous(), products, scale, slope, power, out, sums, N, D, G, P=P, SLAB=_SLAB, **_TILE
                )
        total = sums.sum(0)
        return out, *total[:, : 3 * P].unflatten(1, (P, 3)).unbind(2), total[:, 3 * P]


def score_curve(products: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor) -> Tensor:
    """The scores bias + Σ_p (slope_p · z_p + power_p · ln(1 + z_p²)) with z_p = scale_p · product_p, float32 [G, n, D].

    products: float [G, n, P, D]; scale, slope, power: float32 [G, P, D]; bias: float32 [G, D]. Raises
    ValueError for other shapes.
    """
    if not on_cpu(products):
        return score_curve_triton(products, scale, slope, power, bias)
    _check(products, scale, slope, power, bias)
    z = products.float() * scale.unsqueeze(1)
    return bias.unsqueeze(1) + (slope.unsqueeze(1) * z + power.unsqueeze(1) * torch.log1p(z.square())).sum(2)


def score_curve_triton(products: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor) -> Tensor:
    """`score_curve` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    _check(products, scale, slope, power, bias)
    return _Curve.apply(*(value.contiguous() for value in (products, scale, slope, power, bias)))


def _check(products: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor) -> None:
    G, _, P, D = products.shape if products.dim() == 4 else (None,) * 4
    if any(
        value.shape != (G, P, D) or value.dtype != torch.float32 for value in (scale, slope, power)
    ) or bias.shape != (G, D):
        shapes = ", ".join(describe(value) for value in (scale, slope, power, bias))
        raise ValueError(
            f"score_curve wants products [G, n, P, D], scale, slope and power float32 [G, P, D] and bias [G, D], "
            f"got {describe(products)} with {shapes}"
        )
