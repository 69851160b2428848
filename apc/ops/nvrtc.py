"""CUDA C++ of `cuda/`, compiled for the GPU at hand when it is first used: no build step, no compiler at install.

NVRTC takes a second or two a source; then Triton's cache has it.
"""

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

SOURCES = Path(__file__).resolve().parent / "cuda"
_OPTIONS = [b"--std=c++17", b"--device-as-default-execution-space"]


class Unavailable(RuntimeError):
    """Why CUDA C++ kernels cannot run here, in one line."""


@dataclass(frozen=True)
class Program:
    """A file of `cuda/` for an architecture, with what is put before it: integer constants, another file, and text."""

    file: str
    arch: str
    constants: tuple[tuple[str, int], ...] = ()
    text: str = ""
    header: str | None = None

    def source(self) -> str:
        head = "typedef unsigned int u32;\ntypedef unsigned long long u64;\n"
        header = (SOURCES / self.header).read_text() if self.header else ""
        return (
            head
            + "".join(f"constexpr int {name} = {value};\n" for name, value in self.constants)
            + self.text
            + header
            + (SOURCES / self.file).read_text()
        )


def compile_program(program: Program) -> bytes:
    """Its cubin, by NVRTC; needs no GPU. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    made = take(nvrtc.nvrtcCreateProgram(program.source().encode(), program.file.encode(), 0, [], []))
    options = [f"--gpu-architecture={program.arch}".encode(), *_OPTIONS]
    status = nvrtc.nvrtcCompileProgram(made, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(take(nvrtc.nvrtcGetProgramLogSize(made)))
        take(nvrtc.nvrtcGetProgramLog(made, log))
        raise RuntimeError(
            f"NVRTC, {program.file} {dict(program.constants)}, {program.arch}: {status.name}\n{log.rstrip(bytes(1)).decode()}"
        )
    cubin = bytearray(take(nvrtc.nvrtcGetCUBINSize(made)))
    take(nvrtc.nvrtcGetCUBIN(made, cubin))
    take(nvrtc.nvrtcDestroyProgram(made))
    return bytes(cubin)


def _cubin(program: Program) -> bytes:
    """`compile_program`, or what an earlier process left of it in Triton's cache of kernels."""
    from cuda.bindings import nvrtc

    made_of = f"{program.source()} {program.arch} {_OPTIONS} {take(nvrtc.nvrtcVersion())}"
    cache, name = (
        get_cache_manager(hashlib.sha256(made_of.encode()).hexdigest()),
        Path(program.file).with_suffix(".cubin").name,
    )
    if path := cache.get_file(name):
        return Path(path).read_bytes()
    cubin = compile_program(program)
    cache.put(cubin, name)
    return cubin


def take(answer: tuple):
    """What a call of `cuda.bindings` returns after its status. Raises RuntimeError on any status but success."""
    status, *values = answer
    if status.value != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def function(program: Program, name: str, device_index: int, shared: int = 0):
    """A function of a program in the device's primary context, which blocks of so many bytes of dynamic shared memory may call."""
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        found = take(driver.cuModuleGetFunction(_module(program, device_index), name.encode()))
        if shared:
            take(
                driver.cuFuncSetAttribute(
                    found, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared
                )
            )
    return found


@functools.cache
def _module(program: Program, device_index: int):
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # which makes torch's context current
        return take(driver.cuModuleLoadData(_cubin(program)))


def reason(problem: Exception) -> str:
    """One line about what compiling or loading raised."""
    return (
        f"the package cuda-bindings cannot be imported: {problem}" if isinstance(problem, ImportError) else str(problem)
    )


def launch(function, grid: tuple[int, int], block: int, shared: int, *values, early: bool = False) -> None:
    """Launches on torch's current stream. values: ctypes scalars or buffers, in the kernel's order; early: it may begin before the kernel before it
    has ended, and waits for that itself (`griddepcontrol.wait`)."""
    from cuda.bindings import driver

    parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    stream = triton_driver.active.get_current_stream(
        torch.cuda.current_device()
    )  # a number; torch makes an object of it, in ten times as long
    if not early:
        take(driver.cuLaunchKernel(function, *grid, 1, block, 1, 1, shared, stream, ctypes.addressof(parameters), 0))
        return
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    how = driver.CUlaunchConfig()
    how.gridDimX, how.gridDimY, how.gridDimZ = *grid, 1
    how.blockDimX, how.blockDimY, how.blockDimZ = block, 1, 1
    how.sharedMemBytes, how.hStream, how.attrs, how.numAttrs = shared, driver.CUstream(stream), [attribute], 1
    take(driver.cuLaunchKernelEx(how, function, ctypes.addressof(parameters), 0))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def architecture(device: torch.device) -> str:
    """What to compile for: sm_90a on Hopper, else the device's own among sm_8x. Raises Unavailable for others."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (8, 9):  # before, there is no AND-POPC; after, it is no instruction of the tensor cores any more
        raise Unavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; b1 tensor cores are in 8.x and 9.0"
        )
    return "sm_90a" if major == 9 else f"sm_{major}{minor}"
