"""The estimate of a run as a table for a terminal."""

import math
import shutil
from textwrap import TextWrapper

from apc import ops
from apc.collect.patterns import PatternInfo
from apc.collect.store import store_folder
from apc.config.schema import Config
from apc.data.models import model_name
from apc.estimate.estimate import Estimate, Seconds, Workload, estimate, known, pattern_info, read_workload
from apc.estimate.exchange import GPUS_PER_HOST
from apc.evaluate import tables
from apc.sparse.policies import chosen_policies, trains_predictor

RANKS = (1, 8)  # columns that are always shown, besides one for trainer.devices
WIDTH = 110  # characters per line


def describe(cfg: Config) -> str:
    """The estimate as text, with columns for 1 and 8 GPUs and for trainer.devices. May raise UserError."""
    work = read_workload(cfg)
    asked = cfg.trainer.devices * cfg.trainer.num_nodes
    counts = sorted({count for count in (*RANKS, asked) if count <= work.fit_windows} | {asked})
    estimates = [estimate(cfg, work, count) for count in counts]
    info = pattern_info(cfg, work.shape, work.fit_windows)
    heading = TextWrapper(WIDTH, subsequent_indent=" " * 7, break_on_hyphens=False)
    notes = TextWrapper(WIDTH, break_on_hyphens=False, break_long_words=False)
    tops, ends = map(heading.fill, _heading(cfg, work)), map(notes.fill, _notes(cfg, estimates))
    return "\n".join([*tops, "", _patterns_table(cfg, info), "", _costs_table(estimates), "", *ends])


def _heading(cfg: Config, work: Workload) -> list[str]:
    shape, S = work.shape, cfg.data.seq_len
    fit, score = (
        f"{windows:,} windows × {S:,} = {windows * S:,} tokens ({work.counted[role]})"
        for role, windows in (("fit", work.fit_windows), ("score", work.score_windows))
    )
    monitored = f", besides {cfg.monitor.windows} held out to monitor" if cfg.monitor.windows else ""
    dtype = str(shape.dtype).removeprefix("torch.")
    return [
        "ESTIMATED, not measured: disk space, memory and seconds of this run. Nothing was loaded or written.",
        "",
        f"model  {model_name(cfg.model)}, {_short(shape.parameters)} parameters in {dtype}, {shape.layers} layers "
        f"(shape: {shape.origin})",
        f"fit    {cfg.data.fit}: {fit}{monitored}",
        f"score  {cfg.data.score}: {score}{', IN-SAMPLE' if cfg.data.in_sample else ''}",
        f"policies   {', '.join(chosen_policies(cfg))}"
        + ("" if trains_predictor(cfg) else "; none needs a predictor, so none is trained"),
    ]


def _patterns_table(cfg: Config, info: PatternInfo) -> str:
    each = "shared by all layers" if cfg.cluster.scope == "pooled" else f"for each of {info.layers} layers"
    rows = []
    for site, D in info.widths.items():
        ones = ops.mask_size(D, cfg.cluster.density)
        numbers = (info.layers * info.tokens, D, ops.row_bytes(D), cfg.cluster.k, ones)
        rows.append([site, *(f"{number:,}" for number in numbers)])
    title = (
        f"{cfg.cluster.algorithm}, {cfg.cluster.weighting}, density {cfg.cluster.density:g}, "
        f"at most {cfg.cluster.max_epochs} passes; clusters {each}"
    )
    names = ("site", "patterns", "neurons", "a row", "clusters", "a centroid")
    header = list(zip(("", "", "", "bytes", "", "ones in"), names, strict=True))
    return f"{title}\n\n{tables.text_grid(header, rows)}"


def _costs_table(estimates: list[Estimate]) -> str:
    rows, blank = [], [""] * len(estimates)
    for title, field, total in (
        ("on disk", "disk", "together"),
        ("on each GPU", "gpu", ""),
        ("on each GPU, at once", "peak", ""),
        ("on the host, all processes", "host", ""),
        ("sent in a pass, by each GPU", "exchange", "together"),
    ):
        columns: list[dict[str, int]] = [getattr(each, field) for each in estimates]
        names = list(dict.fromkeys(name for column in columns for name in column))
        rows += [[title, *blank]] if names else []
        for name in names:
            rows.append([f"  {name}", *(_bytes(column[name]) if name in column else tables.DASH for column in columns)])
        if total and len(names) > 1:
            rows.append(
                [f"  {total}", *(_bytes(sum(column.values())) if column else tables.DASH for column in columns)]
            )
    rows.append(["seconds, on H100s", *blank])
    for stage in estimates[0].seconds:
        rows.append([f"  {stage}", *(_range(each.seconds[stage]) for each in estimates)])
    return tables.text_grid([("", ""), *(("", _gpus(each.ranks)) for each in estimates)], rows)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _notes(cfg: Config, estimates: list[Estimate]) -> list[str]:
    stages, limit = known()["stages"], known()["data_sheet"]["gpu_bytes"]
    bases: dict[str, list[str]] = {}
    for stage, value in estimates[0].seconds.items():
        bases.setdefault(value.basis, []).append(stage)
    notes = [f"{', '.join(names)}: {basis}." for basis, names in bases.items()]
    notes += [
        f"The measured run: on an {stages['device']} ({stages['from']}). Rates of the kernels: benchmarks/results.csv, "
        "the nearest shape.",
        "Not included: loading the model, disk reads and writes, activations of forward passes and of tuning. "
        f"Exchange: rings at data-sheet speed, NVLink 4 up to {GPUS_PER_HOST} GPUs, 400 Gbit/s per GPU between hosts.",
    ]
    for each in estimates:
        over = [stage for stage, size in each.peak.items() if size > limit]
        if over:
            notes.append(f"{_gpus(each.ranks)}: {' and '.join(over)} would not fit an 80 GB card.")
    if cfg.collect.storage == "disk":
        folder = store_folder(cfg.collect)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed, free = next(iter(estimates[0].disk.values())), shutil.disk_usage(place).free
        ending = ": TOO LITTLE." if needed > free else "."
        notes.append(f"Patterns go to {folder}, where {_bytes(free)} are free{ending}")
    return notes


def _number(value: float) -> str:
    """Two significant digits, or all digits before the point."""
    value = round(value, 1 - math.floor(math.log10(abs(value)))) if value else 0.0
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _short(count: float) -> str:
    """A count with a decimal prefix: 7.2 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{_number(count / size)} {unit}"
    return _number(count)


def _bytes(count: float) -> str:
    return _short(count) + ("B" if count >= 1e3 else " B")


def _range(value: Seconds) -> str:
    low, high = ("< 1" if number < 1 else _number(number) for number in (value.low, value.high))
    return low if low == high else f"{low}–{high}" if value.low >= 1 else f"up to {high}"
