"""Clusters patterns: each training step assigns a block of rows and adds it to its clusters' sums, each update keeps the
neurons with the largest sums.

All sums are integers, so an update is the same to the bit on any number of ranks, and with full passes the objective, the
importance that the centroids capture, never falls. Shape letters as in `apc.patterns`; G groups that are clustered apart
(the layers, or one), K clusters.
"""

import time
from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.cluster.seeding import CentroidInit, RowReader
from apc.collect.patterns import Block, PatternInfo, PatternSource
from apc.config.schema import WEIGHTINGS, ClusterConfig
from apc.utils import distributed
from apc.utils.errors import UserError

ROWS_LIMIT = 1 << 26  # rows of a group whose weighted sums (2**36 a row) surely fit an int64
SHARE_BITS, ROW_BITS = 24, 38  # of a key in `worst`
NO_ROW = torch.iinfo(torch.int64).max


class ClusteringModule(LightningModule):
    """Lloyd's algorithm on packed patterns, for all layers and sites of a run.

    Everything that a run needs to go on is in the buffers, one set per site:
    centroids uint8 [G, K, W]; sums [G, K, D] of `sum_type` and sizes int64 [G, K] of the pass so far, and until the next one begins
    of the last full pass, that the centroids were cut from (with several ranks each then has the sums of its own clusters, until
    `gather_sums`); layer_sums int64 [L, D], every row of the first pass;
    captured and weight, int64 [G], the objective and its upper limit; worst int64 [G, K], the rows captured worst so far, worst
    first, as keys: captured / total in 24 bits, rounded down, then the row's number, so that of equal shares the lowest row is first.
    """

    in_order = False  # whether blocks must come in the order of the text
    init_class: type[CentroidInit] = CentroidInit
    centroid_size = "fixed"  # or free: whether every centroid has exactly its share of ones

    def __init__(self, cfg: ClusterConfig, info: PatternInfo, seed: int = 0):
        super().__init__()
        self.cfg, self.info, self.seed = cfg, info, seed
        self.automatic_optimization = False
        self.power = WEIGHTINGS[cfg.weighting]
        self.pooled = cfg.scope == "pooled"
        self.groups = 1 if self.pooled else info.layers
        self.group_rows = info.tokens * (info.layers if self.pooled else 1)
        self._check()
        self.history: list[dict] = []
        self._sums_apart = False  # whether each rank has the sums of its own clusters alone
        self._within_pass = False  # where each rank has what it has seen itself
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("converged", torch.zeros((), dtype=torch.bool))
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64))  # bits of centroids, in the pass so far
        for site, D in info.widths.items():
            self._register_site(site, D)
        self._pass_began = time.perf_counter()

    def _check(self) -> None:
        cfg = self.cfg
        if cfg.k > self.group_rows:
            raise UserError(
                f"cluster.k={cfg.k} is more than the {self.group_rows} patterns to cluster; lower it or raise data.fit_windows"
            )
        if self.power and not self.info.with_importance:
            raise UserError(
                f"cluster.weighting={cfg.weighting} needs importances; set collect.importance=true or cluster.weighting=binary"
            )
        widest = max(self.info.widths.values())
        if 255**self.power * widest >= 2**31:
            raise UserError(
                f"cluster.weighting={cfg.weighting} sums exactly only below {2**31 // 255**self.power:,} neurons, the model has {widest:,}; use magnitude"
            )
        if self.group_rows >> ROW_BITS:
            raise UserError(
                f"{self.group_rows:,} patterns in one group: row numbers hold {1 << ROW_BITS:,}; lower data.fit_windows"
            )
        if self.power and self.group_rows > ROWS_LIMIT:
            raise UserError(
                f"{self.group_rows:,} patterns in one group: weighted sums hold {ROWS_LIMIT:,}; use cluster.weighting=binary"
            )

    def _register_site(self, site: str, D: int) -> None:
        G, K, L = self.groups, self.cfg.k, self.info.layers
        self.register_buffer(f"sums_{site}", torch.zeros(G, K, D, dtype=self.sum_type))
        zeros = dict(sizes=(G, K), layer_sums=(L, D), captured=(G,), weight=(G,))
        for name, shape in zeros.items():
            self.register_buffer(f"{name}_{site}", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer(f"centroids_{site}", torch.zeros(G, K, ops.row_bytes(D), dtype=torch.uint8))
        self.register_buffer(f"worst_{site}", torch.full((G, K), NO_ROW))

    def get(self, name: str, site: str) -> Tensor:
        """The buffer `name` of a site."""
        return getattr(self, f"{name}_{site}")

    def _set(self, name: str, site: str, value: Tensor) -> None:
        self.get(name, site).copy_(value)

    def configure_optimizers(self):
        # Nothing is trained by gradients; a step of this counts global_step on, which max_steps and checkpoints go by.
        return torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.0)

    def state_dict(self, *args, **kwargs) -> dict:
        """With several ranks to be called on all of them: a checkpoint holds the sums of all clusters, and within a pass what all have seen of it."""
        if self._within_pass:
            self._reduce_to_rank0()
        self.gather_sums()
        return super().state_dict(*args, **kwargs)

    def get_extra_state(self) -> dict:
        return {"history": self.history}

    def set_extra_state(self, state: dict) -> None:
        self.history = state["history"]

    def fields(self) -> list[str]:
        """The fields of a block that a step reads."""
        sites = self.info.sites
        return [f"patterns.{site}" for site in sites] + ([f"importance.{site}" for site in sites] if self.power else [])

    def working_bytes(self) -> int:
        """About what a training holds on the device besides blocks and buffers: what an update makes of the sums, in int64, the sort of a block's rows,
        and totals of rows that stay there."""
        return 3 * max(8 * self.get("sums", site).numel() for site in self.info.sites) + 2**30

    @property
    def sum_type(self) -> torch.dtype:
        """The type that the sums of a pass surely fit: with int32 there is half as much to read, write and exchange."""
        counts_alone = not self.power and self.cfg.schedule == "epoch"  # earlier passes may be in those of `step`
        return torch.int32 if counts_alone and self.group_rows < 2**31 else torch.int64

    def on_fit_start(self) -> None:
        if not self.started:
            source = self.trainer.datamodule.source
            for site in self.info.sites:
                self._set_first_centroids(site, self._init(source, site).centroids())
            self.started.fill_(True)

    def _set_first_centroids(self, site: str, centroids: Tensor) -> None:
        """Takes the first centroids, uint8 [G, K, W]."""
        self._set("centroids", site, centroids)

    def _init(self, source: PatternSource, site: str) -> CentroidInit:
        generator = torch.Generator().manual_seed(self.seed)
        reader, k, method = self._reader(source, site), self.cfg.k, self.cfg.init
        return self.init_class(self, reader, k, method, self.groups, self.group_rows, generator)

    def _reader(self, source: PatternSource, site: str) -> RowReader:
        return RowReader(source, self.info, site, self.pooled, self.trainer.datamodule.loader.owned, self.device)

    def on_train_start(self) -> None:
        self._pass_began = time.perf_counter()
        loader = self.trainer.datamodule.loader
        self._within_pass = 0 < loader.position < len(loader)
        if self._within_pass and distributed.rank():  # the first has all that was seen of it
            for site in self.info.sites:
                self._reset_pass(site)
        if self.converged or self.passes >= self.cfg.max_epochs:
            self.trainer.should_stop = True

    def training_step(self, block: Block, batch_index: int) -> None:
        if batch_index == 0:
            self._begin_pass()
        for site in self.info.sites:
            self._add_rows(site, block)
            if self.cfg.schedule == "step":
                self.changed += self._update(site)
        if batch_index == self.trainer.num_training_batches - 1 or self.global_step + 1 == self.trainer.max_steps:
            self._end_pass()  # one that max_steps cuts short ends with what it has seen
        self.optimizers().step()

    def _begin_pass(self) -> None:
        self._pass_began = time.perf_counter()
        self._sums_apart, self._within_pass = False, True
        self.changed.zero_()
        for site in self.info.sites:
            if self.cfg.schedule == "epoch":
                self.get("sums", site).zero_()
                self.get("sizes", site).zero_()
            else:  # half of what earlier passes saw is forgotten, by an exact integer step
                self._set("sums", site, self.get("sums", site) >> 1)
                self._set("sizes", site, self.get("sizes", site) >> 1)
            for name in ("captured", "weight"):
                self.get(name, site).zero_()
            self.get("worst", site).fill_(NO_ROW)

    def _seen(self, site: str) -> list[Tensor]:
        """The buffers that hold, added up, what this rank has seen itself in the pass so far; `worst` besides."""
        own = ("captured", "weight", "sums", "sizes") if self.cfg.schedule == "epoch" else ("captured", "weight")
        return [self.get(name, site) for name in own + (() if self.history else ("layer_sums",))]

    def _reset_pass(self, site: str) -> None:
        """Drops what this rank has seen itself in the pass so far."""
        for value in self._seen(site):
            value.zero_()
        self.get("worst", site).fill_(NO_ROW)

    def _reduce_to_rank0(self) -> None:
        """Within a pass: gives the first rank what all have seen of it; the others go on as if they had seen nothing."""
        for site in self.info.sites:
            for value in self._seen(site):
                distributed.sum_at_first(value)
            self._share_worst(site)
            if distributed.rank():
                self._reset_pass(site)

    def _by_cluster(self, name: str, site: str) -> Tensor:
        """The buffer `name` [G, K, …] as [G·K, …], of which the ranks share out the rows."""
        return self.get(name, site).flatten(0, 1)

    def gather_sums(self) -> None:
        """Brings the sums of all clusters to all ranks, if they lie apart; to be called on all of them."""
        if self._sums_apart:
            for site in self.info.sites:
                distributed.gather_rows(self._by_cluster("sums", site))
            self._sums_apart = False

    def _grouped(self, value: Tensor) -> Tensor:
        """[L, n, ...] → [G, rows, ...]"""
        return value.flatten(0, 1).unsqueeze(0) if self.pooled else value

    def _row_numbers(self, block: Block) -> Tensor:
        """int64 [G, rows]: each row's number in its group, the same however the rows are cut into blocks and ranks."""
        positions = block.positions.to(self.device)
        if not self.pooled:
            return positions.expand(self.groups, -1)
        layers = torch.arange(self.info.layers, device=self.device)
        return (positions * self.info.layers + layers.unsqueeze(1)).reshape(1, -1)

    def _add_rows(self, site: str, block: Block) -> None:
        """Assigns a block's rows, adds them to their clusters' sums, and notes what was captured."""
        K, D = self.cfg.k, self.info.widths[site]
        rows = self._grouped(block.importance[site] if self.power else block.patterns[site])
        total = self._limits(site, block, rows)
        ids, captured = self._assign(site, rows, total)
        if self.power:
            scales = ops.scales_of(total)
            self._accumulate(site, lambda **out: ops.accumulate_weighted(rows, ids, scales, K, self.power, **out))
            self.get("captured", site).add_((captured * scales).sum(1))
            self.get("weight", site).add_((total * scales).sum(1))
        else:
            self._accumulate(site, lambda **out: ops.accumulate(rows, ids, K, D, **out))
            self.get("captured", site).add_(captured.sum(1))
            self.get("weight", site).add_(total.sum(1))
        if self._layers_apart and not self.history:
            self._add_layer_sums(site, block)
        self._note_worst(site, captured, total, self._row_numbers(block))

    def _limits(self, site: str, block: Block, rows: Tensor) -> Tensor:
        """`limits` of a block's rows. Their totals are the same in each pass, so the first leaves them with the block."""
        name = f"totals.{site}.{self.power}"
        if name not in block.derived:
            block.derived[name] = self.totals(rows).int()
        return self.limits(site, block.derived[name].long())

    def totals(self, rows: Tensor) -> Tensor:
        """int64 [..., n], below 2³¹: the ones of patterns [..., n, W], or what the importances [..., n, D] come to."""
        return ops.row_totals(rows, self.power) if self.power else ops.popcount(rows).long()

    def limits(self, site: str, totals: Tensor) -> Tensor:
        """int64 [..., n]: what of rows with these totals can be captured at most."""
        return totals

    def _assign(self, site: str, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """A block's rows [G, n, ...] to their clusters, as `nearest` has it."""
        return self.nearest(site, rows, self.get("centroids", site), limits)

    def nearest(self, site: str, rows: Tensor, centroids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., n, W or D] with their `limits` to centroids uint8 [..., K, W] → ids int64 and what is captured, [..., n] each."""
        return ops.assign_weighted(rows, centroids, self.power) if self.power else ops.assign(rows, centroids)

    def seeds(self, reader: RowReader, group: Tensor, row: Tensor) -> Tensor:
        """The centroids uint8 [n, W] that rows at pairs (group, row number) start as."""
        return reader.masks(group, row, self.cfg.density)

    def _accumulate(self, site: str, accumulate: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Adds a block's sums [G, K, D] and sizes [G, K] to those of the pass: this rank's own, or with schedule `step` all ranks'."""
        held = self.get("sums", site), self.get("sizes", site)
        if self.cfg.schedule == "epoch":
            accumulate(out=held)
        else:
            for value, added in zip(held, accumulate(), strict=True):
                value.add_(distributed.all_sum(added))

    @property
    def _layers_apart(self) -> bool:
        """Whether what the layers' rows add up to is not in `sums` at the end of the first pass: there layers share clusters."""
        return self.pooled

    def _add_layer_sums(self, site: str, block: Block) -> None:
        L, n = block.patterns[site].shape[:2]
        layer_ids = torch.zeros(L, n, dtype=torch.int64, device=self.device)
        sums = self.get("layer_sums", site).unsqueeze(1), torch.zeros(L, 1, dtype=torch.int64, device=self.device)
        if self.power:
            importance = block.importance[site]
            ops.accumulate_weighted(
                importance, layer_ids, ops.row_scales(importance, self.power), 1, self.power, out=sums
            )
        else:
            ops.accumulate(block.patterns[site], layer_ids, 1, self.info.widths[site], out=sums)

    def _note_worst(self, site: str, captured: Tensor, total: Tensor, rows: Tensor) -> None:
        """Merges a block into the K rows captured worst; empty rows are left out."""
        keys = ((captured.long() << SHARE_BITS) // total.clamp_min(1) << ROW_BITS) + rows
        self._merge_worst(site, keys.masked_fill_(total == 0, NO_ROW))

    def _merge_worst(self, site: str, keys: Tensor) -> None:
        keys = torch.cat([self.get("worst", site), keys], dim=1)
        self._set("worst", site, keys.topk(self.cfg.k, dim=1, largest=False, sorted=True).values)

    def _share_worst(self, site: str) -> None:
        """Brings the rows captured worst of all that the ranks have seen to all of them."""
        keys = distributed.all_concat(self.get("worst", site), dim=1).clone()
        self.get("worst", site).fill_(NO_ROW)
        self._merge_worst(site, keys)

    def _update(self, site: str) -> Tensor:
        """New centroids from the sums. Returns how many bits changed, int64."""
        old = self._by_cluster("centroids", site)
        new = self._recompute("centroids", site, self._binarize)
        changed = ops.popcount(new ^ old).long().sum()
        old.copy_(new)
        return changed

    def _recompute(self, name: str, site: str, follow: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the buffer `name` becomes, [G·K, …]: what follows from the sums [n, D] and sizes int64 [n] of clusters; one with no member keeps
        its own. Where the sums lie apart each rank makes what follows from its own, and all get all."""
        sums, sizes, old = (self._by_cluster(each, site) for each in ("sums", "sizes", name))
        new = torch.empty_like(old)
        for rows in distributed.own_rows(len(old)) if self._sums_apart else [slice(None)]:
            new[rows] = torch.where((sizes[rows] > 0).unsqueeze(1), follow(sums[rows], sizes[rows]), old[rows])
        if self._sums_apart:
            distributed.gather_rows(new)
        return new

    def _binarize(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """The centroids uint8 [n, W] that follow from sums int32 or int64 [n, D] and sizes int64 [n]."""
        return ops.binarize(sums, self.cfg.density)

    def _changeable(self, D: int) -> int:
        """The most that a centroid can count as changed by an update: bits, all of its own and as many others."""
        return 2 * ops.mask_size(D, self.cfg.density)

    def _end_pass(self) -> None:
        """Exchanges sums between the ranks, updates and re-seeds, and decides whether another pass is worth it."""
        empty, figures = 0, {}
        self._within_pass = False
        self._sums_apart = self.cfg.schedule == "epoch"
        for site in self.info.sites:
            self._exchange(site)
            empty += self._update_centroids(site)
            captured = self.get("captured", site).double() / self.get("weight", site).double().clamp_min(1)
            figures |= {f"cluster/captured_{site}": captured.mean().item()}
            if not self.pooled:
                figures |= {
                    f"cluster_layers/captured_{site}_{layer:02d}": value
                    for layer, value in enumerate(captured.tolist())
                }
        self.passes += 1
        self._report(figures, empty, int(self.changed))

    def _exchange(self, site: str) -> None:
        """Adds up over the ranks what each has seen in the pass. Of the sums, the one large thing, each rank gets those of its own clusters."""
        layers = self.get("layer_sums", site)
        if not (self._layers_apart or self.history):
            layers.copy_(self.get("sums", site).sum(1))
        own = [self.get(name, site) for name in ("captured", "weight")]
        if self._sums_apart:
            own.append(self.get("sizes", site))
            distributed.sum_own_rows(self._by_cluster("sums", site))
        if not self.history and (self._layers_apart or self._sums_apart):
            own.append(layers)
        for value in own:
            distributed.all_sum(value)

    def _update_centroids(self, site: str) -> int:
        """New centroids at the end of a pass; returns how many clusters were empty."""
        if self.cfg.schedule == "epoch":
            self.changed += self._update(site)
        empties = self.get("sizes", site) == 0
        self.changed += self._reseed(site, empties)
        return int(empties.sum())

    def _report(self, figures: dict[str, float], empty: int, changed: int) -> None:
        seconds = time.perf_counter() - self._pass_began
        captured = sum(value for name, value in figures.items() if name.startswith("cluster/")) / len(self.info.sites)
        changeable = sum(self.groups * self.cfg.k * self._changeable(D) for D in self.info.widths.values())
        record = (
            dict(epoch=int(self.passes), captured=captured, empty=empty, changed=changed / changeable, seconds=seconds)
            | self._own_figures()
        )
        if self._is_converged(record):
            self.converged.fill_(True)
        self.history.append(record)
        for logger in self.loggers:  # now and not by `log_dict`, which writes after the pass's checkpoint: a kill between them would lose the row
            logger.log_metrics({f"cluster/{name}": float(value) for name, value in record.items()} | figures)
        if self.converged or self.passes >= self.cfg.max_epochs:
            self.trainer.should_stop = True

    def _own_figures(self) -> dict[str, float]:
        """What else a pass reports."""
        return {}

    def _is_converged(self, record: dict) -> bool:
        """Whether a pass that gave `record` after those of the history needs no other."""
        if record["changed"] == 0:
            return True
        before = self.history[-1]["captured"] if self.history else None
        stalled = (
            before is not None and record["empty"] == 0 and record["captured"] - before < self.cfg.tolerance * before
        )
        return stalled and self.cfg.schedule == "epoch"

    def _reseed(self, site: str, empties: Tensor) -> int:
        """Gives the j-th empty cluster of each group (by id) the j-th worst captured row; returns how many bits that changed."""
        if not empties.any():
            return 0
        self._share_worst(site)
        group, cluster = empties.nonzero(as_tuple=True)
        rank_in_group = (empties.cumsum(1) - 1)[group, cluster]
        worst = self.get("worst", site)[group, rank_in_group]
        has_row = worst < NO_ROW
        group, cluster, worst = group[has_row], cluster[has_row], worst[has_row]
        source = self.trainer.datamodule.source
        return self._set_centroids(
            site, group, cluster, self.seeds(self._reader(source, site), group, worst & ((1 << ROW_BITS) - 1))
        )

    def _set_centroids(self, site: str, group: Tensor, cluster: Tensor, seeds: Tensor) -> int:
        """Makes seeds uint8 [n, W] the centroids of the clusters at pairs (group, cluster); returns how many bits that changed."""
        centroids = self.get("centroids", site)
        changed = int(ops.popcount(seeds ^ centroids[group, cluster]).sum())
        centroids[group, cluster] = seeds
        return changed

    def codebook(self, provenance: dict) -> Codebook:
        """The codebook as the clustering stands, on the host; to be called on all ranks."""
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
        )
        return book.to(torch.device("cpu"))


_CLUSTERS_AT_ONCE = 1024  # whose profiles are made at a time


def _profiles(sums: Tensor, sizes: Tensor, centroids: Tensor) -> Tensor:
    """int32 or int64 [G, K, D] sums → float16 [G, K, D]; in pieces, since the doubles of all would take much memory."""
    result = torch.empty(sums.shape, dtype=torch.float16, device=sums.device)
    for group in range(len(sums)):
        for first in range(0, sums.shape[1], _CLUSTERS_AT_ONCE):
            piece = group, slice(first, first + _CLUSTERS_AT_ONCE)
            mean = torch.where(
                (sizes[piece] > 0).unsqueeze(1),
                sums[piece].double(),
                ops.unpack(centroids[piece], sums.shape[2]).double(),
            )
            result[piece] = (mean / mean.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).half()
    return result
