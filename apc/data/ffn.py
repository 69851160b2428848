"""Finds the feed-forward networks (FFNs) of a model, and hooks that read or change their values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apc.config.schema import DTYPES
from apc.utils.errors import UserError

_FLOATS = tuple(getattr(torch, name) for name in DTYPES)


Linear = nn.Linear | Conv1D  # GPT-2's `Conv1D` is a linear layer with transposed weights

# The names of an FFN's linear layers in model families. Gate and up may be fused in one layer, or there is no gate. The
# first row whose names a module has decides.
_NAMES = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},  # Llama, Mistral, Qwen, Gemma, SmolLM and most others
    {"gate_up": "gate_up_proj", "down": "down_proj"},  # Phi-3, GLM
    {"gate_up": "input_linear", "down": "output_linear"},  # Granite
    {"gate_up": "Wi", "down": "Wo"},  # ModernBERT decoder
    {"gate": "w1", "up": "w3", "down": "w2"},  # LFM2
    {"up": "up_proj", "down": "down_proj"},  # Nemotron, Arcee, Apertus, MPT
    {"up": "fc1", "down": "fc2"},  # OPT, Phi
    {"up": "c_fc", "down": "c_proj"},  # GPT-2, GPT-Neo, StarCoder2
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},  # GPT-NeoX, BLOOM, Falcon
    {"up": "fc_in", "down": "fc_out"},  # GPT-J, CodeGen
)


@dataclass(frozen=True)
class FFN:
    """One layer's FFN: down(act(gate(x)) * up(x)), or down(act(up(x))) if it has no gate.

    module: the module that has the linear layers as children. Where gate and up are fused, `gate_up` is set in place of
    both.
    """

    name: str
    module: nn.Module
    down: Linear
    up: Linear | None = None
    gate: Linear | None = None
    gate_up: Linear | None = None

    @property
    def linears(self) -> list[Linear]:
        """The linear layers; the first of them reads the FFN's input."""
        return [part for part in (self.gate, self.gate_up, self.up, self.down) if part is not None]

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.gate is not None or self.gate_up is not None

    @property
    def hidden_size(self) -> int:
        """Width of the FFN's input and output."""
        return _rows(self.down).shape[0]

    @property
    def width(self) -> int:
        """Number of neurons."""
        return _rows(self.down).shape[1]

    def projection(self, name: str) -> Tensor:
        """Weights of `gate` or `up`, [D, E]."""
        if self.gate_up is None:
            return _rows(getattr(self, name))
        return _rows(self.gate_up).chunk(2)[("gate", "up").index(name)]

    def site_width(self, site: str) -> int:
        """Number of values per token at a site."""
        return self.hidden_size if site == "down" else self.width

    def output_norms(self) -> Tensor:
        """‖W_down[:, i]‖₂ of every neuron i, float32 [D]: how far one unit of neuron i moves the residual stream."""
        return torch.linalg.vector_norm(_rows(self.down).float(), dim=0)


def _rows(linear: Linear) -> Tensor:
    """A linear layer's weights with a row for each output."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def first_device(ffns: list[FFN]) -> torch.device:
    """The first layer's device, where visitors get their tensors; other layers may be on other devices."""
    return ffns[0].down.weight.device


