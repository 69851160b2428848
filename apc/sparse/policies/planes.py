"""Ranks the neurons of an FFN that is stored at a few bits by the upper bit planes of its own gate and up.

Shape letters: n tokens, D neurons, L layers, P projections.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN, LayerFFN, first_device
from apc.data.quantise import FULL_BITS, StoredFFN, mean_bits, neuron_bits, neuron_rows, stored
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.policies.base import FitPass, MaskDecision, MaskInputs, MaskPolicy, PolicyCost
from apc.sparse.policies.bounds import Dense
from apc.utils import distributed
from apc.utils.errors import UserError

_TOLERANCE = 0.03  # between two ways to compute a layer's neurons, relative: bfloat16 rounds


class BitPlanes(MaskPolicy):
    """Keeps the neurons whose importance reaches their layer's threshold, as the upper bits of gate and up tell it.

    The upper bit planes of gate and up are read for all neurons. Their products with the FFN's input give an estimate
    of each neuron's importance. Of the neurons that are kept, the other planes and the row of down are read too. So no
    copy is stored, and nothing is trained. Spared neurons are always kept. How many planes rank the neurons is chosen
    on fit text: the more there are, the fewer neurons are kept for the same bytes.
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
        self.bits, self.planes = (int(codebook.calibrated[self.name][name][0]) for name in ("bits", "planes"))

    @classmethod
    def known_before_ffn(cls) -> bool:
        """False: no kernel reads bit planes."""
        return False

    @classmethod
    def check_ffns(cls, ffns: list[FFN], share: float) -> None:
        """Raises UserError if the FFNs are not stored at a few bits, or one plane for all neurons takes more bytes."""
        least, budget = _bits_read(ffns[0], 1, stored_form(ffns[0]).spared), share * mean_bits(ffns)
        if least >= budget:
            shares = (f"{each / FULL_BITS:.3g}" for each in (least, budget))
            problem = "reads over {} of the bytes of a 16-bit FFN to rank neurons, and may read {}".format(*shares)
            raise UserError(f"policies: {cls.name} {problem}; raise bytes")

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """bits, planes: int64 [L], all equal; thresholds: float32 [L].

        bits: of the stored weights. planes: those with which the masks capture most energy. Scores are counted for the
        thresholds while each token keeps its own top share of the neurons.
        """
        cls.check_ffns(fit.ffns, share)
        layers, device, bits = fit.codebook.layers, first_device(fit.ffns), stored_form(fit.ffns[0]).bits
        meter = _CapturedEnergy(_kept_shares(fit.ffns[0], share * mean_bits(fit.ffns)), device)
        fit.run(Dense(fit.codebook, None, 0), meter)
        planes = meter.best()
        policy, finder = (
            _LargestScores(fit.codebook, bits, planes, meter.shares[planes]),
            ThresholdFinder(layers, device),
        )
        fit.run(policy, _ScoreCounter(policy, finder))
        finder.narrow(torch.full((layers,), policy.share, dtype=torch.float64))
        fit.run(policy, _ScoreCounter(policy, finder))
        numbers = {"bits": torch.full((layers,), bits), "planes": torch.full((layers,), planes)}
        return numbers | {"thresholds": finder.thresholds()}

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose score reaches the threshold. Raises UserError if they are not stored as when calibrated."""
        if (stored_bits := stored_form(inputs.ffn).bits) != self.bits:
            problem = f"calibrated for FFNs at {self.bits} bits, these have {stored_bits}"
            raise UserError(f"policy {self.name}: {problem}; set model.ffn_bits={self.bits}, or train another run")
        mask, parts = self.mask(inputs), ("gate", "up") if inputs.ffn.gated else ("up",)
        every, bits = mask.new_ones(1, 1), _row_bits(inputs.ffn, self.planes, mask)
        return MaskDecision(mask, read=dict.fromkeys(parts, every), bits=dict.fromkeys(parts, bits))

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The neurons whose score reaches the threshold."""
        thresholds = self.codebook.calibrated[self.name]["thresholds"]
        return plane_scores(inputs, self.planes) >= thresholds[inputs.layer]

    def parameters_read(self, site: str, copy: float = 1.0) -> float:
        """The norms of the columns of down."""
        return self.codebook.widths[site]

    def multiplications(self, site: str, copy: float = 1.0) -> float:
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


