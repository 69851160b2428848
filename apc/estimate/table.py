"""The estimate of a run as a table for a terminal."""

import math
import shutil
import textwrap

from apc import ops
from apc.collect.patterns import PatternInfo
from apc.collect.store import store_folder
from apc.config.schema import Config
from apc.data.models import model_name
from apc.estimate.estimate import Estimate, Seconds, Workload, estimate, known, pattern_info, read_workload
from apc.estimate.exchange import GPUS_PER_HOST
from apc.evaluate import tables
from apc.sparse.policies import default_policies, trains_predictor

RANKS = (1, 8)  # columns that are always shown, besides one for trainer.devices
WIDTH = 110  # characters per line


def describe(cfg: Config) -> str:
    """The estimate as text, with columns for 1 and 8 GPUs and for trainer.devices.

    Raises UserError as `read_workload` and `estimate` do.
    """
    work = read_workload(cfg)
    asked = cfg.trainer.devices * cfg.trainer.num_nodes
    counts = sorted({count for count in (*RANKS, asked) if count <= work.fit_windows} | {asked})
    estimates = [estimate(cfg, work, count) for count in counts]
    info = pattern_info(cfg, work.shape, work.fit_windows)
    heading = [
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 7, break_on_hyphens=False) for line in _heading(cfg, work)
    ]
    notes = [
        textwrap.fill(line, WIDTH, break_on_hyphens=False, break_long_words=False) for line in _notes(cfg, estimates)
    ]
    return "\n".join([*heading, "", _patterns_table(cfg, info), "", _costs_table(estimates), "", *notes])


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
        f"policies   {', '.join(cfg.policies or default_policies())}"
        + ("" if trains_predictor(cfg) else "; none needs a predictor, so none is trained"),
    ]


def _patterns_table(cfg: Config, info: PatternInfo) -> str:
    each = "shared by all layers" if cfg.cluster.scope == "pooled" else f"for each of {info.layers} layers"
    rows = [
        [
            site,
            f"{info.layers * info.tokens:,}",
            f"{D:,}",
            f"{ops.row_bytes(D):,}",
            f"{cfg.cluster.k:,}",
            f"{ops.mask_size(D, cfg.cluster.density):,}",
        ]
        for site, D in info.widths.items()
    ]
    title = (
        f"{cfg.cluster.algorithm}, {cfg.cluster.weighting}, density {cfg.cluster.density:g}, "
        f"at most {cfg.cluster.max_epochs} passes; clusters {each}"
    )
    header = [
        ("", "site"),
        ("", "patterns"),
        ("", "neurons"),
        ("bytes", "a row"),
        ("", "clusters"),
        ("ones in", "a centroid"),
    ]
    return f"{title}\n\n{tables.text_grid(header, rows)}"


def _costs_table(estimates: list[Estimate]) -> str:
    rows: list[list[str]] = []

    def section(title: str, columns: list[dict[str, int]], total: str | None) -> None:
        names = list(dict.fromkeys(name for column in columns for name in column))
        if names:
            rows.append([title] + [""] * len(estimates))
            rows.extend(
                [f"  {name}"] + [_bytes(column[name]) if name in column else tables.DASH for column in columns]
                for name in names
            )
            if total and len(names) > 1:
                rows.append(
                    [f"  {total}"] + [_bytes(sum(column.values())) if column else tables.DASH for column in columns]
                )

    section("on disk", [each.disk for each in estimates], "together")
    section("on each GPU", [each.gpu for each in estimates], None)
    section("on each GPU, at once", [each.peak for each in estimates], None)
    section("on the host, all processes", [each.host for each in estimates], None)
    section("sent in a pass, by each GPU", [each.exchange for each in estimates], "together")
    rows.append(["seconds, on H100s"] + [""] * len(estimates))
    for stage in estimates[0].seconds:
        rows.append([f"  {stage}"] + [_range(each.seconds[stage]) for each in estimates])
    return tables.text_grid([("", ""), *(("", _gpus(each.ranks)) for each in estimates)], rows)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _notes(cfg: Config, estimates: list[Estimate]) -> list[str]:
    stages, limit = known()["stages"], known()["data_sheet"]["gpu_bytes"]
    bases = {
        value.basis: [stage for stage, other in estimates[0].seconds.items() if other.basis == value.basis]
        for value in estimates[0].seconds.values()
    }
    notes = [f"{', '.join(names)}: {basis}." for basis, names in bases.items()]
    notes += [
        f"The measured run: on an {stages['device']} ({stages['from']}). Rates of the kernels: benchmarks/results.csv, "
        "the nearest shape.",
        "Not included: loading the model, disk reads and writes, activations of forward passes and of tuning. "
        f"Exchange: rings at data-sheet speed, NVLink 4 up to {GPUS_PER_HOST} GPUs, 400 Gbit/s per GPU between hosts.",
    ]
    for each in estimates:
        over = [stage for stage, value in each.peak.items() if value > limit]
        if over:
            notes.append(f"{_gpus(each.ranks)}: {' and '.join(over)} would not fit an 80 GB card.")
    if cfg.collect.storage == "disk":
        folder = store_folder(cfg.collect)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed, free = next(iter(estimates[0].disk.values())), shutil.disk_usage(place).free
        notes.append(
            f"Patterns go to {folder}, where {_bytes(free)} are free" + (": TOO LITTLE." if needed > free else ".")
        )
    return notes


def _two(value: float) -> float:
    """Rounded to two significant digits."""
    return 0.0 if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def _number(value: float) -> str:
    value = _two(value)
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
