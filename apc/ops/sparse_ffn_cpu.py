"""The sparse FFN on the CPU, in numba: one pass over the rows of the kept neurons.

A task takes some of the kept neurons, four at a time for one token. It multiplies their rows of gate and up with the
tokens' inputs, and adds their rows of down, times act(gate) · up, to the task's part of the output. So inputs and
output pass through the cache once for four neurons. While a task reads rows, it asks the memory for the next neurons'
rows of the same matrix, so that the amount on its way stays the same. The task that ends last adds the parts,
always in the same order, so a number of threads gives the same bits each time.

A function is compiled at its first call (some 2 s per type of weights, number of tokens and process). Importing this
module imports numba, so import it only where it is needed.

Shape letters: see `apc.ops`; m kept neurons. Addresses, strides and steps are in bytes unless they say more.
"""

from functools import cache

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from apc.ops._numba import load_byte, load_int, lowest_bit, next_number, on_threads, store_int, task_start
from apc.ops._vectors import (
    LANES,
    STEP,
    VECTOR,
    activate,
    add_floats,
    add_rows,
    arrange,
    arranged_at,
    clear_floats,
    dots,
    element,
    end,
    load_float,
    load_int32,
    store_float,
    store_int32,
)
from apc.ops.ffn_arguments import ACTIVATIONS, FFNWeights
from apc.ops.rounded import addresses, stored_ffn

_SUMS = 4  # neurons × tokens whose sums a loop holds in registers
SCRATCH = 1024  # bytes that a task needs for addresses and sums of these
TASK = 128  # kept neurons that are worth a task
TASKS = 8  # of a thread, at most
# The int64 values that a call passes to its tasks, by place.
STATE = (
    *("next", "ended", "tasks", "gate", "up", "down", "gate_stride", "up_stride", "down_stride", "x", "E"),
    *("neurons", "m", "kept", "parts", "scratch", "output", "activation"),
    *("gate_scales", "up_scales", "down_scales", "columns"),
)
_AT = {name: 8 * index for index, name in enumerate(STATE)}


