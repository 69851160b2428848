"""Finds the feed-forward networks (FFNs) of a model, and checks that each forward pass runs them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apc.config.schema import DTYPES
from apc.data.dequantise import advice, is_torchao, stored_by
from apc.utils.errors import UserError

_FLOATS = tuple(getattr(torch, name) for name in DTYPES)


Linear = nn.Linear | Conv1D  # GPT-2's `Conv1D` is a linear layer with transposed weights

# The names of an FFN's linear layers in model families. Gate and up may be fused in one layer, or there is no gate. A
# module is an FFN if it has all names of a row; the first such row applies.
_NAMES = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},  # Llama, Mistral, Qwen, Gemma, SmolLM and most others
    {"gate_up": "gate_up_proj", "down": "down_proj"},  # Phi-3, GLM
    {"gate_up": "input_linear", "down": "output_linear"},  # Granite
    {"gate_up": "Wi", "down": "Wo"},  # ModernBERT decoder
    {"gate": "w1", "up": "w3", "down": "w2"},  # LFM2
    {"gate": "proj_up_gate", "up": "proj_up", "down": "proj_down"},  # xLSTM
    {"up": "up_proj", "down": "down_proj"},  # Nemotron, Arcee, Apertus, MPT
    {"up": "fc1", "down": "fc2"},  # OPT, Phi
    {"up": "c_fc", "down": "c_proj"},  # GPT-2, GPT-Neo, StarCoder2
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},  # GPT-NeoX, BLOOM, Falcon
    {"up": "fc_in", "down": "fc_out"},  # GPT-J, CodeGen
)


_OTHER_EXPERTS = "experts of this form are not supported; choose another model"


@dataclass(frozen=True)
class FFN:
    """One layer's FFN, or one expert of it: down(act(gate(x)) * up(x)), or down(act(up(x))) if it has no gate.

    module: the module that holds its weights.
    """

    name: str
    module: nn.Module

    @property
    def down_matrix(self) -> Tensor:
        """Weights of `down`, [E, D]."""
        raise NotImplementedError

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        raise NotImplementedError

    def projection(self, name: str) -> Tensor:
        """Weights of `gate` or `up`, [D, E]."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.down_matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return self.down_matrix.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the FFN's input and output."""
        return self.down_matrix.shape[0]

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.down_matrix.shape[1]

    def site_width(self, site: str) -> int:
        """Number of values per token at a site."""
        return self.hidden_size if site == "down" else self.width

    def output_norms(self) -> Tensor:
        """‖W_down[:, i]‖₂ of every neuron i, float32 [D]: how far one unit of neuron i moves the residual stream."""
        return torch.linalg.vector_norm(self.down_matrix.float(), dim=0)


@dataclass(frozen=True)
class LayerFFN(FFN):
    """An FFN of linear layers, which are children of `module`. Where gate and up are fused, `gate_up` has both."""

    down: Linear
    up: Linear | None = None
    gate: Linear | None = None
    gate_up: Linear | None = None

    @property
    def linears(self) -> list[Linear]:
        """The linear layers; the first of them reads the FFN's input."""
        return [part for part in (self.gate, self.gate_up, self.up, self.down) if part is not None]

    @property
    def down_matrix(self) -> Tensor:
        """Weights of `down`, [E, D]."""
        return _rows(self.down)

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.gate is not None or self.gate_up is not None

    def projection(self, name: str) -> Tensor:
        """Weights of `gate` or `up`, [D, E]."""
        if self.gate_up is None:
            return _rows(getattr(self, name))
        return _rows(self.gate_up).chunk(2)[("gate", "up").index(name)]

    def bias(self, name: str) -> Tensor | None:
        """Biases of `gate` or `up`, [D]; None if there are none."""
        if self.gate_up is None:
            return getattr(self, name).bias
        return None if self.gate_up.bias is None else self.gate_up.bias.chunk(2)[("gate", "up").index(name)]

    def linear(self, name: str, hidden: Tensor, weights: Tensor) -> Tensor:
        """`gate` or `up` of inputs [n, E] with other weights [D, E], of any type, and its own biases; [n, D]."""
        return F.linear(hidden, weights.to(hidden.dtype), self.bias(name))


