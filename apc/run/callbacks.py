"""What goes along with a training: its end at a SIGTERM, checkpoints to go on from, figures on held-out text, and the way of its metrics to `Tracking`."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from apc.evaluate.evaluator import Evaluator
from apc.run.tracking import Tracking
from apc.utils import distributed, signals
from apc.utils.files import replacing
from apc.utils.tensor_files import digest_of

CHECKSUM = "sha256"  # of a checkpoint
LAYER_MONITORED = ("coverage", "precision", "captured_importance")
MONITORED = ("perplexity", "ratio", *LAYER_MONITORED)


class CheckedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints with a checksum of all that they hold, which a training that is gone on with looks at."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        super().save_checkpoint(checkpoint | {CHECKSUM: digest_of(checkpoint)}, path, storage_options)


def checksum_problem(checkpoint: dict) -> str | None:
    """What is wrong with a checkpoint that was read; None if it is what was saved."""
    said = checkpoint.get(CHECKSUM)
    same = said == digest_of({name: value for name, value in checkpoint.items() if name != CHECKSUM})
    return None if same else "it has no checksum" if said is None else "it does not hold what its checksum says"


class EndTogether(Callback):
    """Ends a training that a SIGTERM asks to, after a step: with several processes all after the same, whichever was asked.

    In place of what Lightning does with several: it goes by the first one alone, and waits for the GPU in each step to learn of it.
    """

    def __init__(self) -> None:
        self._vote: distributed.Vote | None = None
        self._noted = False  # by this process, of several

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._note
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
            self._vote = distributed.Vote()

    def _note(self, signum: int, frame: object) -> None:
        self._noted = True

    @property
    def _asked(self) -> bool:
        return self._noted or signals.asked()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if (
            self._vote.close(self._asked) if self._vote else self._asked
        ):  # before Lightning listens, which it does only when all is set up
            raise SIGTERMException

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_index: int) -> None:
        if self._vote and self._vote.say(self._asked):
            trainer._signal_connector.received_sigterm = True  # by which Lightning ends its loops

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._vote and self._vote.close(self._asked):  # in the last step, or in what came after it
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            signals.ask()  # that another SIGTERM, as the launcher sends to all when one has left, ends nothing half-way


class ResumePoint(Checkpoint):
    """Keeps one checkpoint, `path`, whole at every moment: after each epoch and every `every_n_steps` steps within one, but for those that
    come so soon after the last that writing would take more than a tenth of the time. Also when a SIGTERM ends the training (see `EndTogether`).

    It runs after all other hooks of an epoch's end, so that it holds what they changed.
    """

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps = path, every_n_steps
        self._due = time.monotonic()

    def _save(self, trainer: Trainer, in_time: bool = True) -> None:
        start = time.monotonic()
        if in_time and trainer.strategy.broadcast(start < self._due):  # one rank's clock for all
            return
        if distributed.is_main():
            with replacing(self.path) as temporary:
                trainer.save_checkpoint(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        else:
            trainer.save_checkpoint(self.path)  # in which the others have their part, and write nothing
        end = time.monotonic()
        self._due = end + 9 * (end - start)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_index: int) -> None:
        if trainer.global_step % self.every_n_steps == 0 and batch_index + 1 < trainer.num_training_batches:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            self._save(trainer, in_time=False)
            distributed.barrier()  # the launcher ends the others when one has ended


class MonitorPolicies(Callback):
    """During a training: perplexity and figures of some policies on the monitored windows, every few epochs and at the end.

    evaluator_of: makes an `Evaluator` over the monitored windows from the module as it stands; stage: the metrics' prefix.
    """

    def __init__(
        self,
        stage: str,
        policies: list[str],
        evaluator_of: Callable[[LightningModule], Evaluator],
        every: int,
        last: int,
    ):
        self._stage, self._policies, self._evaluator_of, self._every, self._last = (
            stage,
            policies,
            evaluator_of,
            every,
            last,
        )

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self._every and epoch != self._last and not trainer.should_stop:
            return
        trainer.datamodule.loader.release()  # the model's pass needs the memory, and no source may run the model meanwhile
        shown: dict[str, float] = (
            {"cluster/epoch": epoch} if self._stage == "cluster" else {f"{self._stage}/step": trainer.global_step}
        )
        training = module.training
        for record in self._evaluator_of(module.eval()).policies(self._policies, progress=False):
            prefix = f"monitor_{record['policy']}_"
            shown |= {
                f"{self._stage}/{prefix}{name}": record[name] for name in MONITORED if record.get(name) is not None
            }
            for name in LAYER_MONITORED:
                layers = enumerate(record["per_layer"][name])
                shown |= {
                    f"{self._stage}_layers/{prefix}{name}_{layer:02d}": value
                    for layer, value in layers
                    if value is not None
                }
        module.train(training)
        for logger in trainer.loggers:
            logger.log_metrics(shown)


class TrackingLogger(Logger):
    """Forwards what a LightningModule logs to `Tracking.log`."""

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self._tracking = tracking

    # Lightning puts checkpoints into <save_dir>/<name>/<version>/checkpoints: with both empty, that is the run's own folder.
    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._tracking.folder)

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """Nothing: the whole config was recorded when the run began."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Logs one row. Lightning's bare `epoch` and step become the family's own step metric where the module logged none."""
        row = dict(metrics)
        epoch = row.pop("epoch", None)
        if not row:
            return
        for step_metric, value in (("cluster/epoch", epoch), ("predictor/step", step)):
            family = step_metric.split("/")[0] + "/"
            if value is not None and any(key.startswith(family) for key in row):
                row.setdefault(step_metric, int(value))
        if epoch is not None and not any("/" in key for key in row):
            row["epoch"] = int(epoch)  # a callback's bare key (`lr-AdamW`) has no other axis
        self._tracking.log(row)
