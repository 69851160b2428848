"""Figures of finished runs: over the number of clusters, over bits, over bytes, and over captured shares.

Runs that differ in model, text, split or windows share neither a line nor a panel. The results of the paper (Dhar et
al., Euro-Par 2025) are drawn only beside runs of its own model, Mistral-7B, scored on the text that was fitted on.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apc.compare.finished import Finished, comparison_items, variants
from apc.evaluate import figures, tables
from apc.sparse.policies import POLICIES, facts

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER_CLUSTERS = tuple(name for name, policy in POLICIES.items() if policy.over_clusters)
BY_CLUSTER = tuple(name for name, policy in POLICIES.items() if policy.by_cluster)  # chosen by log₂ K bits per site
WITHOUT_CODEBOOK = tuple(name for name, policy in POLICIES.items() if not policy.uses_codebook)
WITH_GAP = tuple(name for name, policy in POLICIES.items() if policy.gap_to)
PAPER_MODEL = "mistral-7b-v"
PAPER_CLUSTERS = (256, 16384)  # the range that the paper tried
# Its best "clustering precision"; it does not say at which number of clusters and density.
PAPER_COVERAGE = 0.7934
PAPER_PERPLEXITIES = {"nearest centroids": 12.49, "active neurons": 6.45, "dense": 5.3}  # its best; dense is rounded
PAPER_NOTE = "grey: the paper's results on the same model, also in-sample"
_MAX_NAME = 60  # letters of a variant's name in a legend
_MAX_LABELS = 20  # points that are labelled by run; of more, only the best
_COLUMNS = 3  # panels side by side
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))  # one per policy
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#4D4D4D")  # one per codebook


@dataclass(frozen=True)
class Line:
    """Points that may be joined: one policy of runs that differ in the number of clusters alone.

    points: (x, y), ordered by x; equal x are repeats.
    """

    policy: str
    variant: str
    sparsity: float
    density: float
    points: list[tuple[float, float]]

    def middle(self) -> list[tuple[float, float]]:
        """The mean y at each x, through which the line is drawn."""
        groups = [list(group) for _, group in itertools.groupby(self.points, key=lambda point: point[0])]
        return [(group[0][0], sum(y for _, y in group) / len(group)) for group in groups]


Value = Callable[[Finished, dict], float | None]


@dataclass(frozen=True)
class Panel:
    """What a figure draws over x: a value of each policy, and perhaps reference levels."""

    label: str
    value: Value
    logarithmic: bool = False
    reference: Callable[[Axes, Sequence[Finished]], None] | None = None


@dataclass(frozen=True)
class Chart:
    """A figure over the number of clusters or over bits: its panels stand under each other, in a column for each place.

    words: names of the policies in the legend, if not their own.
    """

    title: str
    policies: Sequence[str]
    x: Value
    xlabel: str
    panels: Sequence[Panel]
    words: dict[str, str] | None = None
    notes: Sequence[str] = ()


def lines(runs: Sequence[Finished], policies: Sequence[str], x: Value, y: Value) -> list[Line]:
    """One line per policy, variant of the codebook, sparsity and density. Runs that can't be compared never share one.

    For policies with a predictor its settings are part of the variant.
    """
    of_codebook = _short(runs, variants(runs, _codebook_settings))
    of_both = _short(runs, variants(runs, lambda run: _codebook_settings(run) | run.predictor_settings))
    points: dict[tuple[tuple, str, str, float, float], list[tuple[float, float]]] = {}
    for run in runs:
        for policy in policies:
            record = run.policies.get(policy)
            at, value = (None, None) if record is None else (x(run, record), y(run, record))
            if at and value is not None and math.isfinite(value):
                variant = (of_both if facts(policy).forms else of_codebook)[str(run.folder)]
                key = (run.comparison_key, policy, variant, *_column(run))
                points.setdefault(key, []).append((at, value))
    return [
        Line(policy, variant, sparsity, density, sorted(values))
        for (_, policy, variant, sparsity, density), values in points.items()
    ]


def _codebook_settings(run: Finished) -> dict[str, object]:
    """All but the sparsity, which has a panel of its own."""
    return {key: value for key, value in run.settings.items() if key != "sparsity"}


def _column(run: Finished) -> tuple[float, float]:
    """Runs with another sparsity or density stand in another column of panels."""
    return run.conditions.get("sparsity", math.nan), run.conditions["density"]


def _short(runs: Sequence[Finished], names: dict[str, str]) -> dict[str, str]:
    """The variants' names; a long name that only one run has becomes the run's name."""
    count = Counter(names.values())
    return {
        folder: run.name if count[name] == 1 and len(name) > _MAX_NAME else name
        for run in runs
        for folder, name in [(str(run.folder), names[str(run.folder)])]
    }


def save_figures(runs: Sequence[Finished], folder: Path) -> list[Path]:
    """Draws every figure that the runs have data for; returns the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = {
        "coverage": coverage_figure,
        "perplexity": perplexity_figure,
        "captured_importance_over_bits": captured_figure,
        "perplexity_over_bits": bits_figure,
        "perplexity_over_captured": map_figure,
        "perplexity_over_bytes": bytes_figure,
        "gaps": gaps_figure,
    }
    return [folder / f"{name}.png" for name, figure in draw.items() if figure(runs, folder / f"{name}.png")]


