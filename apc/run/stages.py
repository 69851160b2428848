"""The trainings of a run: clustering to a codebook, the predictor, tuning. Each resumes from its checkpoint."""

import gc
import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from apc.cluster.algorithms import ALGORITHMS
from apc.cluster.codebook import Codebook
from apc.cluster.lloyd import ClusteringModule
from apc.collect.collect import calibration_windows
from apc.collect.loader import BlockLoader, PatternDataModule, ResumedDataModule, WindowLoader
from apc.collect.memory import keep_bytes, windows_in_block
from apc.collect.patterns import PatternSource
from apc.config.schema import Config
from apc.data.models import load_model
from apc.data.quantise import mean_bits
from apc.data.text import Windows
from apc.predict.module import PredictorModule
from apc.predict.predictor import CORRECTION, Predictor, PredictorHeader
from apc.run.context import HeldOutMonitor, RunContext
from apc.run.folder import RunFolder, load_run, provenance, write_json
from apc.run.trainer import SumsOnDevice, SumsOnDevices, differing, fit, make_trainer
from apc.sparse.policies import POLICIES, calibrated_policies, total_bytes
from apc.tune.calibrate import SamplePass, find_input_thresholds, find_thresholds
from apc.tune.module import TuningModule
from apc.utils import distributed
from apc.utils.determinism import deterministic
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
        _drop_checkpoint(context, "cluster")
        return codebook
    made = provenance() | facts | {"patterns": source.info.identity, "cluster": asdict(cfg.cluster), "seed": cfg.seed}
    codebook, history = _cluster(context, source, monitor, made)
    gc.collect()  # trainer and module refer to each other, and the module has gigabytes of sums on the device
    sizes = {site: book.sizes.tolist() for site, book in codebook.sites.items()}
    record = {"history": history, "sizes": sizes}
    _save(context, "cluster", record, {run.codebook: codebook}, "codebook", "codebook")
    return codebook


def _cluster(
    context: RunContext, source: PatternSource, monitor: HeldOutMonitor, made: dict
) -> tuple[Codebook, list[dict]]:
    """The codebook with the provenance `made`, and the clustering's history."""
    cfg, device = context.cfg, context.device
    with device:  # allocates the gigabytes of buffers where they are used
        module = ALGORITHMS[cfg.cluster.algorithm](cfg.cluster, source.info, cfg.seed)
    strategy = SumsOnDevices() if distributed.world_size() > 1 else SumsOnDevice(device)
    evaluator = lambda: monitor.evaluator(module.codebook({}))
    trainer = make_trainer(context, "cluster", monitor, ["oracle"], evaluator, source.info.identity, strategy)
    _fit_on_blocks(context, trainer, module, source, "cluster", source.info.identity)
    return module.codebook(made), module.history


def _fit_on_blocks(
    context: RunContext,
    trainer: Trainer,
    module: ClusteringModule | PredictorModule,
    source: PatternSource,
    stage: str,
    made_from: dict,
    batch_tokens: int | None = None,
) -> None:
    """Trains on blocks of patterns, or on mini-batches of `batch_tokens` tokens of them."""
    cfg, info, fields = context.cfg, source.info, module.fields()
    block_windows = windows_in_block(cfg.collect, info)
    rank_windows = math.ceil(block_windows / distributed.world_size())
    kept = keep_bytes(info, fields, rank_windows, context.device, module.working_bytes())
    in_order, device = module.in_order, context.device
    loader = BlockLoader(source, fields, block_windows, cfg.seed, batch_tokens, device, kept, in_order=in_order)
    fit(trainer, module, PatternDataModule(source, loader), context.run.checkpoint(stage), made_from)


def _save(
    context: RunContext, stage: str, record: dict, files: dict[Path, Codebook | Predictor], name: str, kind: str
) -> None:
    """On rank 0, saves a finished training and deletes its checkpoint, unless trainer.keep_checkpoints is set.

    record: content of the stage's JSON file; name, kind: of the W&B artifact that stores the last of `files`.
    """
    if distributed.is_main():
        write_json(context.run.history(stage), record | {"gpu_bytes": context.gpu_bytes()})
        for path, made in files.items():
            made.save(path)
        context.tracking.artifact(name, kind, list(files)[-1])
        _drop_checkpoint(context, stage)
    distributed.barrier()


def _drop_checkpoint(context: RunContext, stage: str) -> None:
    """Deletes the checkpoint of a training whose result is saved, unless trainer.keep_checkpoints is set."""
    if distributed.is_main() and not context.cfg.trainer.keep_checkpoints:
        context.run.checkpoint(stage).unlink(missing_ok=True)


def check_patterns(path: Path, codebook: Codebook, identity: dict) -> None:
    """Raises UserError if the codebook was made from patterns of another identity."""
    if names := differing(codebook.provenance.get("patterns", {}), identity):
        raise UserError(
            f"{path}: made from other patterns ({names} differ); choose another run.name, "
            "or use the model and text that it was made from"
        )


