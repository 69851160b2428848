"""Assignment on the CPU against torch's float32 matrix product: `python benchmarks/cpu.py --help`.

Every size is compared with `apc.ops.reference` before it is timed. Shape letters: see `apc.ops`.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from common import Row, add_csv_option, append, markdown, row, time_cpu
from torch import Tensor

from apc.ops import popcount, reference, unpack
from apc.ops.assign_cpu import assign_cpu, assign_weighted_cpu
from apc.utils.machine import cpu_name

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
CHECKED_ROWS = 1024  # per call of the reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="check that everything runs, at tiny sizes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of apc")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each function")
    add_csv_option(parser)
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
    """Rows for `assign` of random patterns, and for torch with rows unpacked beforehand and unpacked in the call."""
    rows, centroids = reference.pack(torch.rand(N, D) < 0.5), reference.pack(torch.rand(K, D) < 0.5)
    planes, centroid_planes = unpack(rows, D).float(), unpack(centroids, D).float().T.contiguous()

    def unpacking() -> Tensor:
        return (unpack(rows, D).float() @ unpack(centroids, D).float().T).argmax(1)

    def ours() -> tuple[Tensor, Tensor]:
        return assign_cpu(rows.unsqueeze(0), centroids.unsqueeze(0))

    ids, overlap = (result.squeeze(0) for result in ours())
    for part in slices(N):
        check((ids[part], overlap[part]), reference.assign(rows[part], centroids), (N, K, D))
    peers = {
        "torch GEMM + argmax": lambda: (planes @ centroid_planes).argmax(1),
        "torch unpack + GEMM + argmax": unpacking,
    }
    for name, peer in peers.items():
        if not torch.equal(popcount(rows & centroids[peer()]), overlap):  # not ids: a peer may break ties differently
            raise AssertionError(f"{name}: other overlaps than apc at N, K, D = {N}, {K}, {D}")
    return compare("assign", {"apc": ours, **peers}, (1, N, K, D), repeats)


def weighted(N: int, K: int, D: int, power: int, repeats: int) -> list[Row]:
    """Rows for `assign_weighted` of random importances, and for torch on importances already raised to the power."""
    importance, centroids = torch.randint(0, 256, (N, D), dtype=torch.uint8), reference.pack(torch.rand(K, D) < 0.5)
    values, centroid_planes = importance.float() ** power, unpack(centroids, D).float().T.contiguous()

    def ours() -> tuple[Tensor, Tensor]:
        return assign_weighted_cpu(importance.unsqueeze(0), centroids.unsqueeze(0), power)

    ids, captured = (result.squeeze(0) for result in ours())
    for part in slices(N):
        expected = reference.assign_weighted(importance[part], centroids, power)
        check((ids[part], captured[part]), expected, (N, K, D))
    # This peer is not checked: float32 rounds sums above 2²⁴.
    peers = {"torch GEMM + argmax, rounded": lambda: (values @ centroid_planes).argmax(1)}
    return compare(f"assign_weighted, power {power}", {"apc": ours, **peers}, (1, N, K, D), repeats)


def slices(N: int) -> list[slice]:
    """Slices of N rows, each small enough for one call of the reference."""
    return [slice(n, n + CHECKED_ROWS) for n in range(0, N, CHECKED_ROWS)]


def check(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], size: tuple[int, int, int]) -> None:
    """Raises AssertionError unless ids and sums equal those of the reference."""
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True)):
        raise AssertionError(f"apc differs from reference.py at N, K, D = {size}")


def compare(
    operation: str, functions: dict[str, Callable[[], object]], shape: tuple[int, int, int, int], repeats: int
) -> list[Row]:
    """Times `apc` and its peers in turns; a peer's note gives its time as a multiple of apc's."""
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
