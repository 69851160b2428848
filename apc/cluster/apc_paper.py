"""The clustering of the APC paper (Dhar et al., Euro-Par 2025): clusters of equal size, updated after every window.

A chunk is the patterns of one window. It fills the clusters in the order of their ids: each takes the ⌊n / K⌋ nearest
of the remaining patterns, by the masked distance. Patterns left over are not used in the update. The update
averages the centroid (weighted by all earlier chunks) with the mean of its new patterns, and keeps the neurons
with the largest values. The paper keeps neurons above a quantile. Here ties go to the lowest neuron, so every
centroid has exactly the configured number of ones. With several ranks, each rank processes a chunk of its own, and
the updated centroid is the average of the ranks' centroids.

Shape letters as in `apc.cluster.lloyd`.
"""

import math

import torch
from torch import Tensor

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect.patterns import Block, PatternInfo
from apc.config.schema import ClusterConfig
from apc.utils import distributed
from apc.utils.errors import UserError

# Values of `cluster_of` that are not a cluster.
_LEFT_OVER, _NO_PASS = -1, -2


class PaperClustering(ClusteringModule):
    """The paper's algorithm.

    Buffers in addition to those of `ClusteringModule`. One set per site:

    seen: int64 [], chunks so far;
    cluster_of: int32 [L, T], each row's cluster in the latest pass (−1: left over, −2: none yet).

    One for all sites: moved, int64 [], the number of rows that changed their cluster in this pass so far.
    """

    in_order = True
    updates_per_window = True
    gathered_buffers = ()
    reduced_buffers = (*ClusteringModule.reduced_buffers, "cluster_of")
    usable_means = "with some ones and no more than a centroid has"
    needs_usable = raw_seeds = True

    moved: Tensor

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
            raise UserError("cluster.algorithm=apc-paper updates after every window; leave out cluster.schedule=step")
        if self.cfg.k > self.chunk:
            raise UserError(
                f"cluster.k={self.cfg.k} is more than the {self.chunk} patterns of a window; "
                "apc-paper needs at least one for each cluster; lower it"
            )

    def _register_site(self, site: str, D: int) -> None:
        super()._register_site(site, D)
        self.register_buffer(f"seen_{site}", torch.zeros((), dtype=torch.int64))
        cluster_of = torch.full((self.info.layers, self.info.tokens), _NO_PASS, dtype=torch.int32)
        self.register_buffer(f"cluster_of_{site}", cluster_of)

    def on_fit_start(self) -> None:
        """Tells how many patterns of a window are left over, and sets the first centroids."""
        left_over = self.chunk % self.cfg.k
        if left_over and distributed.is_main():
            print(
                f"apc-paper: a window's {self.chunk:,} patterns fill {self.cfg.k:,} clusters with "
                f"{self.chunk // self.cfg.k:,} each; the {left_over:,} left over stay out of its update",
                flush=True,
            )
        super().on_fit_start()

    def usable(self, site: str, patterns: Tensor) -> Tensor:
        """Whether each pattern of uint8 [n, W] is not empty and has no more ones than a centroid, bool [n]."""
        ones = ops.popcount(patterns)
        return (ones > 0) & (ones <= ops.mask_size(self.info.widths[site], self.cfg.density))

    def _reset_pass(self, site: str) -> None:
        super()._reset_pass(site)
        self.moved.zero_()

    @property
    def _layers_apart(self) -> bool:
        return True  # the clusters' sums do not include left-over patterns

    def _add_rows(self, site: str, block: Block) -> None:
        S = self.info.seq_len
        chunks = block.tokens // S
        ranks = distributed.world_size()
        # The ranks' numbers of chunks differ by at most one, so their mean, rounded up, is the largest of them.
        steps = math.ceil(int(distributed.all_sum(torch.tensor(chunks, device=self.device))) / ranks)
        for step in range(steps):
            old = self.get("centroids", site)
            if step < chunks:
                span = slice(step * S, (step + 1) * S)
                new = self._learn(site, block.patterns[site][:, span], block.positions[span].to(self.device))
            else:
                new = torch.zeros_like(old)  # a rank without a chunk does not vote
            if ranks > 1:
                votes = distributed.all_sum(ops.unpack(new, self.info.widths[site]).long())
                new = ops.binarize(votes, self.cfg.density)
            self.changed += ops.popcount(new ^ old).long().sum()
            self._set("centroids", site, new)
            self.get("seen", site).add_(1)
        if not self.history:
            self._add_layer_sums(site, block)

    def _learn(self, site: str, patterns: Tensor, positions: Tensor) -> Tensor:
        """Centroids uint8 [G, K, W] after a chunk, patterns uint8 [L, S, W] at positions int64 [S] of the text.

        Adds the chunk to the sums, sizes, `captured` and `weight`, and updates `cluster_of` and `moved`.
        """
        centroids, K, D = self.get("centroids", site), self.cfg.k, self.info.widths[site]
        rows = self._grouped(patterns)
        capacity = rows.shape[1] // K
        ids = torch.stack(
            [ops.assign_with_capacity(group, own, capacity) for group, own in zip(rows, centroids, strict=True)]
        )
        groups = torch.arange(len(rows), device=ids.device).unsqueeze(1)
        assigned = (ids != _LEFT_OVER).nonzero()[:, 1].view(len(rows), K * capacity)  # the same number in each group
        rows_in, ids_in = rows[groups, assigned], ids.gather(1, assigned)
        sums, sizes = ops.accumulate(rows_in, ids_in, K, D)
        self.get("sums", site).add_(sums)
        self.get("sizes", site).add_(sizes)
        self.get("captured", site).add_(ops.popcount(rows_in & centroids[groups, ids_in]).sum(1))
        self.get("weight", site).add_(ops.popcount(rows).sum(1))
        cluster_of, now = self.get("cluster_of", site), ids.reshape(patterns.shape[:2]).int()
        self.moved += (cluster_of[:, positions] != now).sum()
        cluster_of[:, positions] = now
        # The new centroid is (c · h + mean · n) / (h + n): n patterns of this chunk, h = n · chunks so far. The code
        # leaves out the division by h + n, so that all numbers stay integers.
        earlier = ops.unpack(centroids, D).long() * (capacity * self.get("seen", site))
        return ops.binarize(earlier + sums, self.cfg.density)

    def _share_clusters(self, site: str) -> None:
        """Merges `cluster_of` over all ranks: before, each rank knows the clusters of its own rows only."""
        if distributed.world_size() > 1:
            others = ~self._loader.owned(torch.arange(self.info.tokens))
            distributed.all_max(self.get("cluster_of", site).masked_fill_(others.to(self.device), _NO_PASS))

    def _reduce_to_rank0(self) -> None:
        for site in self.info.sites:
            self._share_clusters(site)
        distributed.sum_at_first(self.moved)
        super()._reduce_to_rank0()

    def _update_centroids(self, site: str) -> int:
        self._share_clusters(site)
        return int((self.get("sizes", site) == 0).sum())

    def _extra_figures(self) -> dict[str, float]:
        rows = len(self.info.sites) * self.info.layers * self.info.tokens
        return {"moved": int(distributed.all_sum(self.moved.clone())) / rows}

    def _is_converged(self, record: dict) -> bool:
        return record["moved"] == 0
