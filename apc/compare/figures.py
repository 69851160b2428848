"""Figures of finished runs over the number of clusters, over bits, and over what is captured.

Runs that differ in model, text, split or windows share neither a line nor a panel. The paper's own figures (Dhar et al., Euro-Par 2025) stand beside ours as
a reference only: they are Mistral-7B's, scored on the text that was fitted on.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apc.compare.finished import Finished, comparison_text, variants
from apc.evaluate import figures, tables
from apc.sparse.policies import POLICIES, facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER_CLUSTERS = tuple(name for name, policy in POLICIES.items() if policy.over_clusters)
BY_CLUSTER = tuple(name for name, policy in POLICIES.items() if policy.by_cluster)  # chosen by log₂ K bits a site
BITS = "bits of a mask's choice, per token and layer (log₂ K for each site)"
PAPER_CLUSTERS = (256, 16384)  # that the paper tried
PAPER_COVERAGE = (
    0.7934  # its best "clustering precision", at a number of clusters and a density that it does not give with it
)
PAPER_PERPLEXITIES = {"nearest centroids": 12.49, "exact": 6.45, "dense": 5.3}  # its best; dense is rounded there
REFERENCE = "grey: the paper's figures, Mistral-7B in-sample; a reference only, not comparable"
_NAME = 60  # letters of a variant's name that a legend has room for
_DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1, 1, 1, 1, 1))  # of lines, one for each variant of a codebook
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one for each density
_COLUMNS = 3  # panels in a row of a figure
_LEGEND_INCHES = 2.5


@dataclass(frozen=True)
class Line:
    """Points that may be joined: one policy (or gap) of runs that differ in the number of clusters alone. points: (x, y), by x; equal x are repeats."""

    policy: str
    variant: str
    density: float
    points: list[tuple[float, float]]

    def middle(self) -> list[tuple[float, float]]:
        """Where the line goes: the mean of what was measured at each x."""
        groups = itertools.groupby(self.points, key=lambda point: point[0])
        return [(x, sum(y for _, y in found) / len(found)) for x, found in ((x, list(group)) for x, group in groups)]


Value = Callable[[Finished, dict], float | None]


def _in_order(names: Iterable[str]) -> list[str]:
    """Policies, each once: registered ones first, in their order."""
    found = dict.fromkeys(names)
    return [*(name for name in POLICIES if name in found), *(name for name in found if name not in POLICIES)]


def lines(runs: Sequence[Finished], policies: Sequence[str], x: Value, y: Value) -> list[Line]:
    """One line for each policy, variant of the codebook (and of the predictor, for policies that read it) and density. Runs of different places never share one."""
    names = _short(runs, variants(runs))
    trained = _short(runs, variants(runs, lambda run: run.settings | run.predictor_settings))
    found: dict[tuple, list[tuple[float, float]]] = {}
    for run in runs:
        for policy in policies:
            record = run.policies.get(policy)
            at, value = (None, None) if record is None else (x(run, record), y(run, record))
            if at and value is not None and math.isfinite(value):
                variant = (trained if facts(policy).forms else names)[str(run.folder)]
                found.setdefault((run.place, policy, variant, run.conditions["density"]), []).append((at, value))
    return [Line(policy, variant, density, sorted(points)) for (_, policy, variant, density), points in found.items()]


def _short(runs: Sequence[Finished], names: dict[str, str]) -> dict[str, str]:
    """Variants by their names, or by a run's where a legend has no room for a name that is this run's alone."""
    count = Counter(names.values())
    return {
        str(run.folder): run.name
        if count[names[str(run.folder)]] == 1 and len(names[str(run.folder)]) > _NAME
        else names[str(run.folder)]
        for run in runs
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
        "gaps": gaps_figure,
    }
    return [folder / f"{name}.png" for name, figure in draw.items() if figure(runs, folder / f"{name}.png")]


def coverage_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Coverage (the paper's "clustering precision") over clusters, and under it the density of the same masks, without which it says nothing."""
    upper = lambda run, policy: 100 * policy["coverage"] if policy.get("coverage") is not None else None
    lower = lambda run, policy: 100 * policy["density"] if policy.get("density") is not None else None

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        _paper_line(axes, 100 * PAPER_COVERAGE, f"paper's best: {100 * PAPER_COVERAGE:.2f}", above=True)

    rows = [("coverage, %", upper, False, reference), ("density, %", lower, False, None)]
    notes = [
        "share of the active neurons that a mask keeps: the paper's “clustering precision”",
        "a random mask covers as much as its density",
        REFERENCE,
    ]
    return _draw(runs, path, "Coverage over clusters", OVER_CLUSTERS, _clusters, "clusters", rows, notes)


