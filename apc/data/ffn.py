"""Finds the gated feed-forward networks (FFNs) of a model, and hooks that read or change their values."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apc.config.schema import DTYPES
from apc.utils.errors import UserError

_FLOATS = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True)
class GatedFFN:
    """One layer's FFN: down(act(gate(x)) * up(x)). Where gate and up are fused, `gate_up` is set instead of both."""

    name: str
    module: nn.Module
    down: nn.Linear
    gate: nn.Linear | None = None
    up: nn.Linear | None = None
    gate_up: nn.Linear | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the FFN's input and output."""
        return self.down.out_features

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.down.in_features

    def projection(self, name: str) -> Tensor:
        """Weights of `gate` or `up`, [D, E]."""
        if self.gate_up is None:
            return getattr(self, name).weight
        return self.gate_up.weight.chunk(2)[("gate", "up").index(name)]

    def site_width(self, site: str) -> int:
        """Number of values per token at a site."""
        return self.hidden_size if site == "down" else self.width

    def output_norms(self) -> Tensor:
        """‖W_down[:, i]‖₂ of every neuron i, float32 [D]: how far one unit of neuron i moves the residual stream."""
        return torch.linalg.vector_norm(self.down.weight.float(), dim=0)


def first_device(ffns: list[GatedFFN]) -> torch.device:
    """The first layer's device, where visitors get their tensors; other layers may be on other devices."""
    return ffns[0].down.weight.device


def check_config(config) -> None:
    """Raises UserError if a model's configuration is of a mixture of experts or has packed weights."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    inner = config.get_text_config()
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = max(getattr(inner, key, None) or 0 for key in keys)
    if experts > 1:
        raise UserError(
            f"{kind}: a mixture of experts ({experts} experts) is not supported; "
            "choose a model with one gated FFN per layer"
        )
    packing = getattr(config, "quantization_config", None)
    if packing is not None and not _entry(packing, "dequantize"):  # true for a GGUF file that was unpacked on loading
        method = _entry(packing, "quant_method")
        raise UserError(
            f"{kind}: its weights are packed ({getattr(method, 'value', method)}); "
            "load a float32, bfloat16 or float16 copy"
        )


def _entry(packing: object, key: str) -> object:
    """An entry of a quantization config, which is a dictionary or an object; None if it is missing."""
    return packing.get(key) if isinstance(packing, dict) else getattr(packing, key, None)


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """The model's gated FFNs in layer order.

    Raises UserError for a mixture of experts, packed weights, no gated FFN, or widths that differ by layer.
    """
    kind = type(model).__name__
    check_config(model.config)
    ffns = []
    for name, module in model.named_modules():
        children = {key: child for key, child in module.named_children() if key.endswith("_proj")}
        parts = ("gate_up", "down") if "gate_up_proj" in children else ("gate", "up", "down")
        if all(f"{part}_proj" in children for part in parts):
            linears = {part: _float_linear(children[f"{part}_proj"], f"{kind}: {name}") for part in parts}
            ffns.append(GatedFFN(name, module, **linears))
    if not ffns:
        raise UserError(
            f"{kind}: no gated FFN found (modules gate_proj/up_proj/down_proj or gate_up_proj/down_proj); "
            "choose a model with gated FFNs"
        )
    if len({(ffn.hidden_size, ffn.width) for ffn in ffns}) > 1:
        widths = sorted({ffn.width for ffn in ffns})
        raise UserError(
            f"{kind}: FFN widths differ by layer ({widths}), which is not supported; choose a model with one width"
        )
    return ffns


def _float_linear(module: nn.Module, where: str) -> nn.Linear:
    """The module itself. Raises UserError unless it is a linear layer with weights in a floating-point type."""
    if not isinstance(module, nn.Linear) or module.weight.dtype not in _FLOATS:
        dtype = getattr(getattr(module, "weight", None), "dtype", "no weight")
        raise UserError(
            f"{where} holds a {type(module).__name__} of {dtype}, packed weights are not supported; "
            "load a float32, bfloat16 or float16 copy"
        )
    return module


class FFNVisitor(Protocol):
    """Receives tensors from `FFNHooks` during a forward pass, layer by layer."""

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Receives the FFN's input, [..., E]."""
        return None

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        """Receives the values at a site, [..., D]. Returns replacement values, or None to keep them."""


class FFNHooks:
    """Calls a visitor with the input and the chosen sites of every FFN, in the order of the forward pass.

    The visitor gets all tensors on the first layer's device; the values that it returns go back to the layer's own.
    """

    def __init__(self, ffns: list[GatedFFN], sites: list[str], visitor: FFNVisitor):
        self._handles: list[RemovableHandle] = []
        self._device = first_device(ffns)
        for layer, ffn in enumerate(ffns):
            self._hook_layer(layer, ffn, sites, visitor)

    def _hook_layer(self, layer: int, ffn: GatedFFN, sites: list[str], visitor: FFNVisitor) -> None:
        def visit(site: str, values: Tensor) -> Tensor | None:
            changed = visitor.visit(layer, site, values.to(self._device))
            return None if changed is None else changed.to(values.device)

        def input_hook(_module, inputs):
            visitor.enter(layer, inputs[0].to(self._device))

        def output_hook(site: str):
            return lambda _module, _inputs, output: visit(site, output)

        def fused_hook(_module, _inputs, output):
            halves = dict(zip(("gate", "up"), output.chunk(2, dim=-1), strict=True))
            changed = {site: visit(site, halves[site]) for site in halves if site in sites}
            changed = {site: values for site, values in changed.items() if values is not None}
            return torch.cat(list((halves | changed).values()), dim=-1) if changed else None

        def neuron_hook(_module, inputs):
            values = visit("neuron", inputs[0])
            return None if values is None else (values,)

        add = self._handles.append
        add(ffn.module.register_forward_pre_hook(input_hook))
        if ffn.gate_up is not None and {"gate", "up"} & set(sites):
            add(ffn.gate_up.register_forward_hook(fused_hook))
        for site in ("gate", "up", "down"):
            linear = getattr(ffn, site)
            if site in sites and linear is not None:
                add(linear.register_forward_hook(output_hook(site)))
        if "neuron" in sites:
            add(ffn.down.register_forward_pre_hook(neuron_hook))

    def remove(self) -> None:
        """Removes all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