def _digest(provenance: dict) -> str:
    """A digest of a codebook's or predictor's provenance; the same whether it was just made or read from its file."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def _check_source(path: Path, made_from: dict, needed: dict, source: str) -> None:
    """Raises UserError unless both provenances are equal.

    made_from: provenance of the input that the file at `path` was made from; needed: that of this run's input; source:
    what the input is, for the message.
    """
    if made_from != needed:
        raise UserError(f"{path}: made from another {source}; delete it to make it again, or choose another run.name")


def import_codebook(checkpoint: str, run: RunFolder, identity: dict) -> None:
    """Copies another run's codebook into this run's folder.

    Raises UserError if that run has no codebook, or one made from other patterns.
    """
    path = load_run(checkpoint).folder.codebook
    if not path.is_file():
        raise UserError(f"checkpoint={checkpoint}: has no codebook; run stage=cluster there first")
    codebook = Codebook.load(path)
    check_patterns(path, codebook, identity)
    if distributed.is_main() and not run.codebook.is_file():
        codebook.without_calibrated().save(run.codebook)
    distributed.barrier()


def train_predictor(
    context: RunContext, source: PatternSource, codebook: Codebook, windows: Tensor, monitor: HeldOutMonitor
) -> Predictor:
    """The run's predictor: loaded if the file exists, else trained and saved.

    source: with FFN inputs; windows: of the fit text, int64 [n, seq_len].
    """
    cfg, run, device = context.cfg, context.run, context.device
    if run.predictor.is_file():
        predictor = Predictor.load(run.predictor)
        _check_source(run.predictor, predictor.provenance.get("codebook", {}), codebook.provenance, "codebook")
        _drop_checkpoint(context, "predictor")
        return predictor
    every, ffns = cfg.trainer.log_every_n_steps, monitor.collector.ffns
    module = PredictorModule(cfg.predictor, codebook, source.info, monitor.rows, cfg.seed, every, ffns)
    _choose_inputs(cfg, codebook, module.predictor, windows, monitor, masked=False)
    policies = [name for name, policy in POLICIES.items() if policy.monitored and cfg.predictor.form in policy.forms]
    evaluator = lambda: monitor.evaluator(codebook, module.predictor)
    precision = cfg.trainer.precision
    made_from = {"codebook": _digest(codebook.provenance)}
    trainer = make_trainer(context, "predictor", monitor, policies, evaluator, made_from, precision=precision)
    with deterministic(device):
        _fit_on_blocks(context, trainer, module, source, "predictor", made_from, cfg.predictor.batch_tokens)
    trained = module.trained(provenance() | {"codebook": codebook.provenance})
    predictor = _with_thresholds(cfg, codebook, trained, windows, monitor)
    record = {"history": module.history, "per_layer": module.figures}
    _save(context, "predictor", record, {run.predictor: predictor}, "predictor", "predictor")
    return predictor


def _choose_inputs(
    cfg: Config, codebook: Codebook, predictor: Predictor, windows: Tensor, monitor: HeldOutMonitor, masked: bool
) -> None:
    """Sets the thresholds of a low-bit copy's inputs, if it is not read at all of them."""
    low_bit = predictor.low_bit
    if low_bit is not None and low_bit.input_thresholds is not None:
        found = find_input_thresholds(_sample_pass(cfg, codebook, predictor, windows, monitor), low_bit.inputs, masked)
        low_bit.input_thresholds.copy_(found)


def _with_thresholds(
    cfg: Config, codebook: Codebook, predictor: Predictor, windows: Tensor, monitor: HeldOutMonitor
) -> Predictor:
    """The predictor on the host, with thresholds if it scores single neurons and masks have a fixed size."""
    _choose_inputs(cfg, codebook, predictor, windows, monitor, masked=True)
    if (
        predictor.form in ("neuron", "low-bit")
        and list(codebook.sites) == ["neuron"]
        and codebook.centroid_size == "fixed"
    ):
        predictor.thresholds = find_thresholds(_sample_pass(cfg, codebook, predictor, windows, monitor))
    return predictor.cpu()


def _sample_pass(
    cfg: Config, codebook: Codebook, predictor: Predictor | None, windows: Tensor, monitor: HeldOutMonitor
) -> SamplePass:
    """A pass over `collect.calibration_windows` of the fit text's windows, int64 [n, seq_len]."""
    sample, run = windows[calibration_windows(len(windows), cfg.collect.calibration_windows)], monitor.collector
    return SamplePass(run.model, run.ffns, codebook, predictor, sample, run.batch_windows, cfg.stages, cfg.seed)


