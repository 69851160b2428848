"""The clustering of the APC paper (Dhar et al., Euro-Par 2025): clusters of a fixed size, updated window by window.

A chunk is one window's patterns. Each chunk fills the clusters in the order of their ids, each with its ⌊n / K⌋ nearest patterns of those
that are left, by the masked distance; what is then left over stays out of the update. A centroid becomes the blend of itself, which counts as
all chunks before, and of the mean of its patterns, cut to its largest neurons. With several ranks each takes a chunk, and their centroids are
averaged. Where the paper cuts at a quantile, ties go to the lowest neuron, so that every centroid has exactly its share of ones.

Shape letters as in `apc.clustering`.
"""

import math

import torch
from torch import Tensor

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.cluster.seeding import CentroidInit, RowReader
from apc.collect.patterns import Block, PatternInfo, PatternSource
from apc.config.schema import ClusterConfig
from apc.utils import distributed
from apc.utils.errors import UserError


class _PaperInit(CentroidInit):
    """Patterns as they are. Those with more ones than a centroid are left out."""

    usable_means = "with some ones and no more than a centroid has"
    needs_usable = True
    largest = 0  # ones in a centroid

    def usable(self, patterns: Tensor) -> Tensor:
        ones = ops.popcount(patterns)
        return (ones > 0) & (ones <= self.largest)


class PaperClustering(ClusteringModule):
    """Further buffers, one set per site: seen int64 [], chunks before; cluster_of int32 [L, T], each row's cluster in the pass before (−1: it was
    left over, −2: there was none). And moved int64 [], rows that changed their cluster in the pass so far."""

    in_order = True
    init_class = _PaperInit

    def __init__(self, cfg: ClusterConfig, info: PatternInfo, seed: int = 0):
        super().__init__(cfg, info, seed)
        self.register_buffer("moved", torch.zeros((), dtype=torch.int64))

    @property
    def chunk(self) -> int:
        """Patterns of a group in one window."""
        return self.info.seq_len * (self.info.layers if self.pooled else 1)

    def _check(self) -> None:
        super()._check()
        if self.cfg.schedule != "epoch":
            raise UserError(
                "cluster.algorithm=apc-paper updates after every window by itself; leave out cluster.schedule=step"
            )
        if self.cfg.k > self.chunk:
            raise UserError(
                f"cluster.k={self.cfg.k} is more than the {self.chunk} patterns of a window, which apc-paper fills the clusters with; lower it"
            )

    def _register_site(self, site: str, D: int) -> None:
        super()._register_site(site, D)
        self.register_buffer(f"seen_{site}", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            f"cluster_of_{site}", torch.full((self.info.layers, self.info.tokens), -2, dtype=torch.int32)
        )

    def on_fit_start(self) -> None:
        left_over = self.chunk % self.cfg.k
        if left_over and distributed.is_main():
            print(
                f"apc-paper: a window's {self.chunk:,} patterns fill {self.cfg.k:,} clusters with {self.chunk // self.cfg.k:,} each; "
                f"the {left_over:,} left over stay out of its update",
                flush=True,
            )
        super().on_fit_start()

    def _init(self, source: PatternSource, site: str) -> CentroidInit:
        init = super()._init(source, site)
        init.largest = ops.mask_size(self.info.widths[site], self.cfg.density)
        return init

    def seeds(self, reader: RowReader, group: Tensor, row: Tensor) -> Tensor:
        return reader.read("patterns", group, row)

    def _reset_pass(self, site: str) -> None:
        super()._reset_pass(site)
        self.moved.zero_()

    def _begin_pass(self) -> None:
        super()._begin_pass()
        self.moved.zero_()

    @property
    def _layers_apart(self) -> bool:
        return True  # sums lack what was left over

    def _add_rows(self, site: str, block: Block) -> None:
        S = self.info.seq_len
        own = block.tokens // S
        ranks = distributed.world_size()
        steps = math.ceil(
            int(distributed.all_sum(torch.tensor(own, device=self.device))) / ranks
        )  # blocks are shared out as evenly as can be
        for step in range(steps):
            old = self.get("centroids", site)
            if step < own:
                span = slice(step * S, (step + 1) * S)
                new = self._learn(site, block.patterns[site][:, span], block.positions[span].to(self.device))
            else:
                new = torch.zeros_like(old)  # this rank has no chunk left, and no vote
            if ranks > 1:
                votes = distributed.all_sum(ops.unpack(new, self.info.widths[site]).long())
                new = ops.binarize(votes, self.cfg.density)
            self.changed += ops.popcount(new ^ old).long().sum()
            self._set("centroids", site, new)
            self.get("seen", site).add_(1)
        if not self.history:
            self._add_layer_sums(site, block)

    def _learn(self, site: str, patterns: Tensor, positions: Tensor) -> Tensor:
        """The centroids uint8 [G, K, W] after a chunk, uint8 [L, S, W] at positions int64 [S]; notes members, sums and what was captured."""
        centroids, K, D = self.get("centroids", site), self.cfg.k, self.info.widths[site]
        rows = self._grouped(patterns)
        capacity = rows.shape[1] // K
        ids = torch.stack(
            [ops.assign_with_capacity(group, own, capacity) for group, own in zip(rows, centroids, strict=True)]
        )
        groups, members = torch.arange(len(rows), device=ids.device).unsqueeze(1), ids >= 0
        members = members.nonzero()[:, 1].view(len(rows), K * capacity)  # as many in each group
        rows_in, ids_in = rows[groups, members], ids.gather(1, members)
        sums, sizes = ops.accumulate(rows_in, ids_in, K, D)
        self.get("sums", site).add_(sums)
        self.get("sizes", site).add_(sizes)
        self.get("captured", site).add_(ops.popcount(rows_in & centroids[groups, ids_in]).sum(1))
        self.get("weight", site).add_(ops.popcount(rows).sum(1))
        before, now = self.get("cluster_of", site), ids.reshape(patterns.shape[:2]).int()
        self.moved += (before[:, positions] != now).sum()
        before[:, positions] = now
        # (c · h + mean · n) / (h + n) with h = n · chunks before and n = capacity, which is the size of every cluster: in whole numbers, times (h + n).
        return ops.binarize(
            ops.unpack(centroids, D).long() * (capacity * self.get("seen", site)) + sums, self.cfg.density
        )

    def _share_clusters(self, site: str) -> None:
        """Brings all rows' clusters to all ranks, each of which knows those of its own."""
        if distributed.world_size() > 1:
            others = ~self.trainer.datamodule.loader.owned(torch.arange(self.info.tokens))
            distributed.all_max(self.get("cluster_of", site).masked_fill_(others.to(self.device), -2))

    def _reduce_to_rank0(self) -> None:
        for site in self.info.sites:
            self._share_clusters(site)
        distributed.sum_at_first(self.moved)
        super()._reduce_to_rank0()

    def _update_centroids(self, site: str) -> int:
        self._share_clusters(site)
        return int((self.get("sizes", site) == 0).sum())

    def _own_figures(self) -> dict[str, float]:
        rows = len(self.info.sites) * self.info.layers * self.info.tokens
        return {"moved": int(distributed.all_sum(self.moved.clone())) / rows}

    def _is_converged(self, record: dict) -> bool:
        return record["moved"] == 0
