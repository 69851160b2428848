"""Low-bit scores on b1 tensor cores, by CUDA C++: see `cuda/low_bit_sm80.cu`, and `nvrtc.py` for how it comes to run."""

import ctypes
import functools
import math

import torch
import triton
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.bits import row_bytes
from apc.ops.nvrtc import Program, Unavailable, architecture, pointer

_PLANES = 24
_MOST_WARPS = 8  # of a block, of 16 neurons each
_HIDDEN = (torch.bfloat16, torch.float16, torch.float32)


def program(
    tokens: int, E: int, D: int, bits: int, projections: int, masks: bool, dtype: torch.dtype, arch: str, warps: int
) -> tuple[Program, int]:
    """The kernel for so many tokens, and the bytes of shared memory of a block."""
    N, steps = triton.next_power_of_2(tokens), math.ceil(row_bytes(E) / 64)
    constants = dict(
        WARPS=warps,
        N=N,
        E=E,
        D=D,
        BITS=bits,
        PROJECTIONS=projections,
        MASKS=int(masks),
        HIDDEN=_HIDDEN.index(dtype),
        EARLY=int(arch == "sm_90a"),
    )
    return Program("low_bit_sm80.cu", arch, tuple(constants.items())), N * (
        _PLANES * 16 * (steps | 1) * 4 + E * dtype.itemsize
    )


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernel cannot run on this CUDA device, or None where it can: it was compiled and loaded."""
    try:
        _prepare(1, 128, 128, 1, 1, True, torch.bfloat16, device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


@functools.lru_cache(maxsize=256)
def _prepare(
    tokens: int, E: int, D: int, bits: int, projections: int, masks: bool, dtype: torch.dtype, device_index: int
) -> tuple[object, int, int, bool]:
    arch, properties = architecture(torch.device("cuda", device_index)), torch.cuda.get_device_properties(device_index)
    warps = min(
        _MOST_WARPS, math.ceil(D / 16 / properties.multi_processor_count)
    )  # so that no multiprocessor has more to do than others
    found, shared = program(tokens, E, D, bits, projections, masks, dtype, arch, warps)
    if shared + 1024 > properties.shared_memory_per_block_optin:
        raise Unavailable(
            f"hidden size {E} and {tokens} tokens need {shared:,} bytes of shared memory, {properties.name} has fewer"
        )
    return nvrtc.function(found, "low_bit", device_index, shared), shared, warps, arch == "sm_90a"


def is_supported(hidden: Tensor, planes: Tensor, masks: bool) -> bool:
    """Whether the kernel can run for these, [n, E] and [b, P, D, W], on their device."""
    if not hidden.is_cuda or unavailable(hidden.device.index):
        return False
    try:
        _prepare(*_sizes(hidden, planes, masks), hidden.device.index)
    except Unavailable:
        return False
    return True


def _sizes(hidden: Tensor, planes: Tensor, masks: bool) -> tuple:
    (n, E), (bits, P, D, _) = hidden.shape, planes.shape
    return n, E, D, bits, P, masks, hidden.dtype if hidden.dtype in _HIDDEN else torch.float32


def low_bit_scores_b1(
    hidden: Tensor, planes: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor, threshold: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`low_bit_scores` on b1 tensor cores: the input is cut to 24 bits of its largest number, all else is exact up to the sums of a projection.

    Raises `nvrtc.Unavailable`, saying why, where the kernel cannot run.
    """
    if reason := unavailable(hidden.device.index):
        raise Unavailable(reason)
    n, D = len(hidden), planes.shape[2]
    hidden = hidden if hidden.dtype in _HIDDEN else hidden.float()
    function, shared, warps, early = _prepare(*_sizes(hidden, planes, threshold is not None), hidden.device.index)
    hidden, held = hidden.contiguous(), planes.contiguous()
    hidden, held = (
        value.clone() if value.data_ptr() % 16 else value for value in (hidden, held)
    )  # they are read 16 bytes at a time
    early = early and held is planes  # which is read before the kernel before this one has ended
    output = (
        hidden.new_empty((n, D), dtype=torch.float32)
        if threshold is None
        else hidden.new_empty((n, row_bytes(D)), dtype=torch.uint8)
    )
    curve = (value.float().contiguous() for value in (scale, slope, power, bias))
    tensors = hidden, held, *curve, threshold, *((output, None) if threshold is None else (None, output))
    with torch.cuda.device_of(hidden):
        nvrtc.launch(
            function,
            (math.ceil(row_bytes(D) / (2 * warps)), 1),
            32 * warps,
            shared,
            *map(pointer, tensors),
            ctypes.c_int(n),
            early=early,
        )
    return output
