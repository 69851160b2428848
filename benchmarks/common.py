"""What all benchmarks share: timers, and rows of results that say where they come from.

Shape letters: see `apc/ops/bits.py`.
"""

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
    """One line of results.csv: one implementation of one operation at one size. Empty strings: does not apply."""

    date: str
    commit: str  # short hash, with +dirty where files differ from it
    device: str  # name of the GPU, or of the CPU and its threads
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
    rate: float  # at the median
    unit: str  # of the rate: pairs/s, G·N·K·D a second, or bytes/s
    share: float | str  # rate over the ceiling's
    share_of: str  # which ceiling
    ok: bool  # these very results were compared with reference.py, and equal
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
    """A Row out of measured seconds. shape: (G, N, K, D); moved: bytes, where the rate is of bytes and not of pairs; ceiling: a rate."""
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
    """The value below which this share of the values lies, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@functools.cache
def commit() -> str:
    """The short hash of the checkout, with +dirty where tracked files (but for the results) differ; 'none' where git knows of none, or is none.

    As it was when first asked for: a process keeps the code that it began with.
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


def cpu_name() -> str:
    """The CPU's model and the threads torch uses, as the column `device` names them."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = lines[0].split(":", 1)[1].strip() if lines else platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def append(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Adds the rows to a CSV file, which it starts where there is none. Raises ValueError where the file has other columns."""
    names = [field.name for field in fields(Row)]
    starts = not path.exists()
    if not starts:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != names:
            raise ValueError(f"{path} has columns {found}, not {names}")
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if starts:
            writer.writerow(names)
        for result in rows:
            writer.writerow(
                [
                    f"{value:.6g}" if isinstance(value, float) else value
                    for value in (getattr(result, name) for name in names)
                ]
            )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for a reader, without what is the same for all of them."""
    lines = [
        "| operation | G × N × K × D | implementation | ms (20 % … 80 %) | rate | share | ok | note |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for result in rows:
        milliseconds = [
            f"{1000 * seconds:.4g}" for seconds in (result.seconds_median, result.seconds_q20, result.seconds_q80)
        ]
        scale, letter = next(
            (scale, letter)
            for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (0, ""))
            if result.rate >= scale
        )
        share = "" if result.share == "" else f"{100 * result.share:.1f} % of {result.share_of}"
        lines.append(
            f"| {result.operation} | {result.G:,} × {result.N:,} × {result.K:,} × {result.D:,} | {result.implementation} "
            f"| {milliseconds[0]} ({milliseconds[1]} … {milliseconds[2]}) | {result.rate / (scale or 1):.3g} {letter}{result.unit} "
            f"| {share} | {'yes' if result.ok else 'no'} | {result.note} |"
        )
    return "\n".join(lines)


def time_cpu(functions: dict[str, Callable[[], object]], repeats: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each function; they take turns, so that what else the machine does meets all of them alike."""
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
    """Seconds of a call on the current CUDA stream, by events; `repeats` times the mean over so many calls in a row.

    functions: the same operation on different inputs, called in turn, so that none finds its input in the cache if together they
    are larger than it. calls: more than one where a call is shorter than its launch.
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
