"""The sparse FFN on the CPU, in numba: one pass over the rows of the kept neurons.

A task takes some of the kept neurons, four at a time for one token. It multiplies their rows of gate and up with the
tokens' inputs, and adds their rows of down, times act(gate) · up, to the task's part of the output. So inputs and
output pass through the cache once for four neurons. While a task reads rows, it asks the memory for the next ones:
down's during gate and up, the next neurons' gate and up during down. The task that ends last adds the parts, always in
the same order, so a number of threads gives the same bits each time.

Vectors of 16 floats are LLVM vectors, which compile to the instructions of any CPU. A function is compiled at its first
call (some 2 s per type of weights, number of tokens and process). Importing this module imports numba, so import it
only where it is needed.

Shape letters: see `apc.ops`; m kept neurons. Addresses, strides and steps are in bytes unless they say more.
"""

import math
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from torch import Tensor

from apc.ops._numba import intrinsic, load_byte, load_int, next_number, on_threads, store_int
from apc.ops.ffn_arguments import ACTIVATIONS, FFNWeights

_LANES = 16
_VECTOR = 4 * _LANES  # bytes of a vector of floats
_STEP = 2 * _LANES  # elements of a row that a step reads
_SUMS = 4  # neurons × tokens whose sums a loop holds in registers
_SCRATCH = 1024  # bytes that a task needs for addresses and sums of these
_TASK = 128  # kept neurons that are worth a task
_TASKS = 8  # of a thread, at most
_FLOAT, _INT, _LONG, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.HalfType()
_FLOATS = ir.VectorType(_FLOAT, _LANES)
_INTS = ir.VectorType(_INT, _LANES)
# The int64 values that a call passes to its tasks, by place.
_STATE = (
    *("next", "ended", "tasks", "gate", "up", "down", "gate_stride", "up_stride", "down_stride", "x", "E"),
    *("neurons", "m", "kept", "parts", "scratch", "output", "activation"),
)
_AT = {name: 8 * place for place, name in enumerate(_STATE)}


