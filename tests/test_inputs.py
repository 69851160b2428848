"""A run whose low-bit copy is read at the largest inputs: the share is exact on fit text, and costs are as measured."""

from pathlib import Path

import pytest
import torch

import apc
import evaluate
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.estimate import estimate
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.histogram import ordered, unordered
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.sparsify import sparsify
from apc.tune.calibrate import SamplePass, find_input_thresholds
from apc.utils.errors import UserError

SHARE = 0.4
POLICIES = "[dense,neuron-predictor,neuron-threshold]"


def overrides(folder, **changes):
    values = {"predictor.form": "low-bit", "predictor.inputs": SHARE, "predictor.bits": 3, "policies": POLICIES}
    return tiny.tiny_overrides(folder, **(values | changes))


def run_train(folder, **changes):
    return train.train(load_config(None, overrides(folder, **changes)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("inputs"))
    run_train(folder)
    return folder


def model_of(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


def random_predictor(ffns, lookahead):
    header = PredictorHeader(3, 32, 4, {"neuron": 52}, "low-bit", lookahead, bits=2, inputs=SHARE)
    predictor = Predictor(header)
    predictor.low_bit.copy_ffns(ffns, torch.ones(3, 52))
    with torch.no_grad():
        predictor.low_bit.power.fill_(1)
    return predictor


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_on_the_sample_the_share_of_inputs_is_exact(workplace, lookahead, masked):
    codebook, model = apc.load_run(workplace / "runs" / "run").codebook, model_of(workplace)
    ffns, windows = find_ffns(model), torch.randint(100, (5, 24), generator=torch.Generator().manual_seed(2))
    predictor, sizes = random_predictor(ffns, lookahead), {}
    thresholds = find_input_thresholds(SamplePass(model, ffns, codebook, predictor, windows, 2), SHARE, masked)

    class Reader(ForwardReader):
        def see(self, tokens):
            both = torch.cat([ffns[tokens.layer].projection(name) for name in ("gate", "up")])
            hidden = tokens.inputs[max(tokens.layer - lookahead, 0)]
            sizes[tokens.layer] = hidden.abs() * both.norm(dim=0).bfloat16().float()

    if masked:
        sparsify(model, codebook, predictor, "neuron-predictor")
    hooks = Reader(ffns, codebook, lookahead).hook()
    with torch.no_grad():
        model(windows)
    hooks.remove()
    assert sorted(sizes) == [0, 1, 2]
    for layer, values in sizes.items():
        allowed, lower = round(SHARE * values.numel()), unordered(ordered(thresholds[layer : layer + 1]) - 1)
        near = ((values / thresholds[layer] - 1).abs() < 1e-5).sum()  # norms of two sums differ in the last bit
        assert (values >= thresholds[layer]).sum() - near <= allowed < (values >= lower).sum() + near


def test_costs_count_the_inputs_that_were_read(workplace):
    run = apc.load_run(workplace / "runs" / "run")
    assert run.results["conditions"]["predictor"] == "low-bit gate+up at 3 bit, 0.4 of the inputs, lookahead 0"
    dense, *records = run.results["policies"]
    assert set(dense["read"]) == {"gate", "up", "down"}
    for record in records:
        read, density = record["masked"]["read"], record["masked"]["density"]
        assert read["gate"] == read["up"] == read["down"] == pytest.approx(density)
        assert 0.3 < read["copy"] < 0.5 and len(record["per_layer"]["read"]["copy"]) == 3
        levels, whole = 2 * 52 * 32 * read["copy"], 3 * 32 * 52
        assert record["bytes_share"] == pytest.approx(density + (levels * 3 / 16 + 2 * 52 * 3 + 52 + 32) / whole)
        assert record["flops_share"] == pytest.approx(density + (levels + 2 * 52 * 3 + 32) / whole)


def test_staged_masks_count_them_too(workplace):
    words = {"policies": "[dense,staged-neuron]", "bytes": 0.7, "run.name": "staged"}
    staged = run_train(workplace, **words)["policies"][1]
    read = dict(staged["masked"]["read"])
    copy = 2 * 52 * 32 * read.pop("copy") * 3 / 16 + 2 * 52 * 3 + 52 + 32
    assert read["gate"] > read["down"] and staged["bytes_share"] == pytest.approx(
        sum(read.values()) / 3 + copy / (3 * 32 * 52)
    )
    assert staged["bytes_share"] == pytest.approx(0.7, abs=0.07)


def test_thresholds_of_inputs_stay_while_tuning_and_are_found_again_under_the_tuned_masks(workplace):
    tuned = run_train(workplace, **{"run.name": "tuned", "tune.max_epochs": 2, "tune.policy": "neuron-predictor"})
    folder = apc.load_run(workplace / "runs" / "tuned").folder
    before, after = Predictor.load(folder.predictor), Predictor.load(folder.tuned("predictor"))
    assert torch.equal(before.low_bit.norms, after.low_bit.norms)
    assert not torch.equal(before.low_bit.input_thresholds, after.low_bit.input_thresholds)
    torch.testing.assert_close(before.low_bit.input_thresholds, after.low_bit.input_thresholds, rtol=0.5, atol=0)
    assert before.copy().low_bit.input_thresholds.equal(before.low_bit.input_thresholds)
    assert tuned["policies"][1]["masked"]["read"]["copy"] == pytest.approx(SHARE, abs=0.1)


def test_two_ranks_choose_the_same_inputs(workplace):
    changes = {"run.name": "ranks", "stage": "predict", "predictor.max_epochs": 1, "predictor.lr": 1e-30}
    tiny.run_ranks(2, overrides(workplace, **changes))
    run_train(workplace, **(changes | {"run.name": "one"}))
    one, two = (apc.load_run(workplace / "runs" / name).predictor.low_bit for name in ("one", "ranks"))
    assert torch.equal(one.input_thresholds, two.input_thresholds) and one.input_thresholds.min() > 0


def test_a_model_is_run_and_evaluated_with_the_saved_predictor(workplace):
    run, model, tokens = apc.load_run(workplace / "runs" / "run"), model_of(workplace), torch.arange(9)[None]
    with torch.no_grad():
        dense = model(tokens).logits
        assert not torch.equal(apc.sparsify(model, run.codebook, run.predictor)(tokens).logits, dense)
    words = [f"checkpoint={workplace / 'runs' / 'run'}", "run.name=again"]
    again = evaluate.evaluate(evaluate.config_of_run(None, words))
    assert [record["perplexity"] for record in again["policies"]] == [
        record["perplexity"] for record in run.results["policies"]
    ]


@pytest.mark.parametrize("policy", ["neuron-predictor", "neuron-threshold"])
def test_kernels_refuse_it_in_one_line(workplace, policy):
    run, model = apc.load_run(workplace / "runs" / "run"), model_of(workplace)
    line = f"^policy {policy}: no kernel reads a low-bit copy at 0.4 of its inputs for it .*; use kernel=None, or"
    with pytest.raises(UserError, match=line):
        apc.sparsify(model, run.codebook, run.predictor, policy, kernel="torch")


def test_experts_read_their_own_largest_inputs(tmp_path):
    folder = tiny.make_workplace(tmp_path, "mixtral")
    results = run_train(folder)
    thresholds = apc.load_run(folder / "runs" / "run").predictor.low_bit.input_thresholds
    assert thresholds.shape == (12,) and len(thresholds.unique()) == 12
    assert results["policies"][1]["masked"]["read"]["copy"] == pytest.approx(SHARE, abs=0.15)


def test_the_estimated_file_has_the_size_of_the_written_one(workplace):
    cfg = load_config(None, overrides(workplace))
    disk = estimate.estimate(cfg, estimate.read_workload(cfg), 1).disk["predictor"]
    written = Path(workplace / "runs" / "run" / "predictor.safetensors").stat().st_size
    assert disk < written < disk + 6000  # its header with the provenance
