"""Runs the two trainings of a run, each from where it was left: clustering to a codebook, then the predictor."""

import warnings
from dataclasses import asdict
from functools import partial

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.strategies import DDPStrategy

from apc import distributed
from apc.activations import Collector
from apc.callbacks import OracleOnHeldOut, ResumePoint
from apc.clustering import ClusteringModule
from apc.codebook import Codebook
from apc.config import Config
from apc.datamodule import BlockLoader, PatternDataModule
from apc.errors import UserError
from apc.evaluation import Evaluator
from apc.models import GatedFFN
from apc.patterns import Block, PatternSource
from apc.predictor import Predictor, PredictorModule
from apc.runs import RunFolder, load_run, provenance, write_json
from apc.sparse_model import check_fits
from apc.tracking import Tracking


class SumsOnlyStrategy(DDPStrategy):
    """For a module without trainable parameters, which DistributedDataParallel refuses to wrap: it exchanges its sums itself."""

    def configure_ddp(self) -> None:
        pass


def make_trainer(cfg: Config, device: torch.device, tracking: Tracking, run: RunFolder, max_epochs: int, callbacks: list[Callback], strategy) -> Trainer:
    world = distributed.world_size()
    shown = [TQDMProgressBar(refresh_rate=10)] if cfg.trainer.progress else []
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" and world == 1 else max(1, world // cfg.trainer.num_nodes),
        num_nodes=cfg.trainer.num_nodes,
        strategy=strategy() if world > 1 else "auto",
        precision=cfg.trainer.precision,
        max_epochs=max_epochs,
        max_steps=cfg.trainer.max_steps,
        log_every_n_steps=1,  # the modules choose what they log
        logger=tracking.loggers,
        callbacks=[*callbacks, *shown],
        enable_progress_bar=cfg.trainer.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )


def _fit(trainer: Trainer, module, data: PatternDataModule, checkpoint) -> None:
    """Trains, from the checkpoint if there is one. Raises UserError, naming the file, if it can't be taken up."""
    if checkpoint.is_file():
        try:
            torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{checkpoint}: damaged ({str(error).splitlines()[0]}); delete it to train from the start") from error
        except Exception as error:  # pickle.UnpicklingError: not plain tensors and containers
            raise UserError(f"{checkpoint}: not a checkpoint of this program; delete it to train from the start") from error
    # The loader is resumable: the data module keeps its place (see there why).
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)


def _loader(cfg: Config, source: PatternSource, fields: list[str], device: torch.device, batch_tokens: int | None = None) -> BlockLoader:
    block_windows = max(1, cfg.collect.block_tokens // source.info.seq_len)
    return BlockLoader(source, fields, block_windows, cfg.seed, batch_tokens, pin_memory=device.type == "cuda")


def train_codebook(cfg: Config, source: PatternSource, run: RunFolder, tracking: Tracking, collector: Collector, monitor: torch.Tensor) -> Codebook:
    """The run's codebook: read if it is there, else clustered (going on from the last checkpoint) and saved.

    monitor: int64 [n, seq_len], windows that the oracle arm is watched on.
    """
    if run.codebook.is_file():
        return Codebook.load(run.codebook)
    module = ClusteringModule(cfg.cluster, source.info, cfg.seed)
    callbacks: list[Callback] = [ResumePoint(run.checkpoint("cluster"), cfg.trainer.checkpoint_every_n_steps)]
    if len(monitor):
        evaluator = partial(
            _oracle_evaluator, model=collector.model, windows=monitor, device=collector.device, batch_windows=collector.batch_windows, seed=cfg.seed
        )
        callbacks.append(OracleOnHeldOut(evaluator, cfg.monitor.every))
    trainer = make_trainer(cfg, collector.device, tracking, run, cfg.cluster.max_epochs, callbacks, SumsOnlyStrategy)
    loader = _loader(cfg, source, module.fields(), collector.device)
    _fit(trainer, module.to(collector.device), PatternDataModule(source, loader), run.checkpoint("cluster"))
    codebook = Codebook.from_clustering(module, provenance(cfg) | {"patterns": source.info.identity, "cluster": asdict(cfg.cluster), "seed": cfg.seed})
    if distributed.is_main():
        sizes = {site: module.get("sizes", site).tolist() for site in source.info.widths}
        write_json(run.history("cluster"), {"history": module.history, "sizes": sizes})
        codebook.save(run.codebook)
        tracking.artifact("codebook", "codebook", run.codebook)
    distributed.barrier()
    return codebook


def take_codebook(checkpoint: str, run: RunFolder, ffns: list[GatedFFN], sites: list[str]) -> None:
    """Puts another run's codebook into this run's folder. Raises UserError if there is none, or it is not for this model and these sites."""
    codebook = load_run(checkpoint).codebook
    if codebook is None:
        raise UserError(f"checkpoint={checkpoint}: holds no codebook; run stage=cluster there first")
    if list(codebook.sites) != sites:
        raise UserError(f"checkpoint={checkpoint}: its codebook is for sites {list(codebook.sites)}, this run has sites={sites}")
    check_fits(ffns, codebook, None)
    if distributed.is_main() and not run.codebook.is_file():
        codebook.save(run.codebook)
    distributed.barrier()


def _oracle_evaluator(codebook: Codebook, model, windows, device, batch_windows, seed) -> Evaluator:
    return Evaluator(model, codebook, None, windows, device, batch_windows, seed)


def train_predictor(
    cfg: Config, source: PatternSource, codebook: Codebook, run: RunFolder, tracking: Tracking, device: torch.device, monitor: Block | None
) -> Predictor:
    """The run's predictor: read if it is there, else trained (going on from the last checkpoint) and saved.

    source: with FFN inputs; monitor: a block of held-out rows that its figures are measured on.
    """
    if run.predictor.is_file():
        return Predictor.load(run.predictor)
    module = PredictorModule(cfg.predictor, codebook, source.info, monitor, cfg.seed, cfg.trainer.log_every_n_steps)
    callbacks: list[Callback] = [ResumePoint(run.checkpoint("predictor"), cfg.trainer.checkpoint_every_n_steps)]
    trainer = make_trainer(cfg, device, tracking, run, cfg.predictor.max_epochs, callbacks, DDPStrategy)
    loader = _loader(cfg, source, module.fields(), device, cfg.predictor.batch)
    _fit(trainer, module, PatternDataModule(source, loader), run.checkpoint("predictor"))
    predictor = module.trained(provenance(cfg) | {"codebook": codebook.provenance})
    if distributed.is_main():
        write_json(run.history("predictor"), {"history": module.history, "per_layer": module.figures})
        predictor.save(run.predictor)
        tracking.artifact("predictor", "predictor", run.predictor)
    distributed.barrier()
    return predictor
