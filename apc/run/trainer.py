"""The Lightning Trainer of each stage: strategy, checkpoints, determinism."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.utils.deterministic
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException

from apc.collect.loader import ResumedDataModule
from apc.run.callbacks import CheckedCheckpoints, EndTogether, TrackingLogger, checksum_problem
from apc.run.context import RunContext
from apc.utils import distributed, signals
from apc.utils.errors import Terminated, UserError


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


def make_trainer(context: RunContext, max_epochs: int, callbacks: list[Callback], **options) -> Trainer:
    """A Lightning Trainer as all trainings of a run use it."""
    cfg, device = context.cfg, context.device
    world = distributed.world_size()
    shown = [TQDMProgressBar(refresh_rate=10)] if cfg.trainer.progress else []
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" and world == 1 else distributed.local_world_size(),
        num_nodes=world // distributed.local_world_size(),
        max_epochs=max_epochs,
        max_steps=cfg.trainer.max_steps,
        log_every_n_steps=1,  # the modules choose what they log
        logger=[TrackingLogger(context.tracking)],
        callbacks=[EndTogether(), *callbacks, *shown],
        enable_progress_bar=cfg.trainer.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=context.run.path,
        plugins=[CheckedCheckpoints()],
        **options,
    )


def fit(trainer: Trainer, module: LightningModule, data: ResumedDataModule, checkpoint: Path) -> None:
    """Trains, from the checkpoint if there is one. Raises UserError, naming the file, if it can't be taken up."""
    # The loader is resumable: the data module keeps its place (see there why).
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is the same on all ranks
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    if checkpoint.is_file():
        check_checkpoint(checkpoint, module, max(2, len(data.loader) * trainer.max_epochs))
    try:
        with signals.training():
            trainer.fit(
                module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True
            )
    except SIGTERMException as error:
        raise Terminated from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    finally:
        data.loader.release()


def check_checkpoint(path: Path, module: LightningModule, steps: int) -> None:
    """Raises UserError unless the file is a checkpoint of a module with these shapes, and of a training of so many steps, if a schedule goes by them."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or no checkpoint ({reason}); delete it to train from the start") from error
    state = held.get("state_dict") if isinstance(held, dict) and "pytorch-lightning_version" in held else None
    expected = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    if (
        state is None
        or {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)} != expected
    ):
        raise UserError(f"{path}: not a checkpoint of this training; delete it to train from the start")
    if problem := checksum_problem(held):
        raise UserError(f"{path}: damaged ({problem}); delete it to train from the start")
    for schedule in held.get("lr_schedulers", []):
        if schedule["total_steps"] != steps:
            raise UserError(
                f"{path}: of a training of {schedule['total_steps']:,} steps, which has {steps:,} with this many processes; start as many as it began with, "
                "or delete it to train from the start"
            )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it a gradient is the same to the bit each time, on one GPU and in one process; an operation that can't be is an error."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks of cuBLAS for it
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(
        True
    )  # with warnings in place of errors, attention's gradient would not be deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills
