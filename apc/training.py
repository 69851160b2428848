"""Runs the two trainings of a run, each from where it was left: clustering to a codebook, then the predictor."""

import gc
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.utils.deterministic
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException

from apc import distributed, signals
from apc.activations import Collector
from apc.baselines import BRBKMeans, KMajority
from apc.callbacks import ArmsOnHeldOut, CheckedCheckpoints, EndTogether, ResumePoint, TrackingLogger, checksum_problem
from apc.clustering import ClusteringModule
from apc.codebook import Codebook
from apc.collect import calibration_windows
from apc.config import Config
from apc.datamodule import BlockLoader, PatternDataModule, ResumedDataModule, WindowLoader
from apc.errors import Terminated, UserError
from apc.evaluation import Evaluator
from apc.paper import PaperClustering
from apc.patterns import Block, CollectConfig, PatternInfo, PatternSource
from apc.predictor import Predictor
from apc.predictor_module import PredictorModule
from apc.runs import RunFolder, load_run, provenance, write_json
from apc.streaming import BLOCKS_IN_FLIGHT
from apc.thresholds import find_thresholds
from apc.tracking import Tracking
from apc.tuning import TuningModule

ALGORITHMS = {"lloyd": ClusteringModule, "apc-paper": PaperClustering, "brb-kmeans": BRBKMeans, "k-majority": KMajority}


class _StaysOnDevice:
    """Of a strategy: after the training the module stays where it is, and its gigabytes of sums do not move to the host: a codebook is made of
    them on the device."""

    def teardown(self) -> None:
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module


class SumsOnDevice(_StaysOnDevice, SingleDeviceStrategy):
    """For clustering in one process."""


class SumsOnDevices(_StaysOnDevice, DDPStrategy):
    """For clustering in several: a module without trainable parameters, which DistributedDataParallel refuses to wrap; it exchanges its sums itself."""

    def configure_ddp(self) -> None:
        pass


def make_trainer(cfg: Config, device: torch.device, tracking: Tracking, run: RunFolder, max_epochs: int, callbacks: list[Callback], **options) -> Trainer:
    world = distributed.world_size()
    shown = [TQDMProgressBar(refresh_rate=10)] if cfg.trainer.progress else []
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" and world == 1 else distributed.local_world_size(),
        num_nodes=world // distributed.local_world_size(),
        max_epochs=max_epochs,
        max_steps=cfg.trainer.max_steps,
        log_every_n_steps=1,  # the modules choose what they log
        logger=[TrackingLogger(tracking)],
        callbacks=[EndTogether(), *callbacks, *shown],
        enable_progress_bar=cfg.trainer.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
        plugins=[CheckedCheckpoints()],
        **options,
    )


def _fit(trainer: Trainer, module: LightningModule, data: ResumedDataModule, checkpoint: Path) -> None:
    """Trains, from the checkpoint if there is one. Raises UserError, naming the file, if it can't be taken up."""
    # The loader is resumable: the data module keeps its place (see there why).
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is the same on all ranks
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    if checkpoint.is_file():
        _check_checkpoint(checkpoint, module, max(2, len(data.loader) * trainer.max_epochs))
    try:
        with signals.training():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    except SIGTERMException as error:
        raise Terminated from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    finally:
        data.loader.release()


def _check_checkpoint(path: Path, module: LightningModule, steps: int) -> None:
    """Raises UserError unless the file is a checkpoint of a module with these shapes, and of a training of so many steps, if a schedule goes by them."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or no checkpoint ({reason}); delete it to train from the start") from error
    state = held.get("state_dict") if isinstance(held, dict) and "pytorch-lightning_version" in held else None
    expected = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    if state is None or {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)} != expected:
        raise UserError(f"{path}: not a checkpoint of this training; delete it to train from the start")
    if problem := checksum_problem(held):
        raise UserError(f"{path}: damaged ({problem}); delete it to train from the start")
    for schedule in held.get("lr_schedulers", []):
        if schedule["total_steps"] != steps:
            raise UserError(
                f"{path}: of a training of {schedule['total_steps']:,} steps, which has {steps:,} with this many processes; start as many as it began with, "
                "or delete it to train from the start"
            )


def block_bytes(info: PatternInfo, fields: list[str], windows: int) -> int:
    """What so many windows take on a device, with these fields."""
    shapes = [info.field(name, windows * info.seq_len) for name in fields]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def keep_bytes(info: PatternInfo, fields: list[str], block_windows: int, device: torch.device, needed: int) -> int:
    """Device memory in which blocks, of so many windows for this rank, can stay, where a training needs so many bytes for other things: nine tenths of
    all, less what is used."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return room_for_blocks(info, fields, block_windows, free + unused, total, needed)


