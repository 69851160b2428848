"""Assignment by CUDA C++ kernels on tensor cores: packed bits by AND-POPC on the b1 units (Ampere up), uint8 importance on Hopper's.

See `nvrtc.py` for how they come to run. Shape letters: see `bits.py`.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apc.ops import nvrtc
from apc.ops.alignment import empty_lines, whole_lines
from apc.ops.bits import outputs
from apc.ops.nvrtc import Program, Unavailable, architecture, launch, pointer

# The Hopper kernel's shape: 2 consumer warpgroups of 64 rows × 256 clusters hold 128 sums a thread; two blocks share their centroids;
# four stages of 48 KB fill the shared memory.
HOPPER = {"CONSUMERS": 2, "STAGES": 4, "CLUSTER": 2}
AMPERE = {"STAGES": 3}
_STEP = 128  # bytes of a row in a stage, of both kernels
_TILES_K = (64, 128, 256)  # the clusters that the Hopper kernel can take at a time
_TILE_COST = 32  # what a tile of clusters costs besides its products, in clusters
_ITEM_COST = 64  # what a piece of work costs besides its tiles, in clusters
_SECTOR = 32  # bytes that the L2 cache reads at least: centroids that start within one cost a seventh of the time …
_COPY_LEAST_N = 8192  # … and a copy that does not pays from so many rows on
_CUT_COST = 2**26  # what cutting along K costs once, for a second kernel and its keys, in bytes of rows × clusters
_MOST_SCORE = 2**25  # the Hopper kernel's keys, score · 64 + column, are int32; the Ampere kernel's hold more
_L2_MOST = 32 * 2**20  # bytes of rows at work at a time that stay in an H100's L2, beside the centroids …
_L2_SHARE = (
    16 * 2**20
)  # … and how many, once row tiles are cut along K at all, so that the parts' centroids stay there too


@dataclass(frozen=True)
class Variant:
    """A kernel to compile: `b1` or `u8` products for sm_90a, or `b1` for any other architecture from sm_80 (its tile is fixed)."""

    arch: str
    kind: str = "b1"
    tile_k: int = 256  # clusters at a time
    tail: int = 4  # products of 32 bytes in a row's last step
    passes: int = 1  # rows of bytes for each row: 2, high bytes before low ones, for numbers of 16 bits

    def program(self) -> Program:
        if self.arch != "sm_90a":
            return Program("assign_sm80.cu", self.arch, tuple(AMPERE.items()))
        constants = HOPPER | {"TILE_K": self.tile_k, "TAIL": self.tail, "PASSES": self.passes}
        return Program(
            "assign_sm90.cu",
            self.arch,
            tuple(constants.items()),
            warpgroup_mma(self.kind, self.tile_k),
            "barriers_sm90.cuh",
        )

    def function(self, device_index: int, name: str = "assign"):
        return nvrtc.function(self.program(), name, device_index, _shared_bytes(self) if name == "assign" else 0)


def warpgroup_mma(kind: str, tile_k: int) -> str:
    """`mma`: sums [64, tile_k] = or += 64 rows · tile_k centroids over 32 bytes, both in shared memory (PTX ISA, `wgmma.mma_async`)."""
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
    """Why the kernels of this kind cannot run on this CUDA device, or None where they can: they were compiled and loaded."""
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
        return (
            HOPPER["STAGES"] * _STEP * (64 * HOPPER["CONSUMERS"] + variant.tile_k) + 1024
        )  # stages start on 1,024 bytes
    return AMPERE["STAGES"] * (128 + 256) * (_STEP + 16)


def assign_b1(rows: Tensor, centroids: Tensor, scores: bool = True) -> tuple[Tensor, Tensor | None]:
    """uint8 [G, N, W], uint8 [G, K, W] on one CUDA device → ids int64 [G, N] of the greatest |x ∧ c|, that overlap int32 [G, N], or None.

    Raises Unavailable, saying why, where the kernel cannot run.
    """
    if reason := unavailable(rows.device.index):
        raise Unavailable(reason)
    arch = architecture(rows.device)
    if arch == "sm_90a":
        return _assign_hopper("b1", rows, centroids, scores)
    rows, centroids = whole_lines(rows), centroids.contiguous()  # one after the other, as the kernel takes centroids
    if centroids.data_ptr() % 16:
        centroids = centroids.clone()
    (G, N, W), K = rows.shape, centroids.shape[1]
    ids, overlap = outputs(rows, scores)
    if G and N:
        variant = Variant(arch)
        numbers = (ctypes.c_longlong(rows.stride(0)), ctypes.c_longlong(rows.stride(1)), *map(ctypes.c_int, (N, K, W)))
        with torch.cuda.device_of(rows):
            function = variant.function(rows.device.index)
            tensors = map(pointer, (rows, centroids, ids, overlap))
            launch(function, (math.ceil(N / 128), G), 256, _shared_bytes(variant), *tensors, *numbers)
    return ids, overlap


def assign_u8(importance: Tensor, planes: Tensor, scores: bool) -> tuple[Tensor, Tensor | None]:
    """uint8 [G, N, D], uint8 [G, K, D] → ids int64 [G, N] of the greatest Σ_i importance_i · plane_i, that sum int32 [G, N].

    Or numbers of 16 bits, as uint8 [2 · G, N, D]: first all groups' high bytes, then the low ones. Sums must be below 2²⁵, then 2³¹: see `holds`.
    Raises Unavailable where the kernel cannot run.
    """
    if reason := unavailable(importance.device.index, "u8"):
        raise Unavailable(reason)
    return _assign_hopper("u8", importance, planes, scores)


def holds(score: int) -> bool:
    """Whether the Hopper kernel's keys, which go with numbers of 8 bits, hold a score as large."""
    return score < _MOST_SCORE


