"""Where clusters begin: rows drawn at random or by k-means++, wherever they lie. Shape letters as in `apc.clustering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apc import distributed, ops
from apc.errors import UserError
from apc.patterns import PatternSource

if TYPE_CHECKING:
    from apc.clustering import ClusteringModule


class RowReader:
    """Reads rows by group and number, wherever they lie: each rank contributes those it owns, and all get all."""

    def __init__(self, module: ClusteringModule, source: PatternSource, site: str):
        self.module, self.source, self.site = module, source, site

    def _layers_tokens(self, group: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        L = self.module.info.layers
        return (row % L, row // L) if self.module.pooled else (group, row)

    def read(self, name: str, group: Tensor, row: Tensor) -> Tensor:
        """The field's rows [n, ...] at pairs (group, row number), int64 [n] each."""
        layers, tokens = self._layers_tokens(group.cpu(), row.cpu())
        owned = self._owned(tokens)
        found = self.source.rows(f"{name}.{self.site}", layers[owned], tokens[owned]).to(self.module.device)
        result = torch.zeros(len(tokens), *found.shape[1:], dtype=found.dtype, device=self.module.device)
        result[owned.to(self.module.device)] = found
        return distributed.all_sum(result)

    def _owned(self, tokens: Tensor) -> Tensor:
        """Indices of the tokens in this rank's share: the loader's, so that memory-held rows are there."""
        return self.module.trainer.datamodule.loader.owned(tokens).nonzero().flatten()

    def masks(self, group: Tensor, row: Tensor) -> Tensor:
        """Patterns cut or filled to the centroid's size, uint8 [n, W]."""
        info, device = self.module.info, self.module.device
        D = info.widths[self.site]
        active = ops.unpack(self.read("patterns", group, row), D)
        importance = self.read("importance", group, row) if info.with_importance else None
        layers = self._layers_tokens(group.cpu(), row.cpu())[0]
        counts = info.activity[self.site]
        frequency = counts.sum(0).to(device) if self.module.pooled else counts.to(device)[layers.to(device)]
        return ops.cut_or_fill(active, ops.mask_size(D, self.module.cfg.density), importance, frequency)


class Start:
    """The first centroids: rows drawn at random without replacement, or by k-means++ from a random sample; empty rows only where there are no others."""

    what_is_usable = "that are not empty"
    needs_usable = False  # whether fewer usable rows than clusters are an error

    def __init__(self, module: ClusteringModule, source: PatternSource, site: str):
        self.module, self.site = module, site
        self.reader = RowReader(module, source, site)
        self.generator = torch.Generator().manual_seed(module.seed)

    def centroids(self) -> Tensor:
        """uint8 [G, K, W]"""
        K = self.module.cfg.k
        order = random_order(self.module.group_rows, self.generator)
        wanted = K if self.module.cfg.init == "random" else max(K, self.module.cfg.init_sample)
        chosen = [self._draw(group, order, wanted) for group in range(self.module.groups)]
        if self.module.cfg.init == "k-means++":
            chosen = [self._spread(group, rows) for group, rows in enumerate(chosen)]
        return torch.stack([self.module.seeds(self.reader, torch.full_like(rows, group), rows) for group, rows in enumerate(chosen)])

    def usable(self, patterns: Tensor) -> Tensor:
        """bool [n]: which patterns uint8 [n, W] may start a cluster."""
        return ops.popcount(patterns) > 0

    def _draw(self, group: int, order: Callable[[int, int], Tensor], wanted: int) -> Tensor:
        """The first `wanted` rows of an order that are usable; if there are fewer, all of them, and others up to K."""
        K, total = self.module.cfg.k, self.module.group_rows
        found, others = (torch.zeros(0, dtype=torch.int64) for _ in range(2))
        for start in range(0, total, wanted):
            rows = order(start, min(start + wanted, total))
            usable = self.usable(self.reader.read("patterns", torch.full_like(rows, group), rows)).cpu()
            found, others = torch.cat([found, rows[usable]])[:wanted], torch.cat([others, rows[~usable]])[:K]
            if len(found) == wanted:
                return found
        if len(found) >= K:
            return found
        where = f"site {self.site}, {'all layers' if self.module.pooled else f'layer {group}'}"
        if self.needs_usable:
            raise UserError(f"cluster.k={K} is more than the {len(found)} patterns {self.what_is_usable} ({where}); lower it or raise data.fit_windows")
        if distributed.is_main():
            print(f"{where}: {len(found):,} of {total:,} patterns are not empty; clusters past these start from empty ones", flush=True)
        return torch.cat([found, others])[:K]

    def _spread(self, group: int, rows: Tensor) -> Tensor:
        """k-means++ (Arthur and Vassilvitskii, 2007) over sample `rows`, with what a centroid fails to capture as the distance."""
        module = self.module
        groups = torch.full_like(rows, group)
        masks = module.seeds(self.reader, groups, rows)
        sample = self.reader.read("importance" if module.power else "patterns", groups, rows)
        missed = limits = module.limits(self.site, module.totals(sample))
        scales = ops.scales_of(limits) if module.power else None
        picked: list[int] = []
        for _ in range(module.cfg.k):
            chances = (missed * scales >> 16 if scales is not None else missed).cumsum(0)
            draw = int(torch.randint(max(int(chances[-1]), 1), (1,), generator=self.generator))
            pick = int(torch.searchsorted(chances, draw, right=True).clamp(max=len(rows) - 1))
            if picked and int(missed[pick]) == 0:  # every row is captured whole: any row not picked yet will do
                pick = next(index for index in range(len(rows)) if index not in set(picked))
            picked.append(pick)
            _, captured = module.nearest(self.site, sample, masks[pick : pick + 1], limits)
            missed = torch.minimum(missed, limits - captured)
        return rows[torch.tensor(picked)]


_PERMUTED = 1 << 24  # rows up to which an order is a permutation in memory


def random_order(count: int, generator: torch.Generator) -> Callable[[int, int], Tensor]:
    """An order of the numbers 0 … count − 1 that a generator decides, as a function: its places first … last − 1, int64 on the host.

    Beyond 2²⁴ numbers it takes no memory: a Feistel network over as many bits as they have, walked until it is below count (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    if count <= _PERMUTED:
        order = torch.randperm(count, generator=generator)
        return lambda first, last: order[first:last]
    half = ((count - 1).bit_length() + 1) // 2
    keys = torch.randint(1 << 31, (4,), generator=generator).tolist()
    low = (1 << half) - 1

    def permuted(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for key in keys:
            mixed = ((right + key) * 0x9E3779B1) & ((1 << 62) - 1)
            mixed = ((mixed ^ mixed >> 29) * 0x85EBCA6B) & ((1 << 62) - 1)
            left, right = right, left ^ (mixed >> 17 & low)
        return left << half | right

    def places(first: int, last: int) -> Tensor:
        x = permuted(torch.arange(first, last))
        while (beyond := x >= count).any():
            x = torch.where(beyond, permuted(x), x)
        return x

    return places
