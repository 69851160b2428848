"""Sets finished runs side by side: one table of all their arms, and figures over the number of clusters and over bits.

Reads their results.json and config.yaml; no model is loaded. Runs that differ in model, text, split or windows share neither a line nor a panel. The paper's
own figures (Dhar et al., Euro-Par 2025) stand beside ours as a reference only: they are Mistral-7B's, scored on the text that was fitted on.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from apc import report
from apc.config import CONFIGS, Config, load_config, overrides_between
from apc.errors import UserError
from apc.files import write_atomic
from apc.runs import RunFolder, read_json
from apc.tuning import TuneConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER_CLUSTERS = ("oracle", "thresholded-oracle", "predicted", "soft")  # arms whose masks come from clusters
BY_CLUSTER = ("oracle", "predicted")  # of these the ones whose mask is a cluster's, chosen by log₂ K bits a site
BITS = "bits of a mask's choice, per token and layer (log₂ K for each site)"
PAPER_CLUSTERS = (256, 16384)  # that the paper tried
PAPER_COVERAGE = 0.7934  # its best "clustering precision", at a number of clusters and a density that it does not give with it
PAPER_PERPLEXITIES = {"nearest centroids": 12.49, "exact": 6.45, "dense": 5.3}  # its best; dense is rounded there
REFERENCE = "grey: the paper's figures, Mistral-7B in-sample; a reference only, not comparable"
SLIDES = (
    "predictions: how many times fewer things are predicted than by neuron, as the paper's slides count them, N·L·T·C over K·L·T·C, with N the FFN's "
    "parameters and K the clusters of all sites. It counts predictions, neither bytes nor FLOPs: those stand beside it."
)
GAPS = "gap: at oracle, ln of its perplexity over exact's (what the codebook costs); at predicted, over oracle's (what predicting the cluster costs)."
STARRED = "* without the cost of finding the mask: this arm reads it from the token's own activations."
_DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1, 1, 1, 1, 1))  # of lines, one for each variant of a codebook
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one for each density
_COLUMNS = 3  # panels in a row of a figure
_LEGEND_INCHES = 2.5
_ELSEWHERE = ("run", "tracking", "collect.dir")  # of a configuration: names and folders, which change no figure


def things_predicted(neurons: float, clusters: float, layers: float = 1, tokens: float = 1, cost: float = 1) -> tuple[float, float]:
    """(C_direct, C_clustered) of the cost model on the slides of Dhar et al.'s talk (Euro-Par 2025).

    C_direct = N · L · T · C for predicting each of N neurons, C_clustered = K · L · T · C for predicting over K clusters, with L layers, T tokens and C the
    cost of one prediction. The slides take N ≈ ⅔ · 7e9 = 4.67e9, which is the number of FFN *parameters* of a 7 B model, and K = 3 · 2,048 = 6,144: a ratio
    of 7.6e5. It counts things predicted. What an arm reads and computes is in `metrics.arm_cost`.
    """
    return neurons * layers * tokens * cost, clusters * layers * tokens * cost


@dataclass(frozen=True)
class Finished:
    """A run (or an evaluation of one) that has its results."""

    name: str
    folder: Path
    results: dict
    config: Config

    @cached_property
    def conditions(self) -> dict:
        return self.results["conditions"]

    @property
    def in_sample(self) -> bool:
        return report.is_in_sample(self.results)

    @cached_property
    def arms(self) -> dict[str, dict]:
        """Its arms that ran, by name."""
        return {record["arm"]: record for record in self.results["arms"] if not record.get("missing")}

    @cached_property
    def place(self) -> tuple:
        """What runs must have in common to be compared: model, texts, split, windows."""
        keys = ("model", "fit", "score", "split", "seq_len", "fit_tokens", "score_tokens", "dtype")
        return tuple(self.conditions.get(key) for key in keys)

    @cached_property
    def settings(self) -> dict[str, object]:
        """What else decides its figures, but for the number of clusters, the density and the seed."""
        cfg, conditions = self.config, self.conditions
        cluster = {key: value for key, value in asdict(cfg.cluster).items() if key not in ("k", "density")}
        named = {key: conditions.get(key) for key in ("sites", "sparsity", "active", "forward")}
        return cluster | named | {"calibration_windows": cfg.collect.calibration_windows, "tuned": self._tuning}

    @property
    def _tuning(self) -> str | None:
        """What it was tuned for, with the settings that are not the usual ones; None where it was not."""
        usual = TuneConfig()
        own = [
            f"{key} {value}" for key, value in asdict(self.config.tune).items() if key not in ("arm", "max_epochs", "windows") and value != getattr(usual, key)
        ]
        return self.conditions.get("tuned") and ", ".join([self.conditions["tuned"], *own])

    @cached_property
    def predictor_settings(self) -> dict[str, object]:
        return {f"predictor {key}": value for key, value in asdict(self.config.predictor).items()}

    def fewer_predictions(self, arm: str) -> float | None:
        """How many times fewer things the arm predicts than a predictor of neurons, by `things_predicted`; None for arms without clusters."""
        shape = [self.conditions.get(key) for key in ("layers", "hidden_size", "ffn_width")]
        if arm not in OVER_CLUSTERS or None in shape:
            return None
        layers, hidden_size, width = shape
        direct, clustered = things_predicted(3 * hidden_size * width * layers, self.conditions["k"] * len(self.conditions["sites"]))
        return direct / clustered

    def gap(self, arm: str, before: str) -> float | None:
        """ln of the perplexity of one arm over another's; None where one of them did not run."""
        values = [(self.arms.get(name) or {}).get("perplexity") for name in (arm, before)]
        return None if any(not value or not math.isfinite(value) for value in values) else math.log(values[0] / values[1])

    def own_gap(self, arm: str) -> float | None:
        """The oracle gap at `oracle`, the predictor gap at `predicted`."""
        return self.gap(arm, {"oracle": "exact", "predicted": "oracle"}[arm]) if arm in ("oracle", "predicted") else None