@dataclass(frozen=True)
class Schedule:
    """How row tiles × cluster tiles are dealt out to clusters of blocks: `whole` row tiles one by one, the other `cut` in `splits` along K."""

    tile_k: int  # clusters in a tile
    k_tiles: int
    tiles_in_group: int
    whole: int
    cut: int
    splits: int

    @property
    def items(self) -> int:
        return self.whole + self.cut * self.splits

    def cost(self, workers: int, tile_bytes: int) -> float:
        """The time of the worker with the most to do, in clusters × row tiles, which are of so many bytes."""
        tile = self.tile_k + _TILE_COST
        part = math.ceil(self.k_tiles / self.splits) * tile + _ITEM_COST
        last_rounds = math.ceil((self.whole % workers + self.cut * self.splits) / workers)
        return (
            self.whole // workers * (self.k_tiles * tile + _ITEM_COST)
            + last_rounds * part
            + bool(self.cut) * _CUT_COST / tile_bytes
        )


def schedule(G: int, N: int, K: int, W: int, tile_n: int, workers: int) -> Schedule:
    """The cheapest schedule. tile_n: rows that a worker takes at a time.

    The last round of row tiles, if it does not fill all workers, is cut along K, so that all end together. Where the rows that all
    workers have in hand would not stay in the L2 cache from one tile of clusters to the next, all row tiles are cut, and the parts of
    one follow each other, so that they are worked on at the same time.
    """
    tiles_in_group = math.ceil(N / tile_n)
    tiles = G * tiles_in_group
    plans = []
    for tile_k in _TILES_K:
        k_tiles = math.ceil(K / tile_k)
        in_hand = workers * tile_n * W
        least = min(k_tiles, workers, math.ceil(in_hand / _L2_SHARE)) if in_hand > _L2_MOST else 1
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
    """What a call of the Hopper kernels needs that depends on sizes alone."""

    functions: dict[str, object]
    plan: Schedule
    grid: tuple[int, int]
    shared: int
    numbers: tuple[ctypes.c_int, ...]  # of `assign`
    cut_numbers: tuple[ctypes.c_int, ...]  # of `take_keys`


_TILE_N = 64 * HOPPER["CONSUMERS"]  # rows of a block


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
    """Rows and centroids of W bytes each, uint8 [passes · G, N, W] and [G, K, W]: see cuda/assign_sm90.cu."""
    rows, centroids = whole_lines(rows), whole_lines(centroids)
    (_, N, W), (G, K, _) = rows.shape, centroids.shape
    if (centroids.stride(1) % _SECTOR or centroids.data_ptr() % _SECTOR) and N >= _COPY_LEAST_N:
        centroids = empty_lines(G, K, W, centroids.device).copy_(centroids)
    ids, best = outputs(rows[:G], scores)
    if not (G and N):
        return ids, best
    call, cluster = _prepare(kind, len(rows) // G, G, N, K, W, rows.device.index), HOPPER["CLUSTER"]
    keys = (
        torch.zeros((call.plan.cut, cluster * _TILE_N), dtype=torch.int64, device=rows.device)
        if call.plan.cut
        else None
    )
    boxes = (rows, _TILE_N), (centroids, call.plan.tile_k // cluster)
    maps = [_tensor_map(tensor.data_ptr(), tensor.shape, tensor.stride(), box) for tensor, box in boxes]
    tensors = [pointer(tensor) for tensor in (ids, best, keys)]
    with torch.cuda.device_of(rows):
        launch(
            call.functions["assign"],
            call.grid,
            128 * (HOPPER["CONSUMERS"] + 1),
            call.shared,
            *maps,
            *tensors,
            *call.numbers,
        )
        if keys is not None:
            launch(
                call.functions["take_keys"],
                (call.plan.cut, 1),
                cluster * _TILE_N,
                0,
                tensors[2],
                *tensors[:2],
                *call.cut_numbers,
            )
    return ids, best


@functools.lru_cache(maxsize=256)
def _tensor_map(
    address: int, shape: tuple[int, int, int], strides: tuple[int, int, int], box_rows: int
) -> ctypes.Array:
    """The copy engine's map of uint8 [G, N, W] at that address: boxes of box_rows rows × 128 bytes, swizzled; zeros beyond the edges."""
    from cuda.bindings import driver

    G, N, W = shape
    steps = strides[1] if N > 1 else W, strides[0] if G > 1 else 16
    answer = nvrtc.take(
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
    return (ctypes.c_char * 128).from_buffer_copy(ctypes.string_at(answer.getPtr(), 128))
