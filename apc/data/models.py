"""Loads a causal language model with feed-forward networks (FFNs) that `apc.data.ffn` finds."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apc.config.schema import Config, ModelConfig
from apc.data import bundled, gguf
from apc.data.ffn import check_calls, check_config, find_ffns, first_device
from apc.data.loading import check_class, library_errors, load_weights
from apc.utils import hub
from apc.utils.errors import UserError
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
    loaded, lacks weights, its FFNs are not supported, or its device map does not fit.
    """
    path = Path(cfg.path).expanduser()
    dtype = None if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    if path.suffix == ".gguf":
        model, tokenizer = gguf.load_gguf(path, dtype or torch.float32), gguf.load_gguf_tokenizer(path)
    else:
        model, tokenizer = _load_folder(cfg, dtype or "auto")
    ffns = find_ffns(model)
    first = first_device(ffns)
    if cfg.device_map:
        _check_map(model, first, device)
    else:
        nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    check_calls(model, ffns)
    return model, tokenizer


def _load_folder(cfg: ModelConfig, dtype: torch.dtype | str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and the tokenizer of a folder or hub id."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    where = f"model.path={cfg.path}"
    source, local_only = (str(bundled.bundled_model()), True) if cfg.path == "bundled" else find_model(cfg.path)
    options: dict[str, Any] = dict(revision=cfg.revision, local_files_only=local_only)
    with library_errors(where):
        adapter = find_adapter_config_file(source, **options)
        absent = local_only and not Path(source).is_dir() and not hub.is_cached(source, cfg.revision)
    if adapter is not None:
        raise UserError(
            f"{where}: holds an adapter (adapter_config.json); merge it into its base model and give the merged model: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{where}: no config.json there; give a model folder, as save_pretrained writes it")
    if absent:
        raise UserError(
            f"{where}: can't be loaded: it is not in the local cache, and the hub can't be reached; "
            "give a model folder or a .gguf file: model.path=FOLDER"
        )
    options["trust_remote_code"] = cfg.trust_remote_code
    with library_errors(f"{where}: its configuration can't be loaded"):
        config = AutoConfig.from_pretrained(source, **options)
    check_config(config)
    check_class(config, where)
    with library_errors(f"{where}: its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return load_weights(source, where, dtype=dtype, device_map=cfg.device_map, **options), tokenizer


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

    `path` is neither `bundled` nor a .gguf file. Raises UserError if it is a file, or a folder that does not exist.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder), True
    if folder.is_file():
        raise UserError(f"model.path={path}: a file; give the model's folder, or a file whose name ends with .gguf")
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
