"""The masked distance, and first centroids: rows drawn at random or by k-means++.

Shape letters as in `apc.cluster.lloyd`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from apc import ops
from apc.collect.patterns import PatternInfo, PatternSource, read_rows
from apc.config.schema import WEIGHTINGS, ClusterConfig
from apc.utils import distributed
from apc.utils.errors import UserError

INIT_SAMPLE = 4096  # rows of a group that k-means++ chooses from
_PERMUTED = 1 << 24  # up to this many rows, draw a permutation of all; beyond, draw a sample
_READ_AT_ONCE = 1 << 16  # rows; reads start smaller and double
_DRAWS = 16  # rows sampled per row wanted, because some may not be usable


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one site by group and number. Each rank contributes the rows it owns, and every rank gets all."""

    source: PatternSource
    site: str
    pooled: bool  # whether one group holds all layers
    owned: Callable[[Tensor], Tensor]  # int64 [n] tokens → bool [n], whether this rank holds them
    device: torch.device  # where rows are returned

    def read(self, name: str, group: Tensor, row: Tensor) -> Tensor:
        """Rows [n, ...] of the field `name` at pairs (group, row number), int64 [n] each."""
        L, group, row = self.source.info.layers, group.cpu(), row.cpu()
        layers, tokens = (row % L, row // L) if self.pooled else (group, row)
        owned = self.owned(tokens).nonzero().flatten()
        rows = read_rows(self.source, f"{name}.{self.site}", layers[owned], tokens[owned]).to(self.device)
        result = torch.zeros(len(tokens), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        result[owned.to(self.device)] = rows
        return distributed.all_sum(result)

    def masks(self, group: Tensor, row: Tensor, density: float) -> Tensor:
        """Patterns of rows at pairs (group, row number), cut or filled to the size of a centroid, uint8 [n, W]."""
        info, D = self.source.info, self.source.info.widths[self.site]
        active = ops.unpack(self.read("patterns", group, row), D)
        importance = self.read("importance", group, row) if info.with_importance else None
        counts = info.activity[self.site].to(self.device)
        frequency = counts.sum(0) if self.pooled else counts[group.to(self.device)]
        return ops.cut_or_fill(active, ops.mask_size(D, density), importance, frequency)


class CentroidInit(LightningModule):
    """The distance by which an algorithm compares rows, and how it draws the first centroids.

    Draws at random without replacement, or by k-means++ from a random sample. Unusable rows are drawn only if there are
    not enough usable ones.
    """

    usable_means = "that are not empty"  # describes usable patterns; completes "patterns …" in an error message
    needs_usable = False  # whether it is an error to have fewer usable patterns than clusters
    # Whether first and re-seeded centroids are unchanged patterns. If not, patterns are cut or filled to centroid size.
    raw_seeds = False

    def __init__(self, cfg: ClusterConfig, info: PatternInfo, seed: int = 0):
        super().__init__()
        self.cfg, self.info, self.seed = cfg, info, seed
        self.power = WEIGHTINGS[cfg.weighting]
        self.pooled = cfg.scope == "pooled"
        self.groups = 1 if self.pooled else info.layers
        self.group_rows = info.tokens * (info.layers if self.pooled else 1)

    def totals(self, rows: Tensor) -> Tensor:
        """Sum of each row, int64 [..., n], below 2³¹.

        rows: patterns [..., n, W], whose ones are counted, or importances [..., n, D], raised to the weighting's power.
        """
        return ops.row_totals(rows, self.power) if self.power else ops.popcount(rows).long()

    def limits(self, site: str, totals: Tensor) -> Tensor:
        """Upper bound on the captured sum per row, int64 [..., n], from the rows' totals."""
        return totals

    def nearest(self, site: str, rows: Tensor, centroids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centroid and captured sum of each row, int64 [..., n] each.

        rows: [..., n, W or D]; centroids: uint8 [..., K, W]; limits: of the rows, int64 [..., n].
        """
        return ops.assign_weighted(rows, centroids, self.power) if self.power else ops.assign(rows, centroids)

    def seeds(self, reader: RowReader, group: Tensor, row: Tensor) -> Tensor:
        """Centroids uint8 [n, W] made from the rows at pairs (group, row number)."""
        return reader.read("patterns", group, row) if self.raw_seeds else reader.masks(group, row, self.cfg.density)

    def usable(self, site: str, patterns: Tensor) -> Tensor:
        """Which patterns uint8 [n, W] may start a cluster, bool [n]."""
        return ops.popcount(patterns) > 0

    def first_centroids(self, reader: RowReader) -> Tensor:
        """First centroids of a site, uint8 [G, K, W]. Raises UserError if too few rows are usable for the algorithm."""
        generator = torch.Generator().manual_seed(self.seed)
        spread = self.cfg.init == "k-means++"
        wanted = max(self.cfg.k, INIT_SAMPLE) if spread else self.cfg.k
        order = random_rows(self.group_rows, wanted, generator)
        chosen = [self._draw(reader, group, order, wanted) for group in range(self.groups)]
        if spread:
            chosen = [self._spread(reader, group, rows, generator) for group, rows in enumerate(chosen)]
        return torch.stack([self.seeds(reader, torch.full_like(rows, g), rows) for g, rows in enumerate(chosen)])

    def _draw(self, reader: RowReader, group: int, order: Tensor, wanted: int) -> Tensor:
        """The first `wanted` usable rows in `order`. If there are fewer than K, unusable rows fill the rest."""
        K = self.cfg.k
        usable = others = order[:0]
        first, count = 0, wanted
        while first < len(order):
            rows = order[first : first + count]
            first, count = first + count, min(2 * count, max(wanted, _READ_AT_ONCE))  # usable rows may be rare
            mask = self.usable(reader.site, reader.read("patterns", torch.full_like(rows, group), rows)).cpu()
            usable = torch.cat([usable, rows[mask]])[:wanted]
            others = torch.cat([others, rows[~mask]])[:K]
            if len(usable) == wanted:
                return usable
        if len(order) < self.group_rows:  # `order` is a sample without enough usable rows: search all rows
            generator = torch.Generator().manual_seed(self.seed)
            return self._draw(reader, group, torch.randperm(self.group_rows, generator=generator), wanted)
        if len(usable) >= K:
            return usable
        where = f"site {reader.site}, {'all layers' if self.pooled else f'layer {group}'}"
        if self.needs_usable:
            raise UserError(
                f"cluster.k={K} is more than the {len(usable)} patterns {self.usable_means} ({where}); "
                "lower it or raise data.fit_windows"
            )
        if distributed.is_main() and not self.info.experts:  # for experts this is usual: many get few tokens
            print(
                f"{where}: {len(usable):,} of {len(order):,} patterns are not empty; "
                "the other clusters start from empty ones",
                flush=True,
            )
        return torch.cat([usable, others])[:K]

    def _spread(self, reader: RowReader, group: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Chooses K of `rows` by k-means++ (Arthur and Vassilvitskii, 2007).

        A row's distance is the upper bound on its captured sum (`limits`) minus its captured sum.
        """
        groups = torch.full_like(rows, group)
        masks = self.seeds(reader, groups, rows)
        sample = reader.read("importance" if self.power else "patterns", groups, rows)
        missed = limits = self.limits(reader.site, self.totals(sample))
        scales = ops.scales_of(limits) if self.power else None
        picked: list[int] = []
        for _ in range(self.cfg.k):
            chances = (missed if scales is None else missed * scales >> 16).cumsum(0)
            draw = int(torch.randint(max(int(chances[-1]), 1), (1,), generator=generator))
            pick = int(torch.searchsorted(chances, draw, right=True).clamp(max=len(rows) - 1))
            if picked and int(missed[pick]) == 0:  # every row is fully captured: take any that is not picked yet
                pick = next(index for index in range(len(rows)) if index not in set(picked))
            picked.append(pick)
            _, captured = self.nearest(reader.site, sample, masks[pick : pick + 1], limits)
            missed = torch.minimum(missed, limits - captured)
        return rows[torch.tensor(picked)]


def random_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Row numbers from 0 to count − 1 in random order, without repeats, int64 on the host.

    Up to 2²⁴ rows, it returns all numbers. Beyond that, it returns 16 numbers per wanted row, so that memory does not
    grow with `count`.
    """
    if count <= _PERMUTED:
        return torch.randperm(count, generator=generator)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    return torch.tensor(random.Random(seed).sample(range(count), min(count, _DRAWS * wanted)))
