"""A sparse FFN's rows on Hopper, by CUDA C++: see `cuda/sparse_ffn_sm90.cu`, and `nvrtc.py` for how it comes to run."""

import ctypes
import functools
import math

import torch
import triton
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.bits import row_bytes
from apc.ops.nvrtc import Program, architecture, pointer

_THREADS = 288
_TOKENS = 4  # at most
_DECLARED = 47 * 1024  # bytes of shared memory that the kernel can declare itself, for words
_SHARED = 227 * 1024 - 1024  # bytes that a block can have, less what the kernel declares itself but for words
_TILE = {"ROWS": 2, "STAGES": 4}  # neurons of a stage, and stages at most
_LONG = 4096  # hidden size above which a stage is one neuron
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_HALVES = (torch.bfloat16, torch.float16)
EPSILON = torch.finfo(torch.float32).eps  # that torch adds to the mean square of float32


def program(
    tokens: int, E: int, D: int, blocks: int, candidates: int, activation: str, dtype: torch.dtype, later: int = 0, found: bool = False
) -> tuple[Program, int]:  # fmt: skip
    """The kernels for so many tokens and candidates for the cluster of each (0: a mask for each token), and the bytes of shared memory of a block of `rows`.

    later: rows of a later layer's bottleneck; found: `find` says which neurons.
    """
    rows, most, N = 1 if E > _LONG else _TILE["ROWS"], _most(D, blocks), triton.next_power_of_2(tokens)
    beside, words = N * 2 * E + 4 * most, math.ceil(D / 128) * 4
    stages = min(_TILE["STAGES"], (_SHARED - beside - 4 * words * (N + 1)) // (6 * E * rows))
    constants = dict(N=N, E=E, ROWS=rows, STAGES=stages, MOST=most, WORDS=words, CANDIDATES=candidates,
                     ACTIVATION=_ACTIVATIONS.index(activation), BFLOAT=int(dtype == torch.bfloat16), LATER=later, FOUND=int(found))  # fmt: skip
    return Program(
        "sparse_ffn_sm90.cu", "sm_90a", tuple(constants.items()), header="barriers_sm90.cuh"
    ), stages * 6 * E * rows + beside


def is_supported(*weights: Tensor) -> bool:
    """Whether the kernels take gate, up and down, on this device: halves on a Hopper GPU, rows in whole pieces of 16 bytes."""
    D, E = weights[0].shape
    fits = weights[0].dtype in _HALVES and E % 8 == 0 and E <= 2 * _LONG
    aligned = all(value.stride(0) % 8 == 0 and value.data_ptr() % 16 == 0 for value in weights)
    if not (weights[0].is_cuda and fits and aligned and unavailable(weights[0].device.index) is None):
        return False
    return (_TOKENS + 1) * row_bytes(D) + 4 * _most(D, _blocks(weights[0].device)) <= _DECLARED


def _blocks(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _most(D: int, blocks: int) -> int:
    """Neurons of a block, at most."""
    return math.ceil(D / blocks) + 1


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why the kernel cannot run on this CUDA device, or None where it can: it was compiled and loaded."""
    try:
        if (found := architecture(torch.device("cuda", device_index))) != "sm_90a":
            return f"the kernel is for Hopper (sm_90), not {found}"
        _prepare(device_index, 1, 64, 128, 1, 0, "silu", torch.bfloat16)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


@functools.lru_cache(maxsize=256)
def _prepare(device_index: int, *sizes, name: str = "rows") -> tuple[object, int]:
    made, shared = program(*sizes)
    shared = shared if name == "rows" else 0
    return nvrtc.function(made, name, device_index, shared), shared


def aligned(hidden: Tensor) -> Tensor:
    """In one piece, where the copy engine can fetch it."""
    hidden = hidden.contiguous()
    return hidden if hidden.data_ptr() % 16 == 0 else hidden.clone()


def like_active_list(hidden: Tensor, D: int) -> Tensor:
    """Empty, int32 [P, 1 + most], for what `find_hopper` finds of D neurons."""
    blocks = _blocks(hidden.device)
    return hidden.new_empty((blocks, 1 + _most(D, blocks)), dtype=torch.int32)


def find_hopper(
    hidden: Tensor, D: int, masks: Tensor, candidates: tuple[Tensor, Tensor], active_list: Tensor, early: bool
) -> None:
    """Which neurons each block of `rows_hopper` is_supported for as many tokens of hidden's type and size, to `active_list`: how many, then which.

    early: as for `nvrtc.launch`.
    """
    (n, E), device, (values, ids) = hidden.shape, hidden.device, candidates
    function, _ = _prepare(device.index, n, E, D, len(active_list), values.shape[1], "silu", hidden.dtype, name="find")
    with torch.cuda.device_of(hidden):
        nvrtc.launch(
            function,
            (len(active_list), 1),
            _THREADS,
            0,
            *map(pointer, (masks, values, ids, active_list)),
            ctypes.c_int(n),
            early=early,
        )


def rows_hopper(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: Tensor, activation: str, candidates: tuple[Tensor, Tensor] | None,
    later: tuple[Tensor, Tensor, Tensor] | None = None, active_list: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Arguments as of `sparse_ffn`, which `is_supported` took; hidden is `aligned` → the blocks' parts of the output, float32 [P, n, E].

    later: a bottleneck's rows [H, E] of hidden's type in one piece, and its bias float32 [H]; the third, float32 [n, H], becomes what `bottleneck` gives.
    active_list: what `find_hopper` gave for the same masks and candidates, complete before the kernel before this one begins.
    """
    (n, E), D, device = hidden.shape, len(gate), hidden.device
    blocks = _blocks(device)
    partial = hidden.new_empty((blocks, n, E), dtype=torch.float32)
    values, ids = candidates or (None, None)
    reduce, bias, inner = later or (None, None, None)
    count, later_rows = 0 if values is None else values.shape[1], 0 if later is None else len(reduce)
    function, shared = _prepare(
        device.index, n, E, D, blocks, count, activation, hidden.dtype, later_rows, active_list is not None
    )
    tensors = map(pointer, (hidden, gate, up, down, masks, values, ids, active_list, partial))
    rest = pointer(reduce), pointer(bias), pointer(inner), ctypes.c_float(EPSILON)
    strides = (ctypes.c_longlong(2 * value.stride(0)) for value in (gate, up, down))
    with torch.cuda.device_of(hidden):
        nvrtc.launch(function, (blocks, 1), _THREADS, shared, *tensors, ctypes.c_int(n), *strides, *rest, early=True)
    return partial
