"""Runs the grids of W&B sweep files on this machine, without a server.

apc sweep configs/sweep/demo.yaml                    every combination, one after the other, or one on each GPU
apc sweep configs/sweep/demo.yaml data.fit=a.txt     with overrides for all of them
apc sweep configs/sweep/demo.yaml --dry-run          prints the runs and stops
apc sweep configs/sweep/demo.yaml --jobs 3           up to three runs at a time, as far as the GPUs' memory allows
apc sweep configs/sweep/demo.yaml --minutes 9        a part of nine minutes; the same command runs the next part
apc sweep a.yaml b.yaml                              the runs of several files, in one table

A run's name is the sweep's name and the run's own values; W&B groups the runs by sweep. The same command resumes a
sweep: it skips finished runs and resumes the others. It writes a row per policy of each finished run to
<run.dir>/<sweep>.csv, and compares the runs in <run.dir>/<sweep>.comparison/, as `evaluate.py compare=` does.

With more jobs than GPUs, runs share GPUs. A run starts beside others if as much memory is left as the largest finished
run of the sweep held of its GPU (`gpu_bytes` in results.json) and 1 GB for its process; until a run has finished, none
starts beside another. A run that lacks memory beside others is repeated once, alone on a GPU. Runs with speed=true
never share one. With --minutes, no run starts after that time, and running ones are asked to save their state and end;
the exit code is then 143, as after a SIGTERM.

A run's command comes from the file's `command:`, which is read as W&B's agent reads it. The default is ${env}
${interpreter} ${program} ${args_no_hyphens}. Words after the program (a YAML file, overrides) apply to every run.
"""

import argparse
import csv
import io
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from apc.commands.shared_gpus import Guest, SharedGPUs, free_gpu_memory
from apc.config.load import CONFIGS, load_config, split_file
from apc.config.schema import Config
from apc.config.values import as_word, parse_yaml, typed
from apc.run.folder import RunFolder, check_same, check_scored, read_results
from apc.sparse.policies import check_policies
from apc.utils.errors import Terminated, UserError
from apc.utils.exits import GPU_IS_FULL
from apc.utils.files import write_atomic
from apc.utils.packages import require_extra

# Runs that agree on these keys collect the same patterns.
PATTERN_KEYS = ("sites", "sparsity", "active", "model", "data", "collect", "monitor")
# Code for `python -c`. It runs the command in its arguments, and that command gets a SIGTERM when this process ends,
# even by SIGKILL (prctl(2), PR_SET_PDEATHSIG).
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execvp(sys.argv[1], sys.argv[1:])"
)
_PAUSE = 0.1  # seconds between two looks at the running trials
COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
# Entries of a sweep file that only W&B's server uses.
SERVER_KEYS = ("name", "description", "entity", "metric", "early_terminate", "run_cap")
FIGURES = (
    *("density", "coverage", "precision", "captured_importance", "captured_energy"),
    *("perplexity", "ratio", "bits", "bytes_share", "flops_share"),
)


@dataclass(frozen=True)
class Sweep:
    """A sweep file's grid, and the words of its runs' command."""

    name: str
    program: str
    launcher: list[str]  # the words of the command up to the program
    before: list[str]  # the program's arguments before the parameters
    after: list[str]  # those after them
    parameters: dict[str, list]

    @property
    def command(self) -> list[str]:
        """The words that start a run, up to and including the program."""
        program = [self.program] if Path(self.program).is_file() else ["-m", "apc", Path(self.program).stem]
        meanings = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": program}
        return [part for word in self.launcher for part in meanings.get(word, [word])]

    @property
    def shown(self) -> list[str]:
        """The same as `--dry-run` prints it."""
        return [self.program] if "${program}" in self.launcher else self.launcher


@dataclass(frozen=True)
class Trial:
    """One combination of a sweep."""

    sweep: Sweep
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
        return self.config.speed != "true" or "speed" in results


def read_sweep(path: Path) -> Sweep:
    """A sweep file. Raises UserError, naming the file, if it is not a grid or has an unsupported entry."""
    try:
        sweep = parse_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); give a sweep file, e.g. configs/sweep/demo.yaml"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: can't be read as YAML ({error})") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or not sweep["parameters"]:
        raise UserError(f"{path}: not a sweep; it needs `parameters:` with a list of values for each key")
    if sweep.get("method") != "grid":
        raise UserError(
            f"{path}: method {sweep.get('method')} needs W&B's server (`wandb sweep {path}`); "
            "only `method: grid` runs here"
        )
    known = ("program", "method", "command", "parameters", "project", *SERVER_KEYS)
    if unknown := [key for key in sweep if key not in known]:
        raise UserError(f"{path}: {', '.join(unknown)}: apc sweep knows only {', '.join(known)}; leave it out")
    if unused := [key for key in SERVER_KEYS if key in sweep]:
        print(f"note: {path}: only W&B's server uses {', '.join(unused)}; apc sweep does not", file=sys.stderr)
    try:
        parameters: dict[str, list] = {}
        _read_parameters(sweep["parameters"], "", parameters)
        launcher, before, after = _command(sweep.get("command", COMMAND))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    chosen = [*parameters, *(word.partition("=")[0] for word in (*before, *after))]
    if "project" in sweep and "tracking.project" not in chosen:
        before = [*before, f"tracking.project={as_word(typed('tracking.project', sweep['project']))}"]
    return Sweep(path.stem, sweep.get("program", "train.py"), launcher, before, after, parameters)


