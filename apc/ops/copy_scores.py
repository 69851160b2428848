"""Which neurons a low-bit copy stored by input nominates, for a few tokens on a GPU.

Programs of `sums` share out the neurons and the inputs. Each reads the copy only at those of its inputs that take part,
and adds up levels times inputs; `decide` adds the sums, in a fixed order, and compares scores with the threshold. From
Ampere to Hopper the sums come from CUDA C++ (`copy_sums_sm80.py`), which is much faster here than Triton.
Shape letters: see `apc.ops`; S shares of the inputs.
"""

import torch
from torch import Tensor

from apc.ops import copy_sums_sm80
from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.bits import describe, row_bytes
from apc.ops.ffn_arguments import GROUP, MAX_TOKENS, LowBitCopy, SpacedCopy
from apc.ops.predict import pdl_options
from apc.ops.sparse_ffn import activate

# WORDS: words of 32 neurons that a program takes; ROWS: inputs that it reads at a time; STAGES: how many of these reads
# are in flight.
_TILE = {"WORDS": 32, "ROWS": 4, "STAGES": 3, "num_warps": 4}
_SHARES = 16  # into which the inputs are cut
_DECIDE_TILE = {"BLOCK_D": 64, "num_warps": 4}
_MAX_BITS = 4  # a level's bits fill a nibble at most


@triton.jit
def _sums_kernel(
    hidden_ptr,  # float [n, E]
    planes_ptr,  # int32 [b, P, E, words]
    spacings_ptr,  # bfloat16 [P, E, groups], read if SPACED
    norms_ptr,  # float32 [E]
    least_ptr,  # float32 []
    sums_ptr,  # float32 [S, n, P, 32 · words], out: of levels times inputs, in the order of the words' bits
    tokens,
    E,
    words,
    groups,
    SPACED: tl.constexpr,
    EARLY: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
    WORDS_PER_GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    SHARE: tl.constexpr,  # inputs of a program
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    own = tl.arange(0, SHARE)
    e = tl.program_id(1) * SHARE + own
    n = tl.program_id(2)
    x = tl.load(hidden_ptr + n * E + e, mask=e < E, other=0.0).to(tl.float32)
    takes_part = (tl.abs(x) * tl.load(norms_ptr + e, mask=e < E, other=0.0) >= tl.load(least_ptr)) & (e < E)
    ends = tl.cumsum(takes_part.to(tl.int32), axis=0)
    count = tl.sum(takes_part.to(tl.int32), axis=0)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    total_0 = tl.zeros([ROWS, WORDS], tl.float32)
    total_1 = tl.zeros([ROWS, WORDS], tl.float32)
    sums_0 = tl.zeros([ROWS, WORDS, 4, 8], tl.float32)
    sums_1 = tl.zeros([ROWS, WORDS, 4, 8], tl.float32)
    nibble = tl.arange(0, 4)[None, None, :]
    place = (4 * tl.arange(0, 8))[None, None, None, :]
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        rank = start + tl.arange(0, ROWS)
        at = tl.sum((ends[None, :] <= rank[:, None]).to(tl.int32), axis=1)
        value = tl.sum(tl.where(own[None, :] == at[:, None], x[None, :], 0.0), axis=1)
        inside = rank < count
        row = (tl.program_id(1) * SHARE + tl.where(inside, at, 0)).to(tl.int64)[:, None]
        read = inside[:, None] & (word < words)[None, :]
        for p in tl.static_range(P):
            factor = tl.where(inside, value, 0.0)[:, None]
            if SPACED:
                spacing = spacings_ptr + (p * E + row) * groups + word[None, :] // WORDS_PER_GROUP
                factor = factor * tl.load(spacing, mask=read, other=0.0).to(tl.float32)
            levels = tl.zeros([ROWS, WORDS, 4], tl.int32)
            for bit in tl.static_range(BITS):
                plane = tl.load(planes_ptr + ((bit * P + p) * E + row) * words + word[None, :], mask=read, other=0)
                levels |= ((plane[:, :, None] >> nibble) & 0x11111111) << bit
            # With these upper bits, an integer below 2²³ is the float of 2²³ more.
            level = ((levels[:, :, :, None] >> place) & 15) | 0x4B000000
            product = (level.to(tl.float32, bitcast=True) - 8388608.0) * factor[:, :, None, None]
            if p == 0:
                total_0 += factor
                sums_0 += product
            else:
                total_1 += factor
                sums_1 += product
    lowest = 0.5 - 2.0 ** (BITS - 1)
    bit_of = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, 8)[None, :]
    to = sums_ptr + (tl.program_id(1) * tokens + n) * P * 32 * words
    to += 32 * word[:, None, None] + bit_of[None, :, :]
    store = (word < words)[:, None, None]
    tl.store(to, tl.sum(sums_0, axis=0) + lowest * tl.sum(total_0, axis=0)[:, None, None], mask=store)
    if P > 1:
        second = tl.sum(sums_1, axis=0) + lowest * tl.sum(total_1, axis=0)[:, None, None]
        tl.store(to + 32 * words, second, mask=store)


