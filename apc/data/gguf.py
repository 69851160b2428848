"""Any GGUF file as a Hugging Face model."""

from pathlib import Path
from typing import TYPE_CHECKING

from apc.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """A GGUF file as a plain dense model in `dtype`, on the CPU. Raises UserError for a missing, foreign or unsupported file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True the weights stay in GGUF blocks, which can neither be hooked as plain matrices nor saved again.
    return _from_gguf(AutoModelForCausalLM, path, dtype=dtype, quantization_config=GgufConfig(dequantize=True))


def load_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer inside a GGUF file. Raises UserError as `load_gguf` does."""
    from transformers import AutoTokenizer

    return _from_gguf(AutoTokenizer, path)


def load_gguf_config(path: Path) -> "PretrainedConfig":
    """The model's configuration inside a GGUF file, without its weights. Raises UserError as `load_gguf` does."""
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
        # The absolute path in both places: a bare name would be looked up in the working directory first.
        return auto_class.from_pretrained(str(path.parent), gguf_file=str(path), **options)
    except ValueError as error:
        raise UserError(
            f"model.path: transformers can't read {path.name}: {' '.join(str(error).split())[:300]}: choose another file"
        ) from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    import torch

    load_gguf(gguf, torch.float32).save_pretrained(folder)
    load_gguf_tokenizer(gguf).save_pretrained(folder)
