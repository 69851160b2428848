"""A run's folder: the names of its files, who may write to it, and reading it back.

runs/<name>/config.yaml, provenance.json, metrics.jsonl, checkpoints/, codebook.safetensors, predictor.safetensors,
            fit-sequences.safetensors, results.json, report.html, figures/*.png, wandb/
"""

import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from apc.cluster.codebook import Codebook
from apc.config.load import flat, load_saved
from apc.config.schema import Config, check_names
from apc.config.values import to_yaml
from apc.evaluate import tables
from apc.predict.predictor import Predictor
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.files import exclusive_lock, write_atomic
from apc.utils.packages import installed_version

# The keys that decide a stage's outcome. A run resumes a folder only if these keys have the same values for every stage
# in the folder. A section stands for all of its keys but FREE_KEYS, which say where a run works or what it scores.
CLUSTER_KEYS = (
    *("checkpoint", "seed", "sites", "sparsity", "active", "model", "data", "collect", "cluster", "monitor"),
    "trainer.max_steps",
)
PREDICT_KEYS = (*CLUSTER_KEYS, "predictor")
TUNE_KEYS = (*PREDICT_KEYS, "bytes", "stages", "tune")
SCORE_KEYS = ("data.score", "data.score_windows", "data.in_sample")
_NUMBER = (int, float, type(None))
FREE_KEYS = ("collect.dir", "collect.storage", "collect.ffn_inputs", "model.device", *SCORE_KEYS)


class RunFolder:
    """Names of the files in a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.figures = path, path / "figures"
        self.config, self.results = path / "config.yaml", path / "results.json"
        self.fit_sequences = path / "fit-sequences.safetensors"  # a sample of them; see apc.data.overlap
        self.codebook, self.predictor = path / "codebook.safetensors", path / "predictor.safetensors"  # before tuning

    def tuned(self, name: str) -> Path:
        """The codebook or the predictor (`name`) after tuning."""
        return self.path / f"tuned-{name}.safetensors"

    def checkpoint(self, stage: str) -> Path:
        """Where a training of this stage resumes from."""
        return self.path / "checkpoints" / f"{stage}.ckpt"

    def history(self, stage: str) -> Path:
        """The record of a finished training."""
        return self.path / f"{stage}.json"


@dataclass(frozen=True)
class LoadedRun:
    """A run's codebook, predictor and results.

    The tuned ones if the run was tuned, None for those that do not exist yet.
    """

    folder: RunFolder
    config: Config
    codebook: Codebook | None
    predictor: Predictor | None
    results: dict | None

    @property
    def best_policy(self) -> str | None:
        """The policy with the lowest perplexity in the results, without the dense model and bounds; None: no results.

        `sparsify` with policy=None uses the policy that the predictor was trained for.
        """
        best = tables.best_policy((self.results or {}).get("policies") or [])
        return None if best is None else best["policy"]


def load_run(folder: str | Path) -> LoadedRun:
    """Everything in a run's folder. Raises UserError, naming the file, if it is not a run or a file is damaged."""
    run = RunFolder(Path(folder))
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run folder (no config.yaml); give one that train.py wrote, e.g. runs/NAME")
    tuned = run.tuned("codebook").is_file()
    codebook, predictor = (run.tuned("codebook"), run.tuned("predictor")) if tuned else (run.codebook, run.predictor)
    return LoadedRun(
        run,
        load_saved(run.config),
        Codebook.load(codebook) if codebook.is_file() else None,
        Predictor.load(predictor) if predictor.is_file() else None,
        read_results(run.results),
    )


