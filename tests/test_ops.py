"""Every operation equals its plain twin in `reference.py`, bit for bit, on the CPU, on CUDA and in Triton."""

import importlib

import pytest
import torch

from apc import ops
from apc.ops import reference

NO_GPU = not torch.cuda.is_available()

SHAPES = [  # (G, N, K, D); G = 0: no group dimension
    pytest.param((0, 1, 1, 1), id="one-row-one-cluster-one-neuron"),
    pytest.param((0, 37, 5, 7), id="D7"),
    pytest.param((0, 150, 1, 130), id="K1-D130"),
    pytest.param((0, 1, 9, 129), id="N1-D129"),
    pytest.param((0, 0, 3, 130), id="N0"),
    pytest.param((3, 0, 3, 130), id="G3-N0"),
    pytest.param((3, 141, 6, 130), id="G3-D130"),
    pytest.param((0, 129, 129, 257), id="one-past-every-tile"),
    pytest.param((0, 50, 9, 1536), id="D1536"),
]
BEYOND = pytest.param((0, 40, 5, 16391), id="D16391")  # too long for the interpreter
MANY = pytest.param((0, 3000, 1100, 72), id="many-rows-and-clusters")  # several CPU blocks of both
DENSE = pytest.param((2, 2500, 40, 1536), id="several-blocks-of-D1536")

IMPLEMENTATIONS = [
    pytest.param("fast", "cpu", id="cpu"),
    pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.skipif(not NO_GPU, reason="the interpreter is for machines without a GPU")),
    pytest.param("fast", "cuda", id="cuda", marks=pytest.mark.gpu),
]
CASES = [
    *(pytest.param(*i.values, *s.values, id=f"{i.id}-{s.id}", marks=i.marks) for i in IMPLEMENTATIONS for s in SHAPES),
    *(pytest.param(*i.values, *s.values, id=f"{i.id}-{s.id}", marks=i.marks) for i in IMPLEMENTATIONS[::2] for s in (BEYOND, MANY, DENSE)),
]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
POWERS = [1, 2]


def run(kind: str, device: str, name: str, *args):
    """The operation `name` in this implementation, its results on the CPU."""
    function = getattr(ops, name if kind == "fast" else f"{name}_triton")
    moved = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    results = function(*moved)
    return [result.cpu() for result in results]


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


def patterns(G: int, N: int, D: int) -> torch.Tensor:
    """Random rows; the first is all zero and the last all one."""
    active = torch.rand(*([G] if G else []), N, D) < 0.4
    if N > 1:
        active[..., 0, :] = False
        active[..., -1, :] = True
    return active


def importances(G: int, N: int, D: int) -> torch.Tensor:
    """Random uint8 rows; the first is all zero and the last all 255, the largest sum there is."""
    importance = torch.randint(0, 256, (*([G] if G else []), N, D), dtype=torch.uint8)
    if N > 1:
        importance[..., 0, :] = 0
        importance[..., -1, :] = 255
    return importance


def centroids_of(G: int, K: int, D: int) -> torch.Tensor:
    """Random centroids, the last a copy of the first and the one before it all ones, so that ties and the largest sums occur."""
    active = torch.rand(*([G] if G else []), K, D) < 0.5
    if K > 2:
        active[..., -2, :] = True
        active[..., -1, :] = active[..., 0, :]
    return reference.pack(active)


def memberships(G: int, N: int, K: int) -> torch.Tensor:
    """Random ids, with cluster 1 empty where there are three or more."""
    ids = torch.randint(0, K, (*([G] if G else []), N))
    return ids.masked_fill(ids == 1, 0) if K > 2 else ids


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty returns is filled with a wrong answer: an element that nothing writes fails the comparison."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("kind", "device", "shape"), CASES)
def test_assign_equals_reference(kind, device, shape):
    G, N, K, D = shape
    rows, centroids = reference.pack(patterns(G, N, D)), centroids_of(G, K, D)
    assert_same(run(kind, device, "assign", rows, centroids), reference.assign(rows, centroids))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("kind", "device", "shape"), CASES)
