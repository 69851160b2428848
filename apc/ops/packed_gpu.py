"""Products with matrices of 4 bits a weight on a GPU: of all rows, and a gated FFN's under a mask.

The kernels here are in Triton, for any GPU. `prepare` computes the norm before a product and lists the neurons that a
mask keeps. An FFN takes three more kernels. The first multiplies the kept neurons' rows of gate and up with the input.
The second adds their rows of down, in parts. `finish`, that of `sparse_ffn.py`, adds the parts. Neurons whose rows have
16 bits get programs of their own in the first kernel, and `finish` adds their rows of down.

Half precision from Ampere to Hopper runs on tensor cores instead (`packed_sm80.py`), because Triton's kernels need 5 to
6 instructions a weight, and so take as long as reading 8 bits would. There a product takes one kernel, with its norm,
and an FFN takes one kernel and `finish`.

Weights become float32 without a conversion: a shift and a mask make two of them bfloat16 numbers 128 + k.

Shape letters: see `apc.ops`; `packed.py` has those of packed rows; H rows of a later predictor's bottleneck.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops import packed_sm80
from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.bits import popcount, popcount_words
from apc.ops.ffn_arguments import EPSILON, Candidates, OutputDelta, Prediction, PredictorWeights
from apc.ops.packed import PER_WORD, PackedRows
from apc.ops.predict import empty_prediction, pdl_options, reduce_hidden, score_clusters
from apc.ops.sparse_ffn import AHEAD, MAX_SCORED, act, activate, best, finish, finish_programs, multiprocessors

_PROJECT_TILE = {"ROWS": 8, "num_warps": 8}
_NEURONS_TILE = {"ROWS": 4, "num_warps": 4}
_DOWN_TILE = {"ROWS": 4, "num_warps": 4}
_LIST_TILE = {"WORDS_EACH": 32, "num_warps": 8}
_DOWN_WORDS = 256  # of a row, that a program of `_down_kernel` reads at most
_PARTS = 2  # parts of the neurons in `_down_kernel` for each multiprocessor
_SPREAD = 1.0  # programs for each tile of neurons that an average mask keeps
_FULL_ROWS = 2  # rows of a later bottleneck that a program reads
_MAX_WORDS = 2**29  # of a matrix: byte offsets are 32 bits
_OFFSET = 0x43004300  # two times 128, bfloat16


class Norm(NamedTuple):
    """An RMS norm."""

    weight: Tensor  # float [E]
    epsilon: float


class SparedNeurons(NamedTuple):
    """Neurons whose rows have 16 bits, P of them."""

    neurons: Tensor  # int32 [P]
    gate: Tensor  # float [P, E]
    up: Tensor  # float [P, E]
    down: Tensor  # float [P, E], transposed


class Kept(NamedTuple):
    """The neurons that a token's mask keeps, on the GPU: how many is not known to the host."""

    neurons: Tensor  # int32 [D], of which the first `total` are set
    total: Tensor  # int32 []


class PackedFFN(NamedTuple):
    """The matrices of a gated FFN at 4 bits; the rows of spared neurons in them are zero."""

    gate: PackedRows  # [D, E]
    up: PackedRows  # [D, E]
    down: PackedRows  # [D, E], transposed
    activation: str
    spared: SparedNeurons | None = None


class PackedClusterFFN(NamedTuple):
    """What decides a layer's FFN and what is added to its output; without predictor and masks it reads all neurons."""

    weights: PackedFFN
    predictor: PredictorWeights | None = None
    masks: Tensor | None = None  # uint8 [K, W]
    correct: tuple[Tensor, Tensor] | None = None  # [H, E] and float32 [E], from this prediction's bottleneck
    offsets: Tensor | None = None  # float [K, E]
    source: int = 0  # the layer whose FFN input decides


class _ByteRows(NamedTuple):
    """A bottleneck's rows at 8 bits: the value of a level is (level - 128) · scale."""

    levels: Tensor  # uint8 [H, E]
    scales: Tensor  # float32 [H]
    bias: Tensor  # float32 [H]


