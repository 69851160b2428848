"""Policies that read the token's own activations: bounds for the methods, and the dense FFN."""

from dataclasses import replace

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import quantise
from apc.sparse.policies.base import ClusterPolicy, MaskDecision, MaskInputs, MaskPolicy, PolicyCost


class Dense(MaskPolicy):
    """Every neuron: the model as it is."""

    name = "dense"
    by_default = True
    uses_codebook = False
    color, marker = "#4D4D4D", "o"

    def mask(self, inputs: MaskInputs) -> Tensor:
        return torch.ones(1, inputs.values.shape[-1], dtype=torch.bool, device=inputs.values.device)

    def cost(self, densities: dict[str, list[float]]) -> PolicyCost:
        return PolicyCost(0.0, 1.0, 1.0)


class Exact(MaskPolicy):
    """The token's own active neurons."""

    name = "exact"
    by_default = True
    is_bound = True
    uses_codebook = False
    color, marker = "#0072B2", "s"

    def mask(self, inputs: MaskInputs) -> Tensor:
        return inputs.active


class Oracle(ClusterPolicy):
    """The nearest centroid, found from the token's own activations."""

    name = "oracle"
    by_default = True
    is_bound = True
    tunable = True
    gap_to = "exact"
    color, marker = "#009E73", "D"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        centroids = self.codebook.sites[inputs.site].centroids[self.codebook.group(inputs.layer)]
        rows = quantise(inputs.importance)[0] if self.codebook.power else ops.pack(inputs.active)
        return self.from_clusters(inputs, self.codebook.nearest(rows, centroids))


class ThresholdedOracle(Oracle):
    """The token's own active neurons that its nearest centroid keeps too: how the paper scores."""

    name = "thresholded-oracle"
    by_default = False
    by_cluster = False  # the choice is of a mask again, not of a cluster
    tunable = False
    gap_to = None
    color, marker = "#117733", "h"
    wide_line = True  # it covers the same neurons as the oracle

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        nearest = super().decide(inputs)
        return replace(nearest, mask=nearest.mask & inputs.active)
