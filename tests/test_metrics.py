"""Unions of masks over batches against a slow count, costs to the parameter, confidence intervals, warnings."""

import math
from types import SimpleNamespace

import pytest
import torch

import tiny
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.evaluate import metrics
from apc.evaluate.evaluator import Evaluator
from apc.evaluate.metrics import (
    BATCHES,
    PROJECTIONS,
    MaskMeter,
    _shuffled,
    is_below,
    layer_reads,
    mask_figures,
    mean_reads,
    perplexity,
    perplexity_ratio,
    unigram_loss,
    window_losses,
)
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.policies import POLICIES, MaskDecision, make_policy


class FakeInputs:
    """The part of `MaskInputs` that a meter reads."""

    site, layer, tokens = "neuron", 0, None

    def __init__(self, n, D):
        self.values, self.active = torch.zeros(n, D), torch.rand(n, D) < 0.5
        self.ffn = SimpleNamespace(module=torch.nn.Module(), width=D, device=torch.device("cpu"))

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
        meter.add(tokens, MaskDecision(mask))
        order = _shuffled(n, torch.device("cpu")).tolist()
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
    meter.add(tokens, MaskDecision(mask))
    figures = mask_figures(meter.totals())
    assert set(figures["union_density"].values()) == {figures["density"]} == {4 / 11}
    assert POLICIES["dense"](None, None, 0).mask(tokens).all()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["neuron"], {"gate": [1, 1], "up": [0.4, 0.25], "down": [0.1, 0.25]}),
        (["up", "down"], {"gate": [1, 1], "up": [0.4, 0.25], "down": [0.1, 0.25]}),
        (["up"], {"gate": [1, 1], "up": [0.4, 0.25], "down": [1, 1]}),
    ],
    ids="+".join,
)
def test_the_weights_read_are_those_that_the_decision_says_else_the_masks(sites, expected):
    """Two layers; of a batch of 2 tokens and one of 1, all masks have the same share."""
    book = Codebook(dict.fromkeys(sites), dict.fromkeys(sites, 20), 2, 4, 20, "layer", "energy", 0.5, "top", 0.5)
    meter = MaskMeter(book, torch.device("cpu"))
    for n in (2, 1):
        meter.first = torch.zeros(n, dtype=torch.bool)
        for site in sites:
            tokens, tenth = FakeInputs(n, 20), torch.arange(20).unsqueeze(0) < 2
            read = {"gate": torch.ones(1, 1, dtype=torch.bool), "up": torch.arange(5).expand(n, 5) < 2}
            tokens.site = site
            meter.add(tokens, MaskDecision(tenth.expand(n, 20), read=read))
            tokens.layer = 1
            read = {} if site != "neuron" else {"gate": torch.ones(1, 1, dtype=torch.bool)}
            meter.add(tokens, MaskDecision(torch.arange(20).unsqueeze(0) < 5, read=read))
    totals = meter.totals()
    assert layer_reads(totals, sites, 3) == {name: pytest.approx(shares) for name, shares in expected.items()}
    means = {name: pytest.approx(sum(shares) / 2) for name, shares in expected.items()}
    assert mean_reads(totals, sites, 3) == means
    del means["gate"]
    assert mean_reads(totals, sites, 2) == means, "an FFN without a gate has two projections"


def test_bits_that_are_read_count_each_neurons_own(monkeypatch):
    """Four neurons of 5, 5, 16 and 5 bits; two tokens. Gate is read at the first two, down's bits are given."""
    monkeypatch.setattr(metrics, "neuron_bits", lambda ffn: torch.tensor([5.0, 5, 16, 5]))
    meter, tokens = meter_for(4), FakeInputs(2, 4)
    meter.first = torch.zeros(2, dtype=torch.bool)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    half, down = torch.tensor([[True, True, False, False, False]]), torch.tensor([[1.0, 2, 3, 4]])
    meter.add(tokens, MaskDecision(mask, read={"gate": half}, bits={"down": down}))
    bits = mean_reads(meter.totals(), ["neuron"], 3, field="bits", full=31 / 4)
    assert bits == pytest.approx({"gate": 2 / 5 * 31 / 4, "up": 21 / 4, "down": 10 / 4})
    assert mean_reads(meter.totals(), ["neuron"], 3) == pytest.approx({"gate": 0.4, "up": 0.5, "down": 0.5})
    assert mean_reads(meter.totals(), [], 3, field="bits", full=31 / 4) == dict.fromkeys(PROJECTIONS, 31 / 4)


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
    shares, read_bits = dict.fromkeys(PROJECTIONS, 0.5), {"gate": 2.0, "up": 2.0, "down": 1.0}
    cost = make_policy(policy, book, predictor).cost({"neuron": [0.25, 0.75]}, shares, read_bits)
    assert cost.bits == pytest.approx(bits)
    assert cost.bytes_share == pytest.approx(5 / (3 * 16) + read / (3 * 6 * 40))
    assert cost.flops_share == pytest.approx(0.5 + computed / (3 * 6 * 40))


