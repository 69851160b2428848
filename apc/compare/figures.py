"""Figures of finished runs: over the number of clusters, over bits, over bytes, and over captured shares.

Runs with a different model, text, split or windows never share a line or a panel. In this file a place is a list of
runs that can be compared with each other; a figure has separate panels for each place. The results of the paper (Dhar
et al., Euro-Par 2025) are drawn only beside runs of its own model, Mistral-7B, scored on the text that was fitted on.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apc.compare import frontier
from apc.compare.finished import Finished, bits_shown, comparison_items, variants
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
# The paper's best "clustering precision"; the paper does not state its number of clusters and density.
PAPER_COVERAGE = 0.7934
PAPER_PERPLEXITIES = {"nearest centroids": 12.49, "active neurons": 6.45, "dense": 5.3}  # its best; dense is rounded
PAPER_NOTE = "grey: the paper's results on the same model, also in-sample"
_MAX_NAME = 60  # letters of a variant's name in a legend
_FRONTIER: dict[str, Any] = dict(
    drawstyle="steps-post", color="#F0C808", linewidth=9, alpha=0.45, zorder=1.2, solid_capstyle="butt"
)
_PEER_DASHES, _FEW_BITS_DASHES = (0, (4, 2)), (0, (1, 1.5))
_COLUMNS = 3  # panels side by side
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))  # one per policy
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#4D4D4D")  # one per codebook


@dataclass(frozen=True)
class Line:
    """Points that may be joined: one policy in runs that differ only in the number of clusters.

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
    """One quantity that a figure draws over x, for each policy.

    label: of the y axis; value: the quantity, from a run and a policy's record; logarithmic: whether the y axis is;
    levels: whether to draw the policies without a codebook as horizontal lines; paper: results of the paper, each as
    (value, label, whether the label is above the line).
    """

    label: str
    value: Value
    logarithmic: bool = False
    levels: bool = False
    paper: Sequence[tuple[float, str, bool]] = ()


def lines(runs: Sequence[Finished], policies: Sequence[str], x: Value, y: Value) -> list[Line]:
    """One line per policy, variant of the codebook, sparsity and density. Runs that can't be compared never share one.

    For policies with a predictor its settings are part of the variant.
    """
    of_codebook = _short(runs, variants(runs, _codebook_settings))
    of_both = _short(runs, variants(runs, lambda run: _codebook_settings(run) | run.predictor_settings))
    points: dict[tuple, list[tuple[float, float]]] = {}
    for run in runs:
        for policy in policies:
            record = run.policies.get(policy)
            at, value = (None, None) if record is None else (x(run, record), y(run, record))
            if at and value is not None and math.isfinite(value):
                variant = (of_both if facts(policy).forms else of_codebook)[run.folder]
                points.setdefault((run.comparison_key, policy, variant, *_column(run)), []).append((at, value))
    return [Line(*key, sorted(values)) for (_, *key), values in points.items()]  # type: ignore[call-arg]


def _codebook_settings(run: Finished) -> dict[str, object]:
    """All settings except the sparsity, because runs of another sparsity are in another column of panels."""
    return {key: value for key, value in run.settings.items() if key != "sparsity"}


def _column(run: Finished) -> tuple[float, float]:
    """The sparsity and density of a run: each pair has its own column of panels."""
    return run.conditions.get("sparsity", math.nan), run.conditions["density"]


def _short(runs: Sequence[Finished], names: dict[Path, str]) -> dict[Path, str]:
    """The variants' names by folder; a long name that only one run has is replaced by the run's name."""
    count = Counter(names.values())
    long = {name for name in count if count[name] == 1 and len(name) > _MAX_NAME}
    return names | {run.folder: run.name for run in runs if names[run.folder] in long}


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
        "perplexity_over_speed": speed_figure,
        "gaps": gaps_figure,
    }
    return [folder / f"{name}.png" for name, figure in draw.items() if figure(runs, folder / f"{name}.png")]


