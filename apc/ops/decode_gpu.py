"""A decoding step on a GPU, in Triton: all that lies between a token and its logits.

It covers models of Llama's kind, as `decode_cpu.py` does. A layer takes three kernels and its FFN: the norm with the
products for query, key and value; rotation, the cache and attention, whose programs take shares of the keys; the output
projection. Matrix products read each weight once. With several sequences or sparse FFNs, in half precision from Ampere
to Hopper, they run on tensor cores (`products_sm80.py`). From Hopper on a kernel fetches its first weights before the
kernel before it has ended (EARLY). Nothing waits for the host, so that a CUDA graph can record a step.

Shape letters: see `apc.ops`; R rows of matrices, h heads, d size of a head, S tokens that fit into the cache.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apc.ops import products_sm80
from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.decoder_weights import TYPES, AttentionWeights, DecoderWeights, DenseFFN, Unsupported
from apc.ops.ffn_arguments import OutputDelta
from apc.ops.predict import pdl_options
from apc.ops.rounded import Rows
from apc.ops.sparse_ffn import activate, finish

_HELD = 2**14  # weights that a program of `project` holds
_PROJECT_TILE = {"num_warps": 8}
_ATTEND_TILE = {"KEYS": 32, "num_warps": 8}  # KEYS: that a program reads at a time
_ROWS_TILE = {"ROWS": 32, "COLUMNS": 256, "num_warps": 4, "num_stages": 4}  # of `_rows_kernel`
_PARTS = 32  # into which `_rows_kernel` cuts the rows
_PROGRAMS = 264  # of `project`, at least, if there are as many rows: two on each multiprocessor of a large GPU
_MAX_INPUTS = 2**15
_SHARES = 16  # parts into which the keys of a head are cut; twice as many in a cache of more than `_LONG` tokens
_LONG = 2**12
_GROUP = 16  # rows of a tensor core's product, the most query heads that share a key head


@triton.jit
def _project_kernel(
    x_ptr,  # float [E]
    added_ptr,  # float [E], read if ADDS
    norm_ptr,  # float [E], read if NORM
    matrix_ptr,  # float [first, E]; the others lie `second` and `third` elements behind it
    bias_ptr,  # float32 [R], read if BIAS
    residual_ptr,  # float [R], read if RESIDUAL
    sum_ptr,  # float [E], out if ADDS: x + added
    output_ptr,  # float [R], out
    E,
    R,
    first_rows,
    second_rows,
    second,
    third,
    epsilon,
    ADDS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of a gated FFN's inner values, whose matrices gate and up have R rows each; "": none
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    inside = (row < R)[:, None] & (e < E)[None, :]
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    if ACTIVATION == "":  # rows of the second and third matrix follow those of the first
        both = first_rows + second_rows
        behind = tl.where(row < both, second - first_rows * E, third - both * E)
        at += tl.where(row < first_rows, 0, behind).to(tl.int64)[:, None]
    weights = tl.load(matrix_ptr + at, mask=inside, other=0.0)
    gate = weights
    if ACTIVATION != "":
        weights = tl.load(matrix_ptr + second + at, mask=inside, other=0.0)
    bias = tl.zeros([ROWS], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + row, mask=row < R, other=0.0)
    norm = tl.zeros([BLOCK_E], tl.float32)
    if NORM:
        norm += tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # round where a model rounds
        if tl.program_id(0) == 0:
            tl.store(sum_ptr + e, x.to(x_ptr.dtype.element_ty), mask=e < E)
    scale = 1.0
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / E + epsilon)
        x *= norm
    y = tl.sum(weights.to(tl.float32) * x[None, :], axis=1) * scale + bias
    if ACTIVATION != "":
        y *= activate(tl.sum(gate.to(tl.float32) * x[None, :], axis=1) * scale, ACTIVATION)
    if RESIDUAL:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + row, mask=row < R, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, y.to(output_ptr.dtype.element_ty), mask=row < R)


@triton.jit
def _rotated(x_ptr, head, mask, norm_ptr, cos, sin, epsilon, d: tl.constexpr, HEAD_NORMS: tl.constexpr):
    """Heads [rows, d] from `x_ptr`, normalised and rotated; head: [rows, 1], the place of each."""
    j = tl.arange(0, d)
    other = tl.where(j < d // 2, j + d // 2, j - d // 2)
    x = tl.load(x_ptr + head * d + j[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + head * d + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if HEAD_NORMS:
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / d + epsilon)[:, None]
        x *= scale * tl.load(norm_ptr + j).to(tl.float32)[None, :]
        y *= scale * tl.load(norm_ptr + other).to(tl.float32)[None, :]
    return x * cos[None, :] + tl.where(j < d // 2, -y, y) * sin[None, :]


@triton.jit
def _add_keys(query, keys, values, inside, largest, total, sums, scaling):
    """Adds keys [d, KEYS] and their values [KEYS, d] to a softmax: its largest scores, and sums of exponentials."""
    scores = tl.dot(query, keys, input_precision="ieee") * scaling
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    exponentials, shrink = tl.exp(scores - higher[:, None]), tl.exp(largest - higher)
    total = total * shrink + tl.sum(exponentials, axis=1)
    sums = sums * shrink[:, None] + tl.dot(exponentials.to(values.dtype), values, input_precision="ieee")
    return higher, total, sums


@triton.jit
def _attend_kernel(
    qkv_ptr,  # float [n, (h + 2 · key heads) · d]
    keys_ptr,  # float [n, key heads, S, d], out: the tokens' keys
    values_ptr,  # float [n, key heads, S, d], likewise
    cos_ptr,  # float32 [S, d]
    sin_ptr,  # float32 [S, d]
    query_norm_ptr,  # float [d], read if HEAD_NORMS
    key_norm_ptr,  # float [d], read if HEAD_NORMS
    position_ptr,  # int64 [], of the tokens
    sums_ptr,  # float32 [n, h, shares, d], out: values times exponentials
    ends_ptr,  # float32 [n, h, shares, 2], out: the largest score, and the sum of exponentials
    arrivals_ptr,  # int32 [n, key heads], programs that have ended, modulo SHARES
    output_ptr,  # float [n, h · d], out
    key_heads,
    S,
    scaling,
    epsilon,
    HEAD_NORMS: tl.constexpr,
    EARLY: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # G, rounded up to a power of two
    SHARES: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    place, share = tl.program_id(0), tl.program_id(1)
    n, key_head = place // key_heads, place % key_heads
    j, row, t = tl.arange(0, d), tl.arange(0, GROUP), tl.arange(0, KEYS)
    kind = keys_ptr.dtype.element_ty

    # The position and the cache were written in earlier steps, which have ended: a step begins with a kernel that waits
    # for all of them, as it is not launched early.
    position = tl.load(position_ptr).to(tl.int32)
    each = tl.cdiv(tl.cdiv(position, SHARES), KEYS) * KEYS
    first = tl.minimum(share * each, position)
    last = tl.minimum(first + each, position)
    cos, sin = tl.load(cos_ptr + position * d + j), tl.load(sin_ptr + position * d + j)
    cached = place.to(tl.int64) * S * d
    inside = first + t < last
    keys = tl.load(keys_ptr + cached + (first + t)[None, :] * d + j[:, None], mask=inside[None, :], other=0.0)
    values = tl.load(values_ptr + cached + (first + t)[:, None] * d + j[None, :], mask=inside[:, None], other=0.0)
    if EARLY:
        gdc_wait()

    given_ptr = qkv_ptr + n * (G + 2) * key_heads * d
    head = key_head * G + row
    query = _rotated(given_ptr, head[:, None], (row < G)[:, None], query_norm_ptr, cos, sin, epsilon, d, HEAD_NORMS)
    query = query.to(kind)
    # The token's own key and value, which the last share takes: loaded here, they arrive with the query.
    own = (G * key_heads + key_head + tl.zeros([1], tl.int32))[:, None]
    key = _rotated(given_ptr, own, own >= 0, key_norm_ptr, cos, sin, epsilon, d, HEAD_NORMS)
    key = tl.sum(key, axis=0).to(kind)
    value = tl.load(given_ptr + ((G + 1) * key_heads + key_head) * d + j)
    largest = tl.full([GROUP], -1e30, tl.float32)  # of no keys; as a number, so that a difference is no NaN
    total = tl.zeros([GROUP], tl.float32)
    sums = tl.zeros([GROUP, d], tl.float32)
    largest, total, sums = _add_keys(query, keys, values, inside, largest, total, sums, scaling)
    for start in tl.range(first + KEYS, last, KEYS):
        inside = start + t < last
        keys = tl.load(keys_ptr + cached + (start + t)[None, :] * d + j[:, None], mask=inside[None, :], other=0.0)
        values = tl.load(values_ptr + cached + (start + t)[:, None] * d + j[None, :], mask=inside[:, None], other=0.0)
        largest, total, sums = _add_keys(query, keys, values, inside, largest, total, sums, scaling)
    if share == SHARES - 1:
        tl.store(keys_ptr + cached + position * d + j, key)
        tl.store(values_ptr + cached + position * d + j, value)
        scores = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scaling
        higher = tl.maximum(largest, scores)
        exponentials, shrink = tl.exp(scores - higher), tl.exp(largest - higher)
        total = total * shrink + exponentials
        sums = sums * shrink[:, None] + exponentials[:, None] * value.to(tl.float32)[None, :]
        largest = higher
    first_head = place * G
    to = (first_head + row) * SHARES + share
    tl.store(sums_ptr + to[:, None] * d + j[None, :], sums, mask=(row < G)[:, None])
    tl.store(ends_ptr + 2 * to, largest, mask=row < G)
    tl.store(ends_ptr + 2 * to + 1, total, mask=row < G)

    tl.debug_barrier()  # the arrival of one thread says that all have written
    if tl.atomic_add(arrivals_ptr + place, 1) & (SHARES - 1) == SHARES - 1:  # the last one adds up the shares
        s, g = tl.arange(0, SHARES), tl.arange(0, HEADS)
        real = (g < G)[:, None]
        at = (first_head + g)[:, None] * SHARES + s[None, :]
        most = tl.load(ends_ptr + 2 * at, mask=real, other=0.0, cache_modifier=".cg")
        totals = tl.load(ends_ptr + 2 * at + 1, mask=real, other=1.0, cache_modifier=".cg")
        every = real[:, :, None] & (j >= 0)[None, None, :]
        parts = tl.load(sums_ptr + at[:, :, None] * d + j[None, None, :], mask=every, other=0.0, cache_modifier=".cg")
        factor = tl.exp(most - tl.max(most, axis=1)[:, None])
        output = tl.sum(parts * factor[:, :, None], axis=1) / tl.sum(totals * factor, axis=1)[:, None]
        whole = (first_head + g)[:, None] * d + j[None, :]
        tl.store(output_ptr + whole, output.to(output_ptr.dtype.element_ty), mask=real)


@triton.jit
def _norm_kernel(
    x_ptr,  # float [n, E]
    norm_ptr,  # float [E]
    output_ptr,  # float [n, E], out
    E,
    epsilon,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    first, e = tl.program_id(0) * E, tl.arange(0, BLOCK_E)
    norm = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x = tl.load(x_ptr + first + e, mask=e < E, other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / E + epsilon) * norm
    tl.store(output_ptr + first + e, x.to(output_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def _rows_kernel(
    x_ptr,  # float [n, D]
    rows_ptr,  # float [D, E]
    partial_ptr,  # float32 [parts, n, E], out
    n,
    D,
    E,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    part, parts = tl.program_id(1), tl.num_programs(1)
    e, r, token = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, GROUP)
    each = tl.cdiv(tl.cdiv(D, parts), ROWS) * ROWS
    last = tl.minimum((part + 1) * each, D)
    sums = tl.zeros([GROUP, COLUMNS], tl.float32)
    for start in tl.range(part * each, last, ROWS):
        row = start + r
        inside, real = row < last, (token < n)[:, None]
        x = tl.load(x_ptr + token[:, None] * D + row[None, :], mask=real & inside[None, :], other=0.0)
        at = row.to(tl.int64)[:, None] * E + e[None, :]
        rows = tl.load(rows_ptr + at, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        sums += tl.dot(x, rows, input_precision="ieee")
    to = partial_ptr + (part * n + token)[:, None] * E + e[None, :]
    tl.store(to, sums, mask=(token < n)[:, None] & (e < E)[None, :])


def _by_neuron(down: Rows) -> Tensor | None:
    """A down projection [E, D] as [D, E], if it is stored so, as sparse FFNs do."""
    return down.T if isinstance(down, Tensor) and not down.is_contiguous() and down.T.is_contiguous() else None


class _Attention(NamedTuple):
    """A layer's attention, with its biases joined."""

    weights: AttentionWeights
    bias: Tensor | None  # float32 [R], of query, key and value
    output_bias: Tensor | None  # float32 [E]


