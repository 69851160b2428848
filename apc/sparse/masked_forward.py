"""Dense forward passes whose activations are masked: they show a policy's quality, not its speed.

Shape letters: n tokens, E hidden size, D neurons at a site.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.collect.patterns import Importance
from apc.data.ffn import FFN, activation_function
from apc.data.hooks import FFNHooks, FFNVisitor
from apc.sparse.policies import MaskDecision, MaskInputs, MaskPolicy, Meter
from apc.utils.errors import UserError


def parts_of(ffn: FFN) -> dict[str, nn.Module]:
    """The modules in an FFN by name."""
    return dict(ffn.module.named_children())


def check_parts(ffn: FFN, parts: dict[str, nn.Module]) -> None:
    """Raises UserError if another module, such as an adapter, has taken the place of one of an FFN's parts."""
    for name, part in parts.items():
        present = ffn.module._modules.get(name)
        if present is not part:
            kind = f"{type(present).__module__}.{type(present).__qualname__}"
            problem = f"its {name} was replaced after sparsify (by {kind})"
            advice = "merge adapters into the weights (merge_and_unload), then call apc.sparsify again"
            raise UserError(f"{ffn.name}: {problem}; {advice}")


@dataclass
class ForwardReader(FFNVisitor):
    """An `FFNVisitor` that collects what policies read during a forward pass; subclasses decide the masks in `see`."""

    ffns: list[FFN]
    codebook: Codebook
    lookahead: int = 0
    sees_gate: bool = False
    changes_output: bool = False  # whether a decision may have an output delta (at the site `neuron` only)

    def __post_init__(self):
        self._measure = Importance(self.ffns)
        self._inputs: dict[int, Tensor] = {}
        self._delta: Tensor | None = None
        self._gate: Tensor | None = None

    def hook(self) -> FFNHooks:
        """Hooks that call this reader in the model's forward passes, until they are removed."""
        sites = list(self.codebook.sites) + ["gate"] * self.sees_gate + ["down"] * self.changes_output
        return FFNHooks(self.ffns, [*sites, *(site for site in self.more_sites() if site not in sites)], self)

    def more_sites(self) -> list[str]:
        """Further sites that a subclass visits."""
        return []

    def enter(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Keeps the FFN input [..., E] for this layer and those that look back to it."""
        if layer == 0 or self.route is not None:
            self._inputs.clear()
        self._inputs[layer] = hidden.flatten(0, -2)
        if layer - self.lookahead - 1 > 0:
            self._inputs.pop(layer - self.lookahead - 1, None)
        return None

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        """Masks values [..., D] at a site, or adds the output delta at down; None leaves them as they are."""
        flat = values.flatten(0, -2)
        if site == "gate" and self.sees_gate:
            self._gate = activation_function(self.ffns[layer])(flat)
            return None
        if site == "down" and self.changes_output:
            return None if self._delta is None else (flat + self._delta.to(flat.dtype)).view_as(values)
        tokens = None if self.route is None else self.route.tokens
        ffn = self.ffns[layer]
        inputs = MaskInputs(layer, site, flat, self._inputs, self.codebook, self._measure, ffn, self._gate, tokens)
        decision = self.see(inputs)
        if decision is None:
            return None
        self._delta = decision.output_delta
        return self.apply(flat, decision.mask).view_as(values)

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        """values [n, D], set to zero (also NaN) where the mask bool [n, D] or [1, D] is False."""
        return values.masked_fill(~mask, 0)

    def see(self, tokens: MaskInputs) -> MaskDecision | None:
        """The decision for some tokens, or None to leave their activations as they are."""
        raise NotImplementedError


class MaskedForward(ForwardReader):
    """Applies a policy's masks; a meter, if given, measures them."""

    def __init__(self, ffns: list[FFN], policy: MaskPolicy, meter: Meter | None = None):
        super().__init__(ffns, policy.codebook, policy.lookahead, policy.sees_gate, policy.changes_output)
        self.policy, self.meter = policy, meter
        self.replaces_input = policy.masks_input
        self._parts = [parts_of(ffn) for ffn in ffns]

    def more_sites(self) -> list[str]:
        """The projections whose outputs the policy adds to."""
        projections = ["gate", "up"] if self.ffns[0].gated else ["up"]
        return projections if self.policy.adds_to_projections else []

    def enter(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Keeps the FFN input, and masks it if the policy does.

        Raises UserError if the FFN's parts were replaced: masks would miss the new ones.
        """
        check_parts(self.ffns[layer], self._parts[layer])
        super().enter(layer, hidden)
        if not self.policy.masks_input:
            return None
        kept = self.policy.input_mask(layer, self._inputs[layer])
        return self._inputs[layer].masked_fill(~kept, 0).view_as(hidden)

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        """Masks values [..., D] at a site, or adds what the policy adds to gate, up or down; None leaves them."""
        if not self.policy.adds_to_projections or site not in ("gate", "up"):
            return super().visit(layer, site, values)
        updated = values + self.policy.projection_delta(layer, site, self._inputs[layer]).view_as(values)
        if site == "gate" and self.sees_gate:
            super().visit(layer, site, updated)
        return updated

    def see(self, tokens: MaskInputs) -> MaskDecision:
        """The policy's decision."""
        decision = self.policy.decide(tokens)
        if self.meter is not None:
            self.meter.add(tokens, decision)
        return decision
