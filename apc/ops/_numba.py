"""What the kernels in numba share: integers at addresses, and torch's own threads. Importing it imports numba."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

# numba's stub asks the caller for the typing context, too.
intrinsic = cast(Callable[[Callable], Callable], extending.intrinsic)
process = ctypes.CDLL(None)  # all libraries that the process has loaded; ctypes releases the GIL during a call


def on_threads(worker: Any, state: np.ndarray, threads: int) -> None:
    """Runs a C function of numba's on so many threads, each with the address of `state`, int64.

    These are torch's own threads, through the OpenMP runtime that torch has loaded. After an operation they
    spin on their cores for some milliseconds, so a second set of threads ran slower than a single thread.
    Without OpenMP: a thread pool.
    """
    if threads == 1:
        worker.ctypes(state.ctypes.data)
    elif hasattr(process, "GOMP_parallel"):
        # Always use all of torch's threads: with a different number, OpenMP rebuilds its team.
        process.GOMP_parallel(ctypes.c_void_p(worker.address), ctypes.c_void_p(state.ctypes.data), threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(worker.ctypes, state.ctypes.data) for _ in range(threads)]:
                future.result()


def _memory_operations(bits: int, numba_type: types.Integer):
    """(load, store) of a little-endian integer of `bits` bits at any address.

    In numba it is zero-extended to numba_type.
    """
    element = ir.IntType(bits)

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], element.as_pointer()), align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return numba_type(types.intp), generate

    @intrinsic
    def store(context, address, value):
        def generate(context, builder, signature, args):
            value = args[1] if bits == 64 else builder.trunc(args[1], element)
            builder.store(value, builder.inttoptr(args[0], element.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, numba_type), generate

    return load, store


load_byte, store_byte = _memory_operations(8, types.int64)
load_word, store_word = _memory_operations(32, types.int64)
load_int, store_int = _memory_operations(64, types.int64)
load_unsigned, store_unsigned = _memory_operations(64, types.uint64)


@njit(nogil=True)
def task_start(count, task, tasks):
    """The first of `count` items that a task takes, up to those of the next one; `count` for the task after the last.

    Tasks get smaller and smaller, down to 1 / tasks² of the items, so that threads of unequal speed end together.
    """
    left = tasks - task
    return count - count * left * left // (tasks * tasks)


@intrinsic
def lowest_bit(context, value):
    """The place of the lowest bit of an int64 that is not zero."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def next_number(context, address):
    """The int64 at this address, which is incremented atomically."""

    def generate(context, builder, signature, args):
        at = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", at, ir.IntType(64)(1), "monotonic")

    return types.int64(types.intp), generate
