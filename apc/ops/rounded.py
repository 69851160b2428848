"""Matrices rounded to 8 bits, as the kernels for decoding on the CPU read them, and where an FFN's weights are.

Importing this module imports numba.
"""

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops._vectors import arranged_at
from apc.ops.ffn_arguments import FFNWeights


@dataclass(frozen=True)
class RoundedRows:
    """A matrix whose rows are rounded to 8 bits."""

    values: Tensor  # int8 [R, n]
    scales: Tensor  # float32 [R]
    evens_first: bool  # how the elements of a step are ordered

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.values.shape


def rounded_rows(matrix: Tensor, out: Tensor | None = None) -> RoundedRows:
    """A matrix [R, n] rounded to the nearest of 255 multiples of each row's scale, its largest size over 127.

    Elements are in the order of vectors of the matrix's own type, so that inputs need to be arranged only once.
    out: int8 [R, n], where the values go; None: into memory of their own.
    """
    n, floats, evens = matrix.shape[1], matrix.detach().float(), evens_first(matrix)
    order = torch.tensor([arranged_at(e, n, evens) for e in range(n)])
    scales = (floats.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    values = _in_huge_pages(*matrix.shape) if out is None else out
    values[:, order] = (floats / scales[:, None]).round().to(torch.int8)
    return RoundedRows(values, scales, evens)


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


def evens_first(rows: Rows) -> bool:
    """How the elements of a step are ordered in inputs of these rows."""
    return rows.evens_first if isinstance(rows, RoundedRows) else rows.dtype == torch.bfloat16


class RoundedFFN(NamedTuple):
    """The matrices of a gated FFN at 8 bits, all [D, E]."""

    gate: RoundedRows
    up: RoundedRows
    down: RoundedRows
    activation: str


def rounded_ffn(weights: FFNWeights) -> RoundedFFN:
    """The FFN's matrices rounded to 8 bits.

    A neuron's three rows are next to each other in memory: reading half of the neurons then takes 5 % less time than
    from three matrices, because there are a third as many places to go to.
    """
    D, E = weights.gate.shape
    values = _in_huge_pages(D, 3, E)
    gate, up, down = (rounded_rows(matrix, values[:, i]) for i, matrix in enumerate(weights[:3]))
    return RoundedFFN(gate, up, down, weights.activation)


class RoundedPredictor(NamedTuple):
    """`PredictorWeights` with matrices of 8 bits."""

    reduce: RoundedRows  # [H, E]
    reduce_bias: Tensor  # float32 [H]
    expand: RoundedRows  # [K, H]
    expand_bias: Tensor  # float32 [K]


def addresses(weights: FFNWeights | RoundedFFN) -> dict[str, int]:
    """What a state holds of an FFN's weights: addresses of gate, up and down, strides, and addresses of scales."""
    found: dict[str, int] = {}
    for name, matrix in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
        values = matrix if isinstance(matrix, Tensor) else matrix.values
        found |= {name: values.data_ptr(), f"{name}_stride": values.element_size() * values.stride(0)}
        if isinstance(matrix, RoundedRows):
            found[f"{name}_scales"] = matrix.scales.data_ptr()
    return found