def room_for_blocks(info: PatternInfo, fields: list[str], block_windows: int, free: int, total: int, needed: int) -> int:
    """What is left for blocks that stay, of `free` bytes of a device's `total`: three blocks are on their way, and a tenth stays free."""
    return max(0, free - BLOCKS_IN_FLIGHT * block_bytes(info, fields, block_windows) - needed - total // 10)


def windows_in_block(cfg: CollectConfig, info: PatternInfo) -> int:
    """Windows that one step of clustering or predictor training takes, over all ranks."""
    return max(1, cfg.block_tokens // info.seq_len)


def _loader(
    cfg: Config, source: PatternSource, module: ClusteringModule | PredictorModule, device: torch.device, batch_tokens: int | None = None
) -> BlockLoader:
    block_windows, fields = windows_in_block(cfg.collect, source.info), module.fields()
    kept = keep_bytes(source.info, fields, math.ceil(block_windows / distributed.world_size()), device, module.working_bytes())
    return BlockLoader(source, fields, block_windows, cfg.seed, batch_tokens, device, kept, in_order=module.in_order)


@dataclass(frozen=True)
class Watched:
    """What trainings are watched on: held-out windows int64 [n, seq_len] (n may be 0), and how to run the model on them."""

    windows: torch.Tensor
    collector: Collector
    seed: int

    def evaluator(self, codebook: Codebook, predictor: Predictor | None = None) -> Evaluator:
        collector = self.collector
        return Evaluator(collector.model, codebook, predictor, self.windows, collector.device, collector.batch_windows, self.seed)


def train_codebook(cfg: Config, source: PatternSource, run: RunFolder, tracking: Tracking, watched: Watched, facts: dict) -> Codebook:
    """The run's codebook: read if it is there, else clustered (going on from the last checkpoint) and saved.

    facts: what its provenance says of model and text. Raises UserError if the codebook there was made from other patterns.
    """
    if run.codebook.is_file():
        codebook = Codebook.load(run.codebook)
        check_patterns(run.codebook, codebook, source.info.identity)
        return codebook
    made = provenance() | facts | {"patterns": source.info.identity, "cluster": asdict(cfg.cluster), "seed": cfg.seed}
    codebook, history = _cluster(cfg, source, run, tracking, watched, made)
    gc.collect()  # trainer and module hold each other, and the module gigabytes of sums on the device
    if distributed.is_main():
        sizes = {site: book.sizes.tolist() for site, book in codebook.sites.items()}
        write_json(run.history("cluster"), {"history": history, "sizes": sizes})
        codebook.save(run.codebook)
        tracking.artifact("codebook", "codebook", run.codebook)
    distributed.barrier()
    return codebook


def _cluster(cfg: Config, source: PatternSource, run: RunFolder, tracking: Tracking, watched: Watched, made: dict) -> tuple[Codebook, list[dict]]:
    """The codebook, with the provenance `made`, and the module's history."""
    device = watched.collector.device
    with device:  # gigabytes of buffers come into being where they are used
        module = ALGORITHMS[cfg.cluster.algorithm](cfg.cluster, source.info, cfg.seed)
    callbacks: list[Callback] = [ResumePoint(run.checkpoint("cluster"), cfg.trainer.checkpoint_every_n_steps)]
    if len(watched.windows):
        callbacks.append(
            ArmsOnHeldOut(
                "cluster", ["oracle"], lambda module: watched.evaluator(Codebook.from_clustering(module, {})), cfg.monitor.every, cfg.cluster.max_epochs
            )
        )
    strategy = SumsOnDevices() if distributed.world_size() > 1 else SumsOnDevice(device)
    trainer = make_trainer(cfg, device, tracking, run, cfg.cluster.max_epochs, callbacks, strategy=strategy)
    loader = _loader(cfg, source, module, device)
    _fit(trainer, module, PatternDataModule(source, loader), run.checkpoint("cluster"))
    return Codebook.from_clustering(module, made), module.history


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it a gradient is the same to the bit each time, on one GPU and in one process; an operation that can't be is an error."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks of cuBLAS for it
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with warnings in place of errors, attention's gradient would not be deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def check_patterns(path: Path, codebook: Codebook, identity: dict) -> None:
    """Raises UserError if a codebook was made from patterns of another identity."""
    made_from = codebook.provenance.get("patterns", {})
    differing = [key for key in identity if made_from.get(key) != identity[key]]
    if differing:
        meaning = {"weights": "model weights", "text": "fit text or windows"}
        names = ", ".join(meaning.get(key, key) for key in differing)
        raise UserError(f"{path}: made from other patterns ({names} differ); choose another run.name, or give what it was made from")


def take_codebook(checkpoint: str, run: RunFolder, identity: dict) -> None:
    """Puts another run's codebook into this run's folder. Raises UserError if there is none, or it was made from other patterns."""
    taken = load_run(checkpoint).folder.codebook
    if not taken.is_file():
        raise UserError(f"checkpoint={checkpoint}: holds no codebook; run stage=cluster there first")
    codebook = Codebook.load(taken)
    check_patterns(taken, codebook, identity)
    if distributed.is_main() and not run.codebook.is_file():
        codebook.save(run.codebook)
    distributed.barrier()


def train_predictor(
    cfg: Config, source: PatternSource, codebook: Codebook, windows: torch.Tensor, run: RunFolder, tracking: Tracking, watched: Watched,
    monitor: Block | None,
) -> Predictor:  # fmt: skip
    """The run's predictor: read if it is there, else trained (going on from the last checkpoint) and saved.

    source: with FFN inputs; windows: int64 [n, seq_len], those of the fit text; monitor: a block of held-out rows that its figures are measured on.
    """
    if run.predictor.is_file():
        return Predictor.load(run.predictor)
    device = watched.collector.device
    module = PredictorModule(cfg.predictor, codebook, source.info, monitor, cfg.seed, cfg.trainer.log_every_n_steps, watched.collector.ffns)
    callbacks: list[Callback] = [ResumePoint(run.checkpoint("predictor"), cfg.trainer.checkpoint_every_n_steps)]
    if len(watched.windows):
        arms = ["predicted", "soft"] if cfg.predictor.form == "cluster" else ["neuron-predictor"]
        callbacks.append(
            ArmsOnHeldOut("predictor", arms, lambda module: watched.evaluator(codebook, module.predictor), cfg.monitor.every, cfg.predictor.max_epochs)
        )
    strategy = DDPStrategy() if distributed.world_size() > 1 else "auto"
    trainer = make_trainer(cfg, device, tracking, run, cfg.predictor.max_epochs, callbacks, strategy=strategy, precision=cfg.trainer.precision)
    loader = _loader(cfg, source, module, device, cfg.predictor.batch)
    with deterministic(device):
        _fit(trainer, module, PatternDataModule(source, loader), run.checkpoint("predictor"))
    predictor = _with_thresholds(cfg, codebook, module.trained(provenance() | {"codebook": codebook.provenance}), windows, watched.collector)
    if distributed.is_main():
        write_json(run.history("predictor"), {"history": module.history, "per_layer": module.figures})
        predictor.save(run.predictor)
        tracking.artifact("predictor", "predictor", run.predictor)
    distributed.barrier()
    return predictor


def _with_thresholds(cfg: Config, codebook: Codebook, predictor: Predictor, windows: torch.Tensor, collector: Collector) -> Predictor:
    """The predictor itself, which has its thresholds if it scores neuron by neuron; on the host."""
    if predictor.form != "cluster" and list(codebook.sites) == ["neuron"] and codebook.ones == "fixed":
        sample = windows[calibration_windows(len(windows), cfg.collect.calibration_windows)]
        predictor.thresholds = find_thresholds(collector.model, collector.ffns, codebook, predictor, sample, collector.batch_windows)
    return predictor.cpu()


def tune(
    cfg: Config, codebook: Codebook, predictor: Predictor | None, windows: torch.Tensor, run: RunFolder, tracking: Tracking, watched: Watched
) -> tuple[Codebook, Predictor | None]:
    """The run's tuned codebook and predictor: read if they are there, else tuned (going on from the last checkpoint) and saved. A predictor that the
    tuned arm does not use is given back as None: it is of the codebook before.

    windows: int64 [n, seq_len], those of the fit text.
    """
    if run.tuned("codebook").is_file():
        found = load_run(run.path)
        return found.codebook, found.predictor
    device, model = watched.collector.device, watched.collector.model
    sample = windows[torch.linspace(0, len(windows) - 1, min(cfg.tune.budget_windows, len(windows))).round().long()]
    module = TuningModule(cfg.tune, model, watched.collector.ffns, codebook, predictor, sample, cfg.seed)
    # A step is seconds of work, and a checkpoint gigabytes.
    callbacks: list[Callback] = [ResumePoint(run.checkpoint("tune"), cfg.trainer.checkpoint_every_n_steps)]
    if len(watched.windows):
        callbacks.append(ArmsOnHeldOut("tune", [cfg.tune.arm], lambda module: watched.evaluator(*module.tuned({})), cfg.monitor.every, cfg.tune.max_epochs))
    precision = cfg.tune.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    strategy = DDPStrategy() if distributed.world_size() > 1 else "auto"
    trainer = make_trainer(cfg, device, tracking, run, cfg.tune.max_epochs, callbacks, strategy=strategy, precision=precision, gradient_clip_val=1.0)
    data = ResumedDataModule(WindowLoader(windows, cfg.tune.windows, cfg.seed))
    with deterministic(device):
        _fit(trainer, module, data, run.checkpoint("tune"))
    codebook, predictor = module.tuned(codebook.provenance)
    if predictor is not None:
        predictor = _with_thresholds(cfg, codebook, predictor, windows, watched.collector)
    if distributed.is_main():
        write_json(run.history("tune"), {"history": module.history, "budget": codebook.budget})
        if predictor is not None:
            predictor.save(run.tuned("predictor"))
        codebook.save(run.tuned("codebook"))
        tracking.artifact("tuned", "codebook", run.tuned("codebook"))
    distributed.barrier()
    return codebook, predictor
