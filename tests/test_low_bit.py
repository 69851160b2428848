"""The low-bit copy: levels, bit planes and scores equal their definitions, and a saved file restores all of it."""

import pytest
import torch

from apc import ops
from apc.config.schema import PredictorConfig
from apc.ops.low_bit_sm80 import Sizes
from apc.ops.nvrtc import compile_program
from apc.predict.low_bit import LowBitScores, quantised
from apc.predict.predictor import Predictor, PredictorHeader
from apc.utils.errors import UserError


def test_levels_are_the_nearest_ones():
    weights = torch.tensor([-9.0, -1.2, -0.4, 0.0, 0.9, 1.1, 7.0])
    assert quantised(weights, 1).tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert quantised(weights, 2).tolist() == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def random_scores(bits, reads=("gate", "up")):
    torch.manual_seed(bits)
    scores = LowBitScores(2, 20, 13, list(reads), bits)
    with torch.no_grad():
        for value in scores.parameters():
            value.copy_(torch.randn_like(value) * 2)
    return scores


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_hold_the_levels_and_scores_follow_the_formula(bits):
    scores, hidden = random_scores(bits), torch.randn(2, 5, 20)
    frozen = scores.freeze()
    assert frozen.weights is None and frozen.planes.shape == (bits, 2, 2, 13, 16)
    assert torch.equal(frozen.levels(1), quantised(scores.weights[1], bits)) and torch.equal(
        frozen.thaw().weights, quantised(scores.weights, bits)
    )
    expected = scores.bias[1].clone()
    for place in range(2):
        z = scores.scale[1, place] * (hidden[1] @ quantised(scores.weights[1, place], bits).T)
        expected = expected + scores.slope[1, place] * z + scores.power[1, place] * torch.log1p(z * z)
    assert torch.allclose(frozen.layer(1)(hidden[1]), expected, atol=1e-4) and torch.allclose(
        scores(hidden)[1], expected, atol=1e-4
    )


WAYS = [("triton", "cpu"), *(pytest.param(way, "cuda", marks=pytest.mark.gpu) for way in ("triton", "b1"))]


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize(("bits", "reads", "n", "E", "D"), [(1, 2, 1, 48, 200), (2, 1, 3, 300, 130), (3, 2, 4, 20, 13)])
def test_the_kernel_scores_and_masks_as_the_formula(way, device, bits, reads, n, E, D):
    check_scores(way, device, bits, reads, n, E, D, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["triton", "b1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "n", "E", "D"),
    [(1, 1, 4096, 14336), (3, 1, 4096, 2000), (1, 4, 4096, 1000), (4, 2, 576, 1536), (1, 1, 8192, 700)],
)
def test_models_sizes(way, dtype, bits, n, E, D):
    check_scores(way, "cuda", bits, 2, n, E, D, dtype)


def check_scores(way, device, bits, reads, n, E, D, dtype):
    planes = ops.pack(torch.rand(bits, reads, D, E) < 0.5).to(device)
    scale, slope, power = (torch.randn(reads, D, device=device) for _ in range(3))
    hidden, bias = (
        torch.randn(n, E, device=device) * torch.tensor([1.0, 80.0, 0.01, 3.0], device=device)[:n, None],
        torch.randn(D, device=device),
    )
    hidden = hidden.to(dtype)
    arguments = hidden, planes, ops.ScoreCurve(scale, slope, power, bias)
    expected = ops.low_bit_scores(*arguments, by_triton=False)
    levels = sum(ops.unpack(plane, E).double() * 2**place for place, plane in enumerate(planes)) + 0.5 - 2 ** (bits - 1)
    z = scale.double() * (hidden.double() @ levels.flatten(0, 1).T).unflatten(-1, (reads, D))
    exact = bias + (slope * z + power * torch.log1p(z * z)).sum(1)
    assert ((expected.double() - exact).norm(dim=1) < 1e-4 * exact.norm(dim=1)).all()
    kernel = {"triton": ops.low_bit_scores_triton, "b1": ops.low_bit_scores_b1}[way]
    scores = kernel(*arguments)
    assert ((scores.double() - exact).norm(dim=1) < (2e-3 if way == "triton" else 1e-5) * exact.norm(dim=1)).all()
    threshold = expected.median()
    assert torch.equal(kernel(*arguments, threshold), ops.pack(scores >= threshold))
    assert torch.equal(
        ops.low_bit_scores(*arguments, threshold=threshold, by_triton=False), ops.pack(expected >= threshold)
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize(
    ("tokens", "E", "D", "bits", "projections", "masks", "dtype"),
    [
        (1, 4096, 14336, 1, 2, True, torch.bfloat16),
        (4, 576, 1536, 3, 2, False, torch.float16),
        (2, 20, 13, 4, 1, True, torch.float32),
    ],
)
def test_the_b1_kernel_compiles(arch, tokens, E, D, bits, projections, masks, dtype):
    program, shared = Sizes(tokens, E, D, bits, projections, masks, dtype).program(arch, warps=7)
    assert b"low_bit" in compile_program(program) and shared < 99 * 1024


def test_the_kernel_refuses_what_does_not_fit():
    planes = torch.zeros(1, 2, 9, 16, dtype=torch.uint8)
    curve = ops.ScoreCurve(*[torch.zeros(2, 9)] * 3, torch.zeros(9))
    with pytest.raises(ValueError, match="must be uint8"):
        ops.low_bit_scores(torch.zeros(1, 200), planes, curve)
    with pytest.raises(ValueError, match="up to 4 tokens"):
        ops.low_bit_scores(torch.zeros(5, 20), planes, curve, by_triton=True)
    with pytest.raises(ValueError, match=r"bias float32 \[8\]"):
        ops.low_bit_scores(torch.zeros(1, 20), planes, curve._replace(bias=curve.bias[:8]))


def test_the_gradient_passes_within_the_levels():
    scores = random_scores(2)
    scores(torch.randn(2, 5, 20)).sum().backward()
    outside = scores.weights.abs() > 2
    assert outside.any() and not scores.weights.grad[outside].any() and scores.weights.grad[~outside].any()


def test_a_predictor_of_it_is_counted_rounded_and_saved(tmp_path):
    header = PredictorHeader(2, 20, 4, {"neuron": 13}, "low-bit", corrects=True, bits=3, low_bit_projections=["gate"])
    predictor = Predictor(header)
    predictor.low_bit = random_scores(3, ["gate"])
    assert predictor.parameters_read("neuron") == 13 * (20 * 3 / 16 + 3) + 13 + 21 * 4 + 5 * 20
    assert predictor.multiplications("neuron") == 13 * 23 + 21 * 4 + 5 * 20
    predictor.rounded().save(tmp_path / "predictor.safetensors")
    read = Predictor.load(tmp_path / "predictor.safetensors")
    hidden = torch.randn(5, 20)
    for output, expected in zip(
        read.layer_outputs(1, "neuron", hidden), predictor.layer_outputs(1, "neuron", hidden), strict=True
    ):
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "predictor.bits must be from 1 to 4"),
        ({"low_bit_projections": ["down"]}, r"predictor.low_bit_projections=\['down'\]"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        PredictorConfig(**values)


def test_other_sites_are_refused():
    with pytest.raises(UserError, match="low-bit needs sites"):
        PredictorHeader(2, 20, 4, {"gate": 13}, "low-bit")
