"""What the stages of a run share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from apc.cluster.codebook import Codebook
from apc.collect.collector import Collector
from apc.collect.patterns import Block, PatternInfo
from apc.config.schema import Config
from apc.evaluate.evaluator import Evaluator
from apc.predict.predictor import Predictor
from apc.run.folder import RunFolder, Stopwatch
from apc.run.tracking import Tracking


@dataclass(frozen=True)
class RunContext:
    """One run: its configuration, model, folder, metrics and clock.

    run: the folder with the run's trainings. An evaluation reads it and writes to a folder of its own.
    """

    cfg: Config
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    run: RunFolder
    tracking: Tracking
    watch: Stopwatch


@dataclass(frozen=True)
class HeldOutMonitor:
    """Held-out windows that trainings are measured on, and how to run the model on them.

    windows: int64 [n, seq_len]; n may be 0.
    """

    windows: Tensor
    collector: Collector
    info: PatternInfo
    seed: int

    def evaluator(self, codebook: Codebook, predictor: Predictor | None = None) -> Evaluator:
        """An evaluator of this codebook and predictor on the held-out windows."""
        collector = self.collector
        return Evaluator(
            collector.model, codebook, predictor, self.windows, collector.device, collector.batch_windows, self.seed
        )

    @cached_property
    def rows(self) -> Block | None:
        """The patterns of these windows, with FFN inputs; None without windows."""
        if not len(self.windows):
            return None
        every = range(len(self.windows))
        return self.collector.block(self.windows, every, self.info.rule, self.info.with_importance, with_hidden=True)