def check_config(config) -> None:
    """Raises UserError if a model's configuration is of a mixture of experts or has packed weights."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    inner = config.get_text_config()
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if experts := max(getattr(inner, key, None) or 0 for key in keys):
        _refuse_experts(kind, experts)
    packing = getattr(config, "quantization_config", None)
    if packing is not None and not _entry(packing, "dequantize"):  # true for a GGUF file that was unpacked on loading
        method = _entry(packing, "quant_method")
        raise UserError(
            f"{kind}: its weights are packed ({getattr(method, 'value', method)}); "
            "load a float32, bfloat16 or float16 copy"
        )


def _refuse_experts(kind: str, experts: int) -> None:
    """Raises UserError if there are several experts."""
    if experts > 1:
        raise UserError(
            f"{kind}: a mixture of experts ({experts} experts) is not supported; choose a model with one FFN per layer"
        )


def _entry(packing: object, key: str) -> object:
    """An entry of a quantization config, which is a dictionary or an object; None if it is missing."""
    return packing.get(key) if isinstance(packing, dict) else getattr(packing, key, None)


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of the model's text decoder, in layer order.

    Raises UserError for a mixture of experts, packed weights, no FFN, only some layers with one, adapters on an FFN, or
    widths that differ by layer.
    """
    kind = type(model).__name__
    check_config(model.config)
    ffns = []
    for name, module in _decoder_modules(model):
        children = dict(module.named_children())
        if type(module).__name__.endswith("Experts"):
            _refuse_experts(kind, getattr(module, "num_experts", 0) or len(children))
        names = next((names for names in _NAMES if set(names.values()) <= set(children)), None)
        if names is not None:
            parts = {part: _float_linear(children, child, f"{kind}: {name}") for part, child in names.items()}
            if "up" in parts and len(_rows(parts["up"])) == 2 * _rows(parts["down"]).shape[1]:  # Moshi's fc1
                parts["gate_up"] = parts.pop("up")
            ffns.append(FFN(name, module, **parts))
    if not ffns:
        raise UserError(f"{kind}: no FFN found; docs/your-own-model.md lists the families that work")
    if len({(ffn.hidden_size, ffn.width) for ffn in ffns}) > 1:
        widths = sorted({ffn.width for ffn in ffns})
        raise UserError(
            f"{kind}: FFN widths differ by layer ({widths}), which is not supported; choose a model with one width"
        )
    return ffns


def _decoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the text decoder, with their names in the model."""
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, PreTrainedModel):  # BERT calls the head's last layer its decoder
        decoder = whole.base_model
    inside = set(decoder.modules())
    return ((name, module) for name, module in model.named_modules() if module in inside)


def check_sites(ffns: list[FFN], sites: list[str]) -> None:
    """Raises UserError if the sites need a gate that the model does not have."""
    if "gate" in sites and not ffns[0].gated:
        raise UserError(f"sites={sites}: the model's FFNs have no gate; choose [neuron], or some of [up,down]")


def check_calls(model: nn.Module, ffns: list[FFN]) -> None:
    """Raises UserError unless a forward pass runs each FFN once, in layer order, on all tokens.

    Runs the model on two tokens.
    """
    calls: list[tuple[int, int]] = []
    base: Any = model.base_model

    def record(layer: int):
        return lambda _module, inputs: calls.append((layer, inputs[0].numel() // inputs[0].shape[-1]))

    handles = [ffn.linears[0].register_forward_pre_hook(record(layer)) for layer, ffn in enumerate(ffns)]
    try:
        with torch.inference_mode():
            base(input_ids=torch.tensor([[1, 2]], device=first_device(ffns)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    kind, order = type(model).__name__, [layer for layer, _ in calls]
    for layer, ffn in enumerate(ffns):
        if order.count(layer) != 1:
            raise UserError(
                f"{kind}: a forward pass runs {ffn.name} {order.count(layer)} times; layers that are looped, shared or "
                "unused are not supported; choose a model that runs each layer once"
            )
    if order != sorted(order):
        raise UserError(f"{kind}: a forward pass does not run its layers in order; choose another model")
    if any(tokens != 2 for _, tokens in calls):
        raise UserError(f"{kind}: some layers run only on some tokens, which is not supported; choose another model")


def _float_linear(children: dict[str, nn.Module], child: str, where: str) -> Linear:
    """One of an FFN's modules. Raises UserError unless it is a linear layer with weights in a floating-point type."""
    module = children[child]
    if hasattr(module, "base_layer"):
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        problem = f"its {child} has an adapter ({name}), which masks would miss"
        raise UserError(f"{where}: {problem}; merge adapters first: model = model.merge_and_unload()")
    if not isinstance(module, (nn.Linear, Conv1D)) or module.weight.dtype not in _FLOATS:
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

    def __init__(self, ffns: list[FFN], sites: list[str], visitor: FFNVisitor):
        check_sites(ffns, sites)
        self._handles: list[RemovableHandle] = []
        self._device = first_device(ffns)
        for layer, ffn in enumerate(ffns):
            self._hook_layer(layer, ffn, sites, visitor)

    def _hook_layer(self, layer: int, ffn: FFN, sites: list[str], visitor: FFNVisitor) -> None:
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
        add(ffn.linears[0].register_forward_pre_hook(input_hook))
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
