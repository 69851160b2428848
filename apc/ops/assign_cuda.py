"""Assignment by CUDA C++ kernels on tensor cores: packed bits by AND-POPC (b1, Ampere to Hopper), or uint8 (Hopper).

`nvrtc.py` compiles and launches the kernels. Shape letters: see `apc.ops`.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.alignment import align_rows, empty_aligned
from apc.ops.bits import empty_results
from apc.ops.nvrtc import Function, Program, Unavailable, architecture, launch, pointer

# The Hopper kernel: 2 consumer warpgroups of 64 rows × 256 clusters, so 128 sums per thread. The two blocks
# of a cluster share their centroids. Four stages of 48 KB fill the shared memory.
HOPPER = {"CONSUMERS": 2, "STAGES": 4, "CLUSTER": 2}
AMPERE = {"STAGES": 3}
_TILE_N = 64 * HOPPER["CONSUMERS"]  # rows of a Hopper block
_STEP = 128  # bytes of a row per stage, in both kernels
_TILES_K = (64, 128, 256)  # clusters that the Hopper kernel can process at a time

# Costs and limits of `schedule`.
_TILE_COST = 32  # overhead of a tile of clusters, in clusters
_ITEM_COST = 64  # overhead of a work item, in clusters
_CUT_COST = 2**26  # one-time overhead of cutting along K (a second kernel and its keys), in bytes of rows × clusters
_L2_MOST = 32 * 2**20  # bytes of rows in progress that stay in an H100's L2 cache beside the centroids
_L2_SHARE = 16 * 2**20  # the same if row tiles are cut along K: the centroids of all parts must then stay in L2 too

_SECTOR = 32  # bytes of an L2 sector; centroids that are not aligned to it cost a seventh of the time
_COPY_LEAST_N = 8192  # from this many rows on, copying such centroids to aligned memory saves time
_MOST_SCORE = 2**25  # the Hopper kernel's int32 keys are score · 64 + column; the Ampere kernel's keys have more room


@dataclass(frozen=True)
class Variant:
    """A kernel to compile.

    For sm_90a it computes `b1` or `u8` products; for earlier GPUs, from sm_80 on, only `b1`, with a fixed tile.
    """

    arch: str
    kind: str = "b1"
    tile_k: int = 256  # clusters at a time
    tail: int = 4  # products of 32 bytes in a row's last step
    passes: int = 1  # 2 for 16-bit numbers: a row of high bytes, then a row of low bytes

    def program(self) -> Program:
        """The source and constants to compile."""
        if self.arch != "sm_90a":
            return Program("assign_sm80.cu", self.arch, tuple(AMPERE.items()))
        constants = HOPPER | {"TILE_K": self.tile_k, "TAIL": self.tail, "PASSES": self.passes}
        return Program(
            "assign_sm90.cu",
            self.arch,
            tuple(constants.items()),
            warpgroup_mma(self.kind, self.tile_k),
            ("barriers_sm90.cuh",),
        )

    def function(self, device_index: int, name: str = "assign") -> Function:
        """The compiled kernel `name` on this device. Raises as `nvrtc.function`."""
        return nvrtc.function(self.program(), name, device_index, _shared_bytes(self) if name == "assign" else 0)


def warpgroup_mma(kind: str, tile_k: int) -> str:
    """CUDA source of the device function `mma`.

    `mma` multiplies 64 rows and tile_k centroids over 32 bytes, both in shared memory. It writes the dot products to
    sums [64, tile_k], or adds them.

    PTX ISA, `wgmma.mma_async`.
    """
    instruction = {"b1": f"m64n{tile_k}k256.s32.b1.b1.and.popc", "u8": f"m64n{tile_k}k32.s32.u8.u8"}[kind]
    n = tile_k // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+r"(sums[{i}])' for i in range(n))
    return f"""
