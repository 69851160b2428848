"""A small run on the bundled model and text: perplexities have the right order, and W&B has the metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import train
from apc.config.load import load_config
from apc.evaluate import speed
from apc.run.tracking import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, results) of a small run on the bundled model and text, tracked offline."""
    folder = tmp_path_factory.mktemp("bundled")
    words = [
        "data.fit_windows=12",
        "data.score_windows=1",
        "data.seq_len=128",
        "cluster.k=8",
        "cluster.max_epochs=2",
        "collect.calibration_windows=2",
        "predictor.max_epochs=2",
        "predictor.batch_tokens=256",
        "trainer.progress=false",
        "monitor.every=2",
        "tracking.wandb=offline",
        f"collect.dir={folder / 'stores'}",
        f"run.dir={folder}",
        "run.name=small",
        "model.device=cpu",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROUNDS": {"cpu": 2}, "TIMED_STEPS": 8, "NEW_TOKENS": 8}.items():
            patch.setattr(speed, name, value)
        return folder / "small", train.train(load_config(None, words))


def test_perplexities_rise_from_bound_to_baseline(run):
    perplexity = {record["policy"]: record["perplexity"] for record in run[1]["policies"]}
    assert perplexity["dense"] < perplexity["exact"] < perplexity["oracle"] < perplexity["static"]
    assert max(perplexity["predicted"], perplexity["soft"]) < perplexity["static"]
    assert perplexity["exact"] < perplexity["staged-prox"] < perplexity["teal"] < perplexity["oracle"]
    assert perplexity["dense"] < 25 and perplexity["exact"] < 1.1 * perplexity["dense"]


def test_the_offline_run_reads_back_with_its_metrics(run):
    folder = run[0]
    offline = next(path for path in (folder / "wandb").iterdir() if path.name.startswith("offline-run"))
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run([wandb, "leet", "inspect", "--json", offline], capture_output=True, text=True, timeout=60)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    text = json.dumps(records)
    for name in ("cluster/captured", "predictor/loss", "eval/oracle/perplexity", "figures/perplexity", "cluster/epoch"):
        assert name in text, name
    summaries = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert len({key for update in summaries for key in update}) < 150  # figures per layer are in tables
    mirrored = {name for record in read_metrics(folder) for name in record}
    assert {"cluster/captured", "predictor/loss", "cluster/monitor_oracle_perplexity"} <= mirrored
