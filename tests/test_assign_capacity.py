"""Clusters with a capacity, matched many at a time, get the rows that they take one after the other."""

import pytest
import torch

from apc import ops
from apc.ops import reference

capacity = __import__("importlib").import_module("apc.ops.assign_capacity")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("candidates", [1, 12, 2048])
@pytest.mark.parametrize(
    ("N", "K", "D"), [(1, 1, 1), (40, 40, 7), (97, 8, 130), (500, 61, 67), (300, 7, 257), (64, 1, 9), (256, 128, 3)]
)
def test_batches_of_clusters_equal_one_after_the_other(N, K, D, candidates, device, monkeypatch):
    monkeypatch.setattr(capacity, "_CANDIDATES", candidates)
    for share in (0.5, 0.02, 1.0):  # with 0.02 few rows differ, with 1.0 none: ties everywhere
        rows = reference.pack(torch.rand(N, D) < share).to(device)
        centroids = reference.pack(torch.rand(K, D) < 0.5).to(device)
        for room in {1, max(1, N // K // 2), N // K}:
            ids = ops.assign_with_capacity(rows, centroids, room)
            assert torch.equal(ids, reference.assign_with_capacity(rows, centroids, room))
            assert (ids.cpu().add(1).bincount(minlength=K + 1)[1:] == room).all()


def test_example_in_the_order_of_ids():
    def packed(*patterns):
        return reference.pack(torch.tensor([[bit == "1" for bit in pattern] for pattern in patterns]))

    rows, centroids = packed("101100", "011010", "010010", "100000"), packed("011010", "101100")
    assert ops.popcount(rows[:1] & ~centroids[:1]).tolist() == [2]  # the distance on the paper's slides
    # Rows 1 and 2 have distance 0 to the first cluster and fill its capacity of two. The second takes the others, at
    # distance 0.
    assert ops.assign_with_capacity(rows, centroids, 2).tolist() == [1, 0, 0, 1]
    assert ops.assign_with_capacity(rows, centroids, 1).tolist() == [1, 0, -1, -1]


@pytest.mark.parametrize("room", [0, -1, 5])
def test_a_capacity_out_of_range_is_refused(room):
    rows, centroids = torch.zeros(9, 16, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=rf"capacity .* rows uint8 \[9, 16\] and centroids uint8 \[2, 16\], got {room}"
    ):
        ops.assign_with_capacity(rows, centroids, room)
    with pytest.raises(
        ValueError, match=r"centroids uint8 \[2, 16\] must be uint8 \['any', 32\] to go with rows uint8 \[9, 32\]"
    ):
        ops.assign_with_capacity(torch.zeros(9, 32, dtype=torch.uint8), centroids, 1)
