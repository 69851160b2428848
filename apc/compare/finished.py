"""Finds finished runs, decides which can be compared, and gives them short names. Loads no model."""

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
from apc.data.quantise import FULL_BITS
from apc.evaluate import tables
from apc.run.folder import RunFolder, read_results
from apc.sparse.policies import facts
from apc.utils.errors import UserError

MORE_CONDITIONS = ("overlap", "weights")  # shown where a run has them
OWN_DENSE = (
    "FFN at b bits: against dense and gap compare with models whose FFN is stored at b bits too; bytes are a share "
    "of the FFN at 16 bits."
)
_WITHOUT_KEY = ("algorithm", "weighting", "scope", "sites")  # settings whose values speak for themselves


def predictions_needed(
    neurons: float, clusters: float, layers: float = 1, tokens: float = 1, cost: float = 1
) -> tuple[float, float]:
    """(C_direct, C_clustered) of the cost model on the slides of Dhar et al.'s talk (Euro-Par 2025).

    C_direct = N · L · T · C predicts each of N neurons; C_clustered = K · L · T · C predicts one of K clusters. L:
    layers, T: tokens, C: cost of one prediction. The slides take N ≈ ⅔ · 7e9 = 4.67e9, the number of FFN *parameters*
    of a 7 B model, and K = 3 · 2,048 = 6,144; the ratio is 7.6e5. The model counts predictions. The bytes and FLOPs of
    a policy are in `MaskPolicy.cost`.
    """
    return neurons * layers * tokens * cost, clusters * layers * tokens * cost


@dataclass(frozen=True)
class Finished:
    """A finished run, or a finished evaluation of a run, with its results."""

    name: str
    folder: Path
    results: dict
    config: Config

    @cached_property
    def conditions(self) -> dict:
        """The conditions of its numbers; see `results.json`."""
        return self.results["conditions"]

    @property
    def in_sample(self) -> bool:
        """Whether it was scored on the text that was fitted on."""
        return tables.is_in_sample(self.results)

    @cached_property
    def policies(self) -> dict[str, dict]:
        """The records of the policies that ran, by name; without intervals if there were too few windows for them."""
        tokens, seq_len = (self.conditions.get(key) or 0 for key in ("score_tokens", "seq_len"))
        # Results of version 0.1 have an interval from two windows on.
        few = {"ratio_low": None, "ratio_high": None} if tokens < tables.MIN_WINDOWS * seq_len else {}
        return {record["policy"]: record | few for record in self.results["policies"] if not record.get("missing")}

    @cached_property
    def speeds(self) -> dict[str, dict]:
        """The records of the policies whose decoding speed was measured, by name."""
        return {record["policy"]: record for record in (self.results.get("speed") or {}).get("policies", ())}

    @property
    def machine(self) -> str | None:
        """What its speed was measured on; None if it was not, or if the CPU has no name, as in older results."""
        if not self.speeds:
            return None
        device = self.conditions.get("device")
        return self.results["speed"].get("machine") or (None if device == "cpu" else device)

    @cached_property
    def comparison_key(self) -> tuple:
        """Runs with the same key can be compared: model, texts, split, windows, tokens, dtype and more."""
        texts = ("model", "fit", "score", "split", "seq_len", "bos", "fit_tokens", "score_tokens")
        return tuple(self.conditions.get(key) for key in (*texts, "dtype", *MORE_CONDITIONS))

    @cached_property
    def settings(self) -> dict[str, object]:
        """All settings that change its numbers, except the number of clusters, the density and the seed."""
        cfg = self.config
        cluster = {key: value for key, value in asdict(cfg.cluster).items() if key not in ("k", "density")}
        conditions = {key: self.conditions.get(key) for key in ("sites", "sparsity", "active", "forward")}
        defaults, tuned = TuneConfig(), self.conditions.get("tuned")
        changed = [
            f"{key} {value}"
            for key, value in asdict(cfg.tune).items()
            if key not in ("policy", "max_epochs", "batch_windows") and value != getattr(defaults, key)
        ]
        tuned = tuned and ", ".join([tuned, *changed])
        conditions["ffn_bits"] = self.conditions.get("ffn_bits") or FULL_BITS
        return cluster | conditions | {"calibration_windows": cfg.collect.calibration_windows, "tuned": tuned}

    def is_tuned_for(self, policy: str) -> bool:
        """Whether the run was tuned for this policy, or for the one whose scores it uses."""
        return (self.conditions.get("tuned") or "").partition(",")[0] == (facts(policy).tuned_as or policy)

    @cached_property
    def predictor_settings(self) -> dict[str, object]:
        """The settings of its predictor."""
        return {f"predictor {key}": value for key, value in asdict(self.config.predictor).items()}

    def fewer_predictions(self, policy: str) -> float | None:
        """How many times fewer predictions the policy makes than a predictor of neurons; None if it has no clusters."""
        sizes = [self.conditions.get(key) or 0 for key in ("layers", "hidden_size", "ffn_width")]
        if not facts(policy).over_clusters or 0 in sizes:
            return None
        clusters = self.conditions["k"] * len(self.conditions["sites"])
        direct, clustered = predictions_needed(3 * math.prod(sizes), clusters)
        return direct / clustered

    def gap(self, policy: str) -> float | None:
        """ln(perplexity / perplexity of the policy named by `gap_to`), in nats.

        None without `gap_to`, or if one of the two did not run.
        """
        records = (self.policies.get(name or "", {}) for name in (policy, facts(policy).gap_to))
        value, other = (tables.to_float(record.get("perplexity")) for record in records)
        return math.log(value / other) if math.isfinite(value) and math.isfinite(other) else None


