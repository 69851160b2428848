"""Unions of masks over batches against a slow count, costs to the parameter, and the confidence interval."""

import math

import pytest
import torch

import tiny
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.evaluate.metrics import (
    BATCHES,
    MaskMeter,
    _shuffled,
    mask_figures,
    perplexity,
    perplexity_ratio,
    window_losses,
)
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.policies import POLICIES, make_policy


class FakeInputs:
    """The part of `MaskInputs` that a meter reads."""

    site, layer = "neuron", 0

    def __init__(self, n, D):
        self.values, self.active = torch.zeros(n, D), torch.rand(n, D) < 0.5

    def captured(self, kept):
        return torch.zeros(len(self.values)), torch.zeros(len(self.values))


def meter_for(D):
    book = Codebook({"neuron": None}, {"neuron": D}, 1, 4, D, "layer", "energy", 0.5, "threshold", 0.5)
    return MaskMeter(book, torch.device("cpu"))


@pytest.mark.parametrize("n", [64, 130, 67, 3], ids=["one-batch-of-64", "left-over", "odd", "fewer-than-a-batch"])
def test_unions_equal_a_slow_count(n):
    D, meter, counts = 11, meter_for(11), {batch: [0, 0] for batch in BATCHES}
    for _ in range(2):
        tokens, mask = FakeInputs(n, D), torch.rand(n, D) < 0.2
        meter.first = torch.zeros(n, dtype=torch.bool)
        meter.add(tokens, mask)
        order = _shuffled(n).tolist()
        assert sorted(order) == list(range(n))
        for batch in BATCHES:
            for start in range(0, n - batch + 1, batch):
                masks = [mask[token].nonzero().flatten().tolist() for token in order[start : start + batch]]
                counts[batch][0] += len(set().union(*masks))
                counts[batch][1] += D
    unions = mask_figures(meter.totals())["union_density"]
    assert unions == {str(batch): (kept / every if every else None) for batch, (kept, every) in counts.items()}


def test_the_union_of_one_mask_is_that_mask():
    meter, tokens = meter_for(11), FakeInputs(128, 11)
    meter.first = torch.zeros(128, dtype=torch.bool)
    mask = torch.arange(11).unsqueeze(0) < 4
    meter.add(tokens, mask)
    figures = mask_figures(meter.totals())
    assert set(figures["union_density"].values()) == {figures["density"]} == {4 / 11}
    assert POLICIES["dense"](None, None, 0).mask(tokens).all()


@pytest.mark.parametrize(
    ("policy", "bits", "read", "computed"),
    [
        ("oracle", 3, 40 / 16 + 6, 0),
        ("thresholded-oracle", (math.log2(math.comb(40, 10)) + math.log2(math.comb(40, 30))) / 2, 40 / 16 + 6, 0),
        ("predicted", 3, 40 / 16 + 6 + (7 * 5 + 6 * 8 + 6 * 6), 7 * 5 + 6 * 8 + 6 * 6),
        (
            "soft",
            (math.log2(math.comb(40, 10)) + math.log2(math.comb(40, 30))) / 2,
            8 * (40 + 6) + 119,
            8 * (40 + 6) + 119,
        ),
        ("static", 0, 0, 0),
    ],
)
def test_costs_count_each_parameter(policy, bits, read, computed):
    """L 2, E 6, D 40, K 8, bottleneck 5 with a correction; offsets; layers of density ¼ and ¾."""
    masks = torch.stack([ops.pack(ops.top_mask(torch.rand(8, 40), m)) for m in (10, 30)])
    static = ops.pack(ops.top_mask(torch.rand(2, 40), 20))
    site = SiteCodebook(
        masks,
        torch.rand(2, 8, 40).half(),
        torch.ones(2, 8, dtype=torch.int64),
        static,
        torch.zeros(2),
        torch.rand(2, 8, 6),
    )
    book = Codebook(
        {"neuron": site}, {"neuron": 40}, 2, 6, 40, "layer", "energy", 0.5, "threshold", 0.5, budget=[10, 30]
    )
    assert book.problem() is None
    predictor = Predictor(PredictorHeader(2, 6, 5, {"neuron": 8}, corrects=True))
    assert sum(value[0].numel() for value in predictor.parameters()) == 119
    cost = make_policy(policy, book, predictor).cost({"neuron": [0.25, 0.75]})
    assert cost.bits == pytest.approx(bits)
    assert cost.bytes_share == pytest.approx(0.5 + read / (3 * 6 * 40))
    assert cost.flops_share == pytest.approx(0.5 + computed / (3 * 6 * 40))


def test_the_confidence_interval_is_students():
    """Differences 0.1, 0.2, 0.6: mean 0.3, standard deviation √0.07; t of 2 degrees of freedom is 4.3027."""
    dense = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    ratio, low, high = perplexity_ratio(dense + torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64), dense)
    half = 4.302652729911275 * math.sqrt(0.07 / 3)
    assert (ratio, low, high) == pytest.approx((math.exp(0.3), math.exp(0.3 - half), math.exp(0.3 + half)))
    assert perplexity_ratio(dense[:1], dense[:1]) == (1.0, None, None)


def test_perplexity_scores_every_token_but_a_windows_first():
    """Against one forward pass for each prefix of each window."""
    model, windows = tiny.make_model(), torch.randint(tiny.VOCABULARY, (3, 7))
    losses = []
    with torch.no_grad():
        for window in windows:
            for at in range(1, len(window)):
                logits = model(window[:at][None]).logits[0, -1].double()
                losses.append(-logits.log_softmax(-1)[window[at]])
        found = window_losses(model, windows)
    assert len(losses) == 3 * 6 and found.shape == (3,)
    assert perplexity(found) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
