"""The trainings of a run: clustering to a codebook, the predictor, tuning. Each resumes from its checkpoint."""

import gc
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from apc.cluster.algorithms import ALGORITHMS
from apc.cluster.codebook import Codebook
from apc.cluster.lloyd import ClusteringModule
from apc.collect.collect import calibration_windows
from apc.collect.loader import BlockLoader, PatternDataModule, ResumedDataModule, WindowLoader
from apc.collect.memory import keep_bytes, windows_in_block
from apc.collect.patterns import PatternSource
from apc.config.schema import Config
from apc.evaluate.evaluator import Evaluator
from apc.predict.module import PredictorModule
from apc.predict.predictor import Predictor
from apc.run.callbacks import MonitorPolicies, ResumePoint
from apc.run.context import HeldOutMonitor, RunContext
from apc.run.folder import RunFolder, load_run, provenance, write_json
from apc.run.trainer import SumsOnDevice, SumsOnDevices, deterministic, fit, make_trainer
from apc.sparse.policies import POLICIES
from apc.tune.module import TuningModule
from apc.tune.thresholds import find_thresholds
from apc.utils import distributed
from apc.utils.errors import UserError

BUDGET_WINDOWS = 16  # windows of the fit text for measuring the cost of dropping neurons


def train_codebook(context: RunContext, source: PatternSource, monitor: HeldOutMonitor, facts: dict) -> Codebook:
    """The run's codebook: loaded if the file exists, else clustered and saved.

    facts: model and text, for the codebook's provenance. Raises UserError if the file was made from other patterns.
    """
    cfg, run = context.cfg, context.run
    if run.codebook.is_file():
        codebook = Codebook.load(run.codebook)
        check_patterns(run.codebook, codebook, source.info.identity)
        return codebook
    made = provenance() | facts | {"patterns": source.info.identity, "cluster": asdict(cfg.cluster), "seed": cfg.seed}
    codebook, history = _cluster(context, source, monitor, made)
    gc.collect()  # trainer and module refer to each other, and the module has gigabytes of sums on the device
    if distributed.is_main():
        sizes = {site: book.sizes.tolist() for site, book in codebook.sites.items()}
        write_json(run.history("cluster"), {"history": history, "sizes": sizes})
        codebook.save(run.codebook)
        context.tracking.artifact("codebook", "codebook", run.codebook)
        _drop_checkpoint(context, "cluster")
    distributed.barrier()
    return codebook


def _cluster(
    context: RunContext, source: PatternSource, monitor: HeldOutMonitor, made: dict
) -> tuple[Codebook, list[dict]]:
    """The codebook with the provenance `made`, and the clustering's history."""
    cfg, device = context.cfg, context.device
    with device:  # allocates the gigabytes of buffers where they are used
        module = ALGORITHMS[cfg.cluster.algorithm](cfg.cluster, source.info, cfg.seed)

    def evaluator_of(module: LightningModule) -> Evaluator:
        return monitor.evaluator(cast(ClusteringModule, module).codebook({}))

    callbacks = _callbacks(context, "cluster", ["oracle"], monitor, evaluator_of)
    strategy = SumsOnDevices() if distributed.world_size() > 1 else SumsOnDevice(device)
    trainer = make_trainer(context, "cluster", cfg.cluster.max_epochs, callbacks, strategy=strategy)
    _fit_on_blocks(context, trainer, module, source, "cluster")
    return module.codebook(made), module.history


def _callbacks(
    context: RunContext,
    stage: str,
    policies: list[str],
    monitor: HeldOutMonitor,
    evaluator_of: Callable[[LightningModule], Evaluator],
) -> list[Callback]:
    """The checkpoint, and the measurement of policies on held-out text if there is any."""
    cfg = context.cfg
    callbacks: list[Callback] = [ResumePoint(context.run.checkpoint(stage), cfg.trainer.checkpoint_every_n_steps)]
    if len(monitor.windows):
        epochs = {
            "cluster": cfg.cluster.max_epochs,
            "predictor": cfg.predictor.max_epochs,
            "tune": cfg.tune.max_epochs,
        }
        callbacks.append(MonitorPolicies(stage, policies, evaluator_of, cfg.monitor.every, last=epochs[stage]))
    return callbacks


def _fit_on_blocks(
    context: RunContext,
    trainer: Trainer,
    module: ClusteringModule | PredictorModule,
    source: PatternSource,
    stage: str,
    batch_tokens: int | None = None,
) -> None:
    """Trains on blocks of patterns, or on mini-batches of `batch_tokens` tokens of them."""
    cfg, info, fields = context.cfg, source.info, module.fields()
    block_windows = windows_in_block(cfg.collect, info)
    rank_windows = math.ceil(block_windows / distributed.world_size())
    kept = keep_bytes(info, fields, rank_windows, context.device, module.working_bytes())
    loader = BlockLoader(
        source, fields, block_windows, cfg.seed, batch_tokens, context.device, kept, in_order=module.in_order
    )
    fit(trainer, module, PatternDataModule(source, loader), context.run.checkpoint(stage))


def _drop_checkpoint(context: RunContext, stage: str) -> None:
    """Deletes the checkpoint of a finished training, unless trainer.keep_checkpoints is set."""
    if not context.cfg.trainer.keep_checkpoints:
        context.run.checkpoint(stage).unlink(missing_ok=True)


def check_patterns(path: Path, codebook: Codebook, identity: dict) -> None:
    """Raises UserError if the codebook was made from patterns of another identity."""
    made_from = codebook.provenance.get("patterns", {})
    differing = [key for key in identity if made_from.get(key) != identity[key]]
    if differing:
        meaning = {"weights": "model weights", "text": "fit text or windows"}
        names = ", ".join(meaning.get(key, key) for key in differing)
        raise UserError(
            f"{path}: made from other patterns ({names} differ); choose another run.name, "
            "or use the model and text that it was made from"
        )