def perplexity_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over clusters, with the dense model's and that of the exact masks."""

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        for name, value in PAPER_PERPLEXITIES.items():
            _paper_line(
                axes, value, f"paper, {name}: {'≈ ' if name == 'dense' else ''}{value:g}", above=name != "dense"
            )
        _own_levels(axes, members, _perplexity, ("dense", "exact"))

    rows = [("perplexity", _perplexity, True, reference)]
    return _draw(runs, path, "Perplexity over clusters", OVER_CLUSTERS, _clusters, "clusters", rows, [REFERENCE])


def captured_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Captured importance over the bits of a choice among clusters, with that of the exact masks."""
    value = lambda run, policy: (
        100 * policy["captured_importance"] if policy.get("captured_importance") is not None else None
    )
    rows = [
        ("captured importance, %", value, False, lambda axes, members: _own_levels(axes, members, value, ("exact",)))
    ]
    return _draw(runs, path, "Captured importance over bits", BY_CLUSTER, _bits, BITS, rows, [])


def bits_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bits of a choice among clusters, with the dense model's and that of the exact masks."""
    rows = [
        (
            "perplexity",
            _perplexity,
            True,
            lambda axes, members: _own_levels(axes, members, _perplexity, ("dense", "exact")),
        )
    ]
    return _draw(runs, path, "Perplexity over bits", BY_CLUSTER, _bits, BITS, rows, [])


def map_figure(runs: Sequence[Finished], path: Path) -> bool:
    """What captured importance, and captured energy, mean for perplexity: a point for each policy of each run, one row of two panels for each place."""
    shown = {"captured_importance": "captured importance, %", "captured_energy": "captured energy, %"}
    places = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.place)]
    points = [
        (index, policy, key, run.is_tuned_for(policy["policy"]))
        for index, members in enumerate(places)
        for run in members
        for policy in run.policies.values()
        for key in shown
        if policy["policy"] != "dense" and policy.get(key) and policy.get("ratio") and 1 < policy["ratio"] < math.inf
    ]
    if not points:
        return False
    from matplotlib.lines import Line2D

    figure = figures.new_figure(
        "What a captured share means for perplexity", [], 9.6 + _LEGEND_INCHES, 4.2 * len(places)
    )
    grid = figure.subplots(len(places), 2, squeeze=False)
    for index, members in enumerate(places):
        for axes, (key, label) in zip(grid[index], shown.items(), strict=True):
            figures.log_axis(axes, "y")
            for place, policy, name, tuned in points:
                if (place, name) == (index, key):
                    color, marker = figures.style(policy["policy"])
                    face = "white" if tuned else color
                    axes.plot(
                        100 * policy[key],
                        math.log(policy["ratio"]),
                        color=color,
                        marker=marker,
                        markerfacecolor=face,
                        markersize=6,
                        linestyle="none",
                    )
            _finer_ticks(axes)
            figures.plain_axes(axes, xlabel=label, ylabel="ln of perplexity over dense (log scale)")
        _place_title(grid[index][0], members[0])
    policies = _in_order(point[1]["policy"] for point in points)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=policy)
        for policy in policies
        for color, marker in [figures.style(policy)]
    ]
    if any(tuned for *_, tuned in points):
        handles.append(
            Line2D(
                [], [], color=figures.INK, marker="o", markerfacecolor="white", linestyle="none", label="hollow: tuned"
            )
        )
    legend = figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9.5)
    legend.set_alignment("left")
    figure.savefig(path)
    return True


