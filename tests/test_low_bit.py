"""The low-bit copy: levels as defined, the same as bits, scores by the formula, and its file holds all of it."""

import pytest
import torch

from apc.errors import UserError
from apc.low_bit import LowBitScores, quantised
from apc.predictor import Predictor, PredictorConfig


def test_levels_are_the_nearest_ones():
    weights = torch.tensor([-9.0, -1.2, -0.4, 0.0, 0.9, 1.1, 7.0])
    assert quantised(weights, 1).tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert quantised(weights, 2).tolist() == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def made(bits, reads=("gate", "up")):
    torch.manual_seed(bits)
    scores = LowBitScores(2, 20, 13, list(reads), bits)
    with torch.no_grad():
        for value in scores.parameters():
            value.copy_(torch.randn_like(value) * 2)
    return scores


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_hold_the_levels_and_scores_follow_the_formula(bits):
    scores, hidden = made(bits), torch.randn(2, 5, 20)
    frozen = scores.freeze()
    assert frozen.weights is None and frozen.planes.shape == (bits, 2, 2, 13, 16)
    assert torch.equal(frozen.levels(1), quantised(scores.weights[1], bits)) and torch.equal(frozen.thaw().weights, quantised(scores.weights, bits))
    expected = scores.bias[1].clone()
    for place in range(2):
        z = scores.scale[1, place] * (hidden[1] @ quantised(scores.weights[1, place], bits).T)
        expected = expected + scores.slope[1, place] * z + scores.power[1, place] * torch.log1p(z * z)
    assert torch.allclose(frozen.layer(1)(hidden[1]), expected, atol=1e-4) and torch.allclose(scores(hidden)[1], expected, atol=1e-4)


def test_the_gradient_passes_within_the_levels():
    scores = made(2)
    scores(torch.randn(2, 5, 20)).sum().backward()
    outside = scores.weights.abs() > 2
    assert outside.any() and not scores.weights.grad[outside].any() and scores.weights.grad[~outside].any()


def test_a_predictor_of_it_is_counted_rounded_and_saved(tmp_path):
    predictor = Predictor(2, 20, 4, {"neuron": 13}, "low-bit", bits=3, reads=["gate"], corrects=True)
    predictor.low_bit = made(3, ["gate"])
    assert predictor.parameters_read("neuron") == 13 * (20 * 3 / 16 + 3) + 13 + 21 * 4 + 5 * 20
    assert predictor.multiplications("neuron") == 13 * 23 + 21 * 4 + 5 * 20
    predictor.rounded().save(tmp_path / "predictor.safetensors")
    read = Predictor.load(tmp_path / "predictor.safetensors")
    hidden = torch.randn(5, 20)
    for found, expected in zip(read.layer_outputs(1, "neuron", hidden), predictor.layer_outputs(1, "neuron", hidden), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("values", "message"), [({"bits": 5}, "predictor.bits must be from 1 to 4"), ({"reads": ["down"]}, r"predictor.reads=\['down'\]")])
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        PredictorConfig(**values)


def test_other_sites_are_refused():
    with pytest.raises(UserError, match="low-bit needs sites"):
        Predictor(2, 20, 4, {"gate": 13}, "low-bit")
