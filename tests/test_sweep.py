"""A sweep runs every combination of its grid once, resumes, and continues after a run that fails."""

import csv
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import tiny
from apc.commands import sweep
from apc.config.load import load_config
from apc.config.values import to_yaml
from apc.run.folder import load_run
from apc.utils.errors import Terminated, UserError

ROOT = Path(__file__).resolve().parent.parent
CONDITIONS = {"model": "x", "split": "held-out", "k": 1, "density": 0.5, "sites": ["neuron"]}
RESULTS = {"conditions": CONDITIONS, "policies": []}


def write_sweep(path, **parameters):
    lines = [
        f"  {key}: {{{'values' if isinstance(value, list) else 'value'}: {value}}}" for key, value in parameters.items()
    ]
    path.write_text("\n".join(["program: train.py", "method: grid", "parameters:", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("sweep"))


def words_for(workplace, **changes):
    return [
        word
        for word in tiny.tiny_overrides(workplace, **changes)
        if not word.startswith(("run.name=", "cluster.k=", "cluster.weighting=", "seed="))
    ]


def test_every_combination_runs_once_and_the_table_has_them_all(workplace, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = write_sweep(workplace / "grid.yaml", **{"cluster.k": [3, 100_000], "cluster.weighting": "binary"})
    words = [str(file), *words_for(workplace, policies="[dense,oracle]", **{"predictor.max_epochs": 1}), "--jobs", "2"]
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    output = capsys.readouterr()
    assert end.value.code == 1
    assert (
        "grid-k100000: exit code 2: error: cluster.k=100000 is more than the" in output.err
        and "1 of 2 runs finished" in output.out
    )
    run = load_run(workplace / "runs" / "grid-k3")
    assert run.codebook.k == 3 and run.config.cluster.weighting == "binary" and run.config.tracking.group == "grid"
    table = list(csv.DictReader((workplace / "runs" / "grid.csv").open()))
    assert [(row["run"], row["cluster.k"], row["policy"]) for row in table] == [
        ("grid-k3", "3", policy) for policy in ("dense", "oracle")
    ]  # fmt: skip
    compared = list(csv.DictReader((workplace / "runs" / "grid.comparison" / "comparison.csv").open()))
    assert [(row["run"], row["policy"], row["split"]) for row in compared] == [
        (row["run"], row["policy"], "held-out") for row in table
    ]
    assert (workplace / "runs" / "grid.comparison" / "perplexity_over_captured.png").is_file()
    assert float(table[1]["perplexity"]) == pytest.approx(
        load_run(workplace / "runs" / "grid-k3").results["policies"][1]["perplexity"]
    )

    commands = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **options: commands.append(command) or Done)
    sweep.main(words)  # only the failed run is tried again
    assert len(commands) == 1 and "run.name=grid-k100000" in commands[0]
    with pytest.raises(UserError, match="cluster.k=9: the sweep sets cluster.k itself"):
        sweep.main([*words, "cluster.k=9"])
    for word, message in (
        ("cluster.max_epochs=77", "holds a run with cluster.max_epochs="),
        ("data.score_windows=3", "holds results with data.score_windows=4, this one has data.score_windows=3"),
        ("policies=[dense,static]", r"holds results with policies=\['dense', 'oracle'\]"),
    ):
        with pytest.raises(UserError, match=rf"grid-k3: {message}"):
            sweep.main([*words, word])


def test_several_files_are_one_sweep(tmp_path, capsys):
    one = write_sweep(tmp_path / "one.yaml", **{"cluster.k": [3, 4], "seed": 1})
    other = write_sweep(tmp_path / "other.yaml", **{"seed": [5, 6]})
    again = write_sweep((tmp_path / "again").mkdir() or tmp_path / "again" / "one.yaml", **{"cluster.k": [4, 5]})
    sweep.main([str(one), str(other), f"run.dir={tmp_path}", "--dry-run"])
    runs = [line.partition("run.name=")[2].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert runs == ["one-k3", "one-k4", "other-seed5", "other-seed6"]
    grid = [trial for file in (one, other) for trial in sweep.trials(sweep.read_sweep(file), [f"run.dir={tmp_path}"])]
    for trial in grid[1:3]:
        trial.folder.path.mkdir()
        trial.folder.results.write_text(json.dumps(RESULTS | {"policies": [{"policy": "dense"}]}))
    rows = list(csv.DictReader(sweep.summary(grid).splitlines()))
    assert [(row["run"], row["cluster.k"], row["seed"]) for row in rows] == [
        ("one-k4", "4", ""), ("other-seed5", "", "5")
    ]  # fmt: skip
    with pytest.raises(UserError, match="two of the sweep files have a run called one-k4; rename one of the files"):
        sweep.main([str(one), str(again)])
    with pytest.raises(UserError, match="seed=1: not a sweep file; give one first"):
        sweep.main(["seed=1", str(one)])


def test_a_run_whose_speed_was_not_measured_is_not_finished(tmp_path):
    words = [f"run.dir={tmp_path}", "run.name=a", "speed=true"]
    (trial,) = sweep.trials(sweep.Sweep("a", "train.py", [], [], [], {}), words[:1] + words[2:])
    trial.folder.path.mkdir()
    trial.folder.config.write_text(to_yaml(trial.config))
    trial.folder.results.write_text(json.dumps(RESULTS))
    assert not trial.finished
    trial.folder.results.write_text(json.dumps(RESULTS | {"speed": {}}))
    assert trial.finished


class Done:
    """Replaces a run's process by one that has succeeded."""

    poll = staticmethod(lambda: 0)


def test_a_sigterm_ends_the_running_runs_and_no_other_starts(workplace, tmp_path, monkeypatch):
    program = tmp_path / "program.py"  # replaces train.py: on a SIGTERM it writes a file and exits with 143
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "path = pathlib.Path(__file__).parent / sys.argv[-2].partition('=')[2]\n"
        "def end(*_):\n    path.with_suffix('.saved').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\npath.with_suffix('.began').touch()\ntime.sleep(60)\n"
    )
    found = sweep.Sweep("grid", str(program), sweep.COMMAND[:3], [], [], {"seed": [1, 2, 3]})
    monkeypatch.setattr(sweep, "read_sweep", lambda path: found)

    def terminate_when_two_run():
        while len(list(tmp_path.glob("*.began"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    terminating, before = threading.Thread(target=terminate_when_two_run), signal.getsignal(signal.SIGTERM)
    terminating.start()
    with pytest.raises(Terminated):
        sweep.main(
            [
                str(tmp_path / "grid.yaml"),
                *words_for(workplace, **{"run.dir": tmp_path / "runs", "collect.storage": "memory"}),
                "--jobs",
                "2",
            ]
        )
    terminating.join()
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["grid-seed1.saved", "grid-seed2.saved"]
    assert not (tmp_path / "grid-seed3.began").exists() and signal.getsignal(signal.SIGTERM) == before


GB = 10**9


class Machine:
    """Replaces GPUs of 80 GB, the processes of runs on them, and the clock, which advances while the sweep sleeps.

    A run holds 5 GB at first and `size` GB in the second half of its `lasts` seconds. If its GPU has less, it ends with
    the error of train.py. events: what happened, in order.
    """

    def __init__(self, lasts=10.0, others=0, **sizes):
        self.lasts, self.others, self.sizes = lasts, others, sizes
        self.now, self.events, self.processes, self.most = 0.0, [], [], 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        assert self.now < 1000, "the sweep does not end"

    def free_memory(self, gpu):
        return (80 - self.others) * GB - sum(process.held() for process in self.alive(str(gpu)))

    def alive(self, gpu):
        return [process for process in self.processes if process.code is None and process.gpu == gpu]

    def popen(self, command, stdout, env, **options):
        self.processes.append(Process(self, command[command.index("train.py") + 1 :], stdout.name, env))
        return self.processes[-1]


class Process:
    def __init__(self, machine, words, log, env):
        self.machine, self.log, self.cfg = machine, Path(log), load_config(None, words)
        self.gpu, self.began, self.code = env.get("CUDA_VISIBLE_DEVICES", "0"), machine.now, None
        self.name = self.cfg.run.name.partition("-")[2]
        machine.events.append(f"{self.name} starts")
        machine.most = max(machine.most, len(machine.alive(self.gpu)) + 1)

    def held(self):
        whole = self.machine.now - self.began >= self.machine.lasts / 2
        return (self.machine.sizes.get(self.name, 35) if whole else 5) * GB

    def poll(self):
        if self.code is None and sum(process.held() for process in self.machine.alive(self.gpu)) > 80 * GB:
            self.log.write_text("error: the GPU has no memory left (x); lower y\nwandb: offline\n")
            self.end(2)
        elif self.code is None and self.machine.now - self.began >= self.machine.lasts:
            folder = self.log.with_suffix("")
            folder.mkdir()
            (folder / "config.yaml").write_text(to_yaml(self.cfg))
            held = {"gpu_bytes": 3 * GB, "tune": {"gpu_bytes": self.held()}}  # as a run resumed after its tuning
            (folder / "results.json").write_text(json.dumps(RESULTS | held))
            self.end(0)
        return self.code

    def end(self, code):
        self.code = code
        self.machine.events.append(f"{self.name} {'fails' if code == 2 else 'ends' if code == 0 else 'stops'}")

    def terminate(self):
        if self.code is None:
            self.end(143)

    def wait(self):
        return self.code


@pytest.fixture
def on_gpus(tmp_path, monkeypatch):
    """Runs a sweep of the given seeds on a machine: on_gpus(machine, seeds, jobs=…, gpus=…, minutes=…, words=[…])."""
    before = signal.getsignal(signal.SIGTERM)

    def run(machine, seeds, jobs, gpus=1, minutes=None, words=()):
        monkeypatch.setattr(sweep.subprocess, "Popen", machine.popen)
        monkeypatch.setattr(sweep, "time", machine)
        found = sweep.Sweep("grid", "train.py", ["train.py"], [], [], {"seed": seeds})
        grid = sweep.trials(found, [f"run.dir={tmp_path}", "collect.storage=device", *words])
        try:
            return sweep.run(grid, sweep.Runner(jobs, gpus, minutes, machine.free_memory))
        finally:
            assert signal.getsignal(signal.SIGTERM) == before
            assert not [process for process in machine.processes if process.code is None]

    return run


def test_runs_share_a_gpu_as_far_as_its_memory_goes(on_gpus, capsys):
    machine = Machine()
    assert on_gpus(machine, [1, 2, 3, 4, 5], jobs=3) == []
    assert machine.events == [
        *("seed1 starts", "seed1 ends", "seed2 starts", "seed3 starts", "seed2 ends", "seed3 ends"),
        *("seed4 starts", "seed5 starts", "seed4 ends", "seed5 ends"),
    ]
    waits = [line for line in capsys.readouterr().out.splitlines() if "waits" in line]
    assert waits == [
        "grid-seed2: waits for the end of grid-seed1: "
        "only a finished run shows how much GPU memory a run of this sweep needs",
        "grid-seed4: waits for 36.0 GB of GPU 0, which the largest finished run needed; "
        "8.0 GB are left beside grid-seed2 and grid-seed3",
    ]
    machine = Machine()  # the finished runs of an earlier call tell the size, too
    on_gpus(machine, [1, 2, 3, 4, 5, 6, 7], jobs=3)
    assert machine.events == ["seed6 starts", "seed7 starts", "seed6 ends", "seed7 ends"]


@pytest.mark.parametrize("others", [0, 12], ids=["too-large", "another-program"])
def test_a_run_alone_on_a_gpu_always_starts(on_gpus, others):
    machine = Machine(others=others, seed1=70 if others == 0 else 35)
    assert on_gpus(machine, [1, 2, 3], jobs=3) == [] and machine.most == 1
    assert [event for event in machine.events if "starts" in event] == ["seed1 starts", "seed2 starts", "seed3 starts"]


def test_a_run_that_lacks_memory_beside_others_is_repeated_alone(on_gpus, capsys):
    machine = Machine(seed3=50)
    assert on_gpus(machine, [1, 2, 3, 4, 5], jobs=2) == []
    assert machine.events == [
        *("seed1 starts", "seed1 ends", "seed2 starts", "seed3 starts", "seed2 fails", "seed3 ends"),
        *("seed2 starts", "seed2 ends", "seed4 starts", "seed4 ends", "seed5 starts", "seed5 ends"),
    ]
    said = capsys.readouterr().out
    assert "grid-seed2: lacked GPU memory beside other runs; is repeated alone on a GPU\n" in said
    assert "FAILED" not in said


def test_a_run_that_lacks_memory_alone_has_failed(on_gpus):
    machine = Machine(seed3=90)
    (line,) = on_gpus(machine, [1, 2, 3, 4], jobs=2)
    assert line == "grid-seed3: exit code 2: wandb: offline"
    assert machine.events[4:] == [
        *("seed2 fails", "seed3 fails", "seed2 starts", "seed2 ends", "seed3 starts", "seed3 fails"),
        *("seed4 starts", "seed4 ends"),
    ]


def test_a_run_that_measures_speed_has_its_gpu_alone(on_gpus, capsys):
    machine = Machine(seed1=5, seed2=5, seed3=5)
    on_gpus(machine, [1, 2, 3], jobs=3, words=["speed=true"])
    assert machine.most == 1
    assert "grid-seed2: waits for the end of grid-seed1, because it needs GPU 0 alone" in capsys.readouterr().out


def test_runs_without_a_gpu_do_not_wait_for_one(on_gpus):
    machine = Machine()
    machine.free_memory = None
    on_gpus(machine, [1, 2, 3], jobs=3, words=["model.device=cpu"])
    assert machine.most == 3


def test_after_the_minutes_no_run_starts_and_all_stop(on_gpus, capsys):
    machine = Machine(lasts=50, seed1=5, seed2=5, seed3=5)
    with pytest.raises(Terminated) as end:
        on_gpus(machine, [1, 2, 3, 4], jobs=2, minutes=1)
    assert end.value.code == 143 and 60 <= machine.now < 61
    assert machine.events == [
        *("seed1 starts", "seed1 ends", "seed2 starts", "seed3 starts", "seed2 stops", "seed3 stops")
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "grid-seed2: stopped (143)",
        "grid-seed3: stopped (143)",
        "time is up; 1 of 4 runs have finished",
    ]
    assert on_gpus(Machine(lasts=50), [1, 2, 3, 4], jobs=2, minutes=3) == []  # the same command does the rest
    with pytest.raises(UserError, match="--minutes must be more than 0, got -1"):
        sweep.main(["grid.yaml", "--minutes", "-1"])


def test_an_interrupted_sweep_leaves_no_run_behind(on_gpus):
    machine = Machine()

    def interrupt(seconds):
        raise KeyboardInterrupt

    machine.sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        on_gpus(machine, [1, 2], jobs=2)
    assert machine.events == ["seed1 starts", "seed1 stops"]


@pytest.mark.parametrize(("visible", "expected"), [(None, {"0", "1"}), ("5, 7", {"5", "7"})])
def test_each_gpu_has_equally_many_runs(on_gpus, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = Machine()
    machine.free_memory = None  # as many jobs as GPUs: it is not asked for
    on_gpus(machine, list(range(6)), jobs=2, gpus=2)
    assert machine.most == 1 and {process.gpu for process in machine.processes} == expected
    began = [process.began for process in machine.processes]
    assert began[0] == began[1] < began[2] == began[3] < began[4] == began[5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method: bayes\nparameters: {cluster.k: {min: 1, max: 9}}", "method bayes needs W&B's server"),
        (
            "method: grid\nparameters: {cluster.k: {min: 1, max: 9}}",
            r"parameters.cluster.k needs `values: \[...\]` or `value: ...`",
        ),
        ("method: grid", "needs `parameters:`"),
        ("a: [", "can't be read as YAML"),
        ("method: grid\nparameters: {cluster.kk: {values: [1, 2]}}", "cluster.kk"),
        ("method: grid\nparameters: {run.dir: {values: ['a/b', 'a:b']}}", "both called bad-dira_b"),
        ("method: grid\nparameters: {seed: {values: [1, 1.5]}}", "seed=1.5: not a whole number"),
        ("method: grid\nmethod: grid\nparameters: {seed: {value: 1}}", "line 2: method is given twice"),
        ("method: grid\ncomand: [x]\nparameters: {seed: {value: 1}}", "comand: apc sweep knows only program, method"),
        (
            "method: grid\nparameters: {seed: {values: [1], q: 2}}",
            "parameters.seed needs .*, and nothing else; it has q",
        ),
        ("method: grid\nparameters: {seed: {values: [1], value: 2}}", "parameters.seed needs .*; it has values"),
        (
            "method: grid\nparameters: {cluster.k: {value: 1}, cluster: {parameters: {k: {value: 2}}}}",
            "parameters.cluster.k is given twice",
        ),
        ("method: grid\nparameters: {run.name: {values: [a, b]}}", "run.name: apc sweep names the runs"),
        (
            "method: grid\nparameters: {tracking.notes: {values: [%s, b]}}" % ("x" * 244),
            "too long for the name of a run",
        ),
    ],
)
def test_an_error_names_a_file_that_is_no_grid_before_anything_runs(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(sweep.subprocess, "Popen", None)
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        sweep.main([str(tmp_path / "bad.yaml")])


def write_command(path, *words, more=""):
    quoted = ", ".join(f'"{word}"' for word in words)
    path.write_text(f"method: grid\ncommand: [{quoted}]\n{more}parameters: {{seed: {{values: [1, 2]}}}}\n")
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["${program}", "${args}"], r"command: \$\{args\}: apc sweep can't fill this in"),
        (["${program}", "${args_no_hyphens}", "${args_json_file}"], r"command: \$\{args_json_file\}"),
        (["${program}", "a.yaml"], r"needs exactly one \$\{args_no_hyphens\} after the program"),
        (["my.py", "${args_no_hyphens}"], r"has no \$\{program\}"),
        (["${program}", "--dry-run", "${args_no_hyphens}"], "command: --dry-run: apc sweep can't pass this on"),
        (["${program}", "${args_no_hyphens}", "seed=3"], "seed=3: the sweep sets seed itself"),
        (["${program}", "${args_no_hyphens}", "run.name=a"], "run.name: apc sweep names the runs"),
        (["${program}", "${args_no_hyphens}", "run.dir=${envvar:NO_SUCH}"], "NO_SUCH is not set in the environment"),
        (["${program}", "${args_no_hyphens}", "cluster.kk=3"], "cluster.kk: unknown key"),
        (["${program}", "${args_no_hyphens}", "late.yaml"], "late.yaml: not an override"),
    ],
)
def test_a_command_that_cannot_be_honoured_is_an_error(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        sweep.main([write_command(tmp_path / "bad.yaml", *words)])


def test_every_word_of_the_command_reaches_the_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(
        f"data: {{fit: a.txt}}\nrun: {{dir: {tmp_path}/runs}}\ncollect: {{storage: memory}}\n"
    )
    file = write_command(
        tmp_path / "own.yaml",
        *("${env}", "A=1", "${interpreter}", "-u", "${program}", f"{tmp_path}/mine.yaml", "cluster.k=9"),
        *("${args_no_hyphens}", "data.score=${envvar:SCORE}/b.txt", "--wide"),
        more="project: 007\nname: x\nmetric: {name: y}\n",
    )
    monkeypatch.setenv("SCORE", "/score")
    grid = sweep.trials(sweep.read_sweep(Path(file)), ["cluster.init=k-means++"])
    assert "only W&B's server uses name, metric; apc sweep does not" in capsys.readouterr().err
    for seed, trial in enumerate(grid, start=1):
        cfg = trial.config
        assert (cfg.data.fit, cfg.data.score, cfg.cluster.k, cfg.seed) == ("a.txt", "/score/b.txt", 9, seed)
        assert (cfg.cluster.init, cfg.tracking.project, cfg.tracking.group) == ("k-means++", "007", "own")
    commands = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **options: commands.append(command) or Done)
    sweep.main([file, "cluster.init=k-means++"])
    assert sorted(command[command.index("/usr/bin/env") :] for command in commands) == [
        ["/usr/bin/env", "A=1", sys.executable, "-u", *program(), *trial.words] for trial in grid
    ]
    assert grid[0].words == [
        *(f"{tmp_path}/mine.yaml", "cluster.k=9", "tracking.project=007", "seed=1", "data.score=/score/b.txt"),
        *("--wide", "cluster.init=k-means++", "run.name=own-seed1", "tracking.group=own"),
    ]


def program():
    return ["train.py"] if Path("train.py").is_file() else ["-m", "apc", "train"]


def test_values_reach_the_runs_as_the_file_writes_them(tmp_path, capsys):
    (tmp_path / "as.yaml").write_text(
        """method: grid
parameters:
  model.revision: {values: ["6063e25", 007]}
  cluster: {parameters: {k: {value: 010}, weighting: {values: [binary], distribution: categorical}}}
  tracking.notes: {value: "null"}
  tracking.tags: {value: ["a, b", on]}
  tracking.group: {value: mine}
  policies: {value: "[dense,oracle]"}
"""
    )
    grid = sweep.trials(sweep.read_sweep(tmp_path / "as.yaml"), [])
    assert [(trial.config.model.revision, trial.name) for trial in grid] == [
        ("6063e25", "as-revision6063e25"),
        ("007", "as-revision007"),
    ]
    cfg = grid[0].config
    assert (cfg.cluster.k, cfg.cluster.weighting, cfg.policies) == (10, "binary", ["dense", "oracle"])
    assert (cfg.tracking.notes, cfg.tracking.tags, cfg.tracking.group) == ("null", ["a, b", "on"], "mine")
    sweep.main([str(tmp_path / "as.yaml"), f"run.dir={tmp_path}", "--dry-run"])
    line = capsys.readouterr().out.splitlines()[0]
    assert load_config(None, shlex.split(line.partition("train.py")[2])[:-2]).tracking == cfg.tracking


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_in_configs_are_grids_of_valid_runs(file, tmp_path, capsys):
    sweep.main([str(file), f"run.dir={tmp_path}", "--dry-run"])  # an empty folder, whatever has run here before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 1 and all(
        re.fullmatch(r"to run +train.py (cluster\.|experiment=|predictor=).*", line) for line in lines
    )
