"""Files that version 0.1 wrote still load, and give the figures that it printed. They lie in tests/data/v0.1."""

import shutil
from pathlib import Path

import pytest

import apc
import evaluate
import tiny
from apc.compare import finished, tables
from apc.config.load import load_config
from apc.utils.errors import UserError

RUNS = sorted((Path(__file__).parent / "data" / "v0.1").iterdir())
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the model and texts that those runs were made with, and the runs."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("old"))
    for run in RUNS:
        shutil.copytree(run, folder / "runs" / run.name)
    return folder


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_run_loads_and_is_evaluated_to_the_figures_it_printed(workplace, run, monkeypatch):
    before = apc.load_run(run)
    assert before.codebook.problem() is None
    monkeypatch.chdir(workplace)  # the runs name model and texts in the folder where they ran
    results = evaluate.evaluate(evaluate.config_of_run(None, [f"checkpoint=runs/{run.name}"]))
    perplexities = {record["policy"]: record["perplexity"] for record in before.results["policies"]}
    assert len(perplexities) >= 3
    found = {record["policy"]: record["perplexity"] for record in results["policies"]}
    assert found == pytest.approx(perplexities, rel=1e-4)


def test_finished_runs_of_the_documentation_are_compared():
    runs, left_out = finished.find_runs(f"{ROOT}/docs/runs/*")
    assert len(runs) == 39 and not left_out
    assert "neuron-threshold" in tables.table(runs)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("arms=[oracle]", "arms: renamed; write policies"),
        ("predictor.hidden=8", "predictor.hidden: renamed; write predictor.bottleneck"),
        ("tune.temperature=0.5", "tune.temperature: no longer a key .* leave it out"),
    ],
)
def test_an_old_key_is_answered_with_the_new_one(tmp_path, word, line):
    with pytest.raises(UserError, match=line):
        load_config(None, [word])
    key, _, value = word.partition("=")
    section, _, name = key.rpartition(".")
    (tmp_path / "old.yaml").write_text(f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n")
    with pytest.raises(UserError, match=line):
        load_config(tmp_path / "old.yaml")


def test_an_old_experiment_is_answered_with_the_new_one():
    with pytest.raises(UserError, match="experiment=cluster-5: renamed; write experiment=cluster-k512"):
        load_config(None, ["experiment=cluster-5"])
