"""Products with matrices of 4 bits a weight on a GPU, in Triton: of all rows, and a gated FFN's under a mask.

The FFN takes three kernels. The first multiplies the kept neurons' rows of gate and up with the input, and lists these
neurons with their values. The second adds their rows of down in parts. `finish`, that of `sparse_ffn.py`, adds the
parts. Neurons whose rows have 16 bits get programs of their own in the first kernel, and `finish` adds their rows of
down.

Vectors of E values are arranged: the values with number i of 8 in each word of a packed row come one after the other,
so that a program reads them in one piece. Weights become float32 without a conversion: a shift and a mask make two of
them bfloat16 numbers 128 + k.

Shape letters: see `apc.ops`; `packed.py` has those of packed rows; H rows of a later predictor's bottleneck.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.bits import popcount, popcount_words, row_bytes
from apc.ops.ffn_arguments import EPSILON, Candidates, OutputDelta, Prediction, PredictorWeights
from apc.ops.packed import PER_WORD, PackedRows
from apc.ops.predict import empty_prediction, pdl_options, reduce_hidden, score_clusters
from apc.ops.sparse_ffn import AHEAD, MAX_SCORED, activate, best, finish, finish_programs, place_of_bit

_ROWS_TILE = {"ROWS": 4, "num_warps": 4}
_DOWN_TILE = {"ROWS": 16, "STAGES": 3, "num_warps": 4}
_DOWN_WORDS = 64  # of a row, that a program of `_down_kernel` reads at most
_PARTS = 64  # parts of the neurons in `_down_kernel`
_FULL_ROWS = 4  # rows of a later bottleneck that a program reads
_MAX_WORDS = 2**29  # of a matrix: byte offsets are 32 bits


class SparedNeurons(NamedTuple):
    """Neurons whose rows have 16 bits, P of them."""

    neurons: Tensor  # int32 [P]
    gate: Tensor  # float [P, E]
    up: Tensor  # float [P, E]
    down: Tensor  # float [P, E], transposed


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


@triton.jit
def _widen(words, s: tl.constexpr):
    """The indices k of the weights with numbers 2 s and 2 s + 1 in each word, plus 128, float32."""
    pair = ((words >> (4 * s)) & 0x000F000F) | 0x43004300
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _levels(bytes_ptr, row, inside, g, G, S, E):
    """Steps and lows of groups g of some rows in the rows' units, float32 [rows, g]."""
    at = row[:, None] * (4 * S) + E // 2 + g[None, :]
    step = tl.load(bytes_ptr + at, mask=inside, other=0).to(tl.float32)
    low = tl.load(bytes_ptr + at + G, mask=inside, other=0).to(tl.int32)
    return step, ((low << 24) >> 24).to(tl.float32)


@triton.jit
def _units(units_ptr, row, read, G, S, E):
    """The units of step and low of some rows, float32."""
    at = row * S + E // 8 + (2 * G + 3) // 4
    return tl.load(units_ptr + at, mask=read, other=0.0), tl.load(units_ptr + at + 1, mask=read, other=0.0)


@triton.jit
def _row_words(words_ptr, row, read, g, j, G, S, Q: tl.constexpr):
    """Words of some rows, [rows, g, Q]."""
    at = (row * S)[:, None, None] + (g * Q)[None, :, None] + j[None, None, :]
    return tl.load(words_ptr + at, mask=read[:, None, None] & (g < G)[None, :, None], other=0)