def sparse_ffn_cpu(hidden: Tensor, weights: FFNWeights, masks: Tensor) -> Tensor:
    """Σ_i kept_i · act(gate_i · x) · (up_i · x) · down_i of each token, float32 [n, E].

    hidden: [n, E], n up to 4, of the weights' type (float32, bfloat16 or float16), whose memory may hold 8 bits; masks:
    packed, uint8 [n, W]. Tokens share the rows that any of them keeps. The caller has checked shapes and types.
    """
    (n, E), D = hidden.shape, len(weights.gate)
    kept = torch.empty((D, n), dtype=torch.float32)
    neurons = torch.empty(D, dtype=torch.int32)
    masks, hidden = masks.contiguous(), hidden.contiguous()
    m = list_kept(masks.data_ptr(), n, masks.shape[1], D, neurons.data_ptr(), kept.data_ptr())
    output = torch.empty((n, E), dtype=torch.float32)
    if m == 0:
        return output.zero_()
    threads = torch.get_num_threads()
    tasks = threads * max(1, min(TASKS, m // (threads * TASK)))
    padded = -(-E // STEP) * STEP
    work = torch.empty((1 + tasks, n, padded), dtype=torch.float32)  # the inputs, and each task's part
    scratch = torch.empty((tasks, SCRATCH), dtype=torch.uint8)
    arrange(hidden.dtype)(hidden.data_ptr(), n, E, padded, work.data_ptr())
    at = addresses(weights) | {"x": work.data_ptr(), "E": E, "m": m}
    at |= {"neurons": neurons.data_ptr(), "kept": kept.data_ptr()}
    at |= {"parts": work[1:].data_ptr(), "scratch": scratch.data_ptr(), "output": output.data_ptr()}
    state = np.array([at.get(name, 0) for name in STATE], np.int64)
    state[STATE.index("tasks")], state[STATE.index("activation")] = tasks, ACTIVATIONS.index(weights.activation)
    rows_dtype = None if stored_ffn(weights) is None else torch.int8
    on_threads(worker(hidden.dtype, n, rows_dtype), state, threads)
    return output


@njit(nogil=True)
def list_kept(masks, n, W, D, neurons, kept):
    """The number m of neurons that any token keeps. Writes them to int32 [m].

    For several tokens it also writes who keeps them, to float32 [m, n].
    """
    count = 0
    for start in range(0, W, 8):
        union = 0
        for token in range(n):
            row = masks + token * W + start
            if start + 8 <= W:
                union |= load_int(row)
            else:
                for byte in range(W - start):
                    union |= load_byte(row + byte) << 8 * byte
        while union:
            neuron = 8 * start + lowest_bit(union)
            union &= union - 1
            if neuron >= D:
                break
            store_int32(neurons + 4 * count, neuron)
            for token in range(n if n > 1 else 0):
                keeps = load_byte(masks + token * W + neuron // 8) >> neuron % 8 & 1
                store_float(kept + 4 * (n * count + token), np.float32(keeps))
            count += 1
    return count


@cache
def worker(dtype: torch.dtype, n: int, rows_dtype: torch.dtype | None = None):
    """A C function that takes tasks from a state until none is left, for a model's type and n tokens.

    rows_dtype: that of the weights, if another; int8 rows have scales.
    """
    R, rows_dtype = max(1, _SUMS // n), rows_dtype or dtype
    multiply, add = dots(rows_dtype, n, 2 * R, 2 * R), add_rows(rows_dtype, n, R, R)
    load, size, scaled = element(rows_dtype), rows_dtype.itemsize, rows_dtype == torch.int8
    evens_first = dtype == torch.bfloat16
    next_at, ended_at, tasks_at, gate_at, up_at, down_at = map(
        _AT.get, ("next", "ended", "tasks", "gate", "up", "down")
    )
    gate_stride_at, up_stride_at, down_stride_at = map(_AT.get, ("gate_stride", "up_stride", "down_stride"))
    x_at, E_at, neurons_at, m_at, kept_at = map(_AT.get, ("x", "E", "neurons", "m", "kept"))
    parts_at, scratch_at, output_at, activation_at = map(_AT.get, ("parts", "scratch", "output", "activation"))
    gate_scales_at, up_scales_at, down_scales_at, columns_at = map(
        _AT.get, ("gate_scales", "up_scales", "down_scales", "columns")
    )

    @njit(nogil=True)
    def point(table, state, first, last):
        """Writes the addresses of the rows of R kept neurons from `first` on; beyond `last` those of the last one."""
        for i in range(R):
            neuron = load_int32(load_int(state + neurons_at) + 4 * min(first + i, last - 1))
            store_int(table + 8 * i, load_int(state + gate_at) + neuron * load_int(state + gate_stride_at))
            store_int(table + 8 * (R + i), load_int(state + up_at) + neuron * load_int(state + up_stride_at))
            store_int(table + 8 * (2 * R + i), load_int(state + down_at) + neuron * load_int(state + down_stride_at))

    @njit(nogil=True)
    def task(state, first, last, out, scratch):
        """Writes the part of the output of the kept neurons `first` to `last` to out, float32 [n, padded]."""
        activation, x, E = load_int(state + activation_at), load_int(state + x_at), load_int(state + E_at)
        kept = load_int(state + kept_at)
        steps, row = E // STEP, 4 * ((E + STEP - 1) // STEP * STEP)
        rows, following, sums = scratch, scratch + 24 * R, scratch + 48 * R
        factors = sums + 8 * R * n
        clear_floats(out, n * row // VECTOR)
        point(rows, state, first, last)
        for start in range(first, last, R):
            if start + R < last:
                point(following, state, start + R, last)
            else:  # the first rows of the task that is likely to be taken next
                m, tasks = load_int(state + m_at), load_int(state + tasks_at)
                point(following, state, task_start(m, min(load_int(state + next_at), tasks), tasks), m)
            multiply(rows, following, x, row, steps, sums)
            for i in range(R):
                gates, ups = load_int(rows + 8 * i), load_int(rows + 8 * (R + i))
                for token in range(n):
                    g, u = load_float(sums + 4 * (n * i + token)), load_float(sums + 4 * (n * (R + i) + token))
                    for e in range(steps * STEP, E):
                        value = load_float(x + token * row + 4 * e)
                        g += load(gates + size * e) * value
                        u += load(ups + size * e) * value
                    keeps = start + i < last and (n == 1 or load_float(kept + 4 * ((start + i) * n + token)) > 0)
                    if scaled:
                        place = 4 * load_int32(load_int(state + neurons_at) + 4 * min(start + i, last - 1))
                        g *= load_float(load_int(state + gate_scales_at) + place)
                        u *= load_float(load_int(state + up_scales_at) + place)
                        u *= load_float(load_int(state + down_scales_at) + place) if keeps else np.float32(0)
                    factor = np.float32(activate(g, activation) * u) if keeps else np.float32(0)
                    store_float(factors + 4 * (n * i + token), factor)
            add(rows + 16 * R, following + 16 * R, factors, out, row, steps)
            for i in range(R):
                downs = load_int(rows + 8 * (2 * R + i))
                for token in range(n):
                    factor = load_float(factors + 4 * (n * i + token))
                    for e in range(steps * STEP, E):
                        place = out + token * row + 4 * e
                        store_float(place, load_float(place) + factor * load(downs + size * e))
            rows, following = following, rows

    @cfunc(types.void(types.intp))
    def work(state):
        tasks, m, E = load_int(state + tasks_at), load_int(state + m_at), load_int(state + E_at)
        columns = load_int(state + columns_at)
        parts, scratch, output = (
            load_int(state + parts_at),
            load_int(state + scratch_at),
            load_int(state + output_at),
        )
        padded = (E + STEP - 1) // STEP * STEP
        number = next_number(state + next_at)
        while number < tasks:
            first, last = task_start(m, number, tasks), task_start(m, number + 1, tasks)
            task(state, first, last, parts + 4 * n * padded * number, scratch + SCRATCH * number)
            if end(state + ended_at) == tasks - 1:
                for other in range(1, tasks):
                    add_floats(parts, parts + 4 * n * padded * other, n * padded // LANES)
                for token in range(n):
                    for e in range(E):
                        place = 4 * arranged_at(e, E, evens_first)
                        value = load_float(parts + 4 * token * padded + place)
                        if scaled:
                            value *= load_float(columns + place)
                        store_float(output + 4 * (token * E + e), value)
            number = next_number(state + next_at)

    return work
