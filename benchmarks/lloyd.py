"""Whole Lloyd iterations through `ClusteringModule`, as `train.py` runs them: `python benchmarks/lloyd.py [--quick] [--only PART …] [--csv PATH]`.

Parts: `iteration` (one projection, rows kept on the GPU or streamed from host memory) and `paper` (its full clustering: three projections,
ten iterations, random start). Patterns are random, of Mistral-7B's shape over 163 windows of 2,048 tokens: 32 layers, pooled, 10.68 M rows.
Every iteration is timed from the end of the one before to its own end, with all that Lightning, update and re-seeding take.
First a small clustering is compared with the CPU's, bit for bit. Shape letters: see `apc/ops/bits.py`.
"""

import argparse
import gc
import logging
import resource
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import RESULTS, Row, append, commit, markdown, row, time_cpu, time_cuda
from pytorch_lightning import Callback, Trainer

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.memory import ResidentPatterns, keep_bytes
from apc.collect.patterns import ActiveRule, Block, PatternInfo
from apc.config.schema import ClusterConfig
from apc.run.trainer import SumsOnDevice

PARTS = ("iteration", "paper")
CHECKED = "checked at a small size"
PROJECTIONS = {"gate": 14336, "up": 14336, "down": 4096}


@dataclass(frozen=True)
class Size:
    layers: int
    windows: int
    seq_len: int
    block_windows: int
    clusters: tuple[int, ...]
    widths: dict[str, int]


FULL = Size(layers=32, windows=163, seq_len=2048, block_windows=8, clusters=(2048, 16384), widths=PROJECTIONS)
QUICK = Size(
    layers=2, windows=5, seq_len=64, block_windows=2, clusters=(16, 32), widths={"gate": 300, "up": 300, "down": 67}
)


class Clock(Callback):
    """Seconds of each epoch, from the end of the one before; the first from the start of the fit, which draws the first centroids."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def setup(self, trainer, module, stage) -> None:
        self._last = self._now()

    def on_train_epoch_end(self, trainer, module) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; on a CPU too")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file that the rows are added to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.quick:
        print(
            "benchmarks/lloyd.py needs an NVIDIA GPU, and torch sees none; --quick runs tiny sizes on the CPU",
            file=sys.stderr,
        )
        sys.exit(2)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*your dataloader is not resumable.*",
        "GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size = QUICK if arguments.quick else FULL
    check(device)
    rows = []
    if "iteration" in arguments.only:
        rows += iterations(size, device)
    if "paper" in arguments.only:
        rows += paper(size, device)
    append(rows, arguments.csv)
    print(f"\n{device_name(device)}, torch {torch.__version__}, commit {commit()}\n\n{markdown(rows)}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def make_source(size: Size, sites: list[str], device: torch.device) -> tuple[ResidentPatterns, float]:
    """Random patterns in host memory, page-locked where there is a GPU, and the seconds that taking this memory took."""
    widths = {site: size.widths[site] for site in sites}
    info = PatternInfo(size.layers, 64, max(widths.values()), size.windows, size.seq_len, widths, ActiveRule("top", 0.5), False, False, {},
                       {site: torch.ones(size.layers, D, dtype=torch.int64) for site, D in widths.items()})  # fmt: skip
    source = ResidentPatterns(info, list(range(size.windows)), torch.device("cpu"), locked=device.type == "cuda")
    start = time.perf_counter()
    source.reserve(info.fields())
    seconds = time.perf_counter() - start
    generator = torch.Generator(device).manual_seed(1)
    for window in range(size.windows):
        named = {}
        for site, D in widths.items():
            shape = (size.layers, size.seq_len, ops.row_bytes(D))
            value = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
            whole, bits = divmod(D, 8)
            if bits:
                value[..., whole] &= (1 << bits) - 1
            value[..., whole + bool(bits) :] = 0
            named[f"patterns.{site}"] = value
        source.add(Block.of_windows(named, [window], size.seq_len))
    return source, seconds


def fit(
    source: ResidentPatterns, k: int, epochs: int, block_windows: int, device: torch.device, keep: bool
) -> tuple[ClusteringModule, list[float]]:
    """Clusters binary patterns, pooled, from a random start. keep: blocks stay on the GPU as far as they fit, as in `train.py`."""
    gc.collect()  # what an earlier fit held
    cfg = ClusterConfig(k=k, weighting="binary", scope="pooled", init="random", max_epochs=epochs, tolerance=0.0)
    with device:
        module, clock = ClusteringModule(cfg, source.info, 0), Clock(device)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        strategy=SumsOnDevice(device),
        max_epochs=epochs,
        logger=False,
        callbacks=[clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    budget = keep_bytes(source.info, module.fields(), block_windows, device, module.working_bytes()) if keep else 0
    loader = BlockLoader(source, module.fields(), block_windows, 0, device=device, keep_bytes=budget)
    trainer.fit(module, datamodule=PatternDataModule(source, loader))
    loader.release()
    return module, clock.seconds


def check(device: torch.device) -> None:
    """Raises AssertionError unless a small clustering gives the CPU's codebook, blocks kept or streamed."""
    source, _ = make_source(QUICK, ["gate", "down"], device)
    expected = fit(source, 16, 4, QUICK.block_windows, torch.device("cpu"), keep=False)[0]
    for keep in (False, True):
        found = fit(source, 16, 4, QUICK.block_windows, device, keep)[0].cpu()
        for name, value in expected.named_buffers():
            if not torch.equal(value, found.get_buffer(name)):
                raise AssertionError(f"{name} is not what the CPU finds, with blocks {'kept' if keep else 'streamed'}")