def _read_parameters(entries: dict, prefix: str, into: dict[str, list]) -> None:
    """Puts each parameter's values into `into`; nested `parameters:` make dotted keys. Raises ValueError."""
    for name, entry in entries.items():
        key, choice = f"{prefix}{name}", entry if isinstance(entry, dict) else {}
        if list(choice) == ["parameters"] and isinstance(choice["parameters"], dict):
            _read_parameters(choice["parameters"], f"{key}.", into)
            continue
        values = [choice["value"]] if "value" in choice else choice.get("values")
        extra = {*choice} - {"value" if "value" in choice else "values"}
        if choice.get("distribution") in ("categorical", "constant"):  # redundant
            extra.remove("distribution")
        if not isinstance(values, list) or not values or extra:
            advice = f", and nothing else; it has {', '.join(sorted(extra))}" if extra else ""
            raise ValueError(f"parameters.{key} needs `values: [...]` or `value: ...`{advice}")
        if key in into:
            raise ValueError(f"parameters.{key} is given twice; leave one out")
        into[key] = [typed(key, value) for value in values]


def _command(command: object) -> tuple[list[str], list[str], list[str]]:
    """The words of a sweep's `command:` up to the program; its arguments before and after the parameters.

    Raises ValueError for words that `apc sweep` does not support.
    """
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise ValueError(f"command: must be a list of words, such as [{', '.join(COMMAND)}]")
    for word in command:
        if word.startswith("${") and word.endswith("}") and word not in COMMAND and not word.startswith("${envvar:"):
            known = f"{', '.join(COMMAND)} and ${{envvar:NAME}}"
            raise ValueError(f"command: {word}: apc sweep can't fill this in; train.py reads key=value, so use {known}")
    starts = [i for i, word in enumerate(command) if word == "${program}" or Path(word).stem == "train"]
    if not starts:
        raise ValueError("command: has no ${program}; write it before the arguments")
    start = starts[0] + 1
    if command[start:].count("${args_no_hyphens}") != 1:
        raise ValueError("command: needs exactly one ${args_no_hyphens} after the program, for the run's values")
    place = command.index("${args_no_hyphens}", start)
    words = [_from_environment(word) for word in command]
    launcher, before, after = words[:start], words[start:place], words[place + 1 :]
    for word in (*before, *after):
        if word.startswith("-") and word != "--wide":
            raise ValueError(f"command: {word}: apc sweep can't pass this on to a run; leave it out")
    return launcher, before, after


def _from_environment(word: str) -> str:
    """The word with each `${envvar:NAME}` replaced. Raises ValueError for a variable that is not set."""

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"command: {match[0]}: {match[1]} is not set in the environment; set it")
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:([^}]*)\}", value, str(word))


def trials(sweep: Sweep, overrides: list[str]) -> list[Trial]:
    """All combinations as valid configurations. overrides: apply to all runs, after the file's own words.

    Raises UserError for the first invalid one, for two with the same name, and for an override of a swept key.
    """
    given = [word.partition("=")[0] for word in (*sweep.before, *sweep.after, *overrides)]
    for key in (*given, *sweep.parameters):
        if key == "run.name":
            raise UserError("run.name: apc sweep names the runs; leave it out")
    for key, word in zip(given, (*sweep.before, *sweep.after, *overrides), strict=True):
        if key in sweep.parameters:
            raise UserError(f"{word}: the sweep sets {key} itself; change that in its file")
    by_name: dict[str, Trial] = {}
    for combination in itertools.product(*sweep.parameters.values()):
        chosen = dict(zip(sweep.parameters, combination, strict=True))
        values = {key: value for key, value in chosen.items() if len(sweep.parameters[key]) > 1}
        parts = [_short(key, value) for key, value in values.items()]
        named = bool(parts) and re.match(rf"{re.escape(sweep.name)}(-|$)", parts[0])
        name = "-".join(parts if named else [sweep.name, *parts])
        words = [*sweep.before, *(f"{key}={as_word(value)}" for key, value in chosen.items()), *sweep.after, *overrides]
        words.append(f"run.name={as_word(name)}")
        if "tracking.group" not in (*given, *sweep.parameters):
            words.append(f"tracking.group={as_word(sweep.name)}")
        if len(f"{name}.log".encode()) > 255:
            raise UserError(f"{name[:40]}…: too long for the name of a run and its log; shorten the sweep's file name")
        if name in by_name:
            raise UserError(
                f"two combinations of the sweep are both called {name}; give values that differ in letters or digits"
            )
        file, changes = split_file([word for word in words if word != "--wide"])
        cfg = load_config(file, changes)
        check_policies(cfg)
        by_name[name] = Trial(sweep, name, values, words, cfg)
    return list(by_name.values())