def find_runs(words: str) -> tuple[list[Finished], list[str]]:
    """The runs that `compare=` names, held-out ones first, and a line for each unfinished run that was left out.

    words: folders and glob patterns, one or a list in brackets. A pattern's matches that are not run folders are
    ignored. Raises UserError for a pattern without a match, a named folder without results, damaged results, and if no
    run is left.
    """
    listed = words[1:-1] if words.startswith("[") and words.endswith("]") else words
    runs: dict[Path, Finished] = {}
    left_out = []
    for word in filter(None, map(str.strip, listed.split(","))):
        pattern = os.path.expanduser(word)
        is_pattern = glob.has_magic(pattern)
        folders = sorted(Path(path) for path in glob.glob(pattern)) if is_pattern else [Path(pattern)]
        if not folders:
            raise UserError(f"compare={word}: matches nothing; name run folders of train.py, e.g. compare='runs/*'")
        for folder in folders:
            run = RunFolder(folder)
            if run.results.is_file() and run.config.is_file():
                runs.setdefault(folder.resolve(), read_finished(folder))
            elif is_pattern and run.config.is_file():
                left_out.append(f"{folder}: left out, not finished (no results.json)")
            elif run.config.is_file():
                raise UserError(f"{folder}: not finished (no results.json); run it to its end")
            elif not is_pattern:
                raise UserError(f"{folder}: not a run folder (no config.yaml)")
    if not runs:
        unfinished = f"; {len(left_out)} are not finished" if left_out else ""
        raise UserError(f"compare={words}: names no finished run{unfinished}")
    return ordered(runs.values()), left_out


def read_finished(folder: Path) -> Finished:
    """A run's results and configuration. Raises UserError, naming the file, if they are missing or damaged."""
    run = RunFolder(folder)
    results = read_results(run.results)
    if results is None:
        raise UserError(f"{run.results}: no such file")
    parent = folder.resolve().parent
    name = f"{parent.parent.name}/{folder.name}" if parent.name == "evaluations" else folder.name
    return Finished(name, folder, results, load_saved(run.config))


def ordered(runs: Iterable[Finished]) -> list[Finished]:
    """Held-out runs first; then by comparison key, settings, density and clusters."""

    def key(run: Finished) -> tuple:
        comparison = tuple(map(str, run.comparison_key))
        return run.in_sample, comparison, str(run.settings), run.conditions["density"], run.conditions["k"], run.name

    return sorted(runs, key=key)


def variants(runs: Sequence[Finished], own: Callable[[Finished], dict] = lambda run: run.settings) -> dict[Path, str]:
    """For each run (by folder) a short name: its algorithm, and the settings (`own`) in which the runs differ."""
    every = [own(run) for run in runs]
    keys = dict.fromkeys(key for settings in every for key in ("algorithm", *settings))
    shown = [key for key in keys if key == "algorithm" or len({str(settings.get(key)) for settings in every}) > 1]
    shown += ["ffn_bits"] if bits_shown(runs) and "ffn_bits" not in shown else []
    return {
        run.folder: ", ".join(_setting(key, settings[key]) for key in shown if key in settings)
        for run, settings in zip(runs, every, strict=True)
    }


def bits_shown(runs: Sequence[Finished]) -> dict[Path, str]:
    """The bits of each run's FFNs in words, by folder; empty if all are stored at 16 bits."""
    few = any(run.settings["ffn_bits"] != FULL_BITS for run in runs)
    return {run.folder: _setting("ffn_bits", run.settings["ffn_bits"]) for run in runs} if few else {}


def _setting(key: str, value: object) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    if key == "tuned":
        return f"tuned for {text}" if value else "not tuned"
    if key == "ffn_bits":
        return f"FFN at {value:.3g} bits"
    if key in _WITHOUT_KEY:
        return text
    return f"{key.replace('_', ' ')} {'dense' if value is None else text}"


def comparison_items(run: Finished) -> list[str]:
    """What runs must share to be compared, in words: model, fit text, score text, split and windows."""
    model, fit, score, split, seq_len, bos, fit_tokens, score_tokens, dtype, *more = run.comparison_key
    return [
        *(["IN-SAMPLE"] if run.in_sample else []),
        f"{model} ({dtype})",
        f"fit {fit} ({_count(fit_tokens)} tokens)",
        f"score {score} ({_count(score_tokens)} tokens)",
        f"{split}, windows of {_count(seq_len)}, {'BOS' if bos else 'no BOS'}",
        *(f"{key}: {value}" for key, value in zip(MORE_CONDITIONS, more, strict=True) if value is not None),
    ]


def _count(number: int | None) -> str:
    return tables.DASH if number is None else f"{number:,}"