__device__ __forceinline__ void mma(int (&sums)[{n}], u64 rows, u64 centroids, int add) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{n + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.{instruction} {{{registers}}}, %{n}, %{n + 1}, p; }}"
        : {operands} : "l"(rows), "l"(centroids), "r"(add));
}}
"""


@functools.cache
def unavailable(device_index: int, kind: str = "b1") -> str | None:
    """Why kernels of this kind cannot run on this CUDA device, or None. It compiles and loads one to find out."""
    device = torch.device("cuda", device_index)
    try:
        arch = architecture(device)
        if kind == "u8" and arch != "sm_90a":
            raise Unavailable("the uint8 kernel is for Hopper (sm_90)")
        Variant(arch, kind).function(device_index)
    except (ImportError, RuntimeError, OSError) as error:
        return nvrtc.reason(error)
    return None


def _shared_bytes(variant: Variant) -> int:
    if variant.arch == "sm_90a":
        return HOPPER["STAGES"] * _STEP * (_TILE_N + variant.tile_k) + 1024  # stages are aligned to 1,024 bytes
    return AMPERE["STAGES"] * (128 + 256) * (_STEP + 16)


def assign_b1(rows: Tensor, centroids: Tensor, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """The centroid with the largest overlap |x ∧ c| for each row, and that overlap.

    uint8 [G, N, W], uint8 [G, K, W] on one CUDA device → ids int64 [G, N], overlaps int32 [G, N] or None. Raises
    Unavailable with the reason if the kernel cannot run.
    """
    if reason := unavailable(rows.device.index):
        raise Unavailable(reason)
    arch = architecture(rows.device)
    if arch == "sm_90a":
        return _assign_hopper("b1", rows, centroids, scores)
    rows, centroids = align_rows(rows), centroids.contiguous()  # the kernel needs contiguous centroids
    if centroids.data_ptr() % 16:
        centroids = centroids.clone()
    (G, N, W), K = rows.shape, centroids.shape[1]
    ids, overlap = empty_results(rows, scores)
    if G and N:
        variant = Variant(arch)
        numbers = (ctypes.c_longlong(rows.stride(0)), ctypes.c_longlong(rows.stride(1)), *map(ctypes.c_int, (N, K, W)))
        with torch.cuda.device_of(rows):
            function = variant.function(rows.device.index)
            tensors = map(pointer, (rows, centroids, ids, overlap))
            launch(function, (math.ceil(N / 128), G), 256, _shared_bytes(variant), *tensors, *numbers)
    return ids, overlap


def assign_u8(importance: Tensor, planes: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """The plane with the largest Σ_i importance_i · plane_i for each row, and that sum.

    importance: uint8 [G, N, D]; or 16-bit numbers as uint8 [2 · G, N, D], the high bytes of all groups, then the low
    bytes. Sums must be below 2²⁵ (see `score_fits`), or below 2³¹ with 16-bit numbers. planes: uint8 [G, K, D]. → ids
    int64 [G, N], sums int32 [G, N] or None. Raises Unavailable if the kernel cannot run.
    """
    if reason := unavailable(importance.device.index, "u8"):
        raise Unavailable(reason)
    return _assign_hopper("u8", importance, planes, scores)


def score_fits(score: int) -> bool:
    """Whether a score fits the Hopper kernel's keys for 8-bit numbers."""
    return score < _MOST_SCORE


@dataclass(frozen=True)
class Schedule:
    """How row tiles × cluster tiles are distributed over the workers, which are clusters of thread blocks."""

    tile_k: int  # clusters in a tile
    k_tiles: int
    tiles_in_group: int
    whole: int  # row tiles that are one work item each
    cut: int  # row tiles that are cut along K into several work items
    splits: int  # work items of each row tile that is cut

    @property
    def items(self) -> int:
        """The number of work items."""
        return self.whole + self.cut * self.splits

    def cost(self, workers: int, tile_bytes: int) -> float:
        """The time of the busiest worker, in clusters × row tiles. tile_bytes: bytes of a row tile."""
        tile = self.tile_k + _TILE_COST
        part = math.ceil(self.k_tiles / self.splits) * tile + _ITEM_COST
        last_rounds = math.ceil((self.whole % workers + self.cut * self.splits) / workers)
        return (
            self.whole // workers * (self.k_tiles * tile + _ITEM_COST)
            + last_rounds * part
            + bool(self.cut) * _CUT_COST / tile_bytes
        )


def schedule(G: int, N: int, K: int, W: int, tile_n: int, workers: int) -> Schedule:
    """The cheapest schedule. tile_n: rows of a worker's row tile.

    If the last round of row tiles does not fill all workers, its tiles are cut along K, so that all workers finish
    together. If the rows in progress do not stay in the L2 cache between two tiles of clusters, all row tiles are
    cut; the parts of a tile are adjacent items, so that they run at the same time.
    """
    tiles_in_group = math.ceil(N / tile_n)
    tiles = G * tiles_in_group
    plans = []
    for tile_k in _TILES_K:
        k_tiles = math.ceil(K / tile_k)
        in_progress = workers * tile_n * W
        least = min(k_tiles, workers, math.ceil(in_progress / _L2_SHARE)) if in_progress > _L2_MOST else 1
        cut = tiles if least > 1 else tiles % workers
        plans += [
            Schedule(tile_k, k_tiles, tiles_in_group, tiles - cut, cut, splits)
            for splits in range(max(2, least), min(k_tiles, workers) + 1)
        ]
        if least == 1:
            plans.append(Schedule(tile_k, k_tiles, tiles_in_group, tiles, 0, 1))
    return min(plans, key=lambda plan: (plan.cost(workers, tile_n * W), plan.splits))


