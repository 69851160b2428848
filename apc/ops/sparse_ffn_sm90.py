"""The rows of a sparse FFN on Hopper, by the CUDA C++ kernel `cuda/sparse_ffn_sm90.cu`. Shape letters: see `apc.ops`.

`nvrtc.py` compiles and launches the kernels.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops._triton import triton
from apc.ops.bits import row_bytes
from apc.ops.ffn_arguments import (
    ACTIVATIONS,
    EPSILON,
    MAX_TOKENS,
    ActiveNeurons,
    FFNWeights,
    NextLayer,
    Refinement,
)
from apc.ops.nvrtc import Function, Program, architecture, pointer

_HEADERS = ("barriers_sm90.cuh", "values_sm80.cuh", "find_neurons_sm80.cuh")
_THREADS = 288  # of a block: 8 warps that multiply, and one that fetches
_STAGED_WARPS = 8  # of a block of the kernel for stages
_DECLARED = 47 * 1024  # bytes of shared memory that the kernel can declare itself, for the words of masks
_SHARED = 227 * 1024 - 1024  # bytes of shared memory of a block, less what the kernel declares besides those words
_TILE = {"ROWS": 2, "STAGES": 4}  # neurons of a stage, and the most stages
_LONG = 4096  # hidden size above which a stage is one neuron
_HALVES = (torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    tokens: int
    E: int
    D: int
    blocks: int  # thread blocks of `rows`
    candidates: int  # for the cluster of each token; 0: a mask per token
    activation: str
    dtype: torch.dtype
    later: int = 0  # rows of a later layer's bottleneck; 0: none
    listed: bool = False  # whether `find` has listed the active neurons

    def program(self) -> tuple[Program, int]:
        """The kernels, and the bytes of dynamic shared memory of a block of `rows`."""
        E, N = self.E, triton.next_power_of_2(self.tokens)
        rows, most = 1 if E > _LONG else _TILE["ROWS"], _most(self.D, self.blocks)
        beside, words = N * 2 * E + 4 * most, math.ceil(self.D / 128) * 4
        stages = min(_TILE["STAGES"], (_SHARED - beside - 4 * words * (N + 1)) // (6 * E * rows))
        constants = dict(
            N=N,
            E=E,
            ROWS=rows,
            STAGES=stages,
            MOST=most,
            WORDS=words,
            CANDIDATES=self.candidates,
            ACTIVATION=ACTIVATIONS.index(self.activation),
            BFLOAT=int(self.dtype == torch.bfloat16),
            LATER=self.later,
            FOUND=int(self.listed),
        )
        program = Program("sparse_ffn_sm90.cu", "sm_90a", tuple(constants.items()), headers=_HEADERS)
        return program, stages * 6 * E * rows + beside

    def staged_program(self, up_part: bool) -> tuple[Program, int]:
        """The kernel for stages, and the bytes of dynamic shared memory of its blocks."""
        most = _most(self.D, self.blocks)
        constants = dict(
            N=1,
            E=self.E,
            MOST=most,
            WORDS=math.ceil(self.D / 128) * 4,
            CANDIDATES=self.candidates,
            ACTIVATION=ACTIVATIONS.index(self.activation),
            BFLOAT=int(self.dtype == torch.bfloat16),
            UP_PART=int(up_part),
        )
        program = Program("staged_ffn_sm90.cu", "sm_90a", tuple(constants.items()), headers=_HEADERS)
        return program, (_STAGED_WARPS * 3 + 1) * 2 * self.E + 4 * most


def is_supported(*matrices: Tensor) -> bool:
    """Whether the kernels take these matrices (gate, up, down, ...) on their device.

    They take half precision on a Hopper GPU, with rows aligned to 16 bytes and a multiple of 16 bytes long.
    """
    first = matrices[0]
    D, E = first.shape
    fits = first.dtype in _HALVES and E % 8 == 0 and E <= 2 * _LONG
    aligned = all(matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0 for matrix in matrices)
    if not (first.is_cuda and fits and aligned and unavailable(first.device.index) is None):
        return False
    return (MAX_TOKENS + 1) * row_bytes(D) + 4 * _most(D, _blocks(first.device)) <= _DECLARED


def _blocks(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _most(D: int, blocks: int) -> int:
    """The largest number of active neurons that a block can have."""
    return math.ceil(D / blocks) + 1


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    try:
        if (arch := architecture(torch.device("cuda", device_index))) != "sm_90a":
            return f"the kernel is for Hopper (sm_90), not {arch}"
        _prepare(device_index, Sizes(1, 64, 128, 1, 0, "silu", torch.bfloat16))
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


@functools.lru_cache(maxsize=256)
def _prepare(device_index: int, sizes: Sizes, name: str = "rows", up_part: bool = False) -> tuple[Function, int]:
    """The kernel `name`, and the bytes of dynamic shared memory of its blocks. up_part: as for `staged_program`."""
    program, shared = sizes.staged_program(up_part) if name == "staged" else sizes.program()
    shared = 0 if name == "find" else shared
    return nvrtc.function(program, name, device_index, shared), shared


def aligned(hidden: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and aligned to 16 bytes, as bulk copies require."""
    hidden = hidden.contiguous()
    return hidden if hidden.data_ptr() % 16 == 0 else hidden.clone()


