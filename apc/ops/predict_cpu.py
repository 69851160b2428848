"""Predicts each token's cluster on the CPU, in numba: `apc.ops.predict_clusters` without torch's overhead.

Importing this module imports numba. Shape letters: see `apc.ops`.
"""

import threading
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from apc.ops._products import ACTIVATED, c_function, product_of, set_tasks, state_type
from apc.ops._program import Program
from apc.ops._vectors import LANES, STEP, arranged_at, dot_floats, element, load_float, store_float
from apc.ops.ffn_arguments import ACTIVATIONS, EPSILON, Candidates, Prediction, PredictorWeights
from apc.ops.rounded import evens_first, rows_of

_BEGIN = state_type("hidden", "E", "x")


class PredictorCPU:
    """One layer's predictor. weights: reduce and expand of one type, float32, bfloat16 or float16, or at 8 bits.

    dtype: the type of the inputs. inner: the bottleneck, arranged, float32 [padded H]; logits: float32 [padded K].
    """

    def __init__(self, weights: PredictorWeights, dtype: torch.dtype) -> None:
        reduce_rows, expand_rows = rows_of(weights.reduce), rows_of(weights.expand)
        (H, E), K, evens = reduce_rows.shape, expand_rows.shape[0], evens_first(reduce_rows)
        padded = lambda count: -(-count // STEP) * STEP
        x, self.inner, self.logits = torch.zeros(padded(E)), torch.zeros(padded(H)), torch.zeros(padded(K))
        self._order = torch.tensor([arranged_at(h, H, evens) for h in range(H)])
        self._begin = np.zeros(1, _BEGIN)
        self._begin["E"], self._begin["x"] = E, x.data_ptr()
        silu = ACTIVATIONS.index("silu")
        reduce = product_of([reduce_rows], [weights.reduce_bias], x, self.inner, ACTIVATED, silu)
        expand = product_of([expand_rows], [weights.expand_bias], self.inner, self.logits)
        self._functions, self._products = (_begin(dtype, evens), reduce[0], expand[0]), (reduce[1], expand[1])
        self._kept = [weights, reduce, expand]
        self._K, self._threads, self._lock, self._program = K, 0, threading.Lock(), Program()
        self.add_to(self._program)

    def add_to(self, program: Program, hidden: Tensor | None = None) -> None:
        """Appends the functions to a program; they read FFN inputs [1, E] there, and write `inner` and `logits`."""
        if hidden is not None:
            self._begin["hidden"] = hidden.data_ptr()
        program.add(self._functions[0], self._begin.view(np.int64))
        for function, state in zip(self._functions[1:], self._products, strict=True):
            program.add(function, state.view(np.int64), on_all=True)

    def prepare(self, threads: int) -> None:
        """Sets the number of threads for the calls to come."""
        if threads != self._threads:
            self._threads = threads
            for state in self._products:
                set_tasks(state, threads)

    def __call__(self, hidden: Tensor) -> Prediction:
        """As `predict_clusters`, with one candidate a token, for hidden [n, E]. Of NaN it makes some cluster."""
        threads, hidden = torch.get_num_threads(), hidden.contiguous()
        inner, logits, clusters = [], [], []
        with self._lock:  # calls from several of Python's threads share the buffers
            self.prepare(threads)
            for row in hidden:
                self._begin["hidden"] = row.data_ptr()
                self._program.run(threads)
                best = int(self.logits.numpy()[: self._K].argmax())
                inner.append(self.inner[self._order])
                clusters.append([best])
                logits.append([self.logits[best].item()])
        return Prediction(
            torch.stack(inner), Candidates(torch.tensor(logits), torch.tensor(clusters, dtype=torch.int32))
        )


@cache
def _begin(dtype: torch.dtype, evens: bool):
    """A function that writes inputs of one type, divided by their root mean square, arranged for the predictor."""
    load, size = element(dtype), dtype.itemsize

    @c_function(_BEGIN)
    def begin(state):
        s = carray(state, 1)[0]
        hidden, x, E = s.hidden, s.x, s.E
        for e in range(E):
            store_float(x + 4 * arranged_at(e, E, evens), load(hidden + size * e))
        vectors = (E + LANES - 1) // LANES
        scale = np.float32(1.0 / np.sqrt(dot_floats(x, x, vectors) / E + EPSILON))
        for e in range(E):
            store_float(x + 4 * e, load_float(x + 4 * e) * scale)

    return begin
