"""Scores of neurons by a copy of their weights at a few bits each, for a few tokens, and the masks of those above a threshold.

Where there are b1 tensor cores, bits are multiplied with bits of the input (`low_bit_sm80.py`). Elsewhere Triton's kernel multiplies them on tensor cores
without unpacking them: bit j < 8 of a 16-bit word, the others masked off, is as a float16 the number 2^(j − 24)
(a subnormal, which tensor cores take exactly), and the input is scaled by 2^(8 − j) against it. Shape letters: n tokens, E hidden size, D neurons,
P projections, b bits, W bytes of a packed row of E weights, V bytes of a packed mask of D neurons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc.ops import low_bit_sm80
from apc.ops.bits import describe, on_cpu, pack, row_bytes, unpack
from apc.ops.predict import MAX_TOKENS
from apc.ops.score_curve import score_curve

_COLUMNS = 16  # the least that a product on tensor cores takes; those past the tokens are zero
_TILE = {"BLOCK_D": 128, "num_warps": 4}
_WORDS = 64  # 16-bit words of a row in a step, for all planes of all projections together


@triton.jit
def _low_bit_kernel(
    hidden_ptr,  # float [n, E]
    planes_ptr,  # int16 [b, P, D, words]
    scale_ptr,  # float32 [P, D], as slope and power
    slope_ptr,
    power_ptr,
    bias_ptr,  # float32 [D]
    threshold_ptr,  # float32 [], where masks are made
    output_ptr,  # float32 [n, D], scores, or uint8 [n, V], masks, out
    tokens,
    E,
    D,
    V,
    words,
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
                    given = (at < E)[:, None] & (n < tokens)[None, :]
                    x = (
                        tl.load(hidden_ptr + n[None, :] * E + at[:, None], mask=given, other=0.0).to(tl.float32)
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
        v = tl.program_id(0) * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)
        store = (v < V)[:, None] & (n < tokens)[None, :]
        tl.store(output_ptr + n[None, :] * V + v[:, None], tl.sum(kept, axis=1).to(tl.uint8), mask=store)
    else:
        tl.store(output_ptr + n[None, :] * D + d[:, None], score, mask=(d < D)[:, None] & (n < tokens)[None, :])


def low_bit_scores(
    hidden: Tensor,
    planes: Tensor,
    scale: Tensor,
    slope: Tensor,
    power: Tensor,
    bias: Tensor,
    threshold: Tensor | None = None,
    by_triton: bool | None = None,
) -> Tensor:
    """FFN inputs float [n, E] → scores float32 [n, D]; with a threshold, a float32 number on the device, masks uint8 [n, V] of the neurons that reach it.

    planes: uint8 [b, P, D, W], plane i holds bit i of each weight's level, levels −(2^b − 1)/2 … (2^b − 1)/2; scale, slope, power: float32 [P, D];
    bias: float32 [D]. A score is that of `score_curve` for the products of levels and input. by_triton: by the kernel, which takes up to `MAX_TOKENS`
    tokens and two projections, and the input at float16's precision relative to its largest number, or at 24 bits of that (None: on a GPU).
    Raises ValueError for other shapes.
    """
    by_triton = not on_cpu(hidden) if by_triton is None else by_triton
    P, D = scale.shape if scale.dim() == 2 else (0, 0)
    if (
        hidden.dim() != 2
        or planes.dtype != torch.uint8
        or planes.shape[1:] != (P, D, row_bytes(hidden.shape[-1]))
        or slope.shape != (P, D)
    ):
        raise ValueError(
            f"planes {describe(planes)} must be uint8 [b, P, D, W] for hidden {describe(hidden)} and scale {describe(scale)}"
        )
    if power.shape != (P, D) or bias.shape != (D,):
        raise ValueError(f"power {describe(power)} and bias {describe(bias)} must be [{P}, {D}] and [{D}]")
    if by_triton and (len(hidden) > MAX_TOKENS or P > 2):
        raise ValueError(
            f"the kernel takes up to {MAX_TOKENS} tokens and 2 projections, got hidden {describe(hidden)} and planes {describe(planes)}"
        )
    return torch.ops.apc.low_bit_scores(hidden, planes, scale, slope, power, bias, threshold, by_triton)


def low_bit_scores_triton(
    hidden: Tensor, planes: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor, threshold: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`low_bit_scores` by its Triton kernel: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    (n, E), (bits, P, D, W) = hidden.shape, planes.shape
    hidden, planes = hidden.contiguous(), planes.contiguous()
    V = row_bytes(D)
    output = (
        hidden.new_empty((n, D), dtype=torch.float32)
        if threshold is None
        else hidden.new_zeros((n, V), dtype=torch.uint8)
    )
    block = max(16, triton.next_power_of_2(_WORDS // (bits * P)))
    with torch.cuda.device_of(hidden):
        _low_bit_kernel[(triton.cdiv(D, _TILE["BLOCK_D"]),)](
            hidden, planes.view(torch.int16), scale, slope, power, bias, bias if threshold is None else threshold, output, n, E, D, V, W // 2,
            BITS=bits, P=P, MASKS=threshold is not None, COLUMNS=_COLUMNS, BLOCK_E=min(1024, triton.next_power_of_2(E)), BLOCK_K=block, **_TILE,
        )  # fmt: skip
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
    if by_triton:
        way = (
            low_bit_sm80.low_bit_scores_b1
            if low_bit_sm80.is_supported(hidden, planes, threshold is not None)
            else low_bit_scores_triton
        )
        return way(hidden, planes, scale, slope, power, bias, threshold)
    E = hidden.shape[-1]
    levels = sum(unpack(plane, E) * 2.0**place for place, plane in enumerate(planes)) + (0.5 - 2 ** (len(planes) - 1))
    products = (hidden.float() @ levels.flatten(0, 1).T).unflatten(-1, scale.shape)
    scores = score_curve(*(value.unsqueeze(0) for value in (products, scale, slope, power, bias))).squeeze(0)
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
    return (
        hidden.new_empty((n, D), dtype=torch.float32)
        if threshold is None
        else hidden.new_empty((n, row_bytes(D)), dtype=torch.uint8)
    )
