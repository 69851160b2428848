"""The staged FFN on the CPU, in numba: each neuron decides alone which of its rows are read.

A task takes some ranges of 128 neurons. For a range it adds up the copy's levels at the token's largest inputs, turns
the sums into scores, and lists the neurons that reach the first threshold. It multiplies their rows of gate with the
inputs and keeps the neurons whose activations are large enough, does the same with up, and adds the rows of down of the
neurons that are left. Four rows are read together; meanwhile the memory is asked for the next four. The task that ends
last adds the parts in a fixed order, so a number of threads gives the same bits each time.

A function is compiled at its first call. Importing this module imports numba, so import it only where it is needed.

Shape letters: see `apc.ops`; r rank, padded to whole vectors; `padded` E, padded to whole steps. Addresses, strides and
lengths are in bytes unless they say more.
"""

import math
import threading
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numba import cfunc, njit, types
from torch import Tensor

from apc.ops._numba import load_int, next_number, store_int, task_start
from apc.ops._program import Program
from apc.ops._vectors import (
    LANES,
    LEVELS_AHEAD,
    STEP,
    activate,
    add_floats,
    add_levels,
    add_rows,
    add_scaled,
    arrange,
    arranged_at,
    clear_floats,
    dot_floats,
    dots,
    element,
    end,
    load_float,
    load_int32,
    score_range,
    store_element,
    store_float,
    store_int32,
)
from apc.ops.bits import unpack
from apc.ops.ffn_arguments import ACTIVATIONS, EPSILON, GROUP, FFNWeights, SpacedCopy, Stages
from apc.ops.rounded import RoundedFFN, addresses, stored_ffn

RANGE = 128  # neurons whose scores are computed together
_R = 4  # rows that are read together
_TASKS = 8  # of a thread, at most
_TINY = float(torch.finfo(torch.float32).tiny)
# Places in a task's scratch: sums and scores of a range, what a copy of up adds, the neurons that are left, their
# activations, addresses of rows, and sums of these.
_SUMS, _SCORES, _UPS, _LEFT, _VALUES, _ROWS, _DOTS, _SCRATCH = 0, 1024, 1536, 2048, 2560, 3072, 3072 + 16 * _R, 3584
# The int64 values that a call passes to its tasks, by place: addresses, then numbers.
_STATE = (
    *(
        "next",
        "ended",
        "hidden",
        "output",
        "x",
        "gate",
        "up",
        "down",
        "levels",
        "spacings",
        "inputs",
        "values",
        "curve",
        "norms",
    ),
    *("limits", "sizes", "before", "given", "reduce_bias", "gate_b", "up_b", "down_a", "after", "parts", "scratch"),
    *("tasks", "ranges", "E", "D", "gate_stride", "up_stride", "down_stride", "count", "rank", "inner", "activation"),
    *("gate_scales", "up_scales", "down_scales", "columns"),
)
_AT = {name: 8 * index for index, name in enumerate(_STATE)}


