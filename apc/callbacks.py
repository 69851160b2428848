"""What watches a training: checkpoints to go on from, and figures on held-out text."""

import os
import time
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from apc import distributed
from apc.codebook import Codebook
from apc.evaluation import Evaluator


class ResumePoint(Checkpoint):
    """Keeps one checkpoint, `path`, whole at every moment: after each epoch and every `every_n_steps` steps within one.

    It runs after all other hooks of an epoch's end, so that it holds what they changed.
    """

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps = path, every_n_steps

    def _save(self, trainer: Trainer) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if distributed.is_main():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_index: int) -> None:
        if trainer.global_step % self.every_n_steps == 0 and batch_index + 1 < trainer.num_training_batches:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)


class OracleOnHeldOut(Callback):
    """During clustering: the oracle arm's perplexity and figures on the monitored windows, every few passes."""

    def __init__(self, evaluator_of, every: int):
        """evaluator_of: makes an `Evaluator` over the monitored windows from a `Codebook`."""
        self._evaluator_of, self._every = evaluator_of, every

    def on_train_epoch_end(self, trainer: Trainer, module) -> None:
        if int(module.passes) % self._every and not trainer.should_stop:
            return
        evaluator: Evaluator = self._evaluator_of(Codebook.from_clustering(module, {}))
        record = evaluator.arms(["oracle"], progress=False)[0]
        shown = {f"cluster/monitor_{name}": record[name] for name in ("perplexity", "ratio", "coverage", "precision", "captured_importance")}
        layers = record["per_layer"]
        for name in ("coverage", "precision", "captured_importance"):
            shown |= {f"cluster_layers/monitor_{name}_{layer:02d}": value for layer, value in enumerate(layers[name])}
        for logger in trainer.loggers:
            logger.log_metrics({"cluster/epoch": int(module.passes)} | shown)


class Stopwatch:
    """Seconds that each stage took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began
        self._began = now
