"""Thresholds are exact, keep as many neurons as masks of a fixed size, and are saved with the predictor."""

import pytest
import torch

import apc
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder, ordered, unordered
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.sparsify import sparsify
from apc.tune.calibrate import SamplePass, find_thresholds
from apc.utils.errors import UserError


def test_keys_rise_with_the_values():
    values = torch.tensor([-torch.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 3e38, torch.inf])
    keys = ordered(values)
    assert (keys[1:] > keys[:-1]).all() and keys.min() >= 0 and keys.max() < 1 << 32
    assert torch.equal(unordered(keys), values)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 1.0])
def test_a_threshold_is_the_least_value_that_at_most_the_share_reaches(share):
    values = [torch.randn(7, 30).mul(4).round(), torch.randn(300) * 1e-3, torch.full((9,), -2.0), torch.zeros(0)]
    finder = ThresholdFinder(len(values), torch.device("cpu"))
    for narrowed in (False, True):
        for layer, part in enumerate(values):
            for half in part.chunk(2):
                finder.add(layer, half)
        if not narrowed:
            finder.narrow(torch.full((len(values),), share, dtype=torch.float64))
    for found, part in zip(finder.thresholds(), values, strict=True):
        allowed = round(share * part.numel())
        lower = unordered(ordered(found.view(1)) - 1)
        assert (part >= found).sum() <= allowed
        assert allowed == part.numel() and found == -torch.inf or (part >= lower).sum() > allowed


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("thresholds"))
    for form in ("neuron", "low-bit"):
        words = tiny.tiny_overrides(
            folder, policies="[dense,neuron-predictor,neuron-threshold]", **{"predictor.form": form, "run.name": form}
        )
        train.train(load_config(None, words))
    return folder


@pytest.mark.parametrize("form", ["neuron", "low-bit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_layer_keeps_as_many_neurons_as_a_mask_of_fixed_size(workplace, form, device):
    run = apc.load_run(workplace / "runs" / form)
    model, _ = load_model(ModelConfig(path=str(workplace / "model"), device=device), torch.device(device))
    windows, ffns = torch.randint(100, (7, 24), generator=torch.Generator().manual_seed(2)), find_ffns(model)
    thresholds = find_thresholds(SamplePass(model, ffns, run.codebook, run.predictor, windows, batch_windows=3))
    predictor, scores = run.predictor.to(device), {}

    class ScoreReader(ForwardReader):
        def see(self, tokens):
            logits, _ = predictor.layer_outputs(tokens.layer, "neuron", tokens.inputs[tokens.layer])
            scores[tokens.layer] = logits.float().cpu()

    sparsify(model, run.codebook, run.predictor, "neuron-predictor")
    hooks = ScoreReader(ffns, run.codebook).hook()
    model(windows.to(device))
    hooks.remove()
    apc.restore(model)
    for layer, values in scores.items():
        lower = unordered(ordered(thresholds[layer : layer + 1]) - 1)
        slack = 0 if device == "cpu" else 0.002 * values.numel()  # on a GPU rounding depends on the batch size
        assert (values >= thresholds[layer]).sum() - slack <= values.numel() / 2 < (values >= lower).sum() + slack


def test_a_run_uses_thresholds_and_saves_them(workplace, tmp_path):
    run = apc.load_run(workplace / "runs" / "low-bit")
    record = next(record for record in run.results["policies"] if record["policy"] == "neuron-threshold")
    fixed = next(record for record in run.results["policies"] if record["policy"] == "neuron-predictor")
    assert 0.4 < record["density"] < 0.6 and record["density"] != 0.5
    assert record["bytes_share"] - record["masked"]["density"] == pytest.approx(fixed["bytes_share"] - 0.5)
    run.predictor.save(tmp_path / "p.safetensors")
    assert torch.equal(Predictor.load(tmp_path / "p.safetensors").thresholds, run.predictor.thresholds)
    assert run.predictor.copy().thresholds is None


def test_a_predictor_without_thresholds_is_refused(workplace):
    run = apc.load_run(workplace / "runs" / "neuron")
    model, _ = load_model(ModelConfig(path=str(workplace / "model"), device="cpu"), torch.device("cpu"))
    with pytest.raises(UserError, match="policy neuron-threshold: the predictor has no thresholds; train it again"):
        sparsify(model, run.codebook, run.predictor.copy(), "neuron-threshold")


def test_two_ranks_find_thresholds(workplace):
    changes = {"predictor.form": "neuron", "stage": "predict"}
    tiny.run_ranks(2, tiny.tiny_overrides(workplace, **changes, **{"run.name": "ranks"}))
    predictor = apc.load_run(workplace / "runs" / "ranks").predictor
    assert predictor.thresholds is not None and predictor.thresholds.abs().max() > 0
