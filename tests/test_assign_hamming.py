"""Assignment by the Hamming distance, plain or penalised, equals its definition exactly, ties included."""

import pytest
import torch

from apc import ops
from apc.ops import reference

hamming = __import__("importlib").import_module("apc.ops.assign_hamming")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PENALTIES = [1, 2, 3, 7, 1000]  # with 1000 no neuron is added to rows as short as these


def assign_in_loops(rows, centroids, D, penalty):
    """`assign_hamming` in Python loops."""
    ids, distances = [], []
    patterns, masks = reference.unpack(rows, D).tolist(), reference.unpack(centroids, D).tolist()
    for x in patterns:
        costs = [sum(penalty if a and not b else int(b and not a) for a, b in zip(x, c, strict=True)) for c in masks]
        ids.append(costs.index(min(costs)))
        distances.append(min(costs))
    return ids, distances


def random_patterns(D, N, K):
    """Rows and centroids with very different numbers of ones, some all zero, all one or repeated."""
    rows = torch.rand(N, D) < torch.rand(N, 1)
    centroids = torch.rand(K, D) < torch.rand(K, 1)
    rows[:2] = torch.tensor([[False], [True]])[: len(rows[:2])]
    if K > 4:
        centroids[1], centroids[3], centroids[4] = False, True, centroids[0]
    return rows, centroids


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 1), (40, 9, 7), (97, 8, 130), (33, 70, 43), (64, 1, 9)])
def test_assignment_equals_python_loops(N, K, D, penalty):
    rows, centroids = map(reference.pack, random_patterns(D, N, K))
    expected = assign_in_loops(rows, centroids, D, penalty)
    for function in (ops.assign_hamming, reference.assign_hamming):
        assert tuple(value.tolist() for value in function(rows, centroids, penalty)) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("tile", [1, 2**28], ids=["row-by-row", "at-once"])
def test_groups_and_tiles_equal_reference(penalty, tile, device, monkeypatch):
    monkeypatch.setattr(hamming, "_TILE_BYTES", tile)
    rows, centroids = (
        reference.pack(torch.stack(values)).to(device)
        for values in zip(*(random_patterns(67, 150, 90) for _ in range(3)), strict=True)
    )
    ids, distance = ops.assign_hamming(rows, centroids, penalty)
    expected = reference.assign_hamming(rows, centroids, penalty)
    assert torch.equal(ids, expected[0]) and torch.equal(distance, expected[1])
    bare = ops.assign_hamming(rows, centroids, penalty, scores=False)
    assert torch.equal(bare[0], ids) and bare[1] is None


def test_few_neurons_and_many_clusters_tie_everywhere():
    every = reference.pack(torch.tensor([[bool(n >> i & 1) for i in range(4)] for n in range(16)]))
    centroids = every[torch.randperm(16).repeat(3)]
    for penalty in PENALTIES:
        ids, distance = ops.assign_hamming(every, centroids[:11], penalty)
        expected = reference.assign_hamming(every, centroids[:11], penalty)
        assert torch.equal(ids, expected[0]) and torch.equal(distance, expected[1])


def test_centroids_of_one_size_give_the_masked_distance():
    rows = reference.pack(torch.rand(90, 61) < 0.4)
    centroids = reference.pack(reference.top_mask(torch.rand(20, 61), 30))
    for penalty in PENALTIES:
        assert torch.equal(ops.assign_hamming(rows, centroids, penalty)[0], ops.assign(rows, centroids)[0])


def test_no_rows_and_shapes_that_do_not_match():
    rows, centroids = torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8)
    assert [len(value) for value in ops.assign_hamming(rows, centroids)] == [0, 0]
    with pytest.raises(ValueError, match="penalty must be at least 1, got 0"):
        ops.assign_hamming(rows, centroids, 0)
    with pytest.raises(
        ValueError, match=r"centroids uint8 \[2, 16\] must be uint8 \['any', 32\] to go with rows uint8 \[9, 32\]"
    ):
        ops.assign_hamming(torch.zeros(9, 32, dtype=torch.uint8), centroids)
