"""Top-m masks, the KL divergence and the score curve: values and gradients equal the formulas, in Triton and torch."""

import pytest
import torch

from apc import ops
from apc.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS = [("torch", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "D", "m"), [(3, 1, 1), (5, 52, 26), (2, 100, 1), (2, 129, 129), (1, 1536, 700)])
def test_the_kernel_keeps_the_m_largest(device, dtype, rows, D, m):
    drawn = torch.randn(2, rows, D)
    special = drawn.clone()
    special[..., ::3], special[0, 0, 0] = 0.0, -torch.inf
    special[..., 1::5] = -0.0
    special[-1, -1, -1] = torch.inf
    for values in (
        drawn,
        (drawn * 2).round() / 2,
        special,
        torch.full_like(drawn, -torch.inf),
        drawn.mT.contiguous().mT,
    ):
        values = values.to(dtype)
        assert torch.equal(ops.top_mask_triton(values.to(device), m).cpu(), reference.top_mask(values.float(), m))


@pytest.mark.parametrize("device", DEVICES)
def test_unchecked_nan_comes_last(device):
    values = torch.tensor([[torch.nan, 1.0, -torch.inf, 3.0, torch.nan]], device=device)
    assert ops.top_mask(values, 3, check=False).tolist() == [[True, True, False, True, False]]  # −∞ and NaN tie


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (2, 5, 300), (0, 7)])
def test_the_kernel_packs(device, shape):
    active = torch.rand(*shape) < 0.5
    assert torch.equal(ops.pack_triton(active.to(device)).cpu(), ops.pack(active))
    if active.dim() > 1 and shape[0] > 1:
        assert torch.equal(ops.pack_triton(active.mT.to(device)).cpu(), ops.pack(active.mT.contiguous()))
        assert torch.equal(ops.pack_triton(active[..., 1:].to(device)).cpu(), ops.pack(active[..., 1:].contiguous()))


def test_unsupported_inputs_are_refused():
    with pytest.raises(ValueError, match="top_mask_triton takes floats"):
        ops.top_mask_triton(torch.zeros(2, 4, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="NaN"):
        ops.top_mask_triton(torch.tensor([torch.nan]), 1)
    with pytest.raises(ValueError, match="straight_through wants scores as float32"):
        ops.straight_through(torch.zeros(2, 4).half(), 1, 0.5)
    with pytest.raises(ValueError, match="m must be from 1"):
        ops.straight_through(torch.zeros(2, 4), 5, 0.5)
    with pytest.raises(ValueError, match="divergence wants two tensors"):
        ops.divergence(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"products \[G, n, P, D\]"):
        ops.score_curve(torch.zeros(1, 2, 2, 5), *(torch.zeros(1, 2, 4) for _ in range(3)), torch.zeros(1, 5))


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hard_mask_with_the_gradient_of_a_sigmoid(way, device, dtype):
    function = ops.straight_through if way == "torch" else ops.straight_through_triton
    scores = torch.tensor(
        [[0.3, 2.0, 0.3, -1.0, 0.9], [torch.nan, 0.0, 1.0, 2.0, 3.0]], device=device, requires_grad=True
    )
    mask = function(scores, 3, 0.5, dtype)
    assert mask.dtype == dtype and mask[0].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]  # ties go to the lowest neuron
    assert mask[1].isnan().all()  # so that the loss becomes NaN
    weights = torch.arange(1.0, 6.0, device=device)
    (mask[0] * weights.to(dtype)).sum().backward()
    expected = (scores.detach()[0] - 0.3).div(0.5).sigmoid()
    assert scores.grad.dtype == torch.float32 and torch.allclose(
        scores.grad[0], weights * expected * (1 - expected) / 0.5
    )


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "V"), [(1, 3), (5, 4099), (2, 49152)])
def test_the_divergence_and_its_gradient(way, device, dtype, n, V):
    function = ops.divergence if way == "torch" else ops.divergence_triton
    logits, dense = ((torch.randn(n, V) * 4).to(dtype).to(device) for _ in range(2))
    dense[0, 1] = -torch.inf
    if V > 9000:
        dense[1, :9000] = -torch.inf
    logits.requires_grad_(True)
    weights = torch.rand(n, device=device)
    result = function(logits, dense)
    (result * weights).sum().backward()
    exact = logits.detach().double().requires_grad_(True)
    target = dense.double().log_softmax(-1)
    each = torch.where(target == -torch.inf, 0, target.exp() * (target - exact.log_softmax(-1))).sum(-1)
    (each * weights).sum().backward()
    assert result.dtype == torch.float32 and torch.allclose(result.double(), each, rtol=1e-4, atol=1e-5)
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    assert logits.grad.dtype == dtype and torch.allclose(logits.grad.double(), exact.grad, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("G", "n", "P", "D"), [(1, 1, 1, 3), (2, 130, 2, 52), (1, 17, 1, 150)])
def test_the_curve_and_its_gradients(way, device, dtype, G, n, P, D):
    function = ops.score_curve if way == "torch" else ops.score_curve_triton
    products = (3 * torch.randn(G, n, P, D)).to(dtype).to(device).requires_grad_(True)
    parts = [torch.randn(G, P, D, device=device).requires_grad_(True) for _ in range(3)] + [
        torch.randn(G, D, device=device).requires_grad_(True)
    ]
    weights = torch.randn(G, n, D, device=device)
    result = function(products, *parts)
    (result * weights).sum().backward()
    exact = [value.detach().double().requires_grad_(True) for value in (products, *parts)]
    z = exact[0] * exact[1].unsqueeze(1)
    expected = exact[4].unsqueeze(1) + (exact[2].unsqueeze(1) * z + exact[3].unsqueeze(1) * (1 + z * z).log()).sum(2)
    (expected * weights).sum().backward()
    assert result.dtype == torch.float32 and torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5)
    for value, other in zip((products, *parts), exact, strict=True):
        tolerance = 8e-3 if value.dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(value.grad.double(), other.grad, rtol=tolerance, atol=tolerance)