def differing(*differences):
    """Losses that differ from the dense model's by these, and the dense model's."""
    dense = torch.linspace(1, 3, len(differences), dtype=torch.float64)
    return dense + torch.tensor(differences, dtype=torch.float64), dense


def test_the_confidence_interval_is_students():
    """Differences 0.1 … 0.8: mean 0.45, standard deviation √0.06; t of 7 degrees of freedom is 2.3646."""
    ratio, low, high = perplexity_ratio(*differing(*(0.1 * i for i in range(1, 9))))
    half = 2.3646242510102993 * math.sqrt(0.06 / 8)
    assert (ratio, low, high) == pytest.approx((math.exp(0.45), math.exp(0.45 - half), math.exp(0.45 + half)))


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_few_windows_have_no_confidence_interval(windows):
    losses, dense = differing(*(0.5 * i for i in range(windows)))
    assert perplexity_ratio(losses, dense) == (pytest.approx(math.exp(0.25 * (windows - 1))), None, None)


def test_the_ends_of_any_interval_are_positive_and_finite():
    _, low, high = perplexity_ratio(*differing(*[-2000, 2000] * 4))
    assert 0 < low < 1 < high < math.inf


def test_below_dense_means_by_more_than_chance():
    assert is_below(*differing(-0.3, -0.31)) and is_below(*differing(*[-0.1, -0.2] * 4))
    assert not is_below(*differing(-0.3)), "a single window has no spread"
    assert not is_below(*differing(*[-0.0001, -0.0002] * 4)), "masks that drop little may help a little"
    assert not is_below(*differing(-0.3, 0.1)) and not is_below(*differing(*[0.0] * 8))


def test_unigram_loss_is_the_entropy_of_the_scored_tokens():
    """The first token of a window is not scored; of the six others, four are the same."""
    windows = torch.tensor([[9, 1, 1, 2], [9, 1, 3, 1]])
    assert unigram_loss(windows) == pytest.approx(-(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6)))


def warnings_of(losses, provenance=None):
    book, windows = SimpleNamespace(provenance=provenance or {}), torch.arange(800).view(8, 100)
    return Evaluator.warnings(SimpleNamespace(_policy_losses=losses, windows=windows, codebook=book))


def test_figures_that_can_not_be_right_are_named():
    dense = torch.linspace(2, 3, 8, dtype=torch.float64)
    assert warnings_of({"dense": dense, "oracle": dense + 0.1, "random": dense - 0.1 * torch.tensor([2, -1] * 4)}) == []
    below = {"dense": dense, "exact": dense - 0.2, "oracle": dense - 0.1}
    (said,) = warnings_of(below)
    assert said.startswith("exact, oracle: perplexity below the dense model's. Masks only remove neurons, so")
    assert all(word in said for word in ("BOS token", "dtype", "tokenizer", "context length", "weights"))
    untuned, tuned = warnings_of(below, provenance={"tune": {"steps": 8}})
    assert untuned.startswith("exact: ") and tuned.startswith("oracle: ") and "Tuning on similar text can" in tuned
    (said,) = warnings_of({"dense": dense + 5})
    assert said.startswith(
        "the dense model hardly predicts this text: its perplexity is 1,808, that of the text's own "
    )
    assert "frequencies 792.0. " in said, "792 different tokens are scored"


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
