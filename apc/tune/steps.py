"""Masks of scores above a threshold, with straight-through gradients (Bengio et al., 2013).

The gradient of a step is that of σ(z / temperature), with z the score's distance to the threshold. Tensors for the
backward pass are kept as bfloat16: a slope needs no more, and the sign of z is exact.

Shape letters: n tokens, D neurons.
"""

from typing import Any

import torch
from torch import Tensor


def _slope(z: Tensor, temperature: float) -> Tensor:
    s = torch.sigmoid(z.float() / temperature)
    return s * (1 - s) / temperature


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(z.bfloat16())
        ctx.temperature = temperature
        return (z >= 0).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return gradient.float() * _slope(z, ctx.temperature), None, None


def step(scores: Tensor, threshold: Tensor, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 where scores float32 [...] reach the threshold [], else 0; with gradients to both."""
    return _Step.apply(scores - threshold, temperature, dtype)


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        nominated: Tensor,
        counted: Tensor,
        up_scores: Tensor,
        down_scores: Tensor,
        thresholds: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        z_up, z_down = (up_scores - thresholds[0]).bfloat16(), (down_scores - thresholds[1]).bfloat16()
        gate = nominated > 0.5
        up = gate & (z_up >= 0)
        down = up & (z_down >= 0)
        ctx.save_for_backward(gate, z_up, z_down)
        ctx.temperature, ctx.counted_dtype = temperature, counted.dtype
        return down.to(nominated.dtype), torch.stack([each.float().mean() for each in (gate, up, down)])

    @staticmethod
    def backward(ctx: Any, mask_gradient: Tensor, share_gradient: Tensor):
        gate, z_up, z_down = ctx.saved_tensors
        up, down, of_mask = z_up >= 0, z_down >= 0, mask_gradient.float()
        of_gate, of_up, of_down = share_gradient.float() / gate.numel()
        to_nominated = of_mask * (up & down)
        to_counted = (of_gate + of_up * up + of_down * (up & down)).to(ctx.counted_dtype)
        slope_up, slope_down = _slope(z_up, ctx.temperature), _slope(z_down, ctx.temperature)
        to_up = of_mask * (gate & down) * slope_up
        up_threshold = to_up.sum() + (gate * slope_up * (of_up + of_down * down)).sum()
        down_threshold = ((of_mask + of_down) * (gate & up) * slope_down).sum()
        thresholds = -torch.stack([up_threshold, down_threshold])
        return to_nominated.to(mask_gradient.dtype), to_counted, to_up, None, thresholds, None


def refine(
    nominated: Tensor,
    counted: Tensor,
    up_scores: Tensor,
    down_scores: Tensor,
    thresholds: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The mask of staged neurons [n, D], and the shares that the stages gate, up and down read, float32 [3].

    nominated, counted: the same nominations, 0 or 1 [n, D]. The mask's gradient goes to `nominated`, the shares' to
    `counted`, so that bytes move thresholds but not the scores that nominate. up_scores, down_scores: float32 [n, D],
    the second without a gradient; thresholds: float32 [2], of up and down.
    """
    return _Refine.apply(nominated, counted, up_scores, down_scores, thresholds, temperature)