@dataclass(frozen=True)
class Expert(FFN):
    """One of the experts that `module` holds: an FFN that gets only the tokens routed to it.

    `module` holds the weights of all experts, with gate and up fused. Attributes that transformers sets on it describe
    them: has_gate, has_bias, is_transposed, and is_concatenated (gate, then up; if false, their rows alternate).
    """

    index: int

    @property
    def down_matrix(self) -> Tensor:
        """Weights of `down`, [E, D]."""
        return self._matrix("down_proj")

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return bool(self.module.has_gate)

    def _matrix(self, name: str) -> Tensor:
        """A weight with a row for each output."""
        weight = getattr(self.module, name)[self.index]
        return weight.T if self.module.is_transposed else weight

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self.module, f"{name}_bias")[self.index] if self.module.has_bias else None

    def projection(self, name: str) -> Tensor:
        """Weights of `gate` or `up`, [D, E]."""
        if not self.gated:
            return self._matrix("up_proj")
        both, part = self._matrix("gate_up_proj"), ("gate", "up").index(name)
        return both.chunk(2)[part] if self.module.is_concatenated else both[part::2]

    def neurons(self, hidden: Tensor) -> Tensor:
        """The values at `neuron`, [n, D], for FFN inputs [n, E]."""
        module: Any = self.module
        name = "gate_up_proj" if self.gated else "up_proj"
        values = F.linear(hidden, self._matrix(name), self._bias(name))
        return module._apply_gate(values) if self.gated else module.act_fn(values)

    def output(self, neurons: Tensor) -> Tensor:
        """The FFN's output [n, E] from the values at `neuron`."""
        return F.linear(neurons, self.down_matrix, self._bias("down_proj"))


def _rows(linear: Linear) -> Tensor:
    """A linear layer's weights with a row for each output."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def activation_function(ffn: FFN) -> Callable[[Tensor], Tensor]:
    """The activation function between an FFN's gate and its product with up. Raises UserError if it is not found."""
    for name in ("act_fn", "activation_fn"):
        if hasattr(ffn.module, name):
            return getattr(ffn.module, name)
    problem = (
        f"its activation function was not found ({type(ffn.module).__name__} has neither act_fn nor activation_fn)"
    )
    raise UserError(f"{ffn.name}: {problem}; choose kernel=None and a policy that does not read the gate")


def first_device(ffns: list[FFN]) -> torch.device:
    """The first layer's device, where visitors get their tensors; other layers may be on other devices."""
    return ffns[0].device


def check_config(config) -> None:
    """Raises UserError if a model's configuration says that its weights are packed."""
    if (method := stored_by(config)) is not None:
        kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise UserError(f"{kind}: {advice(method)}")


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of the model's text decoder, in layer order.

    In a mixture of experts they are the routed experts, layer by layer; other FFNs (dense layers, shared experts) are
    left alone. Raises UserError for experts of an unknown form, packed weights, no FFN, adapters on an FFN, linear
    layers that FFNs share, or widths that differ by layer.
    """
    kind = type(model).__name__
    if not hasattr(model, "config"):
        raise UserError(f"{kind}: not a Hugging Face model, which has a config")
    check_config(model.config)
    ffns: list[FFN] = []
    experts: list[FFN] = []
    for name, module in _decoder_modules(model):
        children = dict(module.named_children())
        experts += _experts(module, f"{kind}: {name}", name)
        names = next((names for names in _NAMES if set(names.values()) <= set(children)), None)
        if names is not None:
            parts = {part: _float_linear(children, child, f"{kind}: {name}") for part, child in names.items()}
            if "up" in parts and len(_rows(parts["up"])) == 2 * _rows(parts["down"]).shape[1]:  # Moshi's fc1
                parts["gate_up"] = parts.pop("up")
            ffns.append(LayerFFN(name, module, **parts))
    ffns = experts or ffns
    if not ffns:
        raise UserError(f"{kind}: no FFN found; docs/families.md lists the families that work")
    owners: dict[Tensor, FFN] = {}
    for ffn in ffns:
        for linear in ffn.linears if isinstance(ffn, LayerFFN) else ():
            if (other := owners.setdefault(linear.weight, ffn)) is not ffn:
                problem = f"{other.name} and {ffn.name} share a linear layer, which is not supported"
                raise UserError(f"{kind}: {problem}; choose another model")
    if len({(ffn.hidden_size, ffn.width) for ffn in ffns}) > 1:
        widths = sorted({ffn.width for ffn in ffns})
        raise UserError(
            f"{kind}: FFN widths differ by layer ({widths}), which is not supported; choose a model with one width"
        )
    return ffns


def _experts(module: nn.Module, where: str, name: str) -> list[FFN]:
    """The experts whose weights a module holds; empty if it holds none.

    Raises UserError if they do not have the form of transformers' own implementations of experts, or are packed.
    """
    kind = type(module).__name__
    if not re.search(r"(Experts|MoE|Moe|SparseMoeBlock)$", kind) or any(
        type(child).__name__.endswith("Experts") for child in module.children()
    ):
        return []
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if not all(hasattr(module, flag) for flag in flags) or getattr(module, "has_post_expert_norm", False):
        raise UserError(f"{where} ({kind}): {_OTHER_EXPERTS}")
    weight: Any = module.down_proj
    if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.dtype not in _FLOATS:
        raise UserError(f"{where} ({kind}): its weights are packed; load a float32, bfloat16 or float16 copy")
    return [Expert(f"{name}.{index}", module, index=index) for index in range(len(weight))]


def _decoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the text decoder, with their names in the model."""
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(decoder, PreTrainedModel):  # BERT calls the head's last layer its decoder
        decoder = whole.base_model
    inside = set(decoder.modules())
    encoders = tuple(type(getattr(decoder.config, name, None)) for name in ("vision_config", "audio_config"))
    for part in decoder.modules():
        if isinstance(part, PreTrainedModel) and isinstance(part.config, encoders):
            inside -= set(part.modules())
    return ((name, module) for name, module in model.named_modules() if module in inside)


