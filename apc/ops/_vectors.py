"""Vectors of 16 floats in numba, of which the FFN kernels on the CPU are made.

They are LLVM vectors, which compile to the instructions of any CPU. Importing this module imports numba.

Addresses, lengths and steps are in bytes unless they say more.
"""

import math
from functools import cache

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from apc.ops._numba import intrinsic

LANES = 16
VECTOR = 4 * LANES  # bytes of a vector of floats
STEP = 2 * LANES  # elements of a row that a step reads
LEVELS_AHEAD = 32  # inputs whose levels are on their way while those of another are added
_FLOAT, _INT, _LONG, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.HalfType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """An LLVM intrinsic that llvmlite can't name by itself, because it takes vectors."""
    known = builder.module.globals
    return known[name] if name in known else ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _at(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
    offset = _LONG(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _zeros() -> ir.Constant:
    return ir.Constant(_FLOATS, [0.0] * LANES)


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
    """The 32 elements of a step as two vectors of floats; of bfloat16, the even ones and the odd ones.

    Rows of int8 are stored in that order where a model's values are bfloat16 (`rounded_rows`).
    """
    if dtype == torch.int8:
        stored = ir.VectorType(ir.IntType(8), LANES)
        low, high = (builder.load(_at(builder, builder.add(row, offset), LANES * i, stored), align=1) for i in range(2))
        return tuple(builder.sitofp(builder.sext(part, _INTS), _FLOATS) for part in (low, high))
    if dtype == torch.bfloat16:  # the upper halves of floats
        pairs = builder.load(_at(builder, row, offset, _INTS), align=1)
        even = builder.shl(pairs, ir.Constant(_INTS, [16] * LANES))
        odd = builder.and_(pairs, ir.Constant(_INTS, [0xFFFF0000] * LANES))
        return builder.bitcast(even, _FLOATS), builder.bitcast(odd, _FLOATS)
    stored = _FLOATS if dtype == torch.float32 else ir.VectorType(_HALF, LANES)
    size = LANES * dtype.itemsize
    parts = [builder.load(_at(builder, builder.add(row, offset), part * size, stored), align=1) for part in range(2)]
    low, high = parts if dtype == torch.float32 else (builder.fpext(part, _FLOATS) for part in parts)
    return low, high


def _pointers(builder: ir.IRBuilder, table: ir.Value, count: int) -> list[ir.Value]:
    """The first addresses of a table of int64."""
    return [builder.load(_at(builder, table, 8 * i, _LONG), align=8) for i in range(count)]


def _sum(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of a vector's floats."""
    add = _declared(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, [_FLOAT, _FLOATS])
    return builder.call(add, [_FLOAT(0.0), vector], fastmath=("reassoc",))


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector of 16 times the same float."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _token_start(builder: ir.IRBuilder, base: ir.Value, length: ir.Value, token: int, index: ir.Value) -> ir.Value:
    """The address of step number `index` of a token's floats."""
    return builder.add(builder.add(base, builder.mul(length, _LONG(token))), builder.mul(index, _LONG(2 * VECTOR)))


@cache
def dots(dtype: torch.dtype, n: int, count: int, ahead_count: int):
    """A function that multiplies `count` rows of this type with n tokens' inputs, as far as whole steps reach.

    It takes the address of a table of the rows' addresses, that of a table of `ahead_count` rows to ask for, inputs
    float32 [n, length / 4] in the order of `load_step`, length, the number of steps, and where sums float32 [count, n]
    go.
    """
    size = STEP * dtype.itemsize  # of a step

    @intrinsic
    def function(context, rows, ahead, x, length, steps, sums):
        def generate(context, builder, signature, args):
            rows, ahead, x, length, steps, sums = args
            read, asked = _pointers(builder, rows, count), _pointers(builder, ahead, ahead_count)
            totals = [
                [[cgutils.alloca_once_value(builder, _zeros()) for _ in range(2)] for _ in range(n)] for _ in read
            ]
            with cgutils.for_range(builder, steps) as loop:
                offset = builder.mul(loop.index, _LONG(size))
                for row in asked:
                    _prefetch(builder, row, offset, size)
                starts = [_token_start(builder, x, length, token, loop.index) for token in range(n)]
                inputs = [
                    [builder.load(_at(builder, s, part, _FLOATS), align=4) for part in (0, VECTOR)] for s in starts
                ]
                for row, of_row in zip(read, totals, strict=True):
                    halves = _load_step(builder, dtype, row, offset)
                    for of_token, pair in zip(of_row, inputs, strict=True):
                        for place, half, values in zip(of_token, halves, pair, strict=True):
                            builder.store(_multiply_add(builder, half, values, builder.load(place)), place)
            for i, of_row in enumerate(totals):
                for token, of_token in enumerate(of_row):
                    both = builder.fadd(*(builder.load(place) for place in of_token))
                    builder.store(_sum(builder, both), _at(builder, sums, 4 * (n * i + token), _FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return function


@cache
def add_rows(dtype: torch.dtype, n: int, count: int, ahead_count: int):
    """A function that adds factors times `count` rows of this type to n tokens' outputs, as far as whole steps reach.

    It takes tables of addresses as `dots` does, factors float32 [count, n], outputs float32 [n, length / 4], length and
    the number of steps.
    """
    size = STEP * dtype.itemsize

    @intrinsic
    def function(context, rows, ahead, factors, out, length, steps):
        def generate(context, builder, signature, args):
            rows, ahead, factors, out, length, steps = args
            read, asked = _pointers(builder, rows, count), _pointers(builder, ahead, ahead_count)
            spread = [_spread(builder, builder.load(_at(builder, factors, 4 * i, _FLOAT))) for i in range(count * n)]
            with cgutils.for_range(builder, steps) as loop:
                offset = builder.mul(loop.index, _LONG(size))
                for row in asked:
                    _prefetch(builder, row, offset, size)
                halves = [_load_step(builder, dtype, row, offset) for row in read]
                for token in range(n):
                    start = _token_start(builder, out, length, token, loop.index)
                    for part in range(2):
                        place = _at(builder, start, part * VECTOR, _FLOATS)
                        total = builder.load(place, align=4)
                        for i, pair in enumerate(halves):
                            total = _multiply_add(builder, pair[part], spread[n * i + token], total)
                        builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return function


@intrinsic
def add_floats(context, out, part, vectors):
    """Vectors of floats at out += those at part."""

    def generate(context, builder, signature, args):
        out, part, vectors = args
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, _LONG(VECTOR))
            target, source = (_at(builder, address, offset, _FLOATS) for address in (out, part))
            builder.store(builder.fadd(builder.load(target, align=4), builder.load(source, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def clear_floats(context, out, vectors):
    """Vectors of floats at out = 0."""

    def generate(context, builder, signature, args):
        with cgutils.for_range(builder, args[1]) as loop:
            builder.store(_zeros(), _at(builder, args[0], builder.mul(loop.index, _LONG(VECTOR)), _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def dot_floats(context, a, b, vectors):
    """The scalar product of vectors of floats."""

    def generate(context, builder, signature, args):
        a, b, vectors = args
        total = cgutils.alloca_once_value(builder, _zeros())
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, _LONG(VECTOR))
            left, right = (builder.load(_at(builder, address, offset, _FLOATS), align=4) for address in (a, b))
            builder.store(_multiply_add(builder, left, right, builder.load(total)), total)
        return _sum(builder, builder.load(total))

    return types.float32(*[types.intp] * 3), generate


@intrinsic
def add_scaled(context, out, row, factor, vectors):
    """Vectors of floats at out += factor times those at row."""

    def generate(context, builder, signature, args):
        out, row, factor, vectors = args
        spread = _spread(builder, factor)
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, _LONG(VECTOR))
            target, source = (_at(builder, address, offset, _FLOATS) for address in (out, row))
            total = _multiply_add(builder, builder.load(source, align=4), spread, builder.load(target, align=4))
            builder.store(total, target, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), generate


@intrinsic
def exponentials(context, values, shift, vectors):
    """Replaces vectors of floats x by exp(x − shift), and returns their sum. shift must be at least each x.

    exp(y) is 2ⁿ · exp(f · ln 2) with y / ln 2 = n + f, |f| ≤ 1/2, by the Taylor series to the sixth power (relative
    error 2e-7). Below exp(−87) it returns about that.
    """

    def generate(context, builder, signature, args):
        values, shift, vectors = args
        shift, total = _spread(builder, shift), cgutils.alloca_once_value(builder, _zeros())
        nearest = _declared(builder, "llvm.rint.v16f32", _FLOATS, [_FLOATS])
        with cgutils.for_range(builder, vectors) as loop:
            place = _at(builder, values, builder.mul(loop.index, _LONG(VECTOR)), _FLOATS)
            y = builder.fmul(builder.fsub(builder.load(place, align=4), shift), _constant(1 / math.log(2)))
            y = builder.select(builder.fcmp_ordered("<", y, _constant(-126.0)), _constant(-126.0), y)
            n = builder.call(nearest, [y])
            x = builder.fmul(builder.fsub(y, n), _constant(math.log(2)))
            series = _constant(1 / math.factorial(6))
            for power in range(5, -1, -1):
                series = _multiply_add(builder, series, x, _constant(1 / math.factorial(power)))
            exponent = builder.add(builder.fptosi(n, _INTS), ir.Constant(_INTS, [127] * LANES))
            scale = builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * LANES)), _FLOATS)
            value = builder.fmul(series, scale)
            builder.store(value, place, align=4)
            builder.store(builder.fadd(builder.load(total), value), total)
        return _sum(builder, builder.load(total))

    return types.float32(types.intp, types.float32, types.intp), generate


@cache
def add_levels(P: int, neurons: int, group: int = 0, lowest: float = 0.0):
    """A function that adds up the levels of a low-bit copy for a range of neurons.

    It takes the addresses of the range's indices of levels, of their spacings, of `count` inputs int32 (and
    `LEVELS_AHEAD` more, which it asks the memory for) and of their values float32; count; and where the sums of value ·
    index go, float32 [P, neurons]. Indices are half bytes, uint8 [E, P, neurons / 2]: 16 bytes hold 16 neurons in their
    lower halves and the next 16 in their upper halves. With a group of neurons that share a spacing, bfloat16 [E, P,
    neurons / group], it sums value · spacing · (index + lowest); without one it reads no spacings.
    """

    @intrinsic
    def function(context, table, spacings, inputs, values, count, sums):
        def generate(context, builder, signature, args):
            table, spacings, inputs, values, count, sums = args
            bytes16, read = ir.VectorType(ir.IntType(8), LANES), P * neurons // 2
            totals = [cgutils.alloca_once_value(builder, _zeros()) for _ in range(P * neurons // LANES)]
            groups = P * neurons // group if group else 0
            shifts = [cgutils.alloca_once_value(builder, _zeros()) for _ in range(groups)]
            with cgutils.for_range(builder, count) as loop:
                at = builder.mul(loop.index, _LONG(4))
                number = builder.zext(builder.load(_at(builder, inputs, at, _INT), align=4), _LONG)
                value = _spread(builder, builder.load(_at(builder, values, at, _FLOAT), align=4))
                base = builder.add(table, builder.mul(number, _LONG(read)))
                later = builder.load(_at(builder, inputs, builder.add(at, _LONG(4 * LEVELS_AHEAD)), _INT), align=4)
                _prefetch(builder, table, builder.mul(builder.zext(later, _LONG), _LONG(read)), read)
                spaced = []
                for place, shift in enumerate(shifts):
                    start = builder.add(spacings, builder.mul(number, _LONG(2 * groups)))
                    bits = builder.load(_at(builder, start, 2 * place, ir.IntType(16)), align=2)
                    spacing = builder.bitcast(builder.shl(builder.zext(bits, _INT), _INT(16)), _FLOAT)
                    spaced.append(builder.fmul(value, _spread(builder, spacing)))
                    builder.store(builder.fadd(builder.load(shift), spaced[-1]), shift)
                for pair in range(len(totals) // 2):
                    value = spaced[2 * LANES * pair // group] if group else value
                    both = builder.zext(builder.load(_at(builder, base, pair * LANES, bytes16), align=1), _INTS)
                    low = builder.and_(both, ir.Constant(_INTS, [15] * LANES))
                    high = builder.lshr(both, ir.Constant(_INTS, [4] * LANES))
                    for index, total in zip((low, high), totals[2 * pair : 2 * pair + 2], strict=True):
                        level = builder.sitofp(index, _FLOATS)  # from 0 to 15, so signed conversion does as well
                        builder.store(_multiply_add(builder, level, value, builder.load(total)), total)
            for i, total in enumerate(totals):
                value = builder.load(total)
                if group:
                    value = _multiply_add(builder, builder.load(shifts[LANES * i // group]), _constant(lowest), value)
                builder.store(value, _at(builder, sums, i * VECTOR, _FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return function


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _logarithm(builder: ir.IRBuilder, y: ir.Value) -> ir.Value:
    """The natural logarithm of floats from 1 on, by the series 2 artanh(s) with s = (m − 1) / (m + 1)."""
    bits = builder.bitcast(y, _INTS)
    power = builder.sub(builder.lshr(bits, ir.Constant(_INTS, [23] * LANES)), ir.Constant(_INTS, [127] * LANES))
    mantissa = builder.or_(
        builder.and_(bits, ir.Constant(_INTS, [0x7FFFFF] * LANES)), ir.Constant(_INTS, [127 << 23] * LANES)
    )
    m, exponent = builder.bitcast(mantissa, _FLOATS), builder.sitofp(power, _FLOATS)
    large = builder.fcmp_ordered(">", m, _constant(math.sqrt(2)))
    m = builder.select(large, builder.fmul(m, _constant(0.5)), m)
    exponent = builder.select(large, builder.fadd(exponent, _constant(1.0)), exponent)
    s = builder.fdiv(builder.fsub(m, _constant(1.0)), builder.fadd(m, _constant(1.0)))
    square, series = builder.fmul(s, s), _constant(2 / 9)
    for divisor in (7, 5, 3, 1):
        series = _multiply_add(builder, series, square, _constant(2 / divisor))
    return _multiply_add(builder, exponent, _constant(math.log(2)), builder.fmul(series, s))


@cache
def score_range(P: int, neurons: int, copies_up: bool):
    """A function that turns a range's sums into scores, as `score_curve` does.

    It takes the addresses of what `add_levels` wrote and of the range's part of scale, slope and power [P] and bias,
    each float32 and `wide` bytes apart; wide; what is added to each sum; where scores go, float32 [neurons]; and where
    the last projection's part of them goes, if that is up.
    """

    @intrinsic
    def function(context, sums, curve, wide, shift, scores, ups):
        def generate(context, builder, signature, args):
            sums, curve, wide, shift, scores, ups = args
            shift = _spread(builder, shift)
            with cgutils.for_range(builder, _LONG(neurons // LANES)) as loop:
                offset = builder.mul(loop.index, _LONG(VECTOR))

                def parameter(row):
                    at = builder.add(builder.mul(wide, _LONG(row)), offset)
                    return builder.load(_at(builder, curve, at, _FLOATS), align=4)

                score = parameter(3 * P)
                for p in range(P):
                    at = builder.add(offset, _LONG(4 * neurons * p))
                    product = builder.fadd(builder.load(_at(builder, sums, at, _FLOATS), align=4), shift)
                    z = builder.fmul(product, parameter(p))
                    part = builder.fmul(parameter(P + p), z)
                    square = _multiply_add(builder, z, z, _constant(1.0))
                    part = _multiply_add(builder, parameter(2 * P + p), _logarithm(builder, square), part)
                    score = builder.fadd(score, part)
                builder.store(score, _at(builder, scores, offset, _FLOATS), align=4)
                if copies_up:
                    builder.store(part, _at(builder, ups, offset, _FLOATS), align=4)
            return context.get_dummy_value()

        arguments = (types.intp, types.intp, types.intp, types.float32, types.intp, types.intp)
        return types.void(*arguments), generate

    return function


@intrinsic
def end(context, address):
    """The int64 at this address, which is incremented; what other threads wrote before they did so can be read then."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0], 0, _LONG), _LONG(1), "acq_rel")

    return types.int64(types.intp), generate


@cache
def element(dtype: torch.dtype):
    """A function that loads an element of this type as a float32."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, args):
            if dtype == torch.float32:
                return builder.load(_at(builder, args[0], 0, _FLOAT), align=4)
            if dtype == torch.int8:
                byte = builder.load(_at(builder, args[0], 0, ir.IntType(8)), align=1)
                return builder.sitofp(byte, _FLOAT)
            bits = builder.load(_at(builder, args[0], 0, ir.IntType(16)), align=2)
            if dtype == torch.bfloat16:
                return builder.bitcast(builder.shl(builder.zext(bits, _INT), _INT(16)), _FLOAT)
            return builder.fpext(builder.bitcast(bits, _HALF), _FLOAT)

        return types.float32(types.intp), generate

    return load


load_float = element(torch.float32)


@intrinsic
def store_float(context, address, value):
    """Stores a float32."""

    def generate(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0], 0, _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@cache
def store_element(dtype: torch.dtype):
    """A function that stores a float32 as this type, rounded to the nearest."""

    @intrinsic
    def store(context, address, value):
        def generate(context, builder, signature, args):
            address, value = args
            if dtype == torch.float32:
                builder.store(value, _at(builder, address, 0, _FLOAT), align=4)
            elif dtype == torch.float16:
                builder.store(builder.fptrunc(value, _HALF), _at(builder, address, 0, _HALF), align=2)
            else:
                bits, short = builder.bitcast(value, _INT), ir.IntType(16)
                odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))  # ties go to the even neighbour
                rounded = builder.lshr(builder.add(bits, builder.add(odd, _INT(0x7FFF))), _INT(16))
                is_nan = builder.fcmp_unordered("uno", value, value)
                rounded = builder.select(is_nan, _INT(0x7FC0), rounded)
                builder.store(builder.trunc(rounded, short), _at(builder, address, 0, short), align=2)
            return context.get_dummy_value()

        return types.void(types.intp, types.float32), generate

    return store


@intrinsic
def load_int32(context, address):
    """Loads an int32 as an int64."""

    def generate(context, builder, signature, args):
        return builder.sext(builder.load(_at(builder, args[0], 0, _INT), align=4), _LONG)

    return types.int64(types.intp), generate


@intrinsic
def store_int32(context, address, value):
    """Stores the low 32 bits of an int64."""

    def generate(context, builder, signature, args):
        builder.store(builder.trunc(args[1], _INT), _at(builder, args[0], 0, _INT), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@njit(nogil=True)
def arranged_at(e, E, evens_first):
    """Where element e of a row of E is in an arranged row."""
    within = e % STEP
    if not evens_first or e >= E // STEP * STEP:
        return e
    return e - within + within // 2 + within % 2 * LANES


@cache
def arrange(dtype: torch.dtype):
    """A function that writes inputs [n, E] of this type as float32 [n, padded], in the order of `_load_step`."""
    load, size, evens_first = element(dtype), dtype.itemsize, dtype == torch.bfloat16

    @njit(nogil=True)
    def arrange(hidden, n, E, padded, out):
        for token in range(n):
            for e in range(E):
                value = load(hidden + size * (token * E + e))
                store_float(out + 4 * (token * padded + arranged_at(e, E, evens_first)), value)

    return arrange


@njit(nogil=True)
def activate(x, activation):
    """The activation with this number in `ACTIVATIONS`."""
    x = float(x)
    if activation == 0:
        return x / (1.0 + math.exp(-x))
    if activation == 1:
        return 0.5 * x * (1.0 + math.erf(x * 0.7071067811865476))
    if activation == 2:
        return 0.5 * x * (1.0 + math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x if x > 0 or x != x else 0.0
