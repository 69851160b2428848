"""Draws a run's results (`results.json`) as figures. Every figure carries its conditions.

Each function writes one PNG and returns True; it writes nothing and returns False if the results lack its data. A
hollow marker is a bound: a policy that reads the token's own activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apc.evaluate.tables import (
    DASH,
    best_policy,
    condition_items,
    is_in_sample,
    layered,
    percent,
    shown_perplexity,
    shown_ratio,
    to_float,
    wrapped_items,
)
from apc.sparse.policies import facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import AbstractPathEffect

INK, MUTED, _GRID, ALARM = "#1A1A1A", "#595959", "#E3E3E3", "#B2182B"
DPI = 160
WIDTH = 8.0  # inches; a README shows 1,280 pixels at about 800, so that 9 points become 12 pixels
_REFERENCE: dict[str, Any] = dict(color=INK, linewidth=1, linestyle=(0, (4, 3)))
_LOG_FROM = 5.0  # an axis is logarithmic if its largest value is this many times the smallest
_OUTLIER = 30.0  # the largest value is clipped at the edge if it is this many times the second largest
_MAX_SITES = 4  # with more sites than this, all share one panel
_MAX_MARKERS = 40  # a line of more points has no markers
_MAX_LINEAR_RANKS = 256  # more clusters than this are on a log scale
_MAX_POINTS = 400  # points drawn per usage curve: a codebook has up to 16,384 clusters


def style(policy: str) -> tuple[str, str]:
    """A policy's colour (from Okabe and Ito's palette for any colour vision) and marker, the same in every figure."""
    return facts(policy).color, facts(policy).marker


def marker_style(policy: dict) -> dict[str, Any]:
    """The marker of a policy's record as matplotlib options: hollow if the policy is a bound."""
    color, marker = style(policy["policy"])
    face = "white" if policy.get("excludes_finding") else color
    return dict(color=color, marker=marker, markerfacecolor=face, markeredgewidth=1.4, markersize=7, linestyle="none")


def save_figures(results: dict, folder: Path) -> dict[str, Path]:
    """Draws every figure that the results have data for; returns name → PNG."""
    draw = {
        "perplexity": perplexity_figure,
        "perplexity_over_bytes": bytes_figure,
        "speed": speed_figure,
        "captured_importance": captured_figure,
        "union_density": union_figure,
        "cluster_usage": usage_figure,
        "convergence": convergence_figure,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in draw}
    return {name: path for name, path in paths.items() if draw[name](results, path)}


def perplexity_figure(results: dict, path: Path) -> bool:
    """Perplexity per policy as dots with the 95 % interval against dense, and the numbers beside them."""
    policies = results.get("policies") or []
    values = [to_float(policy.get("perplexity")) for policy in policies]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return False
    best, title = best_policy(policies), "Perplexity of each policy"
    if best and best.get("ratio") is not None:
        title = f"Best usable policy: {best['policy']}, {best['ratio']:.3g} × dense perplexity"
    figure = _figure(results, title, 0.75 + 0.34 * len(policies))
    axes, numbers = figure.subplots(1, 2, width_ratios=[2.1, 1], sharey=True)
    limit = outlier_limit(finite)
    clipped = math.isfinite(limit)
    shown = [value for value in finite if value <= limit]
    ends = [end for policy, value in zip(policies, values, strict=True) if value <= limit for end in _interval(policy)]
    # Ends count too: a linear axis around a wide interval would go below zero.
    logarithmic = max([*shown, *ends]) / min([*shown, *ends]) > _LOG_FROM
    if logarithmic:
        log_axis(axes, "x")
        start, edge = _limits([*shown, *ends], True, 0.06, 0.18 if clipped else 0.09)
    else:
        start, edge = _limits([*shown, *ends], False, 0.08, 0.3 if clipped else 0.12)
    axes.set_xlim(start, edge)
    for y, (policy, value) in enumerate(zip(policies, values, strict=True)):
        if not math.isfinite(value):
            reason = policy.get("missing") or ("not finite" if policy.get("perplexity") is not None else "not measured")
            place = (0, y), (6, 0), axes.get_yaxis_transform(), "offset points"
            axes.annotate(f"{DASH} {reason}", *place, va="center", fontsize=9, color=MUTED)
            continue
        for x, text in ((0.34, shown_perplexity(value)), (1, shown_ratio(policy))):
            numbers.text(x, y, text, ha="right", va="center", fontsize=9.5)
        look = marker_style(policy)
        if value > edge:
            look = look | {"marker": ">", "clip_on": False}
            axes.annotate(
                "off the scale", (edge, y), (-9, 0), "data", "offset points", ha="right", va="center", fontsize=9
            )
        else:
            ends = [min(edge, end) for end in _interval(policy)]
            axes.plot(ends, [y] * len(ends), color=look["color"], linewidth=1.3, marker="|", markersize=8, zorder=2.4)
        axes.plot(min(value, edge), y, **look, zorder=3)
    for value in _dense(policies):
        axes.axvline(value, **_REFERENCE, zorder=1.5)
    axes.set_yticks(range(len(policies)), [policy["policy"] for policy in policies])
    axes.set_ylim(len(policies) - 0.5, -0.5)
    log = " (log scale)" if logarithmic else ""
    plain_axes(axes, xlabel=f"perplexity{log}; dashed: dense; hollow: bound", grid="x")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    finer_ticks(axes, "x")
    numbers.set_axis_off()
    for x, head in ((0.34, "perplexity"), (1, "against dense ×")):
        numbers.text(x, 1, head, transform=numbers.transAxes, ha="right", va="bottom", fontsize=9, color=MUTED)
    return _save(figure, path)


