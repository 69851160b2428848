"""The sparse FFN on the CPU equals the formula in float64, with any threads, strides, widths and masks."""

import math

import pytest
import torch

from apc import ops
from apc.ops.sparse_ffn import act

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}  # relative: sums are float32, as the output


def ffn(n, D, E, dtype, activation="silu", extra=0):
    """(hidden [n, E], weights [D, E] whose rows are `extra` elements further apart)"""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(D, E + extra, generator=generator).mul_(0.3).to(dtype)[:, :E] for _ in range(3)]
    return torch.randn(n, E, generator=generator).to(dtype), ops.FFNWeights(*matrices, activation)


def formula(hidden, weights, masks):
    gate, up, down = (matrix.double() for matrix in weights[:3])
    x = hidden.double()
    return (act(x @ gate.T, weights.activation) * (x @ up.T) * masks) @ down


def by_numba(hidden, weights, masks):
    from apc.ops.sparse_ffn_cpu import sparse_ffn_cpu

    return sparse_ffn_cpu(hidden, weights, ops.pack(masks))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_the_formula(dtype, n):
    for D, E, extra, activation in (
        (300, 96, 0, "silu"), (97, 45, 3, "gelu"), (64, 32, 32, "gelu_tanh"), (5, 7, 0, "relu"), (1, 64, 0, "silu"),
    ):  # fmt: skip
        hidden, weights = ffn(n, D, E, dtype, activation, extra)
        masks = torch.rand(n, D) < 0.5
        output, expected = by_numba(hidden, weights, masks), formula(hidden, weights, masks)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=DTYPES[dtype] * (1 + expected.abs().max()))


def test_the_operation_adds_what_torch_adds_and_rounds_to_the_models_type():
    hidden, weights = ffn(2, 100, 64, torch.bfloat16)
    masks = ops.pack(torch.rand(6, 100) < 0.5)
    candidates = ops.Candidates(torch.rand(2, 3), torch.randint(6, (2, 3)).int())
    inner, correct, bias = torch.randn(2, 8), torch.randn(8, 64).bfloat16(), torch.randn(64)
    delta = ops.OutputDelta(inner, correct, bias, torch.randn(6, 64).bfloat16())
    output = ops.sparse_ffn(hidden, weights, ops.ActiveNeurons(masks, candidates), delta, kernel="numba")
    chosen = candidates.clusters.gather(1, candidates.logits.argmax(1, keepdim=True)).squeeze(1)
    expected = formula(hidden, weights, ops.unpack(masks[chosen], 100)) + inner @ correct.float() + bias
    expected = expected + delta.offsets[chosen].double()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "n", "kernel", "message"),
    [
        (torch.float64, 1, "numba", "kernel numba takes 16 or 32 bits on the CPU, got hidden float64"),
        (torch.float32, 5, "numba", "the kernels take up to 4 tokens"),
        (torch.float32, 1, "fast", "kernel fast: choose triton, numba, torch"),
    ],
)
def test_what_it_does_not_take_is_refused(dtype, n, kernel, message):
    hidden, weights = ffn(n, 40, 32, dtype)
    active = ops.ActiveNeurons(ops.pack(torch.ones(n, 40, dtype=torch.bool)))
    with pytest.raises(ValueError, match=message):
        ops.sparse_ffn(hidden, weights, active, kernel=kernel)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_repeat_their_bits(threads):
    before = torch.get_num_threads()
    hidden, weights = ffn(2, 1500, 80, torch.float32)
    masks = torch.rand(2, 1500) < 0.6
    expected = formula(hidden, weights, masks)
    try:
        torch.set_num_threads(threads)
        first = by_numba(hidden, weights, masks)
        assert all(torch.equal(first, by_numba(hidden, weights, masks)) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_a_token_without_neurons_gets_zeros_and_dropped_rows_are_never_used():
    hidden, weights = ffn(2, 40, 70, torch.float32)
    masks = torch.rand(2, 40) < 0.5
    masks[1] = False
    for matrix in weights[:3]:
        matrix[~masks[0]] = math.nan
    output = by_numba(hidden, weights, masks)
    assert output[0].isfinite().all() and output[0].abs().max() > 0 and (output[1] == 0).all()
    assert (by_numba(hidden, weights, torch.zeros_like(masks)) == 0).all()


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_nan_stays_with_its_token(activation):
    hidden, weights = ffn(3, 40, 70, torch.float32, activation)
    hidden[1, 69] = math.nan
    output = by_numba(hidden, weights, torch.ones(3, 40, dtype=torch.bool))
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()