def coverage_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Coverage (the paper's "clustering precision") over clusters, with the density of the same masks below it."""
    best = 100 * PAPER_COVERAGE
    panels = [
        Panel("coverage, %", _share("coverage"), paper=[(best, f"paper's best: {best:.2f}", True)]),
        Panel("density, %", _share("density")),
    ]
    notes = [
        "coverage: share of the active neurons that a mask keeps, the paper's “clustering precision”",
        "A random mask covers as much as its density, shown below.",
    ]
    return _draw(runs, path, "Coverage over the number of clusters", OVER_CLUSTERS, panels, notes=notes)


def perplexity_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over clusters, with the levels of the policies without a codebook."""
    paper = [
        (value, f"paper, {name}: {'≈ ' if name == 'dense' else ''}{value:g}", name != "dense")
        for name, value in PAPER_PERPLEXITIES.items()
    ]
    panel = Panel("perplexity", _perplexity, logarithmic=True, levels=True, paper=paper)
    return _draw(runs, path, "Perplexity over the number of clusters", OVER_CLUSTERS, [panel])


def captured_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Captured importance over the bits that it takes to choose a cluster."""
    panel = Panel("captured importance, %", _share("captured_importance"), levels=True)
    title = "Captured importance over the bits that choose a mask"
    return _draw(runs, path, title, BY_CLUSTER, [panel], over_bits=True)


def bits_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bits that it takes to choose a cluster."""
    panel = Panel("perplexity", _perplexity, logarithmic=True, levels=True)
    return _draw(runs, path, "Perplexity over the bits that choose a mask", BY_CLUSTER, [panel], over_bits=True)


def gaps_figure(runs: Sequence[Finished], path: Path) -> bool:
    """The loss through the codebook and the loss through predicting its clusters, for runs that have both."""
    runs = [run for run in runs if all(run.gap(name) is not None for name in WITH_GAP)]
    words = {name: f"{name} − {facts(name).gap_to}" for name in WITH_GAP}
    panels = [Panel("ln perplexity ratio, nats", lambda run, policy: run.gap(policy["policy"]))]
    title = "What the codebook costs, and what predicting the cluster adds"
    return _draw(runs, path, title, WITH_GAP, panels, words=words)


def map_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity against dense over captured importance and energy, a point for each policy of each run."""
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
    notes = ["dense: the model with its FFN stored at the same bits"] if any(map(bits_shown, places)) else []
    figure = _new_figure("Perplexity against the share that the masks keep", places, 0.9 + 3.4 * len(places), notes)
    grid = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for row, members, group in zip(grid, places, points, strict=True):
        figures.log_axis(row[0], "y")
        for axes, (key, label) in zip(row, shares.items(), strict=True):
            for policy, tuned in group:
                if policy.get(key):
                    at = 100 * policy[key], math.log(policy["ratio"])
                    axes.plot(*at, **figures.marker_style(policy))
                    if tuned:  # a dot in the marker
                        dot = figures.style(policy["policy"])[0] if policy.get("excludes_finding") else "white"
                        axes.plot(*at, "o", color=dot, markersize=2.6, markeredgewidth=0, zorder=3)
            figures.plain_axes(axes, label, "ln perplexity over dense, nats (log)" if axes is row[0] else "")
        _place_title(row[0], members[0], places)
    meaning = "hollow: bound" + ("; with a dot: tuned" if any(tuned for _, tuned in every) else "")
    _marker_legend(figure, [policy for policy, _ in every], meaning)
    figure.savefig(path)
    return True


def bytes_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bytes that a token reads: a line for each policy, and the frontier of all of them.

    A line joins the runs of a policy that are better than all its runs with at most as many bytes.
    """
    groups = [(members, frontier.all_series(members)) for members in _places(runs)]
    groups = [(members, every) for members, every in groups if any(map(frontier.Series.is_worth_drawing, every))]
    if not groups:
        return False
    places = [members for members, _ in groups]
    figure = _new_figure("Perplexity over the FFN bytes read per token", places, 0.9 + 5.4 * len(places))
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    _bytes_legend(figure, [series for _, every in groups for series in every])
    for axes, (members, every) in zip(grid, groups, strict=True):
        _place_title(axes, members[0], places)
        _draw_bytes(axes, every)
    figure.savefig(path)
    return True


def _draw_bytes(axes: Axes, every: Sequence[frontier.Series]) -> None:
    points, limit = [point for series in every for point in series.points], frontier.largest_useful(every)
    inside = {point for point in points if point.perplexity <= limit and point.bytes <= 100}
    figures.log_axis(axes, "y")
    low, top = (pick(point.perplexity for point in inside) for pick in (min, max))
    room = 1.01 * (top / low) ** 0.07
    axes.set_ylim(low / room, top * room)
    start = min([10.0, *(point.bytes for point in inside)])
    axes.set_xlim(start - 2, 102)
    axes.set_xticks(range(10 * math.floor(start / 10), 101, 10))
    usable = (point for series in every if not series.is_bound for point in series.points if point in inside)
    front = frontier.best(usable)
    if front:
        edge = [(point.bytes, point.perplexity) for point in front]
        axes.plot(*zip(*edge, (100, edge[-1][1]), strict=True), **_FRONTIER)
    labels = []
    for series in every:
        line, look = frontier.best(series.points), _series_look(series)
        if not series.is_bound:
            axes.plot([point.bytes for point in line], [point.perplexity for point in line], **look | {"marker": ""})
        shown = [point for point in line if point in inside]
        named = {point: series.label(point) for point in shown if point in front or series.bits is None}
        named = named or {point: series.name for point in shown[:1]}
        for point in (point for point in series.points if point in inside):
            alone = dict(alpha=1, zorder=3) if point in line else dict(alpha=0.35, zorder=1.8)
            axes.plot(point.bytes, point.perplexity, **look | alone | {"linestyle": "none"})
            labels.append(figures.Label(point.bytes, point.perplexity, named.get(point, ""), look["color"]))
    level = frontier.dense_perplexity(every)
    if level is not None:
        axes.axhline(level, color=figures.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        text = f"dense, 16 bits: {tables.shown_perplexity(level)}"
        _level_label(axes, text, (0.965, level), figures.INK, above=False, side="right")
    if left_out := Counter(series.name for series in every for point in series.points if point not in inside):
        names = ", ".join(name + f"\xa0({count})" * (count > 1) for name, count in left_out.items())
        text = f"not drawn, above {tables.shown_perplexity(limit)} or more bytes than dense: {names}"
        small: dict[str, Any] = dict(transform=axes.transAxes, fontsize=8.5, color=figures.MUTED, ha="right")
        axes.text(1, 1.01, tables.wrapped(text, 70), va="bottom", **small)
    figures.finer_ticks(axes)
    xlabel = "FFN bytes read per token, % of the dense FFN at 16 bits"
    figures.plain_axes(axes, xlabel, "perplexity (log scale)")
    figures.place_labels(axes, labels)


def speed_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over tokens per second: a point for each timed policy of each run, the dense model among them.

    Each machine has a panel of its own. Points are named if no other is faster and as good.
    """
    groups = [
        [run for run in place if run.machine == machine]
        for place in _places(runs)
        for machine in sorted({run.machine for run in place if run.machine})
    ]
    if not groups:
        return False
    places = _places([members[0] for members in groups])
    figure = _new_figure("Perplexity over decoding speed", places, 0.9 + 3.6 * len(groups))
    grid = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, members in zip(grid, groups, strict=True):
        _place_title(axes, members[0], places)
        _draw_speeds(axes, members)
    records = [run.policies[name] for members in groups for run in members for name in _timed(run)]
    _marker_legend(figure, records, "named: no other point is faster and as good")
    figure.savefig(path)
    return True


def _timed(run: Finished) -> list[str]:
    """The policies with a perplexity whose speed was measured."""
    return [name for name in run.speeds if math.isfinite(tables.to_float(run.policies.get(name, {}).get("perplexity")))]


def _draw_speeds(axes: Axes, members: Sequence[Finished]) -> None:
    names, points = frontier.short_names(members), []
    for run in members:
        for name in _timed(run):
            record = run.policies[name]
            rate = figures.plot_rate(axes, run.speeds[name], record["perplexity"], **figures.marker_style(record))
            text = f"{name} ({names[run.folder]})" if len(members) > 1 else name
            points.append(figures.Label(rate, record["perplexity"], text, figures.style(name)[0]))
    figures.log_axis(axes, "y")
    figures.finer_ticks(axes)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    xlabel = f"tokens per second, one sequence; bar: range of rounds\n{members[0].machine}"
    figures.plain_axes(axes, xlabel, "perplexity (log scale)")
    beaten = [any(other.x > point.x and other.y <= point.y for other in points) for point in points]
    labels = [replace(point, text="") if worse else point for point, worse in zip(points, beaten, strict=True)]
    figures.place_labels(axes, labels)


def _series_look(series: frontier.Series) -> dict[str, Any]:
    """The line and markers of a series; a bound's markers are hollow."""
    color, marker = figures.style(series.policy)
    if series.bits is None:
        color, marker = figures.INK, "s"
    dashes = _FEW_BITS_DASHES if series.few_bits else _PEER_DASHES if facts(series.policy).is_peer else "solid"
    face = "white" if series.is_bound else color
    return dict(color=color, marker=marker, linestyle=dashes, linewidth=1.6, markersize=7, markerfacecolor=face)


def _bytes_legend(figure: Figure, every: Sequence[frontier.Series]) -> None:
    """Explains the looks that occur in these series."""
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = dict(marker="o", linestyle="none")
    peer = dict(color=figures.MUTED, linestyle=_PEER_DASHES)
    joined = [series for series in every if len(frontier.best(series.points)) > 1]
    looks: list[tuple[str, bool, dict]] = [
        ("frontier: best of all at these bytes or fewer", any(map(frontier.Series.is_usable, every)), _FRONTIER),
        ("peers", any(facts(series.policy).is_peer for series in every), peer),
        ("FFN stored at few bits", any(series.few_bits for series in joined), dict(linestyle=_FEW_BITS_DASHES)),
        ("bound", any(series.is_bound for series in every), dot | dict(markerfacecolor="white")),
        (
            "worse than its policy's best at these bytes",
            any(len(series.points) > len(frontier.best(series.points)) for series in every),
            dot | dict(alpha=0.35),
        ),
    ]
    black: dict[str, Any] = dict(color=figures.INK, linewidth=1.6)
    handles = [Line2D([], [], label=label, **black | look) for label, occurs, look in looks if occurs]
    _legend_below(figure, handles, columns=2)


def _places(runs: Sequence[Finished]) -> list[list[Finished]]:
    """The places: lists of adjacent runs with the same comparison key."""
    return [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.comparison_key)]


