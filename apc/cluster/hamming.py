"""The clusterings that the APC paper compares with: k-means on binary patterns, by Hamming's distance throughout or in real numbers.

Their centroids have as many ones as their clusters give them (`centroid_size` is free): among masks of one size Hamming's distance is
|x| + m − 2 |x ∧ c|, and its nearest that of the masked distance. A centroid may come out without any one, if its patterns share no neuron; it
then stands for patterns of few ones, and as a mask keeps nothing. Starts and re-seeds are patterns as they are; starts are not empty.

What the base class calls captured is agreement here: how far a pattern and its centroid are below the greatest distance there could be.
With `init` k-means++ (drawn by this distance) `k-majority` is the clustering form of constrained binary matrix factorisation, where each
row takes one factor (Jiang et al., *A clustering approach to constrained binary matrix factorization*, 2014).

Shape letters as in `apc.clustering`.
"""

import torch
from torch import Tensor

from apc import ops
from apc.cluster.lloyd import SHARE_BITS, ClusteringModule
from apc.cluster.seeding import RowReader
from apc.collect.patterns import Block
from apc.utils.errors import UserError

_TILE = 2**24  # numbers of eight bytes in a tile of `BRBKMeans`


class KMajority(ClusteringModule):
    """k-means by the distance penalty · |x ∧ ¬c| + |¬x ∧ c|: each bit of a centroid is what most of its patterns have (Huang, *Extensions to the
    k-means algorithm for clustering large data sets with categorical values*, 1998: k-modes, here on bits).

    With n patterns, s of them with a one, a bit is one if penalty · s > n − s, and at a tie zero: both are as near to the patterns, and the smaller
    mask is cheaper. All is in whole numbers: the sum of distances never rises, and is the same on any number of ranks.
    """

    centroid_size = "free"

    def _check(self) -> None:
        super()._check()
        most = self.cfg.penalty * max(self.info.widths.values()) * max(self.group_rows, 1 << SHARE_BITS)
        if most >= 2**63:
            raise UserError(
                f"cluster.penalty={self.cfg.penalty}: distances of {self.group_rows:,} patterns do not fit 63 bits; lower it"
            )

    def limits(self, site: str, totals: Tensor) -> Tensor:
        return self.info.widths[site] + (self.cfg.penalty - 1) * totals  # the distance from the pattern's complement

    def nearest(self, site: str, rows: Tensor, centroids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        ids, distance = ops.assign_hamming(rows, centroids, self.cfg.penalty)
        return ids, limits - distance

    def seeds(self, reader: RowReader, group: Tensor, row: Tensor) -> Tensor:
        return reader.read("patterns", group, row)

    def _binarize(self, sums: Tensor, sizes: Tensor) -> Tensor:
        return ops.pack((self.cfg.penalty + 1) * sums.long() > sizes.unsqueeze(1))

    def _changeable(self, D: int) -> int:
        return D


class BRBKMeans(KMajority):
    """BRB-KMeans, binary → real → back: k-means by the Euclidean distance on patterns as real numbers; at the end each mean is cut at 0.5, a tie to zero.
    (With means cut after every update, as the paper's artifact has it, it would be `KMajority`: among binary points the two distances agree.)

    One thing is rounded, each mean: to a multiple of 2^−b, with b of `_fraction_bits` (12 at 14,336 neurons and 13 at 1,536, which moves a distance
    about as much as a product in float32 would). On that grid all else is exact, sums of products too, in float64: assignment, ties (to the
    lowest id) and sums are the same on any device and number of ranks; and since the grid's point next to a mean is its best for the cluster, the sum
    of squared distances never rises. The product runs at the speed of float64, which on GPUs for graphics is a small part of float32's.

    Further buffers, one set per site: means int32 [G, K, D], in units of 2^−b. `centroids` are the means as they stand, cut.
    """

    def _register_site(self, site: str, D: int) -> None:
        super()._register_site(site, D)
        self.register_buffer(f"means_{site}", torch.zeros(self.groups, self.cfg.k, D, dtype=torch.int32))

    def _fraction_bits(self, D: int) -> int:
        """b: distances, in units of 2^−2b, fit 62 bits when summed over a group's rows or shifted by a share's bits; so single ones fit float64."""
        return (62 - D.bit_length() - max(SHARE_BITS, self.group_rows.bit_length())) // 2

    def _set_first_centroids(self, site: str, centroids: Tensor) -> None:
        super()._set_first_centroids(site, centroids)
        self._set("means", site, self._as_means(site, centroids))

    def _as_means(self, site: str, masks: Tensor) -> Tensor:
        D = self.info.widths[site]
        return ops.unpack(masks, D).int() << self._fraction_bits(D)

    def _limits(self, site: str, block: Block, rows: Tensor) -> Tensor:
        return torch.full(
            rows.shape[:2],
            self.info.widths[site] << 2 * self._fraction_bits(self.info.widths[site]),
            device=rows.device,
        )

    def _assign(self, site: str, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        D, b = self.info.widths[site], self._fraction_bits(self.info.widths[site])
        ids, distance = torch.empty_like(limits), torch.empty_like(limits)
        for group, means in enumerate(self.get("means", site)):
            real = means.double()
            lengths, twice = torch.linalg.vecdot(real, real), real.T * 2 ** (b + 1)
            clusters = torch.arange(len(real), device=real.device)
            tile = max(1, _TILE // (D + 3 * len(real)))
            for first in range(0, rows.shape[1], tile):
                part = slice(first, first + tile)
                x = ops.unpack(rows[group, part], D).double()
                scores = torch.addmm(lengths, x, twice, alpha=-1)  # |c|² − 2 x · c
                least = scores.amin(1, keepdim=True)
                ids[group, part] = torch.where(scores == least, clusters, len(clusters)).amin(1)
                distance[group, part] = least.squeeze(1).long() + (x.sum(1).long() << 2 * b)
        return ids, limits - distance

    def _update(self, site: str) -> Tensor:
        """New means from the sums, and the masks that they are cut to. Returns how many means changed, int64."""
        super()._update(site)
        old = self._by_cluster("means", site)
        new = self._recompute("means", site, self._mean)
        changed = (new != old).sum()
        old.copy_(new)
        return changed

    def _mean(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """sums int32 or int64 [n, D], sizes int64 [n] → means int32 [n, D], rounded half up."""
        count = sizes.clamp_min(1).unsqueeze(1)
        return (((sums.long() << self._fraction_bits(sums.shape[1]) + 1) + count) // (2 * count)).int()

    def _set_centroids(self, site: str, group: Tensor, cluster: Tensor, seeds: Tensor) -> int:
        self.get("means", site)[group, cluster] = self._as_means(site, seeds)
        return super()._set_centroids(site, group, cluster, seeds)
