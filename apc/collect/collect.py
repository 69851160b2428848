"""From a model and token windows to a source of patterns: found on disk, or collected now."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from apc.collect.collector import Collector, progress
from apc.collect.memory import ResidentPatterns
from apc.collect.patterns import ActiveRule, Block, PatternInfo, PatternSource, activity
from apc.collect.sharding import block_ranges, rank_range
from apc.collect.store import PatternStore, StoreWriter, collecting, find_store, store_folder
from apc.config.schema import CollectConfig
from apc.data.text import Windows
from apc.utils import distributed


def pattern_identity(
    weights: str, text: str, sites: list[str], active: str, sparsity: float, cfg: CollectConfig
) -> dict:
    """What decides the content of collected patterns. weights, text: digests; no paths, so a moved model is the same model."""
    forward = {} if cfg.forward == "dense" else {"forward": cfg.forward}
    return (
        dict(
            format=1,
            weights=weights,
            text=text,
            sites=sites,
            active=active,
            sparsity=sparsity,
            calibration_windows=cfg.calibration_windows,
        )
        | forward
    )


def calibration_windows(windows: int, count: int) -> list[int]:
    """Indices of `count` windows spread evenly over so many (all, where there are no more)."""
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
    """The patterns of `windows`, from the store where they are, else collected into the storage that cfg names.

    identity: as `pattern_identity` makes it, what they are found again by.

    Raises UserError for non-finite activations (naming layer and window), a full disk, or a damaged store (naming the file).
    """
    first_ffn = collector.ffns[0]
    info = PatternInfo(
        layers=len(collector.ffns), hidden_size=first_ffn.hidden_size, ffn_width=first_ffn.width,
        windows=len(windows.tokens), seq_len=windows.tokens.shape[1],
        widths={site: first_ffn.site_width(site) for site in collector.sites}, rule=ActiveRule(active, sparsity),
        with_importance=cfg.importance, with_hidden=with_hidden,
        identity=identity,
    )  # fmt: skip
    size = info.bytes_per_token() * info.tokens
    where = (
        str(store_folder(cfg))
        if cfg.storage == "disk"
        else {"memory": "host memory", "device": str(collector.device)}[cfg.storage]
    )
    say = f"patterns: collecting {info.tokens:,} tokens × {info.layers} layers, {size / 2**30:.2f} GiB into {where}"

    def calibrate() -> dict[str, Tensor]:
        return (
            collector.calibrate(windows.tokens, calibration_windows(info.windows, cfg.calibration_windows), sparsity)
            if active == "threshold"
            else {}
        )

    def read(rule: ActiveRule, some: Sequence[int], filled: bool = False) -> Block:
        return collector.block(windows.tokens, some, rule, info.with_importance, info.with_hidden, filled)

    if cfg.storage == "disk":
        return _found(store_folder(cfg), info) or _to_disk(
            store_folder(cfg), info, calibrate, read, collector.batch_windows, say
        )
    _say(say)
    info = replace(info, rule=ActiveRule(active, sparsity, calibrate()))
    return _to_memory(cfg, info, partial(read, info.rule, filled=True), collector)


def _found(folder: Path, info: PatternInfo) -> PatternStore | None:
    """The store of these patterns, if it is there."""
    path = find_store(folder, info)
    if path is None:
        return None
    _say(f"patterns: found {path}")
    store = PatternStore(path)
    # What else the store holds must not matter to what is made of it.
    store.info = replace(store.info, with_importance=info.with_importance, with_hidden=info.with_hidden)
    return store


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _to_disk(
    folder: Path, info: PatternInfo, calibrate: Callable[[], dict[str, Tensor]], read: Callable, step: int, say: str
) -> PatternStore:
    with collecting(folder, info):
        distributed.barrier()  # the first rank has the lock
        found = _found(folder, info)  # by a process that had the lock before
        distributed.barrier()  # all have looked
        if found is not None:
            return found
        _say(say)
        writer = StoreWriter(folder, info)
        if distributed.is_main():
            writer.prepare()
        distributed.barrier()
        rule = ActiveRule(info.rule.kind, info.rule.sparsity, writer.thresholds(calibrate))
        writer.info = replace(info, rule=rule)
        missing = writer.missing()
        distributed.barrier()  # all have looked before one writes
        mine = missing[distributed.rank() :: distributed.world_size()]
        with progress(sum(last - first for first, last in mine) * info.seq_len, "collect") as bar:
            for first, last in mine:
                parts = [part.to("cpu") for part in _read_steps(partial(read, rule), range(first, last), step, bar)]
                named = {
                    name: torch.cat([part.tensors()[name] for part in parts], dim=1) for name in parts[0].tensors()
                }
                writer.add(Block.of_windows(named, range(first, last), info.seq_len))
        distributed.barrier()
        if distributed.is_main():
            writer.finish()
        distributed.barrier()
    return PatternStore(
        writer.path, verify=len(missing) < len(writer.shards)
    )  # shards of another process have not been looked at yet


def _read_steps(read: Callable, windows: Sequence[int], step: int, bar) -> Iterator[Block]:
    """The windows, `step` at a time, so that the bar moves."""
    for begin in range(0, len(windows), step):
        block = read(windows[begin : begin + step])
        yield block
        bar.update(block.tokens)


def _to_memory(cfg: CollectConfig, info: PatternInfo, read, collector: Collector) -> ResidentPatterns:
    """Forward passes go over the borders of blocks, and only a rank's last is filled: all ranks' are of one size, whatever their number."""
    block_windows = max(1, cfg.batch_tokens // info.seq_len)
    owned = [window for block in block_ranges(info.windows, block_windows) for window in range(*rank_range(*block))]
    device = collector.device if cfg.storage == "device" else torch.device("cpu")
    held = ResidentPatterns(info, owned, device, locked=device != collector.device)
    counts = {
        site: torch.zeros(info.layers, D, dtype=torch.int64, device=collector.device) for site, D in info.widths.items()
    }
    with progress(len(owned) * info.seq_len, "collect") as bar:
        for block in _read_steps(read, owned, collector.batch_windows, bar):
            held.add(block)
            for site, found in activity(block, info.widths).items():
                counts[site] += found
    held.info = replace(info, activity={site: distributed.all_sum(value).cpu() for site, value in counts.items()})
    return held


class StreamedHidden:
    """A source whose FFN inputs come from running the model again, each rank on its share of a block, instead of from the store: in passes of that size,
    which depends on the number of ranks."""

    resident = None

    def __init__(self, source: PatternSource, collector: Collector, windows: Windows):
        self.info = replace(source.info, with_hidden=True)
        self._source, self._collector, self._windows = source, collector, windows

    def host_fields(self, fields: list[str]) -> list[str]:
        return self._source.host_fields([name for name in fields if name != "hidden"])

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        block = self._source.block(first, last, [name for name in fields if name != "hidden"])
        if "hidden" in fields:
            block.hidden = self._collector.hidden(self._windows.tokens, range(first, last))
        return block

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        return self._source.rows(name, layers, tokens)