def _interval(policy: dict) -> list[float]:
    """The ends of the 95 % interval against dense, as perplexities; empty without one."""
    keys = ("perplexity", "ratio", "ratio_low", "ratio_high")
    value, ratio, low, high = (to_float(policy.get(key)) for key in keys)
    drawable = math.isfinite(value * high / ratio) and high > low > 0 if ratio > 0 else False
    return [value * low / ratio, value * high / ratio] if drawable else []


def _dense(policies: Iterable[dict]) -> list[float]:
    """The perplexity of the dense model, if the policies have it."""
    values = [to_float(policy.get("perplexity")) for policy in policies if policy["policy"] == "dense"]
    return [value for value in values if math.isfinite(value)][:1]


def _limits(values: Sequence[float], logarithmic: bool, before: float, after: float) -> tuple[float, float]:
    """The ends of an axis around the values, with room before and after them as shares of their range."""
    low, high = min(values), max(values)
    if logarithmic:
        return low / (high / low) ** before, high * (high / low) ** after
    span = max(high - low, 0.02 * high)
    return low - before * span, high + after * span


def bytes_figure(results: dict, path: Path) -> bool:
    """Perplexity over the bytes that a token reads, one labelled point for each policy."""
    policies = results.get("policies") or []
    points = [BytesPoint(policy["policy"], policy) for policy in policies if policy["policy"] != "dense"]
    points = list(filter(BytesPoint.is_finite, points))
    if not points:
        return False
    figure = _figure(results, "Perplexity over the FFN bytes read per token", 4.2)
    draw_bytes(figure.subplots(), points, policies)
    return _save(figure, path)


@dataclass(frozen=True)
class BytesPoint:
    """A policy's record with its label in a figure over bytes."""

    label: str
    policy: dict

    @property
    def place(self) -> tuple[float, float]:
        """(bytes in per cent of the dense FFN's, perplexity)"""
        return 100 * to_float(self.policy.get("bytes_share")), to_float(self.policy.get("perplexity"))

    def is_finite(self) -> bool:
        """Whether it can be drawn."""
        return all(map(math.isfinite, self.place))


