"""Runs the grid of a W&B sweep file on this machine, without a server.

apc sweep configs/sweep/demo.yaml                    every combination, one after the other, or one on each GPU
apc sweep configs/sweep/demo.yaml data.fit=a.txt     with overrides for all of them
apc sweep configs/sweep/demo.yaml --dry-run          prints the runs and stops

A run's name is the sweep's name and the run's own values; W&B groups the runs by sweep. The same command resumes a
sweep: it skips finished runs and resumes the others. It writes a row per policy of each finished run to
<run.dir>/<sweep>.csv, and compares the runs in <run.dir>/<sweep>.comparison/, as `evaluate.py compare=` does.
"""

import argparse
import csv
import io
import itertools
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

from apc.config.load import CONFIGS, as_word, load_config
from apc.config.schema import Config
from apc.run.folder import RunFolder, check_same, check_scored, read_results
from apc.sparse.policies import check_policies
from apc.utils.errors import Terminated, UserError, first_line
from apc.utils.files import write_atomic
from apc.utils.packages import require_extra

# Runs that agree on these keys collect the same patterns.
PATTERN_KEYS = ("sites", "sparsity", "active", "model", "data", "collect", "monitor")
# Code for `python -c`. It runs the command in its arguments, and that command gets a SIGTERM when this process ends,
# even by SIGKILL (prctl(2), PR_SET_PDEATHSIG).
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)
FIGURES = (
    *("density", "coverage", "precision", "captured_importance", "captured_energy"),
    *("perplexity", "ratio", "bits", "bytes_share", "flops_share"),
)


@dataclass(frozen=True)
class Trial:
    """One combination of the sweep."""

    name: str
    values: dict[str, object]  # of the parameters with more than one value
    words: list[str]  # all arguments of train.py
    config: Config

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.config.run.dir) / self.name)

    @property
    def log(self) -> Path:
        """The file with the run's output."""
        return Path(self.config.run.dir) / f"{self.name}.log"

    @property
    def finished(self) -> bool:
        """Whether the run has results, with `speed=true` also those of speed.

        Raises UserError if they are from another configuration, other text or other policies.
        """
        results = read_results(self.folder.results)
        if results is None:
            return False
        check_same(self.folder, self.config)
        check_scored(self.folder, self.config)
        return not self.config.speed or "speed" in results


def read_sweep(path: Path) -> tuple[str, dict[str, list]]:
    """A sweep file's program, and each parameter's values. Raises UserError, naming the file, if it is not a grid."""
    try:
        sweep = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); give a sweep file, e.g. configs/sweep/demo.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: can't be read as YAML ({first_line(error)})") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or not sweep["parameters"]:
        raise UserError(f"{path}: not a sweep; it needs `parameters:` with a list of values for each key")
    if sweep.get("method") != "grid":
        raise UserError(
            f"{path}: method {sweep.get('method')} needs W&B's server (`wandb sweep {path}`); "
            "only `method: grid` runs here"
        )
    values = {}
    for key, choice in sweep["parameters"].items():
        choice = choice if isinstance(choice, dict) else {}
        single = [choice["value"]] if "value" in choice else []
        values[key] = choice["values"] if isinstance(choice.get("values"), list) else single
        if not values[key]:
            raise UserError(f"{path}: parameters.{key} needs `values: [...]` or `value: ...`")
    return sweep.get("program", "train.py"), values


def trials(sweep: str, parameters: dict[str, list], overrides: list[str]) -> list[Trial]:
    """All combinations as valid configurations.

    Raises UserError for the first invalid one, for two with the same name, and for an override of a swept key.
    """
    for word in overrides:
        if (key := word.partition("=")[0]) in parameters:
            raise UserError(f"{word}: the sweep sets {key} itself; change that in its file")
    by_name: dict[str, Trial] = {}
    for combination in itertools.product(*parameters.values()):
        chosen = dict(zip(parameters, combination, strict=True))
        values = {key: value for key, value in chosen.items() if len(parameters[key]) > 1}
        parts = [_short(key, value) for key, value in values.items()]
        name = "-".join(parts if parts and re.match(rf"{re.escape(sweep)}(-|$)", parts[0]) else [sweep, *parts])
        words = [f"{key}={as_word(value)}" for key, value in chosen.items()]
        words += [*overrides, f"run.name={name}", f"tracking.group={sweep}"]
        if name in by_name:
            raise UserError(
                f"two combinations of the sweep are both called {name}; give values that differ in letters or digits"
            )
        cfg = load_config(None, words)
        check_policies(cfg)
        by_name[name] = Trial(name, values, words, cfg)
    return list(by_name.values())


