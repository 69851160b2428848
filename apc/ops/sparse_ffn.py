"""A gated FFN that reads only the weights of the neurons its masks keep, for a few tokens.

With one token, an FFN is bound by reading its weights, so half the rows take half the time if kernels never wait
for the host. The kernels run one after the other without the host. Those of `predict.py` write candidates for each
token's cluster. Each program of `rows` picks the best candidate, takes its share of the active neurons, and adds
up their part of the output. `finish` adds the parts in a fixed order.

On Hopper `rows` is CUDA C++ (`sparse_ffn_sm90.py`), and every kernel uses programmatic dependent launch
(EARLY): it starts before the previous kernel has ended, loads its weights, and then waits. If the cluster is
predicted a layer ahead, a separate kernel lists an FFN's active neurons while attention runs.

Shape letters: see `apc.ops`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.bits import describe, on_cpu, popcount_words, row_bytes, unpack
from apc.ops.ffn_arguments import (
    ACTIVATIONS,
    ActiveNeurons,
    Candidates,
    FFNWeights,
    NextLayer,
    OutputDelta,
    Prediction,
    PredictorWeights,
    Refinement,
)
from apc.ops.predict import (
    check_hidden,
    empty_prediction,
    pdl_options,
    predict_clusters,
    reduce_hidden,
    score_clusters,
    store_best,
)
from apc.ops.rounded_weight import RoundedWeight
from apc.ops.sparse_ffn_sm90 import (
    aligned,
    empty_active_list,
    find_hopper,
    is_supported,
    rows_hopper,
    runs_stages,
    staged_hopper,
)

KERNELS = ("triton", "numba", "torch")
MAX_HIDDEN = 2**14  # the largest hidden size whose sums fit a program
# ROWS: neurons that a program reads at a time; STAGES: how many of these reads are in flight.
_ROWS_TILE = {"ROWS": 2, "STAGES": 3, "num_warps": 4}
_STAGED_TILE = {"ROWS": 2, "STAGES": 1, "num_warps": 4}  # loads depend on loads, so none can be in flight ahead
_PROGRAMS = 1  # programs of `rows` on each multiprocessor
_FINISH_TILE = {"COLUMNS": 16, "BLOCK_H": 64, "num_warps": 4}
_PARTS = 256  # parts of the output added at a time, at most
# Clusters of a later layer that a program of `finish` scores. With more, its registers leave no room for two programs
# beside a block of `rows`.
AHEAD = 8
MAX_SCORED = 1024  # the largest bottleneck with which `finish` scores clusters
_NO_DELTA = OutputDelta()


@triton.jit
def _place(word, rank):
    """The position of set bit number `rank`, from 0, in each uint32 word."""
    place = tl.zeros_like(rank)
    for step in tl.static_range(5):
        width = 16 >> step
        low = (word >> place.to(tl.uint32)) & ((1 << width) - 1)
        ones = popcount_words(low)
        further = rank >= ones
        rank = tl.where(further, rank - ones, rank)
        place = tl.where(further, place + width, place)
    return place


@triton.jit
def best(values_ptr, ids_ptr, count, BLOCK: tl.constexpr):
    """The id of the largest value, ties to the lowest id."""
    i = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + i, mask=i < count, other=float("-inf"), cache_modifier=".cg")
    ids = tl.load(ids_ptr + i, mask=i < count, other=0x7FFFFFFF, cache_modifier=".cg")
    return tl.min(tl.where(values == tl.max(values, axis=0), ids, 0x7FFFFFFF), axis=0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation function of this name, one of `ACTIVATIONS`, applied to float32 values."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # ½ (1 + tanh y) = σ(2 y)


@triton.jit
def _rows_kernel(
    hidden_ptr,  # float [n, E]
    gate_ptr,  # float [D, E], rows `gate_stride` apart
    up_ptr,  # float [D, E], rows `up_stride` apart
    down_ptr,  # float [D, E], transposed, rows `down_stride` apart
    masks_ptr,  # uint32 [K or n, words]
    values_ptr,  # float32 [n, candidates], read if BY_CLUSTER
    ids_ptr,  # int32 [n, candidates], read if BY_CLUSTER
    thresholds_ptr,  # float32 [2], read if STAGED, like norms
    norms_ptr,  # float32 [D]
    up_part_ptr,  # float32 [n, D], read if UP_PART
    partial_ptr,  # float32 [programs, n, E], out
    tokens,
    E,
    D,
    words,
    candidates,
    gate_stride,
    up_stride,
    down_stride,
    BY_CLUSTER: tl.constexpr,
    STAGED: tl.constexpr,  # whether a neuron's rows of up and down are read only if it passes the thresholds
    UP_PART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    N: tl.constexpr,  # n, rounded up to a power of two
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    w = tl.arange(0, BLOCK_W)
    n = tl.arange(0, N)
    mask_of = n  # row of each token's mask
    union = tl.zeros([BLOCK_W], tl.int32)
    for token in tl.static_range(N):
        row = token
        if BY_CLUSTER:
            row = best(
                values_ptr + token * candidates,
                ids_ptr + token * candidates,
                tl.where(token < tokens, candidates, 0),
                BLOCK_C,
            )
            row = tl.where(token < tokens, row, 0)
            mask_of = tl.where(n == token, row, mask_of)
        union |= tl.load(masks_ptr + row * words + w, mask=(w < words) & (token < tokens), other=0)
    counts = popcount_words(union.to(tl.uint32, bitcast=True))
    ends = tl.cumsum(counts, axis=0)
    total = tl.sum(counts, axis=0)
    first = (tl.program_id(0) * total) // tl.num_programs(0)
    last = ((tl.program_id(0) + 1) * total) // tl.num_programs(0)

    inside_input = (n < tokens)[:, None] & (e < E)[None, :]
    hidden = tl.load(hidden_ptr + n[:, None] * E + e[None, :], mask=inside_input, other=0.0).to(tl.float32)
    sums = tl.zeros([N, ROWS, BLOCK_E], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rank = start + tl.arange(0, ROWS)
        before = ends[None, :] <= rank[:, None]
        word_at = tl.sum(before.to(tl.int32), axis=1)
        word = tl.sum(tl.where(w[None, :] == word_at[:, None], union[None, :], 0), axis=1)
        place = _place(word.to(tl.uint32, bitcast=True), rank - tl.max(tl.where(before, ends[None, :], 0), axis=1))
        inside = rank < last
        neuron = tl.where(inside, 32 * word_at + place, 0).to(tl.int64)[:, None]
        read = inside[:, None] & (e < E)[None, :]
        kept = (n < tokens)[:, None] & inside[None, :]
        if N > 1:  # a neuron may be kept by another token's mask only
            own = tl.load(masks_ptr + mask_of[:, None] * words + word_at[None, :], mask=kept, other=0)
            kept = kept & ((own >> place[None, :]) & 1 != 0)
        gate = tl.load(gate_ptr + neuron * gate_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        x = activate(tl.sum(gate[None, :, :] * hidden[:, None, :], axis=2), ACTIVATION)
        if STAGED:  # comparisons let NaN pass, so that it shows in the output
            norms = tl.load(norms_ptr + tl.sum(neuron, axis=1), mask=inside, other=0.0)[None, :]
            importance = tl.abs(x) * norms
            if UP_PART:
                part = tl.load(up_part_ptr + n[:, None] * D + tl.sum(neuron, axis=1)[None, :], mask=kept, other=0.0)
                importance = importance * tl.exp(0.5 * part)
            kept = kept & ~(importance < tl.exp(0.5 * tl.load(thresholds_ptr)))
            read = read & (tl.max(kept.to(tl.int32), axis=0) > 0)[:, None]
        up = tl.load(up_ptr + neuron * up_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        x = x * tl.sum(up[None, :, :] * hidden[:, None, :], axis=2)
        if STAGED:
            kept = kept & ~(tl.abs(x) * norms < tl.exp(0.5 * tl.load(thresholds_ptr + 1)))
            read = read & (tl.max(kept.to(tl.int32), axis=0) > 0)[:, None]
        down = tl.load(down_ptr + neuron * down_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        if N > 1 or STAGED:
            x = tl.where(kept, x, 0.0)
        x = x.to(hidden_ptr.dtype.element_ty).to(tl.float32)  # round where a model rounds
        sums += x[:, :, None] * down[None, :, :]
    at = (tl.program_id(0) * tokens + n)[:, None] * E + e[None, :]
    tl.store(partial_ptr + at, tl.sum(sums, axis=1), mask=inside_input)


@triton.jit
def _finish_kernel(
    partial_ptr,  # float32 [programs, n, E]
    output_ptr,  # float [n, E], out
    inner_ptr,  # float32 [n, H], read if CORRECTS
    correct_ptr,  # float [H, E], read if CORRECTS
    correct_bias_ptr,  # float32 [E], read if CORRECTS
    offsets_ptr,  # float [K, E], read if OFFSETS
    values_ptr,  # float32 [n, candidates], read if OFFSETS
    ids_ptr,  # int32 [n, candidates], read if OFFSETS
    later_inner_ptr,  # float32 [n, later_H], read if SCORES, for a later layer's clusters
    expand_ptr,  # float [later_K, later_H], read if SCORES
    expand_bias_ptr,  # float32 [later_K], read if SCORES
    later_values_ptr,  # float32 [n, groups], out if SCORES, as `_score_kernel` writes it
    later_ids_ptr,  # int32 [n, groups], out if SCORES
    tokens,
    programs,
    E,
    H,
    candidates,
    later_H,
    later_K,
    groups,
    fresh,  # the last of inner's values, which the kernel before this one writes
    EARLY: tl.constexpr,
    CORRECTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_FRESH: tl.constexpr,  # 0: none of inner's values is fresh
    BLOCK_C: tl.constexpr,
    SCORES: tl.constexpr,  # clusters that a program scores; 0: none
    BLOCK_LATER: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(1)
    if SCORES > 0:
        k, later_h = tl.program_id(0) * SCORES + tl.arange(0, SCORES), tl.arange(0, BLOCK_LATER)
        scored = (k < later_K)[:, None] & (later_h < later_H)[None, :]
        expand = tl.load(expand_ptr + k[:, None] * later_H + later_h[None, :], mask=scored, other=0.0)
        expand_bias = tl.load(expand_bias_ptr + k, mask=k < later_K, other=float("-inf"))
    output = tl.zeros([COLUMNS], tl.float32)
    if CORRECTS:
        output += tl.load(correct_bias_ptr + e, mask=e < E, other=0.0)
        for start in range(0, H - fresh, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            known = h < H - fresh
            inner = tl.load(inner_ptr + n * H + h, mask=known, other=0.0, cache_modifier=".cg")
            weights = tl.load(
                correct_ptr + h[:, None] * E + e[None, :], mask=known[:, None] & (e < E)[None, :], other=0.0
            ).to(tl.float32)
            output += tl.sum(inner[:, None] * weights, axis=0)
    if BLOCK_FRESH > 0:
        last = H - fresh + tl.arange(0, BLOCK_FRESH)
        fresh_weights = tl.load(
            correct_ptr + last[:, None] * E + e[None, :], mask=(last < H)[:, None] & (e < E)[None, :], other=0.0
        ).to(tl.float32)
    if OFFSETS:
        row = best(values_ptr + n * candidates, ids_ptr + n * candidates, candidates, BLOCK_C)
        output += tl.load(offsets_ptr + row.to(tl.int64) * E + e, mask=e < E, other=0.0).to(tl.float32)
    if EARLY:  # only what the kernel before wrote needs this wait: earlier ones had ended when that began
        gdc_wait()
    if BLOCK_FRESH > 0:
        fresh_inner = tl.load(inner_ptr + n * H + last, mask=last < H, other=0.0, cache_modifier=".cg")
        output += tl.sum(fresh_inner[:, None] * fresh_weights, axis=0)
    if SCORES > 0:
        later_inner = tl.load(
            later_inner_ptr + n * later_H + later_h, mask=later_h < later_H, other=0.0, cache_modifier=".cg"
        )
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        read = (p < programs)[:, None] & (e < E)[None, :]
        output += tl.sum(
            tl.load(partial_ptr + (p[:, None] * tokens + n) * E + e[None, :], mask=read, other=0.0), axis=0
        )
    tl.store(output_ptr + n * E + e, output.to(output_ptr.dtype.element_ty), mask=e < E)
    if SCORES > 0:  # noqa: SIM102 (a constexpr: without scores Triton must not compile the condition below)
        if tl.program_id(0) < groups:
            store_best(
                expand.to(tl.float32),
                expand_bias,
                later_inner,
                k,
                later_values_ptr + n * groups,
                later_ids_ptr + n * groups,
            )


def sparse_ffn(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    delta: OutputDelta = _NO_DELTA,
    kernel: str | None = None,
    refinement: Refinement | None = None,
) -> Tensor:
    """The FFN's output over each token's active neurons i: Σ_i act(x · gate_i) · (x · up_i) · down_i, plus `delta`.

    Args:
        hidden: FFN inputs x, float [n, E].
        weights: matrices [D, E] of hidden's type.
        active: masks per token; or masks per cluster, with the candidates for each token's cluster.
        delta: terms to add to the output.
        kernel: `triton` (on a GPU, hidden sizes of up to 16,384), `numba` (on the CPU) or `torch`. The first two take
            up to `MAX_TOKENS` tokens. None: `triton` on a GPU with such a hidden size, else `torch`.
        refinement: leaves out neurons, and so rows of up and down, by what has been computed of them. A neuron whose
            value is NaN stays. Not for `numba`.

    Returns:
        float [n, E] of hidden's type. The kernels add in float32, in the same order each time, and round the product of
        gate and up to hidden's type, as a model does.

    Raises:
        ValueError: for other shapes or types, an unknown activation or kernel, or one for another device.
    """
    kernel = _kernel_for(hidden) if kernel is None else kernel
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel}: choose {', '.join(KERNELS)}")
    n, E = check_hidden(hidden, kernel != "torch")
    if kernel == "numba" and (hidden.device.type != "cpu" or hidden.dtype.itemsize > 4):
        raise ValueError(f"kernel numba takes 16 or 32 bits on the CPU, got hidden {describe(hidden)}")
    D = len(weights.gate)
    if weights.activation not in ACTIVATIONS:
        raise ValueError(f"activation {weights.activation}: choose {', '.join(ACTIVATIONS)}")
    for name, matrix in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
        if matrix.shape != (D, E) or matrix.dtype != hidden.dtype or matrix.stride(-1) != 1:
            dtype = describe(hidden.new_empty(0)).split()[0]
            raise ValueError(f"{name} {describe(matrix)} must be {dtype} [{D}, {E}], its rows contiguous")
    masks, candidates, W = active.masks, active.candidates, row_bytes(D)
    fits = masks.dtype == torch.uint8 and masks.dim() == 2 and masks.shape[1] == W
    if not fits or (candidates is None and len(masks) != n):
        raise ValueError(
            f"masks {describe(masks)} must be uint8 [{'K' if candidates else n}, {W}] "
            f"to go with hidden {describe(hidden)} and gate {describe(weights.gate)}"
        )
    if delta.offsets is not None and (candidates is None or delta.offsets.shape != (len(masks), E)):
        raise ValueError(f"offsets {describe(delta.offsets)} must be [{len(masks)}, {E}], and need candidates")
    if refinement is not None:
        thresholds, norms, up_part = refinement
        given = {"thresholds": (thresholds, (2,)), "norms": (norms, (D,)), "up_part": (up_part, (n, D))}
        for name, (tensor, shape) in given.items():
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                raise ValueError(f"{name} {describe(tensor)} must be float32 {list(shape)}")
        if kernel == "numba":
            raise ValueError("kernel numba takes no refinement; use kernel torch")
    return torch.ops.apc.sparse_ffn(
        hidden, *_flat(weights, active, delta), kernel, active.active_list, *(refinement or (None, None, None))
    )[0]


def _kernel_for(hidden: Tensor) -> str:
    return "triton" if not on_cpu(hidden) and hidden.shape[-1] <= MAX_HIDDEN else "torch"


def _flat(weights: FFNWeights, active: ActiveNeurons, delta: OutputDelta) -> tuple:
    """These arguments in the order of the custom operation, which takes plain tensors."""
    gate, up, down, activation = weights
    return gate, up, down, active.masks, activation, *(active.candidates or (None, None)), *delta


def sparse_ffn_triton(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    delta: OutputDelta = _NO_DELTA,
    refinement: Refinement | None = None,
) -> Tensor:
    """`sparse_ffn` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.

    Raises ValueError for a hidden size above 16,384.
    """
    if hidden.shape[1] > MAX_HIDDEN:
        raise ValueError(f"sparse_ffn_triton takes hidden sizes of up to {MAX_HIDDEN}, got hidden {describe(hidden)}")
    partial = _rows(hidden.contiguous(), weights, active, refinement)
    return finish(partial, hidden, active.candidates, delta, {"EARLY": False})


def sparse_ffn_hopper(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    delta: OutputDelta = _NO_DELTA,
    refinement: Refinement | None = None,
) -> Tensor:
    """`sparse_ffn` with a CUDA C++ kernel for its rows, for weights that `sparse_ffn_sm90.is_supported` accepts.

    With a refinement, for inputs that `sparse_ffn_sm90.runs_stages` accepts.
    """
    hidden = aligned(hidden)
    if refinement is None:
        partial = rows_hopper(hidden, weights, active)
    else:
        partial = staged_hopper(hidden, weights, active, refinement)
    return finish(partial, hidden, active.candidates, delta, pdl_options(hidden.device))


def _rows(hidden: Tensor, weights: FFNWeights, active: ActiveNeurons, refinement: Refinement | None = None) -> Tensor:
    """Each program's part of the output, float32 [programs, n, E]."""
    (n, E), words, programs = hidden.shape, active.masks.shape[1] // 4, _PROGRAMS * multiprocessors(hidden.device)
    gate, up, down, activation = weights
    partial = hidden.new_empty((programs, n, E), dtype=torch.float32)
    values, ids = active.candidates or (partial, partial)  # without candidates the kernel does not read them
    count = values.shape[1] if active.candidates else 0
    thresholds, norms, up_part = (
        partial if each is None else each.contiguous() for each in refinement or (None, None, None)
    )
    tensors = hidden, gate, up, down, active.masks.view(torch.int32), values, ids, thresholds, norms, up_part, partial
    numbers = n, E, len(gate), words, count, gate.stride(0), up.stride(0), down.stride(0)
    blocks = {
        "N": triton.next_power_of_2(n),
        "BLOCK_E": triton.next_power_of_2(E),
        "BLOCK_W": triton.next_power_of_2(words),
        "BLOCK_C": triton.next_power_of_2(max(count, 1)),
    }
    flags = {
        "BY_CLUSTER": active.candidates is not None,
        "STAGED": refinement is not None,
        "UP_PART": refinement is not None and refinement.up_part is not None,
    }
    with torch.cuda.device_of(hidden):
        tile = _ROWS_TILE if refinement is None else _STAGED_TILE
        _rows_kernel[(programs,)](*tensors, *numbers, **flags, ACTIVATION=activation, **blocks, **tile)
    return partial


