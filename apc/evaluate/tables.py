"""Turns a run's results (`results.json`) into tables. Every table carries its conditions.

Shares are fractions from 0 to 1 in the results and per cent in tables. A missing value is a dash. By default a table
fits a terminal of 80 columns; `wide` shows all columns. Markdown always has all columns.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

DASH = "–"
WIDTH = 80  # characters in a line, unless `wide`
_UNLIMITED = 10_000
IN_SAMPLE = "IN-SAMPLE: scored on the text that was fitted on; other text will differ."
BOUND = "* bound: reads the token's own activations, so the cost of finding the mask is not included."
MOVED = (
    "density a → b: a on the dense model's activations, b while the policy's own masks are on; "
    "perplexity, bits, bytes and FLOPs belong to b."
)
MEANINGS = (
    "captured energy: the mask's share of the squared importance. against dense: perplexity ratio ± half its 95 % "
    "interval. bytes: FFN weights read per token, against the dense FFN."
)
WIDE_INTERVAL = "a ×÷ f: from a / f to a × f, where a range is too wide for ±."
# An interval needs the spread over windows. With 8 windows the standard deviation itself is uncertain by a quarter (1 /
# √(2 · 7)), and Student's factor is 2.4. With 2 windows it is uncertain by 70 %, and the factor is 12.7.
MIN_WINDOWS = 8
NO_INTERVAL = (
    f"fewer than {MIN_WINDOWS} score windows are too few for a 95 % interval; raise data.score_windows, or score a "
    "longer text."
)
FIRST_TOKEN = (
    "first token: what the masks capture of each window's first token. "
    "masked: measured while the policy's own masks are on in all layers."
)
MORE = "--wide shows all columns."
# A range that is symmetric on the log scale is printed as ± if half of it is at most this share of the value: its ends
# are then off by at most 3 % of the value.
_MAX_SYMMETRIC = 0.25


def condition_items(results: dict) -> list[str]:
    """What the results hold for: model, texts with their tokens, the split, then the codebook's settings."""
    conditions = results.get("conditions") or {}

    def known(template: str, *keys: str) -> str | None:
        values = [conditions.get(key) for key in keys]
        return None if any(value is None for value in values) else template.format(*values)

    unit = "expert" if conditions.get("experts") else "layer"
    free = " (centroids of any size)" if conditions.get("centroid_size") == "free" else ""
    texts = [
        " ".join(filter(None, [known(f"{text} {{}}", text), known("({:,} tokens)", f"{text}_tokens")]))
        for text in ("fit", "score")
    ]
    items = [
        "IN-SAMPLE" if is_in_sample(results) else None,
        known("{}", "model"),
        known("weights {}", "weights"),
        known("FFN at {:.2f} bits", "ffn_bits"),
        " → ".join(filter(None, texts)),
        None if is_in_sample(results) else known("{}", "split"),
        f"overlap {percent(conditions['overlap'])} %" if (conditions.get("overlap") or 0) >= 0.01 else None,
        known("windows of {:,}", "seq_len"),
        ("BOS" if conditions.get("bos") else "no BOS") if conditions else None,
        known("sparsity {:g}", "sparsity"),
        known("active by {}", "active"),
        "sites " + "+".join(conditions["sites"]) if conditions.get("sites") else None,
        known("K {:,}", "k"),
        known("density {:g}" + free, "density"),
        known("bytes {:g}", "bytes"),
        known("{} weighting", "weighting"),
        known("{}", "algorithm"),
        known("{} forward", "forward"),
        known("routed experts only, {} per layer", "experts"),
        f"one codebook per {unit}" if conditions.get("scope") == "layer" else known("{} codebook", "scope"),
        known("predictor {}", "predictor"),
        known("tuned for {}", "tuned"),
    ]
    return list(filter(None, items))


def conditions_text(results: dict) -> str:
    """The conditions in one line."""
    return " · ".join(condition_items(results))


