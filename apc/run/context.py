"""What the stages of a run share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apc.cluster.codebook import Codebook
from apc.collect.collector import Collector
from apc.collect.patterns import Block, PatternInfo
from apc.config.schema import Config
from apc.data.models import load_model
from apc.data.text import Windows, cut_windows, read_texts, split_windows
from apc.evaluate.evaluator import Evaluator
from apc.predict.predictor import Predictor
from apc.run.folder import RunFolder, Stopwatch
from apc.run.tracking import Tracking
from apc.utils import distributed


@dataclass(frozen=True)
class RunContext:
    """One run: its configuration, model, folder, metrics and clock."""

    cfg: Config
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    run: RunFolder  # with the run's trainings; an evaluation reads it and writes to a folder of its own
    tracking: Tracking
    watch: Stopwatch


def load_inputs(
    cfg: Config, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows, Windows, Windows]:
    """Model, tokenizer, and the windows to fit, to monitor and to score."""
    with distributed.main_first():  # rank 0 fetches and unpacks the bundled model and text
        texts = read_texts(cfg.data)
        model, tokenizer = load_model(cfg.model, device)
        windows = cut_windows(cfg.data, *texts, tokenizer)
    return model, tokenizer, *split_windows(cfg, *windows)


@dataclass(frozen=True)
class HeldOutMonitor:
    """Held-out windows that trainings are measured on, and how to run the model on them."""

    windows: Tensor  # int64 [n, seq_len]; n may be 0
    collector: Collector
    info: PatternInfo
    seed: int

    def evaluator(self, codebook: Codebook, predictor: Predictor | None = None) -> Evaluator:
        """An evaluator of this codebook and predictor on the held-out windows."""
        run = self.collector
        return Evaluator(run.model, codebook, predictor, self.windows, run.device, run.batch_windows, self.seed)

    @cached_property
    def rows(self) -> Block | None:
        """The patterns of these windows, with FFN inputs; None without windows."""
        if not len(self.windows):
            return None
        every = range(len(self.windows))
        return self.collector.block(self.windows, every, self.info.rule, self.info.with_importance, with_hidden=True)
