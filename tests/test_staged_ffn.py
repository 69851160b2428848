"""The staged FFN's kernels on the CPU and on a GPU agree with its definition in plain torch."""

import math

import pytest
import torch

from apc import ops
from apc.ops import copy_sums_sm80
from apc.ops.ffn_arguments import GROUP, Correction, LowBitCopy, LowRank, SpacedCopy, Stages
from apc.ops.nvrtc import compile_program
from apc.ops.score_curve import ScoreCurve
from apc.ops.staged_ffn import staged_ffn


def example(
    D,
    E,
    dtype,
    bits=3,
    projections=("gate", "up"),
    by_input=True,
    rank=5,
    inner=3,
    activation="silu",
    seed=0,
    spaced=False,
):
    """(hidden [E], weights, stages) that keep about half, a third and a quarter of the neurons."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    weights = ops.FFNWeights(*(randn(D, E).mul_(0.3).to(dtype) for _ in range(3)), activation)
    P, rows, width = len(projections), *((E, D) if by_input else (D, E))
    index = torch.randint(2**bits, (P, rows, width), generator=generator)
    planes = torch.stack([ops.pack((index >> bit & 1).bool()) for bit in range(bits)])
    curve = ScoreCurve(0.2 * randn(P, D), 0.3 * randn(P, D), 1 + 0.1 * randn(P, D), 0.2 * randn(D))
    copy = LowBitCopy(planes, curve, projections)
    if by_input:
        copy = copy._replace(norms=randn(E).abs() + 0.1, least=torch.tensor(0.4))
    thresholds = torch.tensor([1.0, 0.5, 1.0])
    if spaced:
        spacings = (0.1 + 0.1 * randn(2, E, -(-D // GROUP)).abs()).bfloat16()
        copy, thresholds = SpacedCopy(planes, spacings, copy.norms, copy.least), torch.tensor([2.0, 4.0, 4.0])
    low_rank = correction = None
    if rank:
        low_rank = LowRank(*((0.1 * randn(rank, i), 0.1 * randn(o, rank)) for i, o in ((E, D), (E, D), (D, E))))
    if inner:
        correction = Correction(0.1 * randn(inner, E), randn(inner), randn(inner, E), randn(E))
    norms = randn(D).abs() + 0.1
    stages = Stages(copy, thresholds, norms, low_rank, correction)
    return randn(E).to(dtype), weights, stages


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # on the CPU by Triton's interpreter


def on(device, parts):
    """The parts of an example, nested tuples of tensors, on a device."""
    if isinstance(parts, torch.Tensor):
        return parts.to(device)
    if not isinstance(parts, tuple):
        return parts
    moved = [on(device, part) for part in parts]
    return type(parts)(*moved) if hasattr(parts, "_fields") else tuple(moved)


def by_numba(hidden, weights, stages):
    from apc.ops.staged_ffn_cpu import StagedCPU

    return StagedCPU(stages, weights)(hidden[None], weights)[0]


def agree(output, hidden, weights, stages):
    exact = ops.FFNWeights(*(matrix.float() for matrix in weights[:3]), weights.activation)
    expected, rounding = staged_ffn(hidden.float()[None], exact, stages)[0], torch.finfo(output.dtype).eps / 2
    torch.testing.assert_close(output.float(), expected, rtol=rounding, atol=2e-5 * (1 + expected.abs().max().item()))
    return expected


@pytest.mark.parametrize(
    ("dtype", "D", "E", "settings"),
    [
        (torch.float32, 300, 96, {}),
        (torch.float32, 129, 45, {"bits": 1, "activation": "gelu"}),
        (torch.float32, 40, 33, {"projections": ("up",), "inner": 0, "activation": "relu"}),
        (torch.float32, 257, 70, {"by_input": False, "bits": 2, "rank": 17, "activation": "gelu_tanh"}),
        (torch.bfloat16, 300, 96, {}),
        (torch.bfloat16, 128, 45, {"projections": ("gate",), "rank": 0}),
        (torch.float16, 129, 70, {}),
        (torch.float16, 1, 7, {"rank": 0, "inner": 0}),
        (torch.float32, 300, 96, {"spaced": True, "bits": 4}),
        (torch.bfloat16, 129, 70, {"spaced": True, "bits": 4, "rank": 0, "inner": 0, "activation": "gelu_tanh"}),
    ],
)
def test_it_equals_the_definition(dtype, D, E, settings):
    hidden, weights, stages = example(D, E, dtype, **settings)
    agree(by_numba(hidden, weights, stages), hidden, weights, stages)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "D", "E", "settings"),
    [
        (torch.float32, 100, 96, {}),
        (torch.float32, 70, 45, {"bits": 1, "activation": "gelu"}),
        (torch.float32, 40, 33, {"projections": ("up",), "inner": 0, "activation": "relu"}),
        (torch.float32, 90, 70, {"by_input": False, "bits": 2, "activation": "gelu_tanh"}),
        (torch.float32, 90, 70, {"by_input": False, "projections": ("gate",)}),
        (torch.bfloat16, 100, 96, {}),
        (torch.float16, 1, 7, {"inner": 0}),
        (torch.float32, 100, 96, {"spaced": True, "bits": 4}),
        (torch.bfloat16, 100, 70, {"spaced": True, "bits": 4, "inner": 0, "activation": "gelu_tanh"}),
    ],
)
def test_on_a_gpu_it_equals_the_definition(device, dtype, D, E, settings):
    D = D if device == "cpu" else 15 * D + 2  # the interpreter is slow for each neuron
    hidden, weights, stages = on(device, example(D, E, dtype, rank=0, **settings))
    several = torch.stack([hidden, 0.5 * hidden.roll(1), hidden.flip(0)])
    for given in (several[:1], several):
        output = ops.staged_ffn_triton(given, weights, stages).float()
        exact = ops.FFNWeights(*(matrix.float() for matrix in weights[:3]), weights.activation)
        expected = staged_ffn(given.float(), exact, stages)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (output - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spaced", [False, True])
def test_on_a_gpu_few_inputs_and_nan(device, spaced):
    hidden, weights, stages = on(device, example(40, 33, torch.float32, rank=0, inner=0, spaced=spaced))
    for least in (math.inf, 5.0, 0.0):
        changed = stages._replace(copy=stages.copy._replace(least=hidden.new_tensor(least)))
        output = ops.staged_ffn_triton(hidden[None], weights, changed)
        torch.testing.assert_close(output, staged_ffn(hidden[None], weights, changed), rtol=1e-4, atol=1e-3)
    hidden[3] = math.nan
    every = stages._replace(thresholds=torch.full_like(stages.thresholds, -math.inf))
    assert ops.staged_ffn_triton(hidden[None], weights, every).isnan().all()


@pytest.mark.parametrize(
    ("sizes", "arch"),
    [
        (copy_sums_sm80.Sizes(4096, 448, 4, 2, 256, 224, torch.bfloat16), "sm_90a"),
        (copy_sums_sm80.Sizes(577, 48, 3, 2, 64, 0, torch.float32), "sm_80"),
        (copy_sums_sm80.Sizes(7, 4, 1, 1, 16, 0, torch.float16), "sm_89"),
    ],
)
def test_the_kernel_for_sums_compiles(sizes, arch):
    assert b"copy_sums" in compile_program(sizes.program(arch))


def test_what_no_gpu_kernel_takes_is_refused():
    hidden, weights, stages = example(40, 33, torch.float32)
    with pytest.raises(ValueError, match="takes no low-rank updates; use staged_ffn"):
        ops.staged_ffn_triton(hidden[None], weights, stages)
    for given, copy in (
        (torch.zeros(5, 33), stages.copy),
        (torch.zeros(1, 33), stages.copy._replace(planes=torch.zeros(5, 2, 33, 16, dtype=torch.uint8))),
        (torch.zeros(1, 33), stages.copy._replace(norms=None)),
    ):
        with pytest.raises(ValueError, match="up to 4 tokens and a copy of up to 4 bits and 2 projections, by input"):
            ops.nominate_triton(given, copy, stages.thresholds[0], stages.norms, "silu")
    with pytest.raises(ValueError, match=r"planes uint8 \[3, 2, 33, 16\] must be uint8 \[b, P, 34, 16\]"):
        ops.nominate_triton(torch.zeros(1, 34), stages.copy, stages.thresholds[0], stages.norms, "silu")


@pytest.mark.parametrize("spaced", [False, True])
def test_each_stage_decides(spaced):
    hidden, weights, stages = example(600, 64, torch.float32, spaced=spaced)
    outputs = [agree(by_numba(hidden, weights, stages), hidden, weights, stages)]
    for stage in range(3):
        thresholds = stages.thresholds.clone()
        for least in (-math.inf, math.inf):
            thresholds[stage] = least
            changed = stages._replace(thresholds=thresholds)
            outputs.append(agree(by_numba(hidden, weights, changed), hidden, weights, changed))
    assert len({tuple(output.tolist()) for output in outputs}) == 5  # no neuron is kept three times
    assert torch.equal(outputs[2], outputs[4]) and torch.equal(outputs[2], outputs[6])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_repeat_their_bits(threads):
    before = torch.get_num_threads()
    hidden, weights, stages = example(1500, 80, torch.float32)
    try:
        torch.set_num_threads(threads)
        first = by_numba(hidden, weights, stages)
        assert all(torch.equal(first, by_numba(hidden, weights, stages)) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    agree(first, hidden, weights, stages)


def test_rows_that_are_not_read_may_hold_anything():
    hidden, weights, stages = example(400, 64, torch.float32, rank=0)
    expected = by_numba(hidden, weights, stages)
    _, plain = stages.copy, staged_ffn(hidden[None], weights, stages)
    for matrix, stage in zip(weights[:3], range(3), strict=True):
        thresholds = torch.full((3,), -math.inf)
        thresholds[: stage + 1] = stages.thresholds[: stage + 1]
        kept = _kept(hidden, weights, stages, stage)
        matrix[~kept] = math.nan
    assert torch.equal(by_numba(hidden, weights, stages), expected) and plain.isfinite().all()


def _kept(hidden, weights, stages, stage):
    """The neurons whose rows this stage reads, bool [D]; NaNs in rows that earlier stages drop do not matter."""
    from apc.ops.sparse_ffn import act
    from apc.ops.staged_ffn import _scores, log_energy

    gate, up, _ = (matrix.nan_to_num(nan=0.0) for matrix in weights[:3])
    scores, of_up = _scores(hidden[None], stages, weights)
    values = act(hidden @ gate.T, weights.activation)[None]
    kept = scores >= stages.thresholds[0]
    if stage > 0:
        kept &= log_energy(values.abs() * stages.norms) + of_up >= stages.thresholds[1]
    if stage > 1:
        kept &= log_energy((values * (hidden @ up.T)).abs() * stages.norms) >= stages.thresholds[2]
    return kept[0]


def test_nan_shows_in_the_output():
    hidden, weights, stages = example(200, 64, torch.float32)
    hidden[3] = math.nan
    assert by_numba(hidden, weights, stages).isnan().all()


def test_calls_from_several_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    from apc.ops.staged_ffn_cpu import StagedCPU

    _, weights, stages = example(500, 64, torch.float32)
    layer, tokens = StagedCPU(stages, weights), torch.randn(64, 1, 64)
    expected = [layer(token, weights) for token in tokens]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(lambda token: layer(token, weights), tokens), expected))