@dataclass(frozen=True)
class _Launch:
    """Everything for a call of the Hopper kernels that depends only on sizes."""

    functions: dict[str, Function]
    plan: Schedule
    grid: tuple[int, int]
    shared: int
    numbers: tuple[ctypes.c_int, ...]  # the integer arguments of `assign`
    cut_numbers: tuple[ctypes.c_int, ...]  # the integer arguments of `take_keys`


@functools.lru_cache(maxsize=256)
def _prepare(kind: str, passes: int, G: int, N: int, K: int, W: int, device_index: int) -> _Launch:
    cluster = HOPPER["CLUSTER"]
    workers = torch.cuda.get_device_properties(device_index).multi_processor_count // cluster
    plan, steps = schedule(G, N, K, passes * W, cluster * _TILE_N, workers), math.ceil(W / _STEP)
    variant = Variant("sm_90a", kind, plan.tile_k, math.ceil((W - (steps - 1) * _STEP) / 32), passes)
    numbers = N, G, steps, plan.k_tiles, plan.tiles_in_group, plan.items, plan.whole, plan.splits
    grid = min(plan.items, workers) * cluster, 1
    cut_numbers = N, plan.whole, plan.tiles_in_group
    functions = {name: variant.function(device_index, name) for name in ("assign", "take_keys")}
    return _Launch(
        functions,
        plan,
        grid,
        _shared_bytes(variant),
        tuple(map(ctypes.c_int, numbers)),
        tuple(map(ctypes.c_int, cut_numbers)),
    )


def _assign_hopper(kind: str, rows: Tensor, centroids: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """`assign_b1` or `assign_u8` by `cuda/assign_sm90.cu`: rows uint8 [passes · G, N, W], centroids uint8 [G, K, W]."""
    rows, centroids = align_rows(rows), align_rows(centroids)
    (_, N, W), (G, K, _) = rows.shape, centroids.shape
    if (centroids.stride(1) % _SECTOR or centroids.data_ptr() % _SECTOR) and N >= _COPY_LEAST_N:
        centroids = empty_aligned(G, K, W, centroids.device).copy_(centroids)
    ids, best = empty_results(rows[:G], scores)
    if not (G and N):
        return ids, best
    call, cluster = _prepare(kind, len(rows) // G, G, N, K, W, rows.device.index), HOPPER["CLUSTER"]
    cut, keys = call.plan.cut, None
    if cut:
        keys = torch.zeros((cut, cluster * _TILE_N), dtype=torch.int64, device=rows.device)
    boxes = (rows, _TILE_N), (centroids, call.plan.tile_k // cluster)
    maps = [_tensor_map(tensor.data_ptr(), tensor.shape, tensor.stride(), box) for tensor, box in boxes]
    tensors = [pointer(tensor) for tensor in (ids, best, keys)]
    with torch.cuda.device_of(rows):
        threads = 128 * (HOPPER["CONSUMERS"] + 1)
        launch(call.functions["assign"], call.grid, threads, call.shared, *maps, *tensors, *call.numbers)
        if cut:
            arguments = tensors[2], *tensors[:2], *call.cut_numbers
            launch(call.functions["take_keys"], (cut, 1), cluster * _TILE_N, 0, *arguments)
    return ids, best


@functools.lru_cache(maxsize=256)
def _tensor_map(address: int, shape: torch.Size, strides: tuple[int, ...], box_rows: int) -> ctypes.Array:
    """A TMA map of uint8 [G, N, W] at this address: swizzled boxes of box_rows rows × 128 bytes, zeros outside."""
    from cuda.bindings import driver

    G, N, W = shape
    steps = strides[1] if N > 1 else W, strides[0] if G > 1 else 16
    tensor_map = nvrtc.check_cuda(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            3,
            address,
            [driver.cuuint64_t(size) for size in (W, N, G)],
            [driver.cuuint64_t(step) for step in steps],
            [driver.cuuint32_t(size) for size in (_STEP, box_rows, 1)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_char * 128).from_buffer_copy(ctypes.string_at(tensor_map.getPtr(), 128))
