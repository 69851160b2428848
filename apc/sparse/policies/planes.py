"""Ranks the neurons of an FFN that is stored at a few bits by the upper bit planes of its own gate and up.

Shape letters: n tokens, D neurons, L layers, P projections.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN, LayerFFN, activation_function, first_device
from apc.data.quantise import FULL_BITS, StoredFFN, mean_bits, neuron_bits, neuron_rows, stored
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.policies.base import FitPass, MaskDecision, MaskInputs, MaskPolicy, PolicyCost
from apc.sparse.policies.bounds import Dense
from apc.utils import distributed
from apc.utils.errors import UserError

_MOST_PLANES = 4  # that rank neurons: a fifth hardly changes an estimate
_CANDIDATES = (1.0, 0.85, 0.75, 0.65, 0.5)  # shares of neurons whose up is estimated
_TOKENS = 64  # of a layer's call on which rankings are compared, evenly spaced
_TOLERANCE = 0.03  # between two ways to compute a layer's neurons, relative: bfloat16 rounds


@dataclass(frozen=True)
class Ranking:
    """How many upper planes estimate neurons: `gate` for all neurons, then `up` for those with the largest gates.

    bits: of the stored weights. Without a gate, `up` for all neurons.
    """

    bits: int
    gate: int
    up: int


class BitPlanes(MaskPolicy):
    """Keeps the neurons whose importance reaches their layer's threshold, as the upper bits of gate and up tell it.

    Upper bit planes of gate are read for all neurons, which gives an estimate of |act(gate)|·‖W_down[:, i]‖. Where it
    reaches a first threshold, upper bit planes of up are read too, which makes it an estimate of the importance. Where
    that reaches the second threshold, the neuron is kept: its other planes and its row of down are read. So no copy is
    stored, and nothing is trained. Spared neurons are always kept.
    """

    name = "bit-planes"
    experts = False
    calibrated = True
    ranks_by_planes = True
    uses_codebook = False
    sites = ("neuron",)
    color, marker = "#661100", "8"

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        super().__init__(codebook, predictor, seed)
        found = codebook.calibrated[self.name]
        self.ranking = Ranking(*(int(found[each.name][0]) for each in fields(Ranking)))

    @classmethod
    def known_before_ffn(cls) -> bool:
        """False: no kernel reads bit planes."""
        return False

    @classmethod
    def check_ffns(cls, ffns: list[FFN], share: float) -> None:
        """Raises UserError if the FFNs are not stored at a few bits, or ranking takes all of the bytes."""
        form, budget = stored_form(ffns[0]), share * mean_bits(ffns)
        if not _kept_shares(ffns[0], budget):
            least = _ranking_bits(ffns[0], Ranking(form.bits, 1, 1), _CANDIDATES[-1])
            shares = (f"{each / FULL_BITS:.3g}" for each in (least, budget))
            problem = "reads over {} of the bytes of a 16-bit FFN to rank neurons, and may read {}".format(*shares)
            raise UserError(f"policies: {cls.name} {problem}; raise bytes")

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """The ranking's bits, gate and up, int64 [L] each, all equal; gate_thresholds and thresholds, float32 [L].

        The ranking, and the shares of neurons that pass, are those that capture most energy for the bytes. Values are
        counted for the thresholds while each token keeps its own top shares.
        """
        cls.check_ffns(fit.ffns, share)
        layers, device = fit.codebook.layers, first_device(fit.ffns)
        energy = _CapturedEnergy(_kept_shares(fit.ffns[0], share * mean_bits(fit.ffns)), device)
        fit.run(Dense(fit.codebook, None, 0), energy)
        (ranking, candidates), kept = energy.best()
        policy = _TopShares(fit.codebook, ranking, candidates, kept)
        counter = _Counter(policy, ThresholdFinder(layers, device), ThresholdFinder(layers, device))
        fit.run(policy, counter)
        counter.gates.narrow(torch.full((layers,), candidates, dtype=torch.float64))
        counter.scores.narrow(torch.full((layers,), kept, dtype=torch.float64))
        fit.run(policy, counter)
        found = {each.name: torch.full((layers,), getattr(ranking, each.name)) for each in fields(Ranking)}
        return found | {"gate_thresholds": counter.gates.thresholds(), "thresholds": counter.scores.thresholds()}

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons that reach both thresholds. Raises UserError if they are not stored as when calibrated."""
        if (stored_bits := stored_form(inputs.ffn).bits) != self.ranking.bits:
            problem = f"calibrated for FFNs at {self.ranking.bits} bits, these have {stored_bits}"
            advice = f"set model.ffn_bits={self.ranking.bits}, or train another run"
            raise UserError(f"policy {self.name}: {problem}; {advice}")
        gates, scores = estimates(inputs, self.ranking)
        candidates, mask = self.choose(inputs.layer, gates, scores)
        full = neuron_bits(inputs.ffn).to(mask.device)
        gate, up = (full - (self.ranking.bits - planes) for planes in (self.ranking.gate, self.ranking.up))
        bits = {"up": torch.where(mask, full, up * candidates)}
        read = {"up": candidates}
        if inputs.ffn.gated:
            bits["gate"], read["gate"] = torch.where(mask, full, gate), mask.new_ones(1, 1)
        return MaskDecision(mask, read=read, bits=bits)

    def choose(self, layer: int, gates: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Whose up is read, and who is kept, bool [n, D] each, from what `estimates` returns."""
        found = self.codebook.calibrated[self.name]
        candidates = gates >= found["gate_thresholds"][layer]
        return candidates, candidates & (scores >= found["thresholds"][layer])

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The norms of the columns of down."""
        return self.codebook.widths[site]

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """The products with these norms."""
        return self.codebook.widths[site]

    def cost(
        self, densities: dict[str, list[float]], read: Mapping[str, float], bits: Mapping[str, float]
    ) -> PolicyCost:
        """The cost as in the base class, but gate and up of kept neurons are multiplied twice."""
        cost, P = super().cost(densities, read, bits), self.codebook.projections
        kept = sum(densities["neuron"]) / len(densities["neuron"])
        return replace(cost, flops_share=cost.flops_share + (P - 1) / P * kept)


def stored_form(ffn: FFN) -> StoredFFN:
    """How an FFN is stored. Raises UserError if it is not stored at a few bits."""
    form = stored(ffn)
    if form is None:
        problem = "ranks neurons by bit planes, but the FFNs are not stored at a few bits"
        raise UserError(f"policy {BitPlanes.name}: {problem}; set model.ffn_bits, or call apc.quantise_ffns")
    return form


def estimates(inputs: MaskInputs, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Estimates by upper bit planes, float32 [n, D] each: |act(gate)| times the norm of down's column, and importance.

    Infinite for spared neurons. Without a gate, the first is infinite for all.
    """
    form, ffn, parts = stored_form(inputs.ffn), inputs.ffn, {}
    for name, planes in (("gate", ranking.gate), ("up", ranking.up)) if ffn.gated else (("up", ranking.up),):
        levels = form.levels[name]
        weights = levels.upper(levels.index(neuron_rows(ffn)[name]), planes)
        parts[name] = _part(inputs, name, weights)
    return _scores(inputs, parts)


def _part(inputs: MaskInputs, name: str, weights: Tensor, every: int = 1) -> Tensor:
    """act(gate) or up with these weights [D, E], or act(up) without a gate, [n, D]; of each `every`-th token."""
    ffn, hidden = inputs.ffn, inputs.inputs[inputs.layer][::every].nan_to_num(nan=0.0)
    assert isinstance(ffn, LayerFFN)  # `experts` says so
    values = ffn.linear(name, hidden.to(ffn.device), weights)
    acts = name == "gate" or not ffn.gated
    return (activation_function(ffn)(values) if acts else values).to(inputs.values.device)


def _scores(inputs: MaskInputs, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The estimates from `_part`s by name."""
    spared = stored_form(inputs.ffn).spared.to(inputs.values.device)
    first = inputs.measure(inputs.layer, inputs.site, parts.get("gate", parts["up"]))
    scores = (first * parts["up"].abs() if "gate" in parts else first).nan_to_num(nan=0.0)
    gates = first.nan_to_num(nan=0.0) if "gate" in parts else torch.full_like(first, torch.inf)
    return gates.masked_fill(spared, torch.inf), scores.masked_fill(spared, torch.inf)


def _ranking_bits(ffn: FFN, ranking: Ranking, candidates: float) -> float:
    """Bits read of an FFN per weight if only spared neurons are kept. candidates: share of neurons whose up is read."""
    form, P = stored_form(ffn), len(stored_form(ffn).levels)
    spared, row = form.spared.double().mean().item(), neuron_bits(ffn).min().item()
    bits = (candidates - spared) * (row - form.bits + ranking.up) + P * spared * FULL_BITS + FULL_BITS / ffn.hidden_size
    return (bits + (1 - spared) * (row - form.bits + ranking.gate) * ffn.gated) / P


def _kept_shares(ffn: FFN, budget: float) -> dict[tuple[Ranking, float], float]:
    """The shares of neurons to keep so that `budget` bits are read per weight, spared neurons included.

    By ranking and share of candidates. Without those for which ranking alone takes the budget, or candidates are fewer
    than could be kept.
    """
    form, P, shares = stored_form(ffn), len(stored_form(ffn).levels), {}
    spared, row = form.spared.double().mean().item(), neuron_bits(ffn).min().item()
    planes = range(1, min(form.bits, _MOST_PLANES) + 1)
    pairs = itertools.product(planes, planes) if ffn.gated else ((0, up) for up in planes)
    for gate, up in pairs:
        ranking = Ranking(form.bits, gate, up)
        rest = (row + form.bits - up + (form.bits - gate) * ffn.gated) / P  # of a neuron that is kept
        for candidates in _CANDIDATES if ffn.gated else _CANDIDATES[:1]:
            kept = spared + (budget - _ranking_bits(ffn, ranking, candidates)) / rest
            if spared < kept < candidates or (spared < kept and candidates == 1):
                shares[ranking, candidates] = min(kept, 1.0)
    return shares


class _TopShares(BitPlanes):
    """Keeps shares of the neurons: of each token's largest gates, then of its largest scores among these."""

    def __init__(self, codebook: Codebook, ranking: Ranking, candidates: float, kept: float):
        MaskPolicy.__init__(self, codebook, None, 0)
        self.ranking, self.candidates, self.kept = ranking, candidates, kept

    def choose(self, layer: int, gates: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        candidates = _largest(gates, self.candidates)
        self.last = gates, scores.masked_fill(~candidates, -1.0)  # below all others
        return candidates, _largest(self.last[1], self.kept)


def _largest(values: Tensor, share: float) -> Tensor:
    return ops.top_mask(values, ops.mask_size(values.shape[-1], share), check=False)


@dataclass
class _Counter:
    """A meter that counts the values by which a policy decides."""

    policy: _TopShares
    gates: ThresholdFinder
    scores: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        for finder, values in zip((self.gates, self.scores), self.policy.last, strict=True):
            finder.add(inputs.layer, values)


class _CapturedEnergy:
    """A meter of the energy that each ranking would capture. shares: as `_kept_shares` returns them."""

    def __init__(self, shares: dict[tuple[Ranking, float], float], device: torch.device):
        self.shares, self._checked = shares, set[int]()
        self._sums = torch.zeros(len(shares), dtype=torch.float64, device=device)

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        self._check(inputs)
        form, every = stored_form(inputs.ffn), max(1, len(inputs.values) // _TOKENS)
        parts: dict[tuple[str, int], Tensor] = {}
        for name in [name for name in form.levels if name != "down"]:
            index = form.levels[name].index(neuron_rows(inputs.ffn)[name])
            for planes in {getattr(ranking, name) for ranking, _ in self.shares}:
                parts[name, planes] = _part(inputs, name, form.levels[name].upper(index, planes), every)
        energy = inputs.energy[::every]
        energy = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        for place, ((ranking, candidates), kept) in enumerate(self.shares.items()):
            own = {name: parts[name, getattr(ranking, name)] for name in form.levels if name != "down"}
            gates, scores = _scores(inputs, own)
            mask = _largest(scores.masked_fill(~_largest(gates, candidates), -1.0), kept)
            self._sums[place] += (energy * mask).sum(dtype=torch.float64)

    def best(self) -> tuple[tuple[Ranking, float], float]:
        """The ranking and its share of candidates with the most energy over all ranks, and the share that it keeps."""
        return list(self.shares.items())[int(distributed.all_sum(self._sums).argmax())]

    def _check(self, inputs: MaskInputs) -> None:
        """Raises UserError unless neurons are act(gate) · up, or act(up) without a gate; once for each layer."""
        if inputs.layer in self._checked:
            return
        self._checked.add(inputs.layer)
        rows = {name: rows for name, rows in neuron_rows(inputs.ffn).items() if name != "down"}
        ours = torch.ones((), device=inputs.values.device)
        for name, each in rows.items():
            ours = ours * _part(inputs, name, each).float()
        exact = inputs.values.float()
        if not (ours - exact).norm() <= _TOLERANCE * exact.norm():
            problem = f"its neurons are not act(gate) * up, which the policy {BitPlanes.name} computes; leave it out"
            raise UserError(f"{inputs.ffn.name} ({type(inputs.ffn.module).__name__}): {problem}")
