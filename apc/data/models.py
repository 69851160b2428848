"""Loads a causal language model with feed-forward networks (FFNs) that `apc.data.ffn` finds."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from apc.config.schema import Config, ModelConfig
from apc.data import bundled, gguf
from apc.data.ffn import check_calls, check_config, find_ffns, first_device
from apc.utils import hub
from apc.utils.errors import UserError, first_line
from apc.utils.tensor_files import raw_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Entries of a model's configuration that can differ between copies of the same model.
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a `model.device` value means on this machine; `cuda` is the rank's own GPU.

    Raises UserError if the machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"model.device={name}: this machine has {torch.cuda.device_count()} CUDA devices that PyTorch sees; "
            "use model.device=cpu"
        )
    return torch.device("cuda", index)


def load_model(cfg: ModelConfig, device: torch.device) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model in evaluation mode, and its tokenizer.

    The model is on `device`; with a device map, at least its first layer is. Raises UserError if the model can't be
    loaded, its FFNs are not supported, or its device map does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(cfg.path).expanduser()
    dtype = None if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if path.suffix == ".gguf":
        model, tokenizer = gguf.load_gguf(path, dtype or torch.float32), gguf.load_gguf_tokenizer(path)
    else:
        source, local_only = (str(bundled.bundled_model()), True) if cfg.path == "bundled" else find_model(cfg.path)
        options = dict(revision=cfg.revision, trust_remote_code=cfg.trust_remote_code, local_files_only=local_only)
        try:
            check_config(AutoConfig.from_pretrained(source, **options))
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            options |= dict(dtype=dtype or "auto", device_map=cfg.device_map)
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            missing = "it is not in the local cache, and the hub can't be reached; "
            missing += "give a model folder or a .gguf file: model.path=FOLDER"
            reason = missing if local_only and source == cfg.path else first_line(error)
            raise UserError(f"model.path={cfg.path}: can't be loaded: {reason}") from error
    ffns = find_ffns(model)
    first = first_device(ffns)
    if cfg.device_map:
        _check_map(model, first, device)
    else:
        nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    check_calls(model, ffns)
    return model, tokenizer


def _check_map(model: nn.Module, first: torch.device, device: torch.device) -> None:
    """Raises UserError unless all weights are on the GPUs and the device of the first layer, `first`, is `device`."""
    missing = sorted({name.rpartition(".")[0] for name, value in model.named_parameters() if value.is_meta})
    if missing:
        raise UserError(
            f"model.device_map=auto: the GPUs have no room for {missing[0]} and {len(missing) - 1} more parts "
            "of the model; use more GPUs or a smaller model.dtype"
        )
    if first != device:
        raise UserError(
            f"model.device_map=auto: the first layer is on {first}, in place of {device}; leave model.device=auto"
        )


def find_model(path: str) -> tuple[str, bool]:
    """A `model.path` as a folder or hub id, and whether transformers must use only local files.

    `path` is neither `bundled` nor a .gguf file. Raises UserError if it is a folder that does not exist.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder), True
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: no such folder")
    return path, not hub.hub_reachable()


def model_name(cfg: ModelConfig) -> str:
    """A short name for tables: the bundled model's own, or the last part of the path."""
    return "SmolLM2-135M-Instruct" if cfg.path == "bundled" else Path(cfg.path).name.removesuffix(".gguf")


def weights_digest(model: "PreTrainedModel") -> str:
    """Identifies a model wherever its files lie.

    The sha256 of its configuration and of the names, shapes, types and bytes of all parameters.
    """
    config = {key: value for key, value in model.config.get_text_config().to_dict().items() if key not in _NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        digest.update(raw_bytes(parameter))
    return digest.hexdigest()


def batch_windows(cfg: Config, device: torch.device) -> int:
    """Windows in one forward pass."""
    return cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)
