"""Mixtures of experts in which some experts get no token."""

import json

import pytest
import torch

import apc
import tiny
import train
from apc.cluster.seeding import RowReader
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model, weights_sample
from apc.evaluate.metrics import _FIELDS as FIELDS
from apc.evaluate.metrics import site_densities
from apc.utils.errors import UserError

IDLE = [1, 5, 9]  # expert 1 of 4, in each of three layers
LAYERS = 12


def run_train(folder, **changes):
    return train.train(load_config(None, tiny.tiny_overrides(folder, **changes)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("experts"), "gpt_oss")
    model = tiny.make_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[1] = -1e4
    model.save_pretrained(folder / "model")
    return folder


def make_model(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


def test_experts_without_tokens_are_told_and_left_out_of_averages(workplace, capsys):
    results = run_train(workplace, policies="[dense,static,predicted]", **{"monitor.windows": 2})
    assert "3 of 12 experts got no token of the fit text: their masks keep arbitrary neurons" in capsys.readouterr().out
    static = results["policies"][1]
    assert static["bytes_share"] == static["flops_share"] == static["density"] == 0.5
    for values in results["predictor"]["per_layer"].values():
        assert [place for place, value in enumerate(values) if value is None] == IDLE
    run = apc.load_run(workplace / "runs" / "run")
    assert all(not run.codebook.sites["neuron"].sizes[place].any() for place in IDLE)
    rows = [json.loads(line) for line in (workplace / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "cluster_layers/captured_neuron" in row]
    shares = rows[-1]["cluster_layers/captured_neuron"]
    assert rows[-1]["cluster/captured"] == pytest.approx(sum(shares) / (LAYERS - len(IDLE)))


@pytest.mark.parametrize("form", ["neuron", "low-bit"])
def test_thresholds_keep_all_neurons_of_an_expert_that_got_no_token(workplace, form):
    policies = "[dense,neuron-predictor,neuron-threshold]"
    run_train(workplace, policies=policies, stage="predict", **{"predictor.form": form, "run.name": form})
    thresholds = apc.load_run(workplace / "runs" / form).predictor.thresholds
    assert (thresholds == -torch.inf).nonzero().flatten().tolist() == IDLE and not thresholds.isnan().any()


def test_a_layers_density_is_over_all_tokens_of_its_experts():
    totals = torch.zeros(1, 4, len(FIELDS), dtype=torch.float64)
    totals[0, :, FIELDS.index("mask")] = torch.tensor([10.0, 30, 0, 60]).double()
    totals[0, :, FIELDS.index("neurons")] = torch.tensor([100.0, 100, 0, 100]).double()
    assert site_densities(totals, ["neuron"], experts=2) == {"neuron": [0.2, 0.6]}


def test_a_mixtures_weights_are_compared_with_those_it_was_fitted_with(workplace):
    model = make_model(workplace)
    assert weights_sample(model)["dtype"] == "float32" and weights_sample(model.bfloat16())["dtype"] == "bfloat16"


def test_a_kernel_is_refused_by_name(workplace):
    run_train(workplace, stage="cluster", **{"run.name": "codebook"})
    codebook = apc.load_run(workplace / "runs" / "codebook").codebook
    for kernel in ("auto", "torch"):
        with pytest.raises(UserError, match="experts.0: it is one of several experts, which no kernel supports"):
            apc.sparsify(make_model(workplace), codebook, kernel=kernel)


def test_an_expert_without_tokens_does_not_keep_clustering_from_converging(workplace):
    changes = {"cluster.tolerance": 0.9, "run.name": "tolerance", "stage": "cluster"}
    run_train(workplace, **changes)
    history = json.loads((workplace / "runs" / "tolerance" / "cluster.json").read_text())["history"]
    assert len(history) == 2 and history[-1]["empty"] == 0


def test_first_centroids_of_an_expert_without_tokens_take_few_reads(workplace, monkeypatch):
    names, read = [], RowReader.read
    monkeypatch.setattr(RowReader, "read", lambda *given: names.append(given[1]) or read(*given))
    run_train(workplace, **{"cluster.max_epochs": 1, "run.name": "reads", "stage": "cluster"})
    assert names.count("patterns") < 10 * LAYERS  # K rows at a time, three experts alone would take 3 · 640 / 6