def wrapped_items(items: Iterable[str], width: int) -> list[str]:
    """Items with dots between them, in lines of at most `width` characters; only longer items are broken."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 3 <= width:
            lines[-1] += f" · {item}"
        else:
            lines += textwrap.wrap(item, width, break_on_hyphens=False)
    return lines


def wrapped(text: str, width: int, indent: str = "") -> str:
    """The text in lines of at most `width` characters, broken at spaces only; later lines begin with `indent`."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def is_in_sample(results: dict) -> bool:
    """Whether the score text is part of the fit text."""
    return (results.get("conditions") or {}).get("split") == "in-sample"


def to_float(value: object) -> float:
    """A number as float. None and other words are NaN; the "nan" and "inf" of `metrics.jsonl` keep their meaning."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def format_fixed(value: float | None, decimals: int) -> str:
    """The number with so many decimals and commas at thousands; a dash for None."""
    return DASH if value is None else f"{to_float(value):,.{decimals}f}"


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal; a dash for None."""
    return DASH if value is None else format_fixed(100 * to_float(value), 1)


def _decimals(value: float) -> int:
    """Decimals that leave a number about four digits."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0


def shown_perplexity(value: float | None) -> str:
    """A perplexity with about four digits and at most two decimals."""
    return DASH if value is None else format_fixed(value, min(2, _decimals(to_float(value))))


def shown_ratio(policy: dict) -> str:
    """Perplexity against dense with its 95 % interval, as ± or ×÷."""
    ratio, low, high = (policy.get(key) for key in ("ratio", "ratio_low", "ratio_high"))
    return DASH if ratio is None else _shown_range(ratio, low, high, _decimals(to_float(ratio)))


def _shown_speed_up(record: dict) -> str:
    """Decoding speed against dense with the range of its rounds; a dash if it is unclear."""
    speed_up, low, high = (record.get(key) for key in ("times_dense", "times_low", "times_high"))
    return DASH if speed_up is None else _shown_range(speed_up, low, high, 2)  # older results have no range


def _shown_range(value: float, low: float | None, high: float | None, decimals: int) -> str:
    """The positive value ± half its range, or ×÷ the factor to the farther end where ± would reach too far down."""
    text = format_fixed(value, decimals)
    if low is None or high is None or low == high:
        return text
    half = (high - low) / 2
    if half <= _MAX_SYMMETRIC * value:
        return f"{text} ± {format_fixed(half, decimals)}"
    factor = max(high / value, value / low if low else math.inf)
    return f"{text} ×÷ {format_fixed(factor, max(0, _decimals(factor) - 1))}"


def _is_wide(policy: dict) -> bool:
    return "×÷" in shown_ratio(policy) or "×÷" in _shown_speed_up(policy)


def shown_density(policy: dict) -> str:
    """Per cent of neurons kept; after an arrow also under the policy's own masks, if that differs by half a point."""
    kept = percent(policy.get("density"))
    return f"{kept} → {percent(masked_density(policy))}" if _density_moves(policy) else kept


def masked_density(policy: dict) -> float | None:
    """The share of neurons kept while the policy's own masks are on; None where that was not measured."""
    return (policy.get("masked") or {}).get("density")


def _density_moves(policy: dict) -> bool:
    return abs(to_float(masked_density(policy)) - to_float(policy.get("density"))) >= 0.005


def star(policy: dict) -> str:
    """An asterisk for a bound, whose cost does not include finding the mask; else empty."""
    return "*" if policy.get("excludes_finding") and not policy.get("missing") else ""


def best_policy(policies: Iterable[dict]) -> dict | None:
    """The record with the lowest perplexity among policies that are neither dense nor bounds; None if there is none."""
    usable = [
        policy
        for policy in policies
        if policy["policy"] != "dense"
        and not policy.get("excludes_finding")
        and math.isfinite(to_float(policy.get("perplexity")))
    ]
    return min(usable, key=lambda policy: policy["perplexity"], default=None)


def layered(policies: Iterable[dict], measure: str) -> list[dict]:
    """The policies other than dense that have `measure` for each layer."""
    return [
        policy
        for policy in policies
        if policy["policy"] != "dense" and not policy.get("missing") and (policy.get("per_layer") or {}).get(measure)
    ]


