"""The baselines of the APC paper: k-means on binary patterns, by the Hamming distance or by the Euclidean distance.

The number of ones in a centroid is free. With centroids of one size m the two distances agree on the nearest
centroid, since the Hamming distance is then |x| + m − 2 |x ∧ c|. If no neuron is active in most of a cluster's
patterns, its centroid has no ones: it attracts patterns with few ones, and its mask keeps nothing. First and re-seeded
centroids are unchanged patterns, not cut or filled to a size; first centroids are never empty.

Here the base class's `captured` is the agreement: the largest possible distance minus the distance to the centroid.
With `init` k-means++, which draws by this distance, `k-majority` is constrained binary matrix factorisation with one
factor per row (Jiang et al., *A clustering approach to constrained binary matrix factorization*, 2014).

Shape letters as in `apc.cluster.lloyd`.
"""

import torch
from torch import Tensor

from apc import ops
from apc.cluster.lloyd import SHARE_BITS, ClusteringModule, Index
from apc.collect.patterns import Block
from apc.utils.errors import UserError

_TILE = 2**24  # float64 numbers in a tile of `BRBKMeans`


class KMajority(ClusteringModule):
    """k-means by the distance penalty · |x ∧ ¬c| + |¬x ∧ c|; a centroid's bit is the majority of its patterns' bits.

    This is k-modes on bits (Huang, *Extensions to the k-means algorithm for clustering large data sets with categorical
    values*, 1998). If s of a cluster's n patterns have a one at some neuron, the centroid has a one there if penalty ·
    s > n − s. At a tie it is zero: the distance is the same, and a smaller mask is cheaper. All arithmetic is in
    integers, so the sum of distances never rises, and it is the same on any number of ranks.
    """

    centroid_size = "free"
    raw_seeds = True

    def _check(self) -> None:
        super()._check()
        most = self.cfg.penalty * max(self.info.widths.values()) * max(self.group_rows, 1 << SHARE_BITS)
        if most >= 2**63:
            raise UserError(
                f"cluster.penalty={self.cfg.penalty}: distances of {self.group_rows:,} patterns do not fit 63 bits; "
                "lower it"
            )

    def limits(self, site: str, totals: Tensor) -> Tensor:
        """The largest possible distance of each pattern (to its complement), int64 [..., n]."""
        return self.info.widths[site] + (self.cfg.penalty - 1) * totals

    def nearest(self, site: str, rows: Tensor, centroids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centroid and agreement of each pattern, int64 [..., n] each."""
        ids, distance = ops.assign_hamming(rows, centroids, self.cfg.penalty)
        return ids, limits - distance

    def _binarize(self, sums: Tensor, sizes: Tensor) -> Tensor:
        return ops.pack((self.cfg.penalty + 1) * sums.long() > sizes.unsqueeze(1))

    def _changeable(self, D: int) -> int:
        return D


class BRBKMeans(KMajority):
    """BRB-KMeans, binary → real → binary: k-means by the Euclidean distance, with means cut to masks at the end.

    A mean is cut at 0.5, ties to zero. The paper's code cuts the means after every update. That would equal
    `KMajority`, because on binary vectors the squared Euclidean distance is the Hamming distance.

    Means are rounded to multiples of 2^−b, with b from `_fraction_bits` (12 at 14,336 neurons, 13 at 1,536); the
    error is about that of a float32 product. All other arithmetic is exact in float64, sums of products included.
    So assignment, ties (to the lowest id) and sums are the same on any device and number of ranks. The grid point
    next to a mean is the best for its cluster, so the sum of squared distances never rises. The product runs in
    float64, which is slow on GPUs made for graphics.

    Further buffers, one set per site: means int32 [G, K, D], in units of 2^−b. `centroids` are the means cut to masks.
    """

    gathered_buffers = ("centroids", "means")

    def _register_site(self, site: str, D: int) -> None:
        super()._register_site(site, D)
        self.register_buffer(f"means_{site}", torch.zeros(self.groups, self.cfg.k, D, dtype=torch.int32))

    def _fraction_bits(self, D: int) -> int:
        """The number of fraction bits b of a mean.

        b is chosen so that distances, in units of 2^−2b, fit 62 bits when summed over a group's rows or shifted by
        SHARE_BITS. A single distance is then exact in float64.
        """
        return (62 - D.bit_length() - max(SHARE_BITS, self.group_rows.bit_length())) // 2

    def _as_means(self, site: str, masks: Tensor) -> Tensor:
        D = self.info.widths[site]
        return ops.unpack(masks, D).int() << self._fraction_bits(D)

    def _limits(self, site: str, block: Block, rows: Tensor) -> Tensor:
        D = self.info.widths[site]
        return torch.full(rows.shape[:2], D << 2 * self._fraction_bits(D), device=rows.device)

    def _assign(self, site: str, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        D, b = self.info.widths[site], self._fraction_bits(self.info.widths[site])
        ids, distance = torch.empty_like(limits), torch.empty_like(limits)
        for group, means in enumerate(self.get("means", site)):
            c = means.double()
            norms, scaled = torch.linalg.vecdot(c, c), c.T * 2 ** (b + 1)
            clusters = torch.arange(len(c), device=c.device)
            tile = max(1, _TILE // (D + 3 * len(c)))
            for first in range(0, rows.shape[1], tile):
                part = slice(first, first + tile)
                x = ops.unpack(rows[group, part], D).double()
                scores = torch.addmm(norms, x, scaled, alpha=-1)  # |c|² − 2 x · c
                least = scores.amin(1, keepdim=True)
                ids[group, part] = torch.where(scores == least, clusters, len(clusters)).amin(1)
                distance[group, part] = least.squeeze(1).long() + (x.sum(1).long() << 2 * b)
        return ids, limits - distance

    def _update(self, site: str) -> Tensor:
        """Sets new means and masks from the sums. Returns how many entries of means changed, int64."""
        super()._update(site)
        return (self._recompute("means", site, self._mean) != 0).sum()

    def _mean(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Means int32 [n, D], rounded half up, from sums int32 or int64 [n, D] and sizes int64 [n]."""
        count = sizes.clamp_min(1).unsqueeze(1)
        return (((sums.long() << self._fraction_bits(sums.shape[1]) + 1) + count) // (2 * count)).int()

    def _set_centroids(self, site: str, group: Index, cluster: Index, seeds: Tensor) -> int:
        self.get("means", site)[group, cluster] = self._as_means(site, seeds)
        return super()._set_centroids(site, group, cluster, seeds)
