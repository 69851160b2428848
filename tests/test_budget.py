"""A budget of bytes is met, and spent where it costs least."""

import pytest
import torch
from scipy.optimize import linprog

from apc.sparse.policies.budget import allocate_inputs, allocate_stages, lower_hull

SKIPPED = [level / 10 for level in range(1, 11)]


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.55, 0.9, 1.0])
def test_inputs_meet_the_budget_at_the_least_cost(budget):
    """Against the linear program over convex curves; a curve with a bump is no better than its hull."""
    skipped = torch.tensor(SKIPPED, dtype=torch.float64)
    powers = torch.tensor([[1.5, 3.0], [2.0, 1.2], [4.0, 2.5]], dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0], [0.3, 0.1], [5.0, 1.0]], dtype=torch.float64)
    curves = sizes.unsqueeze(-1) * skipped ** powers.unsqueeze(-1)
    weights = (2 / 3, 1 / 3)
    each = torch.tensor(weights, dtype=torch.float64)
    kept, cost = allocate_inputs(curves, SKIPPED, weights, budget)
    assert float((kept * each).sum() / 3) == pytest.approx(budget)
    slopes = torch.diff(curves, prepend=torch.zeros(3, 2, 1, dtype=torch.float64), dim=-1).flatten()
    saved = (each / 10 / 3).repeat(3).repeat_interleave(10)
    best = linprog(slopes.numpy(), A_eq=saved[None].numpy(), b_eq=[1 - budget], bounds=(0, 1))
    assert cost == pytest.approx(best.fun, abs=1e-9)
    bumpy = curves.clone()
    bumpy[0, 0, 5] += 1
    assert allocate_inputs(bumpy, SKIPPED, weights, budget)[1] >= cost - 1e-12


def test_stages_meet_the_budget_and_no_cut_lies_below_the_hull():
    generator = torch.Generator().manual_seed(0)
    L, B = 3, 4
    counts = torch.randint(1, 50, (L, B, B, B), generator=generator).double()
    costs = torch.rand(L, B, B, B, generator=generator).double() * counts

    def outcome(layer, cut):
        gate, up, down = cut
        read = counts[layer, :gate].sum(), counts[layer, :gate, :up].sum(), counts[layer, :gate, :up, :down].sum()
        lost = costs[layer].sum() - costs[layer, :gate, :up, :down].sum()
        return torch.stack(read) / counts[layer].sum(), lost

    for total in (0.3, 0.5, 0.8, 1.0):
        shares = allocate_stages(counts, costs, total)
        assert shares.mean().item() == pytest.approx(total)
        assert (shares[:, 0] >= shares[:, 1]).all() and (shares[:, 1] >= shares[:, 2]).all()
    for layer in range(L):  # nothing reads less and loses less than the cheapest mix of two cuts
        cuts = torch.cartesian_prod(*[torch.arange(1, B + 1)] * 3).tolist()
        points = sorted((read.mean().item(), lost.item()) for read, lost in (outcome(layer, cut) for cut in cuts))
        hull = [points[index] for index in lower_hull(points)]
        assert hull[0] == points[0] and hull[-1][0] == pytest.approx(1)
        for x, y in points:
            ends = [pair for pair in zip(hull, hull[1:], strict=False) if pair[0][0] - 1e-9 <= x <= pair[1][0] + 1e-9]
            (x0, y0), (x1, y1) = ends[0]
            assert y >= y0 + (y1 - y0) * (x - x0) / (x1 - x0) - 1e-9 * points[0][1]


@pytest.mark.parametrize("total", [0.2, 0.5, 0.8])
def test_the_layer_whose_neurons_cost_most_reads_most(total):
    L, B = 4, 4
    costs = torch.rand(L, B, B, B, generator=torch.Generator().manual_seed(1)).double()
    costs *= torch.tensor([0.1, 1, 3, 9]).view(L, 1, 1, 1)
    read = allocate_stages(torch.full((L, B, B, B), 10.0).double(), costs, total).mean(1)
    assert read.mean().item() == pytest.approx(total)
    assert read[3] == read.max() and read[0] == read.min() < read[3]
