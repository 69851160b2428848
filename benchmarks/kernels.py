"""Kernels on one NVIDIA GPU, against torch, flash-kmeans and the GPU's limits: `python benchmarks/kernels.py --help`.

Every result is compared with `apc.ops.reference` before it is timed. The time of apc starts at packed rows and packed
centroids on the device and ends at results on the device, so it includes all preparation. Peers multiply unpacked
numbers, which are made beforehand, padded to a multiple of 16 bytes, and not timed. Shape letters: see `apc.ops`.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from common import Row, add_csv_option, append, comma_list, commit, markdown, row, time_cuda
from torch import Tensor
from torch.nn.functional import kl_div, pad
from triton.errors import TritonError

from apc import ops
from apc.ops import assign_cuda, nvrtc, reference
from apc.utils.errors import first_line

DEVICE = torch.device("cuda", 0)
SECONDS = 0.25  # total time of one implementation's calls: enough for the clock to fall to its sustained rate
REPEATS = (5, 50)  # fewest and most
CEILING_LOOPS = 20_000  # about 10 ms on an H100
COPIED = 2**31  # bytes
CHECKED = 4e12  # pairs that the reference computes at a size: all rows at most sizes, a sample of rows at the others
PIECE = 2**26  # numbers per call of the reference
STRIP, STRIPS = 128, 12  # neurons per strip whose sums are checked, and number of strips
SCORES = 2**28  # entries of a peer's N × K score matrix made at once
PLANES = 65_536 * 14_336  # most numbers in the unpacked rows of a peer's update
PATTERNS = ("random ids", "skewed ids", "one cluster")


class Wrong(Exception):
    """A result differs from the reference's."""


@dataclass(frozen=True)
class Card:
    """A GPU. ceilings: bytes/s of `copy`, and pairs/s of `b1 wgmma` and `uint8 wgmma` if they could be measured."""

    name: str
    ceilings: dict[str, float]


@dataclass(frozen=True)
class Run:
    """An implementation to time, whose result has been checked."""

    name: str
    calls: Sequence[Callable[[], object]]  # the same operation on different inputs
    shape: tuple[int, int, int, int]  # G, N, K, D
    ceiling: str = ""
    moved: int | None = None  # bytes of a call; None: the rate counts pairs
    exact: bool = True
    note: str = ""
    products: int = 1  # products of the ceiling's kind per pair


def main() -> None:
    names = list(parts(True))
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="check that everything runs, at tiny sizes")
    parser.add_argument("--only", type=comma_list(), default=names, metavar="PART,…", help=f"parts: {', '.join(names)}")
    add_csv_option(parser)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the inputs; default: random")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(names)):
        parser.error(f"--only takes {', '.join(names)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: needs an NVIDIA GPU; benchmarks/cpu.py runs anywhere", file=sys.stderr)
        sys.exit(2)
    try:
        append([], arguments.csv)  # fails now if the file can't be written
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()
    name = torch.cuda.get_device_name(DEVICE)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, commit {commit()}"
    print(f"# {name}, {versions}\n\nSeed {arguments.seed}.")
    if not flash_kmeans():
        print("flash-kmeans is not installed, so it is left out: pip install -e '.[bench]'")
    limits = ceilings(name)
    publish("ceilings", limits, arguments.csv)
    card = Card(name, {result.implementation: result.rate for result in limits})
    try:
        for part in arguments.only:
            cases = parts(arguments.quick)[part]
            publish(part, [result for case in cases for result in attempt(part, partial(case, card))], arguments.csv)
    except Wrong as error:
        sys.exit(f"benchmarks/kernels.py: WRONG RESULT, seed {arguments.seed}: {error}")
    print(f"\n{time.perf_counter() - start:.0f} s")


