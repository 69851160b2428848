"""Whole Lloyd iterations through `ClusteringModule`, as `train.py` runs them: `python benchmarks/lloyd.py --help`.

Parts: `iteration` (one projection, rows kept on the GPU or streamed from host memory) and `paper` (the paper's full
clustering: three projections, ten iterations, random start). Patterns are random, with the shape of Mistral-7B over 163
windows of 2,048 tokens: 32 layers, pooled, 10.68 M rows. An iteration lasts from the end of the previous one to its own
end; this includes Lightning, the update of the centroids and re-seeding. A small clustering is compared with the CPU's
first, bit for bit. Shape letters: see `apc.ops`.
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

import torch
from common import Row, add_csv_option, append, commit, markdown, row, time_cpu, time_cuda
from pytorch_lightning import Callback, Trainer
from torch import Tensor

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
    """The rows to cluster and the numbers of clusters; widths: neurons of each site."""

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
    """Seconds of each epoch, from the end of the previous one. The first includes drawing the initial centroids."""

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
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="check that everything runs, at tiny sizes; also on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    add_csv_option(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.quick:
        print("benchmarks/lloyd.py: needs an NVIDIA GPU; --quick runs tiny sizes on the CPU", file=sys.stderr)
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
    """Random patterns in host memory, page-locked if there is a GPU, and the seconds of allocating that memory."""
    widths = {site: size.widths[site] for site in sites}
    totals = {site: torch.ones(size.layers, D, dtype=torch.int64) for site, D in widths.items()}
    shape = size.layers, 64, max(widths.values()), size.windows, size.seq_len
    info = PatternInfo(*shape, widths, ActiveRule("top", 0.5), False, False, {}, totals)
    source = ResidentPatterns(info, list(range(size.windows)), torch.device("cpu"), locked=device.type == "cuda")
    start = time.perf_counter()
    source.reserve(info.fields())
    seconds = time.perf_counter() - start
    generator = torch.Generator(device).manual_seed(1)
    for window in range(size.windows):
        named = {}
        for site, D in widths.items():
            named[f"patterns.{site}"] = random_rows((size.layers, size.seq_len), D, generator)
        source.add(Block.of_windows(named, [window], size.seq_len))
    return source, seconds


def random_rows(shape: tuple[int, ...], D: int, generator: torch.Generator) -> Tensor:
    """Random packed rows on the generator's device: uint8 [*shape, W], padding bits zero."""
    size = (*shape, ops.row_bytes(D))
    rows = torch.randint(0, 256, size, dtype=torch.uint8, device=generator.device, generator=generator)
    whole, bits = divmod(D, 8)
    if bits:
        rows[..., whole] &= (1 << bits) - 1
    rows[..., whole + bool(bits) :] = 0
    return rows


def fit(
    source: ResidentPatterns, k: int, epochs: int, block_windows: int, device: torch.device, keep: bool
) -> tuple[ClusteringModule, list[float]]:
    """Clusters binary patterns, pooled, from a random start: (the module, seconds of each epoch).

    keep: blocks stay on the GPU as far as they fit, as in `train.py`; else all are streamed.
    """
    gc.collect()  # frees the blocks of an earlier fit
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
    """Raises AssertionError unless a small clustering equals the CPU's, with blocks kept and with blocks streamed."""
    source, _ = make_source(QUICK, ["gate", "down"], device)
    expected = fit(source, 16, 4, QUICK.block_windows, torch.device("cpu"), keep=False)[0]
    for keep in (False, True):
        module = fit(source, 16, 4, QUICK.block_windows, device, keep)[0].cpu()
        for name, value in expected.named_buffers():
            if not torch.equal(value, module.get_buffer(name)):
                raise AssertionError(f"{name} differs from the CPU's, with blocks {'kept' if keep else 'streamed'}")


def link_seconds(total_bytes: int, device: torch.device) -> float:
    """Shortest time for a copy of so many bytes from page-locked host memory, from the fastest of some 1 GiB copies."""
    host = torch.zeros(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    if device.type == "cuda":
        seconds = time_cuda([lambda: target.copy_(host, non_blocking=True)], 20)
    else:
        seconds = time_cpu({"copy": lambda: target.copy_(host)})["copy"]
    return total_bytes * min(seconds) / host.nbytes


def iterations(size: Size, device: torch.device) -> list[Row]:
    """Rows for an iteration over one projection, with the patterns on the GPU and in host memory."""
    source, lock_seconds = make_source(size, ["gate"], device)
    D, N = size.widths["gate"], source.info.tokens * size.layers
    total_bytes = N * ops.row_bytes(D)
    link = link_seconds(total_bytes, device)
    print(
        f"{total_bytes / 1e9:.1f} GB of patterns, page-locked in {lock_seconds:.1f} s; "
        f"copying them takes {link:.3f} s, {total_bytes / link / 1e9:.1f} GB/s"
    )
    facts = {"device": device_name(device), "ok": False}
    note = "copies of 1 GiB, nothing else to do"
    rows = [row("rows over the link", "copy", (1, N, 0, D), [link], moved=total_bytes, note=note, **facts)]
    for k in size.clusters:
        for keep, epochs in ((True, 8), (False, 5)):
            # Without the first two epochs: the first draws the initial centroids and streams all rows.
            seconds = fit(source, k, epochs, size.block_windows, device, keep)[1][2:]
            if keep:
                compute, note = statistics.median(seconds), "rows kept on the GPU"
            else:
                ratio = statistics.median(seconds) / max(compute, link)
                note = f"rows in host memory: {ratio:.2f} × the larger of compute and link time"
            rows.append(row("Lloyd iteration", "apc", (1, N, k, D), seconds, note=f"{note}; {CHECKED}", **facts))
            print(f"K {k:,}, {note}: {statistics.median(seconds):.4f} s")
    return rows


def paper(size: Size, device: torch.device) -> list[Row]:
    """The row for the paper's clustering of all three projections, from packed rows to the codebook."""
    sites = list(size.widths)
    source, lock_seconds = make_source(size, sites, device)
    N, k = source.info.tokens * size.layers, size.clusters[-1]
    total_bytes = sum(N * ops.row_bytes(D) for D in size.widths.values())
    start = time.perf_counter()
    fit(make_source(replace(size, windows=1), sites, device)[0], k, 1, size.block_windows, device, keep=True)
    compile_seconds = time.perf_counter() - start
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
        f"3 projections, 10 iterations, to the codebook on the host; {total_bytes / 1e9:.1f} GB of rows page-locked in "
        f"{lock_seconds:.1f} s before, kernels compiled in {compile_seconds:.1f} s; "
        f"peak {peak:.1f} GB host, {on_gpu:.1f} GB GPU"
    )
    print(
        f"the paper's clustering: {total:.2f} s; initial centroids and first iteration {seconds[0]:.2f} s, "
        f"each of the others {statistics.median(seconds[1:]):.3f} s; {note}"
    )
    if book.problem():
        raise AssertionError(book.problem())
    shape = (10, N, k, sum(size.widths.values()))
    facts = {"ok": False, "note": f"{note}; {CHECKED}"}
    return [row("paper's full clustering", "apc", shape, [total], device_name(device), **facts)]


if __name__ == "__main__":
    main()
