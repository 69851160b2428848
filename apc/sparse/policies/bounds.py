"""The dense FFN, and policies that read the token's own activations: upper bounds for the others."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from apc.data.quantise import FULL_BITS
from apc.sparse.policies.base import ClusterPolicy, MaskDecision, MaskInputs, MaskPolicy, PolicyCost, own_clusters


class Dense(MaskPolicy):
    """Keeps every neuron: the model as it is."""

    name = "dense"
    by_default = True
    uses_codebook = False
    color, marker = "#4D4D4D", "o"

    def mask(self, inputs: MaskInputs) -> Tensor:
        """All neurons."""
        return torch.ones(1, inputs.values.shape[-1], dtype=torch.bool, device=inputs.values.device)

    def cost(
        self, densities: dict[str, list[float]], read: Mapping[str, float], bits: Mapping[str, float]
    ) -> PolicyCost:
        """The dense cost: no choice, all stored bytes and all FLOPs. The first two arguments are ignored."""
        return PolicyCost(0.0, sum(bits.values()) / (FULL_BITS * len(bits)), 1.0)


class Exact(MaskPolicy):
    """Keeps the token's own active neurons."""

    name = "exact"
    by_default = True
    is_bound = True
    uses_codebook = False
    color, marker = "#0072B2", "s"

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The active neurons."""
        return inputs.active


class Oracle(ClusterPolicy):
    """Takes the centroid that is nearest to the token's own pattern."""

    name = "oracle"
    by_default = True
    is_bound = True
    tunable = True
    gap_to: str | None = "exact"
    color, marker = "#009E73", "D"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The nearest centroid."""
        return self.from_clusters(inputs, self.clusters(inputs))

    def clusters(self, inputs: MaskInputs) -> Tensor:
        """The clusters whose centroids are nearest, int64 [n]."""
        return own_clusters(self.codebook, inputs, self.centroids(inputs))


class ThresholdedOracle(Oracle):
    """Keeps the active neurons that the nearest centroid keeps too: the paper's way to score a codebook."""

    name = "thresholded-oracle"
    by_default = False
    by_cluster = False  # its mask is not a centroid
    tunable = False
    gap_to = None
    color, marker = "#117733", "h"
    wide_line = True  # it captures as much as the oracle

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The nearest centroid, without the neurons that are not active."""
        nearest = super().decide(inputs)
        return replace(nearest, mask=nearest.mask & inputs.active)