def finish(
    partial: Tensor,
    hidden: Tensor,
    candidates: Candidates | None,
    delta: OutputDelta,
    options: dict[str, bool],
    later: PredictorWeights | None = None,
    prediction: Prediction | None = None,
    fresh: int = 0,
) -> Tensor:
    """The output: the sum of the programs' parts, plus `delta`.

    options: launch options, from `pdl_options`. later: a later layer's predictor; the kernel computes its candidates
    from the bottleneck in `prediction`, and writes them to `prediction`. fresh: how many of the last values of
    `delta.bottleneck` the kernel before this one writes.
    """
    (programs, n, E), output = partial.shape, hidden.new_empty(hidden.shape)
    # The kernel does not read the placeholders.
    values, ids = candidates or (partial, partial)
    count = values.shape[1] if candidates else 0
    corrects, scores = delta.bottleneck is not None, later is not None and prediction is not None
    inner, correct, bias, offsets = (partial if value is None else value for value in delta)
    later_inner = expand = expand_bias = later_values = later_ids = partial
    if later is not None and prediction is not None:
        expand, expand_bias = later.expand, later.expand_bias
        later_inner, (later_values, later_ids) = prediction
    tensors = partial, output, inner, correct, bias, offsets, values, ids
    later_tensors = later_inner, expand, expand_bias, later_values, later_ids
    later_numbers = later_inner.shape[1], len(expand), later_values.shape[1]
    constants = {
        "CORRECTS": corrects,
        "OFFSETS": delta.offsets is not None,
        "SCORES": AHEAD if scores else 0,
        "BLOCK_FRESH": triton.next_power_of_2(fresh) if fresh else 0,
        "BLOCK_C": triton.next_power_of_2(max(count, 1)),
        "BLOCK_P": min(_PARTS, triton.next_power_of_2(programs)),
        "BLOCK_LATER": triton.next_power_of_2(later_inner.shape[1]),
    }
    with torch.cuda.device_of(hidden):
        numbers = n, programs, E, inner.shape[1], count, *later_numbers, fresh
        _finish_kernel[(finish_programs(E), n)](
            *tensors, *later_tensors, *numbers, **constants, **options, **_FINISH_TILE
        )
    return output


