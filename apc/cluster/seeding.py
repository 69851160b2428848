"""First centroids: rows drawn at random or by k-means++. Shape letters as in `apc.cluster.lloyd`."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import PatternInfo, PatternSource
from apc.utils import distributed
from apc.utils.errors import UserError

INIT_SAMPLE = 4096  # rows of a group that k-means++ chooses from
_PERMUTED = 1 << 24  # up to this many rows, draw a permutation of all; beyond, draw a sample
_DRAWS = 16  # rows sampled per row wanted, because some may not be usable


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one site by group and number. Each rank contributes the rows it owns, and every rank gets all.

    source: the patterns; pooled: whether one group holds all layers; owned: int64 [n] tokens → bool [n], whether this
    rank holds them; device: where rows are returned.
    """

    source: PatternSource
    info: PatternInfo
    site: str
    pooled: bool
    owned: Callable[[Tensor], Tensor]
    device: torch.device

    def _layers_tokens(self, group: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        L = self.info.layers
        return (row % L, row // L) if self.pooled else (group, row)

    def read(self, name: str, group: Tensor, row: Tensor) -> Tensor:
        """Rows [n, ...] of the field `name` at pairs (group, row number), int64 [n] each."""
        layers, tokens = self._layers_tokens(group.cpu(), row.cpu())
        owned = self.owned(tokens).nonzero().flatten()
        rows = self.source.rows(f"{name}.{self.site}", layers[owned], tokens[owned]).to(self.device)
        result = torch.zeros(len(tokens), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        result[owned.to(self.device)] = rows
        return distributed.all_sum(result)

    def masks(self, group: Tensor, row: Tensor, density: float) -> Tensor:
        """Patterns of rows at pairs (group, row number), cut or filled to the size of a centroid, uint8 [n, W]."""
        D = self.info.widths[self.site]
        active = ops.unpack(self.read("patterns", group, row), D)
        importance = self.read("importance", group, row) if self.info.with_importance else None
        layers = self._layers_tokens(group.cpu(), row.cpu())[0]
        counts = self.info.activity[self.site]
        frequency = counts.sum(0).to(self.device) if self.pooled else counts.to(self.device)[layers.to(self.device)]
        return ops.cut_or_fill(active, ops.mask_size(D, density), importance, frequency)


class SeedingRules(Protocol):
    """The part of a clustering algorithm that seeding needs; see `ClusteringModule`."""

    power: int
    usable_means: str
    needs_usable: bool

    def usable(self, site: str, patterns: Tensor) -> Tensor:
        """Which patterns uint8 [n, W] may start a cluster, bool [n]."""

    def seeds(self, reader: RowReader, group: Tensor, row: Tensor) -> Tensor:
        """Centroids uint8 [n, W] made from the rows at pairs (group, row number)."""

    def totals(self, rows: Tensor) -> Tensor:
        """int64 [n]: the sum of each row."""

    def limits(self, site: str, totals: Tensor) -> Tensor:
        """int64 [n]: upper bound on the captured sum per row."""

    def nearest(self, site: str, rows: Tensor, centroids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centroid and captured sum of each row, int64 [n] each."""


@dataclass
class CentroidInit:
    """Draws the first centroids of one site, at random without replacement or by k-means++ from a random sample.

    Unusable rows are drawn only if there are not enough usable ones. k: clusters; method: `random` or `k-means++`;
    groups, group_rows: how many groups, and rows in each.
    """

    rules: SeedingRules
    reader: RowReader
    k: int
    method: str
    groups: int
    group_rows: int
    generator: torch.Generator

    def centroids(self) -> Tensor:
        """The centroids, uint8 [G, K, W]. Raises UserError if the algorithm needs more usable rows than there are."""
        wanted = self.k if self.method == "random" else max(self.k, INIT_SAMPLE)
        order = random_rows(self.group_rows, wanted, self.generator)
        chosen = [self._draw(group, order, wanted) for group in range(self.groups)]
        if self.method == "k-means++":
            chosen = [self._spread(group, rows) for group, rows in enumerate(chosen)]
        return torch.stack(
            [self.rules.seeds(self.reader, torch.full_like(rows, group), rows) for group, rows in enumerate(chosen)]
        )

    def _draw(self, group: int, order: Tensor, wanted: int) -> Tensor:
        """The first `wanted` usable rows in `order`. If they are fewer than K, unusable ones fill up to K."""
        K, site = self.k, self.reader.site
        usable, others = (torch.zeros(0, dtype=torch.int64) for _ in range(2))
        for rows in order.split(wanted):
            patterns = self.reader.read("patterns", torch.full_like(rows, group), rows)
            mask = self.rules.usable(site, patterns).cpu()
            usable = torch.cat([usable, rows[mask]])[:wanted]
            others = torch.cat([others, rows[~mask]])[:K]
            if len(usable) == wanted:
                return usable
        if len(usable) >= K:
            return usable
        where = f"site {site}, {'all layers' if self.reader.pooled else f'layer {group}'}"
        if self.rules.needs_usable:
            raise UserError(
                f"cluster.k={K} is more than the {len(usable)} patterns {self.rules.usable_means} ({where}); "
                "lower it or raise data.fit_windows"
            )
        if distributed.is_main():
            print(
                f"{where}: {len(usable):,} of {len(order):,} patterns are not empty; "
                "the other clusters start from empty ones",
                flush=True,
            )
        return torch.cat([usable, others])[:K]

    def _spread(self, group: int, rows: Tensor) -> Tensor:
        """Chooses K of `rows` by k-means++ (Arthur and Vassilvitskii, 2007).

        The distance is the limit of a row's captured sum minus that sum.
        """
        rules = self.rules
        groups = torch.full_like(rows, group)
        masks = rules.seeds(self.reader, groups, rows)
        sample = self.reader.read("importance" if rules.power else "patterns", groups, rows)
        missed = limits = rules.limits(self.reader.site, rules.totals(sample))
        scales = ops.scales_of(limits) if rules.power else None
        picked: list[int] = []
        for _ in range(self.k):
            chances = (missed * scales >> 16 if scales is not None else missed).cumsum(0)
            draw = int(torch.randint(max(int(chances[-1]), 1), (1,), generator=self.generator))
            pick = int(torch.searchsorted(chances, draw, right=True).clamp(max=len(rows) - 1))
            if picked and int(missed[pick]) == 0:  # every row is fully captured: take any that is not picked yet
                pick = next(index for index in range(len(rows)) if index not in set(picked))
            picked.append(pick)
            _, captured = rules.nearest(self.reader.site, sample, masks[pick : pick + 1], limits)
            missed = torch.minimum(missed, limits - captured)
        return rows[torch.tensor(picked)]


def random_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Row numbers from 0 to count − 1 in random order, without repeats, int64 on the host.

    Up to 2²⁴ rows: all of them. Beyond: 16 for each one wanted, so that memory does not grow with `count`.
    """
    if count <= _PERMUTED:
        return torch.randperm(count, generator=generator)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    return torch.tensor(random.Random(seed).sample(range(count), min(count, _DRAWS * wanted)))