# ---- finding runs


def find_runs(words: str) -> tuple[list[Finished], list[str]]:
    """The runs that `compare=` names, held-out ones first, and a line for each that was left out.

    words: folders and glob patterns, one or a list in brackets. What a pattern matches beside run folders is passed over; a run that is not finished is
    left out with a line. Raises UserError for a pattern without a match, a named folder without results, damaged results, and if no run is left.
    """
    listed = words[1:-1] if words.startswith("[") and words.endswith("]") else words
    found: dict[Path, Finished] = {}
    left_out = []
    for word in filter(None, map(str.strip, listed.split(","))):
        pattern = os.path.expanduser(word)
        is_pattern = glob.has_magic(pattern)
        folders = sorted(Path(path) for path in glob.glob(pattern)) if is_pattern else [Path(pattern)]
        if not folders:
            raise UserError(f"compare={word}: matches nothing; name run folders that train.py left, e.g. compare='runs/*'")
        for folder in folders:
            run = RunFolder(folder)
            if run.results.is_file() and run.config.is_file():
                found.setdefault(folder.resolve(), read_finished(folder))
            elif not is_pattern:
                raise UserError(
                    f"{folder}: {'not finished (no results.json); run it to its end' if run.config.is_file() else 'not a run folder (no config.yaml)'}"
                )
            elif run.config.is_file():
                left_out.append(f"{folder}: left out, not finished (no results.json)")
    if not found:
        raise UserError(f"compare={words}: names no finished run" + (f"; {len(left_out)} are not finished" if left_out else ""))
    return ordered(found.values()), left_out


