"""Loads configurations, tokenizers and weights with transformers; errors are one line that names the model."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from apc.utils import distributed
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns any error of a library inside the block into a UserError: `what`, then the error's own words.

    On damaged files, libraries raise errors of many classes, even bare Exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error's message, and the next if it ends with a colon; else the name of its class."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:2]) if lines and lines[0].endswith(":") else next(iter(lines), "")
    if not line or not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    line = line if len(line) <= 200 else f"{line[:200]}…"
    return f"{line}; allow it with model.trust_remote_code=true" if "trust_remote_code" in str(error) else line


def check_class(config: "PretrainedConfig", where: str) -> None:
    """Raises UserError if transformers has no causal language model for a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        kind = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        raise UserError(
            f"{where}: {kind} (model_type {config.model_type}) is not a model that transformers' AutoModelForCausalLM "
            "loads; docs/families.md lists the families that work"
        )


def load_weights(source: str, where: str, **options) -> "PreTrainedModel":
    """The causal language model that transformers makes of `source`, with every weight from its files.

    where: the model, for messages; options: for `from_pretrained`. Raises UserError if the files can't be read, or if
    weights are missing or have other shapes; transformers would fill these with random numbers. Names on stderr the
    tensors of the files that it ignored.
    """
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    info: dict
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # we name missing and mismatched weights
    with library_errors(f"{where}: its weights can't be loaded"), _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
        model, info = loaded
    kind, names = type(model).__name__, list(model.state_dict())
    missing = sorted(info["missing_keys"], key=names.index)
    if missing:
        raise UserError(
            f"{where}: its files lack {len(missing)} of the {len(names)} weights of {kind}: {shown_names(missing)}; "
            "give a complete checkpoint whose configuration fits its weights"
        )
    mismatched = sorted(info["mismatched_keys"], key=lambda entry: names.index(entry[0]))
    if mismatched:
        shapes = [f"{name} is {_shape(file)} in place of {_shape(own)}" for name, file, own in mismatched]
        raise UserError(
            f"{where}: {len(mismatched)} of the {len(names)} weights of {kind} have other shapes in its files: "
            f"{shown_names(shapes)}; give a complete checkpoint whose configuration fits its weights"
        )
    tell_ignored(where, kind, sorted(info["unexpected_keys"]))
    if model.config.get_text_config() is not model.config:
        _tell(f"{where}: {kind} also reads input other than text; only its text part runs")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers from logging its table of missing and ignored weights; we report them in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    is_other = lambda record: "LOAD REPORT" not in str(record.msg)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def tell_ignored(where: str, kind: str, names: Sequence[str]) -> None:
    """Names on stderr the tensors of a checkpoint that the model has no use for, if there are any."""
    if names:
        _tell(f"{where}: {kind} ignores these tensors of its files: {shown_names(names)}")


def _tell(line: str) -> None:
    if distributed.is_main():
        print(f"note: {line}", file=sys.stderr, flush=True)


def shown_names(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _shape(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