def draw_bytes(axes: Axes, points: Sequence[BytesPoint], policies: Iterable[dict]) -> None:
    """Perplexity over bytes; dense as a line, bounds hollow, outliers at the edge with their values.

    points: all but dense; an empty label is not drawn. policies: records, from which only dense is used.
    """
    dense = _dense(policies)
    x, y = (np.array(values) for values in zip(*(point.place for point in points), strict=True))
    x_limit, y_limit = (outlier_limit(values) for values in ([100.0, *x], [*dense, *y]))
    x_limit = min(x_limit, 125.0)  # more bytes than dense are of little use: clipped too
    levels, clipped = [value for value in [*dense, *y] if value <= y_limit], math.isfinite(y_limit)
    logarithmic = max(levels) / min(levels) > 2
    if logarithmic:
        log_axis(axes, "y")
        bottom, top = _limits(levels, True, 0.08, 0.16 if clipped else 0.08)
    else:
        bottom, top = _limits(levels, False, 0.1, 0.25 if clipped else 0.1)
    axes.set_ylim(bottom, top)
    inside = x[x <= x_limit]
    left = min(inside, default=100.0)
    right = max([*inside, left + 10])
    right += 0.18 * (right - left)
    axes.set_xlim(left - 0.13 * (right - left), right)
    labels = []
    for point, px, py in zip(points, x, y, strict=True):
        at = min(px, right), min(py, top)
        look = marker_style(point.policy)
        beyond = [f"{px:.0f} %"] if px > right else []
        beyond += [shown_perplexity(py)] if py > top else []
        if beyond:
            look["marker"] = ">" if px > right else "^"
        axes.plot(*at, **look, clip_on=False, zorder=3)
        words = " ".join(filter(None, [point.label, f"({', '.join(beyond)})" if beyond else ""]))
        labels.append(Label(*at, words, look["color"]))
    for value in dense:
        axes.axhline(value, **_REFERENCE, zorder=1.5)
        place = (1, value), (-2, -3), ("axes fraction", "data"), "offset points"
        axes.annotate(f"dense {shown_perplexity(value)}", *place, fontsize=9, ha="right", va="top")
    finer_ticks(axes)
    log = " (log scale)" if logarithmic else ""
    plain_axes(axes, xlabel="FFN bytes read per token, % of dense at 16 bits; hollow: bound", ylabel=f"perplexity{log}")
    place_labels(axes, labels)


def speed_figure(results: dict, path: Path) -> bool:
    """Perplexity after a dense prefill over tokens per second, a point for each policy; hollow: prefill sparse too."""
    policies = (results.get("speed") or {}).get("policies") or []
    if not policies:
        return False
    unclear = ", ".join(policy["policy"] for policy in policies if policy.get("unclear"))
    note = f"Speed against dense is unclear: {unclear}" if unclear else ""
    figure = _figure(results, "Perplexity over decoding speed", 4.2, note=note)
    axes = figure.subplots()
    labels = []
    for policy in policies:
        color, marker = style(policy["policy"])
        rate = plot_rate(axes, policy, policy["perplexity"], color=color, marker=marker, markersize=8)
        if policy["policy"] != "dense" and policy["perplexity_masked"]:
            axes.plot(rate, policy["perplexity_masked"], marker, color=color, markersize=8, markerfacecolor="white")
        labels.append(Label(rate, policy["perplexity"], policy["policy"], color))
    values = [policy[key] for policy in policies for key in ("perplexity", "perplexity_masked") if policy[key]]
    if max(values) / min(values) > _LOG_FROM:
        log_axis(axes, "y")
    axes.margins(0.18)
    axes.set_xlim(0, 1.15 / min(policy.get("seconds_low", policy["seconds_per_token"]) for policy in policies))
    hollow = any(policy["perplexity_masked"] for policy in policies if policy["policy"] != "dense")
    ylabel = "perplexity; hollow: prefill sparse too" if hollow else "perplexity"
    plain_axes(axes, xlabel="tokens per second, one sequence; bar: range of rounds", ylabel=ylabel)
    place_labels(axes, labels)
    return _save(figure, path)


def plot_rate(axes: Axes, timed: dict, perplexity: float, **look: Any) -> float:
    """Draws a point at a timed policy's tokens per second, and a bar over the range of its rounds; returns the rate."""
    rate = 1 / timed["seconds_per_token"]
    ends = [1 / timed[key] for key in ("seconds_low", "seconds_high") if key in timed]  # not in older results
    axes.plot(ends, [perplexity] * len(ends), color=look["color"], linewidth=4, alpha=0.25, zorder=1.8)
    axes.plot(rate, perplexity, **look)
    return rate


