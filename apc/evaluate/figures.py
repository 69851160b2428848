"""Draws a run's results (`results.json`) as figures. Every one of them carries the conditions it holds under.

Each function writes one PNG and returns True, or writes nothing and returns False where the results lack its data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apc.evaluate.tables import (
    DASH,
    is_in_sample,
    layered,
    percent,
    shown_perplexity,
    shown_ratio,
    to_float,
    wrapped_conditions,
)
from apc.sparse.policies import facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, _GRID, ALARM = "#1A1A1A", "#595959", "#E3E3E3", "#B2182B"
DPI = 160
_LOG_FROM = 5.0  # an axis is logarithmic once its largest value is so many times the least
_MAX_SITES = 4  # more groups of clusters than this share one panel
_MAX_MARKERS = 40  # with more points than this, a line is drawn without them
_MAX_LINEAR_RANKS = 256  # with more clusters than this, their rank is on a log scale
_MAX_POINTS = 400  # drawn per usage curve: a codebook has up to 16,384 clusters


def style(policy: str) -> tuple[str, str]:
    """A policy's colour (from Okabe and Ito's palette, told apart with any colour vision) and marker, in every figure."""
    return facts(policy).color, facts(policy).marker


def save_figures(results: dict, folder: Path) -> dict[str, Path]:
    """Draws every figure that the results hold data for; returns name → PNG."""
    draw = {
        "perplexity": perplexity_figure,
        "speed": speed_figure,
        "captured_importance": captured_figure,
        "union_density": union_figure,
        "cluster_usage": usage_figure,
        "convergence": convergence_figure,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in draw}
    return {name: paths[name] for name, figure in draw.items() if figure(results, paths[name])}


def perplexity_figure(results: dict, path: Path) -> bool:
    """Perplexity per policy as bars, in the table's order, dense as a line; the whisker is the 95 % interval against dense."""
    policies = results.get("policies") or []
    values = np.array([to_float(policy.get("perplexity")) for policy in policies])
    if not np.isfinite(values).any():
        return False
    figure = _figure(results, "Perplexity per policy", 8.6, 0.9 + 0.42 * len(policies))
    axes = figure.subplots()
    finite = values[np.isfinite(values)]
    logarithmic = finite.max() / finite.min() > _LOG_FROM
    left = finite.min() / 1.6 if logarithmic else 0.0
    ends = []
    for y, (policy, value) in enumerate(zip(policies, values, strict=True)):
        end = _perplexity_bar(axes, y, policy, value, left)
        ends.append(end)
    if logarithmic:
        log_axis(axes, "x")
        axes.set_xlim(left, max(ends) * (max(ends) / left) ** 0.42)
    else:
        axes.set_xlim(0, 1.38 * max(ends))
    dense = next(
        (value for policy, value in zip(policies, values, strict=True) if policy["policy"] == "dense"), math.nan
    )
    if math.isfinite(dense):
        axes.axvline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2.5)
    axes.set_yticks(range(len(policies)), [policy["policy"] for policy in policies])
    axes.set_ylim(len(policies) - 0.4, -0.6)
    plain_axes(axes, xlabel="perplexity" + (" (log scale)" if logarithmic else "") + "; dashed: dense", grid="x")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    return _save(figure, path)


def speed_figure(results: dict, path: Path) -> bool:
    """Perplexity after a dense prefill against tokens a second, a point for each policy; hollow: sparse throughout."""
    policies = (results.get("speed") or {}).get("policies") or []
    if not policies:
        return False
    figure = _figure(results, "Perplexity against decoding speed", 8.6, 4.4)
    axes = figure.subplots()
    for policy in policies:
        color, marker = style(policy["policy"])
        rate = 1 / policy["seconds_per_token"]
        axes.plot(rate, policy["perplexity"], color=color, marker=marker, markersize=8, linestyle="none")
        if policy["policy"] != "dense":
            axes.plot(
                rate,
                policy["perplexity_masked"],
                color=color,
                marker=marker,
                markersize=8,
                markerfacecolor="white",
                linestyle="none",
            )
        axes.annotate(
            policy["policy"], (rate, policy["perplexity"]), (8, 0), textcoords="offset points", color=color, va="center"
        )
    values = [policy[key] for policy in policies for key in ("perplexity", "perplexity_masked")]
    if max(values) / min(values) > _LOG_FROM:
        log_axis(axes, "y")
    axes.margins(0.18)
    axes.set_xlim(0, 1.15 / min(policy["seconds_per_token"] for policy in policies))
    plain_axes(axes, xlabel="tokens a second, one sequence", ylabel="perplexity; hollow: prefill sparse too")
    return _save(figure, path)