def gaps_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Of runs with a predictor: what the codebook costs, and what predicting it costs, in nats."""
    runs = [
        run for run in runs if run.gap("predicted", "oracle") is not None and run.gap("oracle", "exact") is not None
    ]
    gap = lambda run, policy: run.own_gap(policy["policy"])
    rows = [("difference of ln perplexity, nats", gap, False, None)]
    words = {"oracle": "oracle − exact", "predicted": "predicted − oracle"}
    return bool(runs) and _draw(
        runs, path, "What codebook and predictor cost", tuple(words), _clusters, "clusters", rows, [], words
    )


def _clusters(run: Finished, policy: dict) -> float:
    return run.conditions["k"]


def _bits(run: Finished, policy: dict) -> float | None:
    return policy.get("bits")


def _perplexity(run: Finished, policy: dict) -> float | None:
    return policy.get("perplexity")


Row = tuple[str, Value, bool, "Callable[[Axes, Sequence[Finished]], None] | None"]


def _draw(
    runs: Sequence[Finished], path: Path, title: str, policies: Sequence[str], x: Value, xlabel: str, rows: Sequence[Row], notes: Sequence[str],
    words: dict[str, str] | None = None,
) -> bool:  # fmt: skip
    """One column of panels for each place, with the rows (label, value, whether logarithmic, what else to draw) under each other.

    words: what the legend calls the policies. Returns False, and draws nothing, where there is no point.
    """
    places = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.place)]
    drawn = [[lines(members, policies, x, value) for _, value, *_ in rows] for members in places]
    every = [line for panels in drawn for found in panels for line in found]
    if not every:
        return False
    styles = _Styles(every)
    across = min(_COLUMNS, len(places))
    down = -(-len(places) // across)
    heights = [3.6, *[1.5] * (len(rows) - 1)] * down
    figure = figures.new_figure(title, notes, 5.2 * across + _LEGEND_INCHES, sum(heights) + 0.6 * down)
    grid = figure.subplots(len(rows) * down, across, squeeze=False, height_ratios=heights)
    for index in range(down * across):
        for row, (label, _, logarithmic, reference) in enumerate(rows):
            axes = grid[index // across * len(rows) + row, index % across]
            if index >= len(places):
                axes.set_axis_off()
                continue
            members, found = places[index], drawn[index][row]
            if logarithmic:
                figures.log_axis(axes, "y")
            if x is _clusters:
                _cluster_axis(axes, found)
            for line in found:
                styles.plot(axes, line)
            if reference is not None:
                reference(axes, members)
            if logarithmic:
                _finer_ticks(axes)
            figures.plain_axes(
                axes,
                xlabel=xlabel if row == len(rows) - 1 else "",
                ylabel=label + (" (log scale)" if logarithmic else ""),
            )
            if row == 0:
                _place_title(axes, members[0])
    styles.legend(figure, words or {})
    figure.savefig(path)
    return True


class _Styles:
    """A policy is a colour, a variant of the codebook a kind of line, a density a marker: the same in all panels of a figure."""

    def __init__(self, found: Sequence[Line]):
        self.policies = _in_order(line.policy for line in found)
        self.variants = list(dict.fromkeys(line.variant for line in found))
        self.densities = sorted({line.density for line in found})
        self._drawn: set[str] = set()

    def _dash(self, variant: str, width: float = 1.6) -> str | tuple:
        """As long on lines of any width, where matplotlib would stretch it with the width."""
        dashes = _DASHES[self.variants.index(variant) % len(_DASHES)]
        return (0, tuple(1.6 / width * length for length in dashes)) if dashes else "solid"

    def _width(self, variant: str) -> float:
        """Lines whose dashes are used up are told apart by their width."""
        return 1.6 + 1.2 * (self.variants.index(variant) // len(_DASHES))

    def _marker(self, density: float) -> str:
        return _MARKERS[self.densities.index(density) % len(_MARKERS)]

    def plot(self, axes: Axes, line: Line) -> None:
        color, _ = figures.style(line.policy)
        # Both oracles cover the same neurons, and one would hide the other.
        under = (
            dict(linewidth=5, alpha=0.3, zorder=1.8)
            if facts(line.policy).wide_line
            else dict(linewidth=self._width(line.variant), zorder=2)
        )
        dash = self._dash(line.variant, under["linewidth"])
        axes.plot(*zip(*line.middle(), strict=True), color=color, linestyle=dash, dash_capstyle="butt", **under)
        marker = dict(marker=self._marker(line.density), markersize=5.5, linestyle="none", zorder=under["zorder"] + 0.2)
        hollow = (
            dict(markerfacecolor="white", markeredgewidth=1.3, markersize=8) if facts(line.policy).wide_line else {}
        )
        axes.plot(*zip(*line.points, strict=True), color=color, **(marker | hollow))

    def legend(self, figure: Figure, words: dict[str, str]) -> None:
        """What the colours, kinds of lines and markers mean, each under a heading."""
        from matplotlib.lines import Line2D

        heading = lambda text: Line2D([], [], linestyle="none", label=text or " ")
        wide = dict(linewidth=5, alpha=0.3)
        handles = [heading("policy" if not words else "gap")]
        for policy in self.policies:
            look = wide if facts(policy).wide_line else dict(linewidth=2.4)
            handles.append(Line2D([], [], color=figures.style(policy)[0], label=words.get(policy, policy), **look))
        handles += [heading(""), heading("codebook")]
        handles += [
            Line2D(
                [],
                [],
                color=figures.INK,
                linewidth=self._width(name),
                linestyle=self._dash(name),
                label=tables.wrapped(name, 26),
            )
            for name in self.variants
        ]
        handles += [heading(""), heading("density of centroids")]
        handles += [
            Line2D(
                [],
                [],
                color=figures.INK,
                marker=self._marker(density),
                markersize=5.5,
                linestyle="none",
                label=f"{density:g}",
            )
            for density in self.densities
        ]
        x, y, width, height = figure.get_layout_engine().get()[
            "rect"
        ]  # all but the heading; the legend takes its right end
        left = width - _LEGEND_INCHES / figure.get_figwidth()
        figure.get_layout_engine().set(rect=(x, y, left, height))
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left, height),
            frameon=False,
            fontsize=9,
            handlelength=2.6,
            labelspacing=0.45,
        )
        for text in legend.get_texts():
            if text.get_text() in ("policy", "gap", "codebook", "density of centroids"):
                text.set(color=figures.MUTED, weight="bold", x=-34)


def _place_title(axes: Axes, run: Finished) -> None:
    axes.set_title(
        comparison_text(run, lines=True),
        loc="left",
        fontsize=8,
        color=figures.ALARM if run.in_sample else figures.MUTED,
        linespacing=1.25,
    )


def _cluster_axis(axes: Axes, found: Sequence[Line]) -> None:
    """Powers of two, at least over the range that the paper tried."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    at = [*PAPER_CLUSTERS, *(x for line in found for x, _ in line.points)]
    low, high = math.floor(math.log2(min(at))), math.ceil(math.log2(max(at)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.35), 2 ** (high + 0.35))
    axes.xaxis.set_major_locator(
        FixedLocator([2.0**power for power in range(low, high + 1, 1 if high - low < 9 else 2)])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _finer_ticks(axes: Axes) -> None:
    """On a logarithmic axis of few powers of ten also their two- and fivefold; and some room below, where labels stand."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.04, high)
    if high / low < 300:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _paper_line(axes: Axes, value: float, label: str, above: bool) -> None:
    """A level that the paper gives, over the range of clusters that it tried."""
    axes.plot(PAPER_CLUSTERS, [value, value], color="#9A9A9A", linewidth=1.1, zorder=1.5)
    _label(axes, label, (PAPER_CLUSTERS[1], value), figures.MUTED, above=above, style="italic", ha="right")


def _own_levels(axes: Axes, members: Sequence[Finished], value: Value, policies: Sequence[str]) -> None:
    """Our own policies that do not depend on clusters, as levels with their names, and the bits of their masks' choice."""
    found: dict[tuple[str, float], str] = {}
    for policy in policies:
        for run in members:
            level = value(run, run.policies[policy]) if policy in run.policies else None
            if level is not None:
                record = run.policies[policy]
                bits = f", {record['bits']:,.0f} bits" if record.get("bits") and axes.get_xscale() == "linear" else ""
                found[policy, round(level, 2)] = f"{policy} {tables.shown_perplexity(level)}{bits}"
    for policy, level in found:
        axes.axhline(level, color=figures.style(policy)[0], linewidth=1, linestyle=(0, (4, 3)), zorder=1.6)
    heights = {at: axes.transData.transform((1.0, at[1]))[1] for at in found}
    taken: list[tuple[str, float]] = []
    for at in sorted(
        found, key=lambda at: (policies.index(at[0]), heights[at])
    ):  # of levels so close that words would meet, the first says all
        if any(policy == at[0] and abs(heights[at] - height) < 12 for policy, height in taken):
            continue
        taken.append((at[0], heights[at]))
        near = [text for other, text in found.items() if other[0] == at[0] and 0 <= heights[other] - heights[at] < 12]
        words = [near[0], *(text.removeprefix(f"{at[0]} ") for text in near[1:])]
        _label(
            axes,
            ", ".join(words),
            (0.01, at[1]),
            figures.style(at[0])[0],
            ("axes fraction", "data"),
            at[0] != "dense",
        )


def _label(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    color: str,
    coordinates: str | tuple[str, str] = "data",
    above: bool = True,
    **look: str,
) -> None:
    """Small words right above or below a level, with a white rim that keeps them readable over lines."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.2, foreground="white")]
    axes.annotate(text, at, (0, 3 if above else -3), xycoords=coordinates, textcoords="offset points", fontsize=7.5, color=color, path_effects=rim, zorder=4,
                  va="bottom" if above else "top", **look)  # fmt: skip