def read_finished(folder: Path) -> Finished:
    """A run's results and configuration. Raises UserError, naming the file, if they are missing or damaged."""
    run = RunFolder(folder)
    results = read_json(run.results)
    arms, conditions = (results.get(key) if isinstance(results, dict) else None for key in ("arms", "conditions"))
    whole = isinstance(conditions, dict) and isinstance(arms, list) and all(isinstance(arm, dict) and "arm" in arm for arm in arms)
    if not whole or not {"model", "split", "k", "density", "sites"} <= conditions.keys():
        raise UserError(f"{run.results}: damaged (not the results of a run); delete it and run again")
    of_a_run = folder.resolve().parent.name == "evaluations"
    name = f"{folder.resolve().parent.parent.name}/{folder.name}" if of_a_run else folder.name
    return Finished(name, folder, results, load_config(run.config))


def ordered(runs: Iterable[Finished]) -> list[Finished]:
    """Held-out runs first; then by what they can be compared on, by algorithm, density and clusters."""

    def key(run: Finished) -> tuple:
        return run.in_sample, tuple(map(str, run.place)), str(run.settings), run.conditions["density"], run.conditions["k"], run.name

    return sorted(runs, key=key)


def variants(runs: Sequence[Finished], own: Callable[[Finished], dict] = lambda run: run.settings) -> dict[str, str]:
    """For each run (by folder) a short name of its algorithm and of whatever else differs among the runs."""
    every = [own(run) for run in runs]
    differing = [key for key in dict.fromkeys(key for each in every for key in each) if len({str(each.get(key)) for each in every}) > 1]

    def shown(key: str, value: object) -> str:
        value = "+".join(map(str, value)) if isinstance(value, list) else value
        if key == "tuned":
            return f"tuned for {value}" if value else "not tuned"
        return str(value) if key in ("algorithm", "weighting", "scope", "sites") else f"{key.replace('_', ' ')} {value if value is not None else 'dense'}"

    return {
        str(run.folder): ", ".join(shown(key, each.get(key)) for key in dict.fromkeys(["algorithm", *differing]) if key in each)
        for run, each in zip(runs, every, strict=True)
    }


# ---- the command that makes a run again


def command(run: Finished) -> str:
    """A command line that makes the run (or evaluation) again, from the experiment that it differs least from."""
    cfg = run.config
    again = f"run.name={run.folder.name}-again"
    if run.folder.resolve().parent.name == "evaluations":
        base = load_config(run.folder.parent.parent / "config.yaml", ["stage=all"])
        words = [f"checkpoint={run.folder.parent.parent}", *overrides_between(base, cfg, (*_ELSEWHERE, "checkpoint")), again]
        return shlex.join(["python", "evaluate.py", *words])
    found = [[*chosen, *overrides_between(base, cfg, _ELSEWHERE)] for chosen, base in _experiments()]
    return shlex.join(["python", "train.py", *min(found, key=len), again])


@cache
def _experiments() -> list[tuple[list[str], Config]]:
    """The words that choose each experiment, and its configuration; demo is what is taken without one."""
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    chosen = [[] if name == "demo" else [f"experiment={name}"] for name in names]
    return [(words, load_config(None, words)) for words in chosen]


# ---- the table


