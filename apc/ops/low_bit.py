"""Scores of neurons from a low-bit copy of their weights, for a few tokens, and the masks of scores above a threshold.

On b1 tensor cores, bits of weights are multiplied with bits of the input (`low_bit_sm80.py`). Elsewhere the
Triton kernel here multiplies the bits on tensor cores without unpacking them: bit j < 8 of a 16-bit word,
with the other bits masked off, is the float16 number 2^(j − 24). That is a subnormal, which tensor cores
multiply exactly. The input is scaled by 2^(8 − j) to compensate.

A weight of b bits has the levels −(2^b − 1)/2 … (2^b − 1)/2. Shape letters: see `apc.ops`.
"""

import torch
from torch import Tensor

from apc.ops import low_bit_sm80
from apc.ops._triton import tl, triton
from apc.ops.bits import describe, on_cpu, pack, row_bytes, unpack
from apc.ops.ffn_arguments import MAX_TOKENS
from apc.ops.score_curve import ScoreCurve, score_curve

_COLUMNS = 16  # the fewest columns of a tensor-core product; those past the tokens are zero
_TILE = {"BLOCK_D": 128, "num_warps": 4}
_WORDS = 64  # 16-bit words of a row per step, for all planes of all projections together


@triton.jit
def _low_bit_kernel(
    hidden_ptr,  # float [n, E]
    planes_ptr,  # int16 [b, P, D, words]
    scale_ptr,  # float32 [P, D]
    slope_ptr,  # float32 [P, D]
    power_ptr,  # float32 [P, D]
    bias_ptr,  # float32 [D]
    threshold_ptr,  # float32 [], read for masks
    output_ptr,  # out: scores float32 [n, D], or masks uint8 [n, W]
    tokens,
    E,
    D,
    W,
    words,  # 16-bit words of a packed row of E weights
    BITS: tl.constexpr,
    P: tl.constexpr,
    MASKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, COLUMNS)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([COLUMNS], tl.float32)
    largest = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_E):
        at = start + e
        x = tl.load(
            hidden_ptr + n[:, None] * E + at[None, :], mask=(n < tokens)[:, None] & (at < E)[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(x, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    largest = tl.where(largest > 0, largest, 1.0)

    first = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    second = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, words, BLOCK_K):
        word = start + k
        for i in tl.static_range(BITS):
            for p in tl.static_range(P):
                row = ((i * P + p) * D + d).to(tl.int64)
                bits = tl.load(
                    planes_ptr + row[:, None] * words + word[None, :],
                    mask=(d < D)[:, None] & (word < words)[None, :],
                    other=0,
                )
                for j in tl.static_range(16):
                    at = 16 * word + j
                    inside = (at < E)[:, None] & (n < tokens)[None, :]
                    x = (
                        tl.load(hidden_ptr + n[None, :] * E + at[:, None], mask=inside, other=0.0).to(tl.float32)
                        / largest[None, :]
                    )
                    scaled = (x * (2.0 ** (8 - j % 8 + i))).to(tl.float16)
                    weights = ((bits >> (8 * (j // 8))) & (1 << (j % 8))).to(tl.int16).to(tl.float16, bitcast=True)
                    if p == 0:
                        first = tl.dot(weights, scaled, first)
                    else:
                        second = tl.dot(weights, scaled, second)
    lowest = 0.5 - 2.0 ** (BITS - 1)
    score = tl.load(bias_ptr + d, mask=d < D, other=0.0)[:, None] + tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    for p in tl.static_range(P):
        sums = (first if p == 0 else second) * (65536.0 * largest)[None, :] + lowest * total[None, :]
        z = tl.load(scale_ptr + p * D + d, mask=d < D, other=0.0)[:, None] * sums
        score += tl.load(slope_ptr + p * D + d, mask=d < D, other=0.0)[:, None] * z
        score += tl.load(power_ptr + p * D + d, mask=d < D, other=0.0)[:, None] * tl.log(1 + z * z)
    if MASKS:
        kept = ((score >= tl.load(threshold_ptr)) & (d < D)[:, None]).to(tl.int32)
        kept = tl.reshape(kept, [BLOCK_D // 8, 8, COLUMNS]) << tl.arange(0, 8)[None, :, None]
        w = tl.program_id(0) * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)
        store = (w < W)[:, None] & (n < tokens)[None, :]
        tl.store(output_ptr + n[None, :] * W + w[:, None], tl.sum(kept, axis=1).to(tl.uint8), mask=store)
    else:
        tl.store(output_ptr + n[None, :] * D + d[:, None], score, mask=(d < D)[:, None] & (n < tokens)[None, :])


def low_bit_scores(
    hidden: Tensor,
    planes: Tensor,
    curve: ScoreCurve,
    threshold: Tensor | None = None,
    by_triton: bool | None = None,
) -> Tensor:
    """The scores float32 [n, D] of all neurons; with a threshold, the masks uint8 [n, W] of scores that reach it.

    Args:
        hidden: FFN inputs, float [n, E].
        planes: bit planes of the weights, uint8 [b, P, D, row_bytes(E)]; plane i has bit i of each weight's level.
        curve: parameters [P, D] and [D]: a score is the `score_curve` of the products of levels and input.
        threshold: float32 [] on the same device.
        by_triton: use the kernels, which take up to `MAX_TOKENS` tokens and two projections (None: on a GPU). The
        Triton kernel rounds the input to float16 after scaling it by its largest value; the b1 kernel rounds it to
        24 bits relative to that value.

    Raises:
        ValueError: for other shapes.
    """
    by_triton = not on_cpu(hidden) if by_triton is None else by_triton
    P, D = curve.scale.shape if curve.scale.dim() == 2 else (0, 0)
    if (
        hidden.dim() != 2
        or planes.dtype != torch.uint8
        or planes.shape[1:] != (P, D, row_bytes(hidden.shape[-1]))
        or curve.slope.shape != (P, D)
    ):
        raise ValueError(
            f"planes {describe(planes)} must be uint8 [b, P, D, row_bytes(E)] for hidden {describe(hidden)} "
            f"and scale {describe(curve.scale)}"
        )
    if curve.power.shape != (P, D) or curve.bias.shape != (D,):
        raise ValueError(f"power {describe(curve.power)} and bias {describe(curve.bias)} must be [{P}, {D}] and [{D}]")
    if by_triton and (len(hidden) > MAX_TOKENS or P > 2):
        raise ValueError(
            f"the kernel takes up to {MAX_TOKENS} tokens and 2 projections, "
            f"got hidden {describe(hidden)} and planes {describe(planes)}"
        )
    return torch.ops.apc.low_bit_scores(hidden, planes, *curve, threshold, by_triton)


def low_bit_scores_triton(hidden: Tensor, planes: Tensor, curve: ScoreCurve, threshold: Tensor | None = None) -> Tensor:
    """`low_bit_scores` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    (n, E), (bits, P, D, weight_bytes) = hidden.shape, planes.shape
    hidden, planes = hidden.contiguous(), planes.contiguous()
    W, masks = row_bytes(D), threshold is not None
    output = hidden.new_zeros((n, W), dtype=torch.uint8) if masks else hidden.new_empty((n, D), dtype=torch.float32)
    blocks = {
        "BLOCK_E": min(1024, triton.next_power_of_2(E)),
        "BLOCK_K": max(16, triton.next_power_of_2(_WORDS // (bits * P))),
    }
    tensors = hidden, planes.view(torch.int16), *curve, threshold if masks else curve.bias, output
    sizes = n, E, D, W, weight_bytes // 2
    with torch.cuda.device_of(hidden):
        _low_bit_kernel[(triton.cdiv(D, _TILE["BLOCK_D"]),)](
            *tensors, *sizes, BITS=bits, P=P, MASKS=masks, COLUMNS=_COLUMNS, **blocks, **_TILE
        )
    return output


@torch.library.custom_op("apc::low_bit_scores", mutates_args=())
def _low_bit_scores(
    hidden: Tensor,
    planes: Tensor,
    scale: Tensor,
    slope: Tensor,
    power: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    by_triton: bool,
) -> Tensor:
    curve = ScoreCurve(scale, slope, power, bias)
    if by_triton:
        b1 = low_bit_sm80.is_supported(hidden, planes, threshold is not None)
        kernel = low_bit_sm80.low_bit_scores_b1 if b1 else low_bit_scores_triton
        return kernel(hidden, planes, curve, threshold)
    E = hidden.shape[-1]
    levels = sum(unpack(plane, E) * 2.0**place for place, plane in enumerate(planes)) + (0.5 - 2 ** (len(planes) - 1))
    products = (hidden.float() @ levels.flatten(0, 1).T).unflatten(-1, scale.shape)
    scores = score_curve(products.unsqueeze(0), *(value.unsqueeze(0) for value in curve)).squeeze(0)
    return scores if threshold is None else pack(scores >= threshold)


@_low_bit_scores.register_fake
def _(
    hidden: Tensor,
    planes: Tensor,
    scale: Tensor,
    slope: Tensor,
    power: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    by_triton: bool,
) -> Tensor:
    n, D = len(hidden), len(bias)
    if threshold is None:
        return hidden.new_empty((n, D), dtype=torch.float32)
    return hidden.new_empty((n, row_bytes(D)), dtype=torch.uint8)