def read_json(path: Path) -> dict | None:
    """The file's content; None if there is no file. Raises UserError if it can't be read."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run again") from error


def read_results(path: Path) -> dict | None:
    """A run's results.json in today's names, also from version 0.1; None if there is none. May raise UserError."""
    results = _with_new_names(read_json(path))
    if results is not None and not _is_complete(results):
        raise UserError(f"{path}: damaged (not the results of a run); delete it and run again")
    return results


def _is_complete(results: object) -> bool:
    policies, conditions = map(results.get, ("policies", "conditions")) if isinstance(results, dict) else (None, None)
    return (
        isinstance(conditions, dict)
        and {"model", "split", "k", "density", "sites"} <= conditions.keys()
        and isinstance(policies, list)
        and all(isinstance(policy, dict) and "policy" in policy for policy in policies)
        and all(isinstance(policy.get(key), _NUMBER) for policy in policies for key in ("perplexity", "ratio"))
    )


def _with_new_names(value: Any) -> Any:
    """Replaces the keys of version 0.1: arm and arms by policy and policies, ones by centroid_size."""
    names = {"arm": "policy", "arms": "policies", "ones": "centroid_size"}
    if isinstance(value, dict):
        return {names.get(key, key): _with_new_names(item) for key, item in value.items()}
    return [_with_new_names(item) for item in value] if isinstance(value, list) else value


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def stage_records(run: RunFolder) -> dict[str, dict]:
    """The finished trainings' records by stage: histories, cluster sizes, figures per layer."""
    records = {stage: read_json(run.history(stage)) for stage in ("cluster", "predictor", "tune")}
    return {stage: record for stage, record in records.items() if record is not None}


@contextmanager
def open_run(cfg: Config) -> Iterator[RunFolder]:
    """Creates the run's folder, or resumes an existing one, and locks it during the block.

    Raises UserError if run.name can't be a folder's name, the folder holds a run of another configuration, or another
    process works in it.
    """
    check_names(cfg)
    run = RunFolder(Path(cfg.run.dir) / (cfg.run.name or new_name()))
    if run.config.is_file():
        check_same(run, cfg)
    distributed.barrier()  # every rank has checked before one writes
    with ExitStack() as stack:
        if distributed.is_main():
            busy = f"{run.path}: another process works in this run; wait until it ends, or choose another run.name"
            try:
                (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(run.path / ".lock", busy))
                write_atomic(run.config, to_yaml(cfg).encode())
                write_json(run.path / "provenance.json", provenance())
            except OSError as error:
                raise UserError(
                    f"{run.path}: can't be written ({error.strerror}); choose another folder with run.dir=FOLDER"
                ) from error
        distributed.barrier()
        yield run


def new_name() -> str:
    """A name for a run: date, time and a random suffix."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def check_same(run: RunFolder, cfg: Config) -> None:
    """Raises UserError, naming the first difference, if the folder's stages ran under another configuration."""
    stages = (
        (run.tuned("codebook"), run.checkpoint("tune"), TUNE_KEYS),
        (run.predictor, run.checkpoint("predictor"), PREDICT_KEYS),
        (run.codebook, run.checkpoint("cluster"), CLUSTER_KEYS),
    )
    keys: tuple[str, ...] = next((keys for *paths, keys in stages if any(path.exists() for path in paths)), ())
    fixed = [name for name in flat(cfg) if name not in FREE_KEYS]
    names = [name for key in keys for name in fixed if key in (name, name.partition(".")[0])]
    _check_equal(run, cfg, names, "a run")


def check_scored(run: RunFolder, cfg: Config) -> None:
    """Raises UserError, naming the first difference, if the folder's results are of other policies or another text."""
    _check_equal(run, cfg, ["policies", "speed", *SCORE_KEYS], "results")


def _check_equal(run: RunFolder, cfg: Config, keys: list[str], held: str) -> None:
    old, new = flat(load_saved(run.config)), flat(cfg)
    for key in keys:
        if old[key] != new[key]:
            raise UserError(
                f"{run.path}: holds {held} with {key}={old[key]}, this one has {key}={new[key]}; "
                "choose another run.name"
            )


def provenance() -> dict:
    """Commit, package versions and time."""
    packages = ("torch", "transformers", "pytorch-lightning", "triton", "datasets", "wandb")
    return {
        "commit": commit(),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {name: installed_version(name) for name in packages},
    }


def commit() -> str | None:
    """The checkout's commit, with `+` if tracked files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # an installed package, maybe in a checkout
        return None
    head = git("rev-parse", "--short", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


class Stopwatch:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began
        self._began = now
