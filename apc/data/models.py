"""Loads a causal language model with feed-forward networks (FFNs) that `apc.data.ffn` finds."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from apc.config.schema import DTYPES, Config, ModelConfig
from apc.data import gguf
from apc.data.bundled import find_bundled
from apc.data.dequantise import check_readable, dequantise, unpack_at_load
from apc.data.ffn import check_calls, find_ffns, first_device
from apc.data.loading import check_class, library_errors, load_weights
from apc.data.quantise import FULL_BITS, mean_bits, quantise_ffns
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
    """The model in evaluation mode, and its tokenizer; its FFNs are quantised if cfg.ffn_bits is given.

    The model is on `device`; with a device map, at least its first layer is. Raises UserError if the model can't be
    loaded, lacks weights, its FFNs are not supported, or its device map or its quantisation does not fit.
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
    if device.type == "cuda" and model.dtype == torch.float32:
        from apc.data.attention import use_sdpa  # imports transformers' attention, which takes seconds

        use_sdpa(model)
    if cfg.ffn_bits is not None:
        quantise_ffns(model, cfg.ffn_bits, cfg.ffn_group, cfg.ffn_spared)
    check_calls(model, ffns)
    return model, tokenizer


def _load_folder(cfg: ModelConfig, dtype: torch.dtype | str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and the tokenizer of a folder or hub id."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    where = f"model.path={cfg.path}"
    if model := find_bundled(cfg.path):
        model.fetch()
    source, local_only = find_model(cfg.path)
    options: dict[str, Any] = dict(revision=cfg.revision, local_files_only=local_only)
    with library_errors(where):
        adapter = find_adapter_config_file(source, **options)
        absent = local_only and not Path(source).is_dir() and not hub.is_cached(source, cfg.revision)
    if adapter is not None:
        raise UserError(
            f"{where}: holds an adapter (adapter_config.json); merge it into its base model and give the merged model: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )
    if absent:
        raise UserError(
            f"{where}: can't be loaded: it is not in the local cache, and the hub can't be reached; "
            "give a model folder or a .gguf file: model.path=FOLDER"
        )
    options["trust_remote_code"] = cfg.trust_remote_code
    with library_errors(f"{where}: its configuration can't be loaded"):
        config = AutoConfig.from_pretrained(source, **options)
    check_readable(config)
    check_class(config, where)
    with library_errors(f"{where}: its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    options |= unpack_at_load(config)
    loaded = load_weights(source, where, dtype=dtype, device_map=cfg.device_map, **options)
    return cast("PreTrainedModel", dequantise(loaded)), tokenizer


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

    `path` is no .gguf file. The folder of a bundled model may not exist yet. Raises UserError if it is a file, or
    another folder that does not exist, has no config.json or can't be read.
    """
    if model := find_bundled(path):
        return str(model.folder), True
    folder = Path(path).expanduser()
    with library_errors(f"model.path={path}"):
        is_folder, is_file, has_config = folder.is_dir(), folder.is_file(), (folder / "config.json").is_file()
        has_adapter = (folder / "adapter_config.json").is_file()
    if is_folder and not (has_config or has_adapter):
        raise UserError(f"model.path={path}: no config.json there; give a model folder, as save_pretrained writes it")
    if is_folder:
        return str(folder), True
    if is_file:
        raise UserError(f"model.path={path}: a file; give the model's folder, or a file whose name ends with .gguf")
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: no such folder")
    return path, not hub.hub_reachable()


def model_name(cfg: ModelConfig) -> str:
    """A short name for tables: a bundled model's own, or the last part of the path."""
    model = find_bundled(cfg.path)
    return model.name if model else Path(cfg.path).name.removesuffix(".gguf")


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


def weights_sample(model: nn.Module) -> dict[str, str]:
    """Digests that identify a model's weights, also after a conversion to another floating-point type.

    For each type: the sha256 of 64 evenly spaced values of every parameter, rounded to that type. `dtype`: the type
    that the FFNs have. Takes milliseconds. A change that leaves all these values as they are, such as an edit of a few
    rows, is missed.
    """
    digests = {dtype: hashlib.sha256() for dtype in DTYPES}
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        for dtype, digest in digests.items():
            digest.update(f"{name} {tuple(parameter.shape)};".encode())
            digest.update(raw_bytes(values.to(getattr(torch, dtype))))
    own = str(find_ffns(model)[0].dtype).removeprefix("torch.")
    return {dtype: digest.hexdigest() for dtype, digest in digests.items()} | {"dtype": own}


class OtherWeights(NamedTuple):
    """How a model differs from the one that a codebook was fitted with."""

    line: str  # names both models
    condition: str  # for tables


def other_weights(model: nn.Module, made: dict) -> OtherWeights | None:
    """How a model's weights differ from those that a codebook was fitted with; None if they agree, or it is not known.

    made: the codebook's provenance. Weights of two types are compared after rounding to the coarser one. A codebook of
    version 0.1 has only a digest of all weights, which takes seconds to compute for a large model. That digest also
    covers the weights' type and the configuration with transformers' defaults. So if it differs, the weights may still
    be the same, and the condition says `perhaps`.
    """
    condition = "other than fitted"
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    if fitted := made.get("weights_sample"):
        own = weights_sample(model)
        if any(fitted[dtype] == own[dtype] for dtype in (fitted["dtype"], own["dtype"])):
            return None
        before, now = fitted[fitted["dtype"]], own[own["dtype"]]
    else:
        before = made.get("patterns", {}).get("weights")
        now = before and weights_digest(cast("PreTrainedModel", model))
        if before == now:
            return None
        condition = f"perhaps {condition}"
    name = cast("PreTrainedModel", model).config.name_or_path or type(model).__name__
    models = f"{made.get('model', 'another model')} (weights {before[:12]}), this is {name} (weights {now[:12]})"
    fitted_bits, bits = made.get("ffn_bits", FULL_BITS), mean_bits(find_ffns(model))
    if fitted_bits != bits:
        models += f"; its FFNs were stored at {fitted_bits:.2f} bits, these at {bits:.2f} (see apc.quantise_ffns)"
    return OtherWeights(f"weights {condition}: the codebook was fitted with {models}", condition)


def batch_windows(cfg: Config, device: torch.device) -> int:
    """Windows in one forward pass."""
    return cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)
