"""Sets finished runs side by side: a table of all their policies, a command for each run, and figures.

Reads results.json and config.yaml only.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from apc.compare.figures import save_figures
from apc.compare.finished import (
    MORE_CONDITIONS,
    OWN_DENSE,
    Finished,
    bits_shown,
    comparison_items,
    find_runs,
    ordered,
    variants,
)
from apc.evaluate import tables
from apc.evaluate.tables import Column
from apc.report.charts import bytes_chart, layer_charts
from apc.report.page import Section, page
from apc.run.again import command
from apc.sparse.policies import POLICIES, facts
from apc.utils.errors import UserError
from apc.utils.files import write_atomic

PREDICTIONS = (
    "predictions: how many times fewer predictions clusters need than single neurons, N·L·T·C over K·L·T·C as on the "
    "paper's slides; N: parameters of all FFNs, K: clusters of all sites. It counts predictions, not bytes or FLOPs."
)
GAPS = "gap: ln of the perplexity over that of " + ", ".join(
    f"{policy.gap_to} (for {name})" for name, policy in POLICIES.items() if policy.gap_to
)
LAYERS = "One colour per policy, one dash style per run. Hover over a dot to see its run; click a policy to hide it."
SHARED = tuple(name for name, policy in POLICIES.items() if not policy.uses_codebook)  # the same with any codebook


def _of_speed(column: Column) -> Callable[[dict], str]:
    """The column's cell of a record's `speed`, if there is one."""
    return lambda record: column.cell(record["speed"]) if record["speed"] else tables.DASH


_COLUMNS = (
    Column("", "run", lambda record: record["run"]),
    Column("", "codebook", lambda record: record["codebook"]),
    Column("", "K", lambda record: tables.format_fixed(record["k"], 0)),
    *tables.POLICY_COLUMNS,
    Column("gap", "nats", lambda record: tables.format_fixed(record["gap"], 3)),
    Column("predictions", "÷", lambda record: _power_of_ten(record["fewer_predictions"])),
)
_SPEED_COLUMNS = (
    *(replace(column, cell=_of_speed(column)) for column in (tables.TOKENS_PER_SECOND, tables.SPEED_UP)),
    Column("", "machine", lambda record: record["speed"] and record["machine"] or tables.DASH),
)
_MEASURES = (
    *("density", "coverage", "precision", "captured_importance", "captured_energy"),
    *("perplexity", "ratio", "ratio_low", "ratio_high", "bits"),
)
_SHARES = ("bytes_share", "flops_share")
_CONDITIONS = (
    *("model", "fit", "score", "fit_tokens", "score_tokens", "seq_len", "bos", "sparsity", "active", "sites", "k"),
    *("density", "bytes", "ffn_bits", "weighting", "scope", "forward", *MORE_CONDITIONS),
)


def table(runs: Sequence[Finished], markdown: bool = False, wide: bool = False) -> str:
    """Every policy of every run under its conditions, held-out before in-sample.

    With `markdown` or `wide` it has all columns and the commands; else it is grouped by run, in at most 80 characters.
    """
    parts = []
    for items, records in _groups(runs):
        if markdown or wide:
            heading = " · ".join(items)
            grid = tables.record_grid(_columns(records), records, markdown, wide)
            parts += [f"**{heading}**" if markdown else heading, grid]
        else:
            parts += ["\n".join(tables.wrapped_items(items, tables.line_width())), _grouped(records)]
    return "\n\n".join([*parts, *_below(runs, markdown, wide)]) + "\n"


def _groups(runs: Sequence[Finished]) -> Iterator[tuple[list[str], list[dict]]]:
    """For each group of runs that can be compared, its conditions, and the records of its policies."""
    names = variants(runs)
    for _, group in itertools.groupby(runs, key=lambda run: run.comparison_key):
        members = list(group)
        records = _shared_records(members)
        records += [
            _record(run, name, names[run.folder])
            for run in members
            for name in run.policies
            if name not in SHARED or len(members) == 1
        ]
        yield comparison_items(members[0]), records


def _columns(records: Sequence[dict]) -> tuple[Column, ...]:
    """The table's columns, with those of the speed if it was measured."""
    return _COLUMNS + (_SPEED_COLUMNS if any(record["speed"] for record in records) else ())