_TABLE: tuple[tuple[str, str, Callable[[Finished, dict], str]], ...] = (
    ("", "K", lambda run, arm: f"{run.conditions['k']:,}"),
    ("", "arm", lambda run, arm: arm["arm"]),
    ("density", "%", lambda run, arm: report.percent(arm.get("density"))),
    ("coverage", "%", lambda run, arm: report.percent(arm.get("coverage"))),
    ("precision", "%", lambda run, arm: report.percent(arm.get("precision"))),
    ("captured", "importance %", lambda run, arm: report.percent(arm.get("captured_importance"))),
    ("", "perplexity", lambda run, arm: report.shown_perplexity(arm.get("perplexity"))),
    ("vs dense", "× (95 %)", lambda run, arm: report.shown_ratio(arm)),
    ("choice", "bits", lambda run, arm: report.fixed(arm.get("bits"), 1)),
    ("gap", "nats", lambda run, arm: report.fixed(run.own_gap(arm["arm"]), 3)),
    ("bytes", "% of dense", lambda run, arm: report.percent(arm.get("bytes_share")) + report.star(arm)),
    ("FLOPs", "% of dense", lambda run, arm: report.percent(arm.get("flops_share")) + report.star(arm)),
    ("predictions", "÷, slides", lambda run, arm: _times(run.fewer_predictions(arm["arm"]))),
)
FIGURES = ("density", "coverage", "precision", "captured_importance", "captured_energy", "perplexity", "ratio", "ratio_low", "ratio_high", "bits")
SHARES = ("bytes_share", "flops_share")
CONDITIONS = ("model", "fit", "score", "fit_tokens", "score_tokens", "seq_len", "sparsity", "active", "sites", "k", "density", "weighting", "scope", "forward")


def _times(ratio: float | None) -> str:
    return report.DASH if ratio is None else f"{ratio:.1e}".replace("e+0", "e")


def table(runs: Sequence[Finished], markdown: bool = False) -> str:
    """Every arm of every run under the conditions that it holds for, held-out before in-sample; then the command for each run."""
    parts = []
    names = variants(runs)
    for _, group in itertools.groupby(runs, key=lambda run: run.place):
        members = list(group)
        densities = {str(run.folder): f"{names[str(run.folder)]}, density {run.conditions['density']:g}" for run in members}
        rows = [[run.name, densities[str(run.folder)], *(cell(run, arm) for *_, cell in _TABLE)] for run in members for arm in run.arms.values()]
        heading = place_text(members[0])
        grid = report.text_grid([("", "run"), ("", "codebook"), *(column[:2] for column in _TABLE)], rows, markdown)
        parts += [f"**{heading}**" if markdown else heading, grid]
    notes = [STARRED, GAPS, SLIDES]
    notes += ["IN-SAMPLE: scored on the text it was fitted on; not what other text will give."] if any(run.in_sample for run in runs) else []
    commands = [f"{run.name}: {command(run)}" for run in runs]
    if markdown:
        notes = [note.replace("*", "\\*", 1) if note.startswith("*") else note for note in notes]
        return "\n\n".join([*parts, *notes, "To run one again:", "\n".join(f"    {line}" for line in commands)]) + "\n"
    return (
        "\n\n".join([*parts, "\n".join(report.wrapped(note, 160) for note in notes), "\n".join(["to run one again:", *(f"  {line}" for line in commands)])])
        + "\n"
    )