def captured_figure(results: dict, path: Path) -> bool:
    """Captured importance per layer, one line per policy except dense, named at its end."""
    policies = layered(results.get("policies") or [], "captured_importance")
    if not policies:
        return False
    figure = _figure(results, "Importance that the masks keep, layer by layer", 4.2)
    axes = figure.subplots()
    lowest, ends = 100.0, []
    for policy in policies:
        shares = 100 * np.array([to_float(value) for value in policy["per_layer"]["captured_importance"]])
        color, marker = style(policy["policy"])
        marker = marker if len(shares) <= _MAX_MARKERS else ""
        axes.plot(shares, color=color, marker=marker, markersize=4, linewidth=1.5, clip_on=False)
        lowest = float(np.nanmin([lowest, *shares]))
        text = f"{policy['policy']} {percent(policy.get('captured_importance'))}"
        ends += [Label(last, shares[last], text, color) for last in np.flatnonzero(np.isfinite(shares))[-1:]]
    axes.set_ylim(min(90.0, 10 * math.floor(lowest / 10)), 100)
    integer_ticks(axes)
    plain_axes(axes, xlabel="layer; at the right: over all layers", ylabel="captured importance, %")
    end_labels(axes, ends)
    return _save(figure, path)


def union_figure(results: dict, path: Path) -> bool:
    """The share of neurons that a batch of tokens keeps together, for policies whose masks differ by token."""
    policies = [
        policy
        for policy in results.get("policies") or []
        if policy["policy"] != "dense"
        and not facts(policy["policy"]).same_for_all
        and any((policy.get("union_density") or {}).values())
    ]
    if not policies:
        return False
    figure = _figure(results, "More tokens in a batch need more neurons together", 4.2)
    axes = figure.subplots()
    sizes = np.array([1, *map(int, policies[0]["union_density"])])
    for policy in policies:
        shares = [to_float(value) for value in (policy.get("density"), *policy["union_density"].values())]
        look = marker_style(policy) | dict(linestyle="solid", linewidth=1.6, markersize=5.5)
        axes.plot(sizes, 100 * np.array(shares), label=policy["policy"], clip_on=False, **look)
    density = to_float((results.get("conditions") or {}).get("density"))
    independent = 100 * (1 - (1 - density) ** sizes)
    axes.plot(sizes, independent, **_REFERENCE, label="if masks were independent")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(top=100)
    xlabel = "tokens in a batch, drawn at random from windows that ran together"
    plain_axes(axes, xlabel, "neurons that some token keeps, %")
    axes.legend(loc="lower right", frameon=False, fontsize=10, title="hollow: bound", title_fontsize=9)
    return _save(figure, path)


def usage_figure(results: dict, path: Path) -> bool:
    """How evenly tokens spread over the clusters: median and range over layers of each layer's sorted shares."""
    sizes = (results.get("cluster") or {}).get("sizes") or {}
    groups = {
        site: [np.sort(np.asarray(layer, dtype=float))[::-1] for layer in layers]
        for site, layers in sizes.items()
        if max(map(len, layers), default=0) > 1
    }
    every = [layer for layers in groups.values() for layer in layers]
    if not every:
        return False
    if len(groups) > _MAX_SITES:
        groups = {"": every}
    empty, total = sum(int((layer == 0).sum()) for layer in every), sum(map(len, every))
    note = f"{empty:,} of {total:,} clusters are empty." if empty else "No cluster is empty."
    figure = _figure(results, "How evenly tokens spread over the clusters", 3.4, note=note)
    grid = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    levels = []
    for axes, (site, layers) in zip(grid, groups.items(), strict=True):
        levels += _usage_curves(axes, layers)
        ylabel = "share of the layer's tokens, %" if axes is grid[0] else ""
        plain_axes(axes, xlabel="cluster, largest first", ylabel=ylabel)
        if len(groups) > 1:
            axes.set_title(site, loc="left", fontsize=11, color=INK)
    grid[0].set_ylim(min(levels) / 1.6, 1.6 * max(levels))
    log_axis(grid[0], "y")
    finer_ticks(grid[0])
    grid[0].legend(loc="lower left", frameon=False, fontsize=9.5)
    return _save(figure, path)


