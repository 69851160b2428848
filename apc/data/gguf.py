"""Loads any GGUF file as a Hugging Face model."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from apc.data.ffn import check_config
from apc.data.loading import check_class, library_errors, load_weights, tell_ignored
from apc.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """A GGUF file as a dense model in `dtype`, on the CPU.

    Raises UserError if the file is missing, not a GGUF file, damaged, or of an unsupported kind. If there is
    no tensor `output.weight`, the output layer shares the embedding's weights; GGUF has no other sign of sharing.
    """
    from transformers import GgufConfig

    config = load_gguf_config(path)
    check_config(config)
    check_class(config, f"model.path={path}")
    ignored = _check_tensors(path, config.get_text_config().num_hidden_layers)
    # Without dequantize=True the weights stay in GGUF blocks, which can neither be hooked as matrices nor saved again.
    options = _options(path) | dict(dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    model = load_weights(str(_absolute(path).parent), f"model.path={path}", **options)
    tell_ignored(f"model.path={path}", type(model).__name__, ignored)
    return model


def _check_tensors(path: Path, layers: int) -> list[str]:
    """The names of tensors that transformers drops silently. Raises UserError if the file is cut or damaged."""
    from gguf import GGUFReader

    with library_errors(f"model.path={path}: cut short or damaged"):
        tensors = [tensor.name for tensor in GGUFReader(_absolute(path)).tensors]
    blocks = {name: re.match(r"blk\.(\d+)\.", name) for name in tensors}
    beyond = [name for name, block in blocks.items() if block and int(block[1]) >= layers]
    # `rope_freqs.weight`: the factors of a scaled RoPE. The configuration that transformers reads lacks them too.
    return beyond + [name for name in tensors if name == "rope_freqs.weight"]


def load_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer inside a GGUF file. Raises UserError as `load_gguf` does."""
    from transformers import AutoTokenizer

    return _from_gguf(AutoTokenizer, path, "its tokenizer")


def load_gguf_config(path: Path) -> "PretrainedConfig":
    """The model configuration inside a GGUF file, without the weights. Raises UserError as `load_gguf` does."""
    from transformers import AutoConfig

    return _from_gguf(AutoConfig, path, "this file")


def _from_gguf(auto_class, path: Path, part: str):
    with library_errors(f"model.path={path}: transformers can't read {part}"):
        if not _absolute(path).is_file():
            raise UserError(f"model.path: no GGUF file at {path}: name an existing file")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                problem = "is not a GGUF file (it does not start with `GGUF`)"
                raise UserError(f"model.path: {path} {problem}: name another file")
        return auto_class.from_pretrained(str(_absolute(path).parent), **_options(path))


def _options(path: Path) -> dict:
    # Absolute, like the folder's path: transformers would look for a relative path in the working directory first.
    return dict(gguf_file=str(_absolute(path)))


def _absolute(path: Path) -> Path:
    return Path(path).absolute()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Saves a GGUF file's model, dequantised to float32, and its tokenizer as Hugging Face files in `folder`."""
    import torch

    load_gguf(gguf, torch.float32).save_pretrained(folder)
    load_gguf_tokenizer(gguf).save_pretrained(folder)
