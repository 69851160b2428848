"""Lloyd's algorithm on packed patterns.

Each training step assigns a block of rows to clusters and adds them to the clusters' sums; each update sets a centroid
to the neurons with the largest sums. All sums are integers, so an update is the same to the bit on any number of ranks.
With full passes the objective, the importance that the centroids capture, never falls.

Shape letters as in `apc.collect.patterns`; also G groups that are clustered separately (the layers, or one for all),
K clusters.
"""

import time
from collections.abc import Callable
from typing import cast

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.cluster.seeding import CentroidInit, RowReader
from apc.collect.loader import BlockLoader
from apc.collect.patterns import Block, PatternInfo, by_ffn
from apc.config.schema import ClusterConfig
from apc.utils import distributed
from apc.utils.errors import UserError

ROWS_LIMIT = 1 << 26  # rows of a group whose weighted sums (at most 2**36 per row) fit an int64
# Bits of a key in the buffer `worst`: the captured share above, the row number below.
SHARE_BITS, ROW_BITS = 24, 38
NO_ROW = torch.iinfo(torch.int64).max
Index = Tensor | slice


class ClusteringModule(CentroidInit):
    """Lloyd's algorithm for all layers and sites of a run, and the base class of the other algorithms.

    The whole state of a run is in `history` and the buffers: the four scalars declared below, and one set per site:

    centroids: uint8 [G, K, W].
    sums: [G, K, D] of `sum_type`, each cluster's sum over its rows in the current pass. Between passes it holds the
        sums of the last pass, from which the centroids were computed. With several ranks, each rank then has only its
        own clusters' sums, until `gather_sums`.
    sizes: int64 [G, K], rows in each cluster, over the same pass as sums.
    layer_sums: int64 [L, D], sums over all rows of the first pass.
    captured, weight: int64 [G], the objective and its upper bound.
    worst: int64 [G, K], keys of the K rows with the smallest captured share, ascending. The upper bits of a key are
        the share (24 bits, rounded down), the lower bits the row number, so ties go to the lowest row.
    """

    in_order = False  # whether blocks must come in the order of the text
    updates_per_window = False  # whether each rank updates centroids after every window, not after a pass or step
    # fixed: every centroid has mask_size(D, density) ones; free: as many as its cluster gives it.
    centroid_size = "fixed"
    gathered_buffers: tuple[str, ...] = ("centroids",)  # sharded over the ranks in an update, then gathered
    reduced_buffers: tuple[str, ...] = ("captured", "weight", "sizes", "layer_sums")  # all-reduced at the end of a pass

    passes: Tensor
    started: Tensor
    converged: Tensor
    changed: Tensor  # number of centroid bits that changed in this pass so far

    def __init__(self, cfg: ClusterConfig, info: PatternInfo, seed: int = 0):
        super().__init__(cfg, info, seed)
        self.automatic_optimization = False
        self._check()
        self.history: list[dict] = []
        self._sums_sharded = False  # whether each rank has only its own clusters' sums
        self._within_pass = False  # whether each rank has only the sums of rows it has seen
        for name, dtype in dict(
            passes=torch.int64, started=torch.bool, converged=torch.bool, changed=torch.int64
        ).items():
            self.register_buffer(name, torch.zeros((), dtype=dtype))
        for site, D in info.widths.items():
            self._register_site(site, D)
        self._pass_began = time.perf_counter()

    def _check(self) -> None:
        """Raises UserError if the algorithm can't cluster these patterns with this configuration."""
        cfg = self.cfg
        if cfg.k > self.group_rows:
            raise UserError(
                f"cluster.k={cfg.k} is more than the {self.group_rows} patterns to cluster; "
                "lower it or raise data.fit_windows"
            )
        if self.power and not self.info.with_importance:
            raise UserError(
                f"cluster.weighting={cfg.weighting} needs importances; "
                "set collect.importance=true or cluster.weighting=binary"
            )
        widest = max(self.info.widths.values())
        if 255**self.power * widest >= 2**31:
            raise UserError(
                f"cluster.weighting={cfg.weighting}: its sums are exact only below {2**31 // 255**self.power:,} "
                f"neurons, and the model has {widest:,}; use magnitude"
            )
        if self.group_rows >> ROW_BITS:
            raise UserError(
                f"{self.group_rows:,} patterns in one group, the limit is {1 << ROW_BITS:,}; lower data.fit_windows"
            )
        if self.power and self.group_rows > ROWS_LIMIT:
            raise UserError(
                f"{self.group_rows:,} patterns in one group, but weighted sums are exact only up to {ROWS_LIMIT:,}; "
                "use cluster.weighting=binary"
            )

    def _register_site(self, site: str, D: int) -> None:
        G, K, L = self.groups, self.cfg.k, self.info.layers
        self.register_buffer(f"sums_{site}", torch.zeros(G, K, D, dtype=self.sum_type))
        for name, shape in dict(sizes=(G, K), layer_sums=(L, D), captured=(G,), weight=(G,)).items():
            self.register_buffer(f"{name}_{site}", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer(f"centroids_{site}", torch.zeros(G, K, ops.row_bytes(D), dtype=torch.uint8))
        self.register_buffer(f"worst_{site}", torch.full((G, K), NO_ROW))

    def get(self, name: str, site: str) -> Tensor:
        """The buffer `name` of a site."""
        return getattr(self, f"{name}_{site}")

    def _set(self, name: str, site: str, value: Tensor) -> None:
        self.get(name, site).copy_(value)

    def _by_cluster(self, name: str, site: str) -> Tensor:
        """The buffer `name` [G, K, …] as [G·K, …], whose rows are sharded over the ranks."""
        return self.get(name, site).flatten(0, 1)

    @property
    def _loader(self) -> BlockLoader:
        return self.trainer.datamodule.loader  # type: ignore[attr-defined]  # set by Trainer.fit

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer without parameters.

        Its steps advance Lightning's global_step, which max_steps and checkpoints use.
        """
        return torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.0)

    def state_dict(self, *args, **kwargs) -> dict:  # type: ignore[override]  # torch declares overloads
        """The buffers, with sums of all clusters over the rows of all ranks. Call on all ranks."""
        if self._within_pass:
            self._reduce_to_rank0()
        self.gather_sums()
        return super().state_dict(*args, **kwargs)

    def get_extra_state(self) -> dict:
        """The history, which checkpoints store besides the buffers."""
        return {"history": self.history}

    def set_extra_state(self, state: dict) -> None:
        """Restores the history."""
        self.history = state["history"]

    def fields(self) -> list[str]:
        """Names of the block fields that a step reads."""
        sites = self.info.sites
        importance = [f"importance.{site}" for site in sites] if self.power else []
        return [f"patterns.{site}" for site in sites] + importance + self.info.routes()

    def working_bytes(self) -> int:
        """Estimated device memory in bytes that a training takes, besides blocks and buffers.

        An update converts the sums to int64; a step sorts a block's rows and stores their totals.
        """
        return 3 * max(8 * self.get("sums", site).numel() for site in self.info.sites) + 2**30

    @property
    def sum_type(self) -> torch.dtype:
        """The smallest type that can hold a pass's sums. int32 halves the bytes to read, write and exchange."""
        counts = not self.power and self.cfg.schedule == "epoch"  # the sums of schedule `step` include earlier passes
        return torch.int32 if counts and self.group_rows < 2**31 else torch.int64

    def on_fit_start(self) -> None:
        """Sets the first centroids, unless a checkpoint was loaded."""
        if not self.started:
            for site in self.info.sites:
                self._set_centroids(site, slice(None), slice(None), self.first_centroids(self._reader(site)))
            self.started.fill_(True)

    def _reader(self, site: str) -> RowReader:
        return RowReader(self._loader.source, site, self.pooled, self._loader.owned, self.device)

    def on_train_start(self) -> None:
        """Resumes in mid-pass if the checkpoint was saved in mid-pass; ends the training if no pass is left."""
        self._pass_began = time.perf_counter()
        self._within_pass = 0 < self._loader.position < len(self._loader)
        if self._within_pass and distributed.rank():  # rank 0 has the sums of all ranks
            for site in self.info.sites:
                self._reset_pass(site)
        if self.converged or self.passes >= self.cfg.max_epochs:
            self.trainer.should_stop = True

    def training_step(self, block: Block, batch_index: int) -> None:
        """Adds a block to the pass. After the last block, or at `max_steps`, ends the pass."""
        if batch_index == 0:
            self._begin_pass()
        block = by_ffn(block, self.info)
        for site in self.info.sites:
            self._add_rows(site, block)
            if self.cfg.schedule == "step":
                self.changed += self._update(site)
        if batch_index == self.trainer.num_training_batches - 1 or self.global_step + 1 == self.trainer.max_steps:
            self._end_pass()
        cast(LightningOptimizer, self.optimizers()).step()

    def _begin_pass(self) -> None:
        self._pass_began = time.perf_counter()
        self._sums_sharded, self._within_pass = False, True
        self.changed.zero_()
        for site in self.info.sites:
            if self.cfg.schedule == "step":  # halves the weight of earlier passes, in integers
                for name in ("sums", "sizes"):
                    self._set(name, site, self.get(name, site) >> 1)
            self._reset_pass(site)

    def _pass_sums(self, site: str) -> list[Tensor]:
        """The buffers, except `worst`, that accumulate over the rows this rank has seen in the current pass."""
        names = ("captured", "weight", "sums", "sizes") if self.cfg.schedule == "epoch" else ("captured", "weight")
        return [self.get(name, site) for name in names + (() if self.history else ("layer_sums",))]

    def _reset_pass(self, site: str) -> None:
        for value in self._pass_sums(site):
            value.zero_()
        self.get("worst", site).fill_(NO_ROW)

    def _reduce_to_rank0(self) -> None:
        """Reduces the sums of an unfinished pass to rank 0, and resets them on the other ranks."""
        for site in self.info.sites:
            for value in self._pass_sums(site):
                distributed.sum_at_first(value)
            self._share_worst(site)
            if distributed.rank():
                self._reset_pass(site)

    def gather_sums(self) -> None:
        """Copies the sums of all clusters to all ranks, if they are sharded. Call on all ranks."""
        if self._sums_sharded:
            for site in self.info.sites:
                distributed.gather_rows(self._by_cluster("sums", site))
            self._sums_sharded = False

    def _grouped(self, value: Tensor) -> Tensor:
        """[L, n, ...] → [G, rows, ...]"""
        return value.flatten(0, 1).unsqueeze(0) if self.pooled else value

    def _row_numbers(self, block: Block) -> Tensor:
        """Each row's number in its group, int64 [G, rows], the same for any split into blocks and ranks."""
        positions = block.positions.to(self.device).expand(self.info.layers, -1)
        if not self.pooled:
            return positions
        layers = torch.arange(self.info.layers, device=self.device)
        return (positions * self.info.layers + layers.unsqueeze(1)).reshape(1, -1)

    def _add_rows(self, site: str, block: Block) -> None:
        """Assigns a block's rows, adds them to their clusters' sums, and updates `captured`, `weight` and `worst`."""
        rows = self._grouped(block.importance[site] if self.power else block.patterns[site])
        limits = self._limits(site, block, rows)
        ids, captured = self._assign(site, rows, limits)
        empty = self._empty_rows(block, ids)
        scales = self._scales(limits)
        sums, sizes = self.get("sums", site), self.get("sizes", site)
        if self.cfg.schedule == "epoch":
            self._accumulate(site, rows, ids, scales, self.cfg.k, (sums, sizes))
            sizes.sub_(empty)
        else:
            added, counts = self._accumulate(site, rows, ids, scales, self.cfg.k)
            sums.add_(distributed.all_sum(added))
            sizes.add_(distributed.all_sum(counts - empty))
        self.get("captured", site).add_((captured * scales).sum(1))
        self.get("weight", site).add_((limits * scales).sum(1))
        if self._layers_apart and not self.history:
            self._add_layer_sums(site, block)
        keys = ((captured.long() << SHARE_BITS) // limits.clamp_min(1) << ROW_BITS) + self._row_numbers(block)
        self._merge_worst(site, keys.masked_fill_(limits == 0, NO_ROW))  # without empty rows

    def _empty_rows(self, block: Block, ids: Tensor) -> Tensor | int:
        """Number of padding rows (see `by_ffn`) in each cluster, int64 [G, K]; 0 if the block has no padding."""
        if block.positions.dim() == 1:
            return 0
        empty = self._grouped(block.positions < 0).long()
        return torch.zeros_like(ids.new_empty(self.groups, self.cfg.k)).scatter_add_(1, ids.long(), empty)

    def _scales(self, limits: Tensor) -> Tensor:
        """The factor that multiplies each row in sums: `ops.scales_of` for importances, 1 for binary patterns."""
        return ops.scales_of(limits) if self.power else torch.ones_like(limits)

    def _limits(self, site: str, block: Block, rows: Tensor) -> Tensor:
        """`limits` of a block's rows. Their totals never change, so the first pass stores them in `block.derived`."""
        name = f"totals.{site}.{self.power}"
        if name not in block.derived:
            block.derived[name] = self.totals(rows).int()
        return self.limits(site, block.derived[name].long())

    def _assign(self, site: str, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        return self.nearest(site, rows, self.get("centroids", site), limits)

    def _accumulate(
        self, site: str, rows: Tensor, ids: Tensor, scales: Tensor, K: int, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.power:
            return ops.accumulate_weighted(rows, ids, scales, K, self.power, out=out)
        return ops.accumulate(rows, ids, K, self.info.widths[site], out=out)

    @property
    def _layers_apart(self) -> bool:
        """Whether `layer_sums` must be summed separately, because they can't be computed from the clusters' sums."""
        return self.pooled

    def _add_layer_sums(self, site: str, block: Block) -> None:
        L, n = block.patterns[site].shape[:2]
        layer_ids = torch.zeros(L, n, dtype=torch.int64, device=self.device)
        out = self.get("layer_sums", site).unsqueeze(1), torch.zeros(L, 1, dtype=torch.int64, device=self.device)
        rows = block.importance[site] if self.power else block.patterns[site]
        scales = self._scales(self._limits(site, block, rows).view(L, n))
        self._accumulate(site, rows, layer_ids, scales, 1, out)

    def _merge_worst(self, site: str, keys: Tensor) -> None:
        keys = torch.cat([self.get("worst", site), keys], dim=1)
        self._set("worst", site, keys.topk(self.cfg.k, dim=1, largest=False, sorted=True).values)

    def _share_worst(self, site: str) -> None:
        keys = distributed.all_concat(self.get("worst", site), dim=1).clone()
        self.get("worst", site).fill_(NO_ROW)
        self._merge_worst(site, keys)

    def _update(self, site: str) -> Tensor:
        """Sets new centroids from the sums. Returns how many bits changed, int64."""
        return ops.popcount(self._recompute("centroids", site, self._binarize)).long().sum()

    def _recompute(self, name: str, site: str, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sets the buffer `name` [G·K, …] to `formula` of the clusters' sums [n, D] and sizes int64 [n].

        Returns old XOR new values. An empty cluster keeps its value. If the sums are sharded, each rank computes its
        own clusters and all gather.
        """
        sums, sizes, old = (self._by_cluster(each, site) for each in ("sums", "sizes", name))
        new = torch.empty_like(old)
        for rows in distributed.own_rows(len(old)) if self._sums_sharded else [slice(None)]:
            new[rows] = torch.where((sizes[rows] > 0).unsqueeze(1), formula(sums[rows], sizes[rows]), old[rows])
        if self._sums_sharded:
            distributed.gather_rows(new)
        changes = new ^ old
        old.copy_(new)
        return changes

    def _binarize(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Centroids uint8 [n, W] from sums int32 or int64 [n, D] and sizes int64 [n]."""
        return ops.binarize(sums, self.cfg.density)

    def _changeable(self, D: int) -> int:
        """The largest number of bits that an update can change in a centroid: all its ones and as many zeros."""
        return 2 * ops.mask_size(D, self.cfg.density)

    def _end_pass(self) -> None:
        """Exchanges sums between the ranks, updates and re-seeds centroids, and checks for convergence."""
        empty, shares, changeable = 0, [], 0
        figures: dict[str, float | list[float]] = {}
        self._within_pass = False
        self._sums_sharded = self.cfg.schedule == "epoch"
        for site, D in self.info.widths.items():
            self._exchange(site)
            empty += self._update_centroids(site)
            weight = self.get("weight", site)
            captured = self.get("captured", site).double() / weight.double().clamp_min(1)
            shares.append(
                (captured.sum() / (weight > 0).sum().clamp_min(1)).item()
            )  # experts without tokens do not count
            figures[f"cluster/captured_{site}"] = shares[-1]
            if not self.pooled:
                figures[f"cluster_layers/captured_{site}"] = captured.tolist()
            changeable += self.groups * self.cfg.k * self._changeable(D)
        self.passes += 1
        record = dict(epoch=int(self.passes), captured=sum(shares) / len(shares), empty=empty)
        record |= dict(changed=int(self.changed) / changeable, seconds=time.perf_counter() - self._pass_began)
        record |= self._extra_figures()
        if self._is_converged(record):
            self.converged.fill_(True)
        self.history.append(record)
        # Not with `log_dict`, which writes after the pass's checkpoint: a kill between the two would lose the row.
        row = {f"cluster/{name}": float(value) for name, value in record.items()} | figures
        for logger in self.loggers:
            logger.log_metrics(row)  # type: ignore[arg-type]  # the run's logger takes lists too
        if self.converged or self.passes >= self.cfg.max_epochs:
            self.trainer.should_stop = True

    def _exchange(self, site: str) -> None:
        """Sums the pass over the ranks. Each rank gets the large `sums` of its own clusters only."""
        reduced = ["captured", "weight"]
        if not (self._layers_apart or self.history):
            self._set("layer_sums", site, self.get("sums", site).sum(1))
        if self._sums_sharded:
            reduced.append("sizes")
            distributed.sum_own_rows(self._by_cluster("sums", site))
        if not self.history and (self._layers_apart or self._sums_sharded):
            reduced.append("layer_sums")
        for name in reduced:
            distributed.all_sum(self.get(name, site))

    def _update_centroids(self, site: str) -> int:
        """Sets new centroids at the end of a pass, and re-seeds empty clusters.

        Returns the number of empty clusters. If an expert has fewer rows than clusters, the excess does not count.
        """
        if self.cfg.schedule == "epoch":
            self.changed += self._update(site)
        sizes = self.get("sizes", site)
        empties = sizes == 0
        self.changed += self._reseed(site, empties)
        lacking = (self.cfg.k - sizes.sum(1)).clamp_min(0)
        return int((empties.sum(1) - lacking).clamp_min(0).sum())

    def _extra_figures(self) -> dict[str, float]:
        """Further figures for the record of a pass, which only this algorithm reports."""
        return {}

    def _is_converged(self, record: dict) -> bool:
        """Whether to stop after the pass with this record; `history` has the passes before it."""
        if record["changed"] == 0:
            return True
        if not self.history or record["empty"] or self.cfg.schedule != "epoch":
            return False
        before = self.history[-1]["captured"]
        return record["captured"] - before < self.cfg.tolerance * before

    def _reseed(self, site: str, empties: Tensor) -> int:
        """Sets a group's j-th empty cluster to the row with the j-th smallest share. Returns how many bits changed."""
        if not empties.any():
            return 0
        self._share_worst(site)
        group, cluster = empties.nonzero(as_tuple=True)
        worst = self.get("worst", site)[group, (empties.cumsum(1) - 1)[group, cluster]]
        has_row = worst < NO_ROW
        group, cluster, row = group[has_row], cluster[has_row], worst[has_row] & ((1 << ROW_BITS) - 1)
        return self._set_centroids(site, group, cluster, self.seeds(self._reader(site), group, row))

    def _set_centroids(self, site: str, group: Index, cluster: Index, seeds: Tensor) -> int:
        """Sets the centroids at pairs (group, cluster) to seeds uint8 [n, W].

        With two full slices, seeds [G, K, W] set all. Returns how many bits changed.
        """
        centroids = self.get("centroids", site)
        changed = int(ops.popcount(seeds ^ centroids[group, cluster]).sum())
        centroids[group, cluster] = seeds
        return changed

    def codebook(self, provenance: dict) -> Codebook:
        """The codebook of the current centroids, on the host. Call on all ranks."""
        self.gather_sums()
        info, cfg = self.info, self.cfg
        sites = {}
        for site in info.widths:
            sums, sizes, centroids = (self.get(name, site) for name in ("sums", "sizes", "centroids"))
            sites[site] = SiteCodebook(
                centroids=centroids.clone(),
                profiles=_profiles(sums, sizes, centroids),
                sizes=sizes.clone(),
                static=ops.binarize(self.get("layer_sums", site), cfg.density),
                thresholds=info.rule.thresholds.get(site, torch.zeros(info.layers)).clone(),
            )
        book = Codebook(
            sites=sites,
            widths=dict(info.widths),
            layers=info.layers,
            hidden_size=info.hidden_size,
            ffn_width=info.ffn_width,
            scope=cfg.scope,
            weighting=cfg.weighting,
            density=cfg.density,
            active=info.rule.kind,
            sparsity=info.rule.sparsity,
            provenance=provenance,
            centroid_size=self.centroid_size,
            penalty=cfg.penalty,
            projections=info.projections,
            experts=info.experts,
        )
        return book.to(torch.device("cpu"))


_CLUSTERS_AT_ONCE = 1024  # profiles computed at a time, because all of them as float64 would take too much memory


def _profiles(sums: Tensor, sizes: Tensor, centroids: Tensor) -> Tensor:
    """Profiles float16 [G, K, D] as in `SiteCodebook`, from sums int32 or int64 [G, K, D]."""
    result = torch.empty(sums.shape, dtype=torch.float16, device=sums.device)
    for group in range(len(sums)):
        for first in range(0, sums.shape[1], _CLUSTERS_AT_ONCE):
            piece = group, slice(first, first + _CLUSTERS_AT_ONCE)
            masks = ops.unpack(centroids[piece], sums.shape[2])
            mean = torch.where((sizes[piece] > 0).unsqueeze(1), sums[piece].double(), masks.double())
            result[piece] = (mean / mean.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).half()
    return result