def _usage_curves(axes: Axes, layers: Sequence[np.ndarray]) -> list[float]:
    """Draws median, range and a line at equal shares; returns the smallest and largest share drawn.

    layers: sizes, largest first. Empty clusters are not drawn.
    """
    most = max(map(len, layers))
    shares = np.array([np.pad(100 * layer / max(1.0, layer.sum()), (0, most - len(layer))) for layer in layers])
    ranks = np.arange(1, most + 1)
    if most > _MAX_POINTS:
        ranks = np.unique(np.geomspace(1, most, _MAX_POINTS).round().astype(int))
    levels = [100 / most, *shares[shares > 0]]
    low, middle, high = (np.quantile(shares[:, ranks - 1], level, axis=0) for level in (0, 0.5, 1))
    label = "clusters"
    if len(layers) > 1:
        label = "median layer"
        low[low == 0] = min(levels)
        look: dict[str, Any] = dict(color="#0072B2", alpha=0.2, linewidth=0)
        axes.fill_between(ranks, low, high, where=high > 0, label="all layers", **look)
    middle[middle == 0] = math.nan
    axes.plot(ranks, middle, color="#0072B2", linewidth=2, label=label)
    axes.axhline(100 / most, **_REFERENCE, label="all equal")
    if most > _MAX_LINEAR_RANKS:
        log_axis(axes, "x")
    return [min(levels), max(levels)]


def convergence_figure(results: dict, path: Path) -> bool:
    """The clustering over its epochs, and the losses of predictor and tuning over their steps."""
    stages = ("cluster", "predictor", "tune")
    cluster, predictor, tuning = ((results.get(stage) or {}).get("history") or [] for stage in stages)
    captured, changed = "captured by the centroids, %", "centroid bits that changed, %"
    if (results.get("conditions") or {}).get("centroid_size") == "free":
        captured, changed = "agreement with the centroids, %", "change of the centroids, %"
    panels = [
        (captured, cluster, "epoch", "captured", 100.0, "#009E73"),
        (changed, cluster, "epoch", "changed", 100.0, "#0072B2"),
        ("empty clusters", cluster, "epoch", "empty", 1.0, "#E69F00"),
        ("loss of the predictor", predictor, "step", "loss", 1.0, "#D55E00"),
        ("tuning: divergence, nats", tuning, "step", "divergence", 1.0, "#CC79A7"),
    ]
    never_empty = bool(cluster) and not any(to_float(row.get("empty")) > 0 for row in cluster)
    panels = [
        panel
        for panel in panels
        if any(math.isfinite(to_float(row.get(panel[3]))) for row in panel[1])
        and not (panel[3] == "empty" and never_empty)
    ]
    if not panels:
        return False
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    note = "No cluster was empty in any epoch." if never_empty else ""
    figure = _figure(results, "Training: clusters by epoch, losses by step", 0.2 + 2.5 * rows, note=note)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, history, x, y, scale, color) in zip(places, panels, strict=False):
        points, values = ([to_float(row.get(key)) for row in history] for key in (x, y))
        marker = "o" if len(points) <= _MAX_MARKERS else ""
        axes.plot(
            points, scale * np.array(values), color=color, marker=marker, markersize=4, linewidth=1.7, clip_on=False
        )
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        if y in ("empty", "changed"):
            axes.set_ylim(bottom=0)
        integer_ticks(axes)
        plain_axes(axes, xlabel=x)
    return _save(figure, path)


@dataclass(frozen=True)
class Label:
    """Words for the point (x, y)."""

    x: float
    y: float
    text: str
    color: str


