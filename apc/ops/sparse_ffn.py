"""A gated FFN over the neurons that masks keep, for a few tokens: it reads their rows of gate, up and the transposed down projection, and no others.

At one token an FFN's time is that of reading its weights, so half the rows take half the time, if nothing waits in between. The kernels follow each
other without the host: those of `predict.py` say which cluster a token is of, as the best of each program's clusters; every program of `rows` finds
the best of those, is_supported its share of the neurons kept, and adds up their part of the output; `finish` adds the parts, in the same order each time.
On Hopper `rows` is CUDA C++ (`sparse_ffn_sm90.py`), and each kernel is on its multiprocessors before the one before it has ended (EARLY), with
what it reads of weights, and waits there. Predicted a layer ahead, an FFN's neurons are found by a kernel of its own beside attention.

Shape letters: n tokens, E hidden size, D neurons, H bottleneck, K clusters, W bytes of a packed mask (see `bits.py`), P programs.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apc.ops.bits import describe, on_cpu, row_bytes, unpack
from apc.ops.predict import (
    SCORE_TILE,
    check_hidden,
    launch_early,
    like_predictions,
    predict_clusters,
    reduce_hidden,
    score_clusters,
    store_best,
)
from apc.ops.sparse_ffn_sm90 import aligned, find_hopper, is_supported, like_active_list, rows_hopper

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MAX_HIDDEN = 2**14  # hidden size that a program's sums can have
_ROWS_TILE = {
    "ROWS": 2,
    "STAGES": 3,
    "num_warps": 4,
}  # neurons whose rows a program reads at a time, and how often ahead of their use
_PROGRAMS = 1  # of `rows` on each multiprocessor
_FINISH_TILE = {"COLUMNS": 16, "BLOCK_H": 64, "num_warps": 4}
_PARTS = 256  # of the output that are added at a time, at most
_AHEAD = 8  # clusters of a later layer that a program of `finish` scores: with more its registers leave no room for two beside a block of `rows`
_SCORED = 1024  # size of a bottleneck with which it does, at most


@triton.jit
def _popcount(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _place(word, rank):
    """Of each uint32 the place of its set bit number `rank`, from 0."""
    place = tl.zeros_like(rank)
    for step in tl.static_range(5):
        width = 16 >> step
        low = (word >> place.to(tl.uint32)) & ((1 << width) - 1)
        ones = _popcount(low)
        further = rank >= ones
        rank = tl.where(further, rank - ones, rank)
        place = tl.where(further, place + width, place)
    return place


@triton.jit
def _best(values_ptr, ids_ptr, count, BLOCK: tl.constexpr):
    """The id of the largest value, of equal ones the lowest."""
    i = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + i, mask=i < count, other=float("-inf"), cache_modifier=".cg")
    ids = tl.load(ids_ptr + i, mask=i < count, other=0x7FFFFFFF, cache_modifier=".cg")
    return tl.min(tl.where(values == tl.max(values, axis=0), ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # ½ (1 + tanh y) = σ(2 y)


@triton.jit
def _rows_kernel(
    hidden_ptr,  # float [n, E]
    gate_ptr,  # float [D, E], rows `gate_stride` apart, as up and down (transposed)
    up_ptr,
    down_ptr,
    masks_ptr,  # uint32 [K or n, words]
    values_ptr,  # float32 [n, candidates], where masks are clusters'
    ids_ptr,  # int32 [n, candidates]
    partial_ptr,  # float32 [P, n, E], out
    tokens,
    E,
    words,
    candidates,
    gate_stride,
    up_stride,
    down_stride,
    BY_CLUSTER: tl.constexpr,
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
    mask_of = n  # the row of each token's mask
    union = tl.zeros([BLOCK_W], tl.int32)
    for token in tl.static_range(N):
        row = token
        if BY_CLUSTER:
            row = _best(
                values_ptr + token * candidates,
                ids_ptr + token * candidates,
                tl.where(token < tokens, candidates, 0),
                BLOCK_C,
            )
            row = tl.where(token < tokens, row, 0)
            mask_of = tl.where(n == token, row, mask_of)
        union |= tl.load(masks_ptr + row * words + w, mask=(w < words) & (token < tokens), other=0)
    counts = _popcount(union.to(tl.uint32, bitcast=True))
    ends = tl.cumsum(counts, axis=0)
    total = tl.sum(counts, axis=0)
    first = (tl.program_id(0) * total) // tl.num_programs(0)
    last = ((tl.program_id(0) + 1) * total) // tl.num_programs(0)

    given = (n < tokens)[:, None] & (e < E)[None, :]
    hidden = tl.load(hidden_ptr + n[:, None] * E + e[None, :], mask=given, other=0.0).to(tl.float32)
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
        gate = tl.load(gate_ptr + neuron * gate_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + neuron * up_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        down = tl.load(down_ptr + neuron * down_stride + e[None, :], mask=read, other=0.0).to(tl.float32)
        x = _activate(tl.sum(gate[None, :, :] * hidden[:, None, :], axis=2), ACTIVATION) * tl.sum(
            up[None, :, :] * hidden[:, None, :], axis=2
        )
        if N > 1:  # another token's mask alone may keep a neuron
            own = tl.load(
                masks_ptr + mask_of[:, None] * words + word_at[None, :],
                mask=(n < tokens)[:, None] & inside[None, :],
                other=0,
            )
            x = tl.where((own >> place[None, :]) & 1 != 0, x, 0.0)
        x = x.to(hidden_ptr.dtype.element_ty).to(tl.float32)  # rounded where a model rounds it
        sums += x[:, :, None] * down[None, :, :]
    at = (tl.program_id(0) * tokens + n)[:, None] * E + e[None, :]
    tl.store(partial_ptr + at, tl.sum(sums, axis=1), mask=given)


@triton.jit
def _finish_kernel(
    partial_ptr,  # float32 [P, n, E]
    output_ptr,  # float [n, E], out
    inner_ptr,  # float32 [n, H], where there is a correction
    correct_ptr,  # float [H, E]
    correct_bias_ptr,  # float32 [E]
    offsets_ptr,  # float [K, E], where clusters have offsets
    values_ptr,  # float32 [n, candidates]
    ids_ptr,  # int32 [n, candidates]
    later_inner_ptr,  # float32 [n, later_H], where a later layer's cluster is predicted: what `_score_kernel` is_supported and gives
    expand_ptr,  # float [later_K, later_H]
    expand_bias_ptr,  # float32 [later_K]
    later_values_ptr,  # float32 [n, groups], out
    later_ids_ptr,  # int32 [n, groups], out
    tokens,
    programs,
    E,
    H,
    candidates,
    later_H,
    later_K,
    groups,
    EARLY: tl.constexpr,
    CORRECTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCORES: tl.constexpr,  # clusters that a program scores, 0: none
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
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            inner = tl.load(inner_ptr + n * H + h, mask=h < H, other=0.0, cache_modifier=".cg")
            weights = tl.load(
                correct_ptr + h[:, None] * E + e[None, :], mask=(h < H)[:, None] & (e < E)[None, :], other=0.0
            ).to(tl.float32)
            output += tl.sum(inner[:, None] * weights, axis=0)
    if OFFSETS:
        row = _best(values_ptr + n * candidates, ids_ptr + n * candidates, candidates, BLOCK_C)
        output += tl.load(offsets_ptr + row.to(tl.int64) * E + e, mask=e < E, other=0.0).to(tl.float32)
    if EARLY:  # what comes from before `rows` was there when that began
        gdc_wait()
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
    if SCORES > 0:  # noqa: SIM102 (without it there is nothing to look at)
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
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str = "silu", candidates: tuple[Tensor, Tensor] | None = None,
    correction: tuple[Tensor, Tensor, Tensor] | None = None, offsets: Tensor | None = None, by_triton: bool | None = None, active_list: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """hidden float [n, E] → [n, E], of its type: Σ over each token's neurons i of act(x · gate_i) · (x · up_i) · down_i, and what is added to it.

    Args:
        gate, up, down: [D, E] of hidden's type; down is the transposed down projection. Rows may be further apart than E.
        masks: uint8 [n, W], of each token; or [K, W], of clusters, where there are candidates.
        activation: silu, gelu, gelu_tanh or relu.
        candidates: as `predict_clusters` gives them, float32 [n, C] and int32 [n, C].
        correction: bottleneck float32 [n, H], weights [H, E], bias float32 [E]: their product is added.
        offsets: [K, E], of which the token's cluster's row is added; needs candidates.
        by_triton: by the kernels, which take up to `MAX_TOKENS` tokens and a hidden size of up to 16,384. None: on a GPU.
        active_list: which neurons each program is_supported, as `sparse_ffn_ahead` gives it for as many tokens and the same masks and candidates.

    The kernels' sums are float32, added in the same order each time; the product of gate and up is rounded to hidden's type, as a model does. Raises
    ValueError for other shapes, types or an unknown activation.
    """
    by_triton = not on_cpu(hidden) and hidden.shape[-1] <= MAX_HIDDEN if by_triton is None else by_triton
    n, E = check_hidden(hidden, by_triton)
    D = len(gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation}: choose {', '.join(ACTIVATIONS)}")
    for name, weights in (("gate", gate), ("up", up), ("down", down)):
        if weights.shape != (D, E) or weights.dtype != hidden.dtype or weights.stride(-1) != 1:
            raise ValueError(
                f"{name} {describe(weights)} must be {describe(hidden.new_empty(0)).split()[0]} [{D}, {E}], rows in one piece"
            )
    rows = "K" if candidates else n
    if (
        masks.dtype != torch.uint8
        or masks.dim() != 2
        or masks.shape[1] != row_bytes(D)
        or (candidates is None and len(masks) != n)
    ):
        raise ValueError(
            f"masks {describe(masks)} must be uint8 [{rows}, {row_bytes(D)}] to go with hidden {describe(hidden)} and gate {describe(gate)}"
        )
    if offsets is not None and (candidates is None or offsets.shape != (len(masks), E)):
        raise ValueError(f"offsets {describe(offsets)} must be [{len(masks)}, {E}], and need candidates")
    given = *(candidates or (None, None)), *(correction or (None, None, None))
    return torch.ops.apc.sparse_ffn(hidden, gate, up, down, masks, activation, *given, offsets, by_triton, active_list)[
        0
    ]


def sparse_ffn_triton(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str = "silu", candidates: tuple[Tensor, Tensor] | None = None,
    correction: tuple[Tensor, Tensor, Tensor] | None = None, offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sparse_ffn` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1; hidden sizes of up to 16,384."""
    if hidden.shape[1] > MAX_HIDDEN:
        raise ValueError(
            f"sparse_ffn_triton is_supported hidden sizes of up to {MAX_HIDDEN}, got hidden {describe(hidden)}"
        )
    partial = _rows(hidden.contiguous(), gate, up, down, masks, activation, candidates)
    return _finish(partial, hidden, candidates, correction, offsets, {"EARLY": False})


