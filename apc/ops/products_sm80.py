"""Products of 16-bit matrices with one to four vectors, by the CUDA C++ kernel `cuda/products_sm80.cu`.

`nvrtc.py` compiles and launches it. Shape letters: see `apc.ops`; n vectors, R rows of matrices.
"""

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.ffn_arguments import ACTIVATIONS
from apc.ops.nvrtc import Function, Program, pointer

MAX_VECTORS = 4
_HEADERS = ("values_sm80.cuh", "steps_sm80.cuh")
_WARPS = 16
# Pieces of a row that a lane has in a batch, the best first: memory gives long parts of a row faster. With 2 in place
# of 4, a step of Mistral-7B's shape took 13 % longer.
_LOADS = (4, 3, 2)
_DEPTH = 2  # batches that are on their way at once, at least
_HALVES = (torch.bfloat16, torch.float16)


def _bytes(loads: int) -> int:
    """Of a batch of two rows a lane."""
    return _WARPS * 32 * 2 * loads * 16


class Sizes(NamedTuple):
    """What the kernel is compiled for."""

    n: int
    E: int
    activation: str  # of a gated FFN's inner values, "" for plain products
    dtype: torch.dtype
    arch: str
    room: int  # bytes of shared memory that a block can have

    @property
    def batches(self) -> tuple[int, int]:
        """Pieces of a row that a lane has in a batch, and batches on their way at once; 0 if there is no room."""
        declared = 4 * _WARPS * (2 * 16 * self.n + 1)  # by the kernel
        for loads in _LOADS:
            depth = (self.room - self._inputs - declared) // _bytes(loads)
            if depth >= _DEPTH:
                return loads, depth
        return _LOADS[-1], 0

    @property
    def _inputs(self) -> int:
        """Bytes of the vectors."""
        return 16 * self.n * (math.ceil(self.E / 64) * 8 + 4)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block: batches and vectors."""
        loads, depth = self.batches
        return depth * _bytes(loads) + self._inputs

    def program(self) -> Program:
        """The kernel."""
        loads, depth = self.batches
        constants = dict(
            E=self.E,
            N=self.n,
            LOADS=loads,
            DEPTH=depth,
            GATED=int(bool(self.activation)),
            ACTIVATION=ACTIVATIONS.index(self.activation or "silu"),
            BFLOAT=int(self.dtype == torch.bfloat16),
            HOPPER=int(self.arch == "sm_90a"),
        )
        return Program("products_sm80.cu", self.arch, tuple(constants.items()), headers=_HEADERS)


@functools.lru_cache(maxsize=256)
def _prepare(sizes: Sizes, device_index: int) -> Function:
    return nvrtc.function(sizes.program(), "products", device_index, sizes.shared)


def refusal(n: int, matrices: Sequence[Tensor], activations: Iterable[str] = ()) -> str | None:
    """Why `products` can't take n vectors and these matrices, with these activations too, in one line; or None.

    It compiles the kernels to find out. Activations are those of FFNs with as many inputs as the first matrix.
    """
    first = matrices[0]
    if not first.is_cuda or first.dtype not in _HALVES:
        return "steps of several sequences need a GPU and 16 bits"
    if n > MAX_VECTORS:
        return f"there are {n} sequences at once, the kernels take up to {MAX_VECTORS}"
    if any(each.shape[-1] % 8 or each.data_ptr() % 16 for each in matrices):
        return "its rows are no multiple of 16 bytes, or not aligned to 16"
    try:
        _, shared, arch = nvrtc.machine(first.device.index)
        for E in {each.shape[-1] for each in matrices}:
            sizes = Sizes(n, E, "", first.dtype, arch, shared)
            if not sizes.batches[1]:
                return f"shared memory has no room for {n} vectors of {E} elements"
            for activation in ("", *(activations if first.shape[-1] == E else ())):
                _prepare(sizes._replace(activation=activation), first.device.index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error).partition("\n")[0]
    return None


def products(
    x: Tensor,
    matrices: Sequence[Tensor],
    norm: Tensor | None,
    epsilon: float,
    added: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Products [n, R] of up to three matrices with the norm of x + added, plus bias and residual; and x + added [n, E].

    With an activation, the matrices are gate and up [R, E], and the products act(gate · x) · (up · x). For what
    `refusal` does not refuse.
    """
    n, E = x.shape
    R = len(matrices[0]) if activation else sum(map(len, matrices))
    blocks, shared, arch = nvrtc.machine(x.device.index)
    output, total = x.new_empty((n, R)), x if added is None else torch.empty_like(x)
    first, second, third = (matrices[i] if i < len(matrices) else None for i in range(3))
    sizes = Sizes(n, E, activation, x.dtype, arch, shared)
    rows = [0 if each is None else len(each) for each in (first, second)]
    tensors = map(pointer, (x, added, norm, total, first, second, third, bias, residual, output))
    numbers = *map(ctypes.c_int, (R, *rows)), ctypes.c_float(epsilon)
    grid = min(blocks, math.ceil(R / (8 if activation else 16)))
    with torch.cuda.device_of(x):
        function = _prepare(sizes, x.device.index)
        nvrtc.launch(function, (grid, 1), 32 * _WARPS, sizes.shared, *tensors, *numbers, early=arch == "sm_90a")
    return output, total
