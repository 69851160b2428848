"""Exact assignment on the CPU with lookup tables instead of products (the "Method of Four Russians"), in numba.

A table has one entry for each of the 2⁵ patterns of five neurons. An entry is a vector: what that pattern adds to many
sums. So one load and one addition handle five neurons for all of these sums. `assign_cpu` builds tables from
64 centroids (sums of 8 bits) and looks up rows. `assign_weighted_cpu` builds tables from the importances of
16 rows (sums of 32 bits) and looks up centroids. Building a table takes time, so for few rows or few
centroids `assign_cpu` counts the bits of x ∧ c instead.

Vectors are LLVM vectors, which compile to the instructions of any CPU. Functions are compiled at their first call
(1 to 2 s per process). numba's disk cache is not used: it would lie beside the package, shared by ranks and by
machines with different CPUs. Importing this module imports numba, so import it only where it is needed.

Shape letters: see `apc.ops`. Addresses and strides are in bytes.
"""

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from torch import Tensor

from apc.ops._numba import (
    intrinsic,
    load_byte,
    load_int,
    load_unsigned,
    load_word,
    next_number,
    on_threads,
    store_byte,
    store_int,
    store_unsigned,
    store_word,
)
from apc.ops.bits import empty_results

_BITS = 5  # neurons per lookup
_ENTRY = 64  # bytes of a table's entry: one cache line
_TABLES = 8  # tables in use at a time: 16 KB, half of a usual L1 cache; the other half is for streamed data
_TABLE = _ENTRY << _BITS  # bytes of a table
_SPAN = _TABLES * _BITS  # neurons of a span: those that the tables in use cover
_SPAN_BYTES = _SPAN // 8
_SPANS_IN_BYTE = 255 // _SPAN  # spans whose sum fits one byte
_CENTROIDS = _ENTRY  # centroids in an entry of one-byte sums
_WEIGHTED_ROWS = _ENTRY // 4  # rows in an entry of 32-bit sums

_ROWS = 1024  # rows per set of tables. Building a set costs as much as 64 rows; the rows' sums, 192 KB, stay in L2
_CLUSTERS = 4096  # clusters per set of tables, likewise
_WORTH_TABLES = 64  # rows whose lookups take as long as building the tables
_WORTH_CLUSTERS = 64  # clusters whose lookups take as long as building the tables from importances
_TABLES_GAIN = 2  # counting takes twice as long as lookups
_LONG = 2**16 // 8  # bytes of a row from which overlaps may not fit 16 bits: such rows are assigned by counting
_COUNTED = 2**17  # bytes of centroids counted against all rows before the next centroids: they stay in L2
_FEW = 2**24  # pairs of bits, some 50 µs: too little work for a thread
_LAST_ID = 2**32 - 1  # a key is the overlap, and below it the 32 bits of _LAST_ID − id
_ARGUMENTS = 10  # arguments of every function that runs as tasks, not counting the scratch memory

# Offsets into the scratch memory of a task.
_PLANES_AT = _TABLES * _TABLE  # 40 entries, one per neuron
_COLUMNS_AT = _PLANES_AT + _SPAN * _ENTRY  # the 5 bytes of each centroid; or the best sums and ids of weighted rows
_SUMS_AT = _COLUMNS_AT + _SPAN_BYTES * _ENTRY


