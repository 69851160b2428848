"""Assignment on the CPU equals `reference.py`, bit for bit, by tables or by counting, on any number of threads."""

import ctypes

import pytest
import torch

from apc.ops import _numba, reference
from apc.ops import assign_cpu as module
from apc.ops.assign_cpu import assign_cpu, assign_weighted_cpu

SHAPES = [  # (G, N, K, D)
    pytest.param((1, 1, 1, 1), id="one-of-everything"),
    pytest.param((1, 0, 3, 130), id="N0"),
    pytest.param((3, 0, 3, 130), id="G3-N0"),
    pytest.param((0, 5, 3, 130), id="G0"),
    pytest.param((1, 1, 300, 129), id="N1"),
    pytest.param((1, 301, 1, 257), id="K1"),
    pytest.param((1, 3, 65, 7), id="D7"),
    pytest.param((1, 67, 63, 40), id="one-span"),
    pytest.param((1, 70, 64, 240), id="six-spans"),
    pytest.param((1, 71, 129, 281), id="one-past-seven-spans"),
    pytest.param((3, 141, 67, 131), id="G3-D131"),
    pytest.param((1, 1025, 65, 1531), id="one-past-a-tile"),
    pytest.param((2, 2111, 97, 1031), id="primes"),
    pytest.param((1, 133, 257, 2579), id="few-rows"),
    pytest.param((1, 67, 41, 16391), id="D16391"),
    pytest.param((1, 66, 7, 40009), id="D40009"),
    pytest.param((1, 37, 4099, 131), id="many-clusters"),
]
WAYS = {"counting": 0, "tables": 2**40, "chosen": 2}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill the results of torch.empty and scratch memory with a wrong number, so that unwritten elements fail."""
    empty, memory = torch.empty, module._memory

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(99)

    def poisoned_memory(size):
        kept = memory(size)
        kept[:] = 0xAA
        return kept

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "_memory", poisoned_memory)


@pytest.fixture
def fresh_seed():
    """A new seed in every run; a failing comparison prints it."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def threads():
    """A function that sets torch's number of threads; the number is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(module, "_TABLES_GAIN", WAYS[request.param])


def assert_same(got, expected, note):
    for name, ours, theirs in zip(("ids", "sums"), got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (name, note)
        assert torch.equal(ours, theirs), (name, note)


def patterns(G, N, D, density=0.5):
    """Random bool rows; the first is all zero, the last all one."""
    active = torch.rand(G, N, D) < density
    if N > 1:
        active[:, 0], active[:, -1] = False, True
    return active


def centroids_of(G, K, D):
    """Random centroids with duplicates, so that ties occur."""
    active = torch.rand(G, K, D) < 0.5
    if K > 2:
        active[:, K // 2] = True
        active[:, K // 2 + 1 :] = active[:, : K - K // 2 - 1]
    return reference.pack(active)


def importances(G, N, D):
    """Random uint8 rows; the first is all zero, the last all 255, the largest possible sum."""
    importance = torch.randint(0, 256, (G, N, D), dtype=torch.uint8)
    if N > 1:
        importance[:, 0], importance[:, -1] = 0, 255
    return importance


@pytest.mark.parametrize("shape", SHAPES)
def test_assign_equals_reference(shape, way, fresh_seed):
    G, N, K, D = shape
    rows, centroids = reference.pack(patterns(G, N, D)), centroids_of(G, K, D)
    expected = reference.assign(rows, centroids)
    assert_same(assign_cpu(rows, centroids), expected, f"seed {fresh_seed}")
    ids, nothing = assign_cpu(rows, centroids, scores=False)
    assert nothing is None and torch.equal(ids, expected[0])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_assign_weighted_equals_reference(shape, power, fresh_seed):
    G, N, K, D = shape
    if 255**power * D >= 2**31:
        D = 33025  # the longest row whose sum fits int32
    importance, centroids = importances(G, N, D), centroids_of(G, K, D)
    expected = reference.assign_weighted(importance, centroids, power)
    assert_same(assign_weighted_cpu(importance, centroids, power), expected, f"seed {fresh_seed}")
    ids, nothing = assign_weighted_cpu(importance, centroids, power, scores=False)
    assert nothing is None and torch.equal(ids, expected[0])


def test_random_sizes_equal_reference(fresh_seed):
    for _ in range(12):
        G, N, K, D = (int(torch.randint(1, most, ())) for most in (4, 300, 200, 900))
        note = f"seed {fresh_seed}, G {G}, N {N}, K {K}, D {D}"
        rows, centroids, importance = (
            reference.pack(patterns(G, N, D, 0.3)),
            centroids_of(G, K, D),
            importances(G, N, D),
        )
        assert_same(assign_cpu(rows, centroids), reference.assign(rows, centroids), note)
        assert_same(
            assign_weighted_cpu(importance, centroids, 2), reference.assign_weighted(importance, centroids, 2), note
        )


@pytest.mark.parametrize("K", [2, 64, 65, 200])
def test_equal_centroids_give_the_lowest_id(K, way):
    rows = reference.pack(torch.ones(1, 70, 130, dtype=torch.bool))
    ids, overlap = assign_cpu(rows, rows[:, :1].expand(1, K, -1))
    assert (ids == 0).all() and (overlap == 130).all()
    ids, captured = assign_weighted_cpu(
        torch.full((1, 70, 130), 255, dtype=torch.uint8), rows[:, :1].expand(1, K, -1), 2
    )
    assert (ids == 0).all() and (captured == 130 * 255**2).all()


@pytest.mark.parametrize("D", [65_408, 65_536, 70_001], ids=["longest-by-tables", "overlap-2^16", "D70001"])
def test_overlap_of_long_rows_does_not_wrap(D, way):
    rows, centroids = (
        reference.pack(torch.ones(1, 70, D, dtype=torch.bool)),
        reference.pack(torch.arange(D).expand(1, 3, D) >= torch.tensor([[[9], [0], [0]]])),
    )
    ids, overlap = assign_cpu(rows, centroids)
    assert (ids == 1).all() and (overlap == D).all()


def test_slices_of_larger_tensors_are_read_in_place(way, fresh_seed):
    G, N, K, D = 2, 131, 70, 260
    rows, importance, centroids = (
        reference.pack(patterns(G, 3 * N, D)),
        importances(G, 3 * N, D),
        centroids_of(G, 2 * K, D),
    )
    views = {
        "rows in the middle": (rows[:, N : 2 * N], importance[:, N : 2 * N], centroids[:, K:]),
        "every third row": (rows[:, ::3], importance[:, ::3], centroids[:, ::2]),
        "bytes not contiguous": (
            rows[:, :N].mT.contiguous().mT,
            importance[:, :N].mT.contiguous().mT,
            centroids.mT.contiguous().mT,
        ),
        "one row expanded": (rows[:, 5:6].expand(G, N, -1), importance[:, 5:6].expand(G, N, -1), centroids),
    }
    for name, (some_rows, some_importance, some_centroids) in views.items():
        assert_same(
            assign_cpu(some_rows, some_centroids),
            reference.assign(some_rows, some_centroids),
            f"{name}, seed {fresh_seed}",
        )
        expected = reference.assign_weighted(some_importance, some_centroids, 1)
        assert_same(assign_weighted_cpu(some_importance, some_centroids, 1), expected, f"{name}, seed {fresh_seed}")


def test_bytes_beyond_a_tensor_are_not_read(way):
    """A row's last span ends past the row, where another row's ones must not count."""
    everything = torch.full((1, 140, 48), 255, dtype=torch.uint8)
    everything[:, :, 16:32] = 0
    rows, centroids = everything[:, ::2, 16:32], everything[:, 1::2, 16:32]
    ids, overlap = assign_cpu(rows, centroids)
    assert not ids.any() and not overlap.any()


@pytest.mark.parametrize("pool", ["openmp", "python"])
def test_any_number_of_threads_gives_the_same(pool, way, threads, monkeypatch, fresh_seed):
    G, N, K, D = 2, 1601, 300, 333
    rows, importance, centroids = reference.pack(patterns(G, N, D)), importances(G, N, D), centroids_of(G, K, D)
    few = rows[:, :30]
    monkeypatch.setattr(module, "_FEW", 0)
    if pool == "python":
        monkeypatch.setattr(_numba, "process", object())
    elif not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        pytest.skip("this torch has no OpenMP")
    expected = (
        reference.assign(rows, centroids),
        reference.assign(few, centroids),
        reference.assign_weighted(importance, centroids, 2),
    )
    for number in (1, 2, 3, 7):
        threads(number)
        note = f"{number} threads, seed {fresh_seed}"
        assert_same(assign_cpu(rows, centroids), expected[0], note)
        assert_same(assign_cpu(few, centroids), expected[1], note)
        assert_same(assign_cpu(rows[:1], centroids[:1]), [part[:1] for part in expected[0]], note)
        assert_same(assign_weighted_cpu(importance, centroids, 2), expected[2], note)