def table_csv(runs: Sequence[Finished]) -> str:
    """CSV of the same: a row for each arm of each run, with its conditions and command. Shares are fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["split", "run", "arm", *FIGURES, "oracle_gap", "predictor_gap", *SHARES, "excludes_finding", "fewer_predictions_slides",
                     "codebook", *CONDITIONS, "command"])  # fmt: skip
    names = variants(runs)
    for run in runs:
        split = "IN-SAMPLE" if run.in_sample else run.conditions["split"]
        shown = ["+".join(value) if isinstance(value, list) else value for value in (run.conditions.get(key) for key in CONDITIONS)]
        for name, arm in run.arms.items():
            gaps = (run.own_gap(name) if name == kind else None for kind in ("oracle", "predicted"))
            writer.writerow([split, run.name, name, *(arm.get(key) for key in FIGURES), *gaps, *(arm.get(key) for key in SHARES), arm.get("excludes_finding"),
                             run.fewer_predictions(name), names[str(run.folder)], *shown, command(run)])  # fmt: skip
    return out.getvalue()


def place_text(run: Finished, lines: bool = False) -> str:
    """Model, texts and split that runs can be compared on: in one line, or each in its own."""
    model, fit, score, split, seq_len, fit_tokens, score_tokens, dtype = run.place
    fit, score = (f"{text} ({_count(tokens)} tokens)" for text, tokens in ((fit, fit_tokens), (score, score_tokens)))
    parts = [f"{'IN-SAMPLE · ' if run.in_sample else ''}{model} ({dtype})", f"fit {fit}", f"score {score}", f"{split}, windows of {_count(seq_len)}"]
    return "\n".join(report.wrapped(part, 70) for part in parts) if lines else " · ".join(parts)


def _count(number: int | None) -> str:
    return report.DASH if number is None else f"{number:,}"


# ---- figures


@dataclass(frozen=True)
class Line:
    """Points that may be joined: one arm (or gap) of runs that differ in the number of clusters alone. points: (x, y), by x; equal x are repeats."""

    arm: str
    variant: str
    density: float
    points: list[tuple[float, float]]

    def middle(self) -> list[tuple[float, float]]:
        """Where the line goes: the mean of what was measured at each x."""
        groups = itertools.groupby(self.points, key=lambda point: point[0])
        return [(x, sum(y for _, y in found) / len(found)) for x, found in ((x, list(group)) for x, group in groups)]


Value = Callable[[Finished, dict], float | None]


def lines(runs: Sequence[Finished], arms: Sequence[str], x: Value, y: Value) -> list[Line]:
    """One line for each arm, variant of the codebook (and of the predictor, for arms that read it) and density. Runs of different places never share one."""
    names = variants(runs)
    trained = variants(runs, lambda run: run.settings | run.predictor_settings)
    found: dict[tuple, list[tuple[float, float]]] = {}
    for run in runs:
        for arm in arms:
            record = run.arms.get(arm)
            at, value = (None, None) if record is None else (x(run, record), y(run, record))
            if at and value is not None and math.isfinite(value):
                variant = (trained if arm in ("predicted", "soft", "neuron-predictor") else names)[str(run.folder)]
                found.setdefault((run.place, arm, variant, run.conditions["density"]), []).append((at, value))
    return [Line(arm, variant, density, sorted(points)) for (_, arm, variant, density), points in found.items()]


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
    upper = lambda run, arm: 100 * arm["coverage"] if arm.get("coverage") is not None else None
    lower = lambda run, arm: 100 * arm["density"] if arm.get("density") is not None else None

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        _paper_line(axes, 100 * PAPER_COVERAGE, f"paper's best: {100 * PAPER_COVERAGE:.2f}", above=True)

    rows = [("coverage, %", upper, False, reference), ("density, %", lower, False, None)]
    notes = ["share of the active neurons that a mask keeps: the paper's “clustering precision”", "a random mask covers as much as its density", REFERENCE]
    return _draw(runs, path, "Coverage over clusters", OVER_CLUSTERS, _clusters, "clusters", rows, notes)


def perplexity_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over clusters, with the dense model's and that of the exact masks."""

    def reference(axes: Axes, members: Sequence[Finished]) -> None:
        for name, value in PAPER_PERPLEXITIES.items():
            _paper_line(axes, value, f"paper, {name}: {'≈ ' if name == 'dense' else ''}{value:g}", above=name != "dense")
        _own_levels(axes, members, _perplexity, ("dense", "exact"))

    rows = [("perplexity", _perplexity, True, reference)]
    return _draw(runs, path, "Perplexity over clusters", OVER_CLUSTERS, _clusters, "clusters", rows, [REFERENCE])


def captured_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Captured importance over the bits of a choice among clusters, with that of the exact masks."""
    value = lambda run, arm: 100 * arm["captured_importance"] if arm.get("captured_importance") is not None else None
    rows = [("captured importance, %", value, False, lambda axes, members: _own_levels(axes, members, value, ("exact",)))]
    return _draw(runs, path, "Captured importance over bits", BY_CLUSTER, _bits, BITS, rows, [])


def bits_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Perplexity over the bits of a choice among clusters, with the dense model's and that of the exact masks."""
    rows = [("perplexity", _perplexity, True, lambda axes, members: _own_levels(axes, members, _perplexity, ("dense", "exact")))]
    return _draw(runs, path, "Perplexity over bits", BY_CLUSTER, _bits, BITS, rows, [])