def _byte_rows(rows: Tensor, bias: Tensor) -> _ByteRows:
    """Rows [H, E] rounded to the nearest of 255 multiples of each row's largest size over 127."""
    floats = rows.detach().float()
    scales = (floats.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    levels = (floats / scales[:, None]).round() + 128
    return _ByteRows(levels.to(torch.uint8), scales, bias.contiguous())


@triton.jit
def _widen(words, offset, s: tl.constexpr):
    """The indices k of the weights with numbers 2 s and 2 s + 1 in each word, plus 128, float32.

    offset: `_OFFSET`. As an argument it is in a register, where one instruction can combine it with the mask.
    """
    pair = ((words >> (4 * s)) & 0x000F000F) | offset
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _levels(bytes_ptr, units_ptr, row, read, g, G, S, E):
    """Steps and lows of groups g of some rows, float32 [rows, g]."""
    inside = read[:, None] & (g < G)[None, :]
    at = row[:, None] * (4 * S) + E // 2 + g[None, :]
    step = tl.load(bytes_ptr + at, mask=inside, other=0).to(tl.float32)
    low = tl.load(bytes_ptr + at + G, mask=inside, other=0).to(tl.int32)
    units = units_ptr + row * S + E // 8 + (2 * G + 3) // 4
    step *= tl.load(units, mask=read, other=0.0)[:, None]
    return step, ((low << 24) >> 24).to(tl.float32) * tl.load(units + 1, mask=read, other=0.0)[:, None]


@triton.jit
def _row_words(words_ptr, row, read, g, j, G, S, Q: tl.constexpr):
    """Words of some rows, [rows, g, Q]."""
    at = (row * S)[:, None, None] + (g * Q)[None, :, None] + j[None, None, :]
    return tl.load(words_ptr + at, mask=read[:, None, None] & (g < G)[None, :, None], other=0)


@triton.jit
def _prepare_kernel(
    x_ptr,  # float [E]
    added_ptr,  # float [E], read if ADDS
    norm_ptr,  # float [E]
    sum_ptr,  # float [E], out if ADDS: x + added
    hidden_ptr,  # float [E], out: the norm of x + added
    masks_ptr,  # uint32 [K, words], read if LISTS, as values and ids
    values_ptr,  # float32 [candidates]
    ids_ptr,  # int32 [candidates]
    list_ptr,  # int32 [D], out if LISTS: the kept neurons
    count_ptr,  # int32 [], out if LISTS: how many they are
    E,
    D,
    words,
    candidates,
    epsilon,
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
    LISTS: tl.constexpr,
    EARLY: tl.constexpr,
    WORDS_EACH: tl.constexpr,  # of the mask, for a program
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    program, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    if NORMS and program == 0:
        norm = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        if EARLY:
            gdc_wait()
        x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        if ADDS:
            x += tl.load(added_ptr + e, mask=e < E, other=0.0).to(tl.float32)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # round where a model rounds
            tl.store(sum_ptr + e, x.to(x_ptr.dtype.element_ty), mask=e < E)
        x *= norm / tl.sqrt(tl.sum(x * x, axis=0) / E + epsilon)
        tl.store(hidden_ptr + e, x.to(hidden_ptr.dtype.element_ty), mask=e < E)
    elif LISTS:
        if EARLY:
            gdc_wait()
        cluster = best(values_ptr, ids_ptr, candidates, BLOCK_C)
        w = tl.arange(0, BLOCK_W)
        mask = tl.load(masks_ptr + cluster * words + w, mask=w < words, other=0)
        counts = popcount_words(mask.to(tl.uint32, bitcast=True))
        first = (program - NORMS) * WORDS_EACH
        before = tl.sum(tl.where(w < first, counts, 0), axis=0)
        if first == 0:
            tl.store(count_ptr, tl.sum(counts, axis=0))
        own_w, bit = first + tl.arange(0, WORDS_EACH), tl.arange(0, 32)
        own = tl.load(masks_ptr + cluster * words + own_w, mask=own_w < words, other=0)
        own_counts = popcount_words(own.to(tl.uint32, bitcast=True))
        start = before + tl.cumsum(own_counts, axis=0) - own_counts
        lower = (own[:, None] & ((1 << bit) - 1)[None, :]).to(tl.uint32, bitcast=True)
        to = start[:, None] + popcount_words(lower)
        neuron = 32 * own_w[:, None] + bit[None, :]
        tl.store(list_ptr + to, neuron, mask=((own[:, None] >> bit[None, :]) & 1 != 0) & (neuron < D))


@triton.jit
def _project_kernel(
    x_ptr,  # float [E]
    words_ptr,  # int32 [R, S], packed
    bytes_ptr,  # uint8, the same memory
    units_ptr,  # float32, the same memory
    bias_ptr,  # float32 [R], read if BIAS
    residual_ptr,  # float [R], read if RESIDUAL
    output_ptr,  # float [R], out
    E,
    R,
    S,
    G,
    offset,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row, g, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_G), tl.arange(0, Q)
    read = row < R
    words = _row_words(words_ptr, row, read, g, j, G, S, Q)
    step, low = _levels(bytes_ptr, units_ptr, row, read, g, G, S, E)
    bias = tl.zeros([ROWS], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + row, mask=read, other=0.0)
    if EARLY:
        gdc_wait()
    at, inside = g[:, None] * Q + j[None, :], (g < G)[:, None]
    products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    sums = tl.zeros([BLOCK_G, Q], tl.float32)
    for s in tl.static_range(4):
        even, odd = _inputs(x_ptr, at, inside, s)
        sums += even + odd
        low_index, high_index = _widen(words, offset, s)
        products += low_index * even[None, :, :]
        products += high_index * odd[None, :, :]
    y = _group_products(products, sums, step, low) + bias
    if RESIDUAL:
        y = y.to(output_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + row, mask=read, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, y.to(output_ptr.dtype.element_ty), mask=read)


@triton.jit
def _inputs(x_ptr, at, inside, s: tl.constexpr):
    """The inputs with numbers 2 s and 2 s + 1 in the words `at`, float32."""
    even = tl.load(x_ptr + 8 * at + 2 * s, mask=inside, other=0.0)
    odd = tl.load(x_ptr + 8 * at + 2 * s + 1, mask=inside, other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _group_products(products, sums, step, low):
    """The rows' products [rows], from those with 128 + k for each word [rows, g, Q], and sums of inputs [g, Q]."""
    of_group, sum_of_group = tl.sum(products, axis=2), tl.sum(sums, axis=1)[None, :]
    return tl.sum(step * (of_group - 128 * sum_of_group) + low * sum_of_group, axis=1)


@triton.jit
def _gate_up_kernel(
    x_ptr,  # float [E]
    gate_ptr,  # int32 [D, S], packed, as up
    up_ptr,
    gate_bytes_ptr,  # the same memory as uint8 and as float32
    up_bytes_ptr,
    gate_units_ptr,
    up_units_ptr,
    masks_ptr,  # uint32 [K, words], read unless EVERY, as values, ids, list and count
    values_ptr,  # float32 [candidates]
    ids_ptr,  # int32 [candidates]
    list_ptr,  # int32 [D], the kept neurons
    count_ptr,  # int32 [], how many they are
    inner_ptr,  # float32 [D], out: their values, in the same order
    spared_ptr,  # int32 [P], read if P > 0, as spared_gate and spared_up
    spared_gate_ptr,  # float [P, E]
    spared_up_ptr,  # float [P, E]
    spared_inner_ptr,  # float32 [P], out if P > 0: their values, 0 for those that the mask drops
    later_ptr,  # uint8 [H, E], `_ByteRows`, read if H > 0, as later_scale and later_bias
    later_scale_ptr,  # float32 [H]
    later_bias_ptr,  # float32 [H]
    later_inner_ptr,  # float32 [H], out if H > 0
    E,
    D,
    S,
    G,
    mask_words,
    candidates,
    programs,  # for the listed neurons
    P,
    H,
    offset,
    epsilon,
    EVERY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
    FULL_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    if program < programs:
        count = D
        if not EVERY:
            count = tl.load(count_ptr)
        g, j = tl.arange(0, BLOCK_G), tl.arange(0, Q)
        at, inside = g[:, None] * Q + j[None, :], (g < G)[:, None]
        for start in range(program * ROWS, count, programs * ROWS):
            rank = start + tl.arange(0, ROWS)
            read = rank < count
            row = rank
            if not EVERY:
                row = tl.load(list_ptr + rank, mask=read, other=0)
            gates = _row_words(gate_ptr, row, read, g, j, G, S, Q)
            ups = _row_words(up_ptr, row, read, g, j, G, S, Q)
            gate_step, gate_low = _levels(gate_bytes_ptr, gate_units_ptr, row, read, g, G, S, E)
            up_step, up_low = _levels(up_bytes_ptr, up_units_ptr, row, read, g, G, S, E)
            gate_products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
            up_products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
            sums = tl.zeros([BLOCK_G, Q], tl.float32)
            for s in tl.static_range(4):
                even, odd = _inputs(x_ptr, at, inside, s)
                sums += even + odd
                low_index, high_index = _widen(gates, offset, s)
                gate_products += low_index * even[None, :, :]
                gate_products += high_index * odd[None, :, :]
                low_index, high_index = _widen(ups, offset, s)
                up_products += low_index * even[None, :, :]
                up_products += high_index * odd[None, :, :]
            y = activate(_group_products(gate_products, sums, gate_step, gate_low), ACTIVATION)
            y *= _group_products(up_products, sums, up_step, up_low)
            tl.store(inner_ptr + rank, y.to(x_ptr.dtype.element_ty).to(tl.float32), mask=read)
    elif program < programs + P:
        place = program - programs
        neuron = tl.load(spared_ptr + place)
        kept = 1
        if not EVERY:
            cluster = best(values_ptr, ids_ptr, candidates, BLOCK_C)
            kept = (tl.load(masks_ptr + cluster * mask_words + neuron // 32) >> (neuron % 32)) & 1
        own_x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        own_gate = tl.load(spared_gate_ptr + place * E + e, mask=e < E, other=0.0).to(tl.float32)
        own_up = tl.load(spared_up_ptr + place * E + e, mask=e < E, other=0.0).to(tl.float32)
        own_y = activate(tl.sum(own_gate * own_x, axis=0), ACTIVATION) * tl.sum(own_up * own_x, axis=0)
        tl.store(spared_inner_ptr + place, tl.where(kept != 0, own_y.to(x_ptr.dtype.element_ty).to(tl.float32), 0.0))
    else:
        h = (program - programs - P) * FULL_ROWS + tl.arange(0, FULL_ROWS)
        read_full = (h < H)[:, None] & (e < E)[None, :]
        rows = tl.load(later_ptr + h[:, None] * E + e[None, :], mask=read_full, other=128).to(tl.float32) - 128
        later_scale = tl.load(later_scale_ptr + h, mask=h < H, other=0.0)
        later_bias = tl.load(later_bias_ptr + h, mask=h < H, other=0.0)
        later_x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(later_x * later_x, axis=0) / E + epsilon)
        later_y = tl.sum(rows * later_x[None, :], axis=1) * (scale * later_scale) + later_bias
        tl.store(later_inner_ptr + h, later_y * tl.sigmoid(later_y), mask=h < H)


@triton.jit
def _down_kernel(
    list_ptr,  # int32 [D], the kept neurons, read unless EVERY, as count
    count_ptr,  # int32 [], how many they are
    inner_ptr,  # float32 [D], their values
    down_ptr,  # int32 [D, S], packed
    bytes_ptr,  # uint8, the same memory
    units_ptr,  # float32, the same memory
    partial_ptr,  # float32 [parts, E], out
    E,
    D,
    S,
    G,
    offset,
    EVERY: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
):
    if EARLY:  # in this order: `finish` reads what earlier kernels wrote before it waits
        gdc_wait()
        gdc_launch_dependents()
    g, j = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, Q)
    part, parts, count = tl.program_id(1), tl.num_programs(1), D
    if not EVERY:
        count = tl.load(count_ptr)
    first, last = part * count // parts, (part + 1) * count // parts
    base = tl.zeros([BLOCK_G], tl.float32)
    a0 = tl.zeros([BLOCK_G, Q], tl.float32)
    a1 = tl.zeros([BLOCK_G, Q], tl.float32)
    a2 = tl.zeros([BLOCK_G, Q], tl.float32)
    a3 = tl.zeros([BLOCK_G, Q], tl.float32)
    a4 = tl.zeros([BLOCK_G, Q], tl.float32)
    a5 = tl.zeros([BLOCK_G, Q], tl.float32)
    a6 = tl.zeros([BLOCK_G, Q], tl.float32)
    a7 = tl.zeros([BLOCK_G, Q], tl.float32)
    for start in range(first, last, ROWS):
        rank = start + tl.arange(0, ROWS)
        read = rank < last
        row = rank
        if not EVERY:
            row = tl.load(list_ptr + rank, mask=read, other=0)
        inner = tl.load(inner_ptr + rank, mask=read, other=0.0)
        words = _row_words(down_ptr, row, read, g, j, G, S, Q)
        step, low = _levels(bytes_ptr, units_ptr, row, read, g, G, S, E)
        step *= inner[:, None]
        base += tl.sum(low * inner[:, None] - 128 * step, axis=0)
        factor = step[:, :, None]
        even, odd = _widen(words, offset, 0)
        a0 += tl.sum(factor * even, axis=0)
        a1 += tl.sum(factor * odd, axis=0)
        even, odd = _widen(words, offset, 1)
        a2 += tl.sum(factor * even, axis=0)
        a3 += tl.sum(factor * odd, axis=0)
        even, odd = _widen(words, offset, 2)
        a4 += tl.sum(factor * even, axis=0)
        a5 += tl.sum(factor * odd, axis=0)
        even, odd = _widen(words, offset, 3)
        a6 += tl.sum(factor * even, axis=0)
        a7 += tl.sum(factor * odd, axis=0)
    to = partial_ptr + part * E + 8 * (g[:, None] * Q + j[None, :])
    inside, rest = (g < G)[:, None], base[:, None]
    tl.store(to, a0 + rest, mask=inside)
    tl.store(to + 1, a1 + rest, mask=inside)
    tl.store(to + 2, a2 + rest, mask=inside)
    tl.store(to + 3, a3 + rest, mask=inside)
    tl.store(to + 4, a4 + rest, mask=inside)
    tl.store(to + 5, a5 + rest, mask=inside)
    tl.store(to + 6, a6 + rest, mask=inside)
    tl.store(to + 7, a7 + rest, mask=inside)


def _views(rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """A packed matrix's memory as words, bytes and floats."""
    return rows.words, rows.words.view(torch.uint8), rows.words.view(torch.float32)


def check_packed(rows: PackedRows) -> None:
    """Raises ValueError for a matrix that the kernels can't read."""
    if rows.words.numel() >= _MAX_WORDS or not rows.words.is_contiguous():
        raise ValueError(f"a packed matrix {list(rows.shape)} must be contiguous and smaller than 2 GiB")


def prepare(
    x: Tensor,
    norm: Norm | None,
    added: Tensor | None = None,
    masks: Tensor | None = None,
    candidates: Candidates | None = None,
    D: int = 0,
) -> tuple[Tensor, Tensor, Kept | None]:
    """The norm of x + added, and x + added, in x's type; and the D neurons that the candidates' mask keeps.

    x, added: float [1, E]; without a norm, there are only the neurons. masks: int32 [K, words].
    """
    E = x.shape[1]
    hidden, sums = torch.empty_like(x), x if added is None else torch.empty_like(x)
    kept, words, programs, logits, clusters = None, 1, 0, x, x
    if masks is not None and candidates is not None:
        kept = Kept(x.new_empty(D, dtype=torch.int32), x.new_empty((), dtype=torch.int32))
        words, (logits, clusters) = masks.shape[1], candidates
        programs = triton.cdiv(words, _LIST_TILE["WORDS_EACH"])
    pick = lambda tensor: x if tensor is None else tensor  # a placeholder that the kernel does not read
    with torch.cuda.device_of(x):
        _prepare_kernel[(programs + (norm is not None),)](
            *(x, pick(added), x if norm is None else norm.weight, sums, hidden, pick(masks), logits, clusters),
            *(x if kept is None else kept.neurons, x if kept is None else kept.total),
            *(E, D, words, logits.shape[1], 0.0 if norm is None else norm.epsilon),
            NORMS=norm is not None,
            ADDS=added is not None,
            LISTS=kept is not None,
            BLOCK_E=triton.next_power_of_2(E),
            BLOCK_W=triton.next_power_of_2(words),
            BLOCK_C=triton.next_power_of_2(logits.shape[1]),
            **_LIST_TILE,
            **pdl_options(x.device),
        )
    return hidden, sums, kept


def project_packed(
    x: Tensor,
    rows: PackedRows,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    added: Tensor | None = None,
    listing: packed_sm80.Listing | None = None,
) -> tuple[Tensor, Tensor]:
    """Products of rows [R, E] with the norm of x + added, plus bias and residual: [1, R]; and x + added.

    x, added: float [1, E]; without a norm there is nothing added. bias: float32 [R]; residual: of x's type, [1, R].
    listing: from `PackedFFNCall.listing`; the kernel writes that list, too.
    """
    if packed_sm80.is_supported(x, rows):
        weight, epsilon = (None, 0.0) if norm is None else norm
        return packed_sm80.project(x, rows, bias, residual, weight, epsilon, added, listing)
    assert listing is None and (added is None or norm is not None)
    total = x
    if norm is not None:
        x, total, _ = prepare(x, norm, added)
    (R, E), G, S = rows.shape, rows.groups, rows.words.shape[1]
    output = x.new_empty((1, R))
    with torch.cuda.device_of(x):
        _project_kernel[(triton.cdiv(R, _PROJECT_TILE["ROWS"]),)](
            *(x, *_views(rows), x if bias is None else bias, x if residual is None else residual, output),
            *(E, R, S, G, _OFFSET),
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            BLOCK_G=triton.next_power_of_2(G),
            Q=rows.group // PER_WORD,
            **_PROJECT_TILE,
            **pdl_options(x.device),
        )
    return output, total


class PackedFFNCall:
    """A layer's FFN of 4 bits for one token, dense or under the mask of a predicted cluster."""

    def __init__(self, ffn: PackedClusterFFN, dtype: torch.dtype) -> None:
        """dtype: the model's. Raises ValueError for matrices that the kernels can't read."""
        weights, self.source = ffn.weights, ffn.source
        for rows in weights[:3]:
            check_packed(rows)
        self._weights, D, device = weights, len(weights.gate.words), weights.gate.words.device
        self._options = pdl_options(device)
        self.predictor, self.masks, self._share = ffn.predictor, None, 1.0
        if ffn.masks is not None:
            self.masks, self._share = ffn.masks.view(torch.int32), popcount(ffn.masks).float().mean().item() / D
        self._spared = None if weights.spared is None or not len(weights.spared.neurons) else weights.spared
        self._P = 0 if self._spared is None else len(self._spared.neurons)
        self._H = 0 if self.predictor is None else len(self.predictor.reduce)
        # What `finish` multiplies: the bottleneck and the spared neurons' values lie one after the other.
        parts = [] if ffn.correct is None else [ffn.correct[0]]
        if self._spared is not None:
            parts.append(self._spared.down)
        self._correct = torch.cat([part.to(dtype) for part in parts]) if parts else None
        self._corrects, self._offsets = ffn.correct is not None, ffn.offsets
        self._bias = torch.zeros(weights.gate.E, device=device) if ffn.correct is None else ffn.correct[1]

    @functools.cached_property
    def _reduce(self) -> _ByteRows:
        """The bottleneck's rows for the FFN before, which predicts this layer's cluster."""
        assert self.predictor is not None
        return _byte_rows(self.predictor.reduce, self.predictor.reduce_bias)

    @property
    def width(self) -> int:
        """Neurons of the FFN."""
        return len(self._weights.gate.words)

    def empty_prediction(self, hidden: Tensor) -> Prediction:
        """Where a prediction goes: the bottleneck is followed by room for the spared neurons' values."""
        assert self.predictor is not None
        _, candidates = empty_prediction(hidden, self.predictor.reduce, self.predictor.expand, AHEAD)
        return Prediction(hidden.new_empty((1, self._H + self._P), dtype=torch.float32)[:, : self._H], candidates)

    def predict(self, hidden: Tensor) -> Prediction:
        """The prediction for this layer, from the FFN input [1, E] of its source."""
        prediction = self.empty_prediction(hidden)
        assert self.predictor is not None
        reduce, reduce_bias, expand, expand_bias = self.predictor
        reduce_hidden(hidden, reduce, reduce_bias, prediction.bottleneck, self._options)
        score_clusters(prediction, expand, expand_bias, self._options, AHEAD)
        return prediction

    def listing(self, x: Tensor, prediction: Prediction | None) -> packed_sm80.Listing | None:
        """What `project_packed` with x, of the model's type, must know to list the kept neurons; None if it can't."""
        if prediction is None or self.masks is None:
            return None
        listed = packed_sm80.empty_list(x, self._weights.gate)
        if listed is None:
            return None
        return packed_sm80.Listing(self._weights.gate, self.masks, prediction.candidates, listed)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        prediction: Prediction | None = None,
        later: "PackedFFNCall | None" = None,
        listing: packed_sm80.Listing | None = None,
    ) -> tuple[Tensor, Prediction | None]:
        """The FFN's output for its input, the norm of x [1, E]; and a later layer's prediction.

        prediction: of the cluster whose neurons are computed; None: all are. later: the layer whose clusters this
        layer's input predicts. listing: of this prediction; a product before the previous kernel wrote the list.
        """
        P, spared_inner = self._P, x.new_empty((1, self._P), dtype=torch.float32)
        joined = spared_inner
        if prediction is not None:  # the bottleneck, and the memory behind it
            joined = prediction.bottleneck.as_strided((1, self._H + P), (self._H + P, 1))
            spared_inner = joined[:, self._H :]
        coming = None if later is None else later.empty_prediction(x)
        reads: tuple[Tensor | None, ...] = (None, None, None, None)
        if later is not None and coming is not None:
            reads = *later._reduce, coming.bottleneck
        *matrices, activation, _ = self._weights
        candidates = None if prediction is None or self.masks is None else prediction.candidates
        if packed_sm80.is_ffn_supported(x, matrices[0]):
            weight, epsilon = (None, 0.0) if norm is None else norm
            mask = (None, None, None) if candidates is None else (self.masks, *candidates)
            spared = (None, None, None) if self._spared is None else self._spared[:3]
            listed = None if listing is None else listing.listed
            partial = packed_sm80.ffn(
                x, weight, epsilon, matrices, activation, mask, listed, spared, spared_inner, reads
            )
        else:
            partial = self._by_triton(x, norm, candidates, spared_inner, reads)
        inputs = joined if self._corrects else spared_inner
        return self._finish(partial, x, candidates, inputs, later, coming), coming

    def with_formula(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The output of all neurons for an input [1, E], without corrections; and the formula's, float32."""
        gate, up, down = (rows.unpacked() for rows in self._weights[:3])
        if self._spared is not None:
            for own, matrix in zip(self._spared[1:], (gate, up, down), strict=True):
                matrix[self._spared.neurons.long()] = own.float()
        x = hidden.float()
        plain = PackedFFNCall(PackedClusterFFN(self._weights), hidden.dtype)
        return plain(hidden)[0], act(x @ gate.T, self._weights.activation) * (x @ up.T) @ down

    def _by_triton(
        self,
        x: Tensor,
        norm: Norm | None,
        candidates: Candidates | None,
        spared_inner: Tensor,
        later: Sequence[Tensor | None],
    ) -> Tensor:
        """The parts of the output, float32 [parts, 1, E], by Triton's kernels; arguments as for `packed_sm80.ffn`."""
        hidden, kept = x, None
        if norm is not None or candidates is not None:
            hidden, _, kept = prepare(x, norm, None, self.masks, candidates, self.width)
        if norm is None:
            hidden = x
        gate, up, down, activation, _ = self._weights
        (D, E), G, S, P = gate.shape, gate.groups, gate.words.shape[1], self._P
        inner, parts = hidden.new_empty(D, dtype=torch.float32), _PARTS * multiprocessors(hidden.device)
        H, count = 0 if later[0] is None else len(later[0]), 0 if candidates is None else candidates.logits.shape[1]
        programs = max(1, math.ceil(_SPREAD * self._share * D / _NEURONS_TILE["ROWS"]))
        none, numbers = inner, inner.view(torch.int32)  # placeholders that the kernels do not read
        listed: tuple[Tensor, ...] = (numbers, none, numbers, numbers, numbers)
        mask_words = 1
        if kept is not None and candidates is not None and self.masks is not None:
            listed, mask_words = (self.masks, *candidates, *kept), self.masks.shape[1]
        gates, ups, downs, spared = _views(gate), _views(up), _views(down), self._spared
        partial = hidden.new_empty((parts, 1, E), dtype=torch.float32)
        with torch.cuda.device_of(hidden):
            _gate_up_kernel[(programs + P + triton.cdiv(H, _FULL_ROWS),)](
                *(hidden, gates[0], ups[0], gates[1], ups[1], gates[2], ups[2], *listed, inner),
                *((numbers, none, none) if spared is None else spared[:3]),
                *(spared_inner if P else none, *(none if each is None else each for each in later)),
                *(E, D, S, G, mask_words, count, programs, P, H, _OFFSET, EPSILON),
                EVERY=kept is None,
                ACTIVATION=activation,
                FULL_ROWS=_FULL_ROWS,
                BLOCK_G=triton.next_power_of_2(G),
                Q=gate.group // PER_WORD,
                BLOCK_C=triton.next_power_of_2(max(1, count)),
                BLOCK_E=triton.next_power_of_2(E),
                **_NEURONS_TILE,
                **self._options,
            )
            Q = down.group // PER_WORD
            block = min(triton.next_power_of_2(G), max(1, _DOWN_WORDS // Q))
            _down_kernel[(triton.cdiv(G, block), parts)](
                *(*listed[3:], inner, *downs, partial, E, D, S, G, _OFFSET),
                EVERY=kept is None,
                BLOCK_G=block,
                Q=Q,
                **_DOWN_TILE,
                **self._options,
            )
        return partial

    def _finish(
        self,
        partial: Tensor,
        hidden: Tensor,
        candidates: Candidates | None,
        inner: Tensor,
        later: "PackedFFNCall | None",
        coming: Prediction | None,
    ) -> Tensor:
        """The sum of the parts, and what is added to it; scores the clusters of a later layer."""
        delta, P = OutputDelta(offsets=self._offsets), self._P
        if self._correct is not None:
            delta = OutputDelta(inner, self._correct, self._bias, self._offsets)
        if later is None or coming is None or later.predictor is None:
            return finish(partial, hidden, candidates, delta, self._options, fresh=P)
        _, _, expand, expand_bias = later.predictor
        if coming.candidates.logits.shape[1] <= finish_programs(hidden.shape[1]) and later._H <= MAX_SCORED:
            return finish(partial, hidden, candidates, delta, self._options, later.predictor, coming, P)
        output = finish(partial, hidden, candidates, delta, self._options, fresh=P)
        score_clusters(coming, expand, expand_bias, self._options, AHEAD)
        return output
