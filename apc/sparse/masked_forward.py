"""Forward passes under masks that multiply what was computed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from apc.cluster.codebook import Codebook
from apc.collect.patterns import Importance
from apc.data.ffn import FFNHooks, GatedFFN
from apc.sparse.policies import MaskDecision, MaskInputs, MaskPolicy


@dataclass
class ForwardReader:
    """An `FFNVisitor` that gathers what policies look at; subclasses decide in `see` what to do with it. changes_output: whether a choice may add to FFN outputs
    (at the site neuron only)."""

    ffns: list[GatedFFN]
    codebook: Codebook
    lookahead: int = 0
    reads_gate: bool = False
    changes_output: bool = False
    _inputs: dict[int, Tensor] = field(default_factory=dict)
    _delta: Tensor | None = None
    _gate: Tensor | None = None

    def __post_init__(self):
        self._measure = Importance(self.ffns)

    def hook(self) -> FFNHooks:
        return FFNHooks(
            self.ffns, list(self.codebook.sites) + ["gate"] * self.reads_gate + ["down"] * self.changes_output, self
        )

    def enter(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self._inputs.clear()
        self._inputs[layer] = hidden.flatten(0, -2)
        if layer - self.lookahead - 1 > 0:
            self._inputs.pop(layer - self.lookahead - 1, None)

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        flat = values.flatten(0, -2)
        if site == "gate" and self.reads_gate:
            module = self.ffns[layer].module
            self._gate = getattr(module, "act_fn", None) or module.activation_fn
            self._gate = self._gate(flat)
            return None
        if site == "down" and self.changes_output:
            return None if self._delta is None else (flat + self._delta.to(flat.dtype)).view_as(values)
        choice = self.see(MaskInputs(layer, site, flat, self._inputs, self.codebook, self._measure, self._gate))
        if choice is None:
            return None
        self._delta = choice.output_delta
        return self.apply(flat, choice.mask).view_as(values)

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        """values [n, D] where mask, bool [n, D] or [1, D], is True, else 0, even in place of NaN."""
        return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))

    def see(self, tokens: MaskInputs) -> MaskDecision | None:
        raise NotImplementedError  # every reader gives its own


class MaskedForward(ForwardReader):
    """Applies a policy's masks; a meter, if given, gets every mask with what it was measured against."""

    def __init__(self, ffns: list[GatedFFN], policy: MaskPolicy, meter=None):
        super().__init__(
            ffns,
            policy.codebook,
            policy.predictor.lookahead if policy.predictor else 0,
            policy.reads_gate,
            policy.changes_output,
        )
        self.policy, self.meter = policy, meter

    def see(self, tokens: MaskInputs) -> MaskDecision:
        choice = self.policy.decide(tokens)
        if self.meter is not None:
            self.meter.add(tokens, choice.mask)
        return choice
