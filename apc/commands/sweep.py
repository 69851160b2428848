"""Runs the grid of a W&B sweep file here, without a server.

apc sweep configs/sweep/demo.yaml                    every combination, one after the other, or one on each GPU
apc sweep configs/sweep/demo.yaml data.fit=a.txt     with overrides for all of them
apc sweep configs/sweep/demo.yaml --dry-run          what would run

Runs are named by the sweep and their own values, and W&B groups them by the sweep. The same command goes on where it was: finished runs are
left alone, others are taken up. The table of all policies of all finished runs is written to <run.dir>/<sweep>.csv, and they are set side by
side as by `evaluate.py compare=`, in <run.dir>/<sweep>.comparison/.
"""

import argparse
import csv
import io
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from apc.compare import tables
from apc.compare.finished import read_finished
from apc.config.load import CONFIGS, as_word, load_config, to_dict
from apc.config.schema import Config
from apc.run.folder import RunFolder, check_same, check_scored, read_results
from apc.sparse.policies import check_policies
from apc.utils.errors import Terminated, UserError
from apc.utils.files import write_atomic

PATTERN_KEYS = (
    "sites",
    "sparsity",
    "active",
    "model",
    "data",
    "collect",
    "monitor",
)  # of a configuration: what decides which patterns it collects
# Becomes the command after it, which gets a SIGTERM when this process is gone (prctl(2), PR_SET_PDEATHSIG), even if by SIGKILL.
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)
FIGURES = (
    "density",
    "coverage",
    "precision",
    "captured_importance",
    "captured_energy",
    "perplexity",
    "ratio",
    "bits",
    "bytes_share",
    "flops_share",
)


@dataclass(frozen=True)
class Trial:
    """One combination. values: those that differ between the runs; words: all, as train.py takes them."""

    name: str
    values: dict[str, object]
    words: list[str]
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run.dir) / self.name)

    @property
    def log(self) -> Path:
        return Path(self.config.run.dir) / f"{self.name}.log"

    @property
    def finished(self) -> bool:
        """Whether its results are there. Raises UserError if they are another configuration's, or of other text or policies."""
        if not self.folder.results.is_file():
            return False
        check_same(self.folder, self.config)
        check_scored(self.folder, self.config)
        return True


def read_sweep(path: Path) -> tuple[str, dict[str, list]]:
    """The program of a sweep file, and the values of each parameter. Raises UserError, naming the file, for what is no grid."""
    try:
        sweep = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); give a sweep file, e.g. configs/sweep/demo.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: can't be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or not sweep["parameters"]:
        raise UserError(f"{path}: not a sweep; it needs `parameters:` with a list of values for each key")
    if sweep.get("method") != "grid":
        raise UserError(
            f"{path}: method {sweep.get('method')} needs W&B's server (`wandb sweep {path}`); only `method: grid` runs here"
        )
    values = {}
    for key, choice in sweep["parameters"].items():
        found = choice if isinstance(choice, dict) else {}
        values[key] = (
            found["values"] if isinstance(found.get("values"), list) else [found["value"]] if "value" in found else []
        )
        if not values[key]:
            raise UserError(f"{path}: parameters.{key} needs `values: [...]` or `value: ...`")
    return sweep.get("program", "train.py"), values


def trials(sweep: str, parameters: dict[str, list], overrides: list[str]) -> list[Trial]:
    """All combinations, each checked as a configuration. Raises UserError for the first that is none, where two have one name, and for an
    override of what the sweep sets."""
    for word in overrides:
        if word.partition("=")[0] in parameters:
            raise UserError(f"{word}: the sweep sets {word.partition('=')[0]} itself; change that in its file")
    made: dict[str, Trial] = {}
    for combination in itertools.product(*parameters.values()):
        chosen = dict(zip(parameters, combination, strict=True))
        values = {key: value for key, value in chosen.items() if len(parameters[key]) > 1}
        parts = [_short(key, value) for key, value in values.items()]
        name = "-".join(parts if parts and re.match(rf"{re.escape(sweep)}(-|$)", parts[0]) else [sweep, *parts])
        words = [
            *(f"{key}={as_word(value)}" for key, value in chosen.items()),
            *overrides,
            f"run.name={name}",
            f"tracking.group={sweep}",
        ]
        if name in made:
            raise UserError(
                f"two combinations of the sweep are both called {name}; give values that differ in letters or digits"
            )
        made[name] = Trial(name, values, words, load_config(None, words))
        check_policies(made[name].config)
    return list(made.values())


