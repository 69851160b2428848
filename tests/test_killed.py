"""A run that is killed at any moment resumes to the same result, and a SIGTERM makes it save its step first."""

import json
import os
import random
import secrets
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

import apc
import tiny
import train
from apc.cluster.codebook import Codebook
from apc.cluster.lloyd import ClusteringModule
from apc.config.load import load_config
from apc.run import launch
from apc.run.folder import open_run
from apc.run.tracking import read_metrics
from apc.utils import exits, signals
from apc.utils.errors import Terminated, UserError

# `make soak` sets more kills, and stage `all`, whose table and plots take most of a small run.
KILLS = int(os.environ.get("APC_KILLS", 12))
STAGE = os.environ.get("APC_STAGE", "tune")
SETTINGS = {
    "trainer.checkpoint_every_n_steps": 1,
    "cluster.max_epochs": 3,
    "predictor.max_epochs": 1,
    "tune.max_epochs": 1,
    "tune.batch_windows": 5,
    "predictor.bottleneck": 8,
    "policies": "[dense,oracle,predicted]",
    "monitor.every": 100,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("killed"))


def words_for(workplace, name="", **changes):
    return tiny.tiny_overrides(
        workplace,
        **(SETTINGS | {"run.name": name, "stage": STAGE, "collect.dir": workplace / f"stores-{name}"} | changes),
    )


def outcome(workplace, name):
    """A run's codebook, predictor and records, without times."""
    run = apc.load_run(workplace / "runs" / name)
    records = {stage: json.loads(run.folder.history(stage).read_text()) for stage in ("cluster", "predictor", "tune")}
    records |= {key: value for key, value in (run.results or {}).items() if key not in ("seconds", "conditions")}
    # A row between the last checkpoint and a kill is logged again after it; only the times differ.
    rows = [
        {key: value for key, value in row.items() if key not in ("time", "elapsed_s") and "second" not in key}
        for row in read_metrics(run.folder.path)
    ]
    records["metrics"] = sorted({json.dumps(row, sort_keys=True) for row in rows})
    return run.codebook.sites["neuron"].tensors(), run.predictor.state_dict(), records


def same(one, other):
    for here, there in zip(one[:2], other[:2], strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert torch.equal(value, there[name]), name
    assert without_seconds(one[2]) == without_seconds(other[2])


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if "second" not in key}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(workplace):
    """(outcome, seconds) of an undisturbed run. The first run imports everything, so the second one is timed."""
    for name in ("first", "whole"):
        began = time.monotonic()
        process = tiny.start(words_for(workplace, name))
        process.join(timeout=200)
        assert process.exitcode == 0
    same(outcome(workplace, "first"), outcome(workplace, "whole"))
    return outcome(workplace, "whole"), time.monotonic() - began


def test_a_run_that_is_killed_anywhere_ends_with_the_same_result(workplace, whole):
    end, seconds = whole
    seed = int(os.environ.get("APC_SEED", secrets.randbelow(1 << 30)))
    print(f"APC_SEED={seed}, {KILLS} kills within {seconds:.1f} s")
    moments, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        name, runs = f"killed-{runs}", runs + 1
        exitcode = None
        while exitcode != 0:
            process = tiny.start(words_for(workplace, name))
            process.join(timeout=moments.uniform(0, seconds) if kills < KILLS else 200)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL), f"exit code {exitcode}, APC_SEED={seed}"
        same(outcome(workplace, name), end)
    print(f"{kills} kills over {runs} runs")


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6, 0.85])
def test_a_run_that_gets_a_sigterm_resumes_to_the_same_result(workplace, whole, share):
    end, seconds = whole
    name = f"asked-{share}"
    process = tiny.start(words_for(workplace, name, **{"trainer.checkpoint_every_n_steps": 10_000}))
    time.sleep(share * seconds)
    process.terminate()
    process.join(timeout=60)
    assert process.exitcode in (143, 0, -signal.SIGTERM)  # the last one: before its handler was set
    process = tiny.start(words_for(workplace, name))
    process.join(timeout=200)
    assert process.exitcode == 0
    same(outcome(workplace, name), end)