def test_assign_weighted_equals_reference(kind, device, shape, power):
    G, N, K, D = shape
    importance, centroids = importances(G, N, D), centroids_of(G, K, D)
    assert_same(run(kind, device, "assign_weighted", importance, centroids, power), reference.assign_weighted(importance, centroids, power))


@pytest.mark.parametrize(("kind", "device", "shape"), CASES)
def test_accumulate_equals_reference(kind, device, shape):
    G, N, K, D = shape
    rows, ids = reference.pack(patterns(G, N, D)), memberships(G, N, K)
    assert_same(run(kind, device, "accumulate", rows, ids, K, D), reference.accumulate(rows, ids, K, D))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("kind", "device", "shape"), CASES)
def test_accumulate_weighted_equals_reference(kind, device, shape, power):
    G, N, K, D = shape
    importance, ids = importances(G, N, D), memberships(G, N, K)
    scales = reference.row_scales(importance, power)
    expected = reference.accumulate_weighted(importance, ids, scales, K, power)
    assert_same(run(kind, device, "accumulate_weighted", importance, ids, scales, K, power), expected)


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_operations_read_slices_of_larger_tensors(kind, device):
    G, N, K, D = 2, 50, 7, 130
    rows, importance = reference.pack(patterns(G, 3 * N, D)).to(device)[:, N : 2 * N], importances(G, 3 * N, D).to(device)[:, N : 2 * N]
    centroids, ids = centroids_of(G, K, D), memberships(G, N, K)
    scales = reference.row_scales(importance.cpu(), 2)
    assert not rows.is_contiguous() and not importance.is_contiguous()
    assert_same(run(kind, device, "assign", rows, centroids), reference.assign(rows.cpu(), centroids))
    assert_same(run(kind, device, "assign_weighted", importance, centroids, 2), reference.assign_weighted(importance.cpu(), centroids, 2))
    assert_same(run(kind, device, "accumulate", rows, ids, K, D), reference.accumulate(rows.cpu(), ids, K, D))
    expected = reference.accumulate_weighted(importance.cpu(), ids, scales, K, 2)
    assert_same(run(kind, device, "accumulate_weighted", importance, ids, scales, K, 2), expected)


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_duplicated_centroids_lose_to_the_lowest_id(kind, device):
    N, D, K = 20, 130, 200  # more clusters than one tile holds
    rows, importance = reference.pack(patterns(0, N, D)), importances(0, N, D)
    centroids = centroids_of(0, 1, D).expand(K, -1).contiguous()
    assert run(kind, device, "assign", rows, centroids)[0].tolist() == [0] * N
    for power in POWERS:
        assert run(kind, device, "assign_weighted", importance, centroids, power)[0].tolist() == [0] * N


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_worked_example_of_the_masked_distance(kind, device):
    x, c = (torch.tensor([[bit == "1" for bit in bits]]) for bits in ("101100", "011010"))
    ids, overlap = run(kind, device, "assign", reference.pack(x), reference.pack(c))
    assert ids.tolist() == [0]
    assert (ops.popcount(ops.pack(x)) - overlap).tolist() == [2]


def test_weighted_sums_are_exact_past_float32():
    D = 16391  # 65025·D is beyond 2²⁴: float32 could not tell these two centroids apart
    importance = torch.full((1, D), 255, dtype=torch.uint8)
    importance[0, 0] = 1
    active = torch.ones(2, D, dtype=torch.bool)
    active[0, 0] = False
    ids, captured = ops.assign_weighted(importance, ops.pack(active), power=2)
    assert (ids.tolist(), captured.tolist()) == ([1], [65025 * (D - 1) + 1])


