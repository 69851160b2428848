"""Loads a causal language model and finds its gated feed-forward networks (FFNs).

An FFN here is down(act(gate(x)) * up(x)), with gate and up as two linear layers (Llama, Mistral, Qwen, Gemma, SmolLM) or fused
into one (Phi-3). `FFNHooks` lets a visitor read, and change, the tensors at every site of every layer.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from apc.config.schema import Config, ModelConfig
from apc.data import bundled, gguf
from apc.data.ffn import check_config, find_ffns, first_device
from apc.utils import hub
from apc.utils.errors import UserError

_NOT_IDENTITY = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
)  # in a model's configuration


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a `model.device` value means on this machine; `cuda` is the rank's own GPU. Raises UserError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"model.device={name}: this machine has {torch.cuda.device_count()} CUDA devices that PyTorch sees; use model.device=cpu"
        )
    return torch.device("cuda", index)


def load_model(cfg: ModelConfig, device: torch.device) -> tuple[nn.Module, object]:
    """The model in evaluation mode on `device` (with a device map: at least its first layer), and its tokenizer. Raises UserError where it can't be had,
    has no gated FFN, or its map does not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(cfg.path).expanduser()
    dtype = "auto" if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if path.suffix == ".gguf":
        model, tokenizer = (
            gguf.load_gguf(path, torch.float32 if dtype == "auto" else dtype),
            gguf.load_gguf_tokenizer(path),
        )
    else:
        source, local_only = (str(bundled.bundled_model()), True) if cfg.path == "bundled" else find_model(cfg.path)
        options = dict(revision=cfg.revision, trust_remote_code=cfg.trust_remote_code, local_files_only=local_only)
        try:
            check_config(AutoConfig.from_pretrained(source, **options))
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=cfg.device_map, **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if local_only and source == cfg.path:
                reason = "it is not in the local cache, and the hub can't be reached; give a model folder or a .gguf file: model.path=FOLDER"
            raise UserError(f"model.path={cfg.path}: can't be loaded: {reason}") from error
    ffns = find_ffns(model)
    if cfg.device_map:
        _check_map(model, first_device(ffns), device)
    else:
        model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def _check_map(model: nn.Module, home: torch.device, device: torch.device) -> None:
    """Raises UserError unless all weights are where they are used, and the first layer on `device`."""
    away = sorted({name.rpartition(".")[0] for name, value in model.named_parameters() if value.is_meta})
    if away:
        raise UserError(
            f"model.device_map=auto: the GPUs have no room for {away[0]} and {len(away) - 1} more of its parts; use more GPUs or a smaller type"
        )
    if home != device:
        raise UserError(
            f"model.device_map=auto: the first layer is on {home}, in place of {device}; leave model.device=auto"
        )


def find_model(path: str) -> tuple[str, bool]:
    """(folder or hub id, whether only this machine is asked for it) of a `model.path` that is neither bundled nor a .gguf file.

    Raises UserError for a folder that is not there.
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


def weights_digest(model: nn.Module) -> str:
    """sha256 over the configuration and the names, shapes, types and bytes of all parameters: who the model is, wherever its files lie."""
    config = {key: value for key, value in model.config.get_text_config().to_dict().items() if key not in _NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def batch_windows(cfg: Config, device: torch.device) -> int:
    """Windows in one forward pass."""
    return cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)
