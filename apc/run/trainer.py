"""The Lightning Trainer of each training: strategy, checkpoints, determinism."""

import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException

from apc.collect.loader import ResumedDataModule
from apc.evaluate.evaluator import Evaluator
from apc.run.callbacks import (
    MADE_FROM,
    CheckedCheckpoints,
    EndTogether,
    MonitorPolicies,
    ResumePoint,
    TrackingLogger,
    TrainingProgress,
    checksum_problem,
)
from apc.run.context import HeldOutMonitor, RunContext
from apc.utils import distributed, signals
from apc.utils.errors import Terminated, UserError, first_line


class _StaysOnDevice(Strategy):
    """Leaves the module on its device after training. Lightning would copy its gigabytes of sums to the host."""

    def teardown(self) -> None:
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module


class SumsOnDevice(_StaysOnDevice, SingleDeviceStrategy):
    """The strategy of clustering in one process."""


class SumsOnDevices(_StaysOnDevice, DDPStrategy):
    """The strategy of clustering in several processes. The module exchanges its sums itself."""

    def configure_ddp(self) -> None:
        """Wraps nothing: DistributedDataParallel refuses a module without trainable parameters."""


def make_trainer(
    context: RunContext,
    stage: str,
    monitor: HeldOutMonitor,
    policies: list[str],
    evaluator: Callable[[], Evaluator],
    made_from: dict,
    strategy: Strategy | None = None,
    **options: Any,
) -> Trainer:
    """A Lightning Trainer with the settings that all trainings of a run share, and a checkpoint to resume from.

    stage: the training's section of the configuration; policies, evaluator: see `MonitorPolicies`; made_from: see
    `CheckedCheckpoints`; strategy: None selects the strategy for training by gradients; options: further arguments of
    the Trainer.
    """
    cfg, device, world = context.cfg, context.device, distributed.world_size()
    max_epochs = getattr(cfg, stage).max_epochs
    resume_point = ResumePoint(context.run.checkpoint(stage), cfg.trainer.checkpoint_every_n_steps)
    callbacks: list[Callback] = [EndTogether(), resume_point]
    if len(monitor.windows):
        callbacks.append(MonitorPolicies(stage, policies, evaluator, cfg.monitor.every, last=max_epochs))
    if cfg.trainer.progress:
        callbacks.append(TrainingProgress(stage))
    own_device = device.type == "cuda" and world == 1
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if own_device else distributed.local_world_size(),
        num_nodes=world // distributed.local_world_size(),
        strategy=strategy or (DDPStrategy() if world > 1 else "auto"),
        max_epochs=max_epochs,
        max_steps=cfg.trainer.max_steps,
        log_every_n_steps=1,  # the modules choose what they log
        logger=[TrackingLogger(context.tracking)],
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=context.run.path,
        plugins=[CheckedCheckpoints(made_from)],
        **options,
    )


def fit(trainer: Trainer, module: LightningModule, data: ResumedDataModule, checkpoint: Path, made_from: dict) -> None:
    """Trains, from the checkpoint if there is one. Raises UserError, naming the file, if it can't be used.

    made_from: as given to `make_trainer`; a checkpoint of a training on other input can't be used.
    """
    # The loader is resumable: the data module keeps its position (see its comment).
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # all ranks log the same numbers
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    resumed = checkpoint if checkpoint.is_file() else None
    if resumed:
        check_checkpoint(checkpoint, module, max(2, len(data.loader) * (trainer.max_epochs or 1)), made_from)
    try:
        with signals.training():
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except SIGTERMException as error:
        raise Terminated from error
    except SystemExit as error:  # Lightning turns Ctrl-C into this
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    finally:
        data.loader.release()


def differing(made_from: dict, needed: dict) -> str:
    """The names of the entries that differ between two identities of a stage's input, as text; empty if none do."""
    meaning = {"weights": "model weights", "text": "fit text or windows"}
    names = [key for key in needed | made_from if made_from.get(key) != needed.get(key)]
    return ", ".join(meaning.get(key, key) for key in names)


def check_checkpoint(path: Path, module: LightningModule, steps: int, made_from: dict) -> None:
    """Raises UserError unless the file is a whole checkpoint of a module with these shapes, trained on the same input.

    steps: the length of the learning rate's schedule, if there is one; another length is an error too. made_from: see
    `CheckedCheckpoints`. A checkpoint of version 0.1 lacks it, so its input is unknown and it is refused.
    """
    start_again = "delete it to train from the start"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError) as error:
        raise UserError(f"{path}: damaged or no checkpoint ({first_line(error)}); {start_again}") from error
    is_checkpoint = isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint
    state = checkpoint.get("state_dict") if is_checkpoint else None
    if state is None or _shapes(state) != _shapes(module.state_dict()):
        raise UserError(f"{path}: not a checkpoint of this training; {start_again}")
    if problem := checksum_problem(checkpoint):
        raise UserError(f"{path}: damaged ({problem}); {start_again}")
    if MADE_FROM not in checkpoint:
        raise UserError(f"{path}: does not say which model and text it was made from; {start_again}")
    if names := differing(checkpoint[MADE_FROM], made_from):
        raise UserError(
            f"{path}: made from other input ({names} differ); choose another run.name, use the model and text that it "
            f"was made from, or {start_again}"
        )
    for schedule in checkpoint.get("lr_schedulers", []):
        if schedule["total_steps"] != steps:
            raise UserError(
                f"{path}: from a training of {schedule['total_steps']:,} steps; with this many processes it has "
                f"{steps:,}; start as many processes as it began with, or {start_again}"
            )


def _shapes(state: dict) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