def check_sites(ffns: list[FFN], sites: list[str]) -> None:
    """Raises UserError if the sites need a gate that the model does not have, or projections of experts."""
    if has_experts(ffns) and list(sites) not in ([], ["neuron"]):
        raise UserError(f"sites={sites}: the model is a mixture of experts, which needs sites=[neuron]")
    if "gate" in sites and not ffns[0].gated:
        raise UserError(f"sites={sites}: the model's FFNs have no gate; choose [neuron], or some of [up,down]")


def has_experts(ffns: list[FFN]) -> bool:
    """Whether the FFNs are the experts of a mixture."""
    return isinstance(ffns[0], Expert)


def expert_modules(ffns: list[FFN]) -> dict[nn.Module, int]:
    """The modules that hold experts, in layer order, each with the index of its first expert in `ffns`."""
    return {ffn.module: place for place, ffn in enumerate(ffns) if isinstance(ffn, Expert) and not ffn.index}


def check_calls(model: nn.Module, ffns: list[FFN]) -> int:
    """The number of experts that each token is routed to, 0 without experts.

    Raises UserError unless a forward pass runs each FFN (or all experts of a layer) once, in layer order, on all
    tokens, and experts compute what `Expert` does. Runs the model on two tokens.
    """
    calls: list[tuple[int, int]] = []
    slots: set[int] = set()
    base: Any = model.base_model
    modules = expert_modules(ffns)
    called = list(modules) or [ffn.linears[0] for ffn in ffns if isinstance(ffn, LayerFFN)]
    names = [ffns[place].name.rpartition(".")[0] for place in modules.values()] or [ffn.name for ffn in ffns]

    def record(layer: int):
        def hook(_module, inputs: tuple, named: dict) -> None:
            hidden, *rest = (*inputs, *named.values())
            calls.append((layer, hidden.numel() // hidden.shape[-1]))
            if modules:
                slots.add(rest[0].shape[-1])

        return hook

    handles = [one.register_forward_pre_hook(record(layer), with_kwargs=True) for layer, one in enumerate(called)]
    _probe(base, ffns, handles)
    kind, order = type(model).__name__, [layer for layer, _ in calls]
    for layer, name in enumerate(names):
        if order.count(layer) != 1:
            raise UserError(
                f"{kind}: a forward pass runs {name} {order.count(layer)} times; layers that are looped, shared or "
                "unused are not supported; choose a model that runs each layer once"
            )
    if order != sorted(order):
        raise UserError(f"{kind}: a forward pass does not run its layers in order; choose another model")
    if any(tokens != 2 for _, tokens in calls):
        raise UserError(f"{kind}: some layers run only on some tokens, which is not supported; choose another model")
    if len(slots) > 1 or len({len(cast(Tensor, module.down_proj)) for module in modules}) > 1:
        raise UserError(f"{kind}: its layers have different numbers of experts, which is not supported")
    for place in modules.values():
        _check_experts(kind, ffns[place], max(slots))
    return max(slots, default=0)


def _probe(base: Any, ffns: list[FFN], handles: list[RemovableHandle]) -> None:
    """Runs the model's body on two tokens, and then removes the hooks."""
    try:
        with torch.inference_mode():
            base(input_ids=torch.tensor([[1, 2]], device=first_device(ffns)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def norms_behind(model: nn.Module, ffns: list[FFN]) -> list[nn.Module | None]:
    """For each FFN, the norm that reads its output before that joins the residual stream, as in Gemma 2 and 3; or None.

    It is a module whose parameters are vectors and whose input is the output of `down`. Runs the model on two tokens.
    """
    base: Any = model.base_model
    outputs: dict[int, Tensor] = {}  # by FFN
    norms: list[nn.Module | None] = [None] * len(ffns)

    def keep(place: int):
        return lambda _module, _inputs, output: outputs.update({place: output})

    def look(module: nn.Module, inputs: tuple) -> None:
        for place, output in outputs.items():
            if inputs and inputs[0] is output:
                norms[place] = module

    handles = [ffn.down.register_forward_hook(keep(i)) for i, ffn in enumerate(ffns) if isinstance(ffn, LayerFFN)]
    for module in base.modules():
        if {value.dim() for value in module.parameters()} == {1}:
            handles.append(module.register_forward_pre_hook(look))
    _probe(base, ffns, handles)
    return norms


def _check_experts(kind: str, expert: FFN, slots: int) -> None:
    """Raises UserError unless a layer's experts compute what `routed` computes; compares them on random inputs."""
    module: Any = expert.module
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, expert.hidden_size, generator=generator).to(module.down_proj)
    index = torch.stack([torch.randperm(len(module.down_proj), generator=generator)[:slots] for _ in range(4)])
    weights = torch.rand(4, slots, generator=generator).to(module.down_proj)
    index = index.to(hidden.device)
    with torch.inference_mode():
        own, ours = (call(hidden, index, weights).float() for call in (module, routed(module, expert.name)))
    problem = float((own - ours).norm() / own.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not problem < (1e-3 if hidden.dtype == torch.float32 else 3e-2):
        name = type(module).__name__
        raise UserError(f"{kind}: {expert.name} ({name}): it does more than apply its weights, which is not supported")


class Route(NamedTuple):
    """Which tokens of a forward pass are routed to an expert.

    tokens: int64 [n]; slots: int64 [n], the expert's place among each token's experts.
    """

    tokens: Tensor
    slots: Tensor


def routed(
    module: nn.Module, name: str, change: Callable[[int, Expert, Route, Tensor, Tensor], Tensor] | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward function for the experts in `module`, which runs each expert in turn on its own tokens.

    change: called with the expert's index, the expert, its route, its input [n, E] and its values at `neuron` [n, D];
    returns the values that replace the last.
    """
    weight: Any = module.down_proj
    experts = [Expert(f"{name}.{index}", module, index=index) for index in range(len(weight))]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(experts):
            route = Route(*(top_k_index == index).nonzero(as_tuple=True))
            if not len(route.tokens):
                continue
            hidden = hidden_states[route.tokens]
            values = expert.neurons(hidden)
            if change is not None:
                values = change(index, expert, route, hidden, values)
            share = top_k_weights[route.tokens, route.slots].unsqueeze(1)
            output.index_add_(0, route.tokens, (expert.output(values) * share).to(output.dtype))
        return output

    return forward


def _float_linear(children: dict[str, nn.Module], child: str, where: str) -> Linear:
    """One of an FFN's modules. Raises UserError unless it is a linear layer with weights in a floating-point type."""
    module = children[child]
    if type(module).__name__.endswith("Experts"):
        raise UserError(f"{where} ({type(module).__name__}): {_OTHER_EXPERTS}")
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
    if is_torchao(module.weight):
        raise UserError(f"{where}: {advice('torchao')}")
    return module