@triton.jit
def _log_energy(x):
    """As `staged_ffn.log_energy`: zero and NaN count as the smallest normal number."""
    return 2 * tl.log(tl.where(x > 1.1754943508222875e-38, x, 1.1754943508222875e-38))


@triton.jit
def _decide_kernel(
    sums_ptr,  # float32 [S, n, P, width]
    scale_ptr,  # float32 [P, D], read unless SPACED, like slope, power and bias
    slope_ptr,  # float32 [P, D]
    power_ptr,  # float32 [P, D]
    bias_ptr,  # float32 [D]
    norms_ptr,  # float32 [D], read if SPACED
    threshold_ptr,  # float32 []
    masks_ptr,  # uint8 [n, W], out
    up_part_ptr,  # float32 [n, D], out if UP_PART
    tokens,
    shares,
    D,
    W,
    width,
    SPACED: tl.constexpr,
    UP_PART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
    P: tl.constexpr,
    SHARES: tl.constexpr,  # at least `shares`
    BLOCK_D: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.program_id(1)
    share = tl.arange(0, SHARES)[:, None]
    of_share = sums_ptr + (share * tokens + n) * P * width + d[None, :]
    read = (share < shares) & (d < D)[None, :]
    first = tl.sum(tl.load(of_share, mask=read, other=0.0), axis=0)
    second = tl.zeros([BLOCK_D], tl.float32)
    if P > 1:
        second += tl.sum(tl.load(of_share + width, mask=read, other=0.0), axis=0)
    if SPACED:
        part = _log_energy(tl.abs(second))
        norms = tl.load(norms_ptr + d, mask=d < D, other=0.0)
        score = _log_energy(tl.abs(activate(first, ACTIVATION) * second) * norms)
    else:
        score = tl.load(bias_ptr + d, mask=d < D, other=0.0)
        part = tl.zeros([BLOCK_D], tl.float32)
        for p in tl.static_range(P):
            z = tl.load(scale_ptr + p * D + d, mask=d < D, other=0.0) * (first if p == 0 else second)
            part = tl.load(slope_ptr + p * D + d, mask=d < D, other=0.0) * z
            part += tl.load(power_ptr + p * D + d, mask=d < D, other=0.0) * tl.log(1 + z * z)
            score += part
    if UP_PART:
        tl.store(up_part_ptr + n * D + d, part, mask=d < D)
    kept = ((score >= tl.load(threshold_ptr)) & (d < D)).to(tl.int32)
    kept = tl.reshape(kept, [BLOCK_D // 8, 8]) << tl.arange(0, 8)[None, :]
    w = tl.program_id(0) * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)
    tl.store(masks_ptr + n * W + w, tl.sum(kept, axis=1).to(tl.uint8), mask=w < W)


def nominate_triton(
    hidden: Tensor, copy: LowBitCopy | SpacedCopy, threshold: Tensor, norms: Tensor, activation: str
) -> tuple[Tensor, Tensor | None]:
    """The neurons whose scores reach a threshold, and what a copy of up adds to the score; None without one.

    For CUDA tensors, or CPU tensors under TRITON_INTERPRET=1. The scores are those of `staged_ffn`.

    Args:
        hidden: FFN inputs, float [n, E], up to `MAX_TOKENS` of them.
        copy: a copy stored by input.
        threshold: float32 [].
        norms: float32 [D], of the neurons' columns of the down projection.
        activation: one of `ACTIVATIONS`.

    Returns:
        Masks uint8 [n, W], and float32 [n, D] or None.

    Raises:
        ValueError: for a copy stored by neuron or with more than 4 bits, too many tokens, tensors that are not
            contiguous, or other shapes.
    """
    (n, E), D, W = hidden.shape, len(norms), row_bytes(len(norms))
    bits, P = copy.planes.shape[:2]
    if n > MAX_TOKENS or copy.norms is None or copy.least is None or bits > _MAX_BITS or P > 2:
        raise ValueError(
            f"nominate_triton takes up to {MAX_TOKENS} tokens and a copy of up to {_MAX_BITS} bits and 2 projections, "
            f"by input; got hidden {describe(hidden)} and planes {describe(copy.planes)}"
        )
    read = (copy.planes, copy.norms, norms, *([copy.spacings] if isinstance(copy, SpacedCopy) else ()))
    if not all(each.is_contiguous() for each in read):
        raise ValueError("nominate_triton takes planes, spacings and norms that are contiguous")
    if copy.planes.shape[2:] != (E, W):
        raise ValueError(f"planes {describe(copy.planes)} must be uint8 [b, P, {E}, {W}]")
    hidden, by_cuda = hidden.contiguous(), copy_sums_sm80.is_supported(hidden)
    share = max(16, triton.next_power_of_2(triton.cdiv(E, _SHARES)))
    shares, words, spaced = triton.cdiv(E, share), W // 4, isinstance(copy, SpacedCopy)
    parts = shares * copy_sums_sm80.PARTS if by_cuda else shares
    sums = hidden.new_empty((parts, n, P, 32 * words), dtype=torch.float32)
    masks = hidden.new_empty((n, W), dtype=torch.uint8)
    spacings, groups, up_part = sums, 0, None
    scale = slope = power = bias = sums  # placeholders that the kernel does not read
    if isinstance(copy, SpacedCopy):
        spacings, groups = copy.spacings, copy.spacings.shape[-1]
    else:
        scale, slope, power, bias = copy.curve
    if spaced or (isinstance(copy, LowBitCopy) and copy.projections[-1] == "up"):
        up_part = hidden.new_empty((n, D), dtype=torch.float32)
    options, blocks = pdl_options(hidden.device), _DECIDE_TILE["BLOCK_D"]
    common = {"SPACED": spaced, "P": P, **options}
    with torch.cuda.device_of(hidden):
        if by_cuda:
            copy_sums_sm80.copy_sums(hidden, copy, share, sums)
        else:
            _sums_kernel[(triton.cdiv(words, _TILE["WORDS"]), shares, n)](
                *(hidden, copy.planes.view(torch.int32), spacings, copy.norms, copy.least, sums),
                *(n, E, words, groups),
                BITS=bits,
                WORDS_PER_GROUP=GROUP // 32,
                SHARE=share,
                **common,
                **_TILE,
            )
        _decide_kernel[(triton.cdiv(8 * W, blocks), n)](
            *(sums, scale, slope, power, bias, norms, threshold, masks, sums if up_part is None else up_part),
            *(n, parts, D, W, 32 * words),
            UP_PART=up_part is not None,
            ACTIVATION=activation,
            SHARES=triton.next_power_of_2(parts),
            **common,
            **_DECIDE_TILE,
        )
    return masks, up_part