@dataclass(frozen=True)
class Column:
    """A column: two lines of header, and the text of a record's cell. wide: only shown with --wide."""

    top: str
    bottom: str
    cell: Callable[[dict], str]
    wide: bool = False


def _share_column(top: str, bottom: str, key: str, wide: bool = False) -> Column:
    return Column(top, bottom, lambda record: percent(record.get(key)), wide)


def _masked_column(bottom: str, key: str, wide: bool = False) -> Column:
    return Column("masked", bottom, lambda record: percent((record.get("masked") or {}).get(key)), wide)


def _shown_read(record: dict) -> str:
    """The shares of each projection's weights that are read, while the policy's own masks are on; a dash if unknown."""
    read = (record.get("masked") or record).get("read")
    return "/".join(percent(share) for share in read.values()) if read else DASH


POLICY = Column("", "policy", lambda record: record["policy"])
PERPLEXITY = Column("", "perplexity", lambda record: shown_perplexity(record.get("perplexity")))
AGAINST_DENSE = Column("against", "dense ×", shown_ratio)

POLICY_COLUMNS = (
    POLICY,
    Column("density", "%", shown_density),
    _share_column("coverage", "%", "coverage", wide=True),
    _share_column("precision", "%", "precision", wide=True),
    _share_column("captured", "importance %", "captured_importance", wide=True),
    _share_column("captured", "energy %", "captured_energy"),
    PERPLEXITY,
    AGAINST_DENSE,
    Column("read %:", "gate/up/down", _shown_read, wide=True),
    Column("choice", "bits", lambda record: format_fixed(record.get("bits"), 1), wide=True),
    Column("bytes", "%", lambda record: percent(record.get("bytes_share")) + star(record)),
    Column("FLOPs", "%", lambda record: percent(record.get("flops_share")) + star(record), wide=True),
)
_ROW = "{:18}  {:>11}  {:>8}  {:>10}  {:>15}  {:>7}"
ROW_HEADER = _ROW.format("policy", "density %", "energy %", "perplexity", "against dense ×", "bytes % ").rstrip()

DETAIL_COLUMNS = (
    POLICY,
    _share_column("first token", "importance %", "captured_importance_first", wide=True),
    _share_column("first token", "energy %", "captured_energy_first"),
    _masked_column("density %", "density"),
    _masked_column("coverage %", "coverage"),
    _masked_column("precision %", "precision", wide=True),
    _masked_column("importance %", "captured_importance", wide=True),
    _masked_column("energy %", "captured_energy"),
)

TOKENS_PER_SECOND = Column("", "tokens/s", lambda record: format_fixed(1 / record["seconds_per_token"], 1))
SPEED_UP = Column("speed-up", "× dense", _shown_speed_up)
_SPEED_COLUMNS = (
    POLICY,
    TOKENS_PER_SECOND,
    Column("", "ms per token", lambda record: format_fixed(1000 * record["seconds_per_token"], 3), wide=True),
    SPEED_UP,
    Column("perplexity", "prefilled", lambda record: shown_perplexity(record["perplexity"])),
    AGAINST_DENSE,
    Column("perplexity", "all sparse", lambda record: shown_perplexity(record["perplexity_masked"]), wide=True),
    Column("divergence", "nats", lambda record: format_fixed(record["divergence"], 3)),
    Column("same", "next token %", lambda record: percent(record["agreement"]), wide=True),
    Column("same", "first tokens", lambda record: format_fixed(record.get("agrees_for"), 1), wide=True),
    Column("sparse up", "to tokens", lambda record: format_fixed(record.get("pays_up_to"), 0), wide=True),
    Column(
        "extra", "MB", lambda record: format_fixed(record.get("bytes_held") and record["bytes_held"] / 1e6, 1), True
    ),
)
# Without what is scored while decoding: the perplexities are those of the main table.
_QUICK_SPEED_COLUMNS = tuple(
    replace(column, top="", bottom="perplexity") if column.bottom == "prefilled" else column
    for column in _SPEED_COLUMNS
    if column.bottom not in ("all sparse", "nats", "next token %")
)


