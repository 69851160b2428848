"""Time and peak memory of collecting and clustering many narrow rows, with a kill: `python benchmarks/load.py --help`.

Rows are random, around prototypes; no model runs. Each stage runs in its own process. Clustering is killed, resumed
from its checkpoint, and compared with a run that was not killed.
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import torch
from common import comma_list
from pytorch_lightning import Callback, Trainer

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.patterns import ActiveRule, Block, PatternInfo
from apc.collect.store import PatternStore, StoreWriter
from apc.config.schema import ClusterConfig
from apc.run.callbacks import ResumePoint

S, PROTOTYPES = 2048, 256
BLOCK_WINDOWS = 64


def pattern_info(rows: int, D: int) -> PatternInfo:
    """The description of a store with one layer of D neurons."""
    return PatternInfo(
        1, 8, D, rows // S, S, {"neuron": D}, ActiveRule("top", 0.5), False, False, {"rows": rows, "neurons": D}
    )


def collect(folder: Path, rows: int, D: int, K: int) -> None:
    """Writes windows of random patterns to a store, one shard at a time."""
    writer = StoreWriter(folder, pattern_info(rows, D))
    writer.prepare()
    prototypes = torch.rand(PROTOTYPES, D, generator=torch.Generator().manual_seed(0)).round()
    for first, last in writer.missing():
        parts = []
        for window in range(first, last, BLOCK_WINDOWS):
            generator = torch.Generator().manual_seed(window)
            count = (min(window + BLOCK_WINDOWS, last) - window) * S
            flips = torch.rand(count, D, generator=generator) < 0.1
            nearest = torch.randint(PROTOTYPES, (count,), generator=generator)
            parts.append(ops.pack(prototypes[nearest].bool() ^ flips).unsqueeze(0))
        writer.add(Block.of_windows({"patterns.neuron": torch.cat(parts, dim=1)}, range(first, last), S))
    writer.finish({"model": "none", "text": "random rows"})


class _KillAtStep(Callback):
    """Kills its own process after a training step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def cluster(folder: Path, rows: int, D: int, K: int, kill_after: float | None = None) -> str:
    """Runs two passes over the store, from the checkpoint if there is one. Returns a digest of the codebook.

    kill_after: passes after which the process kills itself.
    """
    store = PatternStore(next(path for path in folder.iterdir() if path.is_dir() and path.name.endswith("-p")))
    module = ClusteringModule(ClusterConfig(k=K, weighting="binary", max_epochs=2), store.info)
    loader = BlockLoader(store, module.fields(), BLOCK_WINDOWS, seed=0)
    checkpoint = folder / "cluster.ckpt"
    callbacks = [ResumePoint(checkpoint, 50)] + ([_KillAtStep(int(kill_after * len(loader)))] if kill_after else [])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        datamodule=PatternDataModule(store, loader),
        ckpt_path=checkpoint if checkpoint.is_file() else None,
        weights_only=True,
    )
    book = module.codebook({}).sites["neuron"]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in book.tensors().values())).hexdigest()


def _stage(queue, function, *arguments) -> None:
    torch.set_num_threads(arguments[0])
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = function(*arguments[1:])
    queue.put((time.perf_counter() - start, idle, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, result))


def measured(function, *arguments) -> tuple[float, int, int, str | None] | None:
    """Calls the function in a new process: (seconds, memory before the call, peak memory, result), memory in KiB.

    Returns None if the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_stage, args=(queue, function, torch.get_num_threads(), *arguments))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode:
        raise SystemExit(f"benchmarks/load.py: {function.__name__} ended with exit code {process.exitcode}")
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    rows_type = comma_list(lambda text: int(float(text)))
    default_rows = [5_000_000, 50_000_000]
    parser.add_argument("--rows", type=rows_type, default=default_rows, metavar="N,…", help="rows of each store")
    parser.add_argument("--neurons", type=int, default=64, help="neurons of a row")
    parser.add_argument("--k", type=int, default=64, help="clusters")
    parser.add_argument("--dir", type=Path, help="folder for temporary stores; default: the system's")
    options = parser.parse_args()
    if options.dir is not None and not options.dir.is_dir():
        parser.error(f"--dir {options.dir}: no such folder; make it, or leave it out")
    print("| rows | stage | seconds | MiB before | MiB at the peak |\n| ---: | --- | ---: | ---: | ---: |", flush=True)
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            folder, sizes = Path(name), (rows, options.neurons, options.k)
            show(rows, "collect", measured(collect, folder, *sizes))
            assert measured(cluster, folder, *sizes, 1.5) is None and (folder / "cluster.ckpt").is_file()
            resumed = show(rows, "cluster, resumed in mid-pass 2 after a kill", measured(cluster, folder, *sizes))
            (folder / "cluster.ckpt").unlink()
            if show(rows, "cluster, two passes", measured(cluster, folder, *sizes)) != resumed:
                raise SystemExit("benchmarks/load.py: WRONG RESULT: the killed run ended with another codebook")


def show(rows: int, stage: str, measurement: tuple[float, int, int, str | None]) -> str | None:
    """Prints a line of the table; returns the result of the measured call."""
    seconds, idle, peak, result = measurement
    print(f"| {rows:,} | {stage} | {seconds:.1f} | {idle / 1024:.0f} | {peak / 1024:.0f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
