"""Hooks that read or change the values of a model's FFNs during forward passes."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from apc.data.ffn import FFN, Expert, LayerFFN, Route, check_sites, expert_modules, first_device, routed


class FFNVisitor(Protocol):
    """Receives tensors from `FFNHooks` during a forward pass, FFN by FFN."""

    route: Route | None = None  # the tokens of the calls that follow; None: all tokens of the pass
    replaces_input: bool = False  # whether `enter` may replace the input; not in a mixture of experts

    def enter(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Receives the FFN's input, [..., E]. Returns the input that gate and up read instead, or None to keep it."""
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
        self._own_forwards = {module: module.__dict__.get("forward") for module in expert_modules(ffns)}
        for module, place in expert_modules(ffns).items():
            module.forward = self._routed(ffns[place], place, sites, visitor)
        for layer, ffn in enumerate(ffns):
            if isinstance(ffn, LayerFFN):
                self._hook_layer(layer, ffn, sites, visitor)

    def _routed(self, first: FFN, place: int, sites: list[str], visitor: FFNVisitor) -> Callable:
        """The forward of a layer's experts that calls the visitor."""

        def change(index: int, _expert: Expert, route: Route, hidden: Tensor, values: Tensor) -> Tensor:
            visitor.route = Route(route.tokens.to(self._device), route.slots.to(self._device))
            visitor.enter(place + index, hidden.to(self._device))
            changed = visitor.visit(place + index, "neuron", values.to(self._device)) if sites else None
            return values if changed is None else changed.to(values.device)

        return routed(first.module, first.name, change)

    def _hook_layer(self, layer: int, ffn: LayerFFN, sites: list[str], visitor: FFNVisitor) -> None:
        def visit(site: str, values: Tensor) -> Tensor | None:
            changed = visitor.visit(layer, site, values.to(self._device))
            return None if changed is None else changed.to(values.device)

        entered: list[tuple[Tensor, Tensor | None]] = []  # the input and its replacement, for the second of gate and up

        def input_hook(_module, inputs):
            hidden = inputs[0]
            if entered and entered[0][0] is hidden:
                replaced = entered.pop()[1]
            else:
                replaced = visitor.enter(layer, hidden.to(self._device))
                entered[:] = [(hidden, replaced)] if len(readers) > 1 else []
            return None if replaced is None else (replaced.to(hidden.device),)

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
        replaces_input = getattr(visitor, "replaces_input", False)  # visitors need not derive from FFNVisitor
        readers = ffn.linears[:-1] if replaces_input else ffn.linears[:1]
        for linear in readers:
            add(linear.register_forward_pre_hook(input_hook))
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
        for module, forward in self._own_forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        self._handles, self._own_forwards = [], {}