def policies_table(results: dict, markdown: bool = False, wide: bool = False) -> str:
    """The main table: one row per policy, under the conditions; footnotes and the seconds of each stage follow.

    results: see `results.json`. A policy with `missing` is a row of dashes, with the reason below.
    """
    policies = results.get("policies") or []
    notes = [MEANINGS, *footnotes(policies)]
    notes += [f"{DASH} {policy['policy']}: {policy['missing']}" for policy in policies if policy.get("missing")]
    if results.get("seconds"):
        stages = (f"{stage} {format_fixed(value, 1)}" for stage, value in results["seconds"].items())
        notes.append("seconds: " + ", ".join(stages))
    zeros = max((policy.get("zeros") or 0.0 for policy in policies), default=0.0)
    if zeros >= 0.01:
        notes.insert(
            1, f"exact zeros: {percent(zeros)} % of the dense model's activations (after its activation function)."
        )
    return _document(results, [record_grid(POLICY_COLUMNS, policies, markdown, wide)], notes, markdown, wide)


def footnotes(policies: Iterable[dict]) -> list[str]:
    """Explanations of the signs that occur in the rows of these policies."""
    notes = {BOUND: star, MOVED: _density_moves, WIDE_INTERVAL: _is_wide, NO_INTERVAL: _lacks_interval}
    policies = list(policies)
    return [note for note, has in notes.items() if any(map(has, policies))]


def _lacks_interval(policy: dict) -> bool:
    return policy.get("ratio") is not None and policy.get("ratio_low") is None


def warnings(results: dict) -> list[str]:
    """The run's warnings about suspect figures, one line each."""
    return [f"WARNING: {warning}" for warning in results.get("warnings") or ()]


def policy_row(record: dict) -> str:
    """One policy in one line, aligned under `ROW_HEADER`."""
    if record.get("missing"):
        return f"{record['policy']:18}  {DASH} {record['missing']}"
    *cells, last = (column.cell(record) for column in shown_columns(POLICY_COLUMNS, wide=False))
    return _ROW.format(*cells, last if star(record) else f"{last} ").rstrip()


def detail_table(results: dict, markdown: bool = False, wide: bool = False) -> str:
    """What the masks capture of each window's first token, and of all tokens while the policy's own masks are on."""
    policies = [policy for policy in results.get("policies") or [] if not policy.get("missing")]
    grid = record_grid(DETAIL_COLUMNS, policies, markdown, wide)
    return _document(results, [grid], [FIRST_TOKEN], markdown, wide)


def speed_tables(results: dict, markdown: bool = False, wide: bool = False) -> list[str]:
    """A table of decoding speed and divergence from dense, and continuations side by side; empty if not measured."""
    parts = speed_parts(results, explained=markdown or wide)
    if parts is None:
        return []
    columns, notes, continuations = parts
    texts = []
    for text in continuations:
        lines = text.splitlines()
        if markdown:
            lines = [f"    {line}" for line in lines]
        elif not wide:
            lines = [wrapped(line, line_width(), indent="    ") for line in lines]
        texts.append("\n".join(lines))
    grid = record_grid(columns, results["speed"]["policies"], markdown, wide)
    return [_document(results, [grid], notes, markdown, wide), "\n\n".join(texts)]