def test_assignment_is_exact_whatever_the_matmul_precision():
    importance, centroids = importances(0, 64, 300), centroids_of(0, 20, 300)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(ops.assign_weighted(importance, centroids, 2), reference.assign_weighted(importance, centroids, 2))
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_sums_are_exact_over_several_spans_of_rows():
    update = importlib.import_module("apc.ops.update")
    N = 2 * update._CPU_SPAN + 5
    importance = torch.zeros(N, 3, dtype=torch.uint8)
    importance[:, 1] = 1  # one neuron owns every row, so its sum is the largest that N rows can make
    scales = ops.row_scales(importance)
    sums, sizes = ops.accumulate_weighted(importance, torch.zeros(N, dtype=torch.int64), scales, 2)
    assert (sums.tolist(), sizes.tolist()) == ([[0, N * 2**36, 0], [0, 0, 0]], [N, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [1, 7, 8, 127, 128, 129, 1536, 16391])
@pytest.mark.parametrize("lead", [(), (0,), (5,), (3, 4)], ids=str)
def test_packing_equals_reference_and_unpacks_to_itself(device, D, lead):
    active = torch.rand(*lead, D) < 0.5
    rows = ops.pack(active.to(device))
    assert rows.shape[-1] == ops.row_bytes(D) and rows.shape[-1] % 16 == 0 and 0 <= 8 * rows.shape[-1] - D < 128
    assert torch.equal(rows.cpu(), reference.pack(active))
    assert torch.equal(ops.unpack(rows, D).cpu(), active) and torch.equal(reference.unpack(rows.cpu(), D), active)
    assert torch.equal(ops.popcount(rows).cpu(), reference.popcount(rows.cpu()))
    assert torch.equal(ops.popcount(rows).cpu(), active.sum(-1, dtype=torch.int32))


def test_bit_j_of_byte_w_is_neuron_8w_plus_j():
    active = torch.zeros(20, dtype=torch.bool)
    active[[0, 3, 17]] = True
    assert ops.pack(active).tolist() == [0b1001, 0, 0b10] + [0] * 13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int64", "few levels", "all equal", "infinite"])
def test_top_mask_equals_reference_with_ties_to_the_lowest_index(device, values):
    D = 130
    made = {
        "int64": torch.randint(-(2**60), 2**60, (3, 8, D)),
        "few levels": torch.randint(0, 4, (3, 8, D)),
        "all equal": torch.zeros(3, 8, D),
        "infinite": torch.randn(3, 8, D).masked_fill(torch.rand(3, 8, D) < 0.5, float("inf")).masked_fill(torch.rand(3, 8, D) < 0.3, -float("inf")),
    }
    x = made[values] if values in made else torch.randn(3, 8, D).to(getattr(torch, values))
    for m in (1, 2, 65, D - 1, D):
        mask = ops.top_mask(x.to(device), m).cpu()
        assert (mask.sum(-1) == m).all()
        assert torch.equal(mask, reference.top_mask(x, m))


def test_top_mask_of_no_rows_and_of_one_row():
    assert ops.top_mask(torch.zeros(0, 9), 3).shape == (0, 9)
    assert ops.top_mask(torch.tensor([1, 5, 5, 5, 0]), 2).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("importance", [None, "uint8", "float32", "bfloat16"])
@pytest.mark.parametrize("frequency", [None, "per neuron", "per group", "huge"])
def test_cut_or_fill_equals_reference_and_has_m_ones(device, importance, frequency):
    G, N, D = 2, 9, 130
    active = patterns(G, N, D)
    levels = torch.randint(0, 5, (G, N, D))  # few levels, so that every key decides somewhere
    weights = None if importance is None else levels.to(getattr(torch, importance))
    counts = {
        None: None,
        "per neuron": torch.randint(0, 3, (D,)),
        "per group": torch.randint(0, 3, (G, 1, D)),
        "huge": torch.randint(0, 2**31, (D,)),
    }[frequency]
    moved = [None if x is None else x.to(device) for x in (active, weights, counts)]
    for m in (1, 50, D):
        rows = ops.cut_or_fill(moved[0], m, moved[1], moved[2]).cpu()
        assert (ops.popcount(rows) == m).all()
        assert torch.equal(rows, reference.cut_or_fill(active, m, weights, counts))


def test_cut_or_fill_never_drops_an_active_neuron_for_an_inactive_one():
    active = torch.tensor([[False, True, False, True, False, False]])
    importance = torch.tensor([[255, 0, 9, 1, 9, 9]], dtype=torch.uint8)
    frequency = torch.tensor([2**40, 0, 1, 0, 2, 2])
    cut = [ops.unpack(ops.cut_or_fill(active, m, importance, frequency), 6)[0].nonzero().flatten().tolist() for m in (1, 2, 3, 4, 5)]
    assert cut == [[3], [1, 3], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5]]


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("D", [1, 7, 130, 1536])
def test_binarize_has_exactly_m_ones_and_equals_reference(D, density):
    m = ops.mask_size(D, density)
    assert m == max(1, int(density * D + 0.5))
    for sums in (torch.randint(0, 2**62, (6, D)), torch.randint(0, 3, (2, 6, D)), torch.zeros(1, D, dtype=torch.int64)):
        centroids = ops.binarize(sums, density)
        assert (ops.popcount(centroids) == m).all()
        assert torch.equal(centroids, reference.binarize(sums, density))