class StagedCPU:
    """One layer's staged FFN: what a call needs besides the weights, laid out for the kernel."""

    def __init__(self, stages: Stages, weights: FFNWeights) -> None:
        copy, (D, E), dtype = stages.copy, weights.gate.shape, weights.gate.dtype
        spaced = isinstance(copy, SpacedCopy)
        projections = ("gate", "up") if isinstance(copy, SpacedCopy) else copy.projections
        lowest = 0.5 - 2 ** (len(copy.planes) - 1)
        kind = len(projections), "up" in projections, lowest if spaced else 0.0
        ranges, self._padded = -(-D // RANGE), -(-E // STEP) * STEP
        order = torch.tensor([arranged_at(e, E, dtype == torch.bfloat16) for e in range(E)])
        low_rank, correction = stages.low_rank, stages.correction
        self._rank = 0 if low_rank is None else -(-len(low_rank.gate[0]) // LANES) * LANES

        def by_neuron(value: Tensor, fill: float = 0.0) -> Tensor:
            return F.pad(value.float(), (0, ranges * RANGE - D), value=fill)

        def arranged(*rows: Tensor) -> Tensor:
            out = torch.zeros(sum(map(len, rows)), self._padded)
            out[:, order] = torch.cat([torch.zeros(0, E), *(each.float() for each in rows)])
            return out

        def grown(a: Tensor) -> Tensor:
            return F.pad(a.float(), (0, 0, 0, self._rank - len(a)))

        before, after = [], []
        tensors: dict[str, Tensor] = {}
        if low_rank is not None:
            before += [grown(low_rank.gate[0]), grown(low_rank.up[0])]
            after.append(grown(low_rank.down[1].T))
            tensors = {f"{name}_b": grown(pair[1].T).T for name, pair in (("gate", low_rank.gate), ("up", low_rank.up))}
            tensors["down_a"] = grown(low_rank.down[0]).T
        if correction is not None:
            before.append(correction.reduce)
            after += [correction.correct, correction.correct_bias[None]]
            tensors["reduce_bias"] = correction.reduce_bias.float()
        inner = 0 if correction is None else len(correction.reduce)
        limits = [_half_exp(each) for each in stages.thresholds.tolist()]
        if isinstance(copy, SpacedCopy):
            tensors["spacings"] = _spacings_laid_out(copy.spacings, ranges)
        else:
            scale, slope, power, bias = copy.curve
            tensors["curve"] = torch.cat(
                [by_neuron(each) for each in (scale, slope, power)] + [by_neuron(bias, -math.inf)[None]]
            )
            limits[:2] = stages.thresholds[:2].tolist()
        least = -math.inf if copy.least is None else float(copy.least)
        tensors |= {
            "levels": _laid_out(copy.planes, copy.norms is not None, E, D),
            "norms": by_neuron(stages.norms),
            # The least of each stage (a curve's scores are compared as logarithms of squares), the least size of an
            # input, the lowest level.
            "limits": torch.tensor([*limits, least, lowest]),
            "sizes": torch.zeros(E) if copy.norms is None else copy.norms.float(),
            "before": arranged(*before),
            "after": arranged(*after),
        }
        self.tensors = {name: value.contiguous() for name, value in tensors.items()}
        self.numbers = {"E": E, "D": D, "ranges": ranges, "rank": self._rank, "inner": inner}
        self.numbers["activation"] = ACTIVATIONS.index(weights.activation)
        self.dtype, self.kind = dtype, kind
        rows_dtype = None if stored_ffn(weights) is None else torch.int8
        self._call, self._lock = StagedCall(self, rows_dtype), threading.Lock()

    def __call__(self, hidden: Tensor, weights: FFNWeights) -> Tensor:
        """The outputs [n, E] for hidden [n, E], of the weights' type, one token after the other."""
        threads, hidden = torch.get_num_threads(), hidden.contiguous()
        output = torch.empty_like(hidden)
        with self._lock:  # calls from several of Python's threads share the buffers
            self._call.prepare(weights, threads)
            for x, y in zip(hidden, output, strict=True):
                self._call.point_at(x, y)
                self._call.program.run(threads)
        return output


class StagedCall:
    """A layer's call for one token, with buffers of its own: the functions of `program` compute it."""

    def __init__(self, staged: StagedCPU, rows_dtype: torch.dtype | None = None) -> None:
        """rows_dtype: that of the weights, if not the model's; int8 rows have scales."""
        self._functions = _begin(staged.dtype), _worker(staged.dtype, rows_dtype or staged.dtype, *staged.kind)
        E, rank, inner = (staged.numbers[name] for name in ("E", "rank", "inner"))
        self._length = -(-E // STEP) * STEP
        self._tensors = {
            # What `before` gives for the token, the factor of the correction's bias, what is added to a copy's sums.
            "given": torch.ones(2 * rank + inner + 2),
            "x": torch.zeros(self._length),
            "inputs": torch.zeros(E + LEVELS_AHEAD, dtype=torch.int32),
            "values": torch.zeros(E),
        }
        self._staged, self._threads = staged, 0
        self._weights: FFNWeights | RoundedFFN | None = None  # those of the last call
        self.state, self.program = np.zeros(len(_STATE), np.int64), Program()
        self._set(**staged.numbers)
        self._set(**{name: value.data_ptr() for name, value in (staged.tensors | self._tensors).items()})
        self.add_to(self.program)

    def add_to(self, program: Program) -> None:
        """Appends the functions to a program."""
        begin, worker = self._functions
        program.add(begin, self.state)
        program.add(worker, self.state, on_all=True)

    def point_at(self, hidden: Tensor, output: Tensor) -> None:
        """Sets where the token's input and output are, [E] of the weights' type."""
        self._set(hidden=hidden.data_ptr(), output=output.data_ptr())

    def prepare(self, weights: FFNWeights | RoundedFFN, threads: int) -> None:
        """Sets the weights and the number of threads for the calls to come."""
        if weights is not self._weights:
            self._weights = weights
            self._set(**addresses(weights))
        if threads != self._threads:
            self._threads, tasks = threads, min(self._staged.numbers["ranges"], threads * _TASKS)
            parts = self._tensors["parts"] = torch.zeros(tasks, self._length + self._staged.numbers["rank"])
            scratch = self._tensors["scratch"] = torch.zeros(tasks, _SCRATCH, dtype=torch.uint8)
            self._set(tasks=tasks, parts=parts.data_ptr(), scratch=scratch.data_ptr())

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self.state[_AT[name] // 8] = value


def _half_exp(threshold: float) -> float:
    """The importance whose squared logarithm is the threshold; of the smallest importances 0."""
    return math.exp(threshold / 2) if threshold > 2 * math.log(_TINY) else 0.0


def _laid_out(planes: Tensor, by_input: bool, E: int, D: int) -> Tensor:
    """The copy's indices of levels, uint8 [ranges, E, P, RANGE / 2]: side by side what a range reads of an input."""
    P, index = planes.shape[1], torch.zeros((), dtype=torch.uint8)
    for bit, plane in enumerate(planes):
        each = unpack(plane, D) if by_input else unpack(plane, E).transpose(-1, -2)
        index = index + each.to(torch.uint8) * 2**bit  # uint8 [P, E, D]
    index = F.pad(index, (0, -D % RANGE)).view(P, E, -1, RANGE // (2 * LANES), 2, LANES)
    both = index[..., 0, :] + 16 * index[..., 1, :]
    return both.flatten(-2).permute(2, 1, 0, 3)


def _spacings_laid_out(spacings: Tensor, ranges: int) -> Tensor:
    """The spacings bfloat16 [P, E, G] by range, [ranges, E, P, RANGE / GROUP]."""
    padded = F.pad(spacings, (0, ranges * RANGE // GROUP - spacings.shape[-1]))
    return padded.unflatten(-1, (ranges, -1)).permute(2, 1, 0, 3)


@cache
def _begin(dtype: torch.dtype):
    """A function that arranges a token's inputs, chooses the copy's, and multiplies the rows of `before` with them."""
    load, size, arrange_inputs = element(dtype), dtype.itemsize, arrange(dtype)
    hidden_at, x_at, inputs_at, values_at, sizes_at, limits_at = (
        _AT[name] for name in ("hidden", "x", "inputs", "values", "sizes", "limits")
    )
    before_at, given_at, bias_at, count_at, E_at, rank_at, inner_at = (
        _AT[name] for name in ("before", "given", "reduce_bias", "count", "E", "rank", "inner")
    )

    @cfunc(types.void(types.intp))
    def begin(state):
        hidden = load_int(state + hidden_at)
        x, E, given = load_int(state + x_at), load_int(state + E_at), load_int(state + given_at)
        padded, rank, inner = (E + STEP - 1) // STEP * STEP, load_int(state + rank_at), load_int(state + inner_at)
        arrange_inputs(hidden, 1, E, padded, x)
        least, sizes = load_float(load_int(state + limits_at) + 12), load_int(state + sizes_at)
        inputs, values = load_int(state + inputs_at), load_int(state + values_at)
        count, total = 0, np.float32(0)
        for e in range(E):
            value = load(hidden + size * e)
            if abs(value) * load_float(sizes + 4 * e) >= least:
                store_int32(inputs + 4 * count, e)
                store_float(values + 4 * count, value)
                total += value
                count += 1
        store_int(state + count_at, count)
        vectors, before = padded // LANES, load_int(state + before_at)
        for row in range(2 * rank + inner):
            store_float(given + 4 * row, dot_floats(before + 4 * padded * row, x, vectors))
        scale = 1.0 / math.sqrt(dot_floats(x, x, vectors) / E + EPSILON)
        for row in range(inner):
            place = given + 4 * (2 * rank + row)
            y = load_float(place) * scale + load_float(load_int(state + bias_at) + 4 * row)
            store_float(place, np.float32(y / (1.0 + math.exp(-y))))
        store_float(given + 4 * (2 * rank + inner + 1), total * load_float(load_int(state + limits_at) + 16))

    return begin


@cache
def _worker(dtype: torch.dtype, rows_dtype: torch.dtype, P: int, copies_up: bool, lowest: float):
    """A C function that takes tasks from a state until none is left. lowest: a `SpacedCopy`'s lowest level, or 0."""
    multiply, add = dots(rows_dtype, 1, _R, _R), add_rows(rows_dtype, 1, _R, _R)
    load, size, scaled = element(rows_dtype), rows_dtype.itemsize, rows_dtype == torch.int8
    store, dtype_size = store_element(dtype), dtype.itemsize
    spaced = lowest != 0
    levels = add_levels(P, RANGE, GROUP, lowest) if spaced else add_levels(P, RANGE)
    score = score_range(P, RANGE, copies_up)
    evens_first, read_bytes = dtype == torch.bfloat16, P * RANGE // 2
    at = _AT
    next_at, ended_at, tasks_at, ranges_at, E_at, D_at = (
        at[name] for name in ("next", "ended", "tasks", "ranges", "E", "D")
    )
    spacings_at, x_at, levels_at, inputs_at, values_at, curve_at, norms_at, limits_at, given_at = (
        at[name] for name in ("spacings", "x", "levels", "inputs", "values", "curve", "norms", "limits", "given")
    )
    gate_scales_at, up_scales_at, down_scales_at = (at[f"{name}_scales"] for name in ("gate", "up", "down"))
    columns_at = at["columns"]
    gate_at, up_at, down_at, gate_b_at, up_b_at, down_a_at = (
        at[name] for name in ("gate", "up", "down", "gate_b", "up_b", "down_a")
    )
    gate_stride_at, up_stride_at, down_stride_at = (at[f"{name}_stride"] for name in ("gate", "up", "down"))
    after_at, parts_at, scratch_at, output_at, count_at, rank_at, inner_at, activation_at = (
        at[name] for name in ("after", "parts", "scratch", "output", "count", "rank", "inner", "activation")
    )

    @njit(nogil=True)
    def point(table, left, first, count, rows, stride):
        """Writes the addresses of the rows of R neurons from `first` on; beyond `count` those of the last one."""
        for i in range(_R):
            store_int(table + 8 * i, rows + load_int32(left + 4 * min(first + i, count - 1)) * stride)

    @njit(nogil=True)
    def product(state, table, i, sums, b, a, rank, scale):
        """The product of row i of the table with the inputs; its whole steps are in sums. scale: an address or 0."""
        x, E = load_int(state + x_at), load_int(state + E_at)
        total, row = load_float(sums + 4 * i), load_int(table + 8 * i)
        for e in range(E // STEP * STEP, E):
            total += load(row + size * e) * load_float(x + 4 * e)
        if scaled:
            total *= load_float(scale)
        return total if rank == 0 else total + dot_floats(b, a, rank // LANES)

    @njit(nogil=True)
    def reaches(size, least):
        """Whether an importance is at least that; a least of 0 also lets NaN pass."""
        return size >= least or (least == 0 and size != size)

    @njit(nogil=True)
    def nominate_by_products(state, first, scratch):
        """`nominate` for sums that are the copy's outputs of gate and up."""
        norms, activation = load_int(state + norms_at) + 4 * first, load_int(state + activation_at)
        least, m = load_float(load_int(state + limits_at)), 0
        for i in range(min(RANGE, load_int(state + D_at) - first)):
            up = load_float(scratch + _SUMS + 4 * (RANGE + i))
            size = abs(activate(load_float(scratch + _SUMS + 4 * i), activation) * up) * load_float(norms + 4 * i)
            store_float(scratch + _UPS + 4 * i, up)
            if reaches(size, least):
                store_int32(scratch + _LEFT + 4 * m, first + i)
                m += 1
        return m

    @njit(nogil=True)
    def nominate(state, number, scratch):
        """Lists the neurons of a range that reach the first threshold, and returns how many they are."""
        E, D, count = load_int(state + E_at), load_int(state + D_at), load_int(state + count_at)
        rank, inner = load_int(state + rank_at), load_int(state + inner_at)
        wide, first = 4 * RANGE * load_int(state + ranges_at), RANGE * number
        base = load_int(state + levels_at) + number * E * read_bytes
        spacings = load_int(state + spacings_at) + number * E * 2 * P * RANGE // GROUP
        levels(base, spacings, load_int(state + inputs_at), load_int(state + values_at), count, scratch + _SUMS)
        if spaced:
            return nominate_by_products(state, first, scratch)
        shift = load_float(load_int(state + given_at) + 4 * (2 * rank + inner + 1))
        curve = load_int(state + curve_at) + 4 * first
        score(scratch + _SUMS, curve, wide, shift, scratch + _SCORES, scratch + _UPS)
        least, m = load_float(load_int(state + limits_at)), 0
        for i in range(min(RANGE, D - first)):
            if load_float(scratch + _SCORES + 4 * i) >= least:
                store_int32(scratch + _LEFT + 4 * m, first + i)
                m += 1
        return m

    @njit(nogil=True)
    def gate_stage(state, first, m, scratch):
        """Keeps the listed neurons with a large activation, writes it to the values, and returns how many they are."""
        x, E, rank = load_int(state + x_at), load_int(state + E_at), load_int(state + rank_at)
        rows, stride, b = load_int(state + gate_at), load_int(state + gate_stride_at), load_int(state + gate_b_at)
        given, norms = load_int(state + given_at), load_int(state + norms_at)
        activation, least = load_int(state + activation_at), load_float(load_int(state + limits_at) + 4)
        scales = load_int(state + gate_scales_at)
        table, ahead, left, kept = scratch + _ROWS, scratch + _ROWS + 8 * _R, scratch + _LEFT, 0
        point(table, left, 0, m, rows, stride)
        for start in range(0, m, _R):
            point(ahead, left, start + _R, m, rows, stride)
            multiply(table, ahead, x, 4 * E, E // STEP, scratch + _DOTS)
            for i in range(min(_R, m - start)):
                neuron = load_int32(left + 4 * (start + i))
                value = activate(
                    product(state, table, i, scratch + _DOTS, b + 4 * rank * neuron, given, rank, scales + 4 * neuron),
                    activation,
                )
                size = abs(value) * load_float(norms + 4 * neuron)
                up = load_float(scratch + _UPS + 4 * (neuron - first)) if copies_up else 0.0
                if spaced:
                    keeps = reaches(abs(up) * size, least)
                else:
                    size = size if size > _TINY else _TINY  # also of NaN
                    keeps = 2.0 * math.log(size) + up >= least
                if keeps:
                    store_int32(left + 4 * kept, neuron)
                    store_float(scratch + _VALUES + 4 * kept, np.float32(value))
                    kept += 1
            table, ahead = ahead, table
        return kept

    @njit(nogil=True)
    def up_stage(state, m, scratch):
        """Keeps the listed neurons with a large importance, writes their values, and returns how many they are."""
        x, E, rank = load_int(state + x_at), load_int(state + E_at), load_int(state + rank_at)
        rows, stride, b = load_int(state + up_at), load_int(state + up_stride_at), load_int(state + up_b_at)
        given, norms = load_int(state + given_at) + 4 * rank, load_int(state + norms_at)
        least, scales = load_float(load_int(state + limits_at) + 8), load_int(state + up_scales_at)
        table, ahead, left, kept = scratch + _ROWS, scratch + _ROWS + 8 * _R, scratch + _LEFT, 0
        point(table, left, 0, m, rows, stride)
        for start in range(0, m, _R):
            point(ahead, left, start + _R, m, rows, stride)
            multiply(table, ahead, x, 4 * E, E // STEP, scratch + _DOTS)
            for i in range(min(_R, m - start)):
                neuron = load_int32(left + 4 * (start + i))
                value = product(
                    state, table, i, scratch + _DOTS, b + 4 * rank * neuron, given, rank, scales + 4 * neuron
                )
                value *= load_float(scratch + _VALUES + 4 * (start + i))
                size = abs(value) * load_float(norms + 4 * neuron)
                if reaches(size, least):
                    store_int32(left + 4 * kept, neuron)
                    store_float(scratch + _VALUES + 4 * kept, np.float32(value))
                    kept += 1
            table, ahead = ahead, table
        return kept

    @njit(nogil=True)
    def down_stage(state, m, scratch, out):
        """Adds the listed neurons' rows of down, times their values, to out, float32 [padded + r]."""
        E, rank = load_int(state + E_at), load_int(state + rank_at)
        rows, stride, a = load_int(state + down_at), load_int(state + down_stride_at), load_int(state + down_a_at)
        padded = (E + STEP - 1) // STEP * STEP
        table, ahead, left = scratch + _ROWS, scratch + _ROWS + 8 * _R, scratch + _LEFT
        point(table, left, 0, m, rows, stride)
        for start in range(0, m, _R):
            point(ahead, left, start + _R, m, rows, stride)
            for i in range(m, start + _R):
                store_float(scratch + _VALUES + 4 * i, np.float32(0))
            values = scratch + _VALUES + 4 * start
            factors = values
            if scaled:
                factors = scratch + _DOTS
                for i in range(_R):
                    neuron = load_int32(left + 4 * min(start + i, m - 1))
                    scale = load_float(load_int(state + down_scales_at) + 4 * neuron)
                    store_float(factors + 4 * i, load_float(values + 4 * i) * scale)
            add(table, ahead, factors, out, 4 * padded, E // STEP)
            for i in range(min(_R, m - start)):
                factor, row = load_float(factors + 4 * i), load_int(table + 8 * i)
                for e in range(E // STEP * STEP, E):
                    store_float(out + 4 * e, load_float(out + 4 * e) + factor * load(row + size * e))
                if rank:
                    neuron = load_int32(left + 4 * (start + i))
                    add_scaled(out + 4 * padded, a + 4 * rank * neuron, load_float(values + 4 * i), rank // LANES)
            table, ahead = ahead, table

    @njit(nogil=True)
    def finish(state):
        """Adds the parts, low-rank update and correction, and writes the output [E] in the weights' type."""
        E, rank, inner = load_int(state + E_at), load_int(state + rank_at), load_int(state + inner_at)
        padded, parts, output = (E + STEP - 1) // STEP * STEP, load_int(state + parts_at), load_int(state + output_at)
        for task in range(1, load_int(state + tasks_at)):
            add_floats(parts, parts + 4 * (padded + rank) * task, (padded + rank) // LANES)
        if scaled:
            for place in range(0, 4 * E, 4):  # both are in the order of the rows' elements
                store_float(parts + place, load_float(parts + place) * load_float(load_int(state + columns_at) + place))
        after, given = load_int(state + after_at), load_int(state + given_at) + 8 * rank
        for row in range(rank):
            add_scaled(parts, after + 4 * padded * row, load_float(parts + 4 * (padded + row)), padded // LANES)
        for row in range(inner + 1 if inner else 0):
            factor = load_float(given + 4 * row)
            add_scaled(parts, after + 4 * padded * (rank + row), factor, padded // LANES)
        for e in range(E):
            store(output + dtype_size * e, load_float(parts + 4 * arranged_at(e, E, evens_first)))

    @cfunc(types.void(types.intp))
    def work(state):
        tasks, ranges = load_int(state + tasks_at), load_int(state + ranges_at)
        E, rank = load_int(state + E_at), load_int(state + rank_at)
        length = (E + STEP - 1) // STEP * STEP + rank
        task = next_number(state + next_at)
        while task < tasks:
            out, scratch = (
                load_int(state + parts_at) + 4 * length * task,
                load_int(state + scratch_at) + _SCRATCH * task,
            )
            clear_floats(out, length // LANES)
            for number in range(task_start(ranges, task, tasks), task_start(ranges, task + 1, tasks)):
                m = nominate(state, number, scratch)
                m = gate_stage(state, RANGE * number, m, scratch) if m else 0
                m = up_stage(state, m, scratch) if m else 0
                if m:
                    down_stage(state, m, scratch, out)
            if end(state + ended_at) == tasks - 1:
                finish(state)
            task = next_number(state + next_at)

    return work
