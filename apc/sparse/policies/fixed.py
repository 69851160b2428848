"""Policies whose mask is the same for every token."""

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import MaskInputs, MaskPolicy


class Static(MaskPolicy):
    """Keeps, in each layer, the neurons that captured the most over the fit text."""

    name = "static"
    by_default = True
    in_sparsify = True
    same_for_all = True
    color, marker = "#E69F00", "^"

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The layer's static mask."""
        static = self.codebook.sites[inputs.site].static[inputs.layer : inputs.layer + 1]
        return ops.unpack(static, inputs.values.shape[-1])


class Random(MaskPolicy):
    """Keeps a random set of neurons at each site of each layer, drawn from the seed."""

    name = "random"
    same_for_all = True
    color, marker = "#8C8C8C", "v"

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        super().__init__(codebook, predictor, seed)
        self._masks: dict[tuple[int, str, torch.device], Tensor] = {}

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The layer's random mask."""
        D, sites, device = inputs.values.shape[-1], list(self.codebook.sites), inputs.values.device
        key = inputs.layer, inputs.site, device
        if key not in self._masks:  # drawn once: a CUDA graph can't copy the mask from the host at each replay
            seed = self.seed * 1_000_003 + inputs.layer * len(sites) + sites.index(inputs.site)
            order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
            mask = torch.zeros(1, D, dtype=torch.bool)
            mask[0, order[: ops.mask_size(D, self.codebook.density)]] = True
            self._masks[key] = mask.to(device)
        return self._masks[key]