def assign_cpu(rows: Tensor, centroids: Tensor, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """The nearest centroid of each row, and their overlap.

    uint8 [G, N, W], uint8 [G, K, W] → ids int64 [G, N], overlaps int32 [G, N] or None.
    The caller has checked shapes, dtypes and W % 16 == 0.
    """
    rows, centroids = _dense(rows), centroids.contiguous()
    (G, N, W), K = rows.shape, centroids.shape[1]
    blocks = -(-K // _CENTROIDS)
    by_tables = W < _LONG and blocks * _CENTROIDS * (N + _WORTH_TABLES) < _TABLES_GAIN * N * K
    row_parts, cluster_parts = _parts(G, N, blocks, least_rows=512 if by_tables else 64, work=G * N * K * 8 * W)
    keys = torch.empty((cluster_parts, G, N), dtype=torch.int64)
    tile, spans = min(N, _ROWS), -(-W // _SPAN_BYTES)
    tasks: list[tuple[int, ...]] = []
    for group in range(G):
        row_at, stride, centroids_at = rows[group].data_ptr(), rows.stride(1), centroids[group].data_ptr()
        for part in range(cluster_parts):
            clusters = (
                blocks * part // cluster_parts * _CENTROIDS,
                min(K, blocks * (part + 1) // cluster_parts * _CENTROIDS),
            )
            keys_at = keys[part, group].data_ptr()
            for n, count in _spans(N, row_parts):
                tasks.append(
                    (row_at + n * stride, stride, count, W, centroids_at, *clusters, keys_at + 8 * n, tile, spans)
                )
    if by_tables:
        _run(_assign_by_tables, tasks, _SUMS_AT + tile * (3 * _ENTRY + 8 * spans))
    else:
        _run(_assign_by_counting, tasks)
    best = keys.amax(0) if cluster_parts > 1 else keys[0]
    return _LAST_ID - (best & _LAST_ID), (best >> 32).to(torch.int32) if scores else None


def assign_weighted_cpu(
    importance: Tensor, centroids: Tensor, power: int, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The centroid that captures most of each row, and the sum it captures.

    uint8 [G, N, D], uint8 [G, K, W], power 1 or 2 → ids int64 [G, N], captured sums int32 [G, N] or None. The
    caller has checked shapes and dtypes, and that 255^power·D is below 2³¹.
    """
    importance, centroids = _dense(importance), centroids.contiguous()
    (G, N, D), (K, W) = importance.shape, centroids.shape[1:]
    ids, captured = empty_results(importance, scores)
    row_parts, _ = _parts(1, N, 1, least_rows=_WEIGHTED_ROWS, work=N * (K + _WORTH_CLUSTERS) * D)
    spans, stride = -(-D // _SPAN), importance.stride(1)
    patterns = torch.empty((spans, K), dtype=torch.int64)
    for group in range(G):
        patterns_at, centroids_at, rows_at, ids_at = (
            tensor.data_ptr() for tensor in (patterns, centroids[group], importance[group], ids[group])
        )
        captured_at = 0 if captured is None else captured[group].data_ptr()
        _patterns_of(centroids_at, W, K, W, spans, patterns_at)
        clusters = patterns_at, K, spans, power
        tasks: list[tuple[int, ...]] = []
        for n, count in _spans(N, row_parts):
            results = ids_at + 8 * n, captured_at + 4 * n if scores else 0
            tasks.append((rows_at + n * stride, stride, count, D, *clusters, *results))
        _run(_assign_weighted, tasks, _SUMS_AT + min(K, _CLUSTERS) * _ENTRY)
    return ids, captured


def _dense(rows: Tensor) -> Tensor:
    """Rows whose bytes are contiguous; rows may be any stride apart."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _parts(G: int, N: int, blocks: int, least_rows: int, work: int) -> tuple[int, int]:
    """How many parts to cut a group's rows into, and its blocks of clusters, so that all threads get equal work.

    work: pairs of bits in all groups.
    """
    if work < _FEW:
        return 1, 1
    threads = -(-torch.get_num_threads() // G)
    row_parts = max(1, min(4 * threads, N // least_rows))
    if row_parts >= threads:
        return row_parts - row_parts % threads, 1
    return row_parts, min(blocks, -(-threads // row_parts))


def _spans(N: int, parts: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of each part of N rows that is not empty."""
    edges = [N * part // parts for part in range(parts + 1)]
    return [(first, last - first) for first, last in zip(edges, edges[1:], strict=False) if first < last]


def _run(function: Callable, tasks: list[tuple[int, ...]], scratch: int = 0) -> None:
    """Call function(*task, address of `scratch` bytes of memory) for all tasks, on as many threads as torch uses."""
    if not tasks:
        return
    threads = torch.get_num_threads() if len(tasks) > 1 else 1
    scratch = -(-scratch // 4096) * 4096
    memory = _memory(threads * scratch)
    table = np.array(tasks, np.int64).reshape(-1, _ARGUMENTS)
    state = np.array([0, 0, len(tasks), table.ctypes.data, memory.ctypes.data, scratch], np.int64)
    worker = _worker(function)
    on_threads(worker, state, threads)


_own = threading.local()


def _memory(size: int) -> np.ndarray:
    """Uninitialised uint8 [≥ size]. The calling thread may use it until its next call.

    The memory is reused because page faults on new memory would take a quarter of the time.
    """
    if not hasattr(_own, "memory") or len(_own.memory) < size:
        _own.memory = np.empty(size, np.uint8)
    return _own.memory


@cache
def _worker(function: Callable):
    """Compiles `function` to a C function that takes tasks from the state that `_run` sets up, until none is left."""

    @cfunc(types.void(types.intp))
    def work(state):
        scratch = load_int(state + 32) + next_number(state + 8) * load_int(state + 40)
        task = next_number(state)
        while task < load_int(state + 16):
            at = load_int(state + 24) + task * 8 * _ARGUMENTS
            function(
                load_int(at),
                load_int(at + 8),
                load_int(at + 16),
                load_int(at + 24),
                load_int(at + 32),
                load_int(at + 40),
                load_int(at + 48),
                load_int(at + 56),
                load_int(at + 64),
                load_int(at + 72),
                scratch,
            )
            task = next_number(state)

    return work


@njit(nogil=True)
def _key(overlap, cluster):
    """An int64 that orders by overlap, then by the lower cluster."""
    return (overlap << 32) | (_LAST_ID - cluster)


def _pointer(builder: ir.IRBuilder, address: ir.Value, lane_bits: int, lanes: int = _ENTRY) -> ir.Value:
    return builder.inttoptr(address, ir.VectorType(ir.IntType(lane_bits), lanes).as_pointer())


def _every(lane_bits: int, values: int | list[int], lanes: int = _ENTRY) -> ir.Constant:
    return ir.Constant(
        ir.VectorType(ir.IntType(lane_bits), lanes), [values] * lanes if isinstance(values, int) else values
    )


@intrinsic
def _clear(context, entry):
    """The 64 bytes at this address = 0."""

    def generate(context, builder, signature, args):
        builder.store(_every(8, 0), _pointer(builder, args[0], 8), align=1)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _ones(context, word):
    """The number of set bits of a uint64, as an int64."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


def _table_operations(lane_bits: int):
    """(add, look_up) on entries of 64 bytes whose sums have `lane_bits` bits."""
    lanes, word = 8 * _ENTRY // lane_bits, ir.IntType(64)

    @intrinsic
    def add(context, out, left, right):
        """Entry at out = entry at left + entry at right."""

        def generate(context, builder, signature, args):
            out, left, right = (_pointer(builder, address, lane_bits, lanes) for address in args)
            builder.store(builder.add(builder.load(left, align=1), builder.load(right, align=1)), out, align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), generate

    @intrinsic
    def look_up(context, sums, tables, pattern):
        """Entry at sums += the eight entries chosen by the lowest 40 bits of pattern, five bits per table."""

        def generate(context, builder, signature, args):
            (_, tables, pattern), sums = args, _pointer(builder, args[0], lane_bits, lanes)
            total = builder.load(sums, align=1)
            for i in range(_TABLES):
                shift = _BITS * i - 6  # pattern >> 5i is an entry's number; times 64, its offset
                moved = builder.lshr(pattern, word(shift)) if shift > 0 else builder.shl(pattern, word(-shift))
                address = builder.add(builder.add(tables, word(i * _TABLE)), builder.and_(moved, word(_TABLE - _ENTRY)))
                total = builder.add(total, builder.load(_pointer(builder, address, lane_bits, lanes), align=1))
            builder.store(total, sums, align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.uint64), generate

    return add, look_up


_add_bytes, _look_up_bytes = _table_operations(8)
_add_words, _look_up_words = _table_operations(32)


@intrinsic
def _bit_of_bytes(context, out, source, bit):
    """64 bytes at out = bit number `bit`, 0 or 1, of each of the 64 bytes at source."""

    def generate(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(8), _ENTRY)
        undefined = ir.Constant(vector, ir.Undefined)
        count = builder.insert_element(undefined, builder.trunc(args[2], ir.IntType(8)), ir.IntType(32)(0))
        count = builder.shuffle_vector(count, undefined, _every(32, 0))
        moved = builder.lshr(builder.load(_pointer(builder, args[1], 8), align=1), count)
        builder.store(builder.and_(moved, _every(8, 1)), _pointer(builder, args[0], 8), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _widen(context, totals, sums):
    """64 uint16 at totals += 64 bytes at sums; the bytes are set to 0."""

    def generate(context, builder, signature, args):
        totals, sums = _pointer(builder, args[0], 16), _pointer(builder, args[1], 8)
        added = builder.zext(builder.load(sums, align=1), totals.type.pointee)
        builder.store(builder.add(builder.load(totals, align=1), added), totals, align=1)
        builder.store(_every(8, 0), sums, align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _take_best(context, totals):
    """The largest key total · 64 + (63 − lane), int64, over the 64 uint16 at totals; ties go to the lowest lane.

    The totals are set to 0.
    """

    def generate(context, builder, signature, args):
        totals = _pointer(builder, args[0], 16)
        value = builder.zext(builder.load(totals, align=1), ir.VectorType(ir.IntType(32), _ENTRY))
        value = builder.or_(builder.shl(value, _every(32, 6)), _every(32, list(range(_ENTRY))[::-1]))
        lanes = _ENTRY
        while lanes > 1:
            lanes //= 2
            low, high = (
                builder.shuffle_vector(value, value, _every(32, list(range(i, i + lanes)), lanes)) for i in (0, lanes)
            )
            value = builder.select(builder.icmp_signed(">", low, high), low, high)
        builder.store(_every(16, 0), totals, align=1)
        return builder.zext(builder.extract_element(value, ir.IntType(32)(0)), ir.IntType(64))

    return types.int64(types.intp), generate


@intrinsic
def _keep_best(context, best, ids, sums, cluster):
    """Update the 16 int32 at best and at ids: where the sum at sums is larger, set that sum and this cluster."""

    def generate(context, builder, signature, args):
        best, ids, sums = (_pointer(builder, address, 32, _WEIGHTED_ROWS) for address in args[:3])
        undefined = ir.Constant(best.type.pointee, ir.Undefined)
        cluster = builder.insert_element(undefined, builder.trunc(args[3], ir.IntType(32)), ir.IntType(32)(0))
        cluster = builder.shuffle_vector(cluster, undefined, _every(32, 0, _WEIGHTED_ROWS))
        before, now = builder.load(best, align=1), builder.load(sums, align=1)
        better = builder.icmp_signed(">", now, before)
        builder.store(builder.select(better, now, before), best, align=1)
        builder.store(builder.select(better, cluster, builder.load(ids, align=1)), ids, align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.int64), generate


@njit(nogil=True)
def _pattern_of(row, span, W):
    """The 5 bytes of a row from 5·span on, in the lowest 40 bits. Bytes past the row's end are 0 and are not read."""
    past = span * _SPAN_BYTES + 8 - W
    return load_unsigned(row + span * _SPAN_BYTES) if past <= 0 else load_unsigned(row + W - 8) >> np.uint64(8 * past)


@njit(nogil=True)
def _patterns_of(rows, stride, count, W, spans, patterns):
    """The patterns of `count` rows of W bytes, to uint64 [spans, count] at address `patterns`.

    It takes eight rows at a time, since the elements of a column are far apart.
    """
    for first in range(0, count, 8):
        for span in range(spans):
            for n in range(first, min(first + 8, count)):
                store_unsigned(patterns + 8 * (span * count + n), _pattern_of(rows + n * stride, span, W))


@njit(nogil=True)
def _assign_by_tables(rows, stride, N, W, centroids, first, last, keys, tile, spans, scratch):
    """Write to keys, int64 [N], the `_key` of each row's best cluster of first … last-1. W < `_LONG`, spans = ⌈W/5⌉.

    tile: rows per set of tables. scratch: the address of `_SUMS_AT` + tile · (192 + 8 · spans) bytes.
    """
    planes, columns, sums = scratch + _PLANES_AT, scratch + _COLUMNS_AT, scratch + _SUMS_AT
    totals = sums + tile * _ENTRY
    patterns = totals + tile * 2 * _ENTRY
    # Entry 0 of each table stays 0. Sums and totals are set back to 0 after each use.
    for at in range(scratch, patterns, _ENTRY):
        _clear(at)
    for n0 in range(0, N, tile):
        count = min(tile, N - n0)
        _patterns_of(rows + n0 * stride, stride, count, W, spans, patterns)
        for k0 in range(first, last, _CENTROIDS):
            for span in range(spans):
                for lane in range(_CENTROIDS):
                    # Lanes past the last cluster are zero, so they never win a tie against the lower lanes.
                    pattern = _pattern_of(centroids + (k0 + lane) * W, span, W) if k0 + lane < last else np.uint64(0)
                    for j in range(_SPAN_BYTES):
                        store_byte(columns + j * _CENTROIDS + lane, np.int64(pattern >> np.uint64(8 * j)))
                for i in range(_SPAN):
                    _bit_of_bytes(planes + i * _ENTRY, columns + i // 8 * _ENTRY, i % 8)
                for i in range(_SPAN):
                    entry, doubled = scratch + i // _BITS * _TABLE, _ENTRY << (i % _BITS)
                    for offset in range(0, doubled, _ENTRY):
                        _add_bytes(entry + doubled + offset, entry + offset, planes + i * _ENTRY)
                for n in range(count):
                    _look_up_bytes(sums + n * _ENTRY, scratch, load_unsigned(patterns + 8 * (span * count + n)))
                if span % _SPANS_IN_BYTE == _SPANS_IN_BYTE - 1 or span == spans - 1:
                    for n in range(count):
                        _widen(totals + n * 2 * _ENTRY, sums + n * _ENTRY)
            for n in range(count):
                best = _take_best(totals + n * 2 * _ENTRY)
                key = _key(best >> 6, k0 + _CENTROIDS - 1 - (best & 63))
                at = keys + 8 * (n0 + n)
                store_int(at, key if k0 == first else max(key, load_int(at)))


@njit(nogil=True)
def _assign_by_counting(rows, stride, N, W, centroids, first, last, keys, tile, spans, scratch):
    """As `_assign_by_tables`, but count the ones of x ∧ c, for rows of any length: four rows per load of c.

    It ignores tile, spans and scratch.
    """
    clusters = max(1, _COUNTED // W)
    fours = N - N % 4
    for n in range(N):
        store_int(keys + 8 * n, -1)
    for k0 in range(first, last, clusters):
        for n in range(0, fours, 4):
            row = rows + n * stride
            best_0 = best_1 = best_2 = best_3 = -1
            for k in range(k0, min(k0 + clusters, last)):
                centroid = centroids + k * W
                ones_0 = ones_1 = ones_2 = ones_3 = 0
                for w in range(0, W, 8):
                    word = load_unsigned(centroid + w)
                    ones_0 += _ones(load_unsigned(row + w) & word)
                    ones_1 += _ones(load_unsigned(row + stride + w) & word)
                    ones_2 += _ones(load_unsigned(row + 2 * stride + w) & word)
                    ones_3 += _ones(load_unsigned(row + 3 * stride + w) & word)
                best_0, best_1 = max(best_0, _key(ones_0, k)), max(best_1, _key(ones_1, k))
                best_2, best_3 = max(best_2, _key(ones_2, k)), max(best_3, _key(ones_3, k))
            _raise(keys + 8 * n, best_0)
            _raise(keys + 8 * n + 8, best_1)
            _raise(keys + 8 * n + 16, best_2)
            _raise(keys + 8 * n + 24, best_3)
        for n in range(fours, N):
            row = rows + n * stride
            best = -1
            for k in range(k0, min(k0 + clusters, last)):
                ones = 0
                for w in range(0, W, 8):
                    ones += _ones(load_unsigned(row + w) & load_unsigned(centroids + k * W + w))
                best = max(best, _key(ones, k))
            _raise(keys + 8 * n, best)


@njit(nogil=True)
def _raise(at, key):
    """The int64 at this address = the larger of itself and key."""
    store_int(at, max(load_int(at), key))


@njit(nogil=True)
def _assign_weighted(importance, stride, N, D, patterns, K, spans, power, ids, captured, scratch):
    """Writes each row's best cluster to ids, int64 [N], and its sum to captured, int32 [N].

    If the address `captured` is 0, no sums are written. Rows have D bytes.

    patterns: the clusters' `_patterns_of`, uint64 [spans, K], spans = ⌈D/40⌉.

    scratch: the address of `_SUMS_AT` + 64 · min(K, _CLUSTERS) bytes.
    """
    planes, best, best_ids, sums = (
        scratch + _PLANES_AT,
        scratch + _COLUMNS_AT,
        scratch + _COLUMNS_AT + _ENTRY,
        scratch + _SUMS_AT,
    )
    for table in range(_TABLES):
        _clear(scratch + table * _TABLE)  # entry 0, which stays 0
    for n0 in range(0, N, _WEIGHTED_ROWS):
        rows = min(_WEIGHTED_ROWS, N - n0)
        for lane in range(_WEIGHTED_ROWS):
            store_word(best + 4 * lane, -1)
        for k0 in range(0, K, _CLUSTERS):
            clusters = min(_CLUSTERS, K - k0)
            for k in range(clusters):
                _clear(sums + k * _ENTRY)
            for span in range(spans):
                width = min(_SPAN, D - span * _SPAN)
                for lane in range(rows):
                    row = importance + (n0 + lane) * stride + span * _SPAN
                    for i in range(width):
                        value = load_byte(row + i)
                        store_word(planes + i * _ENTRY + 4 * lane, value * value if power == 2 else value)
                for i in range(width, _SPAN):
                    for lane in range(rows):
                        store_word(planes + i * _ENTRY + 4 * lane, 0)
                for i in range(_SPAN):
                    entry, doubled = scratch + i // _BITS * _TABLE, _ENTRY << (i % _BITS)
                    for offset in range(0, doubled, _ENTRY):
                        _add_words(entry + doubled + offset, entry + offset, planes + i * _ENTRY)
                for k in range(clusters):
                    _look_up_words(sums + k * _ENTRY, scratch, load_unsigned(patterns + 8 * (span * K + k0 + k)))
            for k in range(clusters):
                _keep_best(best, best_ids, sums + k * _ENTRY, k0 + k)
        for lane in range(rows):
            store_int(ids + 8 * (n0 + lane), load_word(best_ids + 4 * lane))
            if captured:
                store_word(captured + 4 * (n0 + lane), load_word(best + 4 * lane))
