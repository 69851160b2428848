"""Policies whose mask is the same for every token."""

from functools import cached_property

import torch
from torch import Tensor

from apc import ops
from apc.sparse.policies.base import MaskInputs, MaskPolicy


class Static(MaskPolicy):
    """One mask for each layer: the neurons that captured most over the fit text."""

    name = "static"
    by_default = True
    same_for_all = True
    color, marker = "#E69F00", "^"

    def mask(self, inputs: MaskInputs) -> Tensor:
        static = self.codebook.sites[inputs.site].static[inputs.layer : inputs.layer + 1]
        return ops.unpack(static, inputs.values.shape[-1])


class Random(MaskPolicy):
    """One mask for each layer and site, drawn from the seed."""

    name = "random"
    by_default = True
    same_for_all = True
    color, marker = "#8C8C8C", "v"

    def mask(self, inputs: MaskInputs) -> Tensor:
        key = inputs.layer, inputs.site, inputs.values.device
        if key not in self._drawn:  # once: a CUDA graph can't copy it from the host each time
            self._drawn[key] = self._draw(inputs)
        return self._drawn[key]

    @cached_property
    def _drawn(self) -> dict[tuple, Tensor]:
        return {}

    def _draw(self, inputs: MaskInputs) -> Tensor:
        D, sites = inputs.values.shape[-1], list(self.codebook.sites)
        seed = self.seed * 1_000_003 + inputs.layer * len(sites) + sites.index(inputs.site)
        mask = torch.zeros(1, D, dtype=torch.bool)
        order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        mask[0, order[: ops.mask_size(D, self.codebook.density)]] = True
        return mask.to(inputs.values.device)
