"""Turns a run's results (`results.json`) into tables. Every one of them carries the conditions it holds under.

Shares are fractions from 0 to 1 in the results and per cent in tables. A value that is None, or missing, is a dash.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

import numpy as np

DASH = "–"


# --- words and numbers


def conditions_text(results: dict) -> str:
    """One line: model, texts and tokens, whether in-sample, and the codebook's settings."""
    conditions = results.get("conditions") or {}

    def known(template: str, *keys: str) -> str | None:
        values = [conditions.get(key) for key in keys]
        return None if any(value is None for value in values) else template.format(*values)

    settings = [
        known("sparsity {:g}", "sparsity"),
        known("active by {}", "active"),
        known("sites {}", "sites") and "sites " + "+".join(conditions["sites"]),
        known("K {:,}", "k"),
        known("density {:g}" + (" (centroids: any)" if conditions.get("centroid_size") == "free" else ""), "density"),
        known("{} weighting", "weighting"),
        known("{}", "algorithm"),
        known("{} forward", "forward"),
        known("one codebook per layer", "scope")
        if conditions.get("scope") == "layer"
        else known("{} codebook", "scope"),
    ]
    fit = " ".join(filter(None, [known("fit {}", "fit"), known("({:,} tokens)", "fit_tokens")]))
    score = " ".join(filter(None, [known("score {}", "score"), known("({:,} tokens)", "score_tokens")]))
    held_out = known(", {}", "split") if not is_in_sample(results) else None
    texts = " → ".join(filter(None, [fit, score])) + "".join(
        filter(None, [held_out, known(", windows of {:,}", "seq_len")])
    )
    items = [known("{}", "model"), texts, *settings, known("predictor {}", "predictor"), known("tuned for {}", "tuned")]
    return ("IN-SAMPLE · " if is_in_sample(results) else "") + " · ".join(filter(None, items))


def wrapped_conditions(results: dict, width: int) -> list[str]:
    """The conditions in lines of at most `width` characters, broken between items and at arrows only, where that is possible."""
    glued = conditions_text(results).replace(" ", "\xa0").replace("\xa0·\xa0", "\xa0· ").replace("\xa0→\xa0", "\xa0→ ")
    return [
        line.replace("\xa0", " ").removesuffix(" ·") for line in textwrap.wrap(glued, width, break_on_hyphens=False)
    ]


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken at spaces only."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def is_in_sample(results: dict) -> bool:
    """Whether the score text is part of the fit text: then every table and figure says so."""
    return (results.get("conditions") or {}).get("split") == "in-sample"


def to_float(value: object) -> float:
    """A number as float; None and words that are no number as nan, the "nan" and "inf" of `metrics.jsonl` as themselves."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def format_fixed(value: float | None, decimals: int) -> str:
    return DASH if value is None else f"{to_float(value):,.{decimals}f}"


def percent(value: float | None) -> str:
    return DASH if value is None else format_fixed(100 * to_float(value), 1)


def _decimals(value: float) -> int:
    """Decimals that leave a number of any size about four digits."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0


def shown_perplexity(value: float | None) -> str:
    return DASH if value is None else format_fixed(value, min(2, _decimals(to_float(value))))


def shown_ratio(policy: dict) -> str:
    """Perplexity over dense, with half the width of its 95 % interval."""
    ratio, low, high = (policy.get(key) for key in ("ratio", "ratio_low", "ratio_high"))
    if ratio is None:
        return DASH
    decimals = _decimals(to_float(ratio))
    text = format_fixed(ratio, decimals)
    return (
        text if low is None or high is None or low == high else f"{text} ± {format_fixed((high - low) / 2, decimals)}"
    )


def shown_density(policy: dict) -> str:
    """Per cent of neurons kept, and after an arrow while the policy's own masks are on, where that is another share: half a point or more."""
    kept = percent(policy.get("density"))
    return f"{kept} → {percent(masked_density(policy))}" if _moves(policy) else kept


def masked_density(policy: dict) -> float | None:
    return _masked(policy, "density")


def _moves(policy: dict) -> bool:
    kept, masked = policy.get("density"), masked_density(policy)
    return kept is not None and masked is not None and abs(to_float(masked) - to_float(kept)) >= 0.005


def density_notes(policies: Iterable[dict]) -> list[str]:
    """What an arrow of `shown_density` means, where one of the policies has it."""
    said = "density a → b: of the dense model's activations, and while the policy's own masks are on, which perplexity, bits, bytes and FLOPs are of."
    return [said] if any(map(_moves, policies)) else []


# --- tables