def import_codebook(checkpoint: str, run: RunFolder, identity: dict) -> None:
    """Copies another run's codebook into this run's folder.

    Raises UserError if there is none, or it was made from other patterns.
    """
    path = load_run(checkpoint).folder.codebook
    if not path.is_file():
        raise UserError(f"checkpoint={checkpoint}: has no codebook; run stage=cluster there first")
    codebook = Codebook.load(path)
    check_patterns(path, codebook, identity)
    if distributed.is_main() and not run.codebook.is_file():
        codebook.save(run.codebook)
    distributed.barrier()


def train_predictor(
    context: RunContext, source: PatternSource, codebook: Codebook, windows: Tensor, monitor: HeldOutMonitor
) -> Predictor:
    """The run's predictor: loaded if the file exists, else trained and saved.

    source: with FFN inputs; windows: of the fit text, int64 [n, seq_len].
    """
    cfg, run, device = context.cfg, context.run, context.device
    if run.predictor.is_file():
        return Predictor.load(run.predictor)
    module = PredictorModule(
        cfg.predictor,
        codebook,
        source.info,
        monitor.rows,
        cfg.seed,
        cfg.trainer.log_every_n_steps,
        monitor.collector.ffns,
    )
    policies = [name for name, policy in POLICIES.items() if policy.monitored and cfg.predictor.form in policy.forms]

    def evaluator_of(module: LightningModule) -> Evaluator:
        return monitor.evaluator(codebook, cast(PredictorModule, module).predictor)

    callbacks = _callbacks(context, "predictor", policies, monitor, evaluator_of)
    options: dict[str, Any] = {"strategy": _gradient_strategy(), "precision": cfg.trainer.precision}
    trainer = make_trainer(context, "predict", cfg.predictor.max_epochs, callbacks, **options)
    with deterministic(device):
        _fit_on_blocks(context, trainer, module, source, "predictor", cfg.predictor.batch_tokens)
    trained = module.trained(provenance() | {"codebook": codebook.provenance})
    predictor = _with_thresholds(cfg, codebook, trained, windows, monitor)
    if distributed.is_main():
        write_json(run.history("predictor"), {"history": module.history, "per_layer": module.figures})
        predictor.save(run.predictor)
        context.tracking.artifact("predictor", "predictor", run.predictor)
        _drop_checkpoint(context, "predictor")
    distributed.barrier()
    return predictor


def _gradient_strategy() -> DDPStrategy | str:
    return DDPStrategy() if distributed.world_size() > 1 else "auto"


def _with_thresholds(
    cfg: Config, codebook: Codebook, predictor: Predictor, windows: Tensor, monitor: HeldOutMonitor
) -> Predictor:
    """The predictor on the host, with thresholds if it scores single neurons and masks have a fixed size."""
    if predictor.form != "cluster" and list(codebook.sites) == ["neuron"] and codebook.centroid_size == "fixed":
        sample = windows[calibration_windows(len(windows), cfg.collect.calibration_windows)]
        collector = monitor.collector
        predictor.thresholds = find_thresholds(
            collector.model, collector.ffns, codebook, predictor, sample, collector.batch_windows
        )
    return predictor.cpu()


def tune(
    context: RunContext, codebook: Codebook, predictor: Predictor | None, windows: Tensor, monitor: HeldOutMonitor
) -> tuple[Codebook, Predictor | None]:
    """The run's tuned codebook and predictor: loaded if the files exist, else tuned and saved.

    windows: of the fit text, int64 [n, seq_len]. The predictor is None if the tuned policy does not use it: the old one
    belongs to the codebook before tuning.
    """
    cfg, run, device = context.cfg, context.run, context.device
    if run.tuned("codebook").is_file():
        path = run.tuned("predictor")
        return Codebook.load(run.tuned("codebook")), Predictor.load(path) if path.is_file() else None
    sample = windows[torch.linspace(0, len(windows) - 1, min(BUDGET_WINDOWS, len(windows))).round().long()]
    module = TuningModule(cfg.tune, context.model, monitor.collector.ffns, codebook, predictor, sample, cfg.seed)

    def evaluator_of(module: LightningModule) -> Evaluator:
        return monitor.evaluator(*cast(TuningModule, module).tuned({}))

    callbacks = _callbacks(context, "tune", [cfg.tune.policy], monitor, evaluator_of)
    precision = cfg.tune.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    options: dict[str, Any] = {"strategy": _gradient_strategy(), "precision": precision, "gradient_clip_val": 1.0}
    trainer = make_trainer(context, "tune", cfg.tune.max_epochs, callbacks, **options)
    data = ResumedDataModule(WindowLoader(windows, cfg.tune.batch_windows, cfg.seed))
    with deterministic(device):
        fit(trainer, module, data, run.checkpoint("tune"))
    codebook, predictor = module.tuned(codebook.provenance)
    if predictor is not None:
        predictor = _with_thresholds(cfg, codebook, predictor, windows, monitor)
    if distributed.is_main():
        write_json(run.history("tune"), {"history": module.history, "budget": codebook.budget})
        if predictor is not None:
            predictor.save(run.tuned("predictor"))
        codebook.save(run.tuned("codebook"))
        context.tracking.artifact("tuned", "codebook", run.tuned("codebook"))
        _drop_checkpoint(context, "tune")
    distributed.barrier()
    return codebook, predictor
