"""Loads a causal language model and finds its gated feed-forward networks (FFNs).

An FFN here is down(act(gate(x)) * up(x)), with gate and up as two linear layers (Llama, Mistral, Qwen, Gemma, SmolLM) or fused
into one (Phi-3). `FFNHooks` lets a visitor read, and change, the tensors at every site of every layer.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from apc import assets, text
from apc.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SITES = ("gate", "up", "neuron", "down")
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")  # in a model's configuration


@dataclass(frozen=True)
class ModelConfig:
    path: str = "bundled"  # `bundled`, a Hugging Face id, a model folder, or a .gguf file
    dtype: str = "auto"  # float32, bfloat16, float16; auto: as stored (a .gguf file: float32)
    device: str = "auto"  # cpu, cuda, cuda:N; auto: the GPU where there is one
    device_map: str | None = None  # auto: one process spreads the layers over all GPUs, for a model too large for one; null: all on `device`
    revision: str | None = None  # branch, tag or commit of a Hugging Face id
    trust_remote_code: bool = False  # run code that the model's repository brings along

    def __post_init__(self):
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"model.dtype={self.dtype}: not a data type; choose auto, {', '.join(DTYPES)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"model.device={self.device}: not a device; choose auto, cpu, cuda or cuda:N")
        if self.device_map not in (None, "auto"):
            raise UserError(f"model.device_map={self.device_map}: choose auto or null")
        if self.device_map and Path(self.path).suffix == ".gguf":
            raise UserError("model.device_map=auto: a .gguf file is unpacked on one device; give a model folder: model.path=FOLDER")


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a `model.device` value means on this machine; `cuda` is the rank's own GPU. Raises UserError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank)
    if index >= torch.cuda.device_count():
        raise UserError(f"model.device={name}: this machine has {torch.cuda.device_count()} CUDA devices that PyTorch sees; use model.device=cpu")
    return torch.device("cuda", index)


def load_model(cfg: ModelConfig, device: torch.device) -> tuple[nn.Module, object]:
    """The model in evaluation mode on `device` (with a device map: at least its first layer), and its tokenizer. Raises UserError where it can't be had,
    has no gated FFN, or its map does not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(cfg.path).expanduser()
    dtype = DTYPES.get(cfg.dtype, "auto")
    if path.suffix == ".gguf":
        model, tokenizer = assets.load_gguf(path, torch.float32 if dtype == "auto" else dtype), assets.load_gguf_tokenizer(path)
    else:
        source, local_only = (str(assets.bundled_model()), True) if cfg.path == "bundled" else find_model(cfg.path)
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
        _check_map(model, home_of(ffns), device)
    else:
        model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def _check_map(model: nn.Module, home: torch.device, device: torch.device) -> None:
    """Raises UserError unless all weights are where they are used, and the first layer on `device`."""
    away = sorted({name.rpartition(".")[0] for name, value in model.named_parameters() if value.is_meta})
    if away:
        raise UserError(f"model.device_map=auto: the GPUs have no room for {away[0]} and {len(away) - 1} more of its parts; use more GPUs or a smaller type")
    if home != device:
        raise UserError(f"model.device_map=auto: the first layer is on {home}, in place of {device}; leave model.device=auto")


def find_model(path: str) -> tuple[str, bool]:
    """(folder or hub id, whether only this machine is asked for it) of a `model.path` that is neither bundled nor a .gguf file.

    Raises UserError for a folder that is not there.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder), True
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: no such folder")
    return path, not text.hub_reachable()


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


@dataclass(frozen=True)
class GatedFFN:
    """One layer's FFN: down(act(gate(x)) * up(x)); `gate_up` is set instead of `gate` and `up` where they are fused."""

    name: str
    module: nn.Module
    down: nn.Linear
    gate: nn.Linear | None = None
    up: nn.Linear | None = None
    gate_up: nn.Linear | None = None

    @property
    def hidden_size(self) -> int:
        return self.down.out_features

    @property
    def width(self) -> int:
        return self.down.in_features

    def projection(self, name: str) -> Tensor:
        """The weights of `gate` or `up`, [D, E]."""
        if self.gate_up is None:
            return getattr(self, name).weight
        return self.gate_up.weight.chunk(2)[("gate", "up").index(name)]

    def site_width(self, site: str) -> int:
        return self.hidden_size if site == "down" else self.width

    def output_norms(self) -> Tensor:
        """‖W_down[:, i]‖₂ of every neuron i, float32 [D]: what a unit of neuron i moves in the residual stream."""
        return torch.linalg.vector_norm(self.down.weight.float(), dim=0)


def home_of(ffns: list[GatedFFN]) -> torch.device:
    """Where the first layer is, and all that visitors see; other layers may lie on other devices."""
    return ffns[0].down.weight.device