def tune(
    context: RunContext, codebook: Codebook, predictor: Predictor | None, text: Windows, monitor: HeldOutMonitor
) -> tuple[Codebook, Predictor | None]:
    """The run's tuned codebook and predictor: loaded if the files exist, else tuned and saved.

    text: the fit text. The predictor is None if the tuned policy uses none, because the untuned predictor does not fit
    the tuned codebook.
    """
    cfg, run, device, windows = context.cfg, context.run, context.device, text.tokens
    if run.tuned("codebook").is_file():
        tuned = _load_tuned(run, codebook, predictor)
        _drop_checkpoint(context, "tune")
        return tuned
    sample = windows[torch.linspace(0, len(windows) - 1, min(BUDGET_WINDOWS, len(windows))).round().long()]
    if POLICIES[cfg.tune.policy].corrected and cfg.tune.correction:
        predictor = untrained_correction(cfg, codebook)
    parts = context.model, monitor.collector.ffns, codebook, predictor, sample
    teacher = None if cfg.model.ffn_bits is None else load_model(replace(cfg.model, ffn_bits=None), device)[0]
    module = TuningModule(cfg.tune, *parts, cfg.seed, total_bytes(cfg, mean_bits(monitor.collector.ffns)), teacher)
    precision = cfg.tune.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    policies = [cfg.tune.policy]
    evaluator = lambda: monitor.evaluator(*module.tuned({}))
    made_from = {"codebook": _digest(codebook.provenance)}
    made_from |= {} if predictor is None else {"predictor": _digest(predictor.provenance)}
    options: dict = dict(precision=precision, gradient_clip_val=1.0)
    trainer = make_trainer(context, "tune", monitor, policies, evaluator, made_from, **options)
    data = ResumedDataModule(WindowLoader(windows, cfg.tune.batch_windows, cfg.seed, text.bos is not None))
    with deterministic(device):
        fit(trainer, module, data, run.checkpoint("tune"), made_from)
    codebook, predictor = module.tuned(codebook.provenance)
    files: dict[Path, Codebook | Predictor] = {}
    if predictor is not None:
        predictor = files[run.tuned("predictor")] = _with_thresholds(cfg, codebook, predictor, windows, monitor)
    files[run.tuned("codebook")] = codebook
    record = {"history": module.history, "budget": codebook.budget}
    _save(context, "tune", record, files, "tuned", "codebook")
    return codebook, predictor


def untrained_correction(cfg: Config, codebook: Codebook) -> Predictor:
    """A predictor that only corrects outputs, as tuning starts from it."""
    shape = codebook.layers, codebook.hidden_size, cfg.predictor.bottleneck
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        header = PredictorHeader(*shape, dict(codebook.widths), CORRECTION, corrects=True)
        return Predictor(header, {"codebook": codebook.provenance})


def _load_tuned(run: RunFolder, codebook: Codebook, predictor: Predictor | None) -> tuple[Codebook, Predictor | None]:
    """The run's tuned codebook and predictor. Raises UserError unless they were tuned from these two."""
    path, tuned = run.tuned("codebook"), Codebook.load(run.tuned("codebook"))
    _check_source(path, _without(tuned.provenance, "tune"), codebook.provenance, "codebook")
    path = run.tuned("predictor")
    if not path.is_file():
        return tuned, None
    tuned_predictor = Predictor.load(path)
    _check_source(path, tuned_predictor.provenance.get("codebook", {}), tuned.provenance, "codebook")
    if predictor is not None:
        own, old = (_without(part.provenance, "tune", "codebook") for part in (tuned_predictor, predictor))
        _check_source(path, own, old, "predictor")
    return tuned, tuned_predictor


def calibrate(
    context: RunContext, codebook: Codebook, predictor: Predictor | None, windows: Tensor, monitor: HeldOutMonitor
) -> Codebook:
    """The codebook with what the run's `calibrated` policies take from fit text, which its file gets if it lacks it.

    windows: of the fit text, int64 [n, seq_len]. Policies that can't run are left out.
    """
    cfg, run = context.cfg, context.run
    path = run.tuned("codebook") if cfg.tune.max_epochs else run.codebook
    fit = _sample_pass(cfg, codebook, predictor, windows, monitor)
    for name in calibrated_policies(cfg):
        policy, facts = POLICIES[name], dict[str, object](bytes=total_bytes(cfg))
        if policy.staged:
            facts |= {"stages": asdict(cfg.stages)}
        if policy.forms and predictor is not None:
            facts |= {"predictor": _digest(predictor.provenance)}
        if policy.unsupported(codebook, predictor) or codebook.calibration.get(name) == facts:
            continue
        found = policy.calibrate(fit, total_bytes(cfg, mean_bits(monitor.collector.ffns)))
        tensors = {part: value.cpu() for part, value in found.items()}
        codebook = codebook.with_calibrated(name, tensors, facts)
        if distributed.is_main():
            codebook.save(path)
        distributed.barrier()
    return codebook


def _without(provenance: dict, *keys: str) -> dict:
    return {key: value for key, value in provenance.items() if key not in keys}