def captured_figure(results: dict, path: Path) -> bool:
    """Captured importance per layer, one line per policy but dense."""
    policies = layered(results, "captured_importance")
    if not policies:
        return False
    figure = _figure(results, "Importance captured per layer", 8.6, 4.4)
    axes = figure.subplots()
    lowest = 100.0
    for policy in policies:
        shares = 100 * np.array([to_float(value) for value in policy["per_layer"]["captured_importance"]])
        color, marker = style(policy["policy"])
        density = "" if policy.get("density") is None else f" ({percent(policy['density'])} %)"
        axes.plot(
            shares,
            color=color,
            marker=marker if len(shares) <= _MAX_MARKERS else None,
            markersize=5,
            linewidth=1.7,
            label=policy["policy"] + density,
            clip_on=False,
        )
        lowest = float(np.nanmin([lowest, *shares]))
    axes.set_ylim(min(90.0, 10 * math.floor(lowest / 10)), 100)
    _integer_ticks(axes)
    plain_axes(axes, xlabel="layer", ylabel="captured importance, %")
    legend = figure.legend(
        loc="outside right center", frameon=False, fontsize=9.5, title="policy (density)", title_fontsize=9.5
    )
    legend.get_title().set_color(MUTED)
    legend.set_alignment("left")
    return _save(figure, path)


def union_figure(results: dict, path: Path) -> bool:
    """How much of an FFN a batch of tokens keeps, one line per policy whose masks differ by token; dashed: were the tokens' masks independent."""
    policies = [
        policy
        for policy in results.get("policies") or []
        if policy["policy"] != "dense"
        and not policy.get("missing")
        and any((policy.get("union_density") or {}).values())
    ]
    if not policies:
        return False
    figure = _figure(results, "Neurons kept by a batch of tokens together", 8.6, 4.4)
    axes = figure.subplots()
    sizes = np.array([1, *map(int, policies[0]["union_density"])])
    for policy in policies:
        shares = 100 * np.array(
            [to_float(value) for value in (policy.get("density"), *policy["union_density"].values())]
        )
        color, marker = style(policy["policy"])
        axes.plot(
            sizes,
            shares,
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.7,
            label=policy["policy"],
            clip_on=False,
        )
    density = to_float((results.get("conditions") or {}).get("density"))
    axes.plot(
        sizes,
        100 * (1 - (1 - density) ** sizes),
        color=INK,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label="independent masks",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(top=100)
    plain_axes(
        axes,
        xlabel="tokens in a batch, drawn at random from the windows that ran together",
        ylabel="neurons that some token keeps, %",
    )
    legend = figure.legend(loc="outside right center", frameon=False, fontsize=9.5)
    legend.set_alignment("left")
    return _save(figure, path)


def usage_figure(results: dict, path: Path) -> bool:
    """How evenly the clusters are used: each layer's clusters by size, and the share of them that is empty."""
    sizes = (results.get("cluster") or {}).get("sizes") or {}
    groups = {
        site: [np.asarray(layer, dtype=float) for layer in layers if len(layer)] for site, layers in sizes.items()
    }
    groups = {site: layers for site, layers in groups.items() if layers}
    if not groups:
        return False
    if len(groups) > _MAX_SITES:
        groups = {"group": [layer for layers in groups.values() for layer in layers]}
    figure = _figure(results, "Use of the clusters", 9.2, 0.6 + 3.3 * len(groups))
    grid = figure.subplots(len(groups), 2, squeeze=False, width_ratios=[1.7, 1])
    for (site, layers), (left, right) in zip(groups.items(), grid, strict=True):
        pooled = (results.get("conditions") or {}).get("scope") == "pooled"
        unit = "group" if site == "group" else "codebook" if pooled else "layer"
        _usage_curves(figure, left, layers, unit)
        _empty_bars(right, layers, unit)
        if len(groups) > 1:
            left.set_title(site, loc="left", fontsize=11, color=INK)
    return _save(figure, path)


def convergence_figure(results: dict, path: Path) -> bool:
    """Captured share, centroid bits that changed and empty clusters over epochs, and the predictor's loss over steps."""
    cluster = (results.get("cluster") or {}).get("history") or []
    predictor = (results.get("predictor") or {}).get("history") or []
    tuning = (results.get("tune") or {}).get("history") or []
    free = (results.get("conditions") or {}).get("centroid_size") == "free"
    wanted = [
        (
            "agreement with the centroids, %" if free else "captured by the centroids, %",
            cluster,
            "epoch",
            "captured",
            100.0,
            "#009E73",
        ),
        (
            "centroids' change, %" if free else "centroid bits that changed, %",
            cluster,
            "epoch",
            "changed",
            100.0,
            "#0072B2",
        ),
        ("empty clusters", cluster, "epoch", "empty", 1.0, "#E69F00"),
        ("predictor's loss", predictor, "step", "loss", 1.0, "#D55E00"),
        ("tuning: divergence from dense, nats", tuning, "step", "divergence", 1.0, "#CC79A7"),
    ]
    panels = [panel for panel in wanted if any(math.isfinite(to_float(row.get(panel[3]))) for row in panel[1])]
    if not panels:
        return False
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(results, "Convergence", max(6.4, 4.3 * columns), 0.3 + 2.7 * rows)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, history, x, y, scale, color) in zip(places, panels, strict=False):
        points = [to_float(row.get(x)) for row in history]
        marker = "o" if len(points) <= _MAX_MARKERS else None
        axes.plot(
            points,
            [scale * to_float(row.get(y)) for row in history],
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.7,
            clip_on=False,
        )
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        if y in ("empty", "changed"):
            axes.set_ylim(bottom=0)
        if y == "empty":
            axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
            axes.yaxis.get_major_locator().set_params(integer=True)
        _integer_ticks(axes)
        plain_axes(axes, xlabel=x)
    return _save(figure, path)


