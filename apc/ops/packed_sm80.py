"""Products of packed rows on tensor cores, by the CUDA C++ kernels `cuda/packed_sm80.cu` and `cuda/packed_ffn_sm80.cu`.

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
from apc.ops._triton import triton_driver
from apc.ops.ffn_arguments import ACTIVATIONS, EPSILON
from apc.ops.nvrtc import Function, Program, architecture, pointer
from apc.ops.packed import PackedRows

_THREADS = 512  # of a block that multiply; on Hopper 32 more for each team copy
_ROWS = 8  # of a slot
_SLOTS = {"project": (2, 8), "ffn": (3, 10)}  # of a team at least, and of a block at most
_MAX_E = 8192  # of an FFN: a thread adds up one chunk of columns
_HALVES = (torch.bfloat16, torch.float16)


class Masked(NamedTuple):
    """What the kernel for FFNs is compiled for, besides `Sizes`."""

    D: int
    blocks: int
    candidates: int = 0  # for the mask; 0: no masks, all neurons
    activation: str = "silu"

    @property
    def most(self) -> int:
        """The most neurons of a block."""
        return math.ceil(self.D / self.blocks) + 1

    @property
    def words(self) -> int:
        """Of a mask."""
        return math.ceil(self.D / 128) * 4


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    E: int
    group: int
    row_words: int
    dtype: torch.dtype
    arch: str
    shared: int  # bytes of shared memory that a block can have
    ffn: Masked | None = None

    @property
    def name(self) -> str:
        """Of the kernel."""
        return "project" if self.ffn is None else "ffn"

    def _bytes(self) -> tuple[int, int]:
        """Of a slot, and of dynamic shared memory beside the ring."""
        beside = math.ceil(self.E / 256) * (512 + 32) + 128  # the input, as the struct `Input`
        if self.ffn is not None:
            beside += 4 * self.ffn.most
        return 4 * _ROWS * ((self.row_words + 15) // 32 * 32 + 16), beside

    @property
    def slots(self) -> tuple[int, int]:
        """Teams, and slots of each team's ring; no slots if they have no room."""
        each, beside = self._bytes()
        declared = 2560 + (0 if self.ffn is None else 8 * self.ffn.words)  # by the kernel itself
        least, most = _SLOTS[self.name]
        slots = min(most, (self.shared - beside - declared) // each)
        teams = 2 if self.arch == "sm_90a" and slots >= 2 * least and self.E <= _MAX_E // 2 else 1
        return teams, slots // teams if slots >= least and (self.ffn is None or self.E <= _MAX_E) else 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return _THREADS + (32 * self.slots[0] if self.arch == "sm_90a" else 0)

    def program(self) -> tuple[Program, int]:
        """The kernel, and the bytes of dynamic shared memory of a block."""
        (each, beside), (teams, slots) = self._bytes(), self.slots
        constants = dict(
            E=self.E,
            GROUP=self.group,
            BFLOAT=int(self.dtype == torch.bfloat16),
            ACTIVATION=0 if self.ffn is None else ACTIVATIONS.index(self.ffn.activation),
            TEAMS=teams,
            SLOTS=slots,
            HOPPER=int(self.arch == "sm_90a"),
        )
        file, headers = "packed_sm80.cu", ["values_sm80.cuh", "barriers_sm90.cuh", "packed_sm80.cuh"]
        if self.ffn is not None:
            D, _, candidates, _ = self.ffn
            constants |= dict(N=1, D=D, MOST=self.ffn.most, WORDS=self.ffn.words, CANDIDATES=candidates)
            file, headers = "packed_ffn_sm80.cu", [*headers, "find_neurons_sm80.cuh"]
        program = Program(file, self.arch, tuple(constants.items()), headers=tuple(headers))
        return program, teams * slots * each + beside


@functools.lru_cache(maxsize=256)
def _prepare(sizes: Sizes, device_index: int) -> tuple[Function, int, int]:
    """The kernel, and its bytes of dynamic shared memory and threads of a block."""
    program, shared = sizes.program()
    return nvrtc.function(program, sizes.name, device_index, shared), shared, sizes.threads


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    try:
        arch = architecture(torch.device("cuda", device_index))
        _prepare(Sizes(64, 32, 12, torch.bfloat16, arch, 48 * 1024), device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


@functools.cache
def _machine(device_index: int) -> tuple[int, int, str]:
    """Multiprocessors, the bytes of shared memory that a block can have, and the architecture to compile for."""
    properties = triton_driver.active.utils.get_device_properties(device_index)
    arch = architecture(torch.device("cuda", device_index))
    return properties["multiprocessor_count"], properties["max_shared_mem"], arch


def _sizes(x: Tensor, rows: PackedRows, ffn: Masked | None = None) -> Sizes:
    _, shared, arch = _machine(x.device.index)
    return Sizes(rows.E, rows.group, rows.words.shape[1], x.dtype, arch, shared, ffn)


def is_supported(x: Tensor, rows: PackedRows, activation: str | None = None) -> bool:
    """Whether the kernels take inputs [1, E] and these rows: half precision, from Ampere to Hopper.

    The ring of slots must fit into the card's shared memory. activation: that of an FFN, whose gate is `rows`.
    """
    if not (x.is_cuda and x.dtype in _HALVES and unavailable(x.device.index) is None):
        return False
    ffn = None if activation is None else Masked(len(rows.words), _machine(x.device.index)[0], 1, activation)
    return _sizes(x, rows, ffn).slots[1] > 0


def project(
    x: Tensor,
    rows: PackedRows,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    epsilon: float,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`packed_gpu.project_packed` for what `is_supported` accepts."""
    R, E = rows.shape
    output, total = x.new_empty((1, R)), x if added is None else torch.empty_like(x)
    function, shared, threads = _prepare(_sizes(x, rows), x.device.index)
    tensors = map(pointer, (x, added, norm, total, rows.words, bias, residual, output))
    grid = min(_machine(x.device.index)[0], math.ceil(R / (2 * _ROWS)))
    numbers = ctypes.c_int(R), ctypes.c_float(epsilon)
    with torch.cuda.device_of(x):
        nvrtc.launch(function, (grid, 1), threads, shared, *tensors, *numbers, early=threads > _THREADS)
    return output, total


def ffn(
    x: Tensor,
    norm: Tensor | None,
    epsilon: float,
    matrices: Sequence[PackedRows],
    activation: str,
    mask: Sequence[Tensor | None],
    known: bool,
    spared: Sequence[Tensor | None],
    spared_inner: Tensor,
    later: Sequence[Tensor | None],
) -> Tensor:
    """Each block's sum of its neurons' rows of down times their values, float32 [blocks, 1, E].

    Args:
        x: FFN input [1, E], or with a norm [E], what its RMS norm is taken of.
        matrices: gate, up and down, [D, E] each.
        activation: one of `ACTIVATIONS`.
        mask: masks, and candidates' logits and clusters; None: all neurons.
        known: whether the candidates were written before the previous kernel began.
        spared: neurons with 16 bits, and their rows of gate and up; None: none.
        spared_inner: float32 [1, P], out: their values.
        later: a later predictor's rows [H, E], bias float32 [H] and bottleneck float32 [1, H], out; None: none.
    """
    gate, logits = matrices[0], mask[1]
    (D, E), P, H = gate.shape, spared_inner.shape[1], 0 if later[0] is None else len(later[0])
    blocks = _machine(x.device.index)[0]
    sizes = _sizes(x, gate, Masked(D, blocks, 0 if logits is None else logits.shape[1], activation))
    partial = x.new_empty((blocks, 1, E), dtype=torch.float32)
    function, shared, threads = _prepare(sizes, x.device.index)
    tensors = x, norm, *(each.words for each in matrices), *mask, partial, *spared, spared_inner, *later
    numbers = *map(ctypes.c_int, (P, H, known)), ctypes.c_float(epsilon), ctypes.c_float(EPSILON)
    with torch.cuda.device_of(x):
        nvrtc.launch(function, (blocks, 1), threads, shared, *map(pointer, tensors), *numbers, early=threads > _THREADS)
    return partial
