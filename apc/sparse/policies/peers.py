"""Rules of other authors that need no training, only thresholds from fit text.

Shape letters: n tokens, E hidden size, D neurons, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apc import ops
from apc.data.ffn import first_device
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.policies.base import FitPass, MaskDecision, MaskInputs, MaskPolicy
from apc.utils.errors import UserError


class Cats(MaskPolicy):
    """Keeps the neurons whose |act(gate)| reaches their layer's threshold (CATS, Lee et al., 2024, arXiv 2404.08763).

    The gate is read in full; up and down only at the kept neurons. To read a share b of the bytes of three projections,
    the share (3b − 1) / 2 of the neurons is kept.
    """

    name = "cats"
    sees_gate = True
    experts = False
    calibrated = True
    uses_codebook = False
    sites = ("neuron",)
    color, marker = "#56B4E9", "X"

    @classmethod
    def check_bytes(cls, share: float) -> None:
        """Raises UserError if the gate alone is as much as this share of the bytes."""
        if share <= 1 / 3:
            raise UserError(f"policies: {cls.name} reads the gate in full, a third of the bytes; raise bytes={share:g}")

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """thresholds float32 [L]: counted while each token keeps its own top share of the neurons."""
        cls.check_bytes(share)
        policy = _LargestGates(fit.codebook, None, 0, (3 * share - 1) / 2)
        finder = ThresholdFinder(fit.codebook.layers, first_device(fit.ffns))
        fit.run(policy, _GateCounter(finder))
        finder.narrow(torch.full((fit.codebook.layers,), policy.share, dtype=torch.float64))
        fit.run(policy, _GateCounter(finder))
        return {"thresholds": finder.thresholds()}

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The gates that reach the threshold."""
        return MaskDecision(self.mask(inputs), read={"gate": inputs.values.new_ones(1, 1, dtype=torch.bool)})

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The neurons whose gates reach the threshold."""
        assert inputs.gate is not None  # `sees_gate` asks for it
        return inputs.gate.float().abs() >= self.codebook.calibrated[self.name]["thresholds"][inputs.layer]


class _LargestGates(Cats):
    """Keeps a share of the neurons, those with the largest |act(gate)|."""

    def __init__(self, codebook, predictor, seed, share: float):
        super().__init__(codebook, predictor, seed)
        self.share = share

    def mask(self, inputs: MaskInputs) -> Tensor:
        assert inputs.gate is not None
        return ops.top_mask(inputs.gate.float().abs(), ops.mask_size(inputs.gate.shape[-1], self.share), check=False)


@dataclass
class _GateCounter:
    """A meter that counts |act(gate)|."""

    finder: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        assert inputs.gate is not None
        self.finder.add(inputs.layer, inputs.gate.float().abs())