def link_seconds(held: int, device: torch.device) -> float:
    """Seconds that so many bytes take from page-locked host memory at least: the best of some copies of 1 GiB that do nothing else."""
    host = torch.zeros(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    seconds = (
        time_cuda([lambda: there.copy_(host, non_blocking=True)], 20)
        if device.type == "cuda"
        else time_cpu({"copy": lambda: there.copy_(host)})["copy"]
    )
    return held * min(seconds) / host.nbytes


def iterations(size: Size, device: torch.device) -> list[Row]:
    source, taken = make_source(size, ["gate"], device)
    D, N = size.widths["gate"], source.info.tokens * size.layers
    held = N * ops.row_bytes(D)
    link = link_seconds(held, device)
    print(
        f"{held / 1e9:.1f} GB of patterns, page-locked in {taken:.1f} s; the link takes {link:.3f} s for them, {held / link / 1e9:.1f} GB/s"
    )
    rows = [
        row(
            "rows over the link",
            "copy",
            (1, N, 0, D),
            [link],
            device_name(device),
            ok=False,
            moved=held,
            note="copies of 1 GiB, nothing else to do",
        )
    ]
    for k in size.clusters:
        for keep, epochs in ((True, 8), (False, 5)):
            seconds = fit(source, k, epochs, size.block_windows, device, keep)[1][
                2:
            ]  # the first streams, and draws the start
            if keep:
                compute, note = statistics.median(seconds), "rows kept on the GPU"
            else:
                ratio = statistics.median(seconds) / max(compute, link)
                note = f"rows in host memory: {ratio:.2f} × the larger of compute and link time"
            rows.append(
                row(
                    "Lloyd iteration",
                    "apc",
                    (1, N, k, D),
                    seconds,
                    device_name(device),
                    ok=False,
                    note=f"{note}; {CHECKED}",
                )
            )
            print(f"K {k:,}, {note}: {statistics.median(seconds):.4f} s")
    return rows


def paper(size: Size, device: torch.device) -> list[Row]:
    source, taken = make_source(size, list(size.widths), device)
    N, k = source.info.tokens * size.layers, size.clusters[-1]
    held = sum(N * ops.row_bytes(D) for D in size.widths.values())
    start = time.perf_counter()
    fit(
        make_source(replace(size, windows=1), list(size.widths), device)[0], k, 1, size.block_windows, device, keep=True
    )
    compiled = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    module, seconds = fit(source, k, 10, size.block_windows, device, keep=True)
    book = module.codebook({})
    total = time.perf_counter() - start
    on_gpu = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    note = (
        f"3 projections, 10 iterations, to the codebook on the host; {held / 1e9:.1f} GB of rows page-locked in {taken:.1f} s before, "
        f"kernels compiled in {compiled:.1f} s; peak {peak:.1f} GB host, {on_gpu:.1f} GB GPU"
    )
    print(
        f"the paper's clustering: {total:.2f} s; its start and first iteration {seconds[0]:.2f} s, the others {statistics.median(seconds[1:]):.3f} s; {note}"
    )
    if book.problem():
        raise AssertionError(book.problem())
    return [
        row(
            "paper's full clustering",
            "apc",
            (10, N, k, sum(size.widths.values())),
            [total],
            device_name(device),
            ok=False,
            note=f"{note}; {CHECKED}",
        )
    ]


if __name__ == "__main__":
    main()
