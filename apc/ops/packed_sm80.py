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
from apc.ops.ffn_arguments import ACTIVATIONS, EPSILON, Candidates
from apc.ops.nvrtc import Function, Program, architecture, pointer
from apc.ops.packed import PackedRows

_THREADS = 512  # of a block that multiply; on Hopper 32 more for each team copy
_ROWS = 8  # of a slot
_SLOTS = {"project": (2, 8), "ffn": (3, 10)}  # of a team at least, and of a block at most
_MAX_E = 8192  # of an FFN: more has not been tried; two teams take up to half of it
_HEADERS = ("values_sm80.cuh", "steps_sm80.cuh", "barriers_sm90.cuh", "find_neurons_sm80.cuh", "packed_sm80.cuh")
_HALVES = (torch.bfloat16, torch.float16)


class Masked(NamedTuple):
    """An FFN that a kernel is compiled for."""

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


_NO_FFN = Masked(128, 1)


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    name: str  # "project" or "ffn"
    E: int
    group: int
    row_words: int
    dtype: torch.dtype
    arch: str
    shared: int  # bytes of shared memory that a block can have
    ffn: Masked = _NO_FFN  # of the kernel; or for "project", of which it lists the neurons, if there are candidates

    def _bytes(self) -> tuple[int, int, int]:
        """Of a slot; of dynamic shared memory beside the rings; and of shared memory that the kernel declares."""
        beside = math.ceil(self.E / 256) * (512 + 32) + 128  # the input, as the struct `Input`
        declared, lists = 2560, 4 * self.ffn.most
        if self.ffn.candidates:
            declared += 8 * self.ffn.words
        if self.name == "ffn":
            return self._slot_bytes, beside + lists, declared
        return self._slot_bytes, beside, declared + lists

    @property
    def _slot_bytes(self) -> int:
        return 4 * _ROWS * ((self.row_words + 15) // 32 * 32 + 16)

    @property
    def slots(self) -> tuple[int, int]:
        """Teams, and slots of each team's ring; no slots if they have no room."""
        each, beside, declared = self._bytes()
        least, most = _SLOTS[self.name]
        slots = min(most, (self.shared - beside - declared) // each)
        teams = 2 if self.arch == "sm_90a" and slots >= 2 * least and self.E <= _MAX_E // 2 else 1
        return teams, slots // teams if slots >= least and (self.name == "project" or self.E <= _MAX_E) else 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return _THREADS + (32 * self.slots[0] if self.arch == "sm_90a" else 0)

    def program(self) -> tuple[Program, int]:
        """The kernel, and the bytes of dynamic shared memory of a block."""
        (each, beside, _), (teams, slots), (D, _, candidates, activation) = self._bytes(), self.slots, self.ffn
        constants = dict(
            E=self.E,
            GROUP=self.group,
            BFLOAT=int(self.dtype == torch.bfloat16),
            ACTIVATION=ACTIVATIONS.index(activation),
            TEAMS=teams,
            SLOTS=slots,
            HOPPER=int(self.arch == "sm_90a"),
            N=1,
            D=D,
            MOST=self.ffn.most,
            WORDS=self.ffn.words,
            CANDIDATES=candidates,
        )
        file = "packed_sm80.cu" if self.name == "project" else "packed_ffn_sm80.cu"
        program = Program(file, self.arch, tuple(constants.items()), headers=_HEADERS)
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
        _prepare(Sizes("project", 64, 32, 12, torch.bfloat16, arch, 48 * 1024), device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


def _sizes(name: str, x: Tensor, rows: PackedRows, ffn: Masked = _NO_FFN) -> Sizes:
    _, shared, arch = nvrtc.machine(x.device.index)
    return Sizes(name, rows.E, rows.group, rows.words.shape[1], x.dtype, arch, shared, ffn)


def _masked(x: Tensor, gate: PackedRows, candidates: int, activation: str = "silu") -> Masked:
    return Masked(len(gate.words), nvrtc.machine(x.device.index)[0], candidates, activation)


def is_supported(x: Tensor, rows: PackedRows) -> bool:
    """Whether `project` takes inputs [1, E] and these rows: half precision, from Ampere to Hopper.

    The rings of slots must fit into the card's shared memory.
    """
    runs = x.is_cuda and x.dtype in _HALVES and unavailable(x.device.index) is None
    return runs and _sizes("project", x, rows).slots[1] > 0


def is_ffn_supported(x: Tensor, gate: PackedRows) -> bool:
    """Whether `ffn` takes inputs [1, E] and matrices like this one; as `is_supported`, and up to 8,192 inputs."""
    return is_supported(x, gate) and _sizes("ffn", x, gate, _masked(x, gate, 1)).slots[1] > 0


def empty_list(x: Tensor, gate: PackedRows) -> Tensor | None:
    """An uninitialised list of kept neurons that `project` can write for `ffn`, int32; None: it can't, on this GPU."""
    if not is_ffn_supported(x, gate) or nvrtc.machine(x.device.index)[2] != "sm_90a":
        return None
    ffn = _masked(x, gate, 1)
    if not _sizes("project", x, gate, ffn).slots[1]:
        return None
    return x.new_empty((ffn.blocks, 2 + ffn.most), dtype=torch.int32)


class Listing(NamedTuple):
    """An FFN whose kept neurons `project` also lists."""

    gate: PackedRows  # of the FFN
    masks: Tensor  # int32 [K, words]
    candidates: Candidates
    listed: Tensor  # out, from `empty_list`


def project(
    x: Tensor,
    rows: PackedRows,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    epsilon: float,
    added: Tensor | None,
    listing: Listing | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_gpu.project_packed` for what `is_supported` accepts."""
    R, blocks = len(rows.words), nvrtc.machine(x.device.index)[0]
    output, total = x.new_empty((1, R)), x if added is None else torch.empty_like(x)
    grid, sizes = min(blocks, math.ceil(R / (2 * _ROWS))), _sizes("project", x, rows)
    lists: tuple[Tensor | None, ...] = (None, None, None, None)
    if listing is not None:
        gate, masks, candidates, listed = listing
        grid, lists = blocks, (masks, *candidates, listed)
        sizes = sizes._replace(ffn=_masked(x, gate, candidates.logits.shape[1]))
    function, shared, threads = _prepare(sizes, x.device.index)
    tensors = map(pointer, (x, added, norm, total, rows.words, bias, residual, output, *lists))
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
    listed: Tensor | None,
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
        listed: their neurons, which a `project` before the previous kernel listed; None: this kernel finds them.
        spared: neurons with 16 bits, and their rows of gate and up; None: none.
        spared_inner: float32 [1, P], out: their values.
        later: a later bottleneck's rows, levels uint8 [H, E] around 128, scales float32 [H] and bias float32 [H]; and
            float32 [1, H], out; None: none.
    """
    gate, logits = matrices[0], mask[1]
    E, P, H = gate.E, spared_inner.shape[1], 0 if later[0] is None else len(later[0])
    masked = _masked(x, gate, 0 if logits is None else logits.shape[1], activation)
    sizes, blocks = _sizes("ffn", x, gate, masked), masked.blocks
    partial = x.new_empty((blocks, 1, E), dtype=torch.float32)
    function, shared, threads = _prepare(sizes, x.device.index)
    tensors = x, norm, *(each.words for each in matrices), *mask, listed, partial, *spared, spared_inner, *later
    numbers = *map(ctypes.c_int, (P, H)), ctypes.c_float(epsilon), ctypes.c_float(EPSILON)
    with torch.cuda.device_of(x):
        nvrtc.launch(function, (blocks, 1), threads, shared, *map(pointer, tensors), *numbers, early=threads > _THREADS)
    return partial
