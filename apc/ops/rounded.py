"""Matrices rounded to 8 bits, as the kernels for decoding on the CPU read them, and where an FFN's weights are.

Importing this module imports numba.
"""

import contextlib
import math
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops._vectors import arranged_at
from apc.ops.ffn_arguments import FFNWeights, PredictorWeights
from apc.ops.rounded_weight import RoundedRows, RoundedWeight


def rounded_rows(matrix: Tensor, out: Tensor | None = None, by_column: bool = False) -> RoundedRows:
    """A matrix [R, n] rounded to the nearest of 255 multiples of each row's scale, its largest size over 127.

    Elements are in the order of vectors of the matrix's own type, so that inputs need to be arranged only once.
    out: int8 [R, n], where the values go; None: into memory of their own. by_column: whether each column is divided by
    its largest size before.
    """
    n, floats, evens = matrix.shape[1], matrix.detach().float(), evens_first(matrix)
    order, columns = torch.tensor([arranged_at(e, n, evens) for e in range(n)]), None
    tiny = torch.finfo(torch.float32).tiny
    if by_column:
        largest = floats.abs().amax(0).clamp_min(tiny)
        columns = torch.empty(n)
        columns[order], floats = largest, floats / largest
    scales = (floats.abs().amax(1) / 127).clamp_min(tiny)
    values = _in_huge_pages(*matrix.shape) if out is None else out
    values[:, order] = (floats / scales[:, None]).round().to(torch.int8)
    return RoundedRows(values, scales, evens, columns)


def _in_huge_pages(*shape: int) -> Tensor:
    """Uninitialised int8 of this shape, in huge pages where the system gives them.

    Half of an FFN's neurons are then read 3 % faster, all of them 2 %.
    """
    memory = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a Linux without huge pages refuses the advice
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int8).view(shape)


Rows = Tensor | RoundedRows


def rows_of(weight: Tensor) -> Rows:
    """A model's weight as the kernels take it."""
    return weight.rows if isinstance(weight, RoundedWeight) else weight.detach()


def evens_first(rows: Rows) -> bool:
    """How the elements of a step are ordered in inputs of these rows."""
    return rows.evens_first if isinstance(rows, RoundedRows) else rows.dtype == torch.bfloat16


class RoundedFFN(NamedTuple):
    """The matrices of a gated FFN at 8 bits, all [D, E]."""

    gate: RoundedRows
    up: RoundedRows
    down: RoundedRows
    activation: str


def rounded_ffn(weights: FFNWeights | RoundedFFN) -> RoundedFFN:
    """The FFN's matrices rounded to 8 bits; those that are stored so already as they are.

    Columns of down have factors of their own: a neuron's row there has a few large weights, and without these factors
    the step between two values of the row would be too wide for the others.

    A neuron's three rows are next to each other in memory: reading half of the neurons then takes 5 % less time than
    from three matrices, because there are a third as many places to go to.
    """
    if (stored := stored_ffn(weights)) is not None:
        return stored
    assert isinstance(weights, FFNWeights)  # `stored_ffn` returns others
    D, E = weights.gate.shape
    values = _in_huge_pages(D, 3, E)
    matrices = weights.gate, weights.up, weights.down
    gate, up, down = (rounded_rows(matrix, values[:, i], i == 2) for i, matrix in enumerate(matrices))
    return RoundedFFN(gate, up, down, weights.activation)


def stored_ffn(weights: FFNWeights | RoundedFFN) -> RoundedFFN | None:
    """The FFN's matrices if their memory holds 8 bits; else None."""
    if isinstance(weights, RoundedFFN):
        return weights
    gate, up, down, activation = weights
    if isinstance(gate, RoundedWeight) and isinstance(up, RoundedWeight) and isinstance(down, RoundedWeight):
        return RoundedFFN(gate.rows, up.rows, down.rows, activation)
    return None


def rounded_weight(weight: Tensor) -> RoundedWeight:
    """A weight stored at 8 bits; one that is stored so already as it is."""
    return weight if isinstance(weight, RoundedWeight) else RoundedWeight(rounded_rows(weight), weight.dtype)


def rounded_predictor(weights: PredictorWeights) -> PredictorWeights:
    """A predictor whose matrices are stored at 8 bits."""
    reduce, reduce_bias, expand, expand_bias = weights
    return PredictorWeights(rounded_weight(reduce), reduce_bias, rounded_weight(expand), expand_bias)


def addresses(weights: FFNWeights | RoundedFFN) -> dict[str, int]:
    """What a state holds of an FFN's weights: addresses of gate, up and down, strides, and addresses of factors."""
    found: dict[str, int] = {}
    weights = stored_ffn(weights) or weights
    for name, matrix in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
        values = matrix if isinstance(matrix, Tensor) else matrix.values
        found |= {name: values.data_ptr(), f"{name}_stride": values.element_size() * values.stride(0)}
        if isinstance(matrix, RoundedRows):
            found[f"{name}_scales"] = matrix.scales.data_ptr()
            if matrix.columns is not None:
                found["columns"] = matrix.columns.data_ptr()
    return found
