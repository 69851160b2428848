"""Assignment on the CPU against torch's float32 matrix product: `python benchmarks/cpu.py [--quick] [--threads N] [--csv PATH]`.

Every size is compared with `apc.ops.reference` before it is timed. Shape letters: see `apc/ops/bits.py`.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, Row, append, cpu_name, markdown, row, time_cpu
from torch import Tensor

from apc.ops import popcount, reference, unpack
from apc.ops.assign_cpu import assign_cpu, assign_weighted_cpu

SIZES = [  # (N, K, D)
    (8192, 256, 1536),
    (8191, 257, 1531),
    (1024, 256, 1536),
    (100_003, 61, 67),
    (4096, 16, 1536),
    (31, 1021, 1536),
    (1, 256, 1536),
    (67, 2048, 14336),
    (509, 2048, 14336),
    (67, 16384, 1536),
]
WEIGHTED_SIZES = [(8192, 256, 1536), (8191, 257, 1531), (2048, 64, 1536), (2048, 16, 1536), (67, 2048, 14336)]
QUICK = [(130, 17, 300), (67, 64, 1531)]
CHECKED = 1024  # rows that the reference does at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of ours")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file that the rows are added to")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in QUICK if arguments.quick else SIZES:
        rows += binary(*size, arguments.repeats)
    for size in QUICK if arguments.quick else WEIGHTED_SIZES:
        rows += weighted(*size, 2, arguments.repeats)
    append(rows, arguments.csv)
    print(f"{cpu_name()}, torch {torch.__version__}, commit {rows[0].commit}\n\n{markdown(rows)}")


def binary(N: int, K: int, D: int, repeats: int) -> list[Row]:
    rows, centroids = reference.pack(torch.rand(N, D) < 0.5), reference.pack(torch.rand(K, D) < 0.5)
    planes, centroid_planes = unpack(rows, D).float(), unpack(centroids, D).float().T.contiguous()

    def unpacking() -> Tensor:
        return (unpack(rows, D).float() @ unpack(centroids, D).float().T).argmax(1)

    def ours() -> tuple[Tensor, Tensor]:
        return assign_cpu(rows.unsqueeze(0), centroids.unsqueeze(0))

    ids, overlap = (result.squeeze(0) for result in ours())
    for n in range(0, N, CHECKED):
        check(
            (ids[n : n + CHECKED], overlap[n : n + CHECKED]),
            reference.assign(rows[n : n + CHECKED], centroids),
            (N, K, D),
        )
    peers = {
        "torch GEMM + argmax": lambda: (planes @ centroid_planes).argmax(1),
        "torch unpack + GEMM + argmax": unpacking,
    }
    for name, peer in peers.items():
        if not torch.equal(popcount(rows & centroids[peer()]), overlap):  # a peer may settle ties in another way
            raise AssertionError(f"{name} found other overlaps at N, K, D = {N}, {K}, {D}")
    return compare("assign", {"apc": ours, **peers}, (1, N, K, D), repeats)


def weighted(N: int, K: int, D: int, power: int, repeats: int) -> list[Row]:
    importance, centroids = torch.randint(0, 256, (N, D), dtype=torch.uint8), reference.pack(torch.rand(K, D) < 0.5)
    values, centroid_planes = importance.float() ** power, unpack(centroids, D).float().T.contiguous()

    def ours() -> tuple[Tensor, Tensor]:
        return assign_weighted_cpu(importance.unsqueeze(0), centroids.unsqueeze(0), power)

    ids, captured = (result.squeeze(0) for result in ours())
    for n in range(0, N, CHECKED):
        expected = reference.assign_weighted(importance[n : n + CHECKED], centroids, power)
        check((ids[n : n + CHECKED], captured[n : n + CHECKED]), expected, (N, K, D))
    # float32 rounds sums above 2²⁴, so this peer is not exact and has nothing to compare.
    peers = {"torch GEMM + argmax, rounded": lambda: (values @ centroid_planes).argmax(1)}
    return compare(f"assign_weighted, power {power}", {"apc": ours, **peers}, (1, N, K, D), repeats)


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], size: tuple[int, int, int]) -> None:
    """Raises AssertionError unless ids and sums are those of the reference."""
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True)):
        raise AssertionError(f"not what reference.py says at N, K, D = {size}")


def compare(
    operation: str, functions: dict[str, Callable[[], object]], shape: tuple[int, int, int, int], repeats: int
) -> list[Row]:
    """Rows for functions that take turns; the first is ours, and the others' notes say how many times as long they take."""
    seconds = time_cpu(functions, repeats)
    ours = statistics.median(seconds["apc"])
    notes = {
        name: "" if name == "apc" else f"{statistics.median(times) / ours:.2f} × apc's time"
        for name, times in seconds.items()
    }
    return [
        row(operation, name, shape, times, cpu_name(), ok="rounded" not in name, note=notes[name])
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
