"""The gated feed-forward networks (FFNs) of a model: finding them, and hooks that read or change what they compute."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from apc.config.schema import DTYPES
from apc.utils.errors import UserError

_FLOATS = tuple(getattr(torch, name) for name in DTYPES)


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


def first_device(ffns: list[GatedFFN]) -> torch.device:
    """Where the first layer is, and all that visitors see; other layers may lie on other devices."""
    return ffns[0].down.weight.device


def check_config(config) -> None:
    """Raises UserError if a model's configuration says that it is a mixture of experts or that its weights are packed."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    inner = config.get_text_config()
    experts = max(
        (getattr(inner, key, None) or 0)
        for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    )
    if experts > 1:
        raise UserError(
            f"{kind}: a mixture of experts ({experts} experts) is not supported; choose a model with one gated FFN a layer"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not _is_dequantised(quantised):
        method = (
            quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        )
        raise UserError(
            f"{kind}: its weights are packed ({getattr(method, 'value', method)}); load a float32, bfloat16 or float16 copy"
        )


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
            if not isinstance(linear, nn.Linear) or linear.weight.dtype not in _FLOATS:
                raise UserError(
                    f"{kind}: {name} holds a {type(linear).__name__} of {getattr(getattr(linear, 'weight', None), 'dtype', 'no weight')}, "
                    "packed weights are not supported; load a float32, bfloat16 or float16 copy"
                )
        names = dict(gate_up=linears[0]) if fused else dict(gate=linears[0], up=linears[1])
        found.append(GatedFFN(name, module, parts["down_proj"], **names))
    if not found:
        raise UserError(
            f"{kind}: no gated FFN found (modules gate_proj/up_proj/down_proj or gate_up_proj/down_proj); choose such a model"
        )
    if len({(ffn.hidden_size, ffn.width) for ffn in found}) > 1:
        widths = sorted({ffn.width for ffn in found})
        raise UserError(
            f"{kind}: FFN widths differ by layer ({widths}), which is not supported; choose a model with one width"
        )
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
        self._home = first_device(ffns)
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
                return torch.cat(
                    [halves[site] if changed.get(site) is None else changed[site] for site in ("gate", "up")], dim=-1
                )
            return None

        def neuron_hook(_module, inputs):
            value = visit("neuron", inputs[0])
            return None if value is None else (value,)

        hook = self._handles.append
        hook(
            ffn.module.register_forward_pre_hook(lambda _module, inputs: visitor.enter(layer, inputs[0].to(self._home)))
        )
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
