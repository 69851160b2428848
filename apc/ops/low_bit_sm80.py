"""Low-bit scores on b1 tensor cores, by the CUDA C++ kernel `cuda/low_bit_sm80.cu`. Shape letters: see `apc.ops`.

`nvrtc.py` compiles and launches the kernel.
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
from apc.ops.nvrtc import INPUT_TYPES, Function, Program, Unavailable, architecture, pointer
from apc.ops.score_curve import ScoreCurve

_PLANES = 24  # bits of the input
_MOST_WARPS = 8  # warps of a block, at most; each takes 16 neurons


class Sizes(NamedTuple):
    """What the kernel is compiled for."""

    tokens: int
    E: int
    D: int
    bits: int
    projections: int
    masks: bool  # whether it writes masks, not scores
    dtype: torch.dtype  # of the input

    def program(self, arch: str, warps: int) -> tuple[Program, int]:
        """The kernel with this many warps in a block, and the bytes of shared memory of a block."""
        N, steps = triton.next_power_of_2(self.tokens), math.ceil(row_bytes(self.E) / 64)
        constants = dict(
            WARPS=warps,
            N=N,
            E=self.E,
            D=self.D,
            BITS=self.bits,
            PROJECTIONS=self.projections,
            MASKS=int(self.masks),
            HIDDEN=INPUT_TYPES.index(self.dtype),
            EARLY=int(arch == "sm_90a"),
        )
        shared = N * (_PLANES * 16 * (steps | 1) * 4 + self.E * self.dtype.itemsize)
        return Program("low_bit_sm80.cu", arch, tuple(constants.items()), headers=("number_sm80.cuh",)), shared


class _Kernel(NamedTuple):
    function: Function
    shared: int  # bytes of shared memory of a block
    warps: int  # of a block
    early: bool  # whether it uses programmatic dependent launch


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernel cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    try:
        _prepare(Sizes(1, 128, 128, 1, 1, True, torch.bfloat16), device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


@functools.lru_cache(maxsize=256)
def _prepare(sizes: Sizes, device_index: int) -> _Kernel:
    arch, properties = architecture(torch.device("cuda", device_index)), torch.cuda.get_device_properties(device_index)
    # The fewest warps with which no multiprocessor gets a second block, so that all have equal work.
    warps = min(_MOST_WARPS, math.ceil(sizes.D / 16 / properties.multi_processor_count))
    program, shared = sizes.program(arch, warps)
    if shared + 1024 > properties.shared_memory_per_block_optin:  # type: ignore[attr-defined]
        raise Unavailable(
            f"hidden size {sizes.E} and {sizes.tokens} tokens need {shared:,} bytes of shared memory, "
            f"{properties.name} has fewer"
        )
    return _Kernel(nvrtc.function(program, "low_bit", device_index, shared), shared, warps, arch == "sm_90a")


def is_supported(hidden: Tensor, planes: Tensor, masks: bool) -> bool:
    """Whether the kernel can run for hidden [n, E] and planes [b, P, D, row_bytes(E)] on their device."""
    if not hidden.is_cuda or unavailable(hidden.device.index):
        return False
    try:
        _prepare(_sizes(hidden, planes, masks), hidden.device.index)
    except Unavailable:
        return False
    return True


def _sizes(hidden: Tensor, planes: Tensor, masks: bool) -> Sizes:
    (n, E), (bits, P, D, _) = hidden.shape, planes.shape
    return Sizes(n, E, D, bits, P, masks, hidden.dtype if hidden.dtype in INPUT_TYPES else torch.float32)


def low_bit_scores_b1(hidden: Tensor, planes: Tensor, curve: ScoreCurve, threshold: Tensor | None = None) -> Tensor:
    """`low_bit_scores` on b1 tensor cores.

    The input is rounded to 24 bits relative to its largest value. After that, each projection's sum is exact.
    Raises `nvrtc.Unavailable` with the reason if the kernel cannot run.
    """
    if reason := unavailable(hidden.device.index):
        raise Unavailable(reason)
    n, D, masks = len(hidden), planes.shape[2], threshold is not None
    hidden = hidden if hidden.dtype in INPUT_TYPES else hidden.float()
    kernel = _prepare(_sizes(hidden, planes, masks), hidden.device.index)
    hidden, own_planes = (_aligned(value) for value in (hidden, planes))
    # With early launch the kernel reads the planes before the previous kernel has ended. So the previous kernel
    # must not be the one that copies the planes.
    early = kernel.early and own_planes is planes
    output = (
        hidden.new_empty((n, row_bytes(D)), dtype=torch.uint8)
        if masks
        else hidden.new_empty((n, D), dtype=torch.float32)
    )
    parameters = (value.float().contiguous() for value in curve)
    tensors = hidden, own_planes, *parameters, threshold, *((None, output) if masks else (output, None))
    grid = math.ceil(row_bytes(D) / (2 * kernel.warps)), 1
    with torch.cuda.device_of(hidden):
        arguments = *map(pointer, tensors), ctypes.c_int(n)
        nvrtc.launch(kernel.function, grid, 32 * kernel.warps, kernel.shared, *arguments, early=early)
    return output


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and aligned to 16 bytes, since the kernel reads 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
