"""Sums of levels times inputs of a copy stored by input, by the CUDA C++ kernel `cuda/copy_sums_sm80.cu`.

`nvrtc.py` compiles and launches the kernel. Shape letters: see `apc.ops`.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.ffn_arguments import LowBitCopy, SpacedCopy
from apc.ops.nvrtc import INPUT_TYPES, Function, Program, architecture, pointer

_THREADS = 256
_BLOCK_WORDS = 32  # words of 32 neurons of a block
PARTS = 2  # sums of a block, of every other 16 of its inputs


class Sizes(NamedTuple):
    """What the kernel is compiled for."""

    E: int
    words: int  # of a row of a plane
    bits: int
    projections: int
    share: int  # inputs of a block
    groups: int  # spacings of a row; 0: none
    dtype: torch.dtype  # of the input

    def program(self, arch: str) -> Program:
        """The kernel."""
        constants = dict(
            BITS=self.bits,
            PROJECTIONS=self.projections,
            E=self.E,
            WORDS=self.words,
            SHARE=self.share,
            GROUPS=self.groups,
            HIDDEN=INPUT_TYPES.index(self.dtype),
            EARLY=int(arch == "sm_90a"),
        )
        return Program("copy_sums_sm80.cu", arch, tuple(constants.items()), headers=("number_sm80.cuh",))


@functools.lru_cache(maxsize=256)
def _prepare(sizes: Sizes, device_index: int) -> tuple[Function, bool]:
    """The kernel, and whether it uses programmatic dependent launch."""
    arch = architecture(torch.device("cuda", device_index))
    return nvrtc.function(sizes.program(arch), "copy_sums", device_index), arch == "sm_90a"


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernel cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    try:
        _prepare(Sizes(64, 4, 4, 2, 16, 1, torch.bfloat16), device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


def is_supported(hidden: Tensor) -> bool:
    """Whether the kernel takes these inputs on their device."""
    return hidden.is_cuda and hidden.dtype in INPUT_TYPES and unavailable(hidden.device.index) is None


def copy_sums(hidden: Tensor, copy: LowBitCopy | SpacedCopy, share: int, sums: Tensor) -> None:
    """Write the sums, float32 [PARTS · S, n, P, 32 · words]; share: inputs of each of the S shares.

    Inputs times spacings are rounded to 16 bits, as sums of two bfloat16 numbers.
    """
    (n, E), (bits, P, _, W) = hidden.shape, copy.planes.shape
    spacings = copy.spacings if isinstance(copy, SpacedCopy) else None
    sizes = Sizes(E, W // 4, bits, P, share, 0 if spacings is None else spacings.shape[-1], hidden.dtype)
    function, early = _prepare(sizes, hidden.device.index)
    grid = math.ceil(sizes.words / _BLOCK_WORDS) * P, len(sums) // PARTS * n
    tensors = hidden, copy.planes, spacings, copy.norms, copy.least, sums
    with torch.cuda.device_of(hidden):
        nvrtc.launch(function, grid, _THREADS, 0, *map(pointer, tensors), ctypes.c_int(n), early=early)