def sparse_ffn_hopper(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str = "silu", candidates: tuple[Tensor, Tensor] | None = None,
    correction: tuple[Tensor, Tensor, Tensor] | None = None, offsets: Tensor | None = None, active_list: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sparse_ffn` with its rows by the CUDA C++ kernel, for what `sparse_ffn_sm90.is_supported` is_supported."""
    partial = rows_hopper(aligned(hidden), gate, up, down, masks, activation, candidates, None, active_list)
    return _finish(partial, hidden, candidates, correction, offsets, launch_early(hidden.device))


def _rows(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str, candidates: tuple[Tensor, Tensor] | None
) -> Tensor:  # fmt: skip
    """The programs' parts of the output, float32 [P, n, E]."""
    (n, E), words, programs = hidden.shape, masks.shape[1] // 4, _PROGRAMS * _multiprocessors(hidden.device)
    partial = hidden.new_empty((programs, n, E), dtype=torch.float32)
    values, ids = candidates or (partial, partial)  # what is not there is not read
    count = values.shape[1] if candidates else 0
    with torch.cuda.device_of(hidden):
        _rows_kernel[(programs,)](
            hidden, gate, up, down, masks.view(torch.int32), values, ids, partial, n, E, words, count, gate.stride(0), up.stride(0), down.stride(0),
            BY_CLUSTER=candidates is not None, ACTIVATION=activation, N=triton.next_power_of_2(n), BLOCK_E=triton.next_power_of_2(E),
            BLOCK_W=triton.next_power_of_2(words), BLOCK_C=triton.next_power_of_2(max(count, 1)), **_ROWS_TILE,
        )  # fmt: skip
    return partial


def _finish(
    partial: Tensor, hidden: Tensor, candidates: tuple[Tensor, Tensor] | None, correction: tuple[Tensor, Tensor, Tensor] | None, offsets: Tensor | None,
    how: dict[str, bool], later: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """how: of the launch, as `launch_early` has it; later: a later layer's bottleneck, expand and bias, and what becomes its candidates."""
    (programs, n, E), output = partial.shape, hidden.new_empty(hidden.shape)
    values, ids = candidates or (partial, partial)  # what is not there is not read
    count = values.shape[1] if candidates else 0
    inner, correct, bias = correction or (partial, partial, partial)
    scores = later or (partial,) * 5
    with torch.cuda.device_of(hidden):
        _finish_kernel[(_finish_programs(E), n)](
            partial, output, inner, correct, bias, partial if offsets is None else offsets, values, ids, *scores, n, programs, E, inner.shape[1], count,
            scores[0].shape[1], len(scores[1]), scores[3].shape[1], CORRECTS=correction is not None, OFFSETS=offsets is not None,
            BLOCK_C=triton.next_power_of_2(max(count, 1)), BLOCK_P=min(_PARTS, triton.next_power_of_2(programs)),
            SCORES=_AHEAD if later else 0, BLOCK_LATER=triton.next_power_of_2(scores[0].shape[1]), **how, **_FINISH_TILE,
        )  # fmt: skip
    return output


def _finish_programs(E: int) -> int:
    return triton.cdiv(E, _FINISH_TILE["COLUMNS"])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def act(x: Tensor, activation: str) -> Tensor:
    """An activation function of `ACTIVATIONS` by its name."""
    return {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[
        activation
    ](x)


class NextLayer(NamedTuple):
    """An FFN whose neurons are to be found: how many it has, its clusters' masks, and its candidates where they were predicted before."""

    neurons: int
    masks: Tensor
    candidates: tuple[Tensor, Tensor] | None = None


def sparse_ffn_ahead(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str, candidates: tuple[Tensor, Tensor],
    later: tuple[Tensor, Tensor, Tensor, Tensor], correction: tuple[Tensor, Tensor, Tensor] | None = None, offsets: Tensor | None = None,
    active_list: Tensor | None = None, following: NextLayer | None = None, by_triton: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:  # fmt: skip
    """`sparse_ffn` by clusters, and `predict_clusters` of the same tokens for a later layer, whose reduce, bias, expand and bias are `later`.

    On Hopper the same kernels do both, so the prediction is_supported the time of its bytes and no more. active_list: as for `sparse_ffn`. following: the next
    layer's FFN, which `can_find` is_supported: its `active_list` comes back too, found by its candidates, or by those just predicted. Raises as those two do.
    """
    by_triton = not on_cpu(hidden) and hidden.shape[-1] <= MAX_HIDDEN if by_triton is None else by_triton
    if not by_triton:
        output = sparse_ffn(hidden, gate, up, down, masks, activation, candidates, correction, offsets, by_triton)
        return output, predict_clusters(hidden, *later, by_triton), None
    neurons, next_masks, next_candidates = following or (0, None, None)
    output, *found, next_listed = torch.ops.apc.sparse_ffn(
        hidden, gate, up, down, masks, activation, *candidates, *(correction or (None, None, None)), offsets, True, active_list, *later, neurons, next_masks,
        *(next_candidates or (None, None)),
    )  # fmt: skip
    return output, tuple(found), None if following is None else next_listed


@torch.library.custom_op("apc::sparse_ffn", mutates_args=())
def _sparse_ffn(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str, values: Tensor | None, ids: Tensor | None,
    inner: Tensor | None, correct: Tensor | None, bias: Tensor | None, offsets: Tensor | None, by_triton: bool, active_list: Tensor | None,
    reduce: Tensor | None = None, reduce_bias: Tensor | None = None, expand: Tensor | None = None, expand_bias: Tensor | None = None,
    neurons: int = 0, next_masks: Tensor | None = None, next_values: Tensor | None = None, next_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, what is predicted for a later layer, and what is found of the next; empty where that was not asked for.

    One operation of both functions: as torch.compile first meets one, Inductor (up to torch 2.11) writes out what its arguments were made of. That is_supported
    minutes where a model's last layer is the first to call it.
    """
    _wait_for(active_list)
    candidates, correction = (
        None if values is None else (values, ids),
        None if inner is None else (inner, correct, bias),
    )
    if not by_triton:
        return _by_torch(hidden, gate, up, down, masks, activation, candidates, correction, offsets), *_empty(hidden)
    if reduce is None:
        if is_supported(gate, up, down):
            output = sparse_ffn_hopper(
                hidden, gate, up, down, masks, activation, candidates, correction, offsets, active_list
            )
        else:
            output = sparse_ffn_triton(hidden, gate, up, down, masks, activation, candidates, correction, offsets)
        return output, *_empty(hidden)
    hidden = aligned(hidden)
    later_inner, *later = found = like_predictions(hidden, reduce, expand, _AHEAD)
    if is_supported(gate, up, down, reduce) and reduce.dtype == hidden.dtype and reduce.is_contiguous():
        how = launch_early(hidden.device)
        partial = rows_hopper(
            hidden, gate, up, down, masks, activation, candidates, (reduce, reduce_bias, later_inner), active_list
        )
    else:
        how = {"EARLY": False}
        partial = _rows(hidden, gate, up, down, masks, activation, candidates)
        reduce_hidden(hidden, reduce, reduce_bias, later_inner, how)
    together = later[0].shape[1] <= _finish_programs(hidden.shape[1]) and len(reduce) <= _SCORED
    output = _finish(
        partial,
        hidden,
        candidates,
        correction,
        offsets,
        how,
        (later_inner, expand, expand_bias, *later) if together else None,
    )
    if not together:
        score_clusters(later_inner, expand, expand_bias, *later, how, **(SCORE_TILE | {"ROWS": _AHEAD}))
    if next_masks is None:
        return output, *found, _empty(hidden)[-1]
    next_listed, next_candidates = (
        like_active_list(hidden, neurons),
        later if next_values is None else (next_values, next_ids),
    )
    with _beside(hidden.device):
        find_hopper(hidden, neurons, next_masks, next_candidates, next_listed, early=not _WHOLE.get())
    return output, *found, next_listed


@_sparse_ffn.register_fake
def _(
    hidden: Tensor, gate, up, down, masks, activation, values, ids, inner, correct, bias, offsets, by_triton, active_list, reduce: Tensor | None = None,
    reduce_bias=None, expand: Tensor | None = None, expand_bias=None, neurons: int = 0, next_masks: Tensor | None = None, *_,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *found, next_listed = _empty(hidden)
    if reduce is not None:
        found = like_predictions(hidden, reduce, expand, _AHEAD)
    return (
        hidden.new_empty(hidden.shape),
        *found,
        next_listed if next_masks is None else like_active_list(hidden, neurons),
    )


def _empty(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the types of bottleneck, candidates and list."""
    return tuple(hidden.new_empty(0, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.int32, torch.int32))


def _by_torch(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str, candidates: tuple[Tensor, Tensor] | None,
    correction: tuple[Tensor, Tensor, Tensor] | None, offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    chosen = None
    if candidates is not None:
        values, ids = candidates
        chosen = torch.where(values == values.amax(-1, keepdim=True), ids, torch.iinfo(torch.int32).max).amin(-1).long()
    kept = unpack(masks if chosen is None else masks[chosen], len(gate))
    neurons = kept.any(0).nonzero().squeeze(1)
    x = act(hidden @ gate[neurons].T, activation) * (hidden @ up[neurons].T) * kept[:, neurons]
    output = (x @ down[neurons]).float()
    if correction is not None:
        inner, correct, bias = correction
        output = output + inner @ correct.float() + bias
    if offsets is not None:
        output = output + offsets[chosen].float()
    return output.to(hidden.dtype)


def can_find(gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether an FFN's neurons can be found ahead: where its rows are for the kernel for Hopper."""
    return is_supported(gate, up, down)


_WHOLE: ContextVar[bool] = ContextVar("whole passes", default=False)


@contextlib.contextmanager
def whole_passes() -> Iterator[None]:
    """Within it layers are called in whole passes through a model, eagerly or in one CUDA graph: a stream that forks off in an FFN is joined in the next.

    So `sparse_ffn_ahead` finds the next layer's neurons beside attention. Elsewhere it does so before that: what is captured might end in between.
    """
    before = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(before)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a stream that forks off here, in whole passes."""
    if not _WHOLE.get():
        yield
        return
    _side_stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_side_stream(device)):
        yield


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _wait_for(active_list: Tensor | None) -> None:
    """The current stream waits until it is complete."""
    if active_list is not None and _WHOLE.get():
        torch.cuda.current_stream(active_list.device).wait_stream(_side_stream(active_list.device))
