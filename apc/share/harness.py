"""A sparse model for lm-evaluation-harness: `apc lm-eval run --model apc --model_args checkpoint=runs/x,policy=NAME …`.

Importing this module registers the model `apc` with the harness, which is in the extra `eval`.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from apc.data.models import load_model, resolve_device
from apc.run.folder import RunFolder, load_run
from apc.share.result import Result
from apc.sparse.policies import make_policy
from apc.sparse.sparsify import sparsify
from apc.utils.errors import UserError

SCORING = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype"),
    *("mixed_precision_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)


@register_model("apc")
class SparseLM(HFLM):
    """The model of a run, or of a shared result, under a policy. All tokens are scored under the masks.

    Args:
        checkpoint: a run's folder, or a folder or hub id that `apc.load` takes.
        policy: a name; `dense` for the model as it is. None: the run's best one, or the shared one.
        kernel: None for masks on a dense forward pass, auto for kernels that read only what masks keep.
        device: auto, cpu, cuda or cuda:N; cuda, the harness's default, means cpu where there is no GPU, as for `hf`.
        model: the base model's path or hub id, if a shared result does not name it.
        others: of the harness's model `hf`, those in `SCORING`.

    Raises UserError for other arguments, and as `load_run`, `Result.from_pretrained`, `load_model` and `sparsify` do.
    """

    def __init__(
        self,
        checkpoint: str = "",
        policy: str | None = None,
        kernel: str | None = None,
        device: str = "auto",
        model: str | None = None,
        **others: Any,
    ) -> None:
        if unknown := [name for name in others if name not in SCORING]:
            own = "checkpoint, policy, kernel, device, model"
            raise UserError(f"{unknown[0]}: not an argument of the model apc; choose {own}, {', '.join(SCORING)}")
        # The harness makes numbers of digits.
        checkpoint, policy = str(checkpoint), None if policy is None else str(policy)
        if not checkpoint:
            raise UserError("no checkpoint; give a run or a shared result: --model_args checkpoint=runs/x")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        parts = _of_run if RunFolder(Path(checkpoint)).config.is_file() else _of_result
        sparse, tokenizer = parts(checkpoint, policy, kernel, device, model)
        super().__init__(pretrained=sparse, tokenizer=tokenizer, backend="causal", **others)


def _of_run(
    checkpoint: str, policy: str | None, kernel: str | None, device: str, path: str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    run = load_run(checkpoint)
    if path is not None:
        raise UserError(f"model={path}: {checkpoint} is a run, which names its model; leave model out")
    if run.config.model.trust_remote_code:
        problem = "sets model.trust_remote_code, which runs code from the model's repository"
        raise UserError(f"{run.folder.config}: {problem}; load it yourself and hand it to the harness's HFLM")
    if run.codebook is None:
        raise UserError(f"{run.folder.codebook}: no such file; finish the run first")
    name, seed, scoring = policy or run.best_policy, run.config.seed, kernel is not None
    if name is not None:
        make_policy(name, run.codebook, run.predictor, seed)  # fails before the model is loaded
    model, tokenizer = load_model(run.config.model, resolve_device(device))
    return sparsify(model, run.codebook, run.predictor, name, seed, kernel, scoring=scoring), tokenizer


def _of_result(
    checkpoint: str, policy: str | None, kernel: str | None, device: str, path: str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    result = Result.from_pretrained(checkpoint)
    if policy not in (None, "dense", result.policy):
        raise UserError(f"policy={policy}: {checkpoint} was shared for {result.policy}; choose it, or dense")
    model, tokenizer = result.base_model(path, device)
    if policy == "dense":
        return model, tokenizer
    return result.sparse_model(model, kernel, scoring=kernel is not None), tokenizer
