"""Interactive charts of results, by Bokeh. Colours and markers are those of the figures.

Their background is transparent and their ink is grey, so that they suit a light page and a dark one.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, Model, Range1d, TabPanel, Tabs
from bokeh.plotting import figure

from apc.evaluate.tables import layered, masked_density, percent, shown_perplexity, shown_ratio, to_float
from apc.sparse.policies import facts

_INK, _LINE = "#808690", "#80869055"
_MARKERS = {  # matplotlib's names → Bokeh's; others are circles
    "o": "circle", "s": "square", "D": "diamond", "d": "diamond", "^": "triangle", "v": "inverted_triangle",
    "<": "triangle", ">": "triangle", "*": "star", "P": "plus", "X": "x", "x": "x", "p": "hex", "h": "hex", "8": "hex",
}  # fmt: skip
_DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
_MEASURES = ("density", "captured_importance", "coverage", "precision")


def _plot(x: str, y: str, logarithmic: bool = False, height: int = 420) -> figure:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_axis_label=x,
        y_axis_label=y,
        y_axis_type="log" if logarithmic else "linear",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_scroll=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=_LINE,
    )
    plot.toolbar.logo = None
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = _INK
    for grid in (*plot.xgrid, *plot.ygrid):
        grid.grid_line_color = _LINE
    return plot


def _legend_below(plot: figure) -> None:
    plot.add_layout(plot.legend[0], "below")
    legend = plot.legend[0]
    legend.orientation, legend.click_policy, legend.ncols = "horizontal", "hide", 4
    legend.label_text_color, legend.background_fill_alpha, legend.border_line_alpha = _INK, 0, 0


def _hover(shown: Sequence[tuple[str, str]], records: Sequence[tuple[str, dict]], **options: Any) -> HoverTool:
    """A tooltip with these fields, without the run if no run has a name."""
    named = any(run for run, _ in records)
    return HoverTool(tooltips=[pair for pair in shown if pair[0] != "run" or named], **options)


def bytes_chart(records: Sequence[tuple[str, dict]]) -> Model | None:
    """Perplexity over the bytes that policies read, one point for each (run, record); None without such records."""
    by_policy = defaultdict(list)
    for run, record in records:
        perplexity, share = to_float(record.get("perplexity")), to_float(record.get("bytes_share"))
        if math.isfinite(perplexity) and math.isfinite(share):
            by_policy[record["policy"]].append((run, record))
    values = [record["perplexity"] for points in by_policy.values() for _, record in points]
    if not values:
        return None
    limit = min(max(values), 4 * statistics.median(values))  # a few outliers lie above the axis
    plot = _plot("FFN bytes read per token, % of the dense FFN at 16 bits", "perplexity", limit > 3 * min(values))
    plot.y_range = Range1d(0.97 * min(values), 1.03 * limit)
    shown = [("policy", "@policy"), ("run", "@run"), ("perplexity", "@perplexity"), ("against dense", "@ratio")]
    shown += [("bytes", "@bytes %"), ("density", "@density %")]
    plot.add_tools(_hover(shown, records))
    for name, points in by_policy.items():
        of = [record for _, record in points]
        source = ColumnDataSource(
            {
                "x": [100 * record["bytes_share"] for record in of],
                "y": [record["perplexity"] for record in of],
                "policy": [name] * len(of),
                "run": [run for run, _ in points],
                "perplexity": [shown_perplexity(record["perplexity"]) for record in of],
                "ratio": [shown_ratio(record) for record in of],
                "bytes": [percent(record["bytes_share"]) for record in of],
                "density": [percent(masked_density(record) or record.get("density")) for record in of],
            }
        )
        policy, hollow = facts(name), any(record.get("excludes_finding") for record in of)
        plot.scatter(
            "x", "y", source=source, legend_label=name, size=11, color=policy.color, line_width=2,
            fill_alpha=0.0 if hollow else 0.9, marker=_MARKERS.get(policy.marker, "circle"),
        )  # fmt: skip
    _legend_below(plot)
    return plot


def layer_charts(records: Sequence[tuple[str, dict]]) -> Model | None:
    """A line over the layers for each (run, record), a tab for each measure; None without figures for layers.

    Lines of one policy have one colour, lines of one run the same dashes.
    """
    dashes = dict(zip(dict.fromkeys(run for run, _ in records), itertools.cycle(_DASHES)))
    panels = []
    for measure in _MEASURES:
        by_policy = defaultdict(list)
        for run, record in records:
            if layered([record], measure):
                values = [100 * to_float(value) for value in record["per_layer"][measure]]
                by_policy[record["policy"]].append((run, [*range(len(values))], values))
        if not by_policy:
            continue
        plot = _plot("layer", f"{measure.replace('_', ' ')}, %", height=340)
        dots = []
        for name, lines in by_policy.items():
            runs, layers, shares = zip(*lines, strict=True)
            look = dict(legend_label=name, color=facts(name).color)
            drawn = {"x": layers, "y": shares, "dash": [dashes[run] for run in runs]}
            plot.multi_line("x", "y", line_dash="dash", line_width=2, source=ColumnDataSource(drawn), **look)
            points = [(name, run, *point) for run, *line in lines for point in zip(*line, strict=True)]
            source = ColumnDataSource(dict(zip(("policy", "run", "x", "y"), zip(*points, strict=True), strict=True)))
            dots.append(plot.scatter("x", "y", size=5, source=source, **look))
        shown = [("policy", "@policy"), ("run", "@run"), ("layer", "@x"), ("%", "@y{0.0}")]
        plot.add_tools(_hover(shown, records, renderers=dots))
        _legend_below(plot)
        panels.append(TabPanel(child=plot, title=measure.replace("_", " ")))
    return Tabs(tabs=panels, sizing_mode="stretch_width") if panels else None
