"""Policies that are calibrated on fit text: exact there, saved with the codebook, repeated only after a change."""

import json
from pathlib import Path

import pytest
import torch

import apc
import evaluate
import tiny
import train
from apc import ops
from apc.cluster.codebook import KIND, VERSION, Codebook
from apc.collect.collect import calibration_windows
from apc.compare import tables
from apc.compare.finished import find_runs
from apc.compare.tables import compare
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.run import stages
from apc.sparse.policies.peers import Cats
from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors

BYTES = 0.6


def overrides(folder, **changes):
    """A run of the calibrated policies, without a predictor."""
    values = {"policies": "[dense,cats]", "bytes": BYTES, "monitor.windows": 0}
    return tiny.tiny_overrides(folder, **(values | changes))


def run_train(folder, **changes):
    return train.train(load_config(None, overrides(folder, **changes)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("calibration"))
    run_train(folder)
    return folder


def model_of(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


@torch.no_grad()
def test_on_the_calibration_text_the_kept_share_is_the_budgets(workplace, monkeypatch):
    """Counted apart, by replaced forwards: each token keeps its share of largest gates while scores are counted."""
    seen, codebook, model = [], apc.load_run(workplace / "runs" / "run").codebook, model_of(workplace)
    monkeypatch.setattr(stages, "_sample_pass", lambda *given: seen.append(given[3]))
    monkeypatch.setattr(Cats, "calibrate", lambda fit, share: {"thresholds": torch.zeros(3)})
    run_train(workplace, **{"run.name": "watched"})
    windows = seen[0][calibration_windows(len(seen[0]), 4)]
    share, gates = (3 * BYTES - 1) / 2, [[] for _ in range(3)]

    def forward(layer, mlp):
        def run(hidden):
            gate = mlp.act_fn(mlp.gate_proj(hidden))
            gates[layer].append(gate.abs().flatten())
            kept = ops.top_mask(gate.abs(), round(share * 52))
            return mlp.down_proj(gate * mlp.up_proj(hidden) * kept)

        return run

    for layer, block in enumerate(model.model.layers):
        block.mlp.forward = forward(layer, block.mlp)
    for window in windows:
        model(window[None])
    for values, threshold in zip(map(torch.cat, gates), codebook.calibrated["cats"]["thresholds"], strict=True):
        kept, ties = (values >= threshold).sum(), ((values - threshold).abs() < 1e-5).sum()
        assert abs(int(kept) - round(share * values.numel())) <= ties + 1


def test_costs_follow_from_the_weights_that_are_read(workplace):
    results = json.loads((workplace / "runs" / "run" / "results.json").read_text())
    dense, cats = results["policies"]
    assert dense["read"] == {"gate": 1, "up": 1, "down": 1} and dense["bytes_share"] == 1
    read = cats["masked"]["read"]
    assert read["gate"] == 1 and read["up"] == read["down"] == pytest.approx(cats["masked"]["density"])
    assert cats["bytes_share"] == pytest.approx((1 + 2 * cats["masked"]["density"]) / 3)
    assert cats["bytes_share"] == pytest.approx(BYTES, abs=0.05)
    assert cats["per_layer"]["read"]["up"] == pytest.approx(cats["per_layer"]["density"])
    assert results["seconds"]["calibrate"] > 0


def test_a_codebook_keeps_what_was_calibrated(workplace, tmp_path):
    codebook = apc.load_run(workplace / "runs" / "run").codebook
    assert codebook.calibration == {"cats": {"bytes": BYTES}}
    assert codebook.calibrated["cats"]["thresholds"].shape == (3,)
    assert set(codebook.to(torch.device("meta")).calibrated["cats"]["thresholds"].device.type for _ in "x") == {"meta"}
    codebook.calibrated["cats"]["thresholds"] = torch.zeros(2)
    assert "thresholds of the policy cats does not have a row for each of 3 layers" in codebook.problem()
    path = tmp_path / "codebook.safetensors"
    codebook.without_calibrated().save(path)
    header, tensors = load_tensors(path, KIND, (VERSION,))
    assert header.pop("calibration") == {}
    save_tensors(path, KIND, 3, header, tensors)
    assert Codebook.load(path).calibrated == {}, "a file of version 3"


def test_the_model_runs_and_is_evaluated_with_the_codebook_alone(workplace):
    run, model, tokens = apc.load_run(workplace / "runs" / "run"), model_of(workplace), torch.arange(9)[None]
    with torch.no_grad():
        dense = model(tokens).logits
        assert not torch.equal(apc.sparsify(model, run.codebook, policy="cats")(tokens).logits, dense)
    words = [f"checkpoint={workplace / 'runs' / 'run'}", "policies=[cats]", "run.name=again"]
    again = evaluate.evaluate(evaluate.config_of_run(None, words))
    assert again["policies"][0]["perplexity"] == run.results["policies"][1]["perplexity"]
    with pytest.raises(UserError, match=r"^policy cats: the codebook has no thresholds for it; run train\.py with"):
        apc.sparsify(model, run.codebook.without_calibrated(), policy="cats")
    with pytest.raises(UserError, match=r"^bytes: the run was fitted with 0\.6, evaluate\.py can't change that"):
        evaluate.config_of_run(None, [*words, "bytes=0.5"])


def test_a_resumed_run_calibrates_only_for_other_bytes(workplace, monkeypatch):
    calls, calibrate = [], Cats.calibrate.__func__
    monkeypatch.setattr(
        Cats, "calibrate", classmethod(lambda cls, *given: calls.append(given[1]) or calibrate(cls, *given))
    )
    first = run_train(workplace, **{"run.name": "again"})
    run_train(workplace, **{"run.name": "again"})
    assert calls == [BYTES]
    more = run_train(workplace, **{"run.name": "again", "bytes": 0.8})
    assert calls == [BYTES, 0.8]
    assert more["policies"][1]["bytes_share"] > first["policies"][1]["bytes_share"] + 0.1
    codebook = apc.load_run(workplace / "runs" / "again").codebook
    assert codebook.calibration == {"cats": {"bytes": 0.8}}


def test_without_bytes_the_density_is_the_budget_and_a_tuned_codebook_is_calibrated_itself(workplace):
    words = {"policies": "[dense,cats,oracle]", "bytes": "null", "tune.max_epochs": 1, "tune.policy": "oracle"}
    run_train(workplace, **words, **{"run.name": "tuned", "cluster.density": 0.7, "monitor.windows": 1})
    folder = apc.load_run(workplace / "runs" / "tuned").folder
    assert Codebook.load(folder.tuned("codebook")).calibration == {"cats": {"bytes": 0.7}}
    assert Codebook.load(folder.codebook).calibration == {}


def test_two_ranks_calibrate_to_the_same_bits(workplace):
    peers = ["cats", "teal", "wina", "r-sparse", "prox"]
    changes = {"policies": f"[{','.join(peers)}]"}
    run_train(workplace, **changes, **{"run.name": "one"})
    tiny.run_ranks(2, overrides(workplace, **changes, **{"run.name": "two"}))
    one, two = (apc.load_run(workplace / "runs" / name).codebook.calibrated for name in ("one", "two"))
    assert sorted(one) == sorted(two) == sorted(peers)
    for name in peers:
        assert all(torch.equal(value, two[name][part]) for part, value in one[name].items()), name


def test_a_codebook_of_another_run_is_copied_without_what_was_calibrated(workplace):
    changes = {"run.name": "copied", "checkpoint": workplace / "runs" / "run", "policies": "[dense]", "bytes": "null"}
    run_train(workplace, **changes)
    assert apc.load_run(workplace / "runs" / "copied").codebook.calibration == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (dict(bytes=0), "bytes must be above 0 and at most 1, got 0.0"),
        (dict(bytes=1.01), "bytes must be above 0 and at most 1, got 1.01"),
        (dict(bytes=0.33), "policies: cats reads the gate in full, a third of the bytes; raise bytes=0.33"),
        (dict(policies="[gate]"), "policies: gate is renamed; write cats"),
        (dict(sites="[up,down]"), r"policies: cats needs sites=\[neuron\], this run has sites=\['up', 'down'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_before_anything_runs(tmp_path, words, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        run_train(tmp_path, **words)


@pytest.mark.parametrize(
    ("family", "line"),
    [("gpt2", "needs FFNs with a gate, outside a mixture of experts"), ("mixtral", "needs FFNs with a gate, outside")],
)
def test_ffns_without_a_rule_are_named(tmp_path, family, line):
    folder = tiny.make_workplace(tmp_path, family)
    with pytest.raises(UserError, match=f"^policies: cats {line}.*; leave it out$"):
        run_train(folder)
    assert not Path(folder / "stores").exists()


def test_peers_stand_beside_any_codebook_with_their_bytes(workplace, tmp_path):
    run_train(workplace, **{"run.name": "more", "bytes": 0.8})
    runs, left_out = find_runs(f"[{workplace / 'runs' / 'run'},{workplace / 'runs' / 'more'}]")
    assert not left_out and [run.conditions["bytes"] for run in runs] in ([0.6, 0.8], [0.8, 0.6])
    said = compare(runs, tmp_path)
    rows = [line.split() for line in tables.table(runs, markdown=True).splitlines() if "| cats |" in line]
    assert sorted(" ".join(row[:6]) for row in rows) == ["| 1 run | bytes 0.6", "| 1 run | bytes 0.8"]
    assert said.count("\ncats ") == 2 and "bytes.png" in " ".join(path.name for path in tmp_path.iterdir())
