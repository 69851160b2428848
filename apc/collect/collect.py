"""From a model and token windows to a source of patterns: read from the store if they are there, else collected."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from apc.collect.collector import Collector
from apc.collect.memory import ResidentPatterns
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
    identity = dict(
        format=1,
        weights=weights,
        text=text,
        sites=sites,
        active=active,
        sparsity=sparsity,
        calibration_windows=cfg.calibration_windows,
    )
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
    )
    size = info.bytes_per_token() * info.tokens / 2**30
    where = {"disk": store_folder(cfg), "memory": "host memory", "device": collector.device}[cfg.storage]
    notice = f"patterns: collecting {info.tokens:,} tokens × {info.layers} layers, {size:.2f} GiB into {where}"

    def calibrate() -> dict[str, Tensor]:
        if active != "threshold":
            return {}
        chosen = calibration_windows(info.windows, cfg.calibration_windows)
        return collector.calibrate(windows.tokens, chosen, sparsity)

    def read(rule: ActiveRule, indices: Sequence[int], padded: bool = False) -> Block:
        return collector.block(windows.tokens, indices, rule, info.with_importance, info.with_hidden, padded)

    if cfg.storage == "disk":
        folder = store_folder(cfg)
        source = {"model": collector.name, "text": windows.source}
        return _stored(folder, info) or _to_disk(folder, info, calibrate, read, collector, notice, source)
    _tell(notice)
    info = replace(info, rule=ActiveRule(active, sparsity, calibrate()))
    return _to_memory(cfg, info, partial(read, info.rule, padded=True), collector)


def _stored(folder: Path, info: PatternInfo) -> PatternStore | None:
    """The store of these patterns; None if there is none."""
    path = find_store(folder, info)
    if path is None:
        return None
    _tell(f"patterns: found {path}")
    store = PatternStore(path)
    # The store may have more fields than requested; results must not depend on them.
    store.info = replace(store.info, with_importance=info.with_importance, with_hidden=info.with_hidden)
    return store


def _tell(line: str) -> None:
    """Prints a line on rank 0."""
    if distributed.is_main():
        print(line, flush=True)


def _to_disk(
    folder: Path,
    info: PatternInfo,
    calibrate: Callable[[], dict[str, Tensor]],
    read: Callable[[ActiveRule, Sequence[int]], Block],
    collector: Collector,
    notice: str,
    source: dict[str, str],
) -> PatternStore:
    """Collects the shards that are missing, shared out over the ranks.

    notice: line to print before that; source: names of model and text, for listings.
    """
    with collecting(folder, info):
        distributed.barrier()  # until rank 0 has the lock
        store = _stored(folder, info)  # another process may have collected it before we got the lock
        distributed.barrier()  # until all ranks have looked
        if store is not None:
            return store
        _tell(notice)
        writer = StoreWriter(folder, info)
        if distributed.is_main():
            writer.prepare()
        distributed.barrier()
        rule = ActiveRule(info.rule.kind, info.rule.sparsity, writer.thresholds(calibrate))
        writer.info = replace(info, rule=rule)
        missing = writer.missing()
        distributed.barrier()  # until all ranks have looked, before any of them writes
        mine = missing[distributed.rank() :: distributed.world_size()]
        tokens = sum(last - first for first, last in mine) * info.seq_len
        with progress(tokens, "collect", unit="tokens", enabled=collector.progress) as bar:
            for first, last in mine:
                batches = _read_batches(partial(read, rule), range(first, last), collector.batch_windows, bar)
                parts = [batch.to("cpu").tensors() for batch in batches]
                named = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
                writer.add(Block.of_windows(named, range(first, last), info.seq_len))
        distributed.barrier()
        if distributed.is_main():
            writer.finish(source)
        distributed.barrier()
    # Shards of an earlier process were not checked yet.
    return PatternStore(writer.path, verify=len(missing) < len(writer.shards))


def _read_batches(
    read: Callable[[Sequence[int]], Block], windows: Sequence[int], batch_windows: int, bar: Bar
) -> Iterator[Block]:
    """Blocks of `batch_windows` windows each, so that the bar moves."""
    for begin in range(0, len(windows), batch_windows):
        block = read(windows[begin : begin + batch_windows])
        yield block
        bar.update(block.tokens)


def _to_memory(
    cfg: CollectConfig, info: PatternInfo, read: Callable[[Sequence[int]], Block], collector: Collector
) -> ResidentPatterns:
    """Collects this rank's windows into host or device memory.

    Batches cross the borders of blocks, and `read` pads a rank's last one. So all batches have the same size, however
    many ranks there are.
    """
    block_windows = max(1, cfg.batch_tokens // info.seq_len)
    owned = [window for block in block_ranges(info.windows, block_windows) for window in range(*rank_range(*block))]
    device = collector.device if cfg.storage == "device" else torch.device("cpu")
    source = ResidentPatterns(info, owned, device, locked=device != collector.device)
    counts = {
        site: torch.zeros(info.layers, D, dtype=torch.int64, device=collector.device) for site, D in info.widths.items()
    }
    with progress(len(owned) * info.seq_len, "collect", unit="tokens", enabled=collector.progress) as bar:
        for block in _read_batches(read, owned, collector.batch_windows, bar):
            source.add(block)
            for site, block_counts in activity(block, info.widths).items():
                counts[site] += block_counts
    source.info = replace(info, activity={site: distributed.all_sum(value).cpu() for site, value in counts.items()})
    return source


class StreamedHidden:
    """A source that computes FFN inputs by running the model again, instead of reading them from a store.

    Each rank runs its share of a block in one batch, whose size depends on the number of ranks.
    """

    resident = None

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
