"""Turns a model and token windows into a source of patterns: the store's if it has them, else newly collected ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from apc.collect.collector import Collector
from apc.collect.memory import ResidentPatterns, windows_in_block
from apc.collect.patterns import ActiveRule, Block, PatternInfo, PatternSource, activity
from apc.collect.sharding import block_ranges, rank_range
from apc.collect.store import PatternStore, StoreWriter, collecting, find_store, store_folder
from apc.config.schema import CollectConfig
from apc.data.text import Windows
from apc.utils import distributed
from apc.utils.progress import Bar, progress


def pattern_identity(
    weights: str, text: str, sites: list[str], active: str, sparsity: float, cfg: CollectConfig
) -> dict:
    """Everything that decides the content of collected patterns.

    weights, text: digests. No paths, so a model keeps its identity when its folder moves.
    """
    identity: dict = dict(format=1, weights=weights, text=text, sites=sites, active=active, sparsity=sparsity)
    identity["calibration_windows"] = cfg.calibration_windows
    return identity if cfg.forward == "dense" else identity | {"forward": cfg.forward}


def calibration_windows(windows: int, count: int) -> list[int]:
    """Indices of `count` windows, spread evenly over `windows`; all of them if there are fewer."""
    return torch.linspace(0, windows - 1, min(count, windows)).round().long().tolist()


def collect(
    cfg: CollectConfig,
    collector: Collector,
    windows: Windows,
    active: str,
    sparsity: float,
    identity: dict,
    with_hidden: bool,
) -> PatternSource:
    """The patterns of `windows`, from the store if they are there, else collected into the storage that cfg names.

    identity: from `pattern_identity`; the store finds patterns by it.

    Raises UserError for NaN or infinite activations (naming layer and window), a full disk, or a damaged store (naming
    the file).
    """
    first_ffn = collector.ffns[0]
    info = PatternInfo(
        layers=len(collector.ffns),
        hidden_size=first_ffn.hidden_size,
        ffn_width=first_ffn.width,
        windows=len(windows.tokens),
        seq_len=windows.tokens.shape[1],
        widths={site: first_ffn.site_width(site) for site in collector.sites},
        rule=ActiveRule(active, sparsity),
        with_importance=cfg.importance,
        with_hidden=with_hidden,
        identity=identity,
        projections=2 + first_ffn.gated,
        experts=collector.experts,
        slots=collector.slots,
    )
    source: PatternSource
    if cfg.storage == "disk":
        source = _stored(store_folder(cfg), info) or _to_disk(cfg, info, collector, windows)
    else:
        source = _to_memory(cfg, info, collector, windows)
    idle = sum(not counts.any() for counts in source.info.activity["neuron"]) if info.experts else 0
    if idle:
        problem = f"{idle} of {info.layers} experts got no token of the fit text"
        _tell(f"{problem}: their masks keep arbitrary neurons; give more text")
    return source


def _announce(cfg: CollectConfig, info: PatternInfo, collector: Collector) -> None:
    size = info.bytes_per_token() * info.tokens / 2**30
    where = {"disk": store_folder(cfg), "memory": "host memory", "device": collector.device}[cfg.storage]
    unit = "experts" if info.experts else "layers"
    _tell(f"patterns: collecting {info.tokens:,} tokens × {info.layers} {unit}, {size:.2f} GiB into {where}")


def _calibrated(cfg: CollectConfig, info: PatternInfo, collector: Collector, windows: Windows) -> dict[str, Tensor]:
    """The thresholds per site; none if the rule is not `threshold`."""
    if info.rule.kind != "threshold":
        return {}
    chosen = calibration_windows(info.windows, cfg.calibration_windows)
    return collector.calibrate(windows.tokens, chosen, info.rule.sparsity)


def _stored(folder: Path, info: PatternInfo) -> PatternStore | None:
    path = find_store(folder, info)
    if path is None:
        return None
    _tell(f"patterns: found {path}")
    store = PatternStore(path)
    # The store may have more fields than requested; results must not depend on them.
    store.info = replace(store.info, with_importance=info.with_importance, with_hidden=info.with_hidden)
    return store


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _to_disk(cfg: CollectConfig, info: PatternInfo, collector: Collector, windows: Windows) -> PatternStore:
    """Collects the shards that are missing, shared out over the ranks."""
    folder = store_folder(cfg)
    with collecting(folder, info):
        distributed.barrier()  # until rank 0 has the lock
        store = _stored(folder, info)  # another process may have collected it before we got the lock
        distributed.barrier()  # until all ranks have looked
        if store is not None:
            return store
        _announce(cfg, info, collector)
        writer = StoreWriter(folder, info)
        if distributed.is_main():
            writer.prepare()
        distributed.barrier()
        thresholds = writer.thresholds(lambda: _calibrated(cfg, info, collector, windows))
        writer.info = replace(info, rule=replace(info.rule, thresholds=thresholds))
        missing = writer.missing()
        distributed.barrier()  # waits until all ranks have looked, before any of them writes
        mine = missing[distributed.rank() :: distributed.world_size()]
        tokens = sum(last - first for first, last in mine) * info.seq_len
        with progress(tokens, "collect", unit="tokens", enabled=collector.progress) as bar:
            for first, last in mine:
                batches = _read_batches(writer.info, collector, windows, range(first, last), bar)
                parts = [batch.to("cpu").tensors() for batch in batches]
                named = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
                writer.add(Block.of_windows(named, range(first, last), info.seq_len))
        distributed.barrier()
        if distributed.is_main():
            writer.finish({"model": collector.name, "text": windows.source})
        distributed.barrier()
    # Shards that an earlier process wrote have not been checked yet.
    return PatternStore(writer.path, verify=len(missing) < len(writer.shards))


def _read_batches(
    info: PatternInfo, collector: Collector, windows: Windows, indices: Sequence[int], bar: Bar, padded: bool = False
) -> Iterator[Block]:
    """Reads windows in batches of `batch_windows`, so that the progress bar moves."""
    for begin in range(0, len(indices), collector.batch_windows):
        batch = indices[begin : begin + collector.batch_windows]
        block = collector.block(windows.tokens, batch, info.rule, info.with_importance, info.with_hidden, padded)
        yield block
        bar.update(block.tokens)


def _to_memory(cfg: CollectConfig, info: PatternInfo, collector: Collector, windows: Windows) -> ResidentPatterns:
    """Collects this rank's windows into host or device memory.

    A batch may span several blocks, and a rank's last batch is padded. So all batches have the same size, for any
    number of ranks.
    """
    _announce(cfg, info, collector)
    info = replace(info, rule=replace(info.rule, thresholds=_calibrated(cfg, info, collector, windows)))
    blocks = block_ranges(info.windows, windows_in_block(cfg, info))
    owned = [window for block in blocks for window in range(*rank_range(*block))]
    device = collector.device if cfg.storage == "device" else torch.device("cpu")
    source = ResidentPatterns(info, owned, device, locked=device != collector.device)
    counts: dict[str, Tensor] = {}
    with progress(len(owned) * info.seq_len, "collect", unit="tokens", enabled=collector.progress) as bar:
        for block in _read_batches(info, collector, windows, owned, bar, padded=True):
            source.add(block)
            for site, added in activity(block, info).items():
                counts[site] = counts.get(site, 0) + added
    source.info = replace(info, activity={site: distributed.all_sum(value).cpu() for site, value in counts.items()})
    return source


class StreamedHidden(PatternSource):
    """A source that computes FFN inputs by running the model again, instead of reading them from a store.

    Each rank runs its share of a block in one batch, whose size depends on the number of ranks.
    """

    def __init__(self, source: PatternSource, collector: Collector, windows: Windows):
        self.info = replace(source.info, with_hidden=True)
        self._source, self._collector, self._windows = source, collector, windows

    def host_fields(self, fields: list[str]) -> list[str]:
        """See `PatternSource`."""
        return self._source.host_fields([name for name in fields if name != "hidden"])

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        """See `PatternSource`."""
        block = self._source.block(first, last, [name for name in fields if name != "hidden"])
        if "hidden" in fields:
            block.hidden = self._collector.hidden(self._windows.tokens, range(first, last))
        return block

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        """See `PatternSource`."""
        return self._source.rows(name, layers, tokens)
