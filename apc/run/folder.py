"""The folder that a run leaves, and reading it back.

runs/<name>/config.yaml, provenance.json, metrics.jsonl, checkpoints/, codebook.safetensors, predictor.safetensors,
            results.json, figures/*.png, wandb/
"""

import fcntl
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from apc.cluster.codebook import Codebook
from apc.config.load import load_saved, to_dict, to_yaml
from apc.config.schema import Config
from apc.predict.predictor import Predictor
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.files import write_atomic

# What decides a stage's outcome; a run folder is taken up again only by a run that agrees on what it already holds.
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
# Among those, what may differ: where things lie and run.
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
        return self.path / "config.yaml"

    @property
    def codebook(self) -> Path:
        return self.path / "codebook.safetensors"

    @property
    def predictor(self) -> Path:
        return self.path / "predictor.safetensors"

    def tuned(self, what: str) -> Path:
        """what: codebook or predictor, as tuning left it."""
        return self.path / f"tuned-{what}.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def checkpoint(self, stage: str) -> Path:
        return self.path / "checkpoints" / f"{stage}.ckpt"

    def history(self, stage: str) -> Path:
        return self.path / f"{stage}.json"


@dataclass(frozen=True)
class LoadedRun:
    """What a run left: codebook, predictor and results are None where it did not get so far. Where it was tuned, codebook and predictor are the tuned
    ones."""

    folder: RunFolder
    config: Config
    codebook: Codebook | None
    predictor: Predictor | None
    results: dict | None


def load_run(folder: str | Path) -> LoadedRun:
    """Everything in a run's folder. Raises UserError, naming the file, if it is no run or something in it is damaged."""
    run = RunFolder(Path(folder))
    if not run.config.is_file():
        raise UserError(
            f"{run.path}: not a run folder (no config.yaml); give one that train.py left, e.g. checkpoint=runs/NAME"
        )
    tuned = run.tuned("codebook").is_file()
    of_codebook, of_predictor = (
        (run.tuned("codebook"), run.tuned("predictor")) if tuned else (run.codebook, run.predictor)
    )
    codebook = Codebook.load(of_codebook) if of_codebook.is_file() else None
    predictor = Predictor.load(of_predictor) if of_predictor.is_file() else None
    return LoadedRun(run, load_saved(run.config), codebook, predictor, read_results(run.results))


def read_json(path: Path) -> dict | None:
    """The file's content, None if there is no file. Raises UserError if it can't be read."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run again") from error


def read_results(path: Path) -> dict | None:
    """A run's results.json, also one of version 0.1, in today's words; None if there is no file.

    Raises UserError if it can't be read.
    """
    return _renamed(read_json(path))


def _renamed(value: object) -> object:
    """Results of version 0.1 say arm and arms for policy and policies, and ones for centroid_size."""
    names = {"arm": "policy", "arms": "policies", "ones": "centroid_size"}
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def stage_records(run: RunFolder) -> dict:
    """What the trainings noted for the report: histories, cluster sizes, figures by layer."""
    found = {stage: read_json(run.history(stage)) for stage in ("cluster", "predictor", "tune")}
    return {stage: record for stage, record in found.items() if record is not None}


@contextmanager
def open_run(cfg: Config) -> Iterator[RunFolder]:
    """Makes the run's folder, or takes an existing one up; within it no other process can.

    Raises UserError if what an existing one holds is of another configuration, or another process works in it.
    """
    run = RunFolder(Path(cfg.run.dir) / (cfg.run.name or new_name()))
    if run.config.is_file():
        check_same(run, cfg)
    distributed.barrier()  # every rank has looked before one writes
    with ExitStack() as held:
        if distributed.is_main():
            try:
                (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(
                    open(run.path / ".lock", "w")
                )  # which ends with the process, however that ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write_atomic(run.config, to_yaml(cfg).encode())
                write_json(run.path / "provenance.json", provenance())
            except BlockingIOError as error:
                raise UserError(
                    f"{run.path}: another process works in this run; wait until it ends, or choose another run.name"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{run.path}: can't be written ({error.strerror}); choose another folder with run.dir=FOLDER"
                ) from error
        distributed.barrier()
        yield run


def new_name() -> str:
    """Date and time, and something that tells runs of the same second apart."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _decisive(values: dict, keys: tuple[str, ...]) -> dict:
    chosen = {key: values.get(key) for key in keys}
    return {
        key: {name: item for name, item in value.items() if name not in FREE_KEYS.get(key, ())}
        if isinstance(value, dict)
        else value
        for key, value in chosen.items()
    }


def check_same(run: RunFolder, cfg: Config) -> None:
    """Raises UserError, naming the difference, if what a run's folder holds was made under another configuration."""
    old = to_dict(load_saved(run.config))
    clustered = any(path.exists() for path in (run.codebook, run.checkpoint("cluster")))
    predicted = any(path.exists() for path in (run.predictor, run.checkpoint("predictor")))
    tuned = any(path.exists() for path in (run.tuned("codebook"), run.checkpoint("tune")))
    keys = TUNE_KEYS if tuned else PREDICT_KEYS if predicted else CLUSTER_KEYS if clustered else ()
    before, after = _decisive(old, keys), _decisive(to_dict(cfg), keys)
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
    """Raises UserError, naming the difference, if a run's results are of other policies or of other scored text."""
    old = load_saved(run.config)
    for key in ("policies", "speed"):
        if getattr(old, key) != getattr(cfg, key):
            raise UserError(
                f"{run.path}: holds results with {key}={getattr(old, key)}, this one has {key}={getattr(cfg, key)}; choose another run.name"
            )
    for key in ("score", "score_windows", "in_sample"):
        one, other = getattr(old.data, key), getattr(cfg.data, key)
        if one != other:
            raise UserError(
                f"{run.path}: holds results with data.{key}={one}, this one has data.{key}={other}; choose another run.name"
            )


def provenance() -> dict:
    """Commit, versions and time: how to make the same again."""
    packages = ("torch", "transformers", "pytorch-lightning", "triton", "datasets", "wandb")
    return {
        "commit": commit(),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
    }


def commit() -> str | None:
    """The checkout's commit, with `+` if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


class Stopwatch:
    """Seconds that each stage took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap under `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began
        self._began = now
