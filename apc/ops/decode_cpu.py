"""A decoding step of one token on the CPU, in numba: all that lies between the token and its logits.

It covers models of Llama's kind: RMS norms before attention and FFN, rotary embeddings, heads that share keys, a gated
FFN. The step is a list of small functions (`_program.py`): a norm, a product of a matrix's rows with a vector,
attention. Each reads its weights once, on all threads. Between them the values are float32; what a norm gives is
rounded to the weights' type, as in transformers. In place of a layer's FFN there can be the calls of a sparse one, or
any Python function.

A function is compiled at its first use (4 s together). Importing this module imports numba.

Shape letters: see `apc.ops`; R rows of a matrix, h heads, d size of a head, S tokens that fit into the cache. Addresses
and strides are in bytes unless they say more.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from apc.ops._numba import load_int, next_number, store_int
from apc.ops._products import ADDED, COUNTERS, GATED, c_function, product_of, set_tasks, state_type
from apc.ops._program import Program
from apc.ops._vectors import (
    LANES,
    STEP,
    add_rows,
    arranged_at,
    clear_floats,
    dot_floats,
    dots,
    element,
    exponentials,
    load_float,
    store_element,
    store_float,
)
from apc.ops.cluster_ffn_cpu import ClusterCall, ClusterFFN
from apc.ops.decoder_weights import TYPES, AttentionWeights, DecoderWeights, DenseFFN, Unsupported
from apc.ops.ffn_arguments import ACTIVATIONS, FFNWeights
from apc.ops.rounded import RoundedFFN, Rows, evens_first, rows_of
from apc.ops.staged_ffn_cpu import StagedCall, StagedCPU

_R = 4  # rows that are read together
_HEADS = 4  # query heads of a key head whose attention is computed together, at most


_CACHE = ("cell", "d", "heads", "key_heads", "keys", "values", "head_stride", "token_stride", "numbers", "queries")
_EMBED = state_type("cell", "rows", "stride", "scales", "E", "out")
_NORM = state_type("residual", "delta", "weight", "numbers", "E", "hidden", "x")
_ROTATE = state_type(*_CACHE, "qkv", "cos", "sin", "query_norm", "key_norm")
_ATTEND = state_type(*COUNTERS, *_CACHE, "scores", "row", "out")


class StagedFFN(NamedTuple):
    """A staged FFN with its weights."""

    staged: StagedCPU
    weights: FFNWeights | RoundedFFN


AnyFFN = DenseFFN | StagedFFN | ClusterFFN | Callable[[Tensor], Tensor]  # a function maps [1, E] to [1, E]


class StepCPU:
    """One step of a decoder whose caches hold the earlier tokens.

    Raises Unsupported for weights of several types, outside the process's own memory or whose rows aren't contiguous,
    and for heads whose size isn't a multiple of 32.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights, dtype = weights, weights.embedding.dtype
        V, E = weights.embedding.shape
        d = weights.cos.shape[1]
        self._check(dtype, d)
        self._kept: list[Tensor] = []  # what the states have the addresses of
        self._shared: list[np.ndarray] = []  # states whose tasks depend on the number of threads
        self._staged: list[tuple[StagedCall, FFNWeights | RoundedFFN]] = []
        self._threads, self._lock, self._dtype = 0, threading.Lock(), dtype
        # Token and position, then what the functions pass on.
        self._cell = np.zeros(2, np.int64)
        self._numbers = self._keep(torch.tensor([weights.epsilon, weights.scaling], dtype=torch.float32))
        self._cos, self._sin = (self._keep(each.detach().float().contiguous()) for each in (weights.cos, weights.sin))
        self._residual, self._x = self._floats(E), self._floats(E)
        self._hidden, self._output = (self._keep(torch.zeros(1, E, dtype=dtype)) for _ in range(2))
        self.logits = self._keep(torch.zeros(1, -(-V // _R) * _R))
        # Programs, and between them Python functions that take `_hidden` and fill `_output`.
        self._parts: list[Program | Callable[[Tensor], Tensor]] = [Program()]
        self._add_embedding(rows_of(weights.embedding), E)
        delta: Tensor | None = None
        self._clusters = {
            number: ClusterCall(layer.ffn, dtype)
            for number, layer in enumerate(weights.layers)
            if isinstance(layer.ffn, ClusterFFN)
        }
        for number, layer in enumerate(weights.layers):
            self._add_norm(layer.attention.norm, delta)
            self._add_attention(layer.attention, d)
            self._add_norm(layer.ffn_norm, None)
            for call in self._clusters.values():
                if call.source == number:
                    call.decide(self._program, self._hidden)
            delta = self._add_ffn(number, layer.ffn)
        self._add_norm(weights.norm, delta)
        self._add_product([weights.head], [None], self._x, self.logits)
        self.logits = self.logits[:, :V]

    def __call__(self, token: int, position: int) -> Tensor:
        """The logits float32 [1, V] after a token, whose key and value go into the caches at this position.

        The next step overwrites them. Raises IndexError for a token that the model doesn't have, and for a position
        beyond the caches.
        """
        vocabulary, length = len(self._weights.embedding), len(self._weights.cos)
        for name, value, count in (("token", token, vocabulary), ("position", position, length)):
            if not 0 <= value < count:
                raise IndexError(f"{name} {value} is not below {count}")
        threads = torch.get_num_threads()
        with self._lock:
            if threads != self._threads:
                self._make_tasks(threads)
            self._cell[:] = token, position
            for part in self._parts:
                if isinstance(part, Program):
                    part.run(threads)
                else:
                    self._output.copy_(part(self._hidden))
        return self.logits

    def _check(self, dtype: torch.dtype, d: int) -> None:
        matrices: list[Rows] = [rows_of(self._weights.embedding), self._weights.norm, self._weights.head]
        for layer in self._weights.layers:
            attention, ffn = layer.attention, layer.ffn
            matrices += [*attention.projections, attention.keys, attention.values, attention.norm, layer.ffn_norm]
            matrices += [each for each in (*attention.biases, *attention.head_norms) if each is not None]
            matrices += [ffn.gate, ffn.up, ffn.down] if isinstance(ffn, DenseFFN) else []
        tensors = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        kinds = {tensor.dtype for tensor in tensors}
        if kinds != {dtype} or dtype not in TYPES:
            raise Unsupported(f"weights of type {', '.join(sorted(map(str, kinds)))}")
        if any(tensor.stride(-1) != 1 for tensor in tensors):
            raise Unsupported("weights whose rows are not contiguous")
        plain = (Tensor, torch.nn.Parameter)  # others, as torchao's, only look like tensors
        if any(type(each) not in plain or each.device.type != "cpu" or not each.data_ptr() for each in tensors):
            raise Unsupported("weights that are not in the CPU's memory as plain tensors")
        if d % STEP:
            raise Unsupported(f"heads of size {d}, which is not a multiple of {STEP}")

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _floats(self, count: int) -> Tensor:
        """Zeros float32 [count], padded to whole steps."""
        return self._keep(torch.zeros(-(-count // STEP) * STEP))

    def _add(self, function, kind: np.dtype, **values: int | Tensor | None) -> np.ndarray:
        """Appends a function with a state of these values; a tensor stands for its address, None for 0."""
        state = np.zeros(1, kind)
        for name, value in values.items():
            state[name] = value.data_ptr() if isinstance(value, Tensor) else value or 0
        self._program.add(function, state.view(np.int64), on_all=kind.names is not None and "next" in kind.names)
        return state

    @property
    def _program(self) -> Program:
        program = self._parts[-1]
        assert isinstance(program, Program)
        return program

    def _add_embedding(self, rows: Rows, E: int) -> None:
        """`_residual` becomes the token's row."""
        values, scales = (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scales)
        self._add(
            _embed(values.dtype, scales is not None and evens_first(rows)), _EMBED, cell=self._cell.ctypes.data,
            rows=values, stride=values.element_size() * values.stride(0), scales=scales, E=E, out=self._residual,
        )  # fmt: skip

    def _add_norm(self, weight: Tensor, delta: Tensor | None) -> None:
        """`_residual` += delta; `_hidden` and `_x` get its norm times the weight."""
        self._add(
            _norm(self._dtype), _NORM, residual=self._residual, delta=delta, weight=weight,
            numbers=self._numbers, E=len(weight), hidden=self._hidden, x=self._x,
        )  # fmt: skip

    def _add_product(self, *given: Any) -> None:
        """Appends the function that `product_of` makes of these arguments."""
        function, state, kept = product_of(*given)
        self._kept += kept
        self._program.add(function, state.view(np.int64), on_all=True)
        self._shared.append(state)

    def _add_attention(self, weights: AttentionWeights, d: int) -> None:
        """`_residual` += attention of `_x`."""
        *inner, out = weights.projections
        *inner_biases, out_bias = weights.biases
        (sequences, key_heads, S, _), heads = weights.keys.shape, inner[0].shape[0] // d
        if sequences > 1:
            raise Unsupported(f"there are {sequences} sequences at once")
        qkv, attended = self._floats((heads + 2 * key_heads) * d), self._floats(heads * d)
        group = heads // key_heads
        n = max(count for count in range(1, _HEADS + 1) if group % count == 0)
        queries, scores = self._floats(heads * d), self._keep(torch.zeros(heads, -(-S // LANES) * LANES + LANES))
        place: dict[str, int | Tensor] = {
            "cell": self._cell.ctypes.data,
            "d": d,
            "heads": heads,
            "key_heads": key_heads,
        }
        place |= {"numbers": self._numbers, "queries": queries}
        size = self._dtype.itemsize
        caches: dict[str, int | Tensor] = {"keys": weights.keys, "values": weights.values}
        caches |= {"head_stride": size * weights.keys.stride(1), "token_stride": size * weights.keys.stride(2)}
        assert weights.keys.stride() == weights.values.stride()
        self._add_product(inner, inner_biases, self._x, qkv)
        self._add(
            _rotate(self._dtype), _ROTATE, **place, **caches, qkv=qkv, cos=self._cos, sin=self._sin,
            query_norm=weights.head_norms[0], key_norm=weights.head_norms[1],
        )  # fmt: skip
        self._add(
            _attend(self._dtype, n), _ATTEND, **place, **caches, scores=scores, row=4 * scores.shape[1], out=attended
        )
        self._add_product([out], [out_bias], attended, self._residual, ADDED)

    def _add_ffn(self, number: int, ffn: AnyFFN) -> Tensor | None:
        """Appends an FFN. Returns what the next norm is to add to `_residual`, if this FFN doesn't do it."""
        if isinstance(ffn, DenseFFN):
            active = self._floats(ffn.gate.shape[0])
            self._add_product(
                [ffn.gate, ffn.up], [None, None], self._x, active, GATED, ACTIVATIONS.index(ffn.activation)
            )
            self._add_product([ffn.down], [None], active, self._residual, ADDED)
            return None
        if isinstance(ffn, ClusterFFN):
            self._clusters[number].compute(self._program, self._x, self._residual)
            return None
        if isinstance(ffn, StagedFFN):
            call = StagedCall(ffn.staged, torch.int8 if isinstance(ffn.weights, RoundedFFN) else None)
            call.point_at(self._hidden, self._output)
            call.add_to(self._program)
            self._staged.append((call, ffn.weights))
        else:
            self._parts += [ffn, Program()]
        return self._output

    def _make_tasks(self, threads: int) -> None:
        self._threads = threads
        for call, weights in self._staged:
            call.prepare(weights, threads)
        for cluster_call in self._clusters.values():
            cluster_call.prepare(threads)
        for state in self._shared:
            set_tasks(state, threads)


@cache
def _embed(dtype: torch.dtype, evens: bool):
    """A function that copies a token's row of the embedding; int8 rows have scales, and evens first."""
    load, size = element(dtype), dtype.itemsize

    @c_function(_EMBED)
    def embed(state):
        s = carray(state, 1)[0]
        token = load_int(s.cell)
        row, scale = s.rows + token * s.stride, load_float(s.scales + 4 * token) if s.scales else np.float32(1)
        for e in range(s.E):
            store_float(s.out + 4 * e, load(row + size * arranged_at(e, s.E, evens)) * scale)

    return embed


@cache
def _norm(dtype: torch.dtype):
    """A function that adds to the residual, and writes its norm in the weights' type, and arranged as float32."""
    load, store, size, evens_first = element(dtype), store_element(dtype), dtype.itemsize, dtype == torch.bfloat16

    @c_function(_NORM)
    def norm(state):
        s = carray(state, 1)[0]
        residual, weight, hidden, x, E = s.residual, s.weight, s.hidden, s.x, s.E
        if s.delta:
            for e in range(E):
                store_float(residual + 4 * e, load_float(residual + 4 * e) + load(s.delta + size * e))
        square = dot_floats(residual, residual, (E + LANES - 1) // LANES)
        scale = np.float32(1.0 / np.sqrt(square / E + load_float(s.numbers)))
        for e in range(E):
            store(hidden + size * e, load_float(residual + 4 * e) * scale * load(weight + size * e))
            store_float(x + 4 * arranged_at(e, E, evens_first), load(hidden + size * e))

    return norm


@cache
def _rotate(dtype: torch.dtype):
    """A function that normalises and rotates queries and keys, and writes keys and values into the cache."""
    load, store, size, evens_first = element(dtype), store_element(dtype), dtype.itemsize, dtype == torch.bfloat16

    @njit(nogil=True)
    def normalise(head, d, weight, epsilon):
        square = np.float32(0)
        for j in range(d):
            square += load_float(head + 4 * j) * load_float(head + 4 * j)
        scale = np.float32(1.0 / np.sqrt(square / d + epsilon))
        for j in range(d):
            store_float(head + 4 * j, load_float(head + 4 * j) * scale * load(weight + size * j))

    @njit(nogil=True)
    def rotate(head, d, cos, sin):
        for j in range(d // 2):
            other = j + d // 2
            a, b = load_float(head + 4 * j), load_float(head + 4 * other)
            store_float(head + 4 * j, a * load_float(cos + 4 * j) - b * load_float(sin + 4 * j))
            store_float(head + 4 * other, b * load_float(cos + 4 * other) + a * load_float(sin + 4 * other))

    @c_function(_ROTATE)
    def work(state):
        s = carray(state, 1)[0]
        position, d, heads, key_heads = load_int(s.cell + 8), s.d, s.heads, s.key_heads
        angles, place, epsilon = 4 * d * position, s.token_stride * position, load_float(s.numbers)
        for head in range(heads + key_heads):
            own, weight = s.qkv + 4 * d * head, s.query_norm if head < heads else s.key_norm
            if weight:
                normalise(own, d, weight, epsilon)
            rotate(own, d, s.cos + angles, s.sin + angles)
            for j in range(d):
                value = load_float(own + 4 * j)
                if head < heads:
                    store_float(s.queries + 4 * (d * head + arranged_at(j, d, evens_first)), value)
                else:
                    store(s.keys + s.head_stride * (head - heads) + place + size * j, value)
        for head in range(key_heads):
            own, target = s.qkv + 4 * d * (heads + key_heads + head), s.values + s.head_stride * head + place
            for j in range(d):
                store(target + size * j, load_float(own + 4 * j))

    return work


@cache
def _attend(dtype: torch.dtype, n: int):
    """A function that computes the attention of one token, arranged; a task takes n heads that share a key head."""
    multiply, add = dots(dtype, n, _R, _R), add_rows(dtype, n, _R, _R)

    @njit(nogil=True)
    def point(table, rows, stride, start, count):
        """Writes the addresses of _R rows from `start` on; beyond `count` those of the last one."""
        for i in range(_R):
            store_int(table + 8 * i, rows + stride * min(start + i, count - 1))

    @njit(nogil=True)
    def weigh(query, keys, stride, count, d, scaling, scores, row, table, parts, totals):
        """Writes the softmax of n rows of scores, without the division by the sums, which go to totals."""
        ahead, vectors = table + 8 * _R, (count + LANES - 1) // LANES
        point(table, keys, stride, 0, count)
        for start in range(0, count, _R):
            point(ahead, keys, stride, start + _R, count)
            multiply(table, ahead, query, 4 * d, d // STEP, parts)
            for i in range(_R):
                for q in range(n):
                    place = scores + row * q + 4 * (start + i)
                    store_float(place, load_float(parts + 4 * (n * i + q)) * scaling)
            table, ahead = ahead, table
        for q in range(n):
            own, largest = scores + row * q, np.float32(-np.inf)
            for j in range(count):
                largest = max(largest, load_float(own + 4 * j))
            for j in range(count, LANES * vectors):
                store_float(own + 4 * j, np.float32(-np.inf))
            store_float(totals + 4 * q, exponentials(own, largest, vectors))

    @njit(nogil=True)
    def mix(scores, row, totals, values, stride, count, d, table, parts, out):
        """Writes the values' means, weighted by n rows of scores."""
        ahead = table + 8 * _R
        clear_floats(out, n * d // LANES)
        point(table, values, stride, 0, count)
        for start in range(0, count, _R):
            point(ahead, values, stride, start + _R, count)
            for i in range(_R):
                for q in range(n):
                    factor = load_float(scores + row * q + 4 * (start + i)) if start + i < count else np.float32(0)
                    store_float(parts + 4 * (n * i + q), factor)
            add(table, ahead, parts, out, 4 * d, d // STEP)
            table, ahead = ahead, table
        for q in range(n):
            for j in range(d):
                place = out + 4 * (d * q + j)
                store_float(place, load_float(place) / load_float(totals + 4 * q))

    @c_function(_ATTEND)
    def work(state):
        s, tables, counter = carray(state, 1)[0], np.empty(2 * _R, np.int64), carray(state, 1).ctypes.data
        floats = np.empty((_R + 1) * n, np.float32)
        table, parts = tables.ctypes.data, floats.ctypes.data
        totals, group = parts + 4 * _R * n, s.heads // s.key_heads
        count, d, stride, scaling = load_int(s.cell + 8) + 1, s.d, s.token_stride, load_float(s.numbers + 4)
        task = next_number(counter)
        while n * task < s.heads:
            head, first = n * task, s.head_stride * (n * task // group)
            query, out, scores = s.queries + 4 * d * head, s.out + 4 * d * head, s.scores + s.row * head
            weigh(query, s.keys + first, stride, count, d, scaling, scores, s.row, table, parts, totals)
            mix(scores, s.row, totals, s.values + first, stride, count, d, table, parts, out)
            task = next_number(counter)

    return work
