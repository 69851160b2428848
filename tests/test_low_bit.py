"""The low-bit copy: levels, bit planes and scores equal their definitions, and a saved file restores all of it."""

import pytest
import torch

import tiny
from apc import ops
from apc.config.load import load_config
from apc.config.schema import PredictorConfig
from apc.data.ffn import find_ffns
from apc.ops.low_bit_sm80 import Sizes
from apc.ops.nvrtc import compile_program
from apc.predict.low_bit import LowBitScores, at_16_bits, quantised
from apc.predict.predictor import KIND, VERSION, Predictor, PredictorHeader
from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors


def test_levels_are_the_nearest_ones():
    weights = torch.tensor([-9.0, -1.2, -0.4, 0.0, 0.9, 1.1, 7.0])
    assert quantised(weights, 1).tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert quantised(weights, 2).tolist() == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def random_scores(bits, reads=("gate", "up"), inputs=1.0):
    torch.manual_seed(bits)
    scores = LowBitScores(2, 20, 13, list(reads), bits, inputs=inputs)
    with torch.no_grad():
        for value in scores.parameters():
            value.copy_(torch.randn_like(value) * 2)
        if inputs < 1:
            scores.norms.copy_(torch.rand(2, 20) + 0.5)
            scores.input_thresholds.copy_(torch.tensor([0.4, 0.9]))
    return scores


def largest(scores, hidden, layer):
    """The inputs of a layer that reach its threshold, by the definition; the others are 0."""
    sizes = hidden.abs() * scores.norms[layer]
    used = sizes >= scores.input_thresholds[layer]
    assert used.any() and not used.all()
    return torch.where(used, hidden, 0)


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


@pytest.mark.parametrize("reads", [("gate", "up"), ("up",)], ids="+".join)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_a_copy_of_the_largest_inputs_scores_as_if_the_others_were_zero(bits, reads):
    scores, hidden, every = random_scores(bits, reads, 0.5), torch.randn(2, 5, 20), random_scores(bits, reads)
    expected = torch.stack([every.layer(i)(largest(scores, hidden[i], i)) for i in range(2)])
    for copy in (scores, scores.freeze(), scores.freeze().thaw()):
        layers = torch.stack([copy.layer(i)(hidden[i]) for i in range(2)])
        unbound = torch.stack([one(hidden[i]) for i, one in enumerate(copy.unbind())])
        for found in (copy(hidden), layers, unbound):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(copy.inputs_read(hidden)[1], copy.inputs_read(hidden[1], 1))


def test_bits_by_input_hold_the_same_levels_as_bits_by_neuron():
    frozen = random_scores(3, inputs=0.5).freeze()
    assert frozen.planes.shape == (3, 2, 2, 20, 16)  # [b, L, P, E, W(D)]
    assert torch.equal(frozen.levels(slice(None)), random_scores(3).freeze().levels(slice(None)))
    assert not ops.unpack(frozen.planes, 13)[:, 1, 0, 4].equal(ops.unpack(frozen.planes, 13)[:, 1, 0, 5])


def test_weights_of_inputs_that_take_no_part_have_no_gradient():
    scores, hidden = random_scores(4, inputs=0.5), torch.randn(2, 3, 20)
    hidden[:, :, :4] = 0  # never read
    hidden[:, 0, 5] = 9.0  # read
    scores(hidden).sum().backward()
    used = scores.inputs_read(hidden).any(1)
    inside = scores.weights.abs() <= 8
    assert not used[:, :4].any() and used[:, 5].all()
    gradient = scores.weights.grad != 0
    assert not gradient.transpose(-1, -2)[~used[:, None].expand(-1, 2, -1)].any()
    assert gradient[:, :, :, 5][inside[:, :, :, 5]].all()
    by_layer = random_scores(4, inputs=0.5)
    sum(one(hidden[i]).sum() for i, one in enumerate(by_layer.unbind())).backward()
    torch.testing.assert_close(by_layer.weights.grad, scores.weights.grad)


def test_norms_are_those_of_the_copied_projections_columns():
    ffns = find_ffns(tiny.make_model())
    scores = LowBitScores(3, 32, 52, ["gate", "up"], 2, inputs=0.5)
    scores.copy_ffns(ffns, torch.ones(3, 52))
    both = torch.cat([ffns[1].projection("gate"), ffns[1].projection("up")])
    assert torch.equal(scores.norms[1], at_16_bits(both.square().view(2, 52, 32).sum(1).sum(0).sqrt()))
    torch.testing.assert_close(scores.norms[1], both.norm(dim=0), rtol=4e-3, atol=0)


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


