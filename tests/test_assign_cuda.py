"""Tensor-core assignment: variants compile without a GPU, schedules cover all work once, all paths agree exactly."""

import time
import warnings

import pytest
import torch

from apc import ops
from apc.ops import assign_cuda, nvrtc, reference
from apc.ops.assign_cuda import Variant, schedule
from apc.ops.nvrtc import Program, compile_program

SHAPES = [  # (G, N, K, D)
    pytest.param((1, 1, 1, 1), id="one-of-each"),
    pytest.param((1, 300, 1, 130), id="K1"),
    pytest.param((1, 257, 257, 257), id="one-past-every-tile"),
    pytest.param((1, 1009, 251, 1531), id="primes"),
    pytest.param((3, 521, 131, 1531), id="G3-primes"),
    pytest.param((30, 100, 256, 1536), id="G30"),
    pytest.param((1, 5003, 2039, 14341), id="large-primes"),
    pytest.param((2, 37, 70, 14336), id="D14336"),
    pytest.param((1, 70, 9, 40009), id="overlap-beyond-16384"),
    pytest.param((1, 40000, 600, 256), id="cut-last-round"),
    pytest.param((1, 9001, 300, 130), id="centroids-copied"),
    pytest.param((1, 3, 16381, 300), id="many-clusters"),
    pytest.param((2, 0, 3, 130), id="N0"),
]


@pytest.fixture(autouse=True)
def fresh_seed():
    """New random inputs in every run; the seed is printed with a failure."""
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill the results of torch.empty with a wrong number, so that an unwritten element fails the comparison."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(99))


def rows_of(G: int, N: int, D: int) -> torch.Tensor:
    """Random patterns; the first is all zero, the last all one."""
    active = torch.rand(G, N, D) < torch.rand(G, N, 1)
    if N > 1:
        active[:, 0], active[:, -1] = False, True
    return reference.pack(active)