def coverage_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Coverage (the paper's "clustering precision") over clusters, with the density of the same masks below it."""

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        if _is_papers(members[0]):
            _paper_line(axes, 100 * PAPER_COVERAGE, f"paper's best: {100 * PAPER_COVERAGE:.2f}", above=True)

    panels = [Panel("coverage, %", _share("coverage"), reference=reference), Panel("density, %", _share("density"))]
    notes = [
        "coverage: share of the active neurons that a mask keeps, the paper's “clustering precision”",
        "A random mask covers as much as its density, shown below.",
        *([PAPER_NOTE] if any(map(_is_papers, runs)) else []),
    ]
    title = "Coverage over the number of clusters"
    return _draw(runs, path, Chart(title, OVER_CLUSTERS, _clusters, "clusters", panels, notes=notes))


def perplexity_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over clusters, with the levels of the policies without a codebook."""

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        for name, value in PAPER_PERPLEXITIES.items() if _is_papers(members[0]) else ():
            about = "≈ " if name == "dense" else ""
            _paper_line(axes, value, f"paper, {name}: {about}{value:g}", above=name != "dense")
        _own_levels(axes, members, _perplexity)

    panels = [Panel("perplexity", _perplexity, logarithmic=True, reference=reference)]
    notes = [PAPER_NOTE] if any(map(_is_papers, runs)) else []
    title = "Perplexity over the number of clusters"
    return _draw(runs, path, Chart(title, OVER_CLUSTERS, _clusters, "clusters", panels, notes=notes))


def captured_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Captured importance over the bits of the choice of a cluster."""
    value = _share("captured_importance")
    panel = Panel("captured importance, %", value, reference=lambda axes, members: _own_levels(axes, members, value))
    return _draw(runs, path, _over_bits("Captured importance over the bits of a mask's choice", panel))


def bits_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bits of the choice of a cluster."""

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        _own_levels(axes, members, _perplexity)

    panel = Panel("perplexity", _perplexity, logarithmic=True, reference=reference)
    return _draw(runs, path, _over_bits("Perplexity over the bits of a mask's choice", panel))


def _over_bits(title: str, panel: Panel) -> Chart:
    return Chart(title, BY_CLUSTER, lambda run, policy: policy.get("bits"), "bits per token and layer", [panel])


def gaps_figure(runs: Sequence[Finished], path: Path) -> bool:
    """The loss through the codebook and the loss through predicting its clusters, for runs that have both."""
    runs = [run for run in runs if all(run.gap(name) is not None for name in WITH_GAP)]
    words = {name: f"{name} − {facts(name).gap_to}" for name in WITH_GAP}
    panels = [Panel("ln perplexity ratio, nats", lambda run, policy: run.gap(policy["policy"]))]
    title = "What the codebook costs, and what predicting the cluster adds"
    return _draw(runs, path, Chart(title, WITH_GAP, _clusters, "clusters", panels, words))


def map_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity against dense over captured importance and energy, a point for each policy of each run."""
    from matplotlib.lines import Line2D

    shares = {"captured_importance": "captured importance, %", "captured_energy": "captured energy, %"}
    places = _places(runs)
    points = [
        [
            (policy, run.is_tuned_for(policy["policy"]))
            for run in members
            for policy in run.policies.values()
            if policy["policy"] != "dense" and 1 < tables.to_float(policy.get("ratio")) < math.inf
        ]
        for members in places
    ]
    every = [point for group in points for point in group if any(point[0].get(key) for key in shares)]
    if not every:
        return False
    figure = _new_figure("Perplexity against the share that the masks keep", places, 0.9 + 3.4 * len(places))
    grid = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for row, members, group in zip(grid, places, points, strict=True):
        figures.log_axis(row[0], "y")
        for axes, (key, label) in zip(row, shares.items(), strict=True):
            for policy, tuned in group:
                if policy.get(key):
                    at = 100 * policy[key], math.log(policy["ratio"])
                    axes.plot(*at, **figures.marker_style(policy))
                    if tuned:
                        axes.plot(*at, **_dot(policy))
            figures.plain_axes(axes, label, "ln perplexity over dense, nats (log)" if axes is row[0] else "")
        _place_title(row[0], members[0], places)
    names = _in_order(policy["policy"] for policy, _ in every)
    records = {policy["policy"]: policy for policy, _ in every}
    handles = [Line2D([], [], **figures.marker_style(records[name]), label=name) for name in names]
    meaning = "hollow: bound" + ("; with a dot: tuned" if any(tuned for _, tuned in every) else "")
    _legend_below(figure, handles, columns=5, title=meaning)
    figure.savefig(path)
    return True


def _dot(policy: dict) -> dict[str, Any]:
    """The dot in the marker of a tuned policy: white, or in its colour in a hollow marker."""
    color = figures.style(policy["policy"])[0] if policy.get("excludes_finding") else "white"
    return dict(color=color, marker="o", markersize=2.6, markeredgewidth=0, linestyle="none", zorder=3)


def bytes_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bytes that a token reads, a point for each policy of each run, labelled by run."""
    from matplotlib.lines import Line2D

    groups = [(members, _bytes_points(members)) for members in _places(runs)]
    groups = [(members, points) for members, points in groups if points]
    if not groups:
        return False
    places = [members for members, _ in groups]
    figure = _new_figure("Perplexity over the FFN bytes read per token", places, 0.9 + 4.6 * len(places))
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    records = {point.policy["policy"]: point.policy for _, points in groups for point in points}
    handles = [Line2D([], [], **figures.marker_style(records[name]), label=name) for name in _in_order(records)]
    _legend_below(figure, handles, columns=5)
    for axes, (members, points) in zip(grid, groups, strict=True):
        _place_title(axes, members[0], places)
        figures.draw_bytes(axes, points, [policy for run in members for policy in run.policies.values()])
    if not all(point.label for _, points in groups for point in points):
        grid[-1].text(
            0.99,
            0.98,
            "labelled: the lowest perplexity up to their bytes",
            transform=grid[-1].transAxes,
            ha="right",
            va="top",
            fontsize=9,
            color=figures.MUTED,
        )
    figure.savefig(path)
    return True


def _bytes_points(members: Sequence[Finished]) -> list[figures.BytesPoint]:
    """All policies but dense; those that no codebook changes once.

    Of too many points, only those have a label with the lowest perplexity up to their bytes (whole per cent), bounds
    aside.
    """
    prefix = os.path.commonprefix([run.name for run in members]).rfind("-") + 1 if len(members) > 1 else 0
    points = {}
    for run in members:
        for name, policy in run.policies.items():
            shared = not facts(name).uses_codebook
            point = figures.BytesPoint(name if shared else run.name[prefix:], policy)
            if name != "dense" and point.is_finite():
                points[(point.label, name, *(round(value, 2) for value in point.place))] = point
    if len(points) <= _MAX_LABELS:
        return list(points.values())
    usable = [point for point in points.values() if not point.policy.get("excludes_finding")] or list(points.values())
    places = [(round(point.place[0]), point.place[1]) for point in usable]
    best = [
        point
        for point, (size, perplexity) in zip(usable, places, strict=True)
        if not any(other[0] <= size and other[1] < perplexity for other in places)
    ]
    return [point if point in best else figures.BytesPoint("", point.policy) for point in points.values()]


def _places(runs: Sequence[Finished]) -> list[list[Finished]]:
    """The runs in groups that can be compared."""
    return [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.comparison_key)]


def _in_order(names: Iterable[str]) -> list[str]:
    """The policies, each once: registered ones first, in their order."""
    every = dict.fromkeys(names)
    return [*(name for name in POLICIES if name in every), *(name for name in every if name not in POLICIES)]


def _clusters(run: Finished, policy: dict) -> float:
    return run.conditions["k"]


def _perplexity(run: Finished, policy: dict) -> float | None:
    return policy.get("perplexity")


def _share(key: str) -> Value:
    """A share of the policy's record in per cent."""
    return lambda run, policy: None if policy.get(key) is None else 100 * policy[key]


def _is_papers(run: Finished) -> bool:
    """Whether the paper's results were measured under the same conditions: its model, in-sample."""
    return run.in_sample and str(run.conditions["model"]).lower().startswith(PAPER_MODEL)


@dataclass(frozen=True)
class Column:
    """The runs of one place, sparsity and density, with the lines of each panel."""

    runs: list[Finished]
    lines: list[list[Line]]


def _columns(runs: Sequence[Finished], chart: Chart) -> list[Column]:
    """The columns of a chart that have a line: one with two different x."""
    columns = []
    for members in _places(runs):
        found = [lines(members, chart.policies, chart.x, panel.value) for panel in chart.panels]
        for key in sorted({_column(run) for run in members}):
            own = [
                [line for line in panel if (line.sparsity, line.density) == key and len(line.middle()) > 1]
                for panel in found
            ]
            if any(own):
                columns.append(Column([run for run in members if _column(run) == key], own))
    return columns


def _draw(runs: Sequence[Finished], path: Path, chart: Chart) -> bool:
    """Draws a column of panels for each place, sparsity and density. Returns False if there is no line."""
    columns = _columns(runs, chart)
    if not columns:
        return False
    places = _places([column.runs[0] for column in columns])
    styles = _Styles([line for column in columns for panel in column.lines for line in panel])
    across, rows = min(_COLUMNS, len(columns)), len(chart.panels)
    down = -(-len(columns) // across)
    heights = [3.0, *[1.4] * (rows - 1)] * down
    figure = _new_figure(chart.title, places, sum(heights) + 0.6 * down + styles.legend_inches, chart.notes)
    grid = figure.subplots(rows * down, across, squeeze=False, height_ratios=heights, sharey="row")
    blocks = [grid[i // across * rows : i // across * rows + rows, i % across] for i in range(across * down)]
    for axes in (axes for block in blocks[len(columns) :] for axes in block):
        axes.set_axis_off()
    for index, (column, block) in enumerate(zip(columns, blocks, strict=False)):
        _place_title(block[0], column.runs[0], places, with_column=len(columns) > len(places))
        for axes, panel, found in zip(block, chart.panels, column.lines, strict=True):
            log = " (log scale)" if panel.logarithmic else ""
            xlabel, ylabel = chart.xlabel if panel is chart.panels[-1] else "", f"{panel.label}{log}"
            figures.plain_axes(axes, xlabel, ylabel if index % across == 0 else "")
            if panel.logarithmic:
                figures.log_axis(axes, "y")
            if chart.x is _clusters:
                _cluster_axis(axes, column, most=4 if across > 1 else 9)
            else:
                figures.integer_ticks(axes)
            for line in found:
                styles.plot(axes, line)
    # Levels need the range of all columns, which share an axis.
    for column, block in zip(columns, blocks, strict=False):
        for axes, panel in zip(block, chart.panels, strict=True):
            if panel.reference is not None:
                panel.reference(axes, column.runs)
            figures.finer_ticks(axes)
    styles.legend(figure, chart.words or {})
    figure.savefig(path)
    return True


class _Styles:
    """Colour tells the codebook and dashes the policy; with a single codebook, colour tells the policy."""

    def __init__(self, every: Sequence[Line]):
        self.policies = _in_order(line.policy for line in every)
        self.variants = list(dict.fromkeys(line.variant for line in every))
        self.by_policy = all(
            len({line.variant for line in every if line.policy == policy}) == 1 for policy in self.policies
        )

    @property
    def legend_inches(self) -> float:
        """The height of the legend."""
        names = [] if self.by_policy else [tables.wrapped(name, 40) for name in self.variants]
        return 0.16 * (2 + sum(name.count("\n") + 1 for name in names) + len(self.policies) / 2)

    def _look(self, policy: str, variant: str | None) -> dict:
        if self.by_policy or variant is None:
            color = figures.style(policy)[0] if self.by_policy else figures.INK
        else:
            color = _COLORS[self.variants.index(variant) % len(_COLORS)]
        if facts(policy).wide_line:
            return dict(color=color, linestyle="solid", linewidth=5, alpha=0.3)
        dashes = "solid" if self.by_policy else _DASHES[self.policies.index(policy) % len(_DASHES)]
        return dict(color=color, linestyle=dashes, linewidth=1.6)

    def plot(self, axes: Axes, line: Line) -> None:
        """The line through the means, and a marker at each point."""
        look = self._look(line.policy, line.variant)
        axes.plot(*zip(*line.middle(), strict=True), zorder=1.9 if facts(line.policy).wide_line else 2, **look)
        marker = figures.style(line.policy)[1]
        axes.plot(*zip(*line.points, strict=True), color=look["color"], marker=marker, markersize=5.5, linestyle="none")

    def legend(self, figure: Figure, words: dict[str, str]) -> None:
        """Names the colours and the dashes below the panels."""
        from matplotlib.lines import Line2D

        handles = []
        if not self.by_policy:
            colors = [_COLORS[i % len(_COLORS)] for i in range(len(self.variants))]
            handles = [
                Line2D([], [], color=color, linewidth=5, label=tables.wrapped(name, 40))
                for name, color in zip(self.variants, colors, strict=True)
            ]
        handles += [
            Line2D([], [], marker=figures.style(name)[1], label=words.get(name, name), **self._look(name, None))
            for name in self.policies
        ]
        _legend_below(figure, handles, columns=2)


def _legend_below(figure: Figure, handles: Sequence[Artist], columns: int, title: str = "") -> None:
    """A legend below the panels."""
    look = dict(frameon=False, fontsize=9.5, title_fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title, **look)


def _new_figure(title: str, places: Sequence[Sequence[Finished]], height: float, notes: Sequence[str] = ()) -> Figure:
    """A figure with the conditions of its only place under the title; those of several stand over the panels."""
    only = places[0][0] if len(places) == 1 else None
    conditions = tables.wrapped_items(comparison_items(only), 116) if only else []
    in_sample = only is not None and only.in_sample
    return figures.new_figure(title, [*conditions, *notes], figures.WIDTH, height, alarm=in_sample)


def _place_title(axes: Axes, run: Finished, places: Sequence[Sequence[Finished]], with_column: bool = False) -> None:
    """Over a panel: the conditions, if there are several, and the sparsity and density of its column."""
    parts = comparison_items(run) if len(places) > 1 else []
    sparsity, density = _column(run)
    parts += [f"sparsity {sparsity:g}, density {density:g}"] if with_column else []
    color = figures.ALARM if run.in_sample and len(places) > 1 else figures.MUTED
    axes.set_title("\n".join(tables.wrapped(part, 44) for part in parts), loc="left", fontsize=9, color=color)


def _cluster_axis(axes: Axes, column: Column, most: int) -> None:
    """A logarithmic axis with the numbers of clusters that were tried, or as many of them as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = sorted({x for panel in column.lines for line in panel for x, _ in line.points})
    ends = [*ticks, *(PAPER_CLUSTERS if _is_papers(column.runs[0]) else ())]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.4, max(ends) * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1][:: -(-len(ticks) // most)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _paper_line(axes: Axes, value: float, label: str, above: bool) -> None:
    """A result of the paper, over the range of clusters that it tried."""
    axes.plot(PAPER_CLUSTERS, [value, value], color="#9A9A9A", linewidth=1.1, zorder=1.5)
    _level_label(axes, label, (0.99, value), figures.MUTED, above, "right")


def _own_levels(axes: Axes, members: Sequence[Finished], value: Value) -> None:
    """The policies without a codebook as dashed levels with their values; equal values are one level."""
    levels: dict[tuple[str, str], float] = {}
    for policy in WITHOUT_CODEBOOK:
        for run in members:
            level = value(run, run.policies[policy]) if policy in run.policies else None
            if level is not None and not (policy == "dense" and level == 100):
                levels.setdefault((policy, tables.shown_perplexity(level)), level)
    for (policy, text), level in levels.items():
        color = figures.style(policy)[0]
        axes.axhline(level, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1.6)
        _level_label(axes, f"{policy} {text}", (0.01, level), color, above=policy != "dense", side="left")
    low, high = axes.get_ylim()
    if levels and axes.get_yscale() == "log":  # room for the words under the lowest level
        axes.set_ylim(min(low, min(levels.values()) * (low / high) ** 0.07), high)


def _level_label(axes: Axes, text: str, at: tuple[float, float], color: str, above: bool, side: str) -> None:
    """Small words right above or below a level, with a white rim that keeps them readable over lines."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        at,
        (0, 2 if above else -2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8.5,
        color=color,
        path_effects=[withStroke(linewidth=2.2, foreground="white")],
        zorder=4,
        va="bottom" if above else "top",
        ha=side,
    )