# The two lines of a column's header, and what stands in a policy's row.
_POLICY_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("", "policy", lambda policy: policy["policy"]),
    ("density", "%", shown_density),
    ("coverage", "%", lambda policy: percent(policy.get("coverage"))),
    ("precision", "%", lambda policy: percent(policy.get("precision"))),
    ("captured", "importance %", lambda policy: percent(policy.get("captured_importance"))),
    ("captured", "energy %", lambda policy: percent(policy.get("captured_energy"))),
    ("", "perplexity", lambda policy: shown_perplexity(policy.get("perplexity"))),
    ("vs dense", "× (95 %)", shown_ratio),
    ("choice", "bits", lambda policy: format_fixed(policy.get("bits"), 1)),
    ("bytes", "% of dense", lambda policy: percent(policy.get("bytes_share")) + star(policy)),
    ("FLOPs", "% of dense", lambda policy: percent(policy.get("flops_share")) + star(policy)),
)

_DETAIL_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("", "policy", lambda policy: policy["policy"]),
    ("first token:", "importance %", lambda policy: percent(policy.get("captured_importance_first"))),
    ("first token:", "energy %", lambda policy: percent(policy.get("captured_energy_first"))),
    ("masked:", "density %", lambda policy: percent(masked_density(policy))),
    ("masked:", "coverage %", lambda policy: percent(_masked(policy, "coverage"))),
    ("masked:", "precision %", lambda policy: percent(_masked(policy, "precision"))),
    ("masked:", "importance %", lambda policy: percent(_masked(policy, "captured_importance"))),
    ("masked:", "energy %", lambda policy: percent(_masked(policy, "captured_energy"))),
)


def policies_table(results: dict, markdown: bool = False) -> str:
    """The main table, one policy a row, under the conditions and above its footnotes and the seconds that each stage took.

    Args:
        results: see `results.json`. A policy with `missing` is a row of dashes, its reason below.
        markdown: for a README; otherwise aligned for a terminal.
    """
    policies = results.get("policies") or []
    notes = []
    if any(star(policy) for policy in policies):
        notes.append("* without the cost of finding the mask: this policy reads it from the token's own activations.")
    notes += density_notes(policies)
    notes += [f"{DASH} {policy['policy']}: {policy['missing']}" for policy in policies if policy.get("missing")]
    if results.get("seconds"):
        notes.append(
            "seconds: " + ", ".join(f"{stage} {format_fixed(value, 1)}" for stage, value in results["seconds"].items())
        )
    return _document(results, [_policy_grid(_POLICY_COLUMNS, policies, markdown)], notes, markdown)


def detail_table(results: dict, markdown: bool = False) -> str:
    """What the policies capture of each window's first token, and of patterns met under the masked forward pass."""
    policies = [policy for policy in results.get("policies") or [] if not policy.get("missing")]
    notes = [
        "first token: of each window, captured. masked: measured while the policy's own mask is on, in all layers."
    ]
    return _document(results, [_policy_grid(_DETAIL_COLUMNS, policies, markdown)], notes, markdown)


_SPEED_COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("", "policy", lambda policy: policy["policy"]),
    ("", "tokens/s", lambda policy: format_fixed(1 / policy["seconds_per_token"], 1)),
    ("", "ms a token", lambda policy: format_fixed(1000 * policy["seconds_per_token"], 3)),
    ("dense /", "this, time", lambda policy: format_fixed(policy["times_dense"], 2)),
    ("perplexity", "after dense prefill", lambda policy: shown_perplexity(policy["perplexity"])),
    ("vs dense", "× (95 %)", shown_ratio),
    ("perplexity", "all sparse", lambda policy: shown_perplexity(policy["perplexity_masked"])),
    ("divergence", "nats", lambda policy: format_fixed(policy["divergence"], 3)),
    ("same", "next token %", lambda policy: percent(policy["agreement"])),
    ("same", "tokens at first", lambda policy: format_fixed(policy.get("agrees_for"), 1)),
    ("pays up to", "tokens", lambda policy: DASH if policy.get("pays_up_to") is None else str(policy["pays_up_to"])),
    (
        "held",
        "MB",
        lambda policy: DASH if policy.get("bytes_held") is None else format_fixed(policy["bytes_held"] / 1e6, 1),
    ),
)


def speed_tables(results: dict, markdown: bool = False) -> list[str]:
    """How fast each policy decodes and how far what it says is from the dense model, and continuations side by side; empty where that was not measured."""
    speed = results.get("speed")
    if not speed:
        return []
    conditions = results.get("conditions") or {}
    notes = [
        f"one sequence on {conditions.get('device', 'an unnamed device')}, {conditions.get('dtype', '')}, after a prompt of {speed['prompt']:,} tokens. "
        f"Perplexity: of the second halves of {speed['windows']:,} score windows, after their first halves.",
        "divergence: KL(dense ‖ policy) a token, after a dense prefill. same tokens at first: until a greedy continuation differs. held: beside the model.",
        "pays up to: of a call, at which kernel=auto runs FFNs sparse on this device; here they ran sparse at one token, whether it pays or not.",
    ]
    notes += (
        [f"{DASH} {', '.join(speed['left_out'])}: known only after what it would skip was computed"]
        if speed["left_out"]
        else []
    )
    said = []
    for index, prompt in enumerate(speed["prompts"]):
        lines = [f"… {' '.join(prompt.split())[-200:]}"]
        lines += [f"  {policy['policy']}: {' '.join(policy['text'][index].split())}" for policy in speed["policies"]]
        said.append("\n".join(lines) if not markdown else "\n".join(f"    {line}" for line in lines))
    return [
        _document(results, [_policy_grid(_SPEED_COLUMNS, speed["policies"], markdown)], notes, markdown),
        "\n\n".join(said),
    ]