def _short(key: str, value: object) -> str:
    """A parameter's part of a run's name: a group file's name, or the last word of the key and the value."""
    if (CONFIGS / key).is_dir():
        return str(value)
    return key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._]+", "_", str(value))


def run(grid: list[Trial], program: str, jobs: int, gpus: int) -> list[str]:
    """Runs the unfinished trials, `jobs` at a time, each on its own GPU if there are several.

    Returns a line per failed run. On a SIGTERM it passes the signal to its runs, waits until they have saved their
    state, and raises Terminated.
    """
    launcher = [program] if Path(program).is_file() else ["-m", "apc", Path(program).stem]
    places: queue.Queue[int] = queue.Queue()
    running: dict[str, subprocess.Popen] = {}
    asked = threading.Event()

    def ask(signum: int, frame: object) -> None:
        asked.set()
        for process in list(running.values()):
            process.terminate()

    for place in range(jobs):
        places.put(place)

    def one(trial: Trial) -> str | None:
        if trial.finished:
            print(f"{trial.name}: already finished", flush=True)
            return None
        place = places.get()
        if asked.is_set():
            places.put(place)
            return None
        try:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus > 1 else {})
            trial.log.parent.mkdir(parents=True, exist_ok=True)
            print(f"{trial.name}: running, output in {trial.log}", flush=True)
            with open(trial.log, "w") as log:
                command = [sys.executable, "-c", _DIES_WITH_PARENT, sys.executable, *launcher, *trial.words]
                running[trial.name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                if asked.is_set():  # the signal came during the start
                    running[trial.name].terminate()
                code = running[trial.name].wait()
        finally:
            running.pop(trial.name, None)
            places.put(place)
        if code == 0:
            print(f"{trial.name}: done", flush=True)
            return None
        last = (trial.log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        print(f"{trial.name}: FAILED ({code}): {last}", flush=True)
        return f"{trial.name}: exit code {code}: {last}"

    # One trial for each set of patterns goes first: the others then find those patterns on the disk.
    shared = [trial for trial in reversed(grid) if trial.config.collect.storage == "disk"]
    first = {str([getattr(trial.config, key) for key in PATTERN_KEYS]): trial for trial in shared}.values()
    before = signal.signal(signal.SIGTERM, ask)
    try:
        with ThreadPoolExecutor(jobs) as workers:
            lines = [*workers.map(one, first), *workers.map(one, [trial for trial in grid if trial not in first])]
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        raise Terminated
    return [line for line in lines if line]


def summary(grid: list[Trial]) -> str:
    """CSV with a row per policy of each finished run."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["run", *grid[0].values, "policy", *FIGURES])
    for trial in grid:
        for record in (read_results(trial.folder.results) or {}).get("policies", []):
            figures = (record.get(figure) for figure in FIGURES)
            table.writerow([trial.name, *trial.values.values(), record["policy"], *figures])
    return out.getvalue()


def main(words: list[str] | None = None) -> None:
    """The command `apc sweep`. words: its arguments; None: those of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="apc sweep", description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path, help="a W&B sweep file, method grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one per GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    parser.add_argument("--wide", action="store_true", help="print the table with all columns, in lines of any length")
    options = parser.parse_intermixed_args(words)
    require_extra("train")
    from apc.compare import tables
    from apc.compare.finished import read_finished

    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    program, parameters = read_sweep(options.file)
    grid = trials(options.file.stem, parameters, options.overrides)
    if options.dry_run:
        for trial in grid:
            print(f"{'finished' if trial.finished else 'to run  '}  {program} {' '.join(trial.words)}")
        return
    gpus = torch.cuda.device_count()
    failed = run(grid, program, options.jobs or max(1, gpus), gpus)
    path = Path(grid[0].config.run.dir) / f"{options.file.stem}.csv"
    write_atomic(path, summary(grid).encode())
    finished = [read_finished(trial.folder.path) for trial in grid if trial.folder.results.is_file()]
    if finished:
        print(f"\n{tables.compare(finished, path.with_suffix('.comparison'), options.wide)}\n")
    print(f"{len(grid) - len(failed)} of {len(grid)} runs finished; {path}")
    if failed:
        print("\n".join(["error: these failed; the same command tries them again", *failed]), file=sys.stderr)
        sys.exit(1)