def map_figure(runs: Sequence[Finished], path: Path) -> bool:
    """What captured importance, and captured energy, mean for perplexity: a point for each arm of each run, one row of two panels for each place."""
    shown = {"captured_importance": "captured importance, %", "captured_energy": "captured energy, %"}
    places = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.place)]
    points = [
        (index, arm, key, (run.conditions.get("tuned") or "").partition(",")[0] == arm["arm"])
        for index, members in enumerate(places)
        for run in members
        for arm in run.arms.values()
        for key in shown
        if arm["arm"] != "dense" and arm.get(key) and arm.get("ratio") and 1 < arm["ratio"] < math.inf
    ]
    if not points:
        return False
    from matplotlib.lines import Line2D

    figure = report.new_figure("What a captured share means for perplexity", [], 9.6 + _LEGEND_INCHES, 4.2 * len(places))
    grid = figure.subplots(len(places), 2, squeeze=False)
    for index, members in enumerate(places):
        for axes, (key, label) in zip(grid[index], shown.items(), strict=True):
            report.log_axis(axes, "y")
            for place, arm, name, tuned in points:
                if (place, name) == (index, key):
                    color, marker = report.ARM_STYLES.get(arm["arm"], (report.INK, "p"))
                    face = "white" if tuned else color
                    axes.plot(100 * arm[key], math.log(arm["ratio"]), color=color, marker=marker, markerfacecolor=face, markersize=6, linestyle="none")
            _finer_ticks(axes)
            report.plain_axes(axes, xlabel=label, ylabel="ln of perplexity over dense (log scale)")
        _place_title(grid[index][0], members[0])
    arms = [arm for arm in report.ARM_STYLES if any(point[1]["arm"] == arm for point in points)]
    handles = [Line2D([], [], color=color, marker=marker, linestyle="none", label=arm) for arm in arms for color, marker in [report.ARM_STYLES[arm]]]
    if any(tuned for *_, tuned in points):
        handles.append(Line2D([], [], color=report.INK, marker="o", markerfacecolor="white", linestyle="none", label="hollow: tuned"))
    legend = figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9.5)
    legend.set_alignment("left")
    figure.savefig(path)
    return True


def gaps_figure(runs: Sequence[Finished], path: Path) -> bool:
    """Of runs with a predictor: what the codebook costs, and what predicting it costs, in nats."""
    runs = [run for run in runs if run.gap("predicted", "oracle") is not None and run.gap("oracle", "exact") is not None]
    gap = lambda run, arm: run.own_gap(arm["arm"])
    rows = [("difference of ln perplexity, nats", gap, False, None)]
    words = {"oracle": "oracle − exact", "predicted": "predicted − oracle"}
    return bool(runs) and _draw(runs, path, "What codebook and predictor cost", tuple(words), _clusters, "clusters", rows, [], words)


def _clusters(run: Finished, arm: dict) -> float:
    return run.conditions["k"]


def _bits(run: Finished, arm: dict) -> float | None:
    return arm.get("bits")


def _perplexity(run: Finished, arm: dict) -> float | None:
    return arm.get("perplexity")


Row = tuple[str, Value, bool, "Callable[[Axes, Sequence[Finished]], None] | None"]