def _short(key: str, value: object) -> str:
    """A parameter's part of a run's name: a group file's name, or the last word of the key and the value."""
    if (CONFIGS / key).is_dir():
        return str(value)
    return key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._]+", "_", str(value))


@dataclass(eq=False)
class Process:
    """A trial that runs."""

    trial: Trial
    popen: subprocess.Popen
    guest: Guest | None  # its place on a GPU


class Runner:
    """Runs trials, `jobs` at a time, each on the GPU with the fewest of them.

    gpus: their number; minutes: after so many, all runs are stopped; free_memory: see `SharedGPUs`.
    """

    def __init__(
        self,
        jobs: int,
        gpus: int,
        minutes: float | None = None,
        free_memory: Callable[[int], int] = free_gpu_memory,
    ) -> None:
        self.jobs = jobs
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.gpus = SharedGPUs(gpus, jobs, free_memory) if gpus else None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",") if visible else list(map(str, range(gpus)))
        self.running: list[Process] = []
        self.waiting: deque[Trial] = deque()
        self.again: deque[Trial] = deque()  # those that lacked memory beside others; each gets a GPU alone
        self.failed: list[str] = []  # a line for each
        self.stopped = False

    def stop(self, *_: object) -> None:
        """Asks the running trials to save their state and end, and starts no other. Usable as a signal handler."""
        self.stopped = True
        for process in list(self.running):
            process.popen.terminate()

    def run(self, trials: list[Trial]) -> None:
        """Runs the unfinished ones of these trials until all have ended, or until it is stopped.

        Raises UserError, before any starts, if the folder of one holds another run.
        """
        for trial in trials:
            if trial.finished:
                self._learn(trial)
                print(f"{trial.name}: already finished", flush=True)
            else:
                self.waiting.append(trial)
        told = set()  # names of the trials that were said to wait
        try:
            while self.running or ((self.waiting or self.again) and not self.stopped):
                if time.monotonic() >= self.deadline and not self.stopped:
                    self.stop()
                for process in list(self.running):
                    code = process.popen.poll()
                    if code is not None:
                        self._end(process, code)
                queue = self.again or self.waiting  # the former first, or others would keep all GPUs busy
                if queue and len(self.running) < self.jobs and not self.stopped:
                    alone = (
                        queue is self.again or queue[0].config.speed == "true"
                    )  # other runs would slow a measurement down
                    gpu, lacks = self._find_gpu(queue[0], alone)
                    if not lacks:
                        self._start(queue.popleft(), gpu, alone)
                        continue
                    if queue[0].name not in told:
                        told.add(queue[0].name)
                        print(f"{queue[0].name}: waits for {lacks}", flush=True)
                time.sleep(_PAUSE)
        except BaseException:  # Ctrl-C too: no run stays behind
            self.stop()
            for process in self.running:
                process.popen.wait()
            raise

    def _learn(self, trial: Trial) -> None:
        """Notes what GPU memory a finished trial held: in its last process, and in those that ended its trainings."""
        if self.gpus is not None:
            results = read_results(trial.folder.results) or {}
            parts = (results, *(results.get(stage) or {} for stage in ("cluster", "predictor", "tune")))
            self.gpus.learn(max(part.get("gpu_bytes") or 0 for part in parts))

    def _find_gpu(self, trial: Trial, alone: bool) -> tuple[int | None, str]:
        """The GPU for a trial, None if it uses none; and what it has to wait for, empty if nothing."""
        if self.gpus is None or trial.config.model.device == "cpu":
            return None, ""
        return self.gpus.find(alone)

    def _start(self, trial: Trial, gpu: int | None, alone: bool) -> None:
        environment = dict(os.environ)
        if gpu is not None and len(self.devices) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[gpu].strip()
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{trial.name}: running, output in {trial.log}", flush=True)
        guest = None if gpu is None or self.gpus is None else self.gpus.enter(trial.name, gpu, alone)
        with open(trial.log, "w") as log:
            command = [sys.executable, "-c", _DIES_WITH_PARENT, *trial.sweep.command, *trial.words]
            popen = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running.append(Process(trial, popen, guest))
        if self.stopped:  # a signal came during the start
            popen.terminate()

    def _end(self, process: Process, code: int) -> None:
        self.running.remove(process)
        trial, guest = process.trial, process.guest
        if guest is not None and self.gpus is not None:
            self.gpus.leave(guest)
        lines = (trial.log.read_text(errors="replace").strip() or "no output").splitlines()
        if code == 0:
            self._learn(trial)
            print(f"{trial.name}: done", flush=True)
        elif self.stopped:
            print(f"{trial.name}: stopped ({code})", flush=True)
        elif guest is not None and guest.had_company and any(line.startswith(GPU_IS_FULL) for line in lines):
            self.again.append(trial)
            print(f"{trial.name}: lacked GPU memory beside other runs; is repeated alone on a GPU", flush=True)
        else:
            self.failed.append(f"{trial.name}: exit code {code}: {lines[-1]}")
            print(f"{trial.name}: FAILED ({code}): {lines[-1]}", flush=True)