def parts(quick: bool) -> dict[str, list[Callable[[Card], list[Row]]]]:
    """The cases of each part. Shapes are (G, N, K, D)."""
    if quick:
        even, odd = (1, 1024, 64, 1536), (2, 521, 131, 1531)
        return {
            "assign": [
                partial(assign, shape=even),
                partial(assign, shape=odd),
                partial(assign, shape=(1, 300, 16, 256), peers=False),
            ],
            "weighted": [
                partial(assign_weighted, shape=shape, power=power) for shape in (even, odd) for power in (1, 2)
            ],
            "update": [partial(update, shape=even, patterns=PATTERNS), partial(update, shape=odd)],
            "update_weighted": [
                partial(update, shape=even, power=2, patterns=PATTERNS),
                partial(update, shape=odd, power=1),
            ],
            "binarize": [partial(binarize, K=K, D=D) for _, _, K, D in (even, odd)],
            "totals": [partial(totals, shape=even)],
            "capacity": [partial(capacity, shape=even)],
            "tuning": [partial(top, N=64, D=1531), partial(divergence, n=16, V=5000), partial(curve, n=256, D=1531)],
        }
    layers = [(30, 301_056, 256, 1536), (30, 301_056, 2048, 1536)]
    paper = [(1, 65_536, 2048, 14_336), (1, 65_536, 16_384, 14_336)]
    primes = [(1, 65_521, 2039, 14_341), (1, 65_521, 16_381, 14_341)]
    large = (1, 1_048_576, 2048, 14_336)
    compared = [*paper, (1, 65_536, 2048, 4096), *primes, *layers, (1, 8192, 256, 1536)]
    weighted = [(shape, 1) for shape in (*paper, primes[0])] + [(shape, 2) for shape in (paper[0], primes[0])]
    return {
        "assign": [*(partial(assign, shape=shape) for shape in compared), partial(assign, shape=large, peers=False)],
        "weighted": [partial(assign_weighted, shape=shape, power=power) for shape, power in weighted],
        "update": [partial(update, shape=large, patterns=PATTERNS), partial(update, shape=layers[0])],
        "update_weighted": [
            partial(update, shape=large, power=2, patterns=PATTERNS),
            partial(update, shape=layers[0], power=2),
        ],
        "binarize": [partial(binarize, K=K, D=D) for _, _, K, D in paper],
        "totals": [partial(totals, shape=large)],
        "capacity": [
            partial(capacity, shape=shape) for shape in ((1, 61_440, 256, 1536), (1, 61_440, 2048, 1536), *paper)
        ],
        "tuning": [
            *(partial(top, N=8192, D=D) for D in (1536, 14_336)),
            partial(divergence, n=8192, V=49_152),
            partial(curve, n=8192, D=1536),
        ],
    }