@triton.jit
def _project_kernel(
    x_ptr,  # float [E], arranged, as all of E
    added_ptr,  # float [E], read if ADDS
    norm_ptr,  # float [E], read if NORM
    words_ptr,  # int32 [R, S], packed
    bytes_ptr,  # uint8, the same memory
    units_ptr,  # float32, the same memory
    bias_ptr,  # float32 [R], read if BIAS
    residual_ptr,  # float [R], read if RESIDUAL
    sum_ptr,  # float [E], out if ADDS: x + added
    output_ptr,  # float [R], out
    E,
    R,
    S,
    G,
    epsilon,
    ADDS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LATE: tl.constexpr,  # whether the next kernel may start only when all earlier ones have ended
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
):
    if EARLY and not LATE:
        gdc_launch_dependents()
    row, g, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_G), tl.arange(0, Q)
    read = row < R
    words = _row_words(words_ptr, row, read, g, j, G, S, Q)
    step, low = _levels(bytes_ptr, row, read[:, None] & (g < G)[None, :], g, G, S, E)
    step_unit, low_unit = _units(units_ptr, row, read, G, S, E)
    bias = tl.zeros([ROWS], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + row, mask=read, other=0.0)
    if EARLY:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    at, inside = g[:, None] * Q + j[None, :], (g < G)[:, None]
    products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    sums = tl.zeros([BLOCK_G, Q], tl.float32)
    squares = tl.zeros([BLOCK_G, Q], tl.float32)
    for s in tl.static_range(4):
        weights = _widen(words, s)
        for odd in tl.static_range(2):
            place = at + (2 * s + odd) * (E // 8)
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if ADDS:
                x += tl.load(added_ptr + place, mask=inside, other=0.0).to(tl.float32)
                x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # round where a model rounds
                if tl.program_id(0) == 0:
                    tl.store(sum_ptr + place, x.to(x_ptr.dtype.element_ty), mask=inside)
            if NORM:
                squares += x * x
                x *= tl.load(norm_ptr + place, mask=inside, other=0.0).to(tl.float32)
            sums += x
            products += weights[odd] * x[None, :, :]
    y = _group_products(products, sums, step, low, step_unit, low_unit)
    if NORM:
        y /= tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / E + epsilon)
    y += bias
    if RESIDUAL:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + row, mask=read, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, y.to(output_ptr.dtype.element_ty), mask=read)


@triton.jit
def _group_products(products, sums, step, low, step_unit, low_unit):
    """The rows' products [rows], from those with 128 + k for each word [rows, g, Q], and sums of inputs [g, Q]."""
    of_group, sum_of_group = tl.sum(products, axis=2), tl.sum(sums, axis=1)[None, :]
    steps = tl.sum(step * (of_group - 128 * sum_of_group), axis=1)
    return step_unit * steps + low_unit * tl.sum(low * sum_of_group, axis=1)