def end_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Names lines at their right ends, moved apart where they would overlap."""
    from scipy.optimize import isotonic_regression

    if not labels:
        return
    _laid_out(axes)
    labels = sorted(labels, key=lambda label: label.y)
    to_points = 72 / DPI
    heights = to_points * axes.transData.transform([(label.x, label.y) for label in labels])[:, 1]
    steps = 12.5 * np.arange(len(labels))  # points between two lines of text
    moved = isotonic_regression(heights - steps).x + steps
    right = max(label.x for label in labels)
    for label, height, target in zip(labels, heights, moved, strict=True):
        at, look = (right, label.y), dict(color=label.color, fontsize=10, va="center")
        axes.annotate(label.text, at, (10, target - height), "data", "offset points", None, False, **look)


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Puts words beside their points so that they cover neither each other nor a point; far words get a line.

    A label without text is not drawn, but other labels must not cover its point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(_laid_out(axes)).get_renderer()
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    frame = axes.get_window_extent(renderer).padded(14)
    # Nearest places first: to the right, to the left, then ever higher and lower.
    heights = [0, *(sign * step for step in range(8, 120, 8) for sign in (1, -1))]
    offsets = [(side * (9 + abs(dy) / 6), dy) for dy in heights for side in (1, -1)]
    for label in sorted(labels, key=lambda label: (-label.x, label.y)):
        if not label.text:
            continue
        at = (label.x, label.y)
        words = axes.annotate(label.text, at, offsets[0], textcoords="offset points", fontsize=9, va="center")
        words.set(color=label.color, zorder=4, annotation_clip=False, path_effects=white_rim())
        words.set_in_layout(False)
        for dx, dy in offsets:
            words.set(position=(dx, dy), ha="left" if dx > 0 else "right")
            extent = words.get_window_extent(renderer)
            inside = frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and frame.y0 <= extent.y0 and extent.y1 <= frame.y1
            if inside and not any(extent.overlaps(other) for other in taken):
                break
        taken.append(words.get_window_extent(renderer))
        if abs(dy) > 8:
            line = dict(arrowstyle="-", color=label.color, linewidth=0.6, shrinkA=0, shrinkB=4)
            axes.annotate("", at, (dx, dy), textcoords="offset points", arrowprops=line)


def white_rim() -> list[AbstractPathEffect]:
    """Path effects that keep small words readable over curves."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.2, foreground="white")]


def _laid_out(axes: Axes) -> Figure:
    """The axes' figure, after its layout was computed."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def outlier_limit(values: Sequence[float]) -> float:
    """The value at which an axis is clipped: the second largest, if the largest is far above it; else infinity."""
    ordered = sorted(values)
    return ordered[-2] if len(ordered) > 2 and ordered[-1] > _OUTLIER * ordered[-2] else math.inf


def _figure(results: dict, title: str, height: float, note: str = "") -> Figure:
    """A figure `height` inches high under title, conditions and a note."""
    subtitle = list(filter(None, [*wrapped_items(condition_items(results), 116), note]))
    return new_figure(title, subtitle, WIDTH, height, alarm=is_in_sample(results))


def new_figure(title: str, subtitle: Sequence[str], width: float, height: float, alarm: bool = False) -> Figure:
    """A figure of `width` × `height` inches under a title and the lines of a subtitle, in red with `alarm`."""
    from matplotlib.figure import Figure  # without pyplot, which would keep the figure in global state

    heading = 0.52 + 0.165 * len(subtitle)
    total = height + heading
    figure = Figure(figsize=(width, total), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / total), w_pad=0.09, h_pad=0.09)
    figure.text(0.14 / width, 1 - 0.14 / total, title, fontsize=14, weight="bold", color=INK, va="top")
    color = ALARM if alarm else MUTED
    figure.text(0.14 / width, 1 - 0.44 / total, "\n".join(subtitle), fontsize=9, color=color, va="top", linespacing=1.3)
    return figure


def plain_axes(axes: Axes, xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """Labels, a light grid, and no frame at the top and right."""
    axes.set_xlabel(xlabel, fontsize=10, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=10, color=MUTED)
    axes.grid(True, axis=grid, color=_GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(labelsize=9.5, color="#B0B0B0", labelcolor=INK)


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:,g}")
    )
    axis.set_minor_formatter(NullFormatter())


def finer_ticks(axes: Axes, which: str = "y") -> None:
    """Marks a logarithmic axis of few powers of ten at 1, 2 and 5, or more finely where it spans less than one."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    axis, scale = (axes.xaxis, axes.get_xscale()) if which == "x" else (axes.yaxis, axes.get_yscale())
    if scale != "log":
        return
    low, high = axis.get_view_interval()
    if high / low < 8:
        axis.set_major_locator(FixedLocator(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)))
        axis.set_minor_locator(NullLocator())
    elif high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def integer_ticks(axes: Axes) -> None:
    """Whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path)
    return True