def finish_programs(E: int) -> int:
    """Programs of the kernel that adds the parts."""
    return triton.cdiv(E, _FINISH_TILE["COLUMNS"])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def act(x: Tensor, activation: str) -> Tensor:
    """The activation function of this name, one of `ACTIVATIONS`, applied to x."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    }
    return functions[activation](x)


def sparse_ffn_ahead(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    later: PredictorWeights,
    delta: OutputDelta = _NO_DELTA,
    next_layer: NextLayer | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Prediction, Tensor | None]:
    """`sparse_ffn` by clusters, and in the same call `predict_clusters` of these tokens for a later layer.

    On Hopper the same kernels do both, so the prediction costs only the time to read the predictor's weights.

    Args:
        hidden, weights, active, delta, kernel: as for `sparse_ffn`; `active` must have candidates.
        later: the later layer's predictor.
        next_layer: the next FFN, if `can_prefetch` accepts it: its active neurons are listed.

    Returns:
        The output; the prediction; the next layer's active list (for its `ActiveNeurons`), or None if it can't be
        listed.

    Without kernels it raises ValueError as `sparse_ffn` and `predict_clusters` do.
    """
    kernel = _kernel_for(hidden) if kernel is None else kernel
    if kernel != "triton":
        return sparse_ffn(hidden, weights, active, delta, kernel), predict_clusters(hidden, later, False), None
    neurons, next_masks, next_candidates = next_layer or (0, None, None)
    output, inner, logits, clusters, next_list = torch.ops.apc.sparse_ffn(
        hidden,
        *_flat(weights, active, delta),
        "triton",
        active.active_list,
        *(None, None, None),
        *later,
        neurons,
        next_masks,
        *(next_candidates or (None, None)),
    )
    prediction = Prediction(inner, Candidates(logits, clusters))
    return output, prediction, None if next_layer is None else next_list


def _sparse_ffn(
    hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    masks: Tensor,
    activation: str,
    values: Tensor | None,
    ids: Tensor | None,
    inner: Tensor | None,
    correct: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    kernel: str,
    active_list: Tensor | None,
    thresholds: Tensor | None = None,
    norms: Tensor | None = None,
    up_part: Tensor | None = None,
    reduce: Tensor | None = None,
    reduce_bias: Tensor | None = None,
    expand: Tensor | None = None,
    expand_bias: Tensor | None = None,
    neurons: int = 0,
    next_masks: Tensor | None = None,
    next_values: Tensor | None = None,
    next_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the prediction (bottleneck, logits, clusters) and the next layer's active list, or empty tensors.

    Both public functions use this one operation. When torch.compile meets an operation for the first time, Inductor
    (up to torch 2.11) writes out how its arguments were computed. With two operations this would take minutes if the
    model's last layer is the first to call the second operation.
    """
    _wait_for(active_list)
    weights, delta = FFNWeights(gate, up, down, activation), OutputDelta(inner, correct, bias, offsets)
    active = ActiveNeurons(masks, _candidates(values, ids), active_list)
    refinement = None if thresholds is None or norms is None else Refinement(thresholds, norms, up_part)
    if kernel != "triton":
        return _on_host(hidden, weights, active, delta, kernel, refinement), *_empty(hidden)
    if reduce is None or reduce_bias is None or expand is None or expand_bias is None:
        hopper = is_supported(gate, up, down) if refinement is None else runs_stages(hidden, gate, up, down)
        kernels = sparse_ffn_hopper if hopper else sparse_ffn_triton
        return kernels(hidden, weights, active, delta, refinement), *_empty(hidden)
    output, prediction = _with_prediction(
        hidden, weights, active, delta, PredictorWeights(reduce, reduce_bias, expand, expand_bias)
    )
    if next_masks is None:
        return output, prediction.bottleneck, *prediction.candidates, _empty(hidden)[-1]
    next_list = empty_active_list(hidden, neurons)
    next_candidates = _candidates(next_values, next_ids) or prediction.candidates
    with _beside(hidden.device):
        find_hopper(hidden, NextLayer(neurons, next_masks, next_candidates), next_list, early=not _SIDE_STREAM.get())
    return output, prediction.bottleneck, *prediction.candidates, next_list


