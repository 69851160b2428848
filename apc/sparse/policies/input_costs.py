"""Measures what it costs to read only part of an FFN's inputs: x of gate and up, h of down.

The cost of reading only the top share of x, or of h, in one layer is half the mean square of (change of the FFN's
output · gradient to the output), in nats, for labels drawn from the model: the Fisher information, as in Theis et al.,
2018. If a norm follows the FFN, as in Gemma, both are taken behind it. A norm ignores the length of its input, so the
gradient before it is orthogonal to the output, and dropping the whole output would seem to cost nothing.

Shape letters: n tokens, t sampled tokens, E hidden size, D neurons, L layers, J shares.
"""

from typing import Protocol

import torch
from torch import Tensor

from apc.data.ffn import first_device
from apc.data.hooks import FFNVisitor
from apc.sparse.policies.base import FitPass
from apc.utils import distributed

SKIPPED = [level / 10 for level in range(1, 11)]  # shares of the inputs that are not read


class InputRule(Protocol):
    """Which inputs a policy reads first, and what stands in for those that it skips."""

    completes: bool  # whether `completion` is called

    def input_scores(self, layer: int, hidden: Tensor) -> Tensor:
        """How much each input of gate and up counts, float32 [n, E]."""

    def neuron_scores(self, layer: int, values: Tensor) -> Tensor:
        """How much each input of down counts, float32 [n, D]."""

    def completion(self, layer: int, projection: str, skipped: Tensor) -> Tensor:
        """What is added to a projection's output, [n, D or E], given its skipped inputs [n, E or D]."""


class _CostVisitor(FFNVisitor):
    """Appends copies of some tokens to each FFN's input, which read fewer inputs, and compares their outputs.

    The model itself runs dense. fit: its `tokens` are copied; gradients: its `output_gradients`, [L, t, E]. costs: of
    each layer, float64 [2, J].
    """

    replaces_input = True

    def __init__(self, rule: InputRule, fit: FitPass, gradients: Tensor):
        self.rule, self.fit, self.tokens, self.gradients = rule, fit, fit.tokens, gradients
        self.costs: list[Tensor] = []

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, -2)
        self._shape, self._count = hidden.shape, len(flat)
        return self._with_copies(flat, self.rule.input_scores(layer, flat[self.tokens]))

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor:
        flat = values.squeeze(0)
        if site == "neuron":
            return self._with_copies(flat, self.rule.neuron_scores(layer, flat[self.tokens]))
        if self.rule.completes:  # the last copies are those that skip inputs of this projection
            added = self.rule.completion(layer, site, self._skipped).to(flat.dtype)
            flat = torch.cat([flat[: -len(added)], flat[-len(added) :] + added])
        if site != "down":
            return flat.unsqueeze(0)
        own = flat[: self._count]
        updates, copies = (self.fit.residual_update(layer, part).float() for part in (own, flat[self._count :]))
        changes = copies.unflatten(0, (2, len(SKIPPED), len(self.tokens))) - updates[self.tokens]
        nats = (changes * self.gradients[layer]).sum(-1).double()
        self.costs.append(nats.square().mean(-1) / 2)
        return own.view(*self._shape[:-1], own.shape[-1])

    def _with_copies(self, flat: Tensor, scores: Tensor) -> Tensor:
        """values [n, D] and, for each share of `SKIPPED`, copies of the tokens without their lowest scores [t, D]."""
        ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
        skipped = torch.stack([ranks < round(share * ranks.shape[-1]) for share in SKIPPED])
        values = flat[self.tokens].expand_as(skipped)
        self._skipped = values.masked_fill(~skipped, 0).flatten(0, 1)
        return torch.cat([flat, values.masked_fill(skipped, 0).flatten(0, 1)]).unsqueeze(0)


def costs(fit: FitPass, rule: InputRule) -> Tensor:
    """The cost of skipping each share of `SKIPPED` in one layer, in nats per token: float64 [L, 2, J], on the host.

    The same on any number of ranks, because windows are summed in their order.
    """
    shape = len(fit.windows), len(fit.ffns), 2, len(SKIPPED)
    found = torch.zeros(shape, dtype=torch.float64, device=first_device(fit.ffns))
    inputs = (["gate", "up"] if fit.ffns[0].gated else ["up"]) if rule.completes else []
    for window in fit.own_windows():
        visitor = _CostVisitor(rule, fit, fit.output_gradients(window))
        fit.visit(window, visitor, [*inputs, "neuron", "down"])
        found[window] = torch.stack(visitor.costs)
    return distributed.all_sum(found).cpu().mean(0)
