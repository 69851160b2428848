"""Compiles the CUDA C++ sources in `cuda/` for the current GPU at their first use, so installing needs no compiler.

NVRTC takes a second or two for a source; afterwards the binary comes from Triton's cache.
"""

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apc.ops._triton import get_cache_manager, triton_driver

SOURCES = Path(__file__).resolve().parent / "cuda"
INPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # kernels know an input's type by these indices
_OPTIONS = [b"--std=c++17", b"--device-as-default-execution-space"]

Function = Any  # a kernel on a device: cuda.bindings has no type stubs for its CUfunction


class Unavailable(RuntimeError):
    """A CUDA C++ kernel cannot run on this machine. The message is the reason, in one line."""


@dataclass(frozen=True)
class Program:
    """A file of `cuda/` to compile for an architecture.

    Integer constants, `text` and the files `headers` are placed before it.
    """

    file: str
    arch: str
    constants: tuple[tuple[str, int], ...] = ()
    text: str = ""
    headers: tuple[str, ...] = ()

    def source(self) -> str:
        """The source text that NVRTC compiles."""
        head = "typedef unsigned int u32;\ntypedef unsigned long long u64;\n"
        return (
            head
            + "".join(f"constexpr int {name} = {value};\n" for name, value in self.constants)
            + self.text
            + "".join((SOURCES / file).read_text() for file in (*self.headers, self.file))
        )


def compile_program(program: Program) -> bytes:
    """The cubin of a program, by NVRTC, without a GPU. Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    handle = check_cuda(nvrtc.nvrtcCreateProgram(program.source().encode(), program.file.encode(), 0, [], []))
    options = [f"--gpu-architecture={program.arch}".encode(), *_OPTIONS]
    status = nvrtc.nvrtcCompileProgram(handle, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(check_cuda(nvrtc.nvrtcGetProgramLogSize(handle)))
        check_cuda(nvrtc.nvrtcGetProgramLog(handle, log))
        raise RuntimeError(
            f"NVRTC, {program.file} {dict(program.constants)}, {program.arch}: {status.name}\n"
            f"{log.rstrip(bytes(1)).decode()}"
        )
    cubin = bytearray(check_cuda(nvrtc.nvrtcGetCUBINSize(handle)))
    check_cuda(nvrtc.nvrtcGetCUBIN(handle, cubin))
    check_cuda(nvrtc.nvrtcDestroyProgram(handle))
    return bytes(cubin)


def _cubin(program: Program) -> bytes:
    """The cubin from Triton's kernel cache, or else from `compile_program`."""
    from cuda.bindings import nvrtc

    key = f"{program.source()} {program.arch} {_OPTIONS} {check_cuda(nvrtc.nvrtcVersion())}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = Path(program.file).with_suffix(".cubin").name
    if path := cache.get_file(name):
        return Path(path).read_bytes()
    cubin = compile_program(program)
    cache.put(cubin, name)
    return cubin


def check_cuda(results: tuple) -> Any:
    """The return values of a `cuda.bindings` call, without its status. Raises RuntimeError if the call failed."""
    status, *values = results
    if status.value != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def function(program: Program, name: str, device_index: int, shared: int = 0) -> Function:
    """The kernel `name` of a program, loaded in the device's primary context.

    shared: bytes of dynamic shared memory of its blocks. Raises ImportError without cuda-bindings, and RuntimeError if
    compiling or loading fails.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        kernel = check_cuda(driver.cuModuleGetFunction(_module(program, device_index), name.encode()))
        if shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check_cuda(driver.cuFuncSetAttribute(kernel, attribute, shared))
    return kernel


@functools.cache
def _module(program: Program, device_index: int) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        return check_cuda(driver.cuModuleLoadData(_cubin(program)))


def reason(error: Exception) -> str:
    """The reason why compiling or loading failed, for a message."""
    return f"the package cuda-bindings cannot be imported: {error}" if isinstance(error, ImportError) else str(error)


def launch(
    function: Function, grid: tuple[int, int], block: int, shared: int, *arguments: Any, early: bool = False
) -> None:
    """Launch a kernel on torch's current stream.

    Args:
        function: the kernel, from `function`.
        grid: blocks in x and y.
        block: threads of a block.
        shared: bytes of dynamic shared memory of a block.
        arguments: ctypes scalars or buffers, in the kernel's order.
        early: use programmatic dependent launch. The kernel may start before the previous one ends, and must
        itself wait for its results (`griddepcontrol.wait`).
    """
    from cuda.bindings import driver

    parameters = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    # Triton returns the stream as a number. torch builds an object, which takes ten times as long.
    stream = triton_driver.active.get_current_stream(torch.cuda.current_device())
    if not early:
        results = driver.cuLaunchKernel(
            function, *grid, 1, block, 1, 1, shared, stream, ctypes.addressof(parameters), 0
        )
        check_cuda(results)
        return
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    config.attrs, config.numAttrs = [attribute], 1
    check_cuda(driver.cuLaunchKernelEx(config, function, ctypes.addressof(parameters), 0))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor as a kernel argument; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def architecture(device: torch.device) -> str:
    """The architecture to compile for: sm_90a on Hopper, sm_8x on its predecessors. Raises Unavailable for others."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (8, 9):  # only these have AND-POPC as a tensor-core instruction; others were not tried
        raise Unavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; "
            "the CUDA C++ kernels are for 8.x and 9.0"
        )
    return "sm_90a" if major == 9 else f"sm_{major}{minor}"


@functools.cache
def machine(device_index: int) -> tuple[int, int, str]:
    """Multiprocessors, the bytes of shared memory that a block can have, and the architecture to compile for."""
    properties = triton_driver.active.utils.get_device_properties(device_index)
    arch = architecture(torch.device("cuda", device_index))
    return properties["multiprocessor_count"], properties["max_shared_mem"], arch