_operation = torch.library.custom_op("apc::sparse_ffn", _sparse_ffn, mutates_args=())
RoundedWeight.direct[torch.ops.apc.sparse_ffn.default] = _sparse_ffn


@_operation.register_fake
def _(
    hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    masks: Tensor,
    activation: str,
    values: Tensor | None,
    ids: Tensor | None,
    inner: Tensor | None,
    correct: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    kernel: str,
    active_list: Tensor | None,
    thresholds: Tensor | None = None,
    norms: Tensor | None = None,
    up_part: Tensor | None = None,
    reduce: Tensor | None = None,
    reduce_bias: Tensor | None = None,
    expand: Tensor | None = None,
    expand_bias: Tensor | None = None,
    neurons: int = 0,
    next_masks: Tensor | None = None,
    *_: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, (no_bottleneck, no_logits, no_clusters, no_list) = hidden.new_empty(hidden.shape), _empty(hidden)
    next_list = no_list if next_masks is None else empty_active_list(hidden, neurons)
    if reduce is None or expand is None:
        return output, no_bottleneck, no_logits, no_clusters, next_list
    prediction = empty_prediction(hidden, reduce, expand, AHEAD)
    return output, prediction.bottleneck, *prediction.candidates, next_list


def _candidates(values: Tensor | None, ids: Tensor | None) -> Candidates | None:
    return None if values is None or ids is None else Candidates(values, ids)


def _empty(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors in place of a bottleneck, logits, clusters and an active list."""
    floats, ints = (functools.partial(hidden.new_empty, 0, dtype=dtype) for dtype in (torch.float32, torch.int32))
    return floats(), floats(), ints(), ints()


def _with_prediction(
    hidden: Tensor, weights: FFNWeights, active: ActiveNeurons, delta: OutputDelta, later: PredictorWeights
) -> tuple[Tensor, Prediction]:
    """`sparse_ffn_ahead` by kernels: the output, and the prediction for a later layer."""
    hidden = aligned(hidden)
    reduce, reduce_bias, expand, expand_bias = later
    prediction = empty_prediction(hidden, reduce, expand, AHEAD)
    matrices = weights.gate, weights.up, weights.down, reduce
    if is_supported(*matrices) and reduce.dtype == hidden.dtype and reduce.is_contiguous():
        options = pdl_options(hidden.device)
        partial = rows_hopper(hidden, weights, active, (reduce, reduce_bias, prediction.bottleneck))
    else:
        options = {"EARLY": False}
        partial = _rows(hidden, weights, active)
        reduce_hidden(hidden, reduce, reduce_bias, prediction.bottleneck, options)
    groups = prediction.candidates.logits.shape[1]
    if groups <= finish_programs(hidden.shape[1]) and len(reduce) <= MAX_SCORED:
        return finish(partial, hidden, active.candidates, delta, options, later, prediction), prediction
    output = finish(partial, hidden, active.candidates, delta, options)
    score_clusters(prediction, expand, expand_bias, options, AHEAD)
    return output, prediction


def _on_host(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    delta: OutputDelta,
    kernel: str,
    refinement: Refinement | None = None,
) -> Tensor:
    """`sparse_ffn` by numba, or in plain torch on any device."""
    chosen = None
    if active.candidates is not None:
        values, ids = active.candidates
        chosen = torch.where(values == values.amax(-1, keepdim=True), ids, torch.iinfo(torch.int32).max).amin(-1).long()
    masks = active.masks if chosen is None else active.masks[chosen]
    if kernel == "numba":
        from apc.ops.sparse_ffn_cpu import sparse_ffn_cpu  # imports numba

        output = sparse_ffn_cpu(hidden, weights, masks)
    else:
        output = _by_torch(hidden, weights, masks, refinement)
    inner, correct, bias, offsets = delta
    if inner is not None and correct is not None and bias is not None:
        output = output + inner @ correct.float() + bias
    if offsets is not None:
        output = output + offsets[chosen].float()
    return output.to(hidden.dtype)


def _by_torch(hidden: Tensor, weights: FFNWeights, masks: Tensor, refinement: Refinement | None) -> Tensor:
    """Σ_i act(x · gate_i) · (x · up_i) · down_i over each token's neurons, float32 [n, E]; masks: uint8 [n, W]."""
    gate, up, down, activation = weights
    kept = unpack(masks, len(gate))
    neurons = kept.any(0).nonzero().squeeze(1)
    gates, kept = act(hidden @ gate[neurons].T, activation), kept[:, neurons]
    x = gates * (hidden @ up[neurons].T)
    if refinement is not None:
        least, norms = (refinement.thresholds / 2).exp(), refinement.norms[neurons]
        importance = gates.float().abs() * norms
        if refinement.up_part is not None:
            importance = importance * (refinement.up_part[:, neurons] / 2).exp()
        dropped = (importance < least[0]) | (x.float().abs() * norms < least[1])  # NaN is not dropped
        kept = kept & ~dropped
    return (x.masked_fill(~kept, 0) @ down[neurons]).float()


def can_prefetch(weights: FFNWeights) -> bool:
    """Whether an FFN's active neurons can be listed ahead: if the Hopper kernel takes its matrices."""
    return is_supported(weights.gate, weights.up, weights.down)


_SIDE_STREAM: ContextVar[bool] = ContextVar("side stream", default=False)


@contextlib.contextmanager
def use_side_stream() -> Iterator[None]:
    """Within it, `sparse_ffn_ahead` lists the next layer's active neurons on a side stream, while attention runs.

    The caller must run whole forward passes within it, eagerly or captured in one CUDA graph: the side stream
    forks in an FFN and joins in the next FFN. Outside this context, the neurons are listed on the main stream before
    attention, because a graph capture could end between the fork and the join.
    """
    before = _SIDE_STREAM.set(True)
    try:
        yield
    finally:
        _SIDE_STREAM.reset(before)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Within this context, kernels run on the side stream, which forks here, if `use_side_stream` is on."""
    if not _SIDE_STREAM.get():
        yield
        return
    _side_stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_side_stream(device)):
        yield


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _wait_for(active_list: Tensor | None) -> None:
    """Let the current stream wait until the active list is complete."""
    if active_list is not None and _SIDE_STREAM.get():
        torch.cuda.current_stream(active_list.device).wait_stream(_side_stream(active_list.device))
