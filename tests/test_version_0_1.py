"""Runs of version 0.1, in tests/data/v0.1, still load and are evaluated to the perplexities in their results."""

import shutil
from pathlib import Path

import pytest

import apc
import evaluate
import tiny
from apc.compare import finished, tables
from apc.config.load import load_config, load_saved
from apc.utils.errors import UserError

RUNS = sorted((Path(__file__).parent / "data" / "v0.1").iterdir())
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the runs, and the model and texts that they used."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("old"))
    for run in RUNS:
        shutil.copytree(run, folder / "runs" / run.name)
    return folder


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_run_loads_and_is_evaluated_to_the_same_perplexities(workplace, run, monkeypatch):
    before = apc.load_run(run)
    assert before.codebook.problem() is None
    monkeypatch.chdir(workplace)  # the runs give model and texts as relative paths
    perplexities = {record["policy"]: record["perplexity"] for record in before.results["policies"]}
    words = [f"checkpoint=runs/{run.name}"]
    if perplexities.pop("gate", None):
        with pytest.raises(UserError, match="^policies: gate is renamed; write cats$"):
            evaluate.evaluate(evaluate.config_of_run(None, words))
        words.append(f"policies=[{','.join(perplexities)}]")
    results = evaluate.evaluate(evaluate.config_of_run(None, words))
    assert len(perplexities) >= 3
    again = {record["policy"]: record["perplexity"] for record in results["policies"]}
    assert again == pytest.approx(perplexities, rel=1e-4)


def test_finished_runs_of_the_documentation_are_compared():
    runs, left_out = finished.find_runs(f"{ROOT}/docs/runs/*")
    assert len(runs) == 50 and not left_out
    assert "neuron-threshold" in tables.table(runs)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("arms=[oracle]", "arms: renamed; write policies"),
        ("predictor.hidden=8", "predictor.hidden: renamed; write predictor.bottleneck"),
        ("tune.temperature=0.5", "tune.temperature: this key was removed .* leave it out"),
    ],
)
def test_an_error_for_an_old_key_names_the_new_one(tmp_path, word, line):
    with pytest.raises(UserError, match=line):
        load_config(None, [word])
    key, _, value = word.partition("=")
    section, _, name = key.rpartition(".")
    (tmp_path / "old.yaml").write_text(f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n")
    with pytest.raises(UserError, match=line):
        load_config(tmp_path / "old.yaml")


def test_an_error_for_an_old_experiment_names_the_new_one():
    with pytest.raises(UserError, match="experiment=cluster-5: renamed; write experiment=cluster-k512"):
        load_config(None, ["experiment=cluster-5"])


def test_a_value_that_is_fixed_now_is_noted(tmp_path, capsys):
    saved = (RUNS[0] / "config.yaml").read_text().replace("temperature: 0.5", "temperature: 2.0")
    (tmp_path / "config.yaml").write_text(saved.replace("precision: 32-true", "precision: 64-true"))
    assert load_saved(tmp_path / "config.yaml").trainer.precision == "32-true"
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert "made with tune.temperature=2.0, which is now 0.5" in notes[0]
    assert "made with trainer.precision=64-true, which is now 32-true" in notes[1]


@pytest.mark.parametrize(("lr", "lr_scores", "noted"), [("5e-4", "0.01", False), ("5e-4", "0.02", True)])
def test_rates_that_follow_the_learning_rate_are_compared_with_its_own_value(tmp_path, capsys, lr, lr_scores, noted):
    saved = (RUNS[0] / "config.yaml").read_text()
    assert "\n  lr: 0.001" in saved and "lr_scores: 0.02" in saved
    tune = saved[saved.index("tune:") :]
    changed = tune.replace("\n  lr: 0.001", f"\n  lr: {lr}").replace("lr_scores: 0.02", f"lr_scores: {lr_scores}")
    (tmp_path / "config.yaml").write_text(
        saved.replace(tune, changed.replace("lr_offsets: 0.002", "lr_offsets: 0.001"))
    )
    assert load_saved(tmp_path / "config.yaml").tune.lr == 5e-4
    assert ("tune.lr_scores=0.02, which is now 0.01" in capsys.readouterr().err) == noted