def _draw(
    runs: Sequence[Finished], path: Path, title: str, arms: Sequence[str], x: Value, xlabel: str, rows: Sequence[Row], notes: Sequence[str],
    words: dict[str, str] | None = None,
) -> bool:  # fmt: skip
    """One column of panels for each place, with the rows (label, value, whether logarithmic, what else to draw) under each other.

    words: what the legend calls the arms. Returns False, and draws nothing, where there is no point.
    """
    places = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.place)]
    drawn = [[lines(members, arms, x, value) for _, value, *_ in rows] for members in places]
    every = [line for panels in drawn for found in panels for line in found]
    if not every:
        return False
    styles = _Styles(every)
    across = min(_COLUMNS, len(places))
    down = -(-len(places) // across)
    heights = [3.6, *[1.5] * (len(rows) - 1)] * down
    figure = report.new_figure(title, notes, 5.2 * across + _LEGEND_INCHES, sum(heights) + 0.6 * down)
    grid = figure.subplots(len(rows) * down, across, squeeze=False, height_ratios=heights)
    for index in range(down * across):
        for row, (label, _, logarithmic, reference) in enumerate(rows):
            axes = grid[index // across * len(rows) + row, index % across]
            if index >= len(places):
                axes.set_axis_off()
                continue
            members, found = places[index], drawn[index][row]
            if logarithmic:
                report.log_axis(axes, "y")
            if x is _clusters:
                _cluster_axis(axes, found)
            for line in found:
                styles.plot(axes, line)
            if reference is not None:
                reference(axes, members)
            if logarithmic:
                _finer_ticks(axes)
            report.plain_axes(axes, xlabel=xlabel if row == len(rows) - 1 else "", ylabel=label + (" (log scale)" if logarithmic else ""))
            if row == 0:
                _place_title(axes, members[0])
    styles.legend(figure, words or {})
    figure.savefig(path)
    return True


class _Styles:
    """An arm is a colour, a variant of the codebook a kind of line, a density a marker: the same in all panels of a figure."""

    def __init__(self, found: Sequence[Line]):
        self.arms = [arm for arm in report.ARM_STYLES if any(line.arm == arm for line in found)]
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
        color, _ = report.ARM_STYLES[line.arm]
        # Both oracles cover the same neurons, and one would hide the other.
        under = dict(linewidth=5, alpha=0.3, zorder=1.8) if line.arm == "thresholded-oracle" else dict(linewidth=self._width(line.variant), zorder=2)
        dash = self._dash(line.variant, under["linewidth"])
        axes.plot(*zip(*line.middle(), strict=True), color=color, linestyle=dash, dash_capstyle="butt", **under)
        marker = dict(marker=self._marker(line.density), markersize=5.5, linestyle="none", zorder=under["zorder"] + 0.2)
        hollow = dict(markerfacecolor="white", markeredgewidth=1.3, markersize=8) if line.arm == "thresholded-oracle" else {}
        axes.plot(*zip(*line.points, strict=True), color=color, **(marker | hollow))

    def legend(self, figure: Figure, words: dict[str, str]) -> None:
        """What the colours, kinds of lines and markers mean, each under a heading."""
        from matplotlib.lines import Line2D

        heading = lambda text: Line2D([], [], linestyle="none", label=text or " ")
        wide = dict(linewidth=5, alpha=0.3)
        handles = [heading("arm" if not words else "gap")]
        handles += [Line2D([], [], color=report.ARM_STYLES[arm][0], label=words.get(arm, arm), **(wide if arm == "thresholded-oracle" else dict(linewidth=2.4)))
                    for arm in self.arms]  # fmt: skip
        handles += [heading(""), heading("codebook")]
        handles += [
            Line2D([], [], color=report.INK, linewidth=self._width(name), linestyle=self._dash(name), label=report.wrapped(name, 26)) for name in self.variants
        ]
        handles += [heading(""), heading("density of centroids")]
        handles += [
            Line2D([], [], color=report.INK, marker=self._marker(density), markersize=5.5, linestyle="none", label=f"{density:g}") for density in self.densities
        ]
        x, y, width, height = figure.get_layout_engine().get()["rect"]  # all but the heading; the legend takes its right end
        left = width - _LEGEND_INCHES / figure.get_figwidth()
        figure.get_layout_engine().set(rect=(x, y, left, height))
        legend = figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(left, height), frameon=False, fontsize=9, handlelength=2.6, labelspacing=0.45)
        for text in legend.get_texts():
            if text.get_text() in ("arm", "gap", "codebook", "density of centroids"):
                text.set(color=report.MUTED, weight="bold", x=-34)


def _place_title(axes: Axes, run: Finished) -> None:
    axes.set_title(place_text(run, lines=True), loc="left", fontsize=8, color=report.ALARM if run.in_sample else report.MUTED, linespacing=1.25)


def _cluster_axis(axes: Axes, found: Sequence[Line]) -> None:
    """Powers of two, at least over the range that the paper tried."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    at = [*PAPER_CLUSTERS, *(x for line in found for x, _ in line.points)]
    low, high = math.floor(math.log2(min(at))), math.ceil(math.log2(max(at)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.35), 2 ** (high + 0.35))
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(low, high + 1, 1 if high - low < 9 else 2)]))
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
    _label(axes, label, (PAPER_CLUSTERS[1], value), report.MUTED, above=above, style="italic", ha="right")


def _own_levels(axes: Axes, members: Sequence[Finished], value: Value, arms: Sequence[str]) -> None:
    """Our own arms that do not depend on clusters, as levels with their names, and the bits of their masks' choice."""
    for arm in arms:
        records = [(run, run.arms[arm]) for run in members if arm in run.arms]
        levels = {round(value(run, record), 2): record for run, record in records if value(run, record) is not None}
        color, _ = report.ARM_STYLES[arm]
        for level, record in levels.items():
            bits = f", {record['bits']:,.0f} bits" if record.get("bits") and axes.get_xscale() == "linear" else ""
            axes.axhline(level, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1.6)
            _label(axes, f"{arm} {report.shown_perplexity(level)}{bits}", (0.01, level), color, ("axes fraction", "data"), arm != "dense")


def _label(axes: Axes, text: str, at: tuple[float, float], color: str, coordinates: str | tuple[str, str] = "data", above: bool = True, **look: str) -> None:
    """Small words right above or below a level, with a white rim that keeps them readable over lines."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.2, foreground="white")]
    axes.annotate(text, at, (0, 3 if above else -3), xycoords=coordinates, textcoords="offset points", fontsize=7.5, color=color, path_effects=rim, zorder=4,
                  va="bottom" if above else "top", **look)  # fmt: skip


# ---- all of it


def compare(runs: Sequence[Finished], folder: Path) -> str:
    """Writes comparison.csv, comparison.md and the figures to `folder`; returns the table for a terminal. Raises UserError if it can't be written."""
    runs = ordered(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "comparison.csv", table_csv(runs).encode())
        write_atomic(folder / "comparison.md", table(runs, markdown=True).encode())
        figures = save_figures(runs, folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another folder with out=FOLDER") from error
    names = ", ".join(path.name for path in figures) or "none (no arm of clusters among them)"
    return f"{table(runs)}\nwritten to {folder}: comparison.csv, comparison.md; figures: {names}"


def main(words: Sequence[str]) -> None:
    """`compare=RUNS [out=FOLDER]`, as `evaluate.py` takes them. Raises UserError as `find_runs` and `compare` do."""
    given = dict(word.partition("=")[::2] for word in words)
    other = [key for key in given if key not in ("compare", "out")]
    if other:
        raise UserError(f"{other[0]}: does not go with compare=, which reads finished runs; it takes out=FOLDER only")
    runs, left_out = find_runs(given["compare"])
    parents = {str(run.folder.resolve().parent) for run in runs}
    folder = Path(given["out"]).expanduser() if given.get("out") else Path(os.path.commonpath(parents)) / "comparison"
    print("\n".join([*left_out, "", compare(runs, folder)] if left_out else [compare(runs, folder)]))