def speed_parts(results: dict, explained: bool = True) -> tuple[tuple[Column, ...], list[str], list[str]] | None:
    """Columns of the table of speeds, notes, and the continuations of each prompt; None if not measured.

    explained: whether the notes explain the columns that only --wide shows.
    """
    speed = results.get("speed")
    if not speed:
        return None
    conditions = {"device": "an unnamed device", "dtype": ""} | (results.get("conditions") or {})
    perplexities, divergence = "Perplexity: of the table above. ", ""
    columns: tuple[Column, ...] = _QUICK_SPEED_COLUMNS
    if speed["windows"]:
        perplexities = (
            f"Perplexity: second halves of {speed['windows']:,} score windows, given their first halves. prefilled: "
            "after a dense prefill. "
        )
        divergence, columns = " Divergence: KL(dense ‖ policy) per token after a dense prefill.", _SPEED_COLUMNS
    machine = speed.get("machine", conditions["device"])
    notes = [
        f"One sequence on {machine}, {conditions['dtype']}, after a prompt of {speed['prompt']:,} tokens. "
        f"{perplexities}speed-up: median of rounds that time policies in turn ± half their range.{divergence}",
        *footnotes(speed["policies"]),
    ]
    if explained:
        notes.append(
            "same first tokens: greedy tokens before the continuation first differs from the dense model's. "
            "sparse up to: the largest call, in tokens, that kernel=auto runs sparse on this device; here one token "
            "always ran sparse. extra: memory beside the model."
        )
    if speed["left_out"]:
        names = ", ".join(speed["left_out"])
        notes.append(f"{DASH} {names}: no kernel on this device")
    notes += [
        f"{DASH} {record['policy']}: {record['unclear']}" for record in speed["policies"] if record.get("unclear")
    ]
    reasons = {record.get("own_steps") for record in speed["policies"]} - {None}
    notes += [f"{DASH} steps ran through the model itself, not our kernel: {reason}" for reason in sorted(reasons)]
    texts = []
    for index, prompt in enumerate(speed["prompts"]):
        lines = [f"… {' '.join(prompt.split())[-200:].lstrip()}"]
        lines += [f"  {policy['policy']}: {' '.join(policy['text'][index].split())}" for policy in speed["policies"]]
        texts.append("\n".join(lines))
    return columns, notes, texts


def layer_table(results: dict, markdown: bool = False, wide: bool = False) -> str:
    """Each measure by layer, policies side by side, with a last row over all layers; then the predictor's accuracy."""
    grids = []
    for measure in ("density", "captured_importance"):
        policies = layered(results.get("policies") or [], measure)
        columns = {policy["policy"]: policy["per_layer"][measure] for policy in policies}
        overall = {policy["policy"]: policy.get(measure) for policy in policies}
        grids += _layer_grids(measure.replace("_", " "), columns, overall, markdown, wide)
    predictor = (results.get("predictor") or {}).get("per_layer") or {}
    accuracy = {key: values for key, values in predictor.items() if key.startswith(("top1", "top5"))}
    means = {key: float(np.nanmean(list(map(to_float, values)))) for key, values in accuracy.items()}
    grids += _layer_grids("predictor's accuracy", accuracy, means, markdown, wide)
    return _document(results, grids, [], markdown, wide, more=False)


def _layer_grids(
    title: str, columns: Mapping[str, Sequence[float]], overall: Mapping[str, float | None], markdown: bool, wide: bool
) -> list[str]:
    """The block of one measure, cut into several where it is too wide."""
    names = list(columns)
    room = _UNLIMITED if markdown or wide else line_width() - len("layer")
    while names and sum(max(len(name), 5) + 2 for name in names) > room:
        names.pop()
    if not names:
        return []
    count = max(len(values) for values in columns.values())
    cells = {name: [percent(value) for value in columns[name]] for name in names}
    rows = [[str(i), *(cells[name][i] if i < len(cells[name]) else DASH for name in names)] for i in range(count)]
    rows.append(["all", *(percent(overall[name]) for name in names)])
    heading = f"**{title}, %**\n\n" if markdown else f"{title}, %\n"
    block = heading + text_grid([("", "layer"), *(("", name) for name in names)], rows, markdown)
    rest = {name: values for name, values in columns.items() if name not in names}
    return [block, *_layer_grids(title, rest, overall, markdown, wide)]


def next_steps(run_folder: Path | str, results: dict) -> str:
    """The commands that come after a run, ready to paste: use it in Python, evaluate, compare, upload to W&B."""
    folder = Path(run_folder)
    best = best_policy(results.get("policies") or [])
    names = ["dense", *([best["policy"]] if best else [])]
    lines = ["Next:"]
    if best:
        lines += [
            f'  run = apc.load_run("{folder}")  # in Python, with the model loaded',
            f'  apc.sparsify(model, run.codebook, run.predictor, policy="{best["policy"]}")',
        ]
    lines += [
        f"  python evaluate.py checkpoint={folder} policies=[{','.join(names)}]",
        f"  python evaluate.py checkpoint={folder} data.score=other.txt",
        f"  python evaluate.py compare='{folder.parent}/*'",
    ]
    if best:
        lines.append(f"  apc export {folder} FOLDER  # what is needed to use {best['policy']}, to pass on")
    if any(folder.glob("wandb/offline-run-*")):
        lines.append(f"  wandb sync {folder}/wandb/offline-run-*")
    return "\n".join(lines)


