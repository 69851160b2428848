"""A run's folder: the names of its files, who may write to it, and reading it back.

runs/<name>/config.yaml, provenance.json, metrics.jsonl, checkpoints/, codebook.safetensors, predictor.safetensors,
            results.json, figures/*.png, wandb/
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
from apc.config.load import load_saved, to_dict, to_yaml
from apc.config.schema import Config
from apc.predict.predictor import Predictor
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.files import exclusive_lock, write_atomic
from apc.utils.packages import installed_version

# The keys that decide a stage's outcome. A run resumes a folder only if it agrees on those of the stages in the folder.
CLUSTER_KEYS = (
    "checkpoint",
    "seed",
    "sites",
    "sparsity",
    "active",
    "model",
    "data",
    "collect",
    "cluster",
    "monitor",
    "trainer",
)
PREDICT_KEYS = (*CLUSTER_KEYS, "predictor")
TUNE_KEYS = (*PREDICT_KEYS, "tune")
# Exceptions among those, by section: they say where a run works or what it scores, and may differ.
FREE_KEYS = {
    "collect": ("dir", "storage", "ffn_inputs"),
    "model": ("device",),
    "data": ("score", "score_windows", "in_sample"),
    "trainer": (
        "devices",
        "num_nodes",
        "precision",
        "batch_windows",
        "log_every_n_steps",
        "checkpoint_every_n_steps",
        "progress",
    ),
}


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration."""
        return self.path / "config.yaml"

    @property
    def codebook(self) -> Path:
        """The codebook before tuning."""
        return self.path / "codebook.safetensors"

    @property
    def predictor(self) -> Path:
        """The predictor before tuning."""
        return self.path / "predictor.safetensors"

    def tuned(self, name: str) -> Path:
        """The codebook or the predictor (`name`) after tuning."""
        return self.path / f"tuned-{name}.safetensors"

    @property
    def results(self) -> Path:
        """The evaluation's figures."""
        return self.path / "results.json"

    @property
    def figures(self) -> Path:
        """The folder with plots."""
        return self.path / "figures"

    def checkpoint(self, stage: str) -> Path:
        """Where a training of this stage resumes from."""
        return self.path / "checkpoints" / f"{stage}.ckpt"

    def history(self, stage: str) -> Path:
        """The record of a finished training."""
        return self.path / f"{stage}.json"


@dataclass(frozen=True)
class LoadedRun:
    """A run's codebook, predictor and results: the tuned ones if it was tuned, None for what it has not made yet."""

    folder: RunFolder
    config: Config
    codebook: Codebook | None
    predictor: Predictor | None
    results: dict | None


def load_run(folder: str | Path) -> LoadedRun:
    """Everything in a run's folder.

    Raises UserError, naming the file, if the folder is no run or a file in it is damaged.
    """
    run = RunFolder(Path(folder))
    if not run.config.is_file():
        raise UserError(
            f"{run.path}: not a run folder (no config.yaml); give one that train.py wrote, e.g. checkpoint=runs/NAME"
        )
    codebook_path, predictor_path = run.codebook, run.predictor
    if run.tuned("codebook").is_file():
        codebook_path, predictor_path = run.tuned("codebook"), run.tuned("predictor")
    codebook = Codebook.load(codebook_path) if codebook_path.is_file() else None
    predictor = Predictor.load(predictor_path) if predictor_path.is_file() else None
    return LoadedRun(run, load_saved(run.config), codebook, predictor, read_results(run.results))


def read_json(path: Path) -> dict | None:
    """The file's content; None if there is no file. Raises UserError if it can't be read."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run again") from error


def read_results(path: Path) -> dict | None:
    """A run's results.json in today's names, also from version 0.1; None if there is no file.

    Raises UserError if it can't be read.
    """
    return _with_new_names(read_json(path))


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

    Raises UserError if the folder holds a run of another configuration, or another process works in it.
    """
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


def _without_free_keys(values: dict, keys: tuple[str, ...]) -> dict:
    chosen = {key: values.get(key) for key in keys}
    return {
        key: {name: item for name, item in value.items() if name not in FREE_KEYS.get(key, ())}
        if isinstance(value, dict)
        else value
        for key, value in chosen.items()
    }


def check_same(run: RunFolder, cfg: Config) -> None:
    """Raises UserError, naming the first difference, if the folder's stages ran under another configuration."""
    old = to_dict(load_saved(run.config))
    clustered = any(path.exists() for path in (run.codebook, run.checkpoint("cluster")))
    predicted = any(path.exists() for path in (run.predictor, run.checkpoint("predictor")))
    tuned = any(path.exists() for path in (run.tuned("codebook"), run.checkpoint("tune")))
    keys = TUNE_KEYS if tuned else PREDICT_KEYS if predicted else CLUSTER_KEYS if clustered else ()
    before, after = _without_free_keys(old, keys), _without_free_keys(to_dict(cfg), keys)
    for key in keys:
        if before[key] != after[key]:
            if isinstance(after[key], dict) and isinstance(before[key], dict):
                name = next(name for name in after[key] if before[key][name] != after[key][name])
                key, one, other = f"{key}.{name}", before[key][name], after[key][name]
            else:
                one, other = before[key], after[key]
            raise UserError(
                f"{run.path}: holds a run with {key}={one}, this one has {key}={other}; choose another run.name"
            )


def check_scored(run: RunFolder, cfg: Config) -> None:
    """Raises UserError, naming the first difference, if the folder's results are of other policies or another text."""
    old = load_saved(run.config)
    pairs = [(key, getattr(old, key), getattr(cfg, key)) for key in ("policies", "speed")]
    pairs += [
        (f"data.{key}", getattr(old.data, key), getattr(cfg.data, key))
        for key in ("score", "score_windows", "in_sample")
    ]
    for key, one, other in pairs:
        if one != other:
            raise UserError(
                f"{run.path}: holds results with {key}={one}, this one has {key}={other}; choose another run.name"
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