class StepGPU:
    """One step of a decoder whose caches hold the earlier tokens of n sequences, all at the same position.

    In place of a layer's FFN there can be a function from [n, E] to [n, E]. A down projection may be stored transposed.
    For CUDA tensors, or CPU tensors under TRITON_INTERPRET=1. Raises Unsupported for weights of several types or whose
    rows aren't contiguous, and for sizes and numbers of sequences that the kernels don't take.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        n, key_heads, *_ = weights.layers[0].attention.keys.shape
        matrices = self._check(weights)
        # Triton's products for one sequence need much of the L1 cache, of which kernels of sparse FFNs leave little.
        sparse = not all(isinstance(layer.ffn, DenseFFN) for layer in weights.layers)
        self._on_tensor_cores = False
        if n > 1 or sparse:
            activations = {layer.ffn.activation for layer in weights.layers if isinstance(layer.ffn, DenseFFN)}
            reason = products_sm80.refusal(n, matrices, activations)
            if reason is not None and n > 1:
                raise Unsupported(reason)
            self._on_tensor_cores = reason is None
        self._weights, self._options = weights, pdl_options(weights.embedding.device)
        self._cos, self._sin = (each.detach().float().contiguous() for each in (weights.cos, weights.sin))
        self._attentions = [self._attention(layer.attention) for layer in weights.layers]
        self._arrivals = torch.zeros((n, key_heads), dtype=torch.int32, device=weights.embedding.device)

    @staticmethod
    def _check(weights: DecoderWeights) -> list[Tensor]:
        """The matrices that products take, [R, E] each. Raises Unsupported for what the kernels don't take."""
        dtype, d = weights.embedding.dtype, weights.cos.shape[1]
        matrices: list[Rows] = [weights.embedding, weights.head, weights.norm]
        for layer in weights.layers:
            attention, ffn = layer.attention, layer.ffn
            matrices += [*attention.projections, attention.keys, attention.values, attention.norm, layer.ffn_norm]
            if isinstance(ffn, DenseFFN):
                rows = _by_neuron(ffn.down)
                matrices += [ffn.gate, ffn.up, ffn.down if rows is None else rows]
        tensors = [each for each in matrices if isinstance(each, Tensor)]
        if dtype not in TYPES or len(tensors) < len(matrices) or any(each.dtype != dtype for each in tensors):
            raise Unsupported("its weights have several types, or one that the kernels don't take")
        if any(not each.is_contiguous() or each.device != weights.embedding.device for each in tensors):
            raise Unsupported("its weights lie on several devices, or their rows aren't contiguous")
        _, key_heads, S, _ = weights.layers[0].attention.keys.shape
        group = weights.layers[0].attention.projections[0].shape[0] // d // key_heads
        if d not in (16, 32, 64, 128, 256) or group > _GROUP:
            raise Unsupported(f"it has heads of size {d}, {group} to a key head")
        if S * d >= 2**31 or max(each.shape[-1] for each in matrices) > _MAX_INPUTS:
            raise Unsupported(f"a matrix has more than {_MAX_INPUTS:,} inputs, or the cache is too long")
        return [each for each in tensors[1:] if each.dim() == 2]

    @staticmethod
    def _attention(weights: AttentionWeights) -> _Attention:
        *biases, output = weights.biases
        sizes = [matrix.shape[0] for matrix in weights.projections[:3]]
        joined = None
        if any(bias is not None for bias in biases):
            each = [torch.zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
            joined = torch.cat([bias.detach().to(weights.norm.device, torch.float32) for bias in each])
        return _Attention(weights, joined, None if output is None else output.detach().float())

    @torch.no_grad()
    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [n, V] after tokens int64 [n, 1] at a position int64 []; writes their keys and values.

        The logits are of the weights' type.
        """
        weights = self._weights
        # Not launched early, as attention reads the cache before it waits.
        residual, added = F.embedding(token[:, 0], weights.embedding), None
        for layer, attention in zip(weights.layers, self._attentions, strict=True):
            qkv, residual = self._project(
                residual, attention.weights.projections[:3], attention.weights.norm, added, attention.bias
            )
            attended = self._attend(qkv, attention.weights, position)
            residual, _ = self._project(
                attended, attention.weights.projections[3:], bias=attention.output_bias, residual=residual
            )
            if isinstance(layer.ffn, DenseFFN):
                gate, up, down, activation = layer.ffn
                inner, _ = self._project(residual, [gate, up], layer.ffn_norm, activation=activation)
                if (rows := _by_neuron(down)) is not None:
                    added = self._add_rows(inner, rows)
                else:
                    (residual, _), added = self._project(inner, [down], residual=residual), None
            else:
                added = self._call(layer.ffn, self._norm(residual, layer.ffn_norm))
        return self._project(residual, [weights.head], weights.norm, added)[0]

    @staticmethod
    def _call(ffn: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return ffn(hidden).contiguous()

    def _project(
        self,
        x: Tensor,
        rows_of: Sequence[Rows],
        norm: Tensor | None = None,
        added: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "",
    ) -> tuple[Tensor, Tensor]:
        """Products of up to three matrices [r, E] with the norm of x + added, one after the other; and x + added."""
        matrices = [each for each in rows_of if isinstance(each, Tensor)]  # all of them, as `_check` ensures
        if self._on_tensor_cores:
            epsilon = self._weights.epsilon
            return products_sm80.products(x, matrices, norm, epsilon, added, bias, residual, activation)
        E, first = x.shape[1], matrices[0]
        R = len(first) if activation else sum(map(len, matrices))
        behind = [(each.data_ptr() - first.data_ptr()) // first.itemsize for each in matrices] + [0, 0]
        sizes = [len(each) for each in matrices] + [0, 0]
        output, sums = x.new_empty((1, R)), x if added is None else torch.empty_like(x)
        block = triton.next_power_of_2(E)
        held = max(1, _HELD // (2 * block if activation else block))
        rows = max(1, min(held, triton.next_power_of_2(R // _PROGRAMS + 1) // 2))
        other = x  # a placeholder that the kernel does not read
        pick = lambda tensor: other if tensor is None else tensor
        with torch.cuda.device_of(x):
            _project_kernel[(triton.cdiv(R, rows),)](
                *(x, pick(added), pick(norm), first, pick(bias), pick(residual), sums, output),
                *(E, R, *sizes[:2], *behind[1:3], self._weights.epsilon),
                ADDS=added is not None,
                NORM=norm is not None,
                BIAS=bias is not None,
                RESIDUAL=residual is not None,
                ACTIVATION=activation,
                ROWS=rows,
                BLOCK_E=block,
                **_PROJECT_TILE,
                **self._options,
            )
        return output, sums

    def _attend(self, qkv: Tensor, weights: AttentionWeights, position: Tensor) -> Tensor:
        """The tokens' attention, [n, h · d]; writes their keys and values into the cache."""
        n, key_heads, S, d = weights.keys.shape
        heads, shares = weights.projections[0].shape[0] // d, 2 * _SHARES if S > _LONG else _SHARES
        sums = qkv.new_empty((n, heads, shares, d), dtype=torch.float32)
        ends = qkv.new_empty((n, heads, shares, 2), dtype=torch.float32)
        output = qkv.new_empty((n, heads * d))
        query_norm, key_norm = weights.head_norms
        with torch.cuda.device_of(qkv):
            _attend_kernel[(n * key_heads, shares)](
                *(qkv, weights.keys, weights.values, self._cos, self._sin),
                *(qkv if query_norm is None else query_norm, qkv if key_norm is None else key_norm),
                *(position, sums, ends, self._arrivals, output),
                *(key_heads, S, self._weights.scaling, self._weights.epsilon),
                HEAD_NORMS=query_norm is not None,
                G=heads // key_heads,
                d=d,
                GROUP=_GROUP,
                HEADS=triton.next_power_of_2(heads // key_heads),
                SHARES=shares,
                **_ATTEND_TILE,
                **self._options,
            )
        return output

    def _add_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """The product of x [n, D] and rows [D, E], [n, E]."""
        (n, D), E = x.shape, rows.shape[1]
        partial = x.new_empty((_PARTS, n, E), dtype=torch.float32)
        with torch.cuda.device_of(x):
            grid = triton.cdiv(E, _ROWS_TILE["COLUMNS"]), _PARTS
            _rows_kernel[grid](x, rows, partial, n, D, E, GROUP=_GROUP, **_ROWS_TILE, **self._options)
        return finish(partial, x.new_empty((n, E)), None, OutputDelta(), self._options)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The RMS norm of x [n, E], in its type."""
        E, output = x.shape[1], torch.empty_like(x)
        with torch.cuda.device_of(x):
            block = triton.next_power_of_2(E)
            _norm_kernel[(len(x),)](
                x, weight, output, E, self._weights.epsilon, BLOCK_E=block, num_warps=8, **self._options
            )
        return output