@triton.jit
def _gate_up_kernel(
    x_ptr,  # float [E], arranged, as all of E
    norm_ptr,  # float [E]
    gate_ptr,  # int32 [D, S], packed, as up
    up_ptr,
    gate_bytes_ptr,  # the same memory as uint8 and as float32
    up_bytes_ptr,
    gate_units_ptr,
    up_units_ptr,
    down_units_ptr,
    masks_ptr,  # uint32 [K, words], read unless EVERY, as values and ids
    values_ptr,  # float32 [candidates]
    ids_ptr,  # int32 [candidates]
    listed_ptr,  # float32 [3, D], out: per kept neuron its number as int32, and its value in the units of step and low
    count_ptr,  # int32 [], out: how many they are
    spared_ptr,  # int32 [P], read if P > 0, as spared_gate and spared_up
    spared_gate_ptr,  # float [P, E]
    spared_up_ptr,  # float [P, E]
    spared_inner_ptr,  # float32 [P], out if P > 0: their values, 0 for those that the mask drops
    later_ptr,  # float [H, E], read if H > 0, as later_bias
    later_bias_ptr,  # float32 [H]
    later_inner_ptr,  # float32 [H], out if H > 0
    E,
    D,
    S,
    G,
    mask_words,
    candidates,
    P,
    H,
    epsilon,
    predictor_epsilon,
    EVERY: tl.constexpr,
    KNOWN: tl.constexpr,  # whether the candidates were there before the previous kernel began
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share a word of the mask
    FULL_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        if not KNOWN:
            gdc_wait()
    cluster = 0
    if not EVERY:
        cluster = best(values_ptr, ids_ptr, candidates, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0) - mask_words * PARTS
    if program < 0:
        word_at = tl.program_id(0) // PARTS
        w = tl.arange(0, BLOCK_W)
        left = D - 32 * w  # neurons from a word on
        every = tl.where(left >= 32, -1, (1 << tl.minimum(tl.maximum(left, 0), 31)) - 1)
        mask = every
        if not EVERY:
            mask &= tl.load(masks_ptr + cluster * mask_words + w, mask=w < mask_words, other=0)
        counts = popcount_words(mask.to(tl.uint32, bitcast=True))
        before = tl.sum(tl.where(w < word_at, counts, 0), axis=0)
        own = tl.sum(tl.where(w == word_at, counts, 0), axis=0)
        word = tl.sum(tl.where(w == word_at, mask, 0), axis=0)
        part = tl.program_id(0) % PARTS
        first, last = part * own // PARTS, (part + 1) * own // PARTS
        g, j = tl.arange(0, BLOCK_G), tl.arange(0, Q)
        rank = first + tl.arange(0, ROWS)
        bits = (word + tl.zeros([ROWS], tl.int32)).to(tl.uint32, bitcast=True)
        row, read = 32 * word_at + place_of_bit(bits, rank), rank < last
        row = tl.where(read, row, 0)
        gates = _row_words(gate_ptr, row, read, g, j, G, S, Q)
        ups = _row_words(up_ptr, row, read, g, j, G, S, Q)
        if EARLY and KNOWN:
            gdc_wait()
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.sum(counts, axis=0))
        for start in range(first, last, ROWS):
            at, inside = g[:, None] * Q + j[None, :], (g < G)[:, None]
            gate_products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
            up_products = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
            sums = tl.zeros([BLOCK_G, Q], tl.float32)
            squares = tl.zeros([BLOCK_G, Q], tl.float32)
            for s in tl.static_range(4):
                gate_weights, up_weights = _widen(gates, s), _widen(ups, s)
                for odd in tl.static_range(2):
                    place = at + (2 * s + odd) * (E // 8)
                    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
                    squares += x * x
                    x *= tl.load(norm_ptr + place, mask=inside, other=0.0).to(tl.float32)
                    sums += x
                    gate_products += gate_weights[odd] * x[None, :, :]
                    up_products += up_weights[odd] * x[None, :, :]
            scale = 1 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / E + epsilon)
            levels = read[:, None] & (g < G)[None, :]
            step, low = _levels(gate_bytes_ptr, row, levels, g, G, S, E)
            step_unit, low_unit = _units(gate_units_ptr, row, read, G, S, E)
            y = activate(_group_products(gate_products, sums, step, low, step_unit, low_unit) * scale, ACTIVATION)
            step, low = _levels(up_bytes_ptr, row, levels, g, G, S, E)
            step_unit, low_unit = _units(up_units_ptr, row, read, G, S, E)
            y *= _group_products(up_products, sums, step, low, step_unit, low_unit) * scale
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)  # round where a model rounds
            step_unit, low_unit = _units(down_units_ptr, row, read, G, S, E)
            to = listed_ptr + before + start + tl.arange(0, ROWS)
            tl.store(to, row.to(tl.float32, bitcast=True), mask=read)
            tl.store(to + D, y * step_unit, mask=read)
            tl.store(to + 2 * D, y * low_unit, mask=read)
            # The next rows, if there are any.
            rank = start + ROWS + tl.arange(0, ROWS)
            read = rank < last
            row = tl.where(read, 32 * word_at + place_of_bit(bits, rank), 0)
            gates = _row_words(gate_ptr, row, read, g, j, G, S, Q)
            ups = _row_words(up_ptr, row, read, g, j, G, S, Q)
    elif program < P:
        if EARLY and KNOWN:
            gdc_wait()
        neuron = tl.load(spared_ptr + program)
        kept = 1
        if not EVERY:
            kept = (tl.load(masks_ptr + cluster * mask_words + neuron // 32) >> (neuron % 32)) & 1
        own_x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        own_scale = 1 / tl.sqrt(tl.sum(own_x * own_x, axis=0) / E + epsilon)
        own_x *= own_scale * tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        own_gate = tl.load(spared_gate_ptr + program * E + e, mask=e < E, other=0.0).to(tl.float32)
        own_up = tl.load(spared_up_ptr + program * E + e, mask=e < E, other=0.0).to(tl.float32)
        own_y = activate(tl.sum(own_gate * own_x, axis=0), ACTIVATION) * tl.sum(own_up * own_x, axis=0)
        own_y = own_y.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(spared_inner_ptr + program, tl.where(kept != 0, own_y, 0.0))
    else:
        h = (program - P) * FULL_ROWS + tl.arange(0, FULL_ROWS)
        full_read = (h < H)[:, None] & (e < E)[None, :]
        rows = tl.load(later_ptr + h[:, None] * E + e[None, :], mask=full_read, other=0.0).to(tl.float32)
        later_bias = tl.load(later_bias_ptr + h, mask=h < H, other=0.0)
        if EARLY and KNOWN:
            gdc_wait()
        later_x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        later_scale = 1 / tl.sqrt(tl.sum(later_x * later_x, axis=0) / E + epsilon)
        later_x *= later_scale * tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        inner = tl.sum(rows * later_x[None, :], axis=1) / tl.sqrt(tl.sum(later_x * later_x, axis=0) / E + predictor_epsilon) + later_bias
        tl.store(later_inner_ptr + h, inner * tl.sigmoid(inner), mask=h < H)


@triton.jit
def _down_kernel(
    listed_ptr,  # float32 [3, D], as `_gate_up_kernel` writes it
    count_ptr,  # int32 []
    down_ptr,  # int32 [D, S], packed
    bytes_ptr,  # uint8, the same memory
    partial_ptr,  # float32 [parts, E], out, arranged
    E,
    D,
    S,
    G,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    Q: tl.constexpr,
):
    if EARLY:  # in this order: `finish` reads what earlier kernels wrote before it waits
        gdc_wait()
        gdc_launch_dependents()
    g, j = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, Q)
    part, parts, count = tl.program_id(1), tl.num_programs(1), tl.load(count_ptr)
    first, last = part * count // parts, (part + 1) * count // parts
    base = tl.zeros([ROWS, BLOCK_G], tl.float32)
    a0 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a1 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a2 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a3 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a4 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a5 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a6 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    a7 = tl.zeros([ROWS, BLOCK_G, Q], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rank = start + tl.arange(0, ROWS)
        read = rank < last
        row = tl.load(listed_ptr + rank, mask=read, other=0.0).to(tl.int32, bitcast=True)
        in_steps = tl.load(listed_ptr + D + rank, mask=read, other=0.0)
        in_lows = tl.load(listed_ptr + 2 * D + rank, mask=read, other=0.0)
        words = _row_words(down_ptr, row, read, g, j, G, S, Q)
        step, low = _levels(bytes_ptr, row, read[:, None] & (g < G)[None, :], g, G, S, E)
        step *= in_steps[:, None]
        base += low * in_lows[:, None] - 128 * step
        factor = step[:, :, None]
        even, odd = _widen(words, 0)
        a0 += factor * even
        a1 += factor * odd
        even, odd = _widen(words, 1)
        a2 += factor * even
        a3 += factor * odd
        even, odd = _widen(words, 2)
        a4 += factor * even
        a5 += factor * odd
        even, odd = _widen(words, 3)
        a6 += factor * even
        a7 += factor * odd
    W = E // 8
    to = partial_ptr + part * E + g[:, None] * Q + j[None, :]
    inside, rest = (g < G)[:, None], tl.sum(base, axis=0)[:, None]
    tl.store(to, tl.sum(a0, axis=0) + rest, mask=inside)
    tl.store(to + W, tl.sum(a1, axis=0) + rest, mask=inside)
    tl.store(to + 2 * W, tl.sum(a2, axis=0) + rest, mask=inside)
    tl.store(to + 3 * W, tl.sum(a3, axis=0) + rest, mask=inside)
    tl.store(to + 4 * W, tl.sum(a4, axis=0) + rest, mask=inside)
    tl.store(to + 5 * W, tl.sum(a5, axis=0) + rest, mask=inside)
    tl.store(to + 6 * W, tl.sum(a6, axis=0) + rest, mask=inside)
    tl.store(to + 7 * W, tl.sum(a7, axis=0) + rest, mask=inside)


def arranged(vectors: Tensor) -> Tensor:
    """Vectors of natural order [..., E], arranged."""
    return vectors.unflatten(-1, (-1, PER_WORD)).mT.flatten(-2).contiguous()


def natural(vectors: Tensor) -> Tensor:
    """Arranged vectors [..., E] in natural order."""
    return vectors.unflatten(-1, (PER_WORD, -1)).mT.flatten(-2).contiguous()


def _views(rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """A packed matrix's memory as words, bytes and floats."""
    return rows.words, rows.words.view(torch.uint8), rows.words.view(torch.float32)


def check_packed(rows: PackedRows) -> None:
    """Raises ValueError for a matrix that the kernels can't read."""
    if rows.words.numel() >= _MAX_WORDS or not rows.words.is_contiguous():
        raise ValueError(f"a packed matrix {list(rows.shape)} must be contiguous and smaller than 2 GiB")


def project_packed(
    x: Tensor,
    rows: PackedRows,
    epsilon: float,
    norm: Tensor | None = None,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    late: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products of rows [R, E] with the norm of x + added, plus bias and residual, in x's type; and x + added.

    x, added: float [1, E], norm: float [E], all arranged; bias: float32 [R]; residual: float [1, R]. epsilon: of the
    norm. late: the next kernel starts when all before this one have ended.
    """
    (R, E), G, S = rows.shape, rows.groups, rows.words.shape[1]
    output, sums = x.new_empty((1, R)), x if added is None else torch.empty_like(x)
    pick = lambda tensor: x if tensor is None else tensor  # a placeholder that the kernel does not read
    with torch.cuda.device_of(x):
        _project_kernel[(triton.cdiv(R, _ROWS_TILE["ROWS"]),)](
            *(x, pick(added), pick(norm), *_views(rows), pick(bias), pick(residual), sums, output),
            *(E, R, S, G, epsilon),
            ADDS=added is not None,
            NORM=norm is not None,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            LATE=late,
            BLOCK_G=triton.next_power_of_2(G),
            Q=rows.group // PER_WORD,
            **_ROWS_TILE,
            **pdl_options(x.device),
        )
    return output, sums


class PackedFFNCall:
    """A layer's FFN of 4 bits for one token, dense or under the mask of a predicted cluster.

    Vectors of E values, also those in the predictor's and in spared matrices, are arranged here.
    """

    def __init__(self, ffn: PackedClusterFFN, norm: Tensor, epsilon: float) -> None:
        """norm: float [E], of the norm before the FFN, in natural order, with this epsilon.

        Raises ValueError for matrices that the kernels can't read, and for more than 2³¹ weights.
        """
        weights, self.source, self.masks = ffn.weights, ffn.source, ffn.masks
        for rows in weights[:3]:
            check_packed(rows)
        self._weights, self._norm, self._epsilon = weights, arranged(norm.detach()), epsilon
        self._options = pdl_options(norm.device)
        D = len(weights.gate.words)
        self.predictor = None
        if ffn.predictor is not None:
            self.predictor = ffn.predictor._replace(reduce=arranged(ffn.predictor.reduce))
        self._spared = None
        if weights.spared is not None and len(weights.spared.neurons):
            neurons, *matrices = weights.spared
            self._spared = SparedNeurons(neurons.int(), *map(arranged, matrices))
        P = 0 if self._spared is None else len(self._spared.neurons)
        # What `finish` multiplies: the bottleneck and the spared neurons' values lie one after the other.
        correct, bias = (None, None) if ffn.correct is None else ffn.correct
        parts = [] if correct is None else [arranged(correct)]
        if self._spared is not None:
            parts.append(self._spared.down)
        self._correct = torch.cat([part.to(norm.dtype) for part in parts]) if parts else None
        zeros = torch.zeros(len(norm), device=norm.device)
        self._bias = zeros if bias is None else arranged(bias.float())
        self._corrects, self._P = correct is not None, P
        self._offsets = None if ffn.offsets is None else arranged(ffn.offsets)
        self.H = 0 if self.predictor is None else len(self.predictor.reduce)
        share = 1.0
        if self.masks is not None:
            share = popcount(self.masks).float().mean().item() / D
            self.masks = self.masks.view(torch.int32)
        self._parts = max(1, min(32, round(32 * share * 1.15 / _ROWS_TILE["ROWS"] + 0.5)))

    def empty_prediction(self, hidden: Tensor) -> Prediction:
        """Where a prediction goes: the bottleneck is followed by room for the spared neurons' values."""
        assert self.predictor is not None
        _, candidates = empty_prediction(hidden, self.predictor.reduce, self.predictor.expand, AHEAD)
        return Prediction(hidden.new_empty((1, self.H + self._P), dtype=torch.float32)[:, : self.H], candidates)

    def predict(self, hidden: Tensor) -> Prediction:
        """The prediction for this layer, from the FFN input [1, E] of its source, arranged, after the norm."""
        prediction = self.empty_prediction(hidden)
        assert self.predictor is not None
        reduce, reduce_bias, expand, expand_bias = self.predictor
        reduce_hidden(hidden, reduce, reduce_bias, prediction.bottleneck, self._options)
        score_clusters(prediction, expand, expand_bias, self._options, AHEAD)
        return prediction

    def __call__(
        self, x: Tensor, prediction: Prediction | None, known: bool = False, later: "PackedFFNCall | None" = None
    ) -> tuple[Tensor, Prediction | None]:
        """The FFN's output [1, E] for an input before the norm, both arranged; and the prediction for a later layer.

        prediction: for this layer; None if it reads all neurons. known: whether it was there before the previous kernel
        began. later: the layer whose clusters this layer's input predicts.
        """
        gate, up, down, activation, _ = self._weights
        (D, E), G, S, P = gate.shape, gate.groups, gate.words.shape[1], self._P
        mask_words = triton.cdiv(D, 128) * 4
        assert row_bytes(D) == 4 * mask_words
        every = prediction is None
        device_options = self._options
        listed = x.new_empty((3, D), dtype=torch.float32)
        count = x.new_empty((), dtype=torch.int32)
        candidates = None if prediction is None else prediction.candidates
        values, ids = candidates or (listed, listed)
        joined = x.new_empty((1, P), dtype=torch.float32)
        if prediction is not None:  # the bottleneck, and the memory behind it
            joined = prediction.bottleneck.as_strided((1, self.H + P), (self.H + P, 1))
        spared_inner = joined[:, joined.shape[1] - P :]
        coming, later_predictor = None, None
        if later is not None:
            coming, later_predictor = later.empty_prediction(x), later.predictor
        H = 0 if later is None else later.H
        spared, full = self._spared, triton.next_power_of_2(E)
        tile, none = _ROWS_TILE, listed
        parts = triton.cdiv(32, tile["ROWS"]) if every else self._parts
        grid = mask_words * parts + P + triton.cdiv(H, _FULL_ROWS)
        masks = none if self.masks is None else self.masks
        gates, ups, downs = _views(gate), _views(up), _views(down)
        with torch.cuda.device_of(x):
            _gate_up_kernel[(grid,)](
                *(x, self._norm, gates[0], ups[0], gates[1], ups[1], gates[2], ups[2], downs[2]),
                *(masks, values, ids, listed, count),
                *((count, none, none) if spared is None else spared[:3]),
                spared_inner if P else none,
                *((none,) * 2 if later_predictor is None else later_predictor[:2]),
                none if coming is None else coming.bottleneck,
                *(E, D, S, G, mask_words, 0 if candidates is None else candidates.logits.shape[1], P, H),
                *(self._epsilon, EPSILON),
                EVERY=every,
                KNOWN=known or every,
                ACTIVATION=activation,
                PARTS=parts,
                FULL_ROWS=_FULL_ROWS,
                BLOCK_G=triton.next_power_of_2(G),
                Q=gate.group // PER_WORD,
                BLOCK_W=triton.next_power_of_2(mask_words),
                BLOCK_C=triton.next_power_of_2(1 if candidates is None else candidates.logits.shape[1]),
                BLOCK_E=full,
                **tile,
                **device_options,
            )
            Q = down.group // PER_WORD
            block = min(triton.next_power_of_2(G), max(1, _DOWN_WORDS // Q))
            partial = x.new_empty((_PARTS, 1, E), dtype=torch.float32)
            _down_kernel[(triton.cdiv(G, block), _PARTS)](
                *(listed, count, *downs[:2], partial, E, D, S, G),
                BLOCK_G=block,
                Q=Q,
                **_DOWN_TILE,
                **device_options,
            )
        return self._finish(partial, x, candidates, joined if self._corrects else spared_inner, later, coming), coming

    def _finish(
        self,
        partial: Tensor,
        x: Tensor,
        candidates: Candidates | None,
        inner: Tensor,
        later: "PackedFFNCall | None",
        coming: Prediction | None,
    ) -> Tensor:
        """The sum of the parts, and what is added to it; scores the clusters of a later layer."""
        delta = OutputDelta(offsets=self._offsets)
        if self._correct is not None:
            delta = OutputDelta(inner, self._correct, self._bias, self._offsets)
        if later is None or coming is None:
            return finish(partial, x, candidates, delta, self._options)
        assert later.predictor is not None
        _, _, expand, expand_bias = later.predictor
        if coming.candidates.logits.shape[1] <= finish_programs(x.shape[1]) and later.H <= MAX_SCORED:
            return finish(partial, x, candidates, delta, self._options, later.predictor, coming)
        output = finish(partial, x, candidates, delta, self._options)
        score_clusters(coming, expand, expand_bias, self._options, AHEAD)
        return output