def by_input_predictor():
    header = PredictorHeader(2, 20, 4, {"neuron": 13}, "low-bit", corrects=True, bits=3, inputs=0.5)
    predictor = Predictor(header)
    predictor.low_bit = random_scores(3, inputs=0.5)
    return predictor


def test_a_copy_of_the_largest_inputs_is_counted_and_saved(tmp_path):
    predictor, hidden = by_input_predictor(), torch.randn(5, 20)
    small, correction = 2 * 13 * 3 + 13 + 20, 21 * 4 + 5 * 20  # curve, bias and norms are read in full
    for share in (1.0, 0.4):
        levels = 2 * 13 * 20 * share
        assert predictor.parameters_read("neuron", share) == pytest.approx(levels * 3 / 16 + small + correction)
        assert predictor.multiplications("neuron", share) == pytest.approx(levels + 2 * 13 * 3 + 20 + correction)
    assert predictor.parameters_read("neuron") == predictor.parameters_read("neuron", 0.5)
    assert predictor.multiplications("neuron") == predictor.multiplications("neuron", 0.5)
    expected = predictor.rounded().layer_outputs(1, "neuron", hidden)[0]
    predictor.save(tmp_path / "predictor.safetensors")
    read = Predictor.load(tmp_path / "predictor.safetensors")
    assert read.header == predictor.header and read.header.inputs == 0.5 and read.header.frozen
    assert torch.equal(read.layer_outputs(1, "neuron", hidden)[0], expected)
    copied = read.copy(corrects=True)
    torch.testing.assert_close(copied.layer_outputs(1, "neuron", hidden)[0], expected)
    assert copied.low_bit.weights.requires_grad and torch.equal(copied.low_bit.norms, predictor.low_bit.norms)


def test_a_file_of_version_3_reads_all_inputs(tmp_path):
    predictor = Predictor(PredictorHeader(2, 20, 4, {"neuron": 13}, "low-bit", bits=3))
    predictor.low_bit, path, hidden = random_scores(3), tmp_path / "predictor.safetensors", torch.randn(5, 20)
    predictor.rounded().save(path)
    header, tensors = load_tensors(path, KIND, (VERSION,))
    assert header.pop("inputs") == 1 and set(tensors) == {f"low_bit.{name}" for name in ("planes", *CURVE)}
    save_tensors(path, KIND, 3, header, tensors)
    for one in (Predictor.load(path), predictor):
        assert torch.equal(one.layer_outputs(1, "neuron", hidden)[0], random_scores_at_16_bits(hidden))


CURVE = ("scale", "slope", "power", "bias")


def random_scores_at_16_bits(hidden):
    scores = random_scores(3)
    with torch.no_grad():
        for value in scores.curve:
            value.copy_(at_16_bits(value))
        return scores.freeze().layer(1)(hidden)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "predictor.bits must be from 1 to 4"),
        ({"low_bit_projections": ["down"]}, r"predictor.low_bit_projections=\['down'\]"),
        ({"form": "low-bit", "inputs": 0.0}, "predictor.inputs must be above 0 and at most 1, got 0.0"),
        ({"form": "low-bit", "inputs": 1.5}, "predictor.inputs must be above 0 and at most 1, got 1.5"),
        ({"inputs": 0.5}, "predictor.inputs=0.5: predictor.form=cluster reads all inputs; leave it out, or set"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        PredictorConfig(**values)


@pytest.mark.parametrize("inputs", [0.0, 1.01, float("nan")])
def test_an_impossible_share_of_inputs_in_a_header_is_named(inputs):
    with pytest.raises(ValueError, match="inputs is"):
        PredictorHeader(2, 20, 4, {"neuron": 13}, "low-bit", inputs=inputs)
    with pytest.raises(ValueError, match="inputs is 0.5"):
        PredictorHeader(2, 20, 4, {"neuron": 13}, "neuron", inputs=0.5)


def test_speed_of_the_largest_inputs_is_refused(tmp_path):
    words = {"predictor.form": "low-bit", "predictor.inputs": 0.5, "speed": "true"}
    with pytest.raises(UserError, match="speed=true: only staged-neuron reads a copy at predictor.inputs=0.5"):
        load_config(None, tiny.tiny_overrides(tmp_path, **words))


def test_other_sites_are_refused():
    with pytest.raises(UserError, match="low-bit needs sites"):
        PredictorHeader(2, 20, 4, {"gate": 13}, "low-bit")