@pytest.mark.parametrize("stage", ["cluster", "predict", "tune"])
def test_a_training_that_gets_a_sigterm_keeps_its_step(workplace, stage):
    changes = {
        "stage": stage,
        "trainer.checkpoint_every_n_steps": 10_000,
        f"{'predictor' if stage == 'predict' else stage}.max_epochs": 2_000,
    }
    name, kind = f"kept-{stage}", {"cluster": "cluster", "predict": "predictor", "tune": "tune"}[stage]
    process = tiny.start(words_for(workplace, name, **changes))
    metrics = workplace / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (metrics.is_file() and f'"{kind}/' in metrics.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    if process.exitcode == 0:  # clustering converges
        assert stage == "cluster"
        return
    assert process.exitcode == 143
    checkpoint = torch.load(workplace / "runs" / name / "checkpoints" / f"{kind}.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0


def ranks_of(launcher):
    """{rank: process id} of the processes that a launcher started."""
    ranks = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            words = process.joinpath("environ").read_bytes().split(b"\0") if int(parent) == launcher else []
        except OSError:  # the process has ended
            continue
        ranks |= {int(word.partition(b"=")[2]): int(process.name) for word in words if word.startswith(b"RANK=")}
    return ranks


def launched(words, stderr, rows):
    """Starts ranks that train a predictor and waits until it has logged more than `rows` rows.

    Returns the launcher and the number of rows.
    """
    launcher = tiny.start(words, stderr)
    deadline, metrics = (
        time.monotonic() + 120,
        next(Path(word[8:]) for word in words if word.startswith("run.dir=")) / "ranks" / "metrics.jsonl",
    )
    while (count := metrics.read_text().count('"predictor/step"') if metrics.is_file() else 0) <= rows:
        assert time.monotonic() < deadline and launcher.is_alive()
        time.sleep(0.05)
    return launcher, count


def test_ranks_that_get_a_sigterm_keep_their_step_and_a_dying_rank_ends_all_and_fewer_ranks_resume(workplace, tmp_path):
    """In one long epoch, within which no checkpoint is due."""
    changes = {
        "run.name": "ranks",
        "stage": "predict",
        "collect.dir": workplace / "stores-ranks",
        "data.fit_windows": 44,
        "predictor.batch_tokens": 2,
    }
    changes |= {"predictor.max_epochs": 1, "trainer.checkpoint_every_n_steps": 10_000, "trainer.log_every_n_steps": 1}
    words = words_for(workplace, **changes, **{"trainer.devices": 2})
    launcher, rows = launched(words, stderr := tmp_path / "stderr", 0)
    launcher.terminate()
    launcher.join(timeout=60)
    errors = stderr.read_text()
    assert launcher.exitcode == 143 and "terminated; the same command" in errors and "Traceback" not in errors
    run = workplace / "runs" / "ranks"
    kept = torch.load(run / "checkpoints" / "predictor.ckpt", weights_only=True)["global_step"]
    assert kept >= rows > 0

    launcher, rows = launched(words, stderr, kept)
    os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
    launcher.join(timeout=60)
    assert launcher.exitcode not in (0, None)
    line = "error: rank 1 was killed (SIGKILL, perhaps out of memory), and all others with it; the same command"
    assert line in stderr.read_text()
    assert not run.joinpath("predictor.safetensors").exists()

    for name, stage in (("ranks", "predict"), ("alone", "cluster")):
        process = tiny.start(words_for(workplace, **(changes | {"run.name": name, "stage": stage})))
        process.join(timeout=200)
        assert process.exitcode == 0
    books = [apc.load_run(workplace / "runs" / name).codebook.sites["neuron"].tensors() for name in ("ranks", "alone")]
    assert all(torch.equal(value, books[1][name]) for name, value in books[0].items())


@pytest.mark.parametrize(("most", "named"), [(14_000, "cluster.ckpt"), (30_000, "predictor.ckpt")])
def test_a_full_disk_is_an_error_and_the_run_resumes_from_the_files_before_it(workplace, whole, most, named):
    name = f"full-{most}"
    changes = {"stage": "predict", "collect.storage": "memory", "predictor.bottleneck": 32}
    words = words_for(workplace, name, **changes)
    done = tiny.command("train.py", *words, largest_file=most)
    run = workplace / "runs" / name
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{named}: can't be written (File too large); make room, and run the same command again" in done.stderr
    assert not list(run.rglob("*.tmp"))
    process = tiny.start(words)
    process.join(timeout=200)
    assert process.exitcode == 0
    resumed, expected = (
        Codebook.load(folder / "codebook.safetensors").sites["neuron"].tensors()
        for folder in (run, workplace / "runs" / "whole")
    )
    assert all(torch.equal(value, expected[key]) for key, value in resumed.items())


def test_too_little_memory_is_an_error_of_one_line(capsys):
    def on_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def below_torch():
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` …")

    for allocate, where in (
        (lambda: bytearray(1 << 62), "this machine"),
        (lambda: torch.empty(1 << 46), "this machine"),
        (on_a_gpu, "the GPU"),
        (below_torch, "the GPU"),
    ):
        with pytest.raises(SystemExit, match="2"), exits.one_line_errors("the same command goes on"):
            allocate()
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith(f"error: {where} has no memory left (")
        assert "collect.storage=disk; the same command" in error


def test_two_processes_never_work_in_one_run(workplace):
    words = words_for(workplace, "twice")
    with open_run(load_config(None, words)):
        process = tiny.start(words)
        process.join(timeout=100)
        assert process.exitcode == 2
    process = tiny.start(words_for(workplace, "twice", stage="collect"))
    process.join(timeout=100)
    assert process.exitcode == 0


@pytest.fixture
def no_sigterm_yet(monkeypatch):
    """Forgets the SIGTERMs that trainings of other tests got in this process."""
    monkeypatch.setattr(signals, "_state", {"training": False, "asked": False})


def test_a_sigterm_during_setup_ends_a_training_before_its_first_step(workplace, monkeypatch, no_sigterm_yet):
    begin = ClusteringModule.on_fit_start
    steps = []
    monkeypatch.setattr(
        ClusteringModule, "on_fit_start", lambda self: (os.kill(os.getpid(), signal.SIGTERM), begin(self))
    )
    monkeypatch.setattr(ClusteringModule, "training_step", lambda self, block, index: steps.append(index))
    before = signal.signal(signal.SIGTERM, signals.terminate)
    try:
        with pytest.raises(Terminated):
            train.train(load_config(None, words_for(workplace, "early", stage="cluster")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not steps and (workplace / "runs" / "early" / "checkpoints" / "cluster.ckpt").is_file()


def test_a_second_sigterm_does_not_disturb_a_training_that_ends(no_sigterm_yet):
    with pytest.raises(Terminated):
        signals.terminate(signal.SIGTERM, None)
    with pytest.raises(Terminated), signals.training():
        signals.terminate(signal.SIGTERM, None)
    signals.terminate(signal.SIGTERM, None)  # during the last upload to W&B
    with signals.training():
        assert not signals.asked()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_to_the_launcher_ends_it(workplace, monkeypatch, number, expected):
    def launched(settings, program):
        def run(*words):
            raise SignalException("signalled", number)

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launched)
    with pytest.raises(expected):
        launch.launch(load_config(None, words_for(workplace, "ranks-asked", **{"trainer.devices": 2})))


def test_a_changed_value_in_a_checkpoint_is_an_error(workplace):
    name = "flipped"
    with tiny.killed_after(9, ClusteringModule):
        train.train(load_config(None, words_for(workplace, name, stage="cluster")))
    path = workplace / "runs" / name / "checkpoints" / "cluster.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["sums_neuron"].view(-1)[7] += 1
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"cluster.ckpt: damaged \(checksum mismatch\); delete it"):
        train.train(load_config(None, words_for(workplace, name, stage="cluster")))
