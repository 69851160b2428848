"""Loads any GGUF file as a Hugging Face model."""

from pathlib import Path
from typing import TYPE_CHECKING

from apc.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """A GGUF file as a dense model in `dtype`, on the CPU.

    Raises UserError if the file is missing, not a GGUF file, or of an unsupported kind.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True the weights stay in GGUF blocks, which can neither be hooked as matrices nor saved again.
    return _from_gguf(AutoModelForCausalLM, path, dtype=dtype, quantization_config=GgufConfig(dequantize=True))


def load_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer inside a GGUF file. Raises UserError as `load_gguf` does."""
    from transformers import AutoTokenizer

    return _from_gguf(AutoTokenizer, path)


def load_gguf_config(path: Path) -> "PretrainedConfig":
    """The model configuration inside a GGUF file, without the weights. Raises UserError as `load_gguf` does."""
    from transformers import AutoConfig

    return _from_gguf(AutoConfig, path)


def _from_gguf(auto_class, path: Path, **options):
    path = Path(path).absolute()
    if not path.is_file():
        raise UserError(f"model.path: no GGUF file at {path}: name an existing file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.path: {path} is not a GGUF file (it does not start with `GGUF`): name another file")
    try:
        # An absolute path in both places: transformers would first look for a bare name in the working directory.
        return auto_class.from_pretrained(str(path.parent), gguf_file=str(path), **options)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.path: transformers can't read {path.name}: {reason}: choose another file") from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Saves a GGUF file's model, dequantised to float32, and its tokenizer as Hugging Face files in `folder`."""
    import torch

    load_gguf(gguf, torch.float32).save_pretrained(folder)
    load_gguf_tokenizer(gguf).save_pretrained(folder)
