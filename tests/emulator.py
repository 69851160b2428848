"""Runs CUDA C++ kernels on the CPU, with `emulator.h`: to find races and accesses outside of tensors without a GPU."""

import ctypes
import hashlib
import math
import mmap
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from apc.ops.nvrtc import Program

HEADER = Path(__file__).with_suffix(".h")
OPTIONS = [
    "-std=c++17",
    "-O0",  # compiling takes longer than running
    "-march=native",
    "-ffp-contract=off",  # only fmaf is fused
    "-fno-strict-aliasing",
    "-fno-gnu-unique",  # libraries share no variables
    "-fvisibility=hidden",
    "-fPIC",
    "-w",  # of pragmas that g++ doesn't know
]
# Bodies of the functions that have PTX in them.
BODIES = {
    "wait_for_previous": "",
    "start_next": "",
    "widen": "return {to_float(pair & 0xFFFF, BFLOAT), to_float(pair >> 16, BFLOAT)};",
    "half_of": "return to_half(x, BFLOAT);",
    "multiply": "multiply_16_8_16(sums, {a0, a1, a2, a3, b0, b1}, BFLOAT);",
    "pair": "return (word >> 4 * s & 0x000F000F) | magic;",
    "copy_piece": "async_copy(to, from);",
    "end_group": "commit_group();",
    "wait_for_groups": "wait_group(LEFT);",
    "shared_address": "return shared_offset(pointer);",
    "barrier_init": "init_byte_barrier(barrier, arrivals);",
    "barrier_arrive": "arrive(barrier, 0);",
    "barrier_wait": "wait_for_parity(barrier, parity);",
    "expect_bytes": "arrive(barrier, bytes);",
    "fetch": "bulk_copy(to, from, bytes, barrier);",
    "wait_for_warps": "if (HOPPER) named_barrier(1, THREADS); else __syncthreads();",
    "wait_for_team": "if (HOPPER) named_barrier(2 + team, TEAM_THREADS); else __syncthreads();",
}


def unavailable() -> str | None:
    """Why kernels can't be emulated here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator switches stacks as on x86-64 Linux"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return None if int(version.split(".")[0]) >= 12 else "the emulator needs g++ 12 for _Float16"


class Fault(Exception):
    """Why the emulator stopped a kernel."""


class Emulator:
    """Takes the place of `nvrtc.function` and `nvrtc.launch`.

    backwards: threads and blocks take turns in descending order.
    """

    def __init__(self, folder: Path):
        self.folder = folder  # for libraries
        self.backwards = False

    def function(self, program: Program, name: str, device_index: int | None, shared: int):
        """As `nvrtc.function`."""
        header = self.folder / HEADER.name
        if not header.exists():  # it is compiled once
            shutil.copy(HEADER, header)
            _compile("-x", "c++-header", header)
        source = f'#include "{header}"\n{_without_ptx(program.source(), shared)}\nLAUNCH({name})\n'
        library = self.folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            library.with_suffix(".cpp").write_text(source)
            _compile("-shared", "-o", library, library.with_suffix(".cpp"))
        function = ctypes.CDLL(library)[f"launch_{name}"]
        function.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_bool
        function.restype = ctypes.c_char_p
        return function

    def launch(self, function, grid: tuple[int, int], block: int, shared: int, *arguments, early: bool = False) -> None:
        """As `nvrtc.launch`. Raises Fault."""
        parameters = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        if reason := function(parameters, grid[0], block, self.backwards):
            raise Fault(reason.decode())


def _compile(*words: str | Path) -> None:
    subprocess.run(["g++", *OPTIONS, *words], check=True)


def _without_ptx(source: str, shared: int) -> str:
    for name, body in BODIES.items():
        head = rf"(__forceinline__ [\w ]+ {name}\([^{{]*\)) "
        source = re.sub(head + r"{(.*|(\n .*)+\n)}$", rf"\1 {{ {body} }}", source, flags=re.MULTILINE)
    source = re.sub(r'asm volatile\("fence[^"]*" ::: "memory"\);', "", source)
    source = re.sub(
        r"extern __shared__ __align__\(16\) (\w+) memory\[\];",
        rf"__shared__ __align__(16) \1 memory[{shared} / sizeof(\1)];",
        source,
    )
    assert "asm" not in source and "extern __shared__" not in source, "PTX that is not emulated"
    return source


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of 0xFF bytes between two pages that can't be accessed. It ends at the second one, but for 15 bytes."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    room = math.ceil(count * dtype.itemsize / 16) * 16
    end = math.ceil(room / mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    memory[end - room : end] = b"\xff" * room
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + end):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=end - room).view(shape)


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a tensor between two pages that can't be accessed."""
    return guarded_empty(tensor.shape, tensor.dtype).copy_(tensor)