def check_config(config) -> None:
    """Raises UserError if a model's configuration says that it is a mixture of experts or that its weights are packed."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    inner = config.get_text_config()
    experts = max((getattr(inner, key, None) or 0) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))
    if experts > 1:
        raise UserError(f"{kind}: a mixture of experts ({experts} experts) is not supported; choose a model with one gated FFN a layer")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not _is_dequantised(quantised):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        raise UserError(f"{kind}: its weights are packed ({getattr(method, 'value', method)}); load a float32, bfloat16 or float16 copy")


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """The model's gated FFNs in layer order. Raises UserError for a mixture of experts, packed weights, or no gated FFN."""
    kind = type(model).__name__
    check_config(model.config)
    found = []
    for name, module in model.named_modules():
        parts = {key: getattr(module, key, None) for key in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")}
        split = isinstance(parts["gate_proj"], nn.Module) and isinstance(parts["up_proj"], nn.Module)
        fused = isinstance(parts["gate_up_proj"], nn.Module)
        if not isinstance(parts["down_proj"], nn.Module) or not (split or fused):
            continue
        linears = [parts["gate_up_proj"]] if fused else [parts["gate_proj"], parts["up_proj"]]
        for linear in [*linears, parts["down_proj"]]:
            if not isinstance(linear, nn.Linear) or linear.weight.dtype not in DTYPES.values():
                raise UserError(
                    f"{kind}: {name} holds a {type(linear).__name__} of {getattr(getattr(linear, 'weight', None), 'dtype', 'no weight')}, "
                    "packed weights are not supported; load a float32, bfloat16 or float16 copy"
                )
        names = dict(gate_up=linears[0]) if fused else dict(gate=linears[0], up=linears[1])
        found.append(GatedFFN(name, module, parts["down_proj"], **names))
    if not found:
        raise UserError(f"{kind}: no gated FFN found (modules gate_proj/up_proj/down_proj or gate_up_proj/down_proj); choose such a model")
    if len({(ffn.hidden_size, ffn.width) for ffn in found}) > 1:
        widths = sorted({ffn.width for ffn in found})
        raise UserError(f"{kind}: FFN widths differ by layer ({widths}), which is not supported; choose a model with one width")
    return found


def _is_dequantised(quantised) -> bool:
    """A GGUF file that was unpacked on loading leaves its quantization config behind; nothing is packed any more."""
    if isinstance(quantised, dict):
        return bool(quantised.get("dequantize"))
    return bool(getattr(quantised, "dequantize", False))


class FFNVisitor(Protocol):
    """What `FFNHooks` calls during a forward pass, layer by layer."""

    def enter(self, layer: int, hidden: Tensor) -> None:
        """The FFN's input, [..., E]."""

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        """The tensor at a site, [..., D]; what is returned takes its place, None leaves it."""


class FFNHooks:
    """Calls a visitor with the input and the chosen sites of every FFN, in the order in which a forward pass reaches them: on the first layer's device,
    from where what it returns goes back to the layer's."""

    def __init__(self, ffns: list[GatedFFN], sites: list[str], visitor: FFNVisitor):
        self._handles = []
        self._home = home_of(ffns)
        for layer, ffn in enumerate(ffns):
            self._hook_layer(layer, ffn, sites, visitor)

    def _hook_layer(self, layer: int, ffn: GatedFFN, sites: list[str], visitor: FFNVisitor) -> None:
        def visit(site, values):
            changed = visitor.visit(layer, site, values.to(self._home))
            return None if changed is None else changed.to(values.device)

        def output_hook(site):
            return lambda _module, _inputs, output: visit(site, output)

        def fused_hook(_module, _inputs, output):
            halves = dict(zip(("gate", "up"), output.chunk(2, dim=-1), strict=True))
            changed = {site: visit(site, halves[site]) for site in ("gate", "up") if site in sites}
            if any(value is not None for value in changed.values()):
                return torch.cat([halves[site] if changed.get(site) is None else changed[site] for site in ("gate", "up")], dim=-1)
            return None

        def neuron_hook(_module, inputs):
            value = visit("neuron", inputs[0])
            return None if value is None else (value,)

        hook = self._handles.append
        hook(ffn.module.register_forward_pre_hook(lambda _module, inputs: visitor.enter(layer, inputs[0].to(self._home))))
        if ffn.gate_up is not None and {"gate", "up"} & set(sites):
            hook(ffn.gate_up.register_forward_hook(fused_hook))
        for site in ("gate", "up", "down"):
            linear = getattr(ffn, site)
            if site in sites and linear is not None:
                hook(linear.register_forward_hook(output_hook(site)))
        if "neuron" in sites:
            hook(ffn.down.register_forward_pre_hook(neuron_hook))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