def run(grid: list[Trial], runner: Runner) -> list[str]:
    """Runs the unfinished trials; returns a line for each that failed.

    At the deadline, or on a SIGTERM, it passes a SIGTERM to the running trials, waits until they have saved their
    state, and raises Terminated. Raises UserError as `Runner.run` does.
    """
    # One trial for each set of patterns goes first: the others then find those patterns on the disk.
    shared = [trial for trial in reversed(grid) if trial.config.collect.storage == "disk"]
    first = list({str([getattr(trial.config, key) for key in PATTERN_KEYS]): trial for trial in shared}.values())
    before = signal.signal(signal.SIGTERM, runner.stop)
    try:
        runner.run(first)
        if not runner.stopped:
            runner.run([trial for trial in grid if trial not in first])
    finally:
        signal.signal(signal.SIGTERM, before)
    if runner.stopped:
        if time.monotonic() >= runner.deadline:
            finished = sum(trial.finished for trial in grid)
            print(f"time is up; {finished} of {len(grid)} runs have finished", flush=True)
        raise Terminated
    return runner.failed


def summary(grid: list[Trial]) -> str:
    """CSV with a row per policy of each finished run."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    keys = list(dict.fromkeys(key for trial in grid for key in trial.values))
    table.writerow(["run", *keys, "policy", *FIGURES])
    for trial in grid:
        for record in (read_results(trial.folder.results) or {}).get("policies", []):
            figures = (record.get(figure) for figure in FIGURES)
            table.writerow([trial.name, *map(trial.values.get, keys), record["policy"], *figures])
    return out.getvalue()


def main(words: list[str] | None = None) -> None:
    """The command `apc sweep`. words: its arguments; None: those of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="apc sweep", description=__doc__, formatter_class=raw)
    what = "W&B sweep files, method grid; then overrides for every run"
    parser.add_argument("words", nargs="+", metavar="FILE or key=value", help=what)
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one per GPU")
    what = "stop all runs after so many minutes; the same command goes on from there"
    parser.add_argument("--minutes", type=float, metavar="N", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    parser.add_argument("--wide", action="store_true", help="print the table with all columns, in lines of any length")
    options = parser.parse_intermixed_args(words)
    require_extra("train")
    from apc.compare import tables
    from apc.compare.finished import read_finished

    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"--minutes must be more than 0, got {options.minutes:g}")
    files = list(itertools.takewhile(lambda word: "=" not in word, options.words))
    sweeps = [read_sweep(Path(file)) for file in files]
    if not sweeps:
        raise UserError(f"{options.words[0]}: not a sweep file; give one first, e.g. configs/sweep/demo.yaml")
    grid = [trial for sweep in sweeps for trial in trials(sweep, options.words[len(files) :])]
    for name, count in Counter(trial.name for trial in grid).items():
        if count > 1:
            raise UserError(f"two of the sweep files have a run called {name}; rename one of the files")
    if options.dry_run:
        for trial in grid:
            shown = shlex.join([*trial.sweep.shown, *trial.words])
            print(f"{'finished' if trial.finished else 'to run  '}  {shown}")
        return
    gpus = torch.cuda.device_count()
    failed = run(grid, Runner(options.jobs or max(1, gpus), gpus, options.minutes))
    path = Path(grid[0].config.run.dir) / f"{'+'.join(sweep.name for sweep in sweeps)}.csv"
    write_atomic(path, summary(grid).encode())
    finished = [read_finished(trial.folder.path) for trial in grid if trial.folder.results.is_file()]
    if finished:
        print(f"\n{tables.compare(finished, path.with_suffix('.comparison'), options.wide)}\n")
    print(f"{len(grid) - len(failed)} of {len(grid)} runs finished; {path}")
    if failed:
        print("\n".join(["error: these failed; the same command tries them again", *failed]), file=sys.stderr)
        sys.exit(1)