def _perplexity_bar(axes: Axes, y: int, policy: dict, value: float, left: float) -> float:
    """Draws one policy's bar with its whisker and label; returns where the bar and whisker end on the x axis."""
    if not math.isfinite(value):
        reason = policy.get("missing") or ("not finite" if policy.get("perplexity") is not None else "not measured")
        _bar_label(axes, left, y, f"{DASH} {reason}", color=MUTED, style="italic")
        return max(left, 1e-9)
    color, _ = style(policy["policy"])
    axes.barh(y, value - left, left=left, height=0.62, color=color, zorder=2)
    end, label = value, shown_perplexity(value)
    ratio, low, high = (to_float(policy.get(key)) for key in ("ratio", "ratio_low", "ratio_high"))
    if math.isfinite(ratio) and policy["policy"] != "dense":
        label += f"   ×{shown_ratio(policy)}"
    if math.isfinite(low + high + ratio) and high > low:
        end = max(end, value * high / ratio)
        axes.plot(
            [value * low / ratio, end],
            [y, y],
            color=INK,
            linewidth=1.2,
            zorder=3,
            solid_capstyle="butt",
            marker="|",
            markersize=6,
        )
    _bar_label(axes, end, y, label, color=INK)
    return end


def _bar_label(axes: Axes, x: float, y: float, text: str, **look: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}  # hides the grid and the line of dense behind it
    axes.annotate(
        text, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=9.5, bbox=box, zorder=4, **look
    )


def _usage_curves(figure: Figure, axes: Axes, layers: Sequence[np.ndarray], unit: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # Not to viridis's end: its yellow is too faint on white.
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    most = max(len(layer) for layer in layers)
    for layer, shade in zip(layers, shades, strict=True):
        used = np.sort(layer[layer > 0])[::-1]
        ranks = np.arange(len(used)) + 1
        if len(used) > _MAX_POINTS:
            ranks = np.unique(np.geomspace(1, len(used), _MAX_POINTS).round().astype(int))
        axes.plot(ranks, 100 * used[ranks - 1] / max(1.0, used.sum()), color=shade, linewidth=1.2, alpha=0.9)
    axes.axhline(100 / most, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    log_axis(axes, "y")
    if most > _MAX_LINEAR_RANKS:
        log_axis(axes, "x")
    plain_axes(axes, xlabel="cluster, by size; dashed: all equal", ylabel="share of rows, %")
    if len(layers) > 1:
        bar = figure.colorbar(
            ScalarMappable(Normalize(-0.5, len(layers) - 0.5), ListedColormap(shades)), ax=axes, pad=0.02, aspect=28
        )
        bar.set_label(unit, fontsize=9.5, color=MUTED)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        bar.ax.tick_params(labelsize=9, length=0, colors=MUTED)
        bar.outline.set_visible(False)


def _empty_bars(axes: Axes, layers: Sequence[np.ndarray], unit: str) -> None:
    shares = [100 * float(np.mean(layer == 0)) for layer in layers]
    axes.bar(range(len(layers)), shares, color="#E69F00", width=0.8, zorder=2)
    axes.set_ylim(0, max(1.0, 1.15 * max(shares)))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    if not any(shares):
        axes.text(
            0.5,
            0.5,
            "no cluster is empty",
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=9.5,
            color=MUTED,
        )
    _integer_ticks(axes)
    plain_axes(axes, xlabel=unit, ylabel="empty clusters, %")


def _figure(results: dict, title: str, width: float, height: float) -> Figure:
    """A figure of `width` × `height` inches under a heading of title and conditions."""
    return new_figure(title, wrapped_conditions(results, int(14.2 * width)), width, height, alarm=is_in_sample(results))


def new_figure(title: str, subtitle: Sequence[str], width: float, height: float, alarm: bool = False) -> Figure:
    """A figure of `width` × `height` inches under a title and the lines of a subtitle, in red with `alarm`. No pyplot, so nothing global is touched."""
    from matplotlib.figure import Figure

    heading = 0.52 + 0.165 * len(subtitle)
    total = height + heading
    figure = Figure(figsize=(width, total), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total), w_pad=0.09, h_pad=0.09)
    figure.text(0.14 / width, 1 - 0.14 / total, title, fontsize=14, weight="bold", color=INK, va="top")
    color = ALARM if alarm else MUTED
    figure.text(0.14 / width, 1 - 0.44 / total, "\n".join(subtitle), fontsize=9, color=color, va="top", linespacing=1.3)
    return figure


def plain_axes(axes: Axes, xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    axes.set_xlabel(xlabel, fontsize=10, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=10, color=MUTED)
    axes.grid(True, axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(labelsize=9.5, color="#B0B0B0", labelcolor=INK)


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at its powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:,g}")
    )
    axis.set_minor_formatter(NullFormatter())


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path)
    return True