def centroids_of(G: int, K: int, D: int) -> torch.Tensor:
    """Random centroids; one is all ones, and the last copies the first."""
    active = torch.rand(G, K, D) < 0.5
    if K > 2:
        active[:, K // 2], active[:, -1] = True, active[:, 0]
    return reference.pack(active)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_ampere_kernel_compiles(arch):
    assert b"assign" in compile_program(Variant(arch).program())


@pytest.mark.parametrize(
    ("kind", "passes", "tile_k", "tail"), [("b1", 1, 64, 1), ("b1", 1, 256, 4), ("u8", 1, 64, 4), ("u8", 2, 128, 1)]
)
def test_hopper_kernel_compiles(kind, passes, tile_k, tail):
    cubin = compile_program(Variant("sm_90a", kind, tile_k, tail, passes).program())
    assert b"assign" in cubin and b"take_keys" in cubin


def test_a_compile_error_has_the_compilers_log(monkeypatch):
    monkeypatch.setattr(Program, "source", lambda self: "__global__ void f() { nonsense; }")
    with pytest.raises(RuntimeError, match=r"sm_80[\s\S]*nonsense"):
        compile_program(Variant("sm_80").program())


@pytest.mark.parametrize(
    ("G", "N", "K", "W"),
    [
        (1, 65536, 17000, 65808),
        (1, 65536, 2048, 1792),
        (1, 65536, 16384, 1792),
        (1, 65536, 2048, 14336),
        (30, 301056, 2048, 192),
        (1, 1, 1, 16),
        (3, 257, 700, 48),
        (1, 20000, 257, 192),
    ],
)
@pytest.mark.parametrize("workers", [1, 57, 66])
def test_a_schedule_covers_every_tile_once(G, N, K, W, workers):
    plan = schedule(G, N, K, W, 256, workers)
    tiles = -(-N // 256) * G
    assert plan.whole + plan.cut == tiles and plan.k_tiles == -(-K // plan.tile_k) and 1 <= plan.splits <= plan.k_tiles
    # As the kernel cuts a row tile: every part has a tile of clusters, and the parts together have all tiles.
    edges = [part * plan.k_tiles // plan.splits for part in range(plan.splits + 1)]
    assert edges[0] == 0 and edges[-1] == plan.k_tiles and all(a < b for a, b in zip(edges, edges[1:], strict=False))


def test_without_tensor_cores_the_int8_kernel_runs_after_one_warning(monkeypatch):
    module = __import__("importlib").import_module("apc.ops.assign")
    module._warn_once.cache_clear()
    monkeypatch.setattr(module, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(assign_cuda, "unavailable", lambda *args: "no such unit")
    monkeypatch.setattr(module, "assign_triton", lambda rows, centroids, scores: (rows, centroids))
    rows, centroids = rows_of(1, 4, 130), centroids_of(1, 3, 130)
    with pytest.warns(RuntimeWarning, match="slower than b1 tensor cores: no such unit"):
        module.assign(rows, centroids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.assign(rows, centroids)


def test_a_device_without_b1_tensor_cores_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability in ((7, 5), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        with pytest.raises(nvrtc.Unavailable, match=f"Some GPU has compute capability {capability[0]}.{capability[1]}"):
            nvrtc.architecture(torch.device("cuda", 0))


@pytest.fixture(params=["hopper", "ampere"])
def b1(request, monkeypatch):
    """`assign_b1` with this GPU's kernel, or with the Ampere kernel, which runs on Hopper too."""
    if request.param == "ampere":
        major, minor = torch.cuda.get_device_capability()
        monkeypatch.setattr(assign_cuda, "architecture", lambda device: f"sm_{major}{minor}")
        monkeypatch.setattr(assign_cuda, "unavailable", lambda *args: None)
    return ops.assign_b1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_b1_int8_and_reference_agree(b1, shape):
    G, N, K, D = shape
    rows, centroids = rows_of(G, N, D).cuda(), centroids_of(G, K, D).cuda()
    expected = reference.assign(rows, centroids)
    for _ in range(2):
        for function in (b1, ops.assign_triton, ops.assign):
            for got, want in zip(function(rows, centroids), expected, strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want), function
            ids, nothing = function(rows, centroids, scores=False)
            assert nothing is None and torch.equal(ids, expected[0]), function


@pytest.mark.gpu
@pytest.mark.parametrize("squares_bytes", [2**30, 2**20])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_u8_int8_and_reference_agree(shape, power, squares_bytes, monkeypatch):
    module = __import__("importlib").import_module("apc.ops.assign")
    monkeypatch.setattr(module, "_SQUARES_BYTES", squares_bytes)
    monkeypatch.setattr(module, "_SQUARES_LEAST_K", 1)
    G, N, K, D = shape
    importance, centroids = torch.randint(0, 256, (G, N, D), dtype=torch.uint8), centroids_of(G, K, D).cuda()
    importance[:, -1:], importance[:, :1] = 255, 0
    importance = importance.cuda()
    if 255**power * D >= 2**31:  # sums that int32 does not hold
        with pytest.raises(ValueError, match=rf"power {power} needs {255**power}·D < 2\^31, got D = {D}"):
            ops.assign_weighted(importance, centroids, power)
        return
    expected = reference.assign_weighted(importance, centroids, power)
    for function in (ops.assign_weighted, ops.assign_weighted_triton):
        for got, want in zip(function(importance, centroids, power), expected, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want), function
        ids, nothing = function(importance, centroids, power, scores=False)
        assert nothing is None and torch.equal(ids, expected[0]), function


@pytest.mark.gpu
def test_rows_that_tma_cannot_read_are_copied(b1):
    rows, centroids = rows_of(2, 300, 700).cuda(), centroids_of(2, 9, 700).cuda()
    expected = reference.assign(rows, centroids)
    wide = torch.zeros(2, 300, rows.shape[-1] + 3, dtype=torch.uint8, device="cuda")
    wide[..., 3:] = rows
    shifted = (
        torch.zeros(centroids.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(centroids).copy_(centroids)
    )
    assert all(torch.equal(got, want) for got, want in zip(b1(rows, shifted), expected, strict=True))
    one = rows[:1].expand(2, -1, -1)
    assert all(
        torch.equal(got, want) for got, want in zip(b1(one, centroids), reference.assign(one, centroids), strict=True)
    )
    for odd in (wide[..., 3:], rows.transpose(0, 1).contiguous().transpose(0, 1)):
        for function in (b1, ops.assign_triton):
            assert all(torch.equal(got, want) for got, want in zip(function(odd, centroids), expected, strict=True))