def sparse_ffn_cpu(hidden: Tensor, weights: FFNWeights, masks: Tensor) -> Tensor:
    """Σ_i kept_i · act(gate_i · x) · (up_i · x) · down_i of each token, float32 [n, E].

    hidden: [n, E], n up to 4, of the weights' type (float32, bfloat16 or float16); masks: packed, uint8 [n, W]. Tokens
    share the rows that any of them keeps. The caller has checked shapes and types.
    """
    gate, up, down, activation = weights
    (n, E), D = hidden.shape, len(gate)
    kept = torch.empty((D, n), dtype=torch.float32)
    neurons = torch.empty(D, dtype=torch.int32)
    masks, hidden = masks.contiguous(), hidden.contiguous()
    m = _list_kept(masks.data_ptr(), n, masks.shape[1], D, neurons.data_ptr(), kept.data_ptr())
    output = torch.empty((n, E), dtype=torch.float32)
    if m == 0:
        return output.zero_()
    threads = torch.get_num_threads()
    tasks = threads * max(1, min(_TASKS, m // (threads * _TASK)))
    padded = -(-E // _STEP) * _STEP
    work = torch.empty((1 + tasks, n, padded), dtype=torch.float32)  # the inputs, and each task's part
    scratch = torch.empty((tasks, _SCRATCH), dtype=torch.uint8)
    _arrange(hidden.dtype)(hidden.data_ptr(), n, E, padded, work.data_ptr())
    at = {"gate": gate.data_ptr(), "up": up.data_ptr(), "down": down.data_ptr()}
    size = gate.element_size()
    at |= {f"{name}_stride": size * each.stride(0) for name, each in (("gate", gate), ("up", up), ("down", down))}
    at |= {"x": work.data_ptr(), "E": E, "neurons": neurons.data_ptr(), "m": m, "kept": kept.data_ptr()}
    at |= {"parts": work[1:].data_ptr(), "scratch": scratch.data_ptr(), "output": output.data_ptr()}
    state = np.array([at.get(name, 0) for name in _STATE], np.int64)
    state[_STATE.index("tasks")], state[_STATE.index("activation")] = tasks, ACTIVATIONS.index(activation)
    on_threads(_worker(hidden.dtype, n), state, threads)
    return output


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """An LLVM intrinsic that llvmlite can't name by itself, because it takes vectors."""
    known = builder.module.globals
    return known[name] if name in known else ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _at(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
    offset = _LONG(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _zeros() -> ir.Constant:
    return ir.Constant(_FLOATS, [0.0] * _LANES)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.call(_declared(builder, "llvm.fmuladd.v16f32", _FLOATS, [_FLOATS] * 3), [a, b, c])


def _prefetch(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, size: int) -> None:
    """Asks for the cache lines of `size` bytes."""
    byte = ir.IntType(8)
    for line in range(0, size, 64):
        pointer = _at(builder, builder.add(address, offset), line, byte)
        function = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        builder.call(function, [pointer, _INT(0), _INT(2), _INT(1)])


def _load_step(builder: ir.IRBuilder, dtype: torch.dtype, row: ir.Value, offset: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The 32 elements of a step as two vectors of floats; of bfloat16, the even ones and the odd ones."""
    if dtype == torch.bfloat16:  # the upper halves of floats
        pairs = builder.load(_at(builder, row, offset, _INTS), align=1)
        even = builder.shl(pairs, ir.Constant(_INTS, [16] * _LANES))
        odd = builder.and_(pairs, ir.Constant(_INTS, [0xFFFF0000] * _LANES))
        return builder.bitcast(even, _FLOATS), builder.bitcast(odd, _FLOATS)
    stored = _FLOATS if dtype == torch.float32 else ir.VectorType(_HALF, _LANES)
    size = _LANES * dtype.itemsize
    parts = [builder.load(_at(builder, builder.add(row, offset), part * size, stored), align=1) for part in range(2)]
    low, high = parts if dtype == torch.float32 else (builder.fpext(part, _FLOATS) for part in parts)
    return low, high


def _pointers(builder: ir.IRBuilder, table: ir.Value, first: int, count: int) -> list[ir.Value]:
    """Addresses number `first` and following of a table of int64."""
    return [builder.load(_at(builder, table, 8 * (first + i), _LONG), align=8) for i in range(count)]


def _operations(dtype: torch.dtype, n: int, R: int):
    """(dots, add_rows) on whole steps of R neurons' rows of this type, for n tokens.

    rows, ahead: tables of addresses int64 [3 R], of R rows of gate, of up and of down.
    """
    size = _STEP * dtype.itemsize  # of a step

    def token_start(builder, base, length, token, index):
        start = builder.add(base, builder.mul(length, _LONG(token)))
        return builder.add(start, builder.mul(index, _LONG(2 * _VECTOR)))

    @intrinsic
    def dots(context, rows, x, length, steps, sums):
        """Writes gate · x and up · x to sums, float32 [2 R, n]; asks for the rows of down."""

        def generate(context, builder, signature, args):
            rows, x, length, steps, sums = args
            read, ahead = _pointers(builder, rows, 0, 2 * R), _pointers(builder, rows, 2 * R, R)
            totals = [
                [[cgutils.alloca_once_value(builder, _zeros()) for _ in range(2)] for _ in range(n)] for _ in read
            ]
            with cgutils.for_range(builder, steps) as loop:
                offset = builder.mul(loop.index, _LONG(size))
                for row in ahead:
                    _prefetch(builder, row, offset, size)
                starts = [token_start(builder, x, length, token, loop.index) for token in range(n)]
                inputs = [
                    [builder.load(_at(builder, s, part, _FLOATS), align=4) for part in (0, _VECTOR)] for s in starts
                ]
                for row, of_row in zip(read, totals, strict=True):
                    halves = _load_step(builder, dtype, row, offset)
                    for of_token, pair in zip(of_row, inputs, strict=True):
                        for place, half, values in zip(of_token, halves, pair, strict=True):
                            builder.store(_multiply_add(builder, half, values, builder.load(place)), place)
            add = _declared(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, [_FLOAT, _FLOATS])
            for i, of_row in enumerate(totals):
                for token, of_token in enumerate(of_row):
                    both = builder.fadd(*(builder.load(place) for place in of_token))
                    value = builder.call(add, [_FLOAT(0.0), both], fastmath=("reassoc",))
                    builder.store(value, _at(builder, sums, 4 * (n * i + token), _FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    @intrinsic
    def add_rows(context, rows, factors, out, length, steps, following):
        """Adds factors float32 [R, n] times the rows of down to the outputs; asks for the following gate and up."""

        def generate(context, builder, signature, args):
            rows, factors, out, length, steps, following = args
            read, ahead = _pointers(builder, rows, 2 * R, R), _pointers(builder, following, 0, 2 * R)
            undefined, zeros = ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_INTS, [0] * _LANES)
            spread = []
            for i in range(R * n):
                factor = builder.load(_at(builder, factors, 4 * i, _FLOAT))
                first = builder.insert_element(undefined, factor, _INT(0))
                spread.append(builder.shuffle_vector(first, undefined, zeros))
            with cgutils.for_range(builder, steps) as loop:
                offset = builder.mul(loop.index, _LONG(size))
                for row in ahead:
                    _prefetch(builder, row, offset, size)
                halves = [_load_step(builder, dtype, row, offset) for row in read]
                for token in range(n):
                    start = token_start(builder, out, length, token, loop.index)
                    for part in range(2):
                        place = _at(builder, start, part * _VECTOR, _FLOATS)
                        total = builder.load(place, align=4)
                        for i, pair in enumerate(halves):
                            total = _multiply_add(builder, pair[part], spread[n * i + token], total)
                        builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return dots, add_rows


@intrinsic
def _add_floats(context, out, part, vectors):
    """Vectors of floats at out += those at part."""

    def generate(context, builder, signature, args):
        out, part, vectors = args
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, _LONG(_VECTOR))
            target, source = (_at(builder, address, offset, _FLOATS) for address in (out, part))
            builder.store(builder.fadd(builder.load(target, align=4), builder.load(source, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def _clear_floats(context, out, vectors):
    """Vectors of floats at out = 0."""

    def generate(context, builder, signature, args):
        with cgutils.for_range(builder, args[1]) as loop:
            builder.store(_zeros(), _at(builder, args[0], builder.mul(loop.index, _LONG(_VECTOR)), _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _end(context, address):
    """The int64 at this address, which is incremented; what other threads wrote before they did so can be read then."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0], 0, _LONG), _LONG(1), "acq_rel")

    return types.int64(types.intp), generate


@cache
def _element(dtype: torch.dtype):
    """A function that loads an element of this type as a float32."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, args):
            if dtype == torch.float32:
                return builder.load(_at(builder, args[0], 0, _FLOAT), align=4)
            bits = builder.load(_at(builder, args[0], 0, ir.IntType(16)), align=2)
            if dtype == torch.bfloat16:
                return builder.bitcast(builder.shl(builder.zext(bits, _INT), _INT(16)), _FLOAT)
            return builder.fpext(builder.bitcast(bits, _HALF), _FLOAT)

        return types.float32(types.intp), generate

    return load


_load_float = _element(torch.float32)


@intrinsic
def _store_float(context, address, value):
    """Stores a float32."""

    def generate(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0], 0, _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@intrinsic
def _load_int32(context, address):
    """Loads an int32 as an int64."""

    def generate(context, builder, signature, args):
        return builder.sext(builder.load(_at(builder, args[0], 0, _INT), align=4), _LONG)

    return types.int64(types.intp), generate


@intrinsic
def _store_int32(context, address, value):
    """Stores the low 32 bits of an int64."""

    def generate(context, builder, signature, args):
        builder.store(builder.trunc(args[1], _INT), _at(builder, args[0], 0, _INT), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@njit(nogil=True)
def _list_kept(masks, n, W, D, neurons, kept):
    """The number m of neurons that any token keeps. Writes them to int32 [m], and who keeps them to float32 [m, n]."""
    count = 0
    for byte in range((D + 7) // 8):
        union = 0
        for token in range(n):
            union |= load_byte(masks + token * W + byte)
        for bit in range(8 if union else 0):
            if union >> bit & 1 and 8 * byte + bit < D:
                _store_int32(neurons + 4 * count, 8 * byte + bit)
                for token in range(n):
                    keeps = load_byte(masks + token * W + byte) >> bit & 1
                    _store_float(kept + 4 * (n * count + token), np.float32(keeps))
                count += 1
    return count


@njit(nogil=True)
def _place(e, E, evens_first):
    """Where element e of a row of E is in an arranged row."""
    within = e % _STEP
    if not evens_first or e >= E // _STEP * _STEP:
        return e
    return e - within + within // 2 + within % 2 * _LANES


@cache
def _arrange(dtype: torch.dtype):
    """A function that writes inputs [n, E] of this type as float32 [n, padded], in the order of `_load_step`."""
    load, size, evens_first = _element(dtype), dtype.itemsize, dtype == torch.bfloat16

    @njit(nogil=True)
    def arrange(hidden, n, E, padded, out):
        for token in range(n):
            for e in range(E):
                value = load(hidden + size * (token * E + e))
                _store_float(out + 4 * (token * padded + _place(e, E, evens_first)), value)

    return arrange


@njit(nogil=True)
def _activate(x, activation):
    """The activation with this number in `ACTIVATIONS`."""
    x = float(x)
    if activation == 0:
        return x / (1.0 + math.exp(-x))
    if activation == 1:
        return 0.5 * x * (1.0 + math.erf(x * 0.7071067811865476))
    if activation == 2:
        return 0.5 * x * (1.0 + math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x if x > 0 or x != x else 0.0


@cache
def _worker(dtype: torch.dtype, n: int):
    """A C function that takes tasks from a state until none is left, for weights of this type and n tokens."""
    R = max(1, _SUMS // n)
    (dots, add_rows), load, size = _operations(dtype, n, R), _element(dtype), dtype.itemsize
    evens_first = dtype == torch.bfloat16
    next_at, ended_at, tasks_at, gate_at, up_at, down_at = map(
        _AT.get, ("next", "ended", "tasks", "gate", "up", "down")
    )
    gate_stride_at, up_stride_at, down_stride_at = map(_AT.get, ("gate_stride", "up_stride", "down_stride"))
    x_at, E_at, neurons_at, m_at, kept_at = map(_AT.get, ("x", "E", "neurons", "m", "kept"))
    parts_at, scratch_at, output_at, activation_at = map(_AT.get, ("parts", "scratch", "output", "activation"))

    @njit(nogil=True)
    def point(table, state, first, last):
        """Writes the addresses of the rows of R kept neurons from `first` on; beyond `last` those of the last one."""
        for i in range(R):
            neuron = _load_int32(load_int(state + neurons_at) + 4 * min(first + i, last - 1))
            store_int(table + 8 * i, load_int(state + gate_at) + neuron * load_int(state + gate_stride_at))
            store_int(table + 8 * (R + i), load_int(state + up_at) + neuron * load_int(state + up_stride_at))
            store_int(table + 8 * (2 * R + i), load_int(state + down_at) + neuron * load_int(state + down_stride_at))

    @njit(nogil=True)
    def task(state, first, last, out, scratch):
        """Writes the part of the output of the kept neurons `first` to `last` to out, float32 [n, padded]."""
        activation, x, E = load_int(state + activation_at), load_int(state + x_at), load_int(state + E_at)
        kept = load_int(state + kept_at)
        steps, row = E // _STEP, 4 * ((E + _STEP - 1) // _STEP * _STEP)
        rows, following, sums = scratch, scratch + 24 * R, scratch + 48 * R
        factors = sums + 8 * R * n
        _clear_floats(out, n * row // _VECTOR)
        point(rows, state, first, last)
        for start in range(first, last, R):
            point(following, state, start + R, last)
            dots(rows, x, row, steps, sums)
            for i in range(R):
                gates, ups = load_int(rows + 8 * i), load_int(rows + 8 * (R + i))
                for token in range(n):
                    g, u = _load_float(sums + 4 * (n * i + token)), _load_float(sums + 4 * (n * (R + i) + token))
                    for e in range(steps * _STEP, E):
                        value = _load_float(x + token * row + 4 * e)
                        g += load(gates + size * e) * value
                        u += load(ups + size * e) * value
                    keeps = start + i < last and _load_float(kept + 4 * ((start + i) * n + token)) > 0
                    factor = np.float32(_activate(g, activation) * u) if keeps else np.float32(0)
                    _store_float(factors + 4 * (n * i + token), factor)
            add_rows(rows, factors, out, row, steps, following)
            for i in range(R):
                downs = load_int(rows + 8 * (2 * R + i))
                for token in range(n):
                    factor = _load_float(factors + 4 * (n * i + token))
                    for e in range(steps * _STEP, E):
                        place = out + token * row + 4 * e
                        _store_float(place, _load_float(place) + factor * load(downs + size * e))
            rows, following = following, rows

    @cfunc(types.void(types.intp))
    def work(state):
        tasks, m, E = load_int(state + tasks_at), load_int(state + m_at), load_int(state + E_at)
        parts, scratch, output = (
            load_int(state + parts_at),
            load_int(state + scratch_at),
            load_int(state + output_at),
        )
        padded = (E + _STEP - 1) // _STEP * _STEP
        number = next_number(state + next_at)
        while number < tasks:
            first, last = m * number // tasks, m * (number + 1) // tasks
            task(state, first, last, parts + 4 * n * padded * number, scratch + _SCRATCH * number)
            if _end(state + ended_at) == tasks - 1:
                for other in range(1, tasks):
                    _add_floats(parts, parts + 4 * n * padded * other, n * padded // _LANES)
                for token in range(n):
                    for e in range(E):
                        value = _load_float(parts + 4 * (token * padded + _place(e, E, evens_first)))
                        _store_float(output + 4 * (token * E + e), value)
            number = next_number(state + next_at)

    return work