def plane_scores(inputs: MaskInputs, planes: int) -> Tensor:
    """Each neuron's importance by the upper bit planes of gate and up, float32 [n, D]; infinite for spared neurons."""
    ffn, form = inputs.ffn, stored_form(inputs.ffn)
    rows = {name: rows for name, rows in neuron_rows(ffn).items() if name != "down"}
    values = _neurons(inputs, {name: form.levels[name].upper(each, planes) for name, each in rows.items()})
    scores = inputs.measure(inputs.layer, inputs.site, values).nan_to_num(nan=0.0)
    return scores.masked_fill(form.spared.to(scores.device), torch.inf)


def _neurons(inputs: MaskInputs, weights: dict[str, Tensor]) -> Tensor:
    """The values at `neuron` with these weights [D, E] of gate and up, on the device of the exact ones; [n, D]."""
    ffn, hidden = inputs.ffn, inputs.inputs[inputs.layer].nan_to_num(nan=0.0)
    assert isinstance(ffn, LayerFFN)  # `experts` says so
    return ffn.neurons_with(hidden.to(ffn.device), weights).to(inputs.values.device)


def _row_bits(ffn: FFN, planes: int, mask: Tensor) -> Tensor:
    """Bits read per weight of each row of gate and up, float32 like mask: bool [..., D], with the spared neurons."""
    full = neuron_bits(ffn).to(mask.device)
    return torch.where(mask, full, full - (stored_form(ffn).bits - planes))


def _bits_read(ffn: FFN, planes: int, mask: Tensor) -> float:
    """Bits read of an FFN, per weight, under this mask bool [D], which has the spared neurons."""
    P, rows = len(stored_form(ffn).levels), _row_bits(ffn, planes, mask).double().mean()
    norms = FULL_BITS / (P * ffn.hidden_size)
    return float((P - 1) / P * rows + (neuron_bits(ffn) * mask).double().mean() / P) + norms


def _kept_shares(ffn: FFN, budget: float) -> dict[int, float]:
    """By number of planes, the share of neurons to keep so that `budget` bits are read per weight.

    Without those numbers for which reading the planes takes the budget.
    """
    form, shares = stored_form(ffn), {}
    spared = form.spared.double().mean().item()
    for planes in range(1, form.bits + 1):
        least, most = (_bits_read(ffn, planes, mask) for mask in (form.spared, torch.ones_like(form.spared)))
        if least < budget:
            shares[planes] = spared + (1 - spared) * min(1.0, (budget - least) / (most - least))
    return shares


class _LargestScores(BitPlanes):
    """Keeps each token's largest scores, a share of the neurons."""

    def __init__(self, codebook: Codebook, bits: int, planes: int, share: float):
        MaskPolicy.__init__(self, codebook, None, 0)
        self.bits, self.planes, self.share = bits, planes, share

    def mask(self, inputs: MaskInputs) -> Tensor:
        self.scores = plane_scores(inputs, self.planes)  # of the last call
        return ops.top_mask(self.scores, ops.mask_size(self.scores.shape[-1], self.share), check=False)


@dataclass
class _ScoreCounter:
    """A meter that counts the scores by which a policy decides."""

    policy: _LargestScores
    finder: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        self.finder.add(inputs.layer, self.policy.scores)


class _CapturedEnergy:
    """A meter of the energy that each number of planes would capture. shares: of neurons kept, by number of planes."""

    def __init__(self, shares: dict[int, float], device: torch.device):
        self.shares, self._checked = shares, set[int]()
        self._sums = torch.zeros(len(shares), dtype=torch.float64, device=device)

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        self._check(inputs)
        for index, (planes, share) in enumerate(self.shares.items()):
            scores = plane_scores(inputs, planes)
            kept = ops.top_mask(scores, ops.mask_size(scores.shape[-1], share), check=False)
            self._sums[index] += inputs.captured(kept.float())[1].double().sum()

    def best(self) -> int:
        """The number of planes with the most energy over all ranks; the lowest of equals."""
        return list(self.shares)[int(distributed.all_sum(self._sums).argmax())]

    def _check(self, inputs: MaskInputs) -> None:
        """Raises UserError unless neurons are act(gate) · up, or act(up) without a gate; once for each layer."""
        if inputs.layer in self._checked:
            return
        self._checked.add(inputs.layer)
        own = {name: rows for name, rows in neuron_rows(inputs.ffn).items() if name != "down"}
        exact, ours = inputs.values.float(), _neurons(inputs, own).float()
        if not (ours - exact).norm() <= _TOLERANCE * exact.norm():
            problem = "its neurons are not act(gate) * up, which the policy bit-planes computes"
            raise UserError(f"{inputs.ffn.name} ({type(inputs.ffn.module).__name__}): {problem}; leave it out")