def _short(key: str, value) -> str:
    """A parameter's part of a run's name: a group's file is its own name, anything else has the last word of its key before it."""
    return (
        str(value) if (CONFIGS / key).is_dir() else key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._]+", "_", str(value))
    )


def run(found: list[Trial], program: str, jobs: int, gpus: int) -> list[str]:
    """Runs what is not finished, `jobs` at a time, each on a GPU of its own where there are several; returns a line for each that failed.

    Asked to end (SIGTERM), it asks the runs at work to end, waits for what they keep, and raises Terminated.
    """
    launcher = [program] if Path(program).is_file() else ["-m", "apc", Path(program).stem]
    places: queue.Queue[int] = queue.Queue()
    at_work: dict[str, subprocess.Popen] = {}
    asked = threading.Event()

    def ask(signum: int, frame: object) -> None:
        asked.set()
        for process in list(at_work.values()):
            process.terminate()

    for place in range(jobs):
        places.put(place)

    def one(trial: Trial) -> str | None:
        if trial.finished:
            print(f"{trial.name}: finished before", flush=True)
            return None
        place = places.get()
        if asked.is_set():
            places.put(place)
            return None
        try:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus > 1 else {})
            trial.log.parent.mkdir(parents=True, exist_ok=True)
            print(f"{trial.name}: runs, {trial.log}", flush=True)
            with open(trial.log, "w") as log:
                command = [sys.executable, "-c", _DIES_WITH_PARENT, sys.executable, *launcher, *trial.words]
                at_work[trial.name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                if asked.is_set():  # while it was started
                    at_work[trial.name].terminate()
                code = at_work[trial.name].wait()
        finally:
            at_work.pop(trial.name, None)
            places.put(place)
        if code == 0:
            print(f"{trial.name}: done", flush=True)
            return None
        last = (trial.log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        print(f"{trial.name}: FAILED ({code}): {last}", flush=True)
        return f"{trial.name}: exit code {code}: {last}"

    # What is collected to the disk for one is found by all others of the same patterns, so one of each kind goes first.
    shared = [trial for trial in reversed(found) if trial.config.collect.storage == "disk"]
    first = {
        json.dumps([to_dict(trial.config)[key] for key in PATTERN_KEYS], sort_keys=True): trial for trial in shared
    }.values()
    before = signal.signal(signal.SIGTERM, ask)
    try:
        with ThreadPoolExecutor(jobs) as workers:
            lines = [
                *workers.map(one, list(first)),
                *workers.map(one, [trial for trial in found if trial not in first]),
            ]
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        raise Terminated
    return [line for line in lines if line]


def summary(found: list[Trial]) -> str:
    """CSV: a row for each policy of each finished run."""
    keys = list(found[0].values)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["run", *keys, "policy", *FIGURES])
    for trial in found:
        for record in (read_results(trial.folder.results) or {}).get("policies", []):
            table.writerow(
                [
                    trial.name,
                    *(trial.values[key] for key in keys),
                    record["policy"],
                    *(record.get(figure) for figure in FIGURES),
                ]
            )
    return out.getvalue()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="apc sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a W&B sweep file, method grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--jobs", type=int, help="runs at a time; as many as there are GPUs, or 1")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    options = parser.parse_intermixed_args(words)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    program, parameters = read_sweep(options.file)
    found = trials(options.file.stem, parameters, options.overrides)
    if options.dry_run:
        for trial in found:
            print(f"{'finished' if trial.finished else 'to run  '}  {program} {' '.join(trial.words)}")
        return
    gpus = torch.cuda.device_count()
    failed = run(found, program, options.jobs or max(1, gpus), gpus)
    path = Path(found[0].config.run.dir) / f"{options.file.stem}.csv"
    write_atomic(path, summary(found).encode())
    finished = [read_finished(trial.folder.path) for trial in found if trial.folder.results.is_file()]
    if finished:
        print(f"\n{tables.compare(finished, path.with_suffix('.comparison'))}\n")
    print(f"{len(found) - len(failed)} of {len(found)} runs finished; {path}")
    if failed:
        print("\n".join(["error: these failed; the same command tries them again", *failed]), file=sys.stderr)
        sys.exit(1)