def attempt(part: str, case: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a case; none, after a printed line, if it doesn't fit into the GPU's memory."""
    try:
        return case()
    except torch.OutOfMemoryError as error:
        print(f"{part}: one size left out, the GPU has too little memory: {first_line(error)}")
        return []
    finally:
        torch.cuda.empty_cache()


def publish(part: str, rows: list[Row], path: Path) -> None:
    """Appends the rows to the CSV file and prints them."""
    append(rows, path)
    print(f"\n## {part}\n\n{markdown(rows)}", flush=True)


def show(shape: tuple[int, int, int, int]) -> str:
    """A shape with its letters."""
    return "G × N × K × D = " + " × ".join(f"{size:,}" for size in shape)


def ceilings(name: str) -> list[Row]:
    """Rows for the GPU's limits: a copy and, on Hopper, b1 and uint8 products on the tensor cores."""
    source = torch.randint(0, 256, (COPIED,), dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)
    seconds = time_cuda([partial(copy.copy_, source)], REPEATS[1])
    if not torch.equal(copy, source):
        raise RuntimeError("a copy on the device differs from its source; try another GPU")
    facts = {"ok": True, "moved": 2 * COPIED, "note": "bytes read and written"}
    rows = [row("ceiling", "copy", (1, COPIED, 0, 0), seconds, name, **facts)]
    del source, copy
    torch.cuda.empty_cache()
    if reason := assign_cuda.unavailable(DEVICE.index, "u8"):
        print(f"The tensor cores' limits are not measured, and shares of them stay empty: {reason}.")
        return rows
    note = "products on shared memory alone: nothing to compare"
    for implementation, kind, neurons in (("b1 wgmma", "b1", 256), ("uint8 wgmma", "u8", 32)):
        seconds, blocks = time_ceiling(kind)
        shape = (1, 128 * blocks, 256, 4 * neurons * CEILING_LOOPS)  # rows of two warpgroups; four products a loop
        rows.append(row("ceiling", implementation, shape, seconds, name, ok=False, note=note))
    return rows


def time_ceiling(kind: str) -> tuple[list[float], int]:
    """Seconds of each of 30 consecutive calls of ceiling.cu, and the number of blocks, one per multiprocessor."""
    blocks, shared = torch.cuda.get_device_properties(DEVICE).multi_processor_count, (2 * 64 + 256) * 128 + 1024
    out = torch.empty((blocks, 256), dtype=torch.int32, device=DEVICE)
    source = str(Path(__file__).with_name("ceiling.cu").resolve())
    program = nvrtc.Program(source, "sm_90a", text=assign_cuda.warpgroup_mma(kind, 256))
    kernel = nvrtc.function(program, "ceiling", DEVICE.index, shared)
    arguments = nvrtc.pointer(out), ctypes.c_int(CEILING_LOOPS)
    return time_cuda([lambda: nvrtc.launch(kernel, (blocks, 1), 256, shared, *arguments)], repeats=30), blocks


def measure(card: Card, operation: str, runs: Sequence[Run]) -> list[Row]:
    """Times the runs in turn and prints the rate of each apc run as a multiple of each peer's."""
    rows = []
    for run in runs:
        ceiling = card.ceilings[run.ceiling] / run.products if run.ceiling in card.ceilings else None
        facts = {"ok": run.exact, "moved": run.moved, "note": run.note}
        facts |= {"ceiling": ceiling, "share_of": run.ceiling if ceiling else ""}
        rows.append(row(operation, run.name, run.shape, timed(run.calls), card.name, **facts))
    peers = [result for result in rows if not result.implementation.startswith("apc")]
    for ours in rows:
        if peers and ours not in peers:
            ratios = ", ".join(f"{ours.rate / peer.rate:.3g} × {peer.implementation}" for peer in peers)
            print(f"{operation}, {show(runs[0].shape)}: {ours.implementation} at the rate of {ratios}", flush=True)
    return rows


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds per call; the calls together take about SECONDS."""
    once = statistics.median(time_cuda(calls, repeats=3, warmup=2))
    together = 20 if once < 2e-4 else 1
    repeats = min(max(int(SECONDS / (once * together)), REPEATS[0]), REPEATS[1])
    return time_cuda(calls, repeats, warmup=1, calls=together)


def copies(size: int) -> int:
    """Number of inputs of so many bytes that take turns: 1 if it exceeds the L2 cache, else enough to fill it twice."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return 1 if size > cache else -(-2 * cache // size)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fills each torch.empty with the type's largest number, so that an element no kernel wrote fails the check."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(name: str, results: Sequence[Tensor], expected: Sequence[Tensor], shape: tuple[int, int, int, int]) -> None:
    """Raises Wrong unless all results are equal to the expected ones."""
    for ours, theirs in zip(results, expected, strict=True):
        if not torch.equal(ours, theirs):
            raise Wrong(f"{name} at {show(shape)}: {int((ours != theirs).sum()):,} of {ours.numel():,} numbers differ")


def peer(run: Run, check_result: Callable[[object], str]) -> list[Run]:
    """The run of a peer, with the note that check_result returns. Empty, after a printed line, if the peer fails.

    Raises Wrong if check_result does.
    """
    try:
        notes = run.note, check_result(run.calls[0]())
    except (RuntimeError, ValueError, TritonError) as error:
        print(f"{run.name} is left out at {show(run.shape)}: {first_line(error)[:200]}")
        return []
    except Wrong as error:
        raise Wrong(f"{run.name} at {show(run.shape)}: {error}") from None
    return [replace(run, note="; ".join(filter(None, notes)))]


def draw_rows(G: int, N: int, D: int) -> Tensor:
    """Random packed rows, uint8 [G, N, W], with half of the neurons active."""
    rows = torch.randint(0, 256, (G, N, ops.row_bytes(D)), dtype=torch.uint8, device=DEVICE)
    return rows.bitwise_and_(ops.pack(torch.ones(D, dtype=torch.bool, device=DEVICE)))  # padding bits are zero


def draw_centroids(G: int, K: int, D: int) -> Tensor:
    """Random centroids, uint8 [G, K, W]. All have the same size, so the nearest by Euclidean distance overlaps most."""
    return ops.binarize(torch.randint(2**40, (G, K, D), device=DEVICE), 0.5)


def draw_sample(G: int, N: int, K: int, D: int) -> Tensor:
    """Indices of the rows of each group to check, int64 [n]: all, or a random sample and the last 64."""
    count = int(CHECKED / (G * K * D))
    if count >= N:
        return torch.arange(N, device=DEVICE)
    return torch.cat([torch.randperm(N, device=DEVICE)[:count], torch.arange(N - 64, N, device=DEVICE)])


def expect(operation: Callable, rows: Tensor, centroids: Tensor, sample: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """The reference's ids and sums for the sampled rows, [G, n] each, computed a piece at a time."""
    size = max(1, PIECE // max(D, centroids.shape[1]))
    groups = [
        [operation(group[piece], group_centroids) for piece in sample.split(size)]
        for group, group_centroids in zip(rows, centroids, strict=True)
    ]
    ids, sums = (torch.stack([torch.cat([piece[i] for piece in pieces]) for pieces in groups]) for i in (0, 1))
    return ids, sums


def planes(packed: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """Packed rows as numbers: uint8 [n, W] → [n, D], with D rounded up to a multiple of 16."""
    return ops.unpack(packed, -(-D // 16) * 16).to(dtype)


def best_products(multiply: Callable[[Tensor, Tensor], Tensor], rows: Tensor, centroids: Tensor) -> Tensor:
    """The cluster with the greatest product for each row: [N, D], [K, D] → int64 [N], SCORES products at a time."""
    pieces = -(-len(rows) * len(centroids) // SCORES)
    return torch.cat([multiply(piece, centroids.T).argmax(1) for piece in rows.split(-(-len(rows) // pieces))])


def whole_eights(centroids: Tensor) -> Tensor:
    """Centroids [K, D] with rows of zeros added up to a multiple of 8; these overlap nothing."""
    return pad(centroids, (0, 0, 0, -len(centroids) % 8))


def flash_kmeans() -> str:
    """The version of flash-kmeans; empty if it is not installed."""
    return importlib.metadata.version("flash-kmeans") if importlib.util.find_spec("flash_kmeans") else ""


def assign(card: Card, shape: tuple[int, int, int, int], peers: bool = True) -> list[Row]:
    """Rows for assign_b1 and assign_triton; peers run on the first group alone."""
    G, N, K, D = shape
    centroids, sample = draw_centroids(G, K, D), draw_sample(*shape)
    inputs = [draw_rows(G, N, D) for _ in range(copies(G * N * ops.row_bytes(D)))]
    expected = expect(reference.assign, inputs[0], centroids, sample, D)
    ours = {"apc b1": (ops.assign_b1, "b1 wgmma"), "apc Triton int8": (ops.assign_triton, "uint8 wgmma")}
    if reason := assign_cuda.unavailable(DEVICE.index):
        del ours["apc b1"]
        print(f"apc b1 is left out at {show(shape)}: {reason}")
    runs, first = [], None
    for name, (function, ceiling) in ours.items():
        with poison():
            results = function(inputs[0], centroids)
        check(f"{name} against reference.py", [result[:, sample] for result in results], expected, shape)
        first = first or results
        check(f"{name} against {next(iter(ours))}", results, first, shape)  # all rows, not the sample alone
        runs.append(Run(name, [partial(function, rows, centroids) for rows in inputs], shape, ceiling))
    if peers:
        runs += assign_peers([rows[0] for rows in inputs], centroids[0], sample, expected[1][0], shape)
    return measure(card, "assign", runs)


def assign_peers(
    inputs: list[Tensor], centroids: Tensor, sample: Tensor, best: Tensor, shape: tuple[int, int, int, int]
) -> list[Run]:
    """Runs of torch's bf16 and int8 products and of flash-kmeans.

    inputs: packed rows uint8 [N, W], which take turns; centroids: uint8 [K, W]; best: int32 [n], the greatest overlap
    of each sampled row.
    """
    G, N, K, D = shape

    def check_ids(ids: Tensor, rounded: bool = False) -> str:
        overlaps = ops.popcount(inputs[0][sample] & centroids[in_range(ids, K)[sample]])
        return check_best(overlaps, best, rounded)

    def take_turns(dtype: torch.dtype) -> list[Tensor]:
        return [planes(rows, D, dtype) for rows in inputs[: copies(N * D * dtype.itemsize)]]

    facts = {"shape": (1, N, K, D), "note": peers_note(G)}
    bits = whole_eights(planes(centroids, D, torch.bfloat16))
    calls = [partial(best_products, torch.mm, rows, bits) for rows in take_turns(torch.bfloat16)]
    runs = peer(Run("torch bf16 GEMM + argmax, rounded", calls, exact=False, **facts), partial(check_ids, rounded=True))
    bits = whole_eights(planes(centroids, D, torch.int8))
    calls = [partial(best_products, torch._int_mm, rows, bits) for rows in take_turns(torch.int8)]
    runs += peer(Run("torch int8 GEMM + argmax", calls, ceiling="uint8 wgmma", **facts), check_ids)
    if version := flash_kmeans():
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        bits = planes(centroids, D, torch.float16).unsqueeze(0)
        squares = ops.popcount(centroids).float().unsqueeze(0)
        turns = [
            (numbers.unsqueeze(0), ops.popcount(rows).float().unsqueeze(0))
            for rows, numbers in zip(inputs, take_turns(torch.float16), strict=False)
        ]
        calls = [partial(euclid_assign_triton, rows, bits, row_squares, c_sq=squares) for rows, row_squares in turns]
        runs += peer(Run(f"flash-kmeans {version} Euclid, fp16", calls, **facts), lambda ids: check_ids(ids[0].long()))
    return runs


def peers_note(G: int) -> str:
    return "planes made beforehand" + (f", one group of {G}" if G > 1 else "")


def in_range(ids: Tensor, K: int) -> Tensor:
    """The ids. Raises Wrong if any is not from 0 to K − 1."""
    if int(ids.min()) < 0 or int(ids.max()) >= K:
        raise Wrong(f"ids are from {int(ids.min())} to {int(ids.max())}, but K = {K}")
    return ids


def check_best(scores: Tensor, best: Tensor, rounded: bool) -> str:
    """Checks the scores of a peer's clusters, whose ties may break differently. Raises Wrong unless they are the best.

    rounded: allows scores below the best by the rounding of 8-bit significands, and returns a note with the share of
    such rows.
    """
    misses = int((scores != best).sum())
    if (scores > best).any() or (scores < best * (1 - 2**-7 if rounded else 1)).any():
        raise Wrong(f"not the nearest clusters for {misses:,} of {len(best):,} rows")
    return f"{100 * misses / len(best):.2g} % of rows miss the nearest" if rounded else ""


def assign_weighted(card: Card, shape: tuple[int, int, int, int], power: int) -> list[Row]:
    """Rows for assign_weighted; the peer runs on the first group alone."""
    G, N, K, D = shape
    centroids, sample = draw_centroids(G, K, D), draw_sample(*shape)
    importance = torch.randint(0, 256, (G, N, D), dtype=torch.uint8, device=DEVICE)
    expected = expect(partial(reference.assign_weighted, power=power), importance, centroids, sample, D)
    with poison():
        results = ops.assign_weighted(importance, centroids, power)
    check("assign_weighted against reference.py", [result[:, sample] for result in results], expected, shape)
    note = "" if power == 1 else "a pair is two products of bytes"
    calls = [partial(ops.assign_weighted, importance, centroids, power)]
    runs = [Run("apc", calls, shape, "uint8 wgmma", note=note, products=power)]

    def check_ids(ids: Tensor) -> str:
        ids, sums = in_range(ids, K), []
        for piece in sample.split(PIECE // D + 1):
            inside = reference.unpack(centroids[0, ids[piece]], D)
            sums.append((importance[0, piece].double() ** power * inside).sum(1).to(torch.int32))
        return check_best(torch.cat(sums), expected[1][0], rounded=True)

    numbers = pad(importance[0].bfloat16(), (0, -D % 16)) ** power
    bits = whole_eights(planes(centroids[0], D, torch.bfloat16))
    calls = [partial(best_products, torch.mm, numbers, bits)]
    rounded = Run("torch bf16 GEMM + argmax, rounded", calls, (1, N, K, D), exact=False, note=peers_note(G))
    runs += peer(rounded, check_ids)
    return measure(card, f"assign_weighted, power {power}", runs)


def draw_ids(pattern: str, G: int, N: int, K: int) -> Tensor:
    """Cluster ids int64 [G, N]. Skewed: the share of cluster k is proportional to 1 / (k + 1)."""
    if pattern == "random ids":
        return torch.randint(K, (G, N), device=DEVICE)
    if pattern == "skewed ids":
        return torch.multinomial(1 / torch.arange(1, K + 1, device=DEVICE), G * N, replacement=True).view(G, N)
    return torch.full((G, N), K // 2, device=DEVICE)


@dataclass(frozen=True)
class Source:
    """The rows to sum by cluster: packed rows uint8 [G, N, W], or importance uint8 [G, N, D] with scales int64 [G, N].

    power: 0 for packed rows; else 1 or 2, the power of the importances.
    """

    rows: Tensor
    D: int
    power: int = 0
    scales: Tensor | None = None

    def sums(self, ids: Tensor, K: int, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if self.power:
            return ops.accumulate_weighted(self.rows, ids, self.scales, K, self.power, out=out)
        return ops.accumulate(self.rows, ids, K, self.D, out=out)

    def expected(self, ids: Tensor, K: int) -> list[tuple[slice, tuple[Tensor, Tensor]]]:
        """The reference's sums int64 [G, K, STRIP] and sizes int64 [G, K], for random strips and the last one."""
        (G, N), last = ids.shape, (self.D - 1) // STRIP
        strips = []
        for strip in {*torch.randperm(last + 1)[:STRIPS].tolist(), last}:
            neurons, out = slice(strip * STRIP, min((strip + 1) * STRIP, self.D)), None
            for span in (slice(n, n + PIECE // (G * STRIP)) for n in range(0, N, PIECE // (G * STRIP))):
                if self.power:
                    out = reference.accumulate_weighted(
                        self.rows[:, span, neurons], ids[:, span], self.scales[:, span], K, self.power, out=out
                    )
                else:
                    packed = self.rows[:, span, neurons.start // 8 : (neurons.start + STRIP) // 8]
                    out = reference.accumulate(packed, ids[:, span], K, neurons.stop - neurons.start, out=out)
            strips.append((neurons, out))
        return strips

    def first(self, n: int) -> "Source":
        """The first n rows of the first group."""
        return Source(self.rows[:1, :n], self.D, self.power, None if self.scales is None else self.scales[:1, :n])

    def numbers(self) -> Tensor:
        """The values to sum in the first group, float32 [N, D]; those of importances are rounded."""
        if self.power:
            return self.scales[0, :, None] * self.rows[0].float() ** self.power
        return ops.unpack(self.rows[0], self.D).float()


def update(
    card: Card, shape: tuple[int, int, int, int], power: int = 0, patterns: Sequence[str] = PATTERNS[:1]
) -> list[Row]:
    """Rows for accumulate (power 0) or accumulate_weighted.

    With random ids also into existing sums, and peers on the first rows of the first group.
    """
    G, N, K, D = shape
    if power:
        rows = torch.randint(0, 256, (G, N, D), dtype=torch.uint8, device=DEVICE)
        operation, source = f"accumulate_weighted, power {power}", Source(rows, D, power, ops.row_scales(rows, power))
    else:
        operation, source = "accumulate", Source(draw_rows(G, N, D), D)
    table = []
    for pattern in patterns:
        ids, name = draw_ids(pattern, G, N, K), f"{operation}, {pattern}"
        expected = source.expected(ids, K)
        with poison():
            results = source.sums(ids, K)
        check_sums(name, results, expected, shape)
        facts = {"shape": shape, "ceiling": "copy", "moved": source.rows.numel()}
        runs = [Run("apc", [partial(source.sums, ids, K)], **facts)]
        if pattern == PATTERNS[0]:
            out = results[0].clone(), results[1].clone()
            source.sums(ids, K, out)
            check_sums(f"{name}, into out", (out[0] - results[0], out[1] - results[1]), expected, shape)
            runs.append(Run("apc, into out", [partial(source.sums, ids, K, out)], **facts))
            n = min(N, PLANES // D)
            runs += update_peers(source.first(n), ids[:1, :n], K, f"planes made beforehand, {n:,} rows")
        table += measure(card, name, runs)
    return table


def check_sums(
    name: str,
    results: Sequence[Tensor],
    expected: list[tuple[slice, tuple[Tensor, Tensor]]],
    shape: tuple[int, int, int, int],
) -> None:
    """Raises Wrong unless sums [G, K, D] and sizes [G, K] equal those of `Source.expected`."""
    sums, sizes = results
    for neurons, reference_results in expected:
        label = f"{name} against reference.py, neurons {neurons.start:,} to {neurons.stop - 1:,}"
        check(label, (sums[..., neurons], sizes), reference_results, shape)


def update_peers(source: Source, ids: Tensor, K: int, note: str) -> list[Run]:
    """Runs of two torch peers that add floats, which is exact for patterns and rounded for importances.

    source: one group; ids: int64 [1, n].
    """
    expected, numbers = source.expected(ids, K), source.numbers()
    n, D = numbers.shape
    halves = numbers.bfloat16()

    def index_add() -> Tensor:
        return torch.zeros((K, D), device=DEVICE).index_add_(0, ids[0], numbers)

    def one_hot() -> Tensor:
        members = torch.zeros((K, n), dtype=torch.bfloat16, device=DEVICE).scatter_(0, ids, 1)
        return torch.mm(members, halves, out_dtype=torch.float32)

    def check_floats(sums: Tensor) -> str:
        for neurons, (exact, _) in expected:
            if ((sums[:, neurons] - exact[0]).abs() > (0.01 * exact[0] if source.power else 0)).any():
                raise Wrong(f"sums differ from reference.py, neurons {neurons.start:,} to {neurons.stop - 1:,}")
        return ""

    runs = []
    for name, call in (("torch index_add_ float32", index_add), ("torch one-hot bf16 GEMM", one_hot)):
        name, exact = name + ", rounded" * bool(source.power), not source.power
        runs += peer(Run(name, [call], (1, n, K, D), "copy", source.rows.numel(), exact, note), check_floats)
    return runs


def binarize(card: Card, K: int, D: int) -> list[Row]:
    """Rows for binarize at density 0.5; the peer returns an unpacked mask of bools."""
    sums, m, shape = torch.randint(200, 400, (K, D), device=DEVICE), ops.mask_size(D, 0.5), (1, 0, K, D)
    with poison():
        masks = ops.binarize(sums, 0.5)
    for k in range(0, K, 2048):
        part = slice(k, k + 2048)
        check("binarize against reference.py", [masks[part]], [reference.binarize(sums[part], 0.5)], shape)

    def top() -> Tensor:
        largest = sums.topk(m, sorted=False).indices
        return torch.zeros((K, D), dtype=torch.bool, device=DEVICE).scatter_(1, largest, True)

    def check_mask(mask: Tensor) -> str:
        captured, expected = ((sums * kept).sum(1) for kept in (mask, ops.unpack(masks, D)))
        if not (torch.equal(captured, expected) and bool((mask.sum(1) == m).all())):
            raise Wrong("the masks don't keep the largest sums")
        return ""

    facts = {"shape": shape, "ceiling": "copy", "moved": 8 * K * D}
    runs = [
        Run("apc", [partial(ops.binarize, sums, 0.5)], **facts),
        *peer(Run("torch.topk + scatter", [top], **facts, note="not packed"), check_mask),
    ]
    return measure(card, "binarize", runs)


def totals(card: Card, shape: tuple[int, int, int, int]) -> list[Row]:
    """Rows for popcount of packed rows and for row_totals of importances at power 2."""
    G, N, _, D = shape
    shape, sample = (G, N, 0, D), torch.randperm(N, device=DEVICE)[: PIECE // D]
    packed, importance = draw_rows(G, N, D), torch.randint(0, 256, (G, N, D), dtype=torch.uint8, device=DEVICE)
    cases = {
        "popcount": (packed, lambda module, rows: module.popcount(rows)),
        "row_totals, power 2": (importance, lambda module, rows: module.row_totals(rows, 2)),
    }
    table = []
    for operation, (rows, call) in cases.items():
        with poison():
            result = call(ops, rows)
        check(f"{operation} against reference.py", [result[:, sample]], [call(reference, rows[:, sample])], shape)
        table += measure(card, operation, [Run("apc", [partial(call, ops, rows)], shape, "copy", rows.numel())])
    return table


def capacity(card: Card, shape: tuple[int, int, int, int]) -> list[Row]:
    """Rows for assign_with_capacity; the peer fills the clusters one by one, with distances computed beforehand."""
    G, N, K, D = shape
    rows, centroids, room = draw_rows(G, N, D)[0], draw_centroids(G, K, D)[0], N // K
    inputs = [planes(packed, D, torch.int8) for packed in (rows, centroids)]
    keys = torch.empty((K, N), dtype=torch.int64, device=DEVICE)  # orders by distance, then by row
    for k in range(0, K, 1024):
        some = pad(inputs[1][k : k + 1024], (0, 0, 0, max(0, 32 - K)))
        overlap = torch._int_mm(some, pad(inputs[0], (0, 0, 0, -N % 8)).mT)[: K - k, :N]
        keys[k : k + 1024] = -overlap.long() * N + torch.arange(N, device=DEVICE) + inputs[0].sum(1).long() * N

    def serial() -> Tensor:
        ids = torch.full((N,), -1, dtype=torch.int64, device=DEVICE)
        taken = torch.zeros(N, dtype=torch.bool, device=DEVICE)
        for k in range(K):
            free = keys[k].masked_fill(taken, torch.iinfo(torch.int64).max)
            chosen = free.topk(room, largest=False, sorted=False).indices
            ids[chosen], taken[chosen] = k, True
        return ids

    expected = serial()
    with poison():
        ids = ops.assign_with_capacity(rows, centroids, room)
    check("assign_with_capacity against one cluster after the other", [ids], [expected], shape)
    facts = {"shape": shape, "ceiling": "b1 wgmma"}
    runs = [
        Run("apc", [partial(ops.assign_with_capacity, rows, centroids, room)], **facts),
        Run("torch.topk, a cluster at a time", [serial], **facts),
    ]
    return measure(card, "assign_with_capacity", runs)


def top(card: Card, N: int, D: int) -> list[Row]:
    """Rows for top_mask of float32 rows, which keeps half of the neurons."""
    inputs, m, shape = [torch.randn(N, D, device=DEVICE) for _ in range(copies(4 * N * D))], D // 2, (1, N, 0, D)
    with poison():
        mask = ops.top_mask(inputs[0], m)
    check("top_mask against reference.py", [mask], [reference.top_mask(inputs[0], m)], shape)

    def peers(values: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(m, sorted=False).indices, True)

    facts = {"shape": shape, "ceiling": "copy", "moved": 5 * N * D}
    runs = [Run("apc", [partial(ops.top_mask, values, m) for values in inputs], **facts)]
    torch_run = Run("torch.topk + scatter", [partial(peers, values) for values in inputs], **facts)
    runs += peer(torch_run, lambda other: "" if torch.equal(other, mask) else "other ties")
    return measure(card, "top_mask", runs)


def divergence(card: Card, n: int, V: int) -> list[Row]:
    """Rows for divergence of bfloat16 logits with its gradient; the peer is torch's kl_div in float32."""
    masked, dense = ((4 * torch.randn(n, V, device=DEVICE)).bfloat16() for _ in range(2))
    masked.requires_grad_(True)
    shape = (1, n, 0, V)

    def with_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(function(masked, dense), masked)[0]

    def peers(masked: Tensor, dense: Tensor) -> Tensor:
        return kl_div(masked.float().log_softmax(-1), dense.float().log_softmax(-1), log_target=True, reduction="sum")

    ours, theirs = with_gradient(lambda a, b: ops.divergence(a, b).sum()), with_gradient(peers)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-6):
        raise Wrong(f"the divergence's gradient differs from torch's by {float((ours - theirs).abs().max()):.2g}")
    facts = {"shape": shape, "ceiling": "copy", "moved": 5 * 2 * n * V}
    runs = [Run("apc", [partial(with_gradient, lambda a, b: ops.divergence(a, b).sum())], **facts)]
    runs += peer(Run("torch kl_div of log_softmax", [partial(with_gradient, peers)], **facts), lambda _: "")
    return measure(card, "divergence, with gradient", runs)


def curve(card: Card, n: int, D: int) -> list[Row]:
    """Rows for score_curve of bfloat16 products with its gradients; the peer is the formula in torch."""
    products = torch.randn(1, n, 2, D, device=DEVICE).bfloat16().requires_grad_(True)
    sizes = [(1, 2, D)] * 3 + [(1, D)]  # scale, slope, power; bias
    parameters = [torch.randn(size, device=DEVICE).requires_grad_(True) for size in sizes]
    output_gradient, shape = torch.randn(1, n, D, device=DEVICE), (1, n, 2, D)

    def with_gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(products, *parameters), [products, *parameters], output_gradient)

    def peers(products: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor) -> Tensor:
        z = products.float() * scale.unsqueeze(1)
        return bias.unsqueeze(1) + (slope.unsqueeze(1) * z + power.unsqueeze(1) * torch.log1p(z.square())).sum(2)

    for ours, theirs in zip(with_gradients(ops.score_curve), with_gradients(peers), strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
            raise Wrong(f"a gradient of score_curve differs from torch's by {float((ours - theirs).abs().max()):.2g}")
    facts = {"shape": shape, "ceiling": "copy", "moved": n * D * (2 * 2 + 4 + 4 + 2 * 2 + 2 * 2)}
    runs = [Run("apc", [partial(with_gradients, ops.score_curve)], **facts)]
    runs += peer(Run("the formula in torch", [partial(with_gradients, peers)], **facts), lambda _: "")
    return measure(card, "score_curve, with gradients", runs)


if __name__ == "__main__":
    main()
