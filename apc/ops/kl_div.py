"""The KL divergence between two models' predictions, without storing probabilities. Shape letters: see `apc.ops`."""

import torch
from torch import Tensor

from apc.ops._triton import tl, triton
from apc.ops.bits import describe, on_cpu

_BLOCK = 4096  # logits that a program reads at a time
_ROWS_AT_ONCE = 2048  # rows whose probabilities the CPU path stores at a time


@triton.jit
def _log_total(logits_ptr, V, BLOCK: tl.constexpr):
    """The logarithm of a row's Σ exp, float32."""
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        highest = higher
    return highest + tl.log(total)


@triton.jit
def _divergence_kernel(
    logits_ptr,  # float [n, V]
    dense_ptr,  # float [n, V]
    totals_ptr,  # float32 [n, 2], out: ln Σ exp of the logits and of the dense logits
    divergence_ptr,  # float32 [n], out
    V,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    logits_ptr += n * V
    dense_ptr += n * V
    logits_total = _log_total(logits_ptr, V, BLOCK)
    dense_total = _log_total(dense_ptr, V, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        q = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32) - logits_total
        p = tl.load(dense_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32) - dense_total
        total += tl.where(p == float("-inf"), 0.0, tl.exp(p) * (p - q))
    tl.store(totals_ptr + 2 * n, logits_total)
    tl.store(totals_ptr + 2 * n + 1, dense_total)
    tl.store(divergence_ptr + n, tl.sum(total, axis=0))


@triton.jit
def _gradient_kernel(
    logits_ptr,  # float [n, V]
    dense_ptr,  # float [n, V]
    totals_ptr,  # float32 [n, 2]
    weights_ptr,  # float32 [n]: the gradient of each row's divergence
    out_ptr,  # same type and shape as logits, out: their gradient
    V,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.exp(tl.load(logits_ptr + n * V + v, mask=v < V, other=0.0).to(tl.float32) - tl.load(totals_ptr + 2 * n))
    p = tl.exp(tl.load(dense_ptr + n * V + v, mask=v < V, other=0.0).to(tl.float32) - tl.load(totals_ptr + 2 * n + 1))
    tl.store(out_ptr + n * V + v, ((q - p) * tl.load(weights_ptr + n)).to(out_ptr.dtype.element_ty), mask=v < V)


class _Divergence(torch.autograd.Function):
    """KL(dense ‖ logits) per row; the gradient goes to the logits alone."""

    @staticmethod
    def forward(ctx, logits: Tensor, dense: Tensor, by_triton: bool) -> Tensor:
        n, V = logits.shape
        ctx.by_triton = by_triton
        divergence = torch.empty(n, dtype=torch.float32, device=logits.device)
        totals = torch.empty(n, 2, dtype=torch.float32, device=logits.device)
        if by_triton and n:
            with torch.cuda.device_of(logits):
                _divergence_kernel[(n,)](logits, dense, totals, divergence, V, BLOCK=_BLOCK, num_warps=8)
        if not by_triton:
            for rows in _parts(n):
                q, p = logits[rows].float(), dense[rows].float()
                totals[rows] = torch.stack([q.logsumexp(-1), p.logsumexp(-1)], dim=-1)
                q, p = q - totals[rows, :1], p - totals[rows, 1:]
                divergence[rows] = torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)
        ctx.save_for_backward(logits, dense, totals)
        return divergence

    @staticmethod
    def backward(ctx, weights: Tensor) -> tuple[Tensor, None, None]:
        logits, dense, totals = ctx.saved_tensors
        n, V = logits.shape
        out = torch.empty_like(logits)
        if ctx.by_triton and n:
            with torch.cuda.device_of(logits):
                grid = (n, triton.cdiv(V, _BLOCK))
                _gradient_kernel[grid](
                    logits, dense, totals, weights.float().contiguous(), out, V, BLOCK=_BLOCK, num_warps=8
                )
        if not ctx.by_triton:
            for rows in _parts(n):
                shares = [
                    (values[rows].float() - totals[rows, i : i + 1]).exp() for i, values in enumerate((logits, dense))
                ]
                out[rows] = ((shares[0] - shares[1]) * weights[rows].float().unsqueeze(1)).to(out.dtype)
        return out, None, None


def _parts(n: int) -> list[slice]:
    """Slices that cut n rows into parts of at most `_ROWS_AT_ONCE` rows."""
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, n, _ROWS_AT_ONCE)]


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense ‖ logits) of each row in nats, computed in float32: logits float [n, V] → float32 [n].

    The gradient goes to `logits` alone. Extra memory: two numbers per row. Raises ValueError if shapes or
    devices differ.
    """
    return _divergence(logits, dense, not on_cpu(logits))


def divergence_triton(logits: Tensor, dense: Tensor) -> Tensor:
    """`divergence` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    return _divergence(logits, dense, True)


def _divergence(logits: Tensor, dense: Tensor, by_triton: bool) -> Tensor:
    if logits.dim() != 2 or logits.shape != dense.shape or logits.device != dense.device:
        raise ValueError(
            f"divergence wants two tensors of logits [n, V] on one device, got {describe(logits)} and {describe(dense)}"
        )
    return _Divergence.apply(logits.contiguous(), dense.detach().contiguous(), by_triton)