def empty_active_list(hidden: Tensor, D: int) -> Tensor:
    """An uninitialised active list for `find_hopper`, int32 [blocks, 1 + most neurons of a block]."""
    blocks = _blocks(hidden.device)
    return hidden.new_empty((blocks, 1 + _most(D, blocks)), dtype=torch.int32)


def find_hopper(hidden: Tensor, layer: NextLayer, active_list: Tensor, early: bool) -> None:
    """Write the active neurons of each block of `rows_hopper` to `active_list`: how many, then which.

    hidden: any tensor with the shape and type of the layer's input; its values are not read. layer: must have
    candidates. early: as for `nvrtc.launch`.
    """
    (n, E), device = hidden.shape, hidden.device
    assert layer.candidates is not None
    logits, clusters = layer.candidates
    sizes = Sizes(n, E, layer.neurons, len(active_list), logits.shape[1], "silu", hidden.dtype)
    function, _ = _prepare(device.index, sizes, name="find")
    tensors = map(pointer, (layer.masks, logits, clusters, active_list))
    with torch.cuda.device_of(hidden):
        nvrtc.launch(function, (len(active_list), 1), _THREADS, 0, *tensors, ctypes.c_int(n), early=early)


def rows_hopper(
    hidden: Tensor,
    weights: FFNWeights,
    active: ActiveNeurons,
    later: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Each block's part of the output, float32 [blocks, n, E].

    Args:
        hidden: `aligned` FFN inputs, [n, E].
        weights: matrices that `is_supported` accepts.
        active: its active list, if any, must be complete before the previous kernel begins.
        later: a later bottleneck's weights [H, E] of hidden's type, contiguous, and its bias float32 [H]; the kernel
            writes the `bottleneck` to the third tensor, float32 [n, H].
    """
    (n, E), D, device = hidden.shape, len(weights.gate), hidden.device
    gate, up, down, activation = weights
    blocks = _blocks(device)
    partial = hidden.new_empty((blocks, n, E), dtype=torch.float32)
    logits, clusters = active.candidates or (None, None)
    reduce, bias, inner = later or (None, None, None)
    count, later_rows = 0 if logits is None else logits.shape[1], 0 if reduce is None else len(reduce)
    listed = active.active_list is not None
    sizes = Sizes(n, E, D, blocks, count, activation, hidden.dtype, later_rows, listed)
    function, shared = _prepare(device.index, sizes)
    tensors = map(pointer, (hidden, gate, up, down, active.masks, logits, clusters, active.active_list, partial))
    strides = (ctypes.c_longlong(2 * matrix.stride(0)) for matrix in (gate, up, down))
    rest = pointer(reduce), pointer(bias), pointer(inner), ctypes.c_float(EPSILON)
    with torch.cuda.device_of(hidden):
        nvrtc.launch(function, (blocks, 1), _THREADS, shared, *tensors, ctypes.c_int(n), *strides, *rest, early=True)
    return partial


def runs_stages(hidden: Tensor, *matrices: Tensor) -> bool:
    """Whether `staged_hopper` takes these inputs [n, E] and matrices: one token, with up to 4,096 values."""
    return len(hidden) == 1 and hidden.shape[1] <= _LONG and is_supported(*matrices)


def staged_hopper(hidden: Tensor, weights: FFNWeights, active: ActiveNeurons, refinement: Refinement) -> Tensor:
    """Each block's part of the output of a refined FFN, float32 [blocks, 1, E]; arguments as for `rows_hopper`."""
    E, D, device = hidden.shape[1], len(weights.gate), hidden.device
    gate, up, down, activation = weights
    thresholds, norms, up_part = refinement
    blocks, (logits, clusters) = _blocks(device), active.candidates or (None, None)
    partial = hidden.new_empty((blocks, 1, E), dtype=torch.float32)
    sizes = Sizes(1, E, D, blocks, 0 if logits is None else logits.shape[1], activation, hidden.dtype)
    function, shared = _prepare(device.index, sizes, "staged", up_part is not None)
    tensors = hidden, gate, up, down, active.masks, logits, clusters, thresholds, norms, up_part, partial
    strides = (ctypes.c_longlong(2 * matrix.stride(0)) for matrix in (gate, up, down))
    with torch.cuda.device_of(hidden):
        nvrtc.launch(function, (blocks, 1), 32 * _STAGED_WARPS, shared, *map(pointer, tensors), *strides, early=True)
    return partial