def layer_table(
    results: dict, measures: Sequence[str] = ("density", "captured_importance"), markdown: bool = False
) -> str:
    """Each measure per layer, policies side by side, the last row over all layers; then the predictor's accuracy per layer.

    Args:
        results: see `results.json`.
        measures: keys of a policy's `per_layer`, each a block.
        markdown: for a README; otherwise aligned for a terminal.
    """
    grids = []
    for measure in measures:
        columns = {policy["policy"]: policy["per_layer"][measure] for policy in layered(results, measure)}
        overall = {policy["policy"]: policy.get(measure) for policy in layered(results, measure)}
        if columns:
            grids.append(_layer_grid(measure.replace("_", " "), columns, overall, markdown))
    predictor = (results.get("predictor") or {}).get("per_layer") or {}
    accuracy = {key: predictor[key] for key in ("top1", "top5") if predictor.get(key)}
    if accuracy:
        overall = {key: float(np.mean([to_float(value) for value in values])) for key, values in accuracy.items()}
        grids.append(_layer_grid("predictor's hits", accuracy, overall, markdown))
    return _document(results, grids, [], markdown)


def star(policy: dict) -> str:
    return "*" if policy.get("excludes_finding") and not policy.get("missing") else ""


def _masked(policy: dict, key: str) -> float | None:
    return (policy.get("masked") or {}).get(key)


def layered(results: dict, measure: str) -> list[dict]:
    """The policies other than dense that have a value of `measure` for each layer."""
    policies = results.get("policies") or []
    return [
        policy
        for policy in policies
        if policy["policy"] != "dense" and not policy.get("missing") and (policy.get("per_layer") or {}).get(measure)
    ]


def _policy_grid(
    columns: Sequence[tuple[str, str, Callable[[dict], str]]], policies: Sequence[dict], markdown: bool
) -> str:
    rows = [
        [policy["policy"]] + [DASH] * (len(columns) - 1)
        if policy.get("missing")
        else [cell(policy) for _, _, cell in columns]
        for policy in policies
    ]
    return text_grid([column[:2] for column in columns], rows, markdown)


def _layer_grid(
    title: str, columns: dict[str, Sequence[float]], overall: dict[str, float | None], markdown: bool
) -> str:
    count = max(len(values) for values in columns.values())
    rows = [
        [str(layer)] + [percent(values[layer] if layer < len(values) else None) for values in columns.values()]
        for layer in range(count)
    ]
    rows.append(["all"] + [percent(overall[name]) for name in columns])
    heading = f"**{title}, %**\n\n" if markdown else f"{title}, %\n"
    return heading + text_grid([("", "layer"), *(("", name) for name in columns)], rows, markdown)


def text_grid(header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """The first column to the left, the others to the right."""
    if markdown:
        lines = [[" ".join(filter(None, pair)) for pair in header], ["---"] + ["---:"] * (len(header) - 1), *rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in line) + " |" for line in lines
        )
    # A column with an asterisk keeps one place for it, so that its digits stay under each other.
    starred = [any(row[i].endswith("*") for row in rows) for i in range(len(header))]
    body = [
        [cell + " " if star and not cell.endswith("*") else cell for cell, star in zip(row, starred, strict=True)]
        for row in rows
    ]
    # A header line that says nothing is left out.
    heads = [
        line
        for line in ([pair[i] + " " * star for pair, star in zip(header, starred, strict=True)] for i in (0, 1))
        if any(line)
    ]
    widths = [max(len(line[i]) for line in [*heads, *body]) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [*heads, ["─" * width for width in widths], *body]
    ]
    return "\n".join(line.rstrip() for line in aligned)


def _document(results: dict, grids: Sequence[str], notes: Sequence[str], markdown: bool) -> str:
    if is_in_sample(results):
        notes = [*notes, "IN-SAMPLE: scored on the text it was fitted on; not what other text will give."]
    if markdown:
        escaped = [note.replace("*", "\\*", 1) if note.startswith("*") else note for note in notes]
        return "\n\n".join([f"**{conditions_text(results)}**", *grids, *escaped]) + "\n"
    width = max([100, *(len(line) for grid in grids for line in grid.splitlines())])
    return "\n\n".join(filter(None, ["\n".join(wrapped_conditions(results, width)), *grids, "\n".join(notes)])) + "\n"
