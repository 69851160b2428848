"""Products of packed rows on tensor cores, by the CUDA C++ kernels `cuda/packed_sm80.cu`.

`nvrtc.py` compiles and launches them. Shape letters: see `packed.py` and `packed_gpu.py`.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.ffn_arguments import ACTIVATIONS, EPSILON
from apc.ops.nvrtc import Function, Program, architecture, pointer
from apc.ops.packed import PackedRows

_THREADS, _WARPS, _ROWS = 128, 4, 16  # of a block
_NEURONS = 8  # of a block: a row of gate and of up each
_MAX_E = 16384  # a block keeps its input in shared memory
_HALVES = (torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    E: int
    group: int
    dtype: torch.dtype
    activation: str = "silu"

    def program(self, arch: str) -> Program:
        """The kernels."""
        constants = dict(
            E=self.E,
            GROUP=self.group,
            BFLOAT=int(self.dtype == torch.bfloat16),
            ACTIVATION=ACTIVATIONS.index(self.activation),
            EARLY=int(arch == "sm_90a"),
        )
        return Program("packed_sm80.cu", arch, tuple(constants.items()), headers=("values_sm80.cuh",))


@functools.lru_cache(maxsize=256)
def _prepare(sizes: Sizes, device_index: int, name: str) -> tuple[Function, bool]:
    """The kernel `name`, and whether it uses programmatic dependent launch."""
    arch = architecture(torch.device("cuda", device_index))
    return nvrtc.function(sizes.program(arch), name, device_index), arch == "sm_90a"


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    try:
        _prepare(Sizes(64, 32, torch.bfloat16), device_index, "project")
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


def is_supported(x: Tensor) -> bool:
    """Whether the kernels take inputs [1, E] on their device: half precision, from Ampere to Hopper."""
    supported = x.is_cuda and x.dtype in _HALVES and x.shape[-1] <= _MAX_E
    return supported and unavailable(x.device.index) is None


def project(x: Tensor, rows: PackedRows, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`packed_gpu.project_packed` for inputs that `is_supported` accepts."""
    R, E = rows.shape
    output = x.new_empty((1, R))
    function, early = _prepare(Sizes(E, rows.group, x.dtype), x.device.index, "project")
    tensors = map(pointer, (x, rows.words, bias, residual, output))
    with torch.cuda.device_of(x):
        nvrtc.launch(function, (math.ceil(R / _ROWS), 1), _THREADS, 0, *tensors, ctypes.c_int(R), early=early)
    return output


def gate_up(
    x: Tensor,
    gate: PackedRows,
    up: PackedRows,
    activation: str,
    listed: Sequence[Tensor | None],
    neurons: int,
    spared: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    spared_inner: Tensor,
    later: Sequence[Tensor | None],
) -> Tensor:
    """The values of the listed neurons, float32 [D], of which the first ones are set.

    Args:
        x: FFN input [1, E].
        gate, up: [D, E].
        activation: one of `ACTIVATIONS`.
        listed: kept neurons and their number; None for both: all neurons.
        neurons: about how many are kept.
        spared: those with 16 bits, and their rows of gate and up; None: none.
        mask: masks, and candidates' logits and clusters, for spared neurons; None: all are kept.
        spared_inner: float32 [1, P], out: their values.
        later: a later predictor's rows [H, E], bias float32 [H] and bottleneck float32 [1, H], out; None: none.
    """
    (D, E), P, H = gate.shape, spared_inner.shape[1], 0 if later[0] is None else len(later[0])
    inner = x.new_empty(D, dtype=torch.float32)
    function, early = _prepare(Sizes(E, gate.group, x.dtype, activation), x.device.index, "gate_up")
    blocks = max(1, math.ceil(neurons / _NEURONS))
    masks, logits, clusters = mask
    words, count = (1, 0) if masks is None or logits is None else (masks.shape[1], logits.shape[1])
    tensors = x, gate.words, up.words, *listed, inner, *spared, masks, logits, clusters, spared_inner, *later
    numbers = map(ctypes.c_int, (D, blocks, P, H, words, count))
    grid = blocks + P + math.ceil(H / _WARPS)
    with torch.cuda.device_of(x):
        nvrtc.launch(
            function, (grid, 1), _THREADS, 0, *map(pointer, tensors), *numbers, ctypes.c_float(EPSILON), early=early
        )
    return inner


def down(inner: Tensor, rows: PackedRows, listed: Sequence[Tensor | None], dtype: torch.dtype, parts: int) -> Tensor:
    """Each part's sum of the listed neurons' rows [D, E] times their values, float32 [parts, 1, E].

    listed: as for `gate_up`; dtype: the model's.
    """
    D, E = rows.shape
    partial = inner.new_empty((parts, 1, E))
    function, early = _prepare(Sizes(E, rows.group, dtype), inner.device.index, "down")
    tensors = map(pointer, (*listed, inner, rows.words, partial))
    grid = math.ceil(E / 32 / _THREADS) * parts
    with torch.cuda.device_of(inner):
        nvrtc.launch(function, (grid, 1), _THREADS, 0, *tensors, *map(ctypes.c_int, (D, parts)), early=early)
    return partial