def _in_order(names: Iterable[str]) -> list[str]:
    """The policies, each once: registered ones first, in their order."""
    every = dict.fromkeys(names)
    return [*(name for name in POLICIES if name in every), *(name for name in every if name not in POLICIES)]


def _perplexity(run: Finished, policy: dict) -> float | None:
    return policy.get("perplexity")


def _share(key: str) -> Value:
    return lambda run, policy: None if policy.get(key) is None else 100 * policy[key]


def _is_papers(run: Finished) -> bool:
    return run.in_sample and str(run.conditions["model"]).lower().startswith(PAPER_MODEL)


def _draw(
    runs: Sequence[Finished],
    path: Path,
    title: str,
    policies: Sequence[str],
    panels: Sequence[Panel],
    over_bits: bool = False,
    words: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> bool:
    """Draws panels over clusters or bits; returns False if there is no line.

    Each place has a column per sparsity and density.

    words: names of the policies in the legend, if not their own.
    """
    x: Value = (lambda run, policy: policy.get("bits")) if over_bits else (lambda run, policy: run.conditions["k"])
    xlabel = "bits per token and layer" if over_bits else "clusters"
    columns: list[tuple[list[Finished], list[list[Line]]]] = []  # runs, and the lines of each panel
    for place in _places(runs):
        every = [lines(place, policies, x, panel.value) for panel in panels]
        every = [[line for line in found if len(line.middle()) > 1] for found in every]
        for key in sorted(set(map(_column, place))):
            own = [[line for line in found if (line.sparsity, line.density) == key] for found in every]
            columns += [([run for run in place if _column(run) == key], own)] if any(own) else []
    if not columns:
        return False
    if any(panel.paper for panel in panels) and any(map(_is_papers, runs)):
        notes = [*notes, PAPER_NOTE]
    places = _places([members[0] for members, _ in columns])
    styles = _Styles([line for _, found in columns for panel in found for line in panel])
    across, rows = min(_COLUMNS, len(columns)), len(panels)
    down = -(-len(columns) // across)
    heights = [3.0, *[1.4] * (rows - 1)] * down
    figure = _new_figure(title, places, sum(heights) + 0.6 * down + styles.legend_inches, notes)
    grid = figure.subplots(rows * down, across, squeeze=False, height_ratios=heights, sharey="row")
    blocks = [grid[i // across * rows : i // across * rows + rows, i % across] for i in range(across * down)]
    for axes in (axes for block in blocks[len(columns) :] for axes in block):
        axes.set_axis_off()
    for index, ((members, found), block) in enumerate(zip(columns, blocks, strict=False)):
        _place_title(block[0], members[0], places, with_column=len(columns) > len(places))
        for axes, panel, drawn in zip(block, panels, found, strict=True):
            ylabel = panel.label + (" (log scale)" if panel.logarithmic else "")
            figures.plain_axes(axes, xlabel if panel is panels[-1] else "", ylabel if index % across == 0 else "")
            if panel.logarithmic:
                figures.log_axis(axes, "y")
            if over_bits:
                figures.integer_ticks(axes)
            else:
                tried = {at for panel in found for line in panel for at, _ in line.points}
                _cluster_axis(axes, sorted(tried), _is_papers(members[0]), most=4 if across > 1 else 9)
            for line in drawn:
                styles.plot(axes, line)
    # Levels need the range of all columns, which share an axis.
    for (members, _), block in zip(columns, blocks, strict=False):
        for axes, panel in zip(block, panels, strict=True):
            for value, label, above in panel.paper if _is_papers(members[0]) else ():
                axes.plot(PAPER_CLUSTERS, [value, value], color="#9A9A9A", linewidth=1.1, zorder=1.5)
                _level_label(axes, label, (0.99, value), figures.MUTED, above, "right")
            if panel.levels:
                _own_levels(axes, members, panel.value)
            figures.finer_ticks(axes)
    styles.legend(figure, words or {})
    figure.savefig(path)
    return True


class _Styles:
    """Colour tells the codebook and dashes the policy; with a single codebook, colour tells the policy."""

    def __init__(self, every: Sequence[Line]):
        self.policies = _in_order(line.policy for line in every)
        self.variants = list(dict.fromkeys(line.variant for line in every))
        # True if each policy has one variant only: no policy then appears twice among these pairs.
        self.by_policy = len({(line.policy, line.variant) for line in every}) == len(self.policies)

    @property
    def legend_inches(self) -> float:
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

    def legend(self, figure: Figure, words: Mapping[str, str]) -> None:
        """Names the colours and the dashes below the panels."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=_COLORS[i % len(_COLORS)], linewidth=5, label=tables.wrapped(name, 40))
            for i, name in enumerate([] if self.by_policy else self.variants)
        ]
        handles += [
            Line2D([], [], marker=figures.style(name)[1], label=words.get(name, name), **self._look(name, None))
            for name in self.policies
        ]
        _legend_below(figure, handles, columns=2)


def _legend_below(figure: Figure, handles: Sequence[Artist], columns: int, title: str = "") -> None:
    look: dict[str, Any] = dict(frameon=False, fontsize=9.5, title_fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title, **look)


def _marker_legend(figure: Figure, policies: Iterable[dict], title: str = "") -> None:
    from matplotlib.lines import Line2D

    records = {policy["policy"]: policy for policy in policies}
    handles = [Line2D([], [], **figures.marker_style(records[name]), label=name) for name in _in_order(records)]
    _legend_below(figure, handles, columns=5, title=title)


def _new_figure(title: str, places: Sequence[Sequence[Finished]], height: float, notes: Sequence[str] = ()) -> Figure:
    """A figure. With one place its conditions are under the title; with several they are above the panels."""
    first, alone = places[0][0], len(places) == 1
    conditions = tables.wrapped_items(comparison_items(first), 116) if alone else []
    return figures.new_figure(title, [*conditions, *notes], figures.WIDTH, height, alarm=alone and first.in_sample)


def _place_title(axes: Axes, run: Finished, places: Sequence[Sequence[Finished]], with_column: bool = False) -> None:
    """Titles a panel with the run's conditions, if there are several places.

    with_column: also with the sparsity and density of its column.
    """
    parts = comparison_items(run) if len(places) > 1 else []
    sparsity, density = _column(run)
    parts += [f"sparsity {sparsity:g}, density {density:g}"] if with_column else []
    color = figures.ALARM if run.in_sample and len(places) > 1 else figures.MUTED
    axes.set_title("\n".join(tables.wrapped(part, 44) for part in parts), loc="left", fontsize=9, color=color)


def _cluster_axis(axes: Axes, ticks: Sequence[float], beside_paper: bool, most: int) -> None:
    """A logarithmic axis with the numbers of clusters that were tried, or as many of them as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = [*ticks, *(PAPER_CLUSTERS if beside_paper else ())]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.4, max(ends) * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1][:: -(-len(ticks) // most)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _own_levels(axes: Axes, members: Sequence[Finished], value: Value) -> None:
    """Draws the policies without a codebook as dashed horizontal lines with their values; equal values share a line."""
    levels: dict[tuple[str, str], float] = {}
    bits = bits_shown(members)
    for policy in WITHOUT_CODEBOOK:
        for run in members:
            level = value(run, run.policies[policy]) if policy in run.policies else None
            if level is not None and not (policy == "dense" and level == 100):
                name = f"{policy}, {bits[run.folder]}:" if bits else policy
                levels.setdefault((name, tables.shown_perplexity(level)), level)
    for (name, text), level in levels.items():
        policy = name.partition(",")[0]
        color = figures.style(policy)[0]
        axes.axhline(level, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1.6)
        _level_label(axes, f"{name} {text}", (0.01, level), color, above=policy != "dense", side="left")
    low, high = axes.get_ylim()
    if levels and axes.get_yscale() == "log":  # room for the words under the lowest level
        axes.set_ylim(min(low, min(levels.values()) * (low / high) ** 0.07), high)


def _level_label(axes: Axes, text: str, at: tuple[float, float], color: str, above: bool, side: str) -> None:
    """Small words right above or below a horizontal line, with a white rim that keeps them readable over curves."""
    look: dict[str, Any] = dict(fontsize=8.5, color=color, zorder=4, va="bottom" if above else "top", ha=side)
    place = at, (0, 2 if above else -2), ("axes fraction", "data"), "offset points"
    axes.annotate(text, *place, path_effects=figures.white_rim(), **look)
