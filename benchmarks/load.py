"""A store of many narrow rows, collected, clustered, killed on the way and gone on with: time and memory of each. `python benchmarks/load.py --help`.

Rows are drawn at random around prototypes; no model is run. Each stage is a process of its own, and memory is the most that it held at any time.
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


def info_of(rows: int, D: int) -> PatternInfo:
    return PatternInfo(
        1, 8, D, rows // S, S, {"neuron": D}, ActiveRule("top", 0.5), False, False, {"rows": rows, "neurons": D}
    )


def collect(folder: Path, rows: int, D: int, K: int) -> None:
    """Windows of patterns into a store, a shard at a time."""
    writer = StoreWriter(folder, info_of(rows, D))
    writer.prepare()
    prototypes = torch.rand(PROTOTYPES, D, generator=torch.Generator().manual_seed(0)).round()
    for first, last in writer.missing():
        parts = []
        for window in range(first, last, BLOCK_WINDOWS):
            generator = torch.Generator().manual_seed(window)
            count = (min(window + BLOCK_WINDOWS, last) - window) * S
            flips = torch.rand(count, D, generator=generator) < 0.1
            parts.append(
                ops.pack(prototypes[torch.randint(PROTOTYPES, (count,), generator=generator)].bool() ^ flips).unsqueeze(
                    0
                )
            )
        writer.add(Block.of_windows({"patterns.neuron": torch.cat(parts, dim=1)}, range(first, last), S))
    writer.finish()


class _Dies(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def cluster(folder: Path, rows: int, D: int, K: int, dies: float | None = None) -> str:
    """Two passes over the store, from the checkpoint where there is one; dies: after so many passes. Returns a digest of the codebook."""
    store = PatternStore(next(path for path in folder.iterdir() if path.is_dir() and path.name.endswith("-p")))
    module = ClusteringModule(ClusterConfig(k=K, weighting="binary", max_epochs=2), store.info)
    loader = BlockLoader(store, module.fields(), BLOCK_WINDOWS, seed=0)
    checkpoint = folder / "cluster.ckpt"
    callbacks = [ResumePoint(checkpoint, 50)] + ([_Dies(int(dies * len(loader)))] if dies else [])
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
    began = time.perf_counter()
    found = function(*arguments[1:])
    queue.put((time.perf_counter() - began, idle, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, found))


def measured(function, *arguments) -> tuple[float, int, int, str | None] | None:
    """(seconds, KiB that the process held before, at most, result) of a call in a process of its own; None if that was killed."""
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
    parser.add_argument(
        "--rows", type=lambda text: [int(float(value)) for value in text.split(",")], default=[5_000_000, 50_000_000]
    )
    parser.add_argument("--neurons", type=int, default=64)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument(
        "--dir", type=Path, help="where stores are made and removed again; the system's place for temporary files"
    )
    options = parser.parse_args()
    if options.dir is not None and not options.dir.is_dir():
        parser.error(f"--dir {options.dir}: no such folder; make it, or leave it out")
    print(
        "| rows | stage | seconds | held before, MiB | held at most, MiB |\n| ---: | --- | ---: | ---: | ---: |",
        flush=True,
    )
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.dir) as place:
            folder, sizes = Path(place), (rows, options.neurons, options.k)

            def show(stage: str, found: tuple) -> str | None:
                seconds, idle, most, result = found
                print(f"| {rows:,} | {stage} | {seconds:.1f} | {idle / 1024:.0f} | {most / 1024:.0f} |", flush=True)  # noqa: B023
                return result

            show("collect", measured(collect, folder, *sizes))
            assert measured(cluster, folder, *sizes, 1.5) is None and (folder / "cluster.ckpt").is_file()
            resumed = show(
                "cluster, from a kill in the middle of the second pass on", measured(cluster, folder, *sizes)
            )
            (folder / "cluster.ckpt").unlink()
            if show("cluster, two passes", measured(cluster, folder, *sizes)) != resumed:
                raise SystemExit(
                    "benchmarks/load.py: WRONG RESULT: the run that was killed ended with another codebook"
                )


if __name__ == "__main__":
    main()
