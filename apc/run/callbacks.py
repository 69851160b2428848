"""Lightning callbacks of a training: ending at a SIGTERM, checkpoints, held-out figures, progress, and logging."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from apc.evaluate.evaluator import Evaluator
from apc.run.tracking import STEP_METRICS, Tracking
from apc.utils import distributed, signals
from apc.utils.files import replacing
from apc.utils.progress import progress
from apc.utils.tensor_files import digest_of

CHECKSUM, MADE_FROM = "sha256", "made_from"  # entries of a checkpoint
LAYER_MONITORED = ("coverage", "precision", "captured_importance")
MONITORED = ("perplexity", "ratio", *LAYER_MONITORED)


class CheckedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, with what they were made from and a checksum, which `checksum_problem` compares.

    made_from: identifies the training's input; its values can be stored as JSON.
    """

    def __init__(self, made_from: dict) -> None:
        self._made_from = made_from

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        """Writes the checkpoint with both."""
        content = checkpoint | {MADE_FROM: self._made_from}
        super().save_checkpoint(content | {CHECKSUM: digest_of(content)}, path, storage_options)


def checksum_problem(checkpoint: dict) -> str | None:
    """Why a checkpoint is not as it was saved; None if it is."""
    saved = checkpoint.get(CHECKSUM)
    if saved is None:
        return "it has no checksum"
    content = {name: value for name, value in checkpoint.items() if name != CHECKSUM}
    return None if saved == digest_of(content) else "checksum mismatch"


class EndTogether(Callback):
    """Ends a training after the current step if a SIGTERM asks for it; all ranks end after the same step.

    It replaces Lightning's way for several ranks, which ignores a SIGTERM to any rank but the first and waits for the
    GPU in every step. Here the ranks agree through a gloo all-reduce each step.
    """

    def __init__(self) -> None:
        self._vote: distributed.Vote | None = None
        self._signalled = False  # whether this rank got a SIGTERM, if there are several ranks

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Replaces Lightning's handler and its broadcast."""
        if trainer.world_size > 1:
            # Lightning has no public hook for either.
            trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[assignment,method-assign]
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
            self._vote = distributed.Vote()

    def _note(self, signum: int, frame: object) -> None:
        self._signalled = True

    @property
    def _asked(self) -> bool:
        return self._signalled or signals.asked()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends at once if a SIGTERM came during the setup, when Lightning does not listen yet."""
        if self._vote.close(self._asked) if self._vote else self._asked:
            raise SIGTERMException

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Tells Lightning to stop if any rank was asked to."""
        if self._vote and self._vote.say(self._asked):
            trainer._signal_connector.received_sigterm = True  # Lightning's loops check this

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Raises SIGTERMException if the SIGTERM came in the last step or after it."""
        if self._vote and self._vote.close(self._asked):
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Ignores further SIGTERMs: the launcher sends one to every rank as soon as the first rank has ended."""
        if isinstance(exception, SIGTERMException):
            signals.ask()


class ResumePoint(Checkpoint):
    """Keeps one checkpoint file, `path`, complete at every moment.

    It is written after each epoch, every `every_n_steps` steps within one, and when a SIGTERM ends the training.
    At most a tenth of the time goes to writing: a checkpoint is skipped if it comes too soon after the last one.
    Lightning calls it after all other hooks of an epoch's end, so their changes are in the checkpoint.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self._due = time.monotonic()

    def _save(self, trainer: Trainer, in_time: bool = True) -> None:
        """in_time: whether to skip a checkpoint that comes too soon."""
        start = time.monotonic()
        if in_time and trainer.strategy.broadcast(start < self._due):  # the first rank's clock decides for all
            return
        if distributed.is_main():
            with replacing(self.path) as temporary:
                trainer.save_checkpoint(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        else:
            trainer.save_checkpoint(self.path)  # takes part in the exchange and writes nothing
        end = time.monotonic()
        self._due = end + 9 * (end - start)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_index: int
    ) -> None:
        """Saves every `every_n_steps` steps, but not after an epoch's last, when `on_train_epoch_end` does."""
        if trainer.global_step % self.every_n_steps == 0 and batch_index + 1 < trainer.num_training_batches:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        """Saves after an epoch."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Saves when a SIGTERM ends the training."""
        if isinstance(exception, SIGTERMException):
            self._save(trainer, in_time=False)
            distributed.barrier()  # the launcher kills the others once one rank has ended