def test_binarize_gives_ties_to_the_lowest_neuron():
    assert ops.unpack(ops.binarize(torch.tensor([[1, 7, 1, 1]]), 0.5), 4).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(9, 1), (0, 130), (3, 20, 130), (5, 33025), (2000, 1536)], ids=str)
def test_row_scales_normalise_within_2_percent(device, power, shape):
    importance = importances(shape[0] if len(shape) == 3 else 0, *shape[-2:])
    scales = ops.row_scales(importance.to(device), power).cpu()
    assert torch.equal(scales, reference.row_scales(importance, power))
    totals = (importance.to(torch.int64) ** power).sum(-1)
    assert (scales[totals == 0] == 0).all()
    error = (scales * totals)[totals > 0].double() / 2**36 - 1
    assert (error.abs() < 0.02).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [0, 1, 2], ids=["binary", "magnitude", "energy"])
def test_captured_total_never_falls_over_lloyd_iterations(device, power):
    G, N, K, D, density = 2, 400, 12, 130, 0.4
    importance = (importances(G, N, D) >> torch.randint(0, 8, (G, N, 1), dtype=torch.uint8)).to(device)
    active = importance > 20
    rows = ops.pack(active)
    scales = ops.row_scales(importance, power) if power else torch.ones((G, N), dtype=torch.int64, device=device)
    centroids = ops.cut_or_fill(active[:, :K], ops.mask_size(D, density), importance[:, :K])
    totals = []
    for _ in range(8):
        ids, captured = ops.assign_weighted(importance, centroids, power) if power else ops.assign(rows, centroids)
        totals.append(int((scales * captured).sum()))
        sums, sizes = ops.accumulate_weighted(importance, ids, scales, K, power) if power else ops.accumulate(rows, ids, K, D)
        assert (sizes.sum(-1) == N).all()
        updated = ops.binarize(sums, density)
        # What the update promises: the same members, captured by the new centroids.
        kept = int((sums * ops.unpack(updated, D)).sum())
        assert kept >= totals[-1]
        totals.append(kept)
        centroids = updated
    assert totals == sorted(totals) and totals[-1] > totals[0]