def _below(runs: Sequence[Finished], markdown: bool, wide: bool) -> list[str]:
    every = markdown or wide
    notes = [f"{run.name}: {warning}" for run in runs for warning in tables.warnings(run.results)]
    notes += [tables.MEANINGS, *tables.footnotes(record for run in runs for record in run.policies.values())]
    notes += [OWN_DENSE] if bits_shown(runs) else []
    notes += [GAPS, PREDICTIONS] if every else [f"{tables.MORE} Commands that make each run again: comparison.md."]
    notes += [tables.IN_SAMPLE] if any(run.in_sample for run in runs) else []
    commands = [f"{run.name}: {command(run.folder, run.config)}" for run in runs] if every else []
    if markdown:
        return [*map(tables.escaped, notes), "To run one again:", "\n".join(f"    {line}" for line in commands)]
    width = 160 if wide else tables.line_width()
    below = ["\n".join(tables.wrapped(note, width, indent="  ") for note in notes)]
    return [*below, "\n  ".join(["To run one again:", *commands])] if commands else below


def _record(run: Finished, policy: str, codebook: str) -> dict:
    free = run.conditions.get("centroid_size") == "free"
    density = "any density" if free else f"density {run.conditions['density']:g}"
    budget = run.conditions.get("bytes")
    density += "" if budget is None else f", bytes {budget:g}"
    return run.policies[policy] | {
        "run": run.name,
        "codebook": f"{codebook}, {density}",
        "k": run.conditions["k"],
        "gap": run.gap(policy),
        "fewer_predictions": run.fewer_predictions(policy),
        "speed": run.speeds.get(policy),
        "machine": run.machine,
    }


def _shared_records(members: Sequence[Finished]) -> list[dict]:
    """Policies whose result does not depend on the codebook.

    One record per distinct result, with the number of runs that share it.

    Empty for a single run.
    """
    count: Counter[tuple[str, ...]] = Counter()
    records, bits = {}, bits_shown(members)
    for name in SHARED if len(members) > 1 else ():
        for run in [run for run in members if name in run.policies]:
            record = _record(run, name, "") | {"run": "", "k": None, "speed": None}
            settings = [bits.get(run.folder)]
            if name == "dense":  # its share of active neurons depends on the run's sparsity
                record |= {"density": None, "coverage": None, "precision": None, "masked": None}
            else:
                setting = "bytes" if facts(name).calibrated else "sparsity"
                settings.insert(0, f"{setting} {run.conditions[setting]:g}")
            record["codebook"] = ", ".join(filter(None, settings))
            key = tuple(tables.record_cells(_COLUMNS, record))
            records[key] = record
            count[key] += 1
    return [record | {"run": f"{count[key]} run{'s' * (count[key] > 1)}"} for key, record in records.items()]


def _grouped(records: Sequence[dict]) -> str:
    """The columns that fit 80 characters, with the records of each run under a line that names run and codebook."""
    columns = tables.shown_columns(tables.POLICY_COLUMNS, wide=False)
    groups = []
    for (run, codebook, k), group in itertools.groupby(records, key=itemgetter("run", "codebook", "k")):
        words = [codebook, f"K {k:,}" if k is not None else "any codebook"]
        heading = tables.wrapped(f"{run}: {', '.join(filter(None, words))}", tables.line_width(), indent="  ")
        groups.append((f"\n{heading}", [tables.record_cells(columns, record) for record in group]))
    return tables.grouped_grid([(column.top, column.bottom) for column in columns], groups)


def _power_of_ten(ratio: float | None) -> str:
    return tables.DASH if ratio is None else f"{ratio:.1e}".replace("e+0", "e")