@dataclass(eq=False)
class MonitorPolicies(Callback):
    """Logs perplexity and mask figures of some policies on the held-out windows, every few epochs and at the end."""

    stage: str  # the metrics' prefix
    policies: list[str]
    evaluator: Callable[[], Evaluator]  # on the held-out windows, of the module as it stands
    every: int  # epochs between measurements
    last: int  # number of the last epoch

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Measures the policies if it is time."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != self.last and not trainer.should_stop:
            return
        # The evaluation needs the device memory, and no other source may run the model meanwhile.
        trainer.datamodule.loader.release()  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        step = epoch if self.stage == "cluster" else trainer.global_step
        row: dict[str, Any] = {STEP_METRICS[self.stage]: step}
        training = module.training
        module.eval()
        for record in self.evaluator().policies(self.policies, progress=False):
            prefix = f"monitor_{record['policy']}_"
            row |= {f"{self.stage}/{prefix}{name}": record[name] for name in MONITORED if record.get(name) is not None}
            row |= {f"{self.stage}_layers/{prefix}{name}": record["per_layer"][name] for name in LAYER_MONITORED}
        module.train(training)
        for logger in trainer.loggers:
            logger.log_metrics(row)


# The name of each training's bar, and the figure beside it from the module's latest history record.
_BARS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "cluster": ("cluster", lambda record: f"captured {100 * record['captured']:.2f} %"),
    "predictor": ("predict", lambda record: f"loss {record['loss']:.4f}"),
    "tune": ("tune", lambda record: f"divergence {record['divergence']:.4f} nats"),
}


class TrainingProgress(Callback):
    """One bar for a whole training: its pass, and captured importance, loss or divergence."""

    def __init__(self, stage: str) -> None:
        self._name, self._shown = _BARS[stage]
        self._open = ExitStack()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Opens the bar at the step where the training resumes."""
        steps = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
        steps = min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
        self._bar = self._open.enter_context(progress(steps, self._name))
        self._bar.update(trainer.global_step, self._figure(trainer, module))

    def _figure(self, trainer: Trainer, module: LightningModule) -> str:
        history: list[dict] = module.history  # type: ignore[assignment]  # each of our modules has one
        shown = f", {self._shown(history[-1])}" if history else ""
        return f"pass {trainer.current_epoch + 1} of {trainer.max_epochs}{shown}"

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Advances the bar."""
        self._bar.update(1, self._figure(trainer, module))

    def on_train_end(self, *_: object) -> None:
        """Closes the bar."""
        self._open.close()

    def on_exception(self, *_: object) -> None:
        """Closes the bar."""
        self._open.close()


class TrackingLogger(Logger):
    """Forwards a LightningModule's metrics to `Tracking.log`."""

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self._tracking = tracking

    # Lightning puts checkpoints into <save_dir>/<name>/<version>/checkpoints, so empty strings keep the run's folder.
    name = version = ""  # type: ignore[assignment]

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._tracking.folder)

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """Does nothing: the run's start recorded the whole configuration."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Logs one row. Lightning's `epoch` and `step` become the family's step metric if the module logged none."""
        row = dict(metrics)
        epoch = row.pop("epoch", None)
        if not row:
            return
        for step_metric, value in (("cluster/epoch", epoch), ("predictor/step", step)):
            family = step_metric.split("/")[0] + "/"
            if value is not None and any(key.startswith(family) for key in row):
                row.setdefault(step_metric, int(value))
        if epoch is not None and not any("/" in key for key in row):
            row["epoch"] = int(epoch)  # a callback's own key, e.g. `lr-AdamW`, has no other axis
        self._tracking.log(row)
