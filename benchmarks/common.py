"""Shared by all benchmarks: timers, and rows of results with their provenance.

Shape letters: see `apc.ops`.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results.csv")


@dataclass
class Row:
    """One row of results.csv: one implementation of one operation at one size. An empty string: does not apply."""

    date: str
    commit: str  # short hash; +dirty: files differ from it
    device: str  # GPU name, or CPU name and number of threads
    torch: str
    triton: str
    python: str
    operation: str
    implementation: str
    G: int
    N: int
    K: int
    D: int
    seconds_median: float
    seconds_q20: float
    seconds_q80: float
    rate: float  # at the median time
    unit: str  # pairs/s (G·N·K·D per second) or bytes/s
    share: float | str  # rate ÷ rate of the ceiling
    share_of: str  # which ceiling
    ok: bool  # the results of this run equal those of reference.py
    note: str


def row(
    operation: str,
    implementation: str,
    shape: tuple[int, int, int, int],
    seconds: Sequence[float],
    device: str,
    *,
    ok: bool,
    moved: int | None = None,
    ceiling: float | None = None,
    share_of: str = "",
    note: str = "",
) -> Row:
    """The row of a measurement.

    shape: (G, N, K, D). moved: bytes per call; if given, the rate counts bytes, else pairs. ceiling: a rate.
    """
    G, N, K, D = shape
    median = statistics.median(seconds)
    rate = (G * N * K * D if moved is None else moved) / median
    return Row(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=commit(),
        device=device,
        torch=torch.__version__,
        triton=importlib.metadata.version("triton"),
        python=platform.python_version(),
        operation=operation,
        implementation=implementation,
        G=G,
        N=N,
        K=K,
        D=D,
        seconds_median=median,
        seconds_q20=quantile(seconds, 0.2),
        seconds_q80=quantile(seconds, 0.8),
        rate=rate,
        unit="pairs/s" if moved is None else "bytes/s",
        share="" if ceiling is None else rate / ceiling,
        share_of=share_of,
        ok=ok,
        note=note,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of the values at `share`, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@functools.cache
def commit() -> str:
    """The checkout's short commit hash, with +dirty if any file except the results differs from it.

    'none' without git or outside a checkout. Cached, because a process keeps the code that it started with.
    """
    if shutil.which("git") is None:
        return "none"

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "none"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results.csv").stdout.strip()
    return head.stdout.strip() + ("+dirty" if changed else "")


def append(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Appends the rows to a CSV file, created if missing. Raises ValueError if its columns differ from Row's."""
    names = [field.name for field in fields(Row)]
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        if columns != names:
            raise ValueError(f"{path} has columns {columns}, expected {names}; choose another file with --csv")
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(names)
        for result in rows:
            values = (getattr(result, name) for name in names)
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])


def add_csv_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--csv`, the file that rows are appended to."""
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append rows to this file")


def comma_list(kind: Callable[[str], object] = str) -> Callable[[str], list]:
    """An argparse type: comma-separated values, each converted by `kind`."""
    return lambda text: [kind(value) for value in text.split(",")]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without the columns on device, versions and commit."""
    lines = [
        "| operation | G × N × K × D | implementation | ms (20 % … 80 %) | rate | share | ok | note |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for result in rows:
        quantiles = (result.seconds_median, result.seconds_q20, result.seconds_q80)
        median, fast, slow = (f"{1000 * seconds:.4g}" for seconds in quantiles)
        scale, letter = next(
            (scale, letter)
            for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (0, ""))
            if result.rate >= scale
        )
        share = "" if result.share == "" else f"{100 * result.share:.1f} % of {result.share_of}"
        size = f"{result.G:,} × {result.N:,} × {result.K:,} × {result.D:,}"
        rate = f"{result.rate / (scale or 1):.3g} {letter}{result.unit}"
        lines.append(
            f"| {result.operation} | {size} | {result.implementation} | {median} ({fast} … {slow}) | {rate} "
            f"| {share} | {'yes' if result.ok else 'no'} | {result.note} |"
        )
    return "\n".join(lines)


def time_cpu(functions: dict[str, Callable[[], object]], repeats: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, for each function. The functions take turns, so that other load slows all of them alike."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def time_cuda(
    functions: Sequence[Callable[[], object]], repeats: int = 50, warmup: int = 5, calls: int = 1
) -> list[float]:
    """Seconds per call on the current CUDA stream, by CUDA events: `repeats` values, each a mean over `calls` calls.

    functions: one operation on different inputs, called in turn. If the inputs together exceed the cache, every call
    reads its input from memory. calls: more than one for a call that is shorter than its launch.
    """
    for i in range(max(warmup, len(functions))):
        functions[i % len(functions)]()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    turn = 0
    for start, end in events:
        start.record()
        for _ in range(calls):
            functions[turn % len(functions)]()
            turn += 1
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 / calls for start, end in events]
