"""What the stages of a run share."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apc.cluster.codebook import Codebook
from apc.collect.collector import Collector
from apc.collect.patterns import Block, PatternInfo
from apc.config.load import load_saved
from apc.config.schema import Config
from apc.data import overlap
from apc.data.models import load_model
from apc.data.text import Text, Windows, check_positions, cut_windows, read_score, read_texts, split_windows
from apc.evaluate.evaluator import Evaluator
from apc.predict.predictor import Predictor
from apc.run.folder import RunFolder, Stopwatch
from apc.run.tracking import Tracking
from apc.utils import distributed
from apc.utils.errors import UserError


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

    def gpu_bytes(self) -> int | None:
        """The most bytes of the GPU that torch has held in this process so far; None without a GPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None


def load_inputs(
    cfg: Config, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows, Windows, Windows]:
    """Model, tokenizer, and the windows to fit, to monitor and to score."""
    with distributed.main_first():  # rank 0 fetches and unpacks the bundled model and text
        texts = read_texts(cfg.data)
        model, tokenizer = load_model(cfg.model, device)
        fit, scored = (_cut(cfg, text, model, tokenizer) for text in texts)
    return model, tokenizer, *split_windows(cfg, fit, scored)


def load_scored(
    cfg: Config, device: torch.device, run: RunFolder, codebook: Codebook
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows]:
    """Model, tokenizer, and the windows to score, for a run that is already fitted.

    The fit text is read only if the run's folder has no sample of its sequences, as in runs of version 0.1. Raises
    UserError if it is not the text that the run was fitted on.
    """
    path, made, fitted = run.fit_sequences, codebook.provenance, load_saved(run.config).data.fit
    digest = made.get("patterns", {}).get("text")
    if path.is_file() and cfg.data.fit != fitted:
        raise UserError(
            f"data.fit: the run was fitted with {fitted}, evaluate.py can't change that and does not "
            "need the text; leave data.fit out"
        )
    with distributed.main_first():
        fit = None
        if path.is_file():
            score = read_score(cfg.data, overlap.load(path, digest), made["fit"])
        else:
            fit, score = read_texts(cfg.data)
        model, tokenizer = load_model(cfg.model, device)
        scored = _cut(cfg, score, model, tokenizer)
    if fit is not None and split_windows(cfg, _cut(cfg, fit, model, tokenizer), scored)[0].digest != digest:
        raise UserError(
            f"data.fit={cfg.data.fit}: not the text that the run was fitted on ({made['fit']}), or another tokenizer; "
            "give that text: data.fit=FILE"
        )
    return model, tokenizer, scored


def _cut(cfg: Config, text: Text, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The text's windows. Raises UserError as `cut_windows` does, or if windows do not fit the model."""
    check_positions(cfg.data, model.config)
    windows = cut_windows(cfg.data, text, tokenizer, model.config.model_type)
    largest, embedding = int(windows.tokens.max()), cast(nn.Embedding, model.get_input_embeddings())
    if largest >= embedding.num_embeddings:
        raise UserError(
            f"model.path={cfg.model.path}: its tokenizer gives token id {largest}, its embedding has "
            f"{embedding.num_embeddings} rows; "
            "give a model with its own tokenizer"
        )
    return windows


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
