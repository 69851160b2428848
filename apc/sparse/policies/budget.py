"""Allocates a budget of bytes to layers, and in each layer to what a policy reads, so that the cost is least.

Each layer has a curve of cost over bytes. Only corners of the curve's lower convex hull are considered. Budgets are
spent in the order of cost saved per byte; the last step is taken in part.

Shape letters: L layers, J shares, B levels.
"""

import torch
from torch import Tensor

_STEPS = 1024  # cuts whose shares round to the same of so many steps compete; the cheapest stays


def allocate_inputs(
    costs: Tensor, skipped: list[float], weights: tuple[float, float], budget: float
) -> tuple[Tensor, float]:
    """The shares of x and h that each layer reads, float64 [L, 2], and their cost in nats per token.

    costs: float64 [L, 2, J], of not reading each of the J shares in `skipped`; weights: the shares of an FFN's bytes
    that belong to x and to h; budget: the share of all bytes to read, from 0 to 1.
    """
    steps = []  # (cost per byte, layer, kind, skipped share at the end, bytes saved, cost)
    for layer, curves in enumerate(costs.tolist()):
        for kind, curve in enumerate(curves):
            points = list(zip([0.0, *skipped], [0.0, *curve], strict=True))
            hull = [points[index] for index in lower_hull(points)]
            for (start, below), (end, above) in zip(hull, hull[1:], strict=False):
                saved = weights[kind] * (end - start) / len(costs)
                steps.append(((above - below) / saved, layer, kind, end, saved, above - below))
    kept, left, total = torch.ones(len(costs), 2, dtype=torch.float64), 1 - budget, 0.0
    for _, layer, kind, end, saved, cost in sorted(steps):
        part = min(1.0, left / saved)
        kept[layer, kind] -= part * (kept[layer, kind] - (1 - end))
        left, total = left - part * saved, total + part * cost
        if left <= 0:
            break
    return kept, total


def allocate_stages(counts: Tensor, costs: Tensor, total: float) -> Tensor:
    """The shares that three stages keep in each layer, float64 [L, 3], with the mean `total` and the least cost.

    counts, costs: float64 [L, B, B, B], the number of neurons, and the cost of dropping them, by their levels in the
    three rankings (0 is the highest).
    """
    shares, lost = _cuts(counts, costs)
    steps, chosen = [], torch.zeros(len(counts), 3, dtype=torch.float64)
    for layer, (read, cost) in enumerate(zip(shares.mean(-1).tolist(), lost.tolist(), strict=True)):
        cheapest: dict[int, int] = {}  # the cut for each step of the share
        for cut, share in enumerate(read):
            step = round(share * _STEPS)
            if step not in cheapest or cost[cut] < cost[cheapest[step]]:
                cheapest[step] = cut
        cuts = [cut for _, cut in sorted(cheapest.items())]
        hull = [cuts[index] for index in lower_hull([(read[cut], cost[cut]) for cut in cuts])]
        chosen[layer] = shares[layer, hull[0]]
        for before, after in zip(hull, hull[1:], strict=False):
            steps.append(((cost[after] - cost[before]) / (read[after] - read[before]), layer, after))
    for _, layer, cut in sorted(steps):
        step = shares[layer, cut] - chosen[layer]
        part = min(1.0, (len(counts) * total - float(chosen.mean(-1).sum())) / float(step.mean()))
        if part <= 0:
            break
        chosen[layer] += part * step
    return chosen


def _cuts(counts: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """For each triple of levels to cut at: the shares that the stages read [L, B³, 3], and the cost lost [L, B³]."""
    kept, captured = (each.cumsum(1).cumsum(2).cumsum(3) for each in (counts, costs))
    read = kept[:, :, -1:, -1:].expand_as(kept), kept[:, :, :, -1:].expand_as(kept), kept
    shares = torch.stack(read, -1) / kept[:, -1:, -1:, -1:, None]
    return shares.flatten(1, 3), (captured[:, -1:, -1:, -1:] - captured).flatten(1)


def lower_hull(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the corners of the lower convex hull of points (x, y), which are in order of x."""
    hull: list[int] = []
    for index, (x, y) in enumerate(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull
