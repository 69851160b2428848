"""Runs that have their results: finding them, what makes them comparable, and what they are called side by side. No model is loaded."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from apc.config.load import load_saved
from apc.config.schema import Config, TuneConfig
from apc.evaluate import tables
from apc.run.folder import RunFolder, read_results
from apc.sparse.policies import facts
from apc.utils.errors import UserError


def things_predicted(
    neurons: float, clusters: float, layers: float = 1, tokens: float = 1, cost: float = 1
) -> tuple[float, float]:
    """(C_direct, C_clustered) of the cost model on the slides of Dhar et al.'s talk (Euro-Par 2025).

    C_direct = N · L · T · C for predicting each of N neurons, C_clustered = K · L · T · C for predicting over K clusters, with L layers, T tokens and C the
    cost of one prediction. The slides take N ≈ ⅔ · 7e9 = 4.67e9, which is the number of FFN *parameters* of a 7 B model, and K = 3 · 2,048 = 6,144: a ratio
    of 7.6e5. It counts things predicted. What a policy reads and computes is in `metrics.policy_cost`.
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
        return tables.is_in_sample(self.results)

    @cached_property
    def policies(self) -> dict[str, dict]:
        """Its policies that ran, by name."""
        return {record["policy"]: record for record in self.results["policies"] if not record.get("missing")}

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
            f"{key} {value}"
            for key, value in asdict(self.config.tune).items()
            if key not in ("policy", "max_epochs", "windows") and value != getattr(usual, key)
        ]
        return self.conditions.get("tuned") and ", ".join([self.conditions["tuned"], *own])

    def is_tuned_for(self, policy: str) -> bool:
        """Whether the run was tuned for this policy, or for the one whose scores it uses."""
        return (self.conditions.get("tuned") or "").partition(",")[0] == (facts(policy).tuned_as or policy)

    @cached_property
    def predictor_settings(self) -> dict[str, object]:
        return {f"predictor {key}": value for key, value in asdict(self.config.predictor).items()}

    def fewer_predictions(self, policy: str) -> float | None:
        """How many times fewer things the policy predicts than a predictor of neurons, by `things_predicted`; None for policies without clusters."""
        shape = [self.conditions.get(key) for key in ("layers", "hidden_size", "ffn_width")]
        if not facts(policy).over_clusters or None in shape:
            return None
        layers, hidden_size, width = shape
        direct, clustered = things_predicted(
            3 * hidden_size * width * layers, self.conditions["k"] * len(self.conditions["sites"])
        )
        return direct / clustered

    def gap(self, policy: str, before: str) -> float | None:
        """ln of the perplexity of one policy over another's; None where one of them did not run."""
        values = [(self.policies.get(name) or {}).get("perplexity") for name in (policy, before)]
        return (
            None if any(not value or not math.isfinite(value) for value in values) else math.log(values[0] / values[1])
        )

    def own_gap(self, policy: str) -> float | None:
        """How much worse the policy is than the one that its gap is measured from, in nats; None where there is none."""
        return (
            self.gap(policy, {"oracle": "exact", "predicted": "oracle"}[policy])
            if policy in ("oracle", "predicted")
            else None
        )


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
            raise UserError(
                f"compare={word}: matches nothing; name run folders that train.py left, e.g. compare='runs/*'"
            )
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
        raise UserError(
            f"compare={words}: names no finished run" + (f"; {len(left_out)} are not finished" if left_out else "")
        )
    return ordered(found.values()), left_out


def read_finished(folder: Path) -> Finished:
    """A run's results and configuration. Raises UserError, naming the file, if they are missing or damaged."""
    run = RunFolder(folder)
    results = read_results(run.results)
    policies, conditions = (
        results.get(key) if isinstance(results, dict) else None for key in ("policies", "conditions")
    )
    whole = (
        isinstance(conditions, dict)
        and isinstance(policies, list)
        and all(isinstance(policy, dict) and "policy" in policy for policy in policies)
    )
    if not whole or not {"model", "split", "k", "density", "sites"} <= conditions.keys():
        raise UserError(f"{run.results}: damaged (not the results of a run); delete it and run again")
    of_a_run = folder.resolve().parent.name == "evaluations"
    name = f"{folder.resolve().parent.parent.name}/{folder.name}" if of_a_run else folder.name
    return Finished(name, folder, results, load_saved(run.config))


def ordered(runs: Iterable[Finished]) -> list[Finished]:
    """Held-out runs first; then by what they can be compared on, by algorithm, density and clusters."""

    def key(run: Finished) -> tuple:
        return (
            run.in_sample,
            tuple(map(str, run.place)),
            str(run.settings),
            run.conditions["density"],
            run.conditions["k"],
            run.name,
        )

    return sorted(runs, key=key)


def variants(runs: Sequence[Finished], own: Callable[[Finished], dict] = lambda run: run.settings) -> dict[str, str]:
    """For each run (by folder) a short name of its algorithm and of whatever else differs among the runs."""
    every = [own(run) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for each in every for key in each)
        if len({str(each.get(key)) for each in every}) > 1
    ]

    def shown(key: str, value: object) -> str:
        value = "+".join(map(str, value)) if isinstance(value, list) else value
        if key == "tuned":
            return f"tuned for {value}" if value else "not tuned"
        return (
            str(value)
            if key in ("algorithm", "weighting", "scope", "sites")
            else f"{key.replace('_', ' ')} {value if value is not None else 'dense'}"
        )

    return {
        str(run.folder): ", ".join(
            shown(key, each.get(key)) for key in dict.fromkeys(["algorithm", *differing]) if key in each
        )
        for run, each in zip(runs, every, strict=True)
    }


def comparison_text(run: Finished, lines: bool = False) -> str:
    """Model, texts and split that runs can be compared on: in one line, or each in its own."""
    model, fit, score, split, seq_len, fit_tokens, score_tokens, dtype = run.place
    fit, score = (f"{text} ({_count(tokens)} tokens)" for text, tokens in ((fit, fit_tokens), (score, score_tokens)))
    parts = [
        f"{'IN-SAMPLE · ' if run.in_sample else ''}{model} ({dtype})",
        f"fit {fit}",
        f"score {score}",
        f"{split}, windows of {_count(seq_len)}",
    ]
    return "\n".join(tables.wrapped(part, 70) for part in parts) if lines else " · ".join(parts)


def _count(number: int | None) -> str:
    return tables.DASH if number is None else f"{number:,}"
