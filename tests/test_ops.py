"""Every operation equals its definition in `reference.py`, bit for bit, on the CPU, on CUDA and in Triton."""

import importlib

import pytest
import torch

from apc import ops
from apc.ops import accumulate_cpu, reference
from apc.ops.alignment import align_rows

accumulate = importlib.import_module("apc.ops.accumulate")

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
MANY = pytest.param((0, 3000, 1100, 72), id="many-rows-and-clusters")  # several CPU blocks of rows and clusters
DENSE = pytest.param((2, 2500, 40, 1536), id="several-blocks-of-D1536")

IMPLEMENTATIONS = [
    pytest.param("fast", "cpu", id="cpu"),
    pytest.param(
        "triton",
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(not NO_GPU, reason="the interpreter is for machines without a GPU"),
    ),
    pytest.param("fast", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
CASES = [
    *(pytest.param(*i.values, *s.values, id=f"{i.id}-{s.id}", marks=i.marks) for i in IMPLEMENTATIONS for s in SHAPES),
    *(
        pytest.param(*i.values, *s.values, id=f"{i.id}-{s.id}", marks=i.marks)
        for i in IMPLEMENTATIONS
        if i.id != "interpreter"
        for s in (BEYOND, MANY, DENSE)
    ),
]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
POWERS = [1, 2]


def run(kind: str, device: str, name: str, *args, **kwargs):
    """The operation `name` in this implementation, its results on the CPU."""
    function = getattr(ops, name if kind == "fast" else f"{name}_triton")
    results = function(
        *(_moved(arg, device) for arg in args), **{key: _moved(value, device) for key, value in kwargs.items()}
    )
    return _moved(results, "cpu")


def _moved(value, device: str):
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


def patterns(G: int, N: int, D: int) -> torch.Tensor:
    """Random rows; the first is all zero, the last all one."""
    active = torch.rand(*([G] if G else []), N, D) < 0.4
    if N > 1:
        active[..., 0, :] = False
        active[..., -1, :] = True
    return active


def importances(G: int, N: int, D: int) -> torch.Tensor:
    """Random uint8 rows; the first is all zero, the last all 255, the largest possible sum."""
    importance = torch.randint(0, 256, (*([G] if G else []), N, D), dtype=torch.uint8)
    if N > 1:
        importance[..., 0, :] = 0
        importance[..., -1, :] = 255
    return importance


def centroids_of(G: int, K: int, D: int) -> torch.Tensor:
    """Random centroids. The last copies the first, the one before is all ones: so ties and the largest sums occur."""
    active = torch.rand(*([G] if G else []), K, D) < 0.5
    if K > 2:
        active[..., -2, :] = True
        active[..., -1, :] = active[..., 0, :]
    return reference.pack(active)


def memberships(G: int, N: int, K: int) -> torch.Tensor:
    """Random ids; with three or more clusters, cluster 1 is empty."""
    ids = torch.randint(0, K, (*([G] if G else []), N))
    return ids.masked_fill(ids == 1, 0) if K > 2 else ids


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """In the interpreter, clusters of more than 20 rows are several pieces; this is also faster (fewer bits)."""
    if NO_GPU:
        monkeypatch.setattr(accumulate, "_TILE", accumulate._TILE | {"PIECE": 20, "BITS": 16})
        monkeypatch.setattr(accumulate, "_WEIGHTED_TILE", accumulate._WEIGHTED_TILE | {"PIECE": 20})


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill the results of torch.empty with a wrong number, so that an unwritten element fails the comparison."""
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
    assert_same(
        run(kind, device, "assign_weighted", importance, centroids, power),
        reference.assign_weighted(importance, centroids, power),
    )


@pytest.mark.parametrize("power", [0, *POWERS], ids=["binary", "magnitude", "energy"])
@pytest.mark.parametrize("shape", [(0, 40, 70, 130), (3, 21, 5, 72), (0, 0, 3, 130)], ids=str)
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_ids_are_the_same_without_scores(kind, device, shape, power):
    G, N, K, D = shape
    if power:
        name, args = "assign_weighted", (importances(G, N, D), centroids_of(G, K, D), power)
    else:
        name, args = "assign", (reference.pack(patterns(G, N, D)), centroids_of(G, K, D))
    ids, nothing = run(kind, device, name, *args, scores=False)
    assert nothing is None
    assert_same([ids], getattr(reference, name)(*args)[:1])


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


@pytest.mark.parametrize(
    ("power", "bits"), [(0, 64), (0, 32), (1, 64), (2, 64)], ids=["binary", "binary, int32", "magnitude", "energy"]
)
@pytest.mark.parametrize("shape", [(0, 60, 4, 130), (3, 33, 5, 72), (2, 0, 3, 130), (0, 90, 1, 257)], ids=str)
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_sums_are_added_to_out_in_place(kind, device, shape, power, bits):
    G, N, K, D = shape
    ids = memberships(G, N, K)
    if power:
        name, importance = "accumulate_weighted", importances(G, N, D)
        args = importance, ids, reference.row_scales(importance, power), K, power
    else:
        name, args = "accumulate", (reference.pack(patterns(G, N, D)), ids, K, D)
    lead = (G,) if G else ()
    limit, dtype = 2 ** (bits - 4), getattr(torch, f"int{bits}")
    before = torch.randint(-limit, limit, (*lead, K, D), dtype=dtype), torch.randint(0, 99, (*lead, K))
    expected = [(a + b).to(a.dtype) for a, b in zip(before, getattr(reference, name)(*args), strict=True)]
    assert_same(getattr(reference, name)(*args, out=tuple(part.clone() for part in before)), expected)
    out = tuple(part.clone().to(device) for part in before)
    assert_same(run(kind, device, name, *args, out=out), expected)
    assert_same([part.cpu() for part in out], expected)


@pytest.mark.parametrize("sizes", [(0, 70, 0), (1, 20, 21), (0, 0, 0, 3), (41,)], ids=str)
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_clusters_of_zero_one_and_several_pieces_add_up(kind, device, sizes, monkeypatch):
    for name in ("_TILE", "_WEIGHTED_TILE"):
        monkeypatch.setattr(accumulate, name, getattr(accumulate, name) | {"PIECE": 20})
    K, D = len(sizes), 140
    ids = torch.repeat_interleave(torch.arange(K), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids))]
    rows, importance = reference.pack(patterns(0, len(ids), D)), importances(0, len(ids), D)
    assert_same(run(kind, device, "accumulate", rows, ids, K, D), reference.accumulate(rows, ids, K, D))
    scales = reference.row_scales(importance)
    expected = reference.accumulate_weighted(importance, ids, scales, K)
    assert_same(run(kind, device, "accumulate_weighted", importance, ids, scales, K), expected)


@pytest.mark.parametrize("tile", [{}, {"UNROLL": 16, "BITS": 8}, {"BLOCK_W": 16}], ids=str)
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS[1:])
def test_accumulate_equals_reference_in_tiles_of_a_gpu(kind, device, tile, monkeypatch):
    monkeypatch.setattr(accumulate, "_TILE", accumulate._TILE | {"PIECE": 1024, "BITS": 4} | tile)
    N, K, D = 1100, 2, 600
    rows, ids = reference.pack(patterns(0, N, D)), (torch.rand(N) < 0.01).long()
    assert_same(run(kind, device, "accumulate", rows, ids, K, D), reference.accumulate(rows, ids, K, D))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 200_000, 33_000, 130), (7, 40_000, 9_000, 72), (1, 300_000, 3, 1536)], ids=str)
def test_many_rows_and_clusters_add_up_on_a_gpu(shape):
    G, N, K, D = shape
    rows, importance, ids = (
        function(G, N, size).cuda() for function, size in ((patterns, D), (importances, D), (memberships, K))
    )
    ids[ids % 3 == 0] = 0  # a cluster of many pieces
    packed, scales = ops.pack(rows), ops.row_scales(importance)
    assert_same(ops.accumulate(packed, ids, K, D), reference.accumulate(packed, ids, K, D))
    assert_same(
        ops.accumulate_weighted(importance, ids, scales, K), reference.accumulate_weighted(importance, ids, scales, K)
    )


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_scales_beyond_32_bits_count_in_full(kind, device):
    importance = importances(0, 50, 20) * (torch.rand(50, 20) < 0.05)
    importance[:25] = importance[:25].clamp(max=1)  # small totals: 2³⁶ / total exceeds 32 bits
    scales, ids = reference.row_scales(importance, 2), memberships(0, 50, 2)
    assert (scales >= 2**32).any() and (scales < 2**32).any()
    expected = reference.accumulate_weighted(importance, ids, scales, 2, 2)
    assert_same(run(kind, device, "accumulate_weighted", importance, ids, scales, 2, 2), expected)


@pytest.mark.parametrize("lead", [(), (1,), (40,), (3, 33), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("W", [16, 32, 192, 272, 13])
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_popcount_equals_reference(kind, device, W, lead):
    rows = torch.randint(0, 256, (*lead, W), dtype=torch.uint8)
    expected = sum(((rows >> j) & 1).sum(-1) for j in range(8)).int()
    assert_same([run(kind, device, "popcount", rows)], [expected])


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("kind", "device", "shape"), CASES)
def test_row_totals_equal_reference(kind, device, shape, power):
    G, N, _, D = shape
    importance = importances(G, N, D)
    assert_same([run(kind, device, "row_totals", importance, power)], [reference.row_totals(importance, power)])


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_operations_read_slices_of_larger_tensors(kind, device):
    G, N, K, D = 2, 50, 7, 130
    rows, importance = (
        reference.pack(patterns(G, 3 * N, D)).to(device)[:, N : 2 * N],
        importances(G, 3 * N, D).to(device)[:, N : 2 * N],
    )
    centroids, ids = centroids_of(G, K, D), memberships(G, N, K)
    scales = reference.row_scales(importance.cpu(), 2)
    assert not rows.is_contiguous() and not importance.is_contiguous()
    assert_same(run(kind, device, "assign", rows, centroids), reference.assign(rows.cpu(), centroids))
    assert_same(
        run(kind, device, "assign_weighted", importance, centroids, 2),
        reference.assign_weighted(importance.cpu(), centroids, 2),
    )
    assert_same(run(kind, device, "accumulate", rows, ids, K, D), reference.accumulate(rows.cpu(), ids, K, D))
    expected = reference.accumulate_weighted(importance.cpu(), ids, scales, K, 2)
    assert_same(run(kind, device, "accumulate_weighted", importance, ids, scales, K, 2), expected)
    assert_same([run(kind, device, "popcount", rows)], [reference.popcount(rows.cpu())])
    assert_same([run(kind, device, "row_totals", importance, 2)], [reference.row_totals(importance.cpu(), 2)])
    shifted = rows.flatten()[1:-31].view(-1, 32)  # no row starts at a multiple of 16 bytes
    assert_same(
        run(kind, device, "accumulate", shifted, ids.flatten()[1:], K, 255),
        reference.accumulate(shifted.cpu(), ids.flatten()[1:], K, 255),
    )


@pytest.mark.parametrize("D", [1, 2, 7, 15, 16, 131, 257, 600])
@pytest.mark.parametrize("N", [1, 37, 70])
@pytest.mark.parametrize(("_", "device"), [IMPLEMENTATIONS[1], IMPLEMENTATIONS[3]])
def test_aligned_rows_are_the_rows_padded_with_zeros(_, device, N, D):
    G = 2
    layouts = {
        "contiguous, to the end of memory": importances(G, N, D).to(device),
        "unaligned, in the middle": importances(G, N + 30, D + 5).to(device)[:, 9 : 9 + N, 3 : 3 + D],
        "unaligned, to the end of memory": importances(G, N + 1, D + 3).to(device)[:, 1:, 3:],
        "groups interleaved": importances(N, G, D).to(device).transpose(0, 1),
        "one row expanded": importances(G, 2, D).to(device)[:, 1:].expand(G, N, D),
        "bytes not contiguous": importances(G, D, N).to(device).mT,
        "groups expanded": importances(0, N, D).to(device).expand(0, N, D),
    }
    for layout, rows in layouts.items():
        aligned = align_rows(rows)
        assert aligned.shape == (*rows.shape[:2], -(-D // 16) * 16) and aligned.dtype == torch.uint8, layout
        assert torch.equal(aligned[..., :D], rows) and not aligned[..., D:].any(), layout
        assert aligned.data_ptr() % 16 == 0 and aligned.stride(1) % 16 == 0 and aligned.stride(0) % 16 == 0, layout


def test_aligned_rows_are_not_copied():
    rows = torch.zeros(2, 9, 48, dtype=torch.uint8)
    assert align_rows(rows) is rows
    part = rows[:, 1:5, 16:]
    assert align_rows(part) is part


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_duplicated_centroids_lose_to_the_lowest_id(kind, device):
    N, D, K = 20, 130, 200  # more clusters than one tile holds
    rows, importance = reference.pack(patterns(0, N, D)), importances(0, N, D)
    centroids = centroids_of(0, 1, D).expand(K, -1).contiguous()
    assert run(kind, device, "assign", rows, centroids)[0].tolist() == [0] * N
    for power in POWERS:
        assert run(kind, device, "assign_weighted", importance, centroids, power)[0].tolist() == [0] * N


@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_example_of_the_masked_distance(kind, device):
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
        assert (
            torch.get_float32_matmul_precision() == "medium" and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        )
    finally:
        torch.set_float32_matmul_precision(before)


def test_sums_are_exact_over_several_spans_of_rows():
    N = 2 * accumulate_cpu._SPAN + 5
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
    cases = {
        "int64": torch.randint(-(2**60), 2**60, (3, 8, D)),
        "few levels": torch.randint(0, 4, (3, 8, D)),
        "all equal": torch.zeros(3, 8, D),
        "infinite": torch.randn(3, 8, D)
        .masked_fill(torch.rand(3, 8, D) < 0.5, float("inf"))
        .masked_fill(torch.rand(3, 8, D) < 0.3, -float("inf")),
    }
    x = cases[values] if values in cases else torch.randn(3, 8, D).to(getattr(torch, values))
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
    cut = [
        ops.unpack(ops.cut_or_fill(active, m, importance, frequency), 6)[0].nonzero().flatten().tolist()
        for m in (1, 2, 3, 4, 5)
    ]
    assert cut == [[3], [1, 3], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5]]


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("D", [1, 7, 130, 257, 1536])
@pytest.mark.parametrize(("kind", "device"), IMPLEMENTATIONS)
def test_binarize_has_exactly_m_ones_and_equals_reference(kind, device, D, density):
    m = ops.mask_size(D, density)
    assert m == max(1, int(density * D + 0.5))
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    cases = [
        torch.randint(0, 2**62, (6, D)),
        torch.randint(-(2**62), 2**62, (3, D)),
        torch.randint(0, 3, (2, 6, D)),
        torch.zeros(1, D, dtype=torch.int64),
        torch.full((D,), -5),
        torch.full((2, D), most),
        torch.where(torch.rand(3, D) < 0.5, least, most),
        torch.zeros(0, D, dtype=torch.int64),
    ]
    small, large = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    cases += [sums.clamp(small, large).int() for sums in cases]
    cases += [torch.randint(small, large, (6, D), dtype=torch.int32)]
    for sums in cases:
        centroids = run(kind, device, "binarize", sums, density)
        assert (reference.popcount(centroids) == m).all()
        assert_same([centroids], [reference.binarize(sums, density)])


@pytest.mark.parametrize("D", [14336, 28672, 40000])
@pytest.mark.parametrize("device", DEVICES)
def test_binarize_of_long_rows_equals_reference(device, D):
    for sums in (
        torch.randint(0, 512, (5, D)),
        torch.randint(0, 2**45, (5, D)),
        torch.randint(0, 512, (5, D), dtype=torch.int32),
    ):
        assert torch.equal(ops.binarize(sums.to(device), 0.5).cpu(), reference.binarize(sums, 0.5))


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
        sums, sizes = (
            ops.accumulate_weighted(importance, ids, scales, K, power) if power else ops.accumulate(rows, ids, K, D)
        )
        assert (sizes.sum(-1) == N).all()
        updated = ops.binarize(sums, density)
        # The update must not lower the sum that the new centroids capture from the same members.
        kept = int((sums * ops.unpack(updated, D)).sum())
        assert kept >= totals[-1]
        totals.append(kept)
        centroids = updated
    assert totals == sorted(totals) and totals[-1] > totals[0]


def test_errors_state_both_shapes():
    rows, importance = ops.pack(patterns(0, 4, 130)), importances(0, 4, 130)
    wide, deep = centroids_of(0, 3, 300), centroids_of(2, 3, 130)
    ids, scales = memberships(0, 5, 3), torch.ones(4, dtype=torch.int64)
    sums, sizes = torch.zeros(3, 130, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    failing = [
        (r"\[3, 48\].*\[4, 32\]", lambda: ops.assign(rows, wide)),
        (r"\[2, 3, 32\].*\[4, 32\]", lambda: ops.assign(rows, deep)),
        (r"\[3, 48\].*\[4, 32\]", lambda: ops.assign_triton(rows, wide)),
        (r"bool \[4, 130\].*\[3, 32\]", lambda: ops.assign(ops.unpack(rows, 130), deep[0])),
        (r"\[0, 32\].*\[4, 32\]", lambda: ops.assign(rows, deep[0, :0])),
        (r"\[3, 48\].*\[4, 130\]", lambda: ops.assign_weighted(importance, wide)),
        (r"\[3, 48\].*\[4, 130\]", lambda: ops.assign_weighted_triton(importance, wide)),
        (r"\[5\].*\[4, 32\]", lambda: ops.accumulate(rows, ids, 3, 130)),
        (r"\[3, 129\].*\[4, 32\]", lambda: ops.accumulate(rows, ids[:4], 3, 130, out=(sums[:, 1:], sizes))),
        (r"\[4\].*\[4, 32\]", lambda: ops.accumulate_triton(rows, ids[:4], 3, 130, out=(sums, ids[:4]))),
        (
            r"float32 \[3, 130\].*\[4, 130\]",
            lambda: ops.accumulate_weighted(importance, ids[:4], scales, 3, out=(sums.float(), sizes)),
        ),
        (
            r"int32 \[3, 130\].*int64.*\[4, 130\]",
            lambda: ops.accumulate_weighted(importance, ids[:4], scales, 3, out=(sums.int(), sizes)),
        ),
        (
            r"int16 \[3, 130\].*int64.*\[4, 32\]",
            lambda: ops.accumulate(rows, ids[:4], 3, 130, out=(sums.short(), sizes)),
        ),
        (r"binarize wants sums as int64 or int32", lambda: ops.binarize(sums.short(), 0.5)),
        (
            r"\[3, 130\].*\[4, 130\].*contiguous",
            lambda: ops.accumulate_weighted(importance, ids[:4], scales, 3, out=(sums.T.contiguous().T, sizes)),
        ),
        (r"\[5\].*\[4, 32\]", lambda: ops.accumulate_triton(rows, ids, 3, 130)),
        (r"\[4, 32\].*48.*\[5\]", lambda: ops.accumulate(rows, ids, 3, 300)),
        (r"int32 \[4\].*\[4, 32\]", lambda: ops.accumulate(rows, ids[:4].int(), 3, 130)),
        (r"\[5\].*\[4, 130\]", lambda: ops.accumulate_weighted(importance, ids, scales, 3)),
        (r"float32 \[4\].*\[4, 130\]", lambda: ops.accumulate_weighted(importance, ids[:4], scales.float(), 3)),
        (r"\[5\].*\[4, 130\]", lambda: ops.accumulate_weighted_triton(importance, ids, scales, 3)),
        (r"\[4, 31\].*\[4, 130\]", lambda: ops.cut_or_fill(ops.unpack(rows, 130), 3, importance[:, :31])),
        (
            r"\[7\].*\[4, 130\]",
            lambda: ops.cut_or_fill(ops.unpack(rows, 130), 3, frequency=torch.ones(7, dtype=torch.int64)),
        ),
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
        (
            r"65025·D < 2\^31",
            lambda: ops.assign_weighted(torch.zeros(1, 33026, dtype=torch.uint8), centroids_of(0, 1, 33026), 2),
        ),
        (r"from 0 to 2\^36", lambda: ops.accumulate_weighted(importance, ids, scales - 1, 4)),
        (
            "not row_scales",
            lambda: ops.accumulate_weighted(importance[[3] * 4], ids * 0, torch.full((4,), 2**36), 4, 2),
        ),
        ("density", lambda: ops.mask_size(10, 0.0)),
        ("density", lambda: ops.binarize(torch.zeros(1, 10, dtype=torch.int64), 1.01)),
        ("int64", lambda: ops.binarize(torch.zeros(1, 10), 0.5)),
        ("up to 32768", lambda: ops.binarize_triton(torch.zeros(1, 2**15 + 1, dtype=torch.int64), 0.5)),
        ("got int32", lambda: ops.popcount_triton(torch.zeros(2, 16, dtype=torch.int32))),
        ("power must be 1", lambda: ops.row_totals_triton(importance, 3)),
        ("m must be from 1", lambda: ops.top_mask(torch.zeros(2, 5), 6)),
        ("NaN", lambda: ops.top_mask(torch.tensor([1.0, float("nan")]), 1)),
        ("negative", lambda: ops.cut_or_fill(torch.ones(2, dtype=torch.bool), 1, torch.tensor([1.0, -1.0]))),
        ("bool", lambda: ops.pack(torch.zeros(3))),
    ]
    for message, call in failing:
        with pytest.raises(ValueError, match=message):
            call()
