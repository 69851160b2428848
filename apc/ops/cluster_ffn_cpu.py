"""A layer of a decoding step on the CPU whose FFN runs under the mask of a predicted cluster, in numba.

Importing this module imports numba. Shape letters: see `apc.ops`; m kept neurons.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from apc.ops import sparse_ffn_cpu as flat
from apc.ops._numba import load_int, store_int
from apc.ops._products import ADDED, c_function, product_of, set_tasks, state_type
from apc.ops._program import Program
from apc.ops._vectors import LANES, STEP, add_floats, clear_floats, load_float, store_float
from apc.ops.ffn_arguments import ACTIVATIONS, FFNWeights, PredictorWeights
from apc.ops.predict_cpu import PredictorCPU
from apc.ops.rounded import RoundedFFN, addresses

_CHOOSE = state_type("logits", "K", "masks", "W", "D", "neurons", "worker", "threads", "output", "E", "cluster")
_FINISH = state_type("residual", "output", "E", "offsets", "cluster")


class ClusterFFN(NamedTuple):
    """What decides a layer's FFN and what is added to its output; without predictor and masks it reads all neurons."""

    weights: FFNWeights | RoundedFFN
    predictor: PredictorWeights | None = None  # reduce and expand of one type, or at 8 bits
    masks: Tensor | None = None  # uint8 [K, W]
    correct: tuple[Tensor, Tensor] | None = None  # [H, E] of reduce's type and float32 [E]
    offsets: Tensor | None = None  # float32 [K, E]
    source: int = 0  # the layer whose FFN input decides


class ClusterCall:
    """A layer's call for one token, with buffers of its own; its functions go into a program."""

    def __init__(self, ffn: ClusterFFN, dtype: torch.dtype) -> None:
        """dtype: the model's."""
        D, E = ffn.weights.gate.shape
        self._ffn, self._dtype, self.source = ffn, dtype, ffn.source
        self._predictor = None if ffn.predictor is None else PredictorCPU(ffn.predictor, dtype)
        self._padded = -(-E // STEP) * STEP
        self._output, self._cluster = torch.zeros(self._padded), np.zeros(1, np.int64)
        self._neurons = torch.arange(D, dtype=torch.int32)
        self._x = torch.zeros(self._padded)
        self._choose, self._state = np.zeros(1, _CHOOSE), np.zeros(len(flat.STATE), np.int64)
        self._products: list[np.ndarray] = []
        self._alive: list[object] = []

    def decide(self, program: Program, hidden: Tensor) -> None:
        """Appends the choice of the cluster by an FFN input [1, E] and the listing of its neurons."""
        ffn, (D, E), choose = self._ffn, self._ffn.weights.gate.shape, self._choose
        if self._predictor is None or ffn.masks is None:
            return
        self._predictor.add_to(program, hidden)
        values = {"logits": self._predictor.logits, "masks": ffn.masks, "neurons": self._neurons}
        for name, tensor in (values | {"output": self._output}).items():
            choose[name] = tensor.data_ptr()
        choose["K"], choose["W"], choose["D"], choose["E"] = len(ffn.masks), ffn.masks.shape[1], D, E
        choose["worker"], choose["cluster"] = self._state.ctypes.data, self._cluster.ctypes.data
        program.add(_choose(), choose.view(np.int64))

    def compute(self, program: Program, x: Tensor, residual: Tensor) -> None:
        """Appends the FFN of arranged inputs x, whose output is added to the residual; both float32 [padded]."""
        ffn, weights, E = self._ffn, self._ffn.weights, self._ffn.weights.gate.shape[1]
        self._set(**addresses(weights))
        self._set(x=x.data_ptr(), E=E, neurons=self._neurons.data_ptr())
        self._set(output=self._output.data_ptr(), activation=ACTIVATIONS.index(weights.activation))
        rows_dtype = torch.int8 if isinstance(weights, RoundedFFN) else None
        program.add(flat.worker(self._dtype, 1, rows_dtype), self._state, on_all=True)
        if ffn.correct is not None and self._predictor is not None:
            correct, bias = ffn.correct
            rows = correct.T.contiguous()
            function, state, kept = product_of([rows], [bias], self._predictor.inner, residual, ADDED)
            program.add(function, state.view(np.int64), on_all=True)
            self._products.append(state)
            self._alive += [rows, kept]
        finish = np.zeros(1, _FINISH)
        finish["residual"], finish["output"], finish["E"] = residual.data_ptr(), self._output.data_ptr(), E
        finish["offsets"] = 0 if ffn.offsets is None else ffn.offsets.data_ptr()
        finish["cluster"] = self._cluster.ctypes.data
        program.add(_finish(), finish.view(np.int64))

    def prepare(self, threads: int) -> None:
        """Sets the number of threads for the calls to come."""
        if self._predictor is None:
            D = self._ffn.weights.gate.shape[0]
            self._set(m=D, tasks=threads * max(1, min(flat.TASKS, D // (threads * flat.TASK))))
        else:
            self._predictor.prepare(threads)
        for state in self._products:
            set_tasks(state, threads)
        tasks = threads * flat.TASKS
        parts, scratch = torch.zeros(tasks, self._padded), torch.zeros(tasks, flat.SCRATCH, dtype=torch.uint8)
        self._set(parts=parts.data_ptr(), scratch=scratch.data_ptr())
        self._choose["threads"], self._buffers = threads, (parts, scratch)

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._state[flat.STATE.index(name)] = value


@cache
def _choose():
    """A function that takes the cluster with the largest logit, and lists its neurons for the FFN's tasks."""
    m_at, tasks_at = (8 * flat.STATE.index(name) for name in ("m", "tasks"))

    @c_function(_CHOOSE)
    def choose(state):
        s, best = carray(state, 1)[0], 0
        largest = load_float(s.logits)
        for k in range(1, s.K):
            logit = load_float(s.logits + 4 * k)
            if logit > largest:
                largest, best = logit, k
        store_int(s.cluster, best)
        m = flat.list_kept(s.masks + best * s.W, 1, s.W, s.D, s.neurons, 0)
        store_int(s.worker + m_at, m)
        tasks = s.threads * max(1, min(flat.TASKS, m // (s.threads * flat.TASK)))
        store_int(s.worker + tasks_at, tasks if m else 0)
        if m == 0:
            clear_floats(s.output, (s.E + LANES - 1) // LANES)

    return choose


@cache
def _finish():
    """A function that adds the FFN's output and the cluster's offset to the residual."""

    @c_function(_FINISH)
    def finish(state):
        s = carray(state, 1)[0]
        offset = s.offsets + 4 * s.E * load_int(s.cluster) if s.offsets else 0
        vectors = s.E // LANES
        add_floats(s.residual, s.output, vectors)
        if offset:
            add_floats(s.residual, offset, vectors)
        for e in range(vectors * LANES, s.E):
            value = load_float(s.residual + 4 * e) + load_float(s.output + 4 * e)
            store_float(s.residual + 4 * e, value + load_float(offset + 4 * e) if offset else value)

    return finish