def shown_columns(columns: Sequence[Column], wide: bool) -> list[Column]:
    """All columns, or without `wide` those that fit 80 characters."""
    return [column for column in columns if wide or not column.wide]


def record_cells(columns: Sequence[Column], record: dict) -> list[str]:
    """The cells of one record; dashes after the name where it is missing."""
    if record.get("missing"):
        return [record["policy"], *[DASH] * (len(columns) - 1)]
    return [column.cell(record) for column in columns]


def record_grid(columns: Sequence[Column], records: Sequence[dict], markdown: bool, wide: bool) -> str:
    """A grid with a row for each record."""
    columns = shown_columns(columns, wide or markdown)
    rows = [record_cells(columns, record) for record in records]
    return text_grid([(column.top, column.bottom) for column in columns], rows, markdown)


def text_grid(header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table with its first column to the left and the others to the right. header: two lines for each column."""
    if markdown:
        lines = [[" ".join(filter(None, pair)) for pair in header], ["---"] + ["---:"] * (len(header) - 1), *rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |" for line in lines
        )
    return grouped_grid(header, [("", rows)])


def grouped_grid(header: Sequence[tuple[str, str]], groups: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A table for a terminal with its rows in groups, each under a heading; columns are aligned throughout."""
    heads = [pair if any(top for top, _ in header) else pair[1:] for pair in header]
    columns = list(zip(heads, *(row for _, rows in groups for row in rows), strict=True))
    starred = [any(cell.endswith("*") for cell in column) for _, *column in columns]
    widths = [max(map(len, [*head, *(cell.rstrip("*") for cell in column)])) for head, *column in columns]
    rooms = [width + star for width, star in zip(widths, starred, strict=True)]

    def line(cells: Sequence[str]) -> str:
        """The first cell to the left, the others to the right; asterisks hang over, so that digits stay aligned."""
        rest = zip(cells[1:], starred[1:], rooms[1:], strict=True)
        shown = [(cell if cell.endswith("*") else cell + " " * star).rjust(room) for cell, star, room in rest]
        return "  ".join([cells[0].ljust(rooms[0]), *shown]).rstrip()

    bold = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    titles = [f"\x1b[1m{line(cells)}\x1b[0m" if bold else line(cells) for cells in zip(*heads, strict=True)]
    lines = [*titles, "─" * (sum(rooms) + 2 * len(rooms) - 2)]
    for heading, rows in groups:
        lines += [*filter(None, [heading]), *map(line, rows)]
    return "\n".join(lines)


def line_width(wide: bool = False) -> int:
    """Characters that a line may have: 80, or fewer in a narrower terminal."""
    return _UNLIMITED if wide else min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def _document(
    results: dict, grids: Sequence[str], notes: Sequence[str], markdown: bool, wide: bool, more: bool = True
) -> str:
    """Conditions, grids and notes under each other. more: whether `--wide` would show more."""
    notes = [
        *warnings(results),
        *notes,
        *[MORE] * (more and not markdown and not wide),
        *[IN_SAMPLE] * is_in_sample(results),
    ]
    if markdown:
        return "\n\n".join([f"**{conditions_text(results)}**", *grids, *map(escaped, notes)]) + "\n"
    width = max([100, *(len(line) for grid in grids for line in grid.splitlines())]) if wide else line_width()
    below = "\n".join(wrapped(note, width, indent="  ") for note in notes)
    return "\n\n".join(filter(None, ["\n".join(wrapped_items(condition_items(results), width)), *grids, below])) + "\n"


def escaped(note: str) -> str:
    """A note for Markdown, where an asterisk at its beginning would make a list."""
    return note.replace("*", "\\*", 1) if note.startswith("*") else note