def table_csv(runs: Sequence[Finished]) -> str:
    """CSV with a row for each policy of each run, with conditions and command. Shares are fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = [*_MEASURES, "masked_density", "oracle_gap", "predictor_gap", *_SHARES]
    added = ["excludes_finding", "fewer_predictions_slides", "seconds_per_token", "times_dense", "machine", "codebook"]
    writer.writerow(["split", "run", "policy", *measures, *added, *_CONDITIONS, "command"])
    names = variants(runs)
    for run in runs:
        split = "IN-SAMPLE" if run.in_sample else run.conditions["split"]
        values = [run.conditions.get(key) for key in _CONDITIONS]
        shown = ["+".join(value) if isinstance(value, list) else value for value in values]
        again = command(run.folder, run.config)
        for name, policy in run.policies.items():
            gap = run.gap(name)
            gaps = [None, gap] if facts(name).forms else [gap, None]
            row = [split, run.name, name, *map(policy.get, _MEASURES), tables.masked_density(policy), *gaps]
            row += [*map(policy.get, _SHARES), policy.get("excludes_finding"), run.fewer_predictions(name)]
            timed = run.speeds.get(name, {})
            row += [timed.get("seconds_per_token"), timed.get("times_dense"), run.machine if timed else None]
            writer.writerow([*row, names[run.folder], *shown, again])
    return out.getvalue()


def comparison_page(runs: Sequence[Finished]) -> str:
    """The comparison as an HTML page: a chart, a table and layers for each group of runs that can be compared."""
    sections: list[Section] = []
    for number, (conditions, records) in enumerate(_groups(runs)):
        other = f", other conditions {number}" if number else ""
        drawn = [(record["run"], record) for record in records]
        chart = bytes_chart(drawn)
        table = Section.of_records(f"Policies{other}", _columns(records), records, conditions=conditions, chart=chart)
        sections.append(table)
        if (layers := layer_charts(drawn)) is not None:
            sections.append(Section(f"Layers{other}", chart=layers, notes=[LAYERS]))
    every = [record for run in runs for record in run.policies.values()]
    own_dense = [OWN_DENSE] if bits_shown(runs) else []
    table.notes = [tables.MEANINGS, *tables.footnotes(every), *own_dense, GAPS, PREDICTIONS]
    commands = [f"{run.name}: {command(run.folder, run.config)}" for run in runs]
    warnings = [f"{run.name}: {warning}" for run in runs for warning in tables.warnings(run.results)]
    warnings += [tables.IN_SAMPLE] if any(run.in_sample for run in runs) else []
    return page(f"{len(runs)} runs side by side", [], warnings, [*sections, Section("Make them again", texts=commands)])


def compare(runs: Sequence[Finished], folder: Path, wide: bool = False) -> str:
    """Writes comparison.csv, .md and .html and the figures to `folder`; returns the table for a terminal.

    Raises UserError if the folder can't be written.
    """
    runs = ordered(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "comparison.csv", table_csv(runs).encode())
        write_atomic(folder / "comparison.md", table(runs, markdown=True).encode())
        write_atomic(folder / "comparison.html", comparison_page(runs).encode())
        paths = save_figures(runs, folder)
    except OSError as error:
        message = f"{folder}: can't be written ({error.strerror}); choose another folder with out=FOLDER"
        raise UserError(message) from error
    names = ", ".join(path.name for path in paths) or "none (nothing to draw)"
    written = f"written to {folder}: comparison.html, comparison.csv, comparison.md; figures: {names}"
    return f"{table(runs, wide=wide)}\n{tables.wrapped(written, tables.line_width(wide), indent='  ')}"


def main(words: Sequence[str]) -> None:
    """Runs `compare=RUNS [out=FOLDER] [--wide]` of evaluate.py. Raises UserError like `find_runs` and `compare`."""
    given = dict(word.partition("=")[::2] for word in words if word != "--wide")
    other = [key for key in given if key not in ("compare", "out")]
    if other:
        raise UserError(f"{other[0]}: does not go with compare=, which reads finished runs; give out=FOLDER or --wide")
    runs, left_out = find_runs(given["compare"])
    parents = {str(run.folder.resolve().parent) for run in runs}
    folder = Path(given["out"]).expanduser() if given.get("out") else Path(os.path.commonpath(parents)) / "comparison"
    shown = compare(runs, folder, wide="--wide" in words)
    print(*left_out, *[""] * bool(left_out), shown, sep="\n")