def test_errors_state_both_shapes():
    rows, importance = ops.pack(patterns(0, 4, 130)), importances(0, 4, 130)
    wide, deep = centroids_of(0, 3, 300), centroids_of(2, 3, 130)
    ids, scales = memberships(0, 5, 3), torch.ones(4, dtype=torch.int64)
    failing = [
        (r"\[3, 48\].*\[4, 32\]", lambda: ops.assign(rows, wide)),
        (r"\[2, 3, 32\].*\[4, 32\]", lambda: ops.assign(rows, deep)),
        (r"\[3, 48\].*\[4, 32\]", lambda: ops.assign_triton(rows, wide)),
        (r"bool \[4, 130\].*\[3, 32\]", lambda: ops.assign(ops.unpack(rows, 130), deep[0])),
        (r"\[0, 32\].*\[4, 32\]", lambda: ops.assign(rows, deep[0, :0])),
        (r"\[3, 48\].*\[4, 130\]", lambda: ops.assign_weighted(importance, wide)),
        (r"\[3, 48\].*\[4, 130\]", lambda: ops.assign_weighted_triton(importance, wide)),
        (r"\[5\].*\[4, 32\]", lambda: ops.accumulate(rows, ids, 3, 130)),
        (r"\[5\].*\[4, 32\]", lambda: ops.accumulate_triton(rows, ids, 3, 130)),
        (r"\[4, 32\].*48.*\[5\]", lambda: ops.accumulate(rows, ids, 3, 300)),
        (r"int32 \[4\].*\[4, 32\]", lambda: ops.accumulate(rows, ids[:4].int(), 3, 130)),
        (r"\[5\].*\[4, 130\]", lambda: ops.accumulate_weighted(importance, ids, scales, 3)),
        (r"float32 \[4\].*\[4, 130\]", lambda: ops.accumulate_weighted(importance, ids[:4], scales.float(), 3)),
        (r"\[5\].*\[4, 130\]", lambda: ops.accumulate_weighted_triton(importance, ids, scales, 3)),
        (r"\[4, 31\].*\[4, 130\]", lambda: ops.cut_or_fill(ops.unpack(rows, 130), 3, importance[:, :31])),
        (r"\[7\].*\[4, 130\]", lambda: ops.cut_or_fill(ops.unpack(rows, 130), 3, frequency=torch.ones(7, dtype=torch.int64))),
        (r"\[\.\.\., 48\].*\[4, 32\]", lambda: ops.unpack(rows, 300)),
    ]
    for message, call in failing:
        with pytest.raises(ValueError, match=message):
            call()


def test_values_out_of_range_are_refused():
    rows, importance, centroids = ops.pack(patterns(0, 4, 130)), importances(0, 4, 130), centroids_of(0, 3, 130)
    ids, scales = torch.tensor([0, 1, 2, 3]), ops.row_scales(importance)
    failing = [
        ("from 0 to K - 1 = 2, got 0 to 3", lambda: ops.accumulate(rows, ids, 3, 130)),
        ("got -1 to 2", lambda: ops.accumulate(rows, ids - 1, 3, 130)),
        ("power must be 1", lambda: ops.assign_weighted(importance, centroids, 3)),
        ("power must be 1", lambda: ops.row_scales(importance, 0)),
        (r"65025·D < 2\^31", lambda: ops.assign_weighted(torch.zeros(1, 33026, dtype=torch.uint8), centroids_of(0, 1, 33026), 2)),
        (r"from 0 to 2\^36", lambda: ops.accumulate_weighted(importance, ids, scales - 1, 4)),
        ("not row_scales", lambda: ops.accumulate_weighted(importance[[3] * 4], ids * 0, torch.full((4,), 2**36), 4, 2)),
        ("density", lambda: ops.mask_size(10, 0.0)),
        ("density", lambda: ops.binarize(torch.zeros(1, 10, dtype=torch.int64), 1.01)),
        ("int64", lambda: ops.binarize(torch.zeros(1, 10), 0.5)),
        ("m must be from 1", lambda: ops.top_mask(torch.zeros(2, 5), 6)),
        ("NaN", lambda: ops.top_mask(torch.tensor([1.0, float("nan")]), 1)),
        ("negative", lambda: ops.cut_or_fill(torch.ones(2, dtype=torch.bool), 1, torch.tensor([1.0, -1.0]))),
        ("bool", lambda: ops.pack(torch.zeros(3))),
    ]
    for message, call in failing:
        with pytest.raises(ValueError, match=message):
            call()
