"""A list of C functions that numba has compiled, run one after the other without Python in between.

A function takes one address, that of its state: int64 values. It runs on one thread, or on all threads at once; these
then share out tasks by the counters in the first two values, which are zero when it starts. Importing this module
imports numba.
"""

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from apc.ops._numba import intrinsic, load_int, on_threads, process, store_int

_LONG, _INT = ir.IntType(64), ir.IntType(32)
_CALL = 24  # bytes of a call: the function's address, its state's, and whether it runs on all threads


class Program:
    """The list, and the states that its functions use."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, np.ndarray, bool]] = []
        self._table = np.zeros(0, np.int64)

    def add(self, function: Any, state: np.ndarray, on_all: bool = False) -> None:
        """Appends a function (numba's, from `cfunc`) with its state, int64."""
        self._calls.append((function, state, on_all))

    def run(self, threads: int) -> None:
        """Runs the functions, those for all threads on torch's own."""
        team = getattr(process, "GOMP_parallel", None)
        if team is not None or threads == 1:
            if len(self._table) < len(self._calls):
                values = [(function.address, state.ctypes.data, on_all) for function, state, on_all in self._calls]
                self._table = np.array(values, np.int64)
            address = 0 if team is None else ctypes.cast(team, ctypes.c_void_p).value
            _run(self._table.ctypes.data, len(self._calls), threads, address)
            return
        for function, state, on_all in self._calls:
            if on_all:
                state[:2] = 0
            on_threads(function, state, threads if on_all else 1)


@intrinsic
def _call(context, function, state):
    """Calls the function at an address."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_LONG]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _call_on_all(context, team, function, state, threads):
    """Calls the function on so many threads, by OpenMP's function at the address `team`."""

    def generate(context, builder, signature, args):
        team, function, state, threads = args
        kind = ir.FunctionType(ir.VoidType(), [_LONG, _LONG, _INT, _INT]).as_pointer()
        builder.call(builder.inttoptr(team, kind), [function, state, builder.trunc(threads, _INT), _INT(0)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(nogil=True)
def _run(calls, count, threads, team):
    for number in range(count):
        call = calls + _CALL * number
        function, state, on_all = load_int(call), load_int(call + 8), load_int(call + 16)
        if on_all:
            store_int(state, 0)
            store_int(state + 8, 0)
        if on_all and threads > 1:
            _call_on_all(team, function, state, threads)
        else:
            _call(function, state)
