"""Products of a matrix's rows with one vector on the CPU, in numba, and the states of such functions.

Importing this module imports numba. Addresses are in bytes.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types
from torch import Tensor

from apc.ops._numba import load_int, next_number, task_start
from apc.ops._vectors import STEP, activate, arranged_at, dots, element, load_float, store_float
from apc.ops.rounded import RoundedRows, Rows, evens_first

STORED, ADDED, ACTIVATED, GATED = range(4)  # what `product` does with its products
COUNTERS = ("next", "ended")  # the first values of a function's state that runs on all threads
_R = 4  # rows that are read together
_TASKS = 8  # of a thread, at most


def state_type(*names: str) -> np.dtype:
    """The type of a function's state: int64 values, numbers and addresses."""
    return np.dtype([(name, np.int64) for name in names])


def c_function(state: np.dtype):
    """A decorator that compiles a function of the address of a state to a C function."""
    return cfunc(types.void(types.CPointer(from_dtype(state))))


PRODUCT = state_type(*COUNTERS, "tasks", "rows", "count", "x", "length", "scales", "biases", "out", "activation")


def product_of(
    matrices: Sequence[Rows],
    biases: Sequence[Tensor | None],
    x: Tensor,
    out: Tensor,
    kind: int = STORED,
    activation: int = 0,
) -> tuple[Any, np.ndarray, list[Tensor]]:
    """The function that multiplies the matrices' rows with x, its state, and what to keep in memory as long as these.

    matrices: of one kind and width, GATED two of the same shape; biases: a vector for each matrix, of one type, or
    None; x, out: float32, x arranged, out with room for three more products; activation: a number in `ACTIVATIONS`.
    """
    values = [matrix if isinstance(matrix, Tensor) else matrix.values for matrix in matrices]
    rows, state, dtype = [_rows(each) for each in values], np.zeros(1, PRODUCT), values[0].dtype
    bias_dtype = next((bias.dtype for bias in biases if bias is not None), torch.float32)
    assert all(isinstance(matrix, Tensor) or matrix.columns is None for matrix in matrices)
    scales = [matrix.scales for matrix in matrices if isinstance(matrix, RoundedRows)]
    table = torch.stack(rows, dim=1).flatten() if kind == GATED else torch.cat(rows)
    state["count"], state["length"], state["activation"] = len(table), matrices[0].shape[1], activation
    kept = [torch.cat([table, table[-1:].expand(2 * _R)])]  # the last group is read, and one more asked for
    if any(bias is not None for bias in biases):
        none = [torch.zeros(len(each), dtype=torch.int64) for each in values]
        kept.append(torch.cat([no if b is None else _rows(b) for no, b in zip(none, biases, strict=True)]))
        state["biases"] = kept[1].data_ptr()
    if scales:
        kept.append(torch.stack(scales, dim=1).flatten() if kind == GATED else torch.cat(scales))
        state["scales"] = kept[-1].data_ptr()
    state["rows"], state["x"], state["out"] = kept[0].data_ptr(), x.data_ptr(), out.data_ptr()
    return product(dtype, kind, bias_dtype, evens_first(matrices[0])), state, [*kept, *values, x, out]


def set_tasks(state: np.ndarray, threads: int) -> None:
    """Divides a product's rows for so many threads."""
    state["tasks"] = np.minimum(-(-state["count"] // _R), threads * _TASKS)


def _rows(matrix: Tensor) -> Tensor:
    """The addresses of a matrix's rows or a vector's elements, int64."""
    return matrix.data_ptr() + matrix.element_size() * matrix.stride(0) * torch.arange(len(matrix))


@cache
def product(dtype: torch.dtype, kind: int, bias_dtype: torch.dtype, evens: bool):
    """A function that multiplies rows with arranged inputs x; int8 rows have scales.

    STORED: it stores the products; ADDED: it adds them to `out`; ACTIVATED: it stores act(product), arranged; GATED: of
    pairs of rows it stores act(first) · second, arranged.
    """
    multiply, load, size, load_bias = dots(dtype, 1, _R, _R), element(dtype), dtype.itemsize, element(bias_dtype)

    @njit(nogil=True)
    def multiply_groups(s, first, last, sums):
        x, whole, out = s.x, s.length // STEP, s.out
        for start in range(_R * first, _R * last, _R):
            table = s.rows + 8 * start
            multiply(table, table + 8 * _R, x, 0, whole, sums)
            for i in range(min(_R, s.count - start)):
                total, row = load_float(sums + 4 * i), load_int(table + 8 * i)
                for e in range(STEP * whole, s.length):
                    total += load(row + size * e) * load_float(x + 4 * e)
                if s.scales:
                    total *= load_float(s.scales + 4 * (start + i))
                place = out + 4 * (start + i)
                bias = load_int(s.biases + 8 * (start + i)) if s.biases else 0
                if bias:
                    total += load_bias(bias)
                if kind == STORED:
                    store_float(place, total)
                elif kind == ADDED:
                    store_float(place, load_float(place) + total)
                elif kind == ACTIVATED:
                    value = np.float32(activate(total, s.activation))
                    store_float(out + 4 * arranged_at(start + i, s.count, evens), value)
                elif i % 2 == 0:
                    store_float(sums + 4 * i, total)
                else:
                    value = np.float32(activate(load_float(sums + 4 * (i - 1)), s.activation) * total)
                    store_float(out + 4 * arranged_at((start + i) // 2, s.count // 2, evens), value)

    @c_function(PRODUCT)
    def work(state):
        s, sums = carray(state, 1)[0], np.empty(_R, np.float32)
        counter, groups = carray(state, 1).ctypes.data, (s.count + _R - 1) // _R
        task = next_number(counter)
        while task < s.tasks:
            first, last = task_start(groups, task, s.tasks), task_start(groups, task + 1, s.tasks)
            multiply_groups(s, first, last, sums.ctypes.data)
            task = next_number(counter)

    return work
