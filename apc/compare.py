"""Sets finished runs side by side: one table of all their arms, with a command for each run, and figures. Reads results.json and config.yaml only."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from apc import report
from apc.compare_figures import save_figures
from apc.config import CONFIGS, Config, load_config, overrides_between
from apc.errors import UserError
from apc.files import write_atomic
from apc.finished import Finished, find_runs, ordered, place_text, variants

SLIDES = (
    "predictions: how many times fewer things are predicted than by neuron, as the paper's slides count them, N·L·T·C over K·L·T·C, with N the FFN's "
    "parameters and K the clusters of all sites. It counts predictions, neither bytes nor FLOPs: those stand beside it."
)
GAPS = "gap: at oracle, ln of its perplexity over exact's (what the codebook costs); at predicted, over oracle's (what predicting the cluster costs)."
STARRED = "* without the cost of finding the mask: this arm reads it from the token's own activations."
SHARED = ("dense", "exact")  # arms that no codebook changes
_ELSEWHERE = ("run", "tracking", "collect.dir")  # of a configuration: names and folders, which change no figure


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
    ("density", "%", lambda run, arm: report.shown_density(arm)),
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


def _shared_rows(members: Sequence[Finished]) -> list[list[str]]:
    """Rows of the arms that no codebook changes, each figure once, with how many of the runs have it. None for a single run."""
    found: dict[tuple, int] = {}
    for run in members if len(members) > 1 else ():
        for name in SHARED:
            if name in run.arms:
                about = "" if name == "dense" else f"sparsity {run.conditions['sparsity']:g}"
                unsaid = ("K",) if about else ("K", "%")  # of dense, the share that is active is another for each sparsity
                cells = tuple("" if label in unsaid else cell(run, run.arms[name]) for _, label, cell in _TABLE)
                found[(name, about, cells)] = found.get((name, about, cells), 0) + 1
    every = sorted(found.items(), key=lambda item: SHARED.index(item[0][0]))
    return [[f"{count} {'run' if count == 1 else 'runs'}", about, *cells] for (_, about, cells), count in every]


def _density(run: Finished) -> str:
    """Of its centroids, where that was asked for."""
    return "any density" if run.conditions.get("ones") == "free" else f"density {run.conditions['density']:g}"


def table(runs: Sequence[Finished], markdown: bool = False) -> str:
    """Every arm of every run under the conditions that it holds for, held-out before in-sample; then the command for each run."""
    parts = []
    names = variants(runs)
    for _, group in itertools.groupby(runs, key=lambda run: run.place):
        members = list(group)
        codebooks = {str(run.folder): f"{names[str(run.folder)]}, {_density(run)}" for run in members}
        rows = _shared_rows(members)
        rows += [
            [run.name, codebooks[str(run.folder)], *(cell(run, arm) for *_, cell in _TABLE)]
            for run in members
            for name, arm in run.arms.items()
            if name not in SHARED or len(members) == 1
        ]
        heading = place_text(members[0])
        grid = report.text_grid([("", "run"), ("", "codebook"), *(column[:2] for column in _TABLE)], rows, markdown)
        parts += [f"**{heading}**" if markdown else heading, grid]
    notes = [STARRED, *report.density_notes(arm for run in runs for arm in run.arms.values()), GAPS, SLIDES]
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
    writer.writerow(["split", "run", "arm", *FIGURES, "masked_density", "oracle_gap", "predictor_gap", *SHARES, "excludes_finding", "fewer_predictions_slides",
                     "codebook", *CONDITIONS, "command"])  # fmt: skip
    names = variants(runs)
    for run in runs:
        split = "IN-SAMPLE" if run.in_sample else run.conditions["split"]
        shown = ["+".join(value) if isinstance(value, list) else value for value in (run.conditions.get(key) for key in CONDITIONS)]
        for name, arm in run.arms.items():
            gaps = (run.own_gap(name) if name == kind else None for kind in ("oracle", "predicted"))
            figures = [*(arm.get(key) for key in FIGURES), report.masked_density(arm), *gaps, *(arm.get(key) for key in SHARES)]
            writer.writerow([split, run.name, name, *figures, arm.get("excludes_finding"), run.fewer_predictions(name), names[str(run.folder)], *shown,
                             command(run)])  # fmt: skip
    return out.getvalue()


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
