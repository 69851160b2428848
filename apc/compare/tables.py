"""Sets finished runs side by side: one table of all their policies, with a command for each run, and figures. Reads results.json and config.yaml only."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from apc.compare.figures import save_figures
from apc.compare.finished import Finished, comparison_text, find_runs, ordered, variants
from apc.config.load import CONFIGS, load_config, load_saved, overrides_between
from apc.config.schema import Config
from apc.evaluate import tables
from apc.sparse.policies import POLICIES
from apc.utils.errors import UserError
from apc.utils.files import write_atomic

SLIDES = (
    "predictions: how many times fewer things are predicted than by neuron, as the paper's slides count them, N·L·T·C over K·L·T·C, with N the FFN's "
    "parameters and K the clusters of all sites. It counts predictions, neither bytes nor FLOPs: those stand beside it."
)
GAPS = "gap: at oracle, ln of its perplexity over exact's (what the codebook costs); at predicted, over oracle's (what predicting the cluster costs)."
STARRED = "* without the cost of finding the mask: this policy reads it from the token's own activations."
SHARED = tuple(name for name, policy in POLICIES.items() if not policy.uses_codebook)
_ELSEWHERE = ("run", "tracking", "collect.dir")  # of a configuration: names and folders, which change no figure


# ---- the command that makes a run again


def command(run: Finished) -> str:
    """A command line that makes the run (or evaluation) again, from the experiment that it differs least from."""
    cfg = run.config
    again = f"run.name={run.folder.name}-again"
    if run.folder.resolve().parent.name == "evaluations":
        base = load_saved(run.folder.parent.parent / "config.yaml", ["stage=all"])
        words = [
            f"checkpoint={run.folder.parent.parent}",
            *overrides_between(base, cfg, (*_ELSEWHERE, "checkpoint")),
            again,
        ]
        return shlex.join(["python", "evaluate.py", *words])
    found = [[*chosen, *overrides_between(base, cfg, _ELSEWHERE)] for chosen, base in _experiments()]
    for words in sorted(found, key=len):
        if not overrides_between(load_config(None, words), cfg, _ELSEWHERE):
            return shlex.join(["python", "train.py", *words, again])
    raise AssertionError("an experiment and what differs from it make the configuration")


@cache
def _experiments() -> list[tuple[list[str], Config]]:
    """The words that choose a starting point, and its configuration: each experiment, and what is taken without one."""
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    chosen = [[], *([f"experiment={name}"] for name in names)]
    return [([], Config()), *((words, load_config(None, words)) for words in chosen)]


# ---- the table


_TABLE: tuple[tuple[str, str, Callable[[Finished, dict], str]], ...] = (
    ("", "K", lambda run, policy: f"{run.conditions['k']:,}"),
    ("", "policy", lambda run, policy: policy["policy"]),
    ("density", "%", lambda run, policy: tables.shown_density(policy)),
    ("coverage", "%", lambda run, policy: tables.percent(policy.get("coverage"))),
    ("precision", "%", lambda run, policy: tables.percent(policy.get("precision"))),
    ("captured", "importance %", lambda run, policy: tables.percent(policy.get("captured_importance"))),
    ("", "perplexity", lambda run, policy: tables.shown_perplexity(policy.get("perplexity"))),
    ("vs dense", "× (95 %)", lambda run, policy: tables.shown_ratio(policy)),
    ("choice", "bits", lambda run, policy: tables.format_fixed(policy.get("bits"), 1)),
    ("gap", "nats", lambda run, policy: tables.format_fixed(run.own_gap(policy["policy"]), 3)),
    ("bytes", "% of dense", lambda run, policy: tables.percent(policy.get("bytes_share")) + tables.star(policy)),
    ("FLOPs", "% of dense", lambda run, policy: tables.percent(policy.get("flops_share")) + tables.star(policy)),
    ("predictions", "÷, slides", lambda run, policy: _times(run.fewer_predictions(policy["policy"]))),
)
FIGURES = (
    "density",
    "coverage",
    "precision",
    "captured_importance",
    "captured_energy",
    "perplexity",
    "ratio",
    "ratio_low",
    "ratio_high",
    "bits",
)
SHARES = ("bytes_share", "flops_share")
CONDITIONS = (
    "model",
    "fit",
    "score",
    "fit_tokens",
    "score_tokens",
    "seq_len",
    "sparsity",
    "active",
    "sites",
    "k",
    "density",
    "weighting",
    "scope",
    "forward",
)


def _times(ratio: float | None) -> str:
    return tables.DASH if ratio is None else f"{ratio:.1e}".replace("e+0", "e")


def _shared_rows(members: Sequence[Finished]) -> list[list[str]]:
    """Rows of the policies that no codebook changes, each figure once, with how many of the runs have it. None for a single run."""
    found: dict[tuple, int] = {}
    for run in members if len(members) > 1 else ():
        for name in SHARED:
            if name in run.policies:
                about = "" if name == "dense" else f"sparsity {run.conditions['sparsity']:g}"
                unsaid = (
                    ("K",) if about else ("K", "%")
                )  # of dense, the share that is active is another for each sparsity
                cells = tuple("" if label in unsaid else cell(run, run.policies[name]) for _, label, cell in _TABLE)
                found[(name, about, cells)] = found.get((name, about, cells), 0) + 1
    every = sorted(found.items(), key=lambda item: SHARED.index(item[0][0]))
    return [[f"{count} {'run' if count == 1 else 'runs'}", about, *cells] for (_, about, cells), count in every]


def _density(run: Finished) -> str:
    """Of its centroids, where that was asked for."""
    return "any density" if run.conditions.get("centroid_size") == "free" else f"density {run.conditions['density']:g}"


def table(runs: Sequence[Finished], markdown: bool = False) -> str:
    """Every policy of every run under the conditions that it holds for, held-out before in-sample; then the command for each run."""
    parts = []
    names = variants(runs)
    for _, group in itertools.groupby(runs, key=lambda run: run.place):
        members = list(group)
        codebooks = {str(run.folder): f"{names[str(run.folder)]}, {_density(run)}" for run in members}
        rows = _shared_rows(members)
        rows += [
            [run.name, codebooks[str(run.folder)], *(cell(run, policy) for *_, cell in _TABLE)]
            for run in members
            for name, policy in run.policies.items()
            if name not in SHARED or len(members) == 1
        ]
        heading = comparison_text(members[0])
        grid = tables.text_grid([("", "run"), ("", "codebook"), *(column[:2] for column in _TABLE)], rows, markdown)
        parts += [f"**{heading}**" if markdown else heading, grid]
    notes = [STARRED, *tables.density_notes(policy for run in runs for policy in run.policies.values()), GAPS, SLIDES]
    notes += (
        ["IN-SAMPLE: scored on the text it was fitted on; not what other text will give."]
        if any(run.in_sample for run in runs)
        else []
    )
    commands = [f"{run.name}: {command(run)}" for run in runs]
    if markdown:
        notes = [note.replace("*", "\\*", 1) if note.startswith("*") else note for note in notes]
        return "\n\n".join([*parts, *notes, "To run one again:", "\n".join(f"    {line}" for line in commands)]) + "\n"
    return (
        "\n\n".join(
            [
                *parts,
                "\n".join(tables.wrapped(note, 160) for note in notes),
                "\n".join(["to run one again:", *(f"  {line}" for line in commands)]),
            ]
        )
        + "\n"
    )


def table_csv(runs: Sequence[Finished]) -> str:
    """CSV of the same: a row for each policy of each run, with its conditions and command. Shares are fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["split", "run", "policy", *FIGURES, "masked_density", "oracle_gap", "predictor_gap", *SHARES, "excludes_finding", "fewer_predictions_slides",
                     "codebook", *CONDITIONS, "command"])  # fmt: skip
    names = variants(runs)
    for run in runs:
        split = "IN-SAMPLE" if run.in_sample else run.conditions["split"]
        shown = [
            "+".join(value) if isinstance(value, list) else value
            for value in (run.conditions.get(key) for key in CONDITIONS)
        ]
        for name, policy in run.policies.items():
            gaps = (run.own_gap(name) if name == kind else None for kind in ("oracle", "predicted"))
            figures = [
                *(policy.get(key) for key in FIGURES),
                tables.masked_density(policy),
                *gaps,
                *(policy.get(key) for key in SHARES),
            ]
            writer.writerow([split, run.name, name, *figures, policy.get("excludes_finding"), run.fewer_predictions(name), names[str(run.folder)], *shown,
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
        raise UserError(
            f"{folder}: can't be written ({error.strerror}); choose another folder with out=FOLDER"
        ) from error
    names = ", ".join(path.name for path in figures) or "none (no policy of clusters among them)"
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
