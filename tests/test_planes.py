"""The policy bit-planes: its masks follow from the stored bits alone, and each bit that it reads is counted."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import apc
import evaluate
import tiny
import train
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.config.load import load_config
from apc.data.ffn import find_ffns
from apc.data.hooks import FFNHooks
from apc.data.quantise import mean_bits, neuron_bits, neuron_rows, quantise_ffns, stored
from apc.evaluate import tables
from apc.evaluate.evaluator import Evaluator
from apc.sparse.policies.planes import BitPlanes, _kept_shares
from apc.sparse.sparsify import sparsify
from apc.tune.calibrate import SamplePass
from apc.utils.errors import UserError

D, E, LAYERS = 52, 32, 3
SETTINGS = dict(bits=4, group=12, spared=3)


def make_codebook(model, gate=2, up=2, candidates=0.7, share=0.4):
    """Static masks of half of the neurons, and thresholds that keep about these shares of them."""
    ffns = find_ffns(model)
    width, layers = ffns[0].width, len(ffns)
    masks = ops.pack(ops.top_mask(torch.rand(layers, 1, width), ops.mask_size(width, 0.5)))
    one, zeros = torch.ones(layers, 1, dtype=torch.int64), torch.zeros(layers)
    site = SiteCodebook(masks, torch.rand(layers, 1, width).half(), one, masks[:, 0], zeros)
    options = dict(projections=3 if ffns[0].gated else 2)
    shape = layers, ffns[0].hidden_size, width
    book = Codebook({"neuron": site}, {"neuron": width}, *shape, "layer", "energy", 0.5, "threshold", 0.5, **options)
    gates, scores = zip(*slow_scores(model, gate, up, torch.arange(20)[None]), strict=True)
    first = torch.stack([quantile(values, candidates) for values in gates])
    second = torch.stack([quantile(values, share) for values in scores])
    numbers = {"bits": stored(ffns[0]).bits, "gate": gate if ffns[0].gated else 0, "up": up}
    tensors = {name: torch.full((layers,), number) for name, number in numbers.items()}
    tensors |= {"gate_thresholds": first, "thresholds": second}
    return book.with_calibrated("bit-planes", tensors, {"bytes": 0.2})


def quantile(values, share):
    finite = values[values.isfinite()]
    return finite.quantile(1 - share) if finite.numel() else torch.tensor(-math.inf)


def slow_upper(levels, weights, planes):
    """Each weight [D, E] as the mean of the levels that its upper planes leave possible, level by level."""
    rest, upper = 2 ** (levels.bits - planes), torch.zeros_like(weights)
    for column in range(weights.shape[1]):
        group = column // levels.group
        low = levels.low[:, group].double() * levels.row_low.double() / 127
        step = levels.step[:, group].double() * levels.row_step.double() / 255
        each = low[:, None] + step[:, None] * torch.arange(2**levels.bits)
        k = (each - weights[:, column, None]).abs().argmin(1)
        first = k // rest * rest
        upper[:, column] = sum(each.gather(1, (first + i)[:, None])[:, 0] for i in range(rest)) / rest
    return upper


class Inputs:
    """Keeps each FFN's input [n, E]."""

    route = None

    def __init__(self):
        self.hidden = {}

    def enter(self, layer, hidden):
        self.hidden[layer] = hidden.flatten(0, -2)

    def visit(self, layer, site, values):
        return None


def slow_scores(model, gate, up, tokens):
    """Each layer's estimates [n, D] in a forward pass of the model as it is: of the gates, and of the importance."""
    ffns, reader = find_ffns(model), Inputs()
    hooks = FFNHooks(ffns, [], reader)
    with torch.no_grad():
        model(tokens)
    hooks.remove()
    return [layer_scores(ffn, reader.hidden[layer], gate, up) for layer, ffn in enumerate(ffns)]


def layer_scores(ffn, hidden, gate, up):
    form, module, products = stored(ffn), ffn.module, {}
    for name, rows in neuron_rows(ffn).items():
        if name != "down":
            linear = ffn.gate_up or getattr(ffn, name)
            bias = 0 if linear.bias is None else linear.bias
            planes = gate if name == "gate" else up
            products[name] = hidden @ slow_upper(form.levels[name], rows.detach(), planes).T + bias
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None) or getattr(module, "act", F.gelu)
    values = act(products["gate"]) * products["up"] if ffn.gated else act(products["up"])
    norms = neuron_rows(ffn)["down"].norm(dim=1)
    first = act(products["gate"]).abs() * norms if ffn.gated else torch.full_like(values, math.inf)
    return tuple(each.detach().masked_fill(form.spared, math.inf) for each in (first, values.abs() * norms))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt", "nemotron", "arcee", "apertus"])
@pytest.mark.parametrize(("gate", "up", "candidates"), [(1, 3, 0.7), (3, 1, 0.9), (4, 4, 0.6), (2, 2, 1.0)])
@torch.no_grad()
def test_logits_equal_an_independent_masked_forward_pass(family, gate, up, candidates):
    model = quantise_ffns(tiny.make_model(family), **SETTINGS)
    codebook, tokens = make_codebook(model, gate, up, candidates), torch.randint(0, tiny.VOCABULARY, (2, 11))
    dense, found, kept = model(tokens).logits, codebook.calibrated["bit-planes"], []

    class Masked(Inputs):
        def visit(self, layer, site, values):
            gates, scores = layer_scores(find_ffns(model)[layer], self.hidden[layer], gate, up)
            mask = (gates >= found["gate_thresholds"][layer]) & (scores >= found["thresholds"][layer])
            kept.append(mask.float().mean())
            return values * mask.view_as(values)

    hooks = FFNHooks(find_ffns(model), ["neuron"], Masked())
    expected = model(tokens).logits
    hooks.remove()
    assert 0.1 < sum(kept) / len(kept) < 0.9 and (expected - dense).abs().max() > 1e-3
    masked = sparsify(model, codebook, policy="bit-planes")(tokens).logits
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(apc.restore(model)(tokens).logits, dense)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_bit_that_is_read_is_counted(family):
    """By hand: three planes and the levels of gate for all neurons, two of up for candidates, the rest if kept."""
    model = quantise_ffns(tiny.make_model(family), **SETTINGS)
    codebook, windows = make_codebook(model, gate=3, up=2), torch.randint(0, tiny.VOCABULARY, (3, 9))
    P, spared = codebook.projections, 3 / D
    levels, row = (3 * 16 + 2 * 16) / E, 4 + (3 * 16 + 2 * 16) / E
    dense, masked, static = Evaluator(model, codebook, None, windows, torch.device("cpu")).policies(
        ["dense", "bit-planes", "static"], progress=False
    )
    assert dense["bytes_share"] * 16 == pytest.approx(16 * spared + row * (1 - spared))
    density, candidates = masked["masked"]["density"], masked["masked"]["read"]["up"]
    assert spared < density < candidates <= 1 and (candidates < 1) == (P == 3)
    gate = (1 - spared) * (3 + levels) + (density - spared) * 1 + spared * 16
    up = (candidates - spared) * (2 + levels) + (density - spared) * 2 + spared * 16
    down = (density - spared) * row + spared * 16
    expected = {"gate": gate, "up": up, "down": down} if P == 3 else {"up": up, "down": down}
    assert masked["masked"]["bits_read"] == pytest.approx(expected)
    total = sum(expected.values()) / P + 16 / (P * E)  # and the norms of down, at 16 bits
    assert masked["bytes_share"] * 16 == pytest.approx(total)
    computed = (candidates + (P - 2) + P * density) / P + 1 / (P * E)
    assert masked["flops_share"] == pytest.approx(computed)
    kept = [ops.unpack(codebook.sites["neuron"].static[layer], D) for layer in range(LAYERS)]
    bits = [(neuron_bits(ffn) * mask).mean() for ffn, mask in zip(find_ffns(model), kept, strict=True)]
    assert static["bytes_share"] * 16 == pytest.approx(float(sum(bits) / LAYERS)), "spared neurons count 16 bits"


@pytest.mark.parametrize("budget", [3.6, 4.5, 5.5])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_kept_share_follows_from_the_budget(family, budget):
    """A mask with this share of neurons, and candidates with theirs, read the budget's bits."""
    model = quantise_ffns(tiny.make_model(family), **SETTINGS)
    ffn, spared = find_ffns(model)[0], 3 / D
    levels, row, P = (3 * 16 + 2 * 16) / E, 4 + (3 * 16 + 2 * 16) / E, 3 if family == "llama" else 2
    shares = _kept_shares(ffn, budget)
    assert shares
    for (ranking, candidates), kept in shares.items():
        gate = (1 - spared) * (ranking.gate + levels) + (kept - spared) * (4 - ranking.gate) + spared * 16
        up = (candidates - spared) * (ranking.up + levels) + (kept - spared) * (4 - ranking.up) + spared * 16
        down = (kept - spared) * row + spared * 16
        bits = (gate * (P == 3) + up + down + 16 / E) / P
        assert bits == pytest.approx(budget) or (kept == 1 and bits < budget)
        assert spared < kept <= candidates


def test_calibration_takes_the_ranking_that_captures_most_and_keeps_the_shares():
    model = quantise_ffns(tiny.make_model(), **SETTINGS)
    codebook, windows, budget = make_codebook(model), torch.randint(0, tiny.VOCABULARY, (4, 16)), 5.2
    sample = SamplePass(model, find_ffns(model), codebook, None, windows, 3)
    found = BitPlanes.calibrate(sample, budget / mean_bits(find_ffns(model)))
    shares, energies, captured = _kept_shares(find_ffns(model)[0], budget), Neurons(model).energies(windows), {}
    for (ranking, candidates), kept in shares.items():
        captured[ranking, candidates] = 0
        estimated = slow_scores(model, ranking.gate, ranking.up, windows)
        for (gates, scores), energy in zip(estimated, energies, strict=True):
            scores = scores.masked_fill(~ops.top_mask(gates, ops.mask_size(D, candidates)), -1)
            mask = ops.top_mask(scores, ops.mask_size(D, kept))
            captured[ranking, candidates] += float(((mask * energy).sum(1) / energy.sum(1)).mean())
    best, candidates = max(captured, key=captured.get)
    assert len({ranking for ranking, _ in shares}) > 3
    assert {name: set(found[name].tolist()) for name in ("bits", "gate", "up")} == {
        "bits": {4},
        "gate": {best.gate},
        "up": {best.up},
    }
    calibrated = codebook.with_calibrated("bit-planes", found, {})
    (record,) = Evaluator(model, calibrated, None, windows, torch.device("cpu")).policies(["bit-planes"], False)
    assert record["masked"]["density"] == pytest.approx(shares[best, candidates], abs=0.05)
    assert record["masked"]["read"]["up"] == pytest.approx(candidates, abs=0.05)
    assert record["bytes_share"] * 16 == pytest.approx(budget, abs=0.3)


class Neurons(Inputs):
    """Reads the energy of each neuron [n, D] in a dense pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.ffns, self.values = model, find_ffns(model), {}

    def visit(self, layer, site, values):
        norms = neuron_rows(self.ffns[layer])["down"].norm(dim=1)
        self.values[layer] = (values.flatten(0, -2) * norms).square()

    @torch.no_grad()
    def energies(self, tokens):
        hooks = FFNHooks(self.ffns, ["neuron"], self)
        self.model(tokens)
        hooks.remove()
        return list(self.values.values())


def overrides(folder, **changes):
    values = {
        "model.ffn_bits": 4,
        "model.ffn_spared": 2,
        "policies": "[dense,static,cats,bit-planes]",
        "bytes": 0.26,
        "monitor.windows": 0,
        "run.name": "four",
    }
    return tiny.tiny_overrides(folder, **(values | changes))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("planes"))
    train.train(load_config(None, overrides(folder)))
    return folder


def test_a_run_on_four_bits_counts_stored_bits(workplace):
    results = json.loads((workplace / "runs" / "four" / "results.json").read_text())
    dense, static, cats, planes = results["policies"]
    bits = (4 + (16 + 32) / E) * (D - 2) / D + 16 * 2 / D
    assert results["conditions"]["ffn_bits"] == round(bits, 3)
    assert f"FFN at {bits:.2f} bits" in tables.conditions_text(results)
    assert dense["bytes_share"] == pytest.approx(bits / 16) and dense["ratio"] == 1
    assert static["bytes_share"] < 0.6 * dense["bytes_share"]
    assert cats["bytes_share"] == pytest.approx(0.26, abs=0.02), "`bytes` is a share of 16 bits"
    assert planes["bytes_share"] == pytest.approx(0.26, abs=0.02)
    made = apc.load_run(workplace / "runs" / "four").codebook.provenance
    assert made["ffn_bits"] == pytest.approx(bits)


def test_a_saved_run_is_evaluated_and_used_with_its_bits(workplace):
    run = apc.load_run(workplace / "runs" / "four")
    words = [f"checkpoint={run.folder.path}", "policies=[bit-planes]", "run.name=again"]
    again = evaluate.evaluate(evaluate.config_of_run(None, words))["policies"][0]
    assert again["perplexity"] == run.results["policies"][3]["perplexity"]
    sixteen = [f"checkpoint={run.folder.path}", "policies=[dense]", "model.ffn_bits=null", "run.name=sixteen"]
    results = evaluate.evaluate(evaluate.config_of_run(None, sixteen))
    assert results["policies"][0]["bytes_share"] == 1 and results["conditions"]["ffn_bits"] is None
    assert results["conditions"]["weights"] == "other than fitted"
    model = tiny.make_model()
    with pytest.warns(
        UserWarning, match=r"its FFNs were stored at 5\.90 bits, these at 16\.00 \(see apc\.quantise_ffns"
    ):
        sparsify(model, run.codebook, policy="static")
    quantise_ffns(apc.restore(model), bits=4, spared=2)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        dense = model(tokens).logits
        assert not torch.equal(
            apc.sparsify(model, run.codebook, policy="bit-planes", strict=True)(tokens).logits, dense
        )


def test_two_ranks_calibrate_as_one(workplace):
    tiny.run_ranks(2, overrides(workplace, **{"run.name": "ranks", "trainer.batch_windows": 1}))
    one, two = (apc.load_run(workplace / "runs" / name).codebook.calibrated["bit-planes"] for name in ("four", "ranks"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.ffn_bits": "null"},
            r"^policies: bit-planes ranks neurons by the bit planes of stored weights; set mod",
        ),
        (
            {"bytes": 0.11},
            r"^policies: bit-planes reads over 0\.1\d+ of the bytes of a 16-bit FFN to rank neurons, and",
        ),
        ({"bytes": 0.5}, r"^bytes=0\.5: the FFNs are stored at 5\.9 bits, 0\.369 of 16; lower bytes"),
        ({"policies": "[cats]", "bytes": 0.12}, r"^policies: cats reads the gate in full, a third of the bytes; raise"),
        ({"sites": "[up]", "bytes": "null"}, r"^policies: bit-planes needs sites=\[neuron\]"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(workplace, changes, message):
    words = overrides(workplace, **({"policies": "[bit-planes]", "run.name": "refused"} | changes))
    with pytest.raises(UserError, match=message):
        train.train(load_config(None, words))
    assert not (workplace / "runs" / "refused").exists()


def test_models_without_bit_planes_are_refused():
    model = tiny.make_model()
    codebook = make_codebook(quantise_ffns(tiny.make_model(), **SETTINGS))
    sparsify(model, codebook, policy="bit-planes")
    with pytest.raises(
        UserError, match=r"^policy bit-planes: ranks neurons by bit planes, but the FFNs are not stored"
    ):
        model(torch.arange(4)[None])
    sparsify(quantise_ffns(model, 3), codebook, policy="bit-planes")
    with pytest.raises(UserError, match="^policy bit-planes: calibrated for FFNs at 4 bits, these have 3; set model"):
        model(torch.arange(4)[None])
    with pytest.raises(UserError, match="bit-planes"):
        sparsify(quantise_ffns(tiny.make_model(), **SETTINGS), codebook, policy="bit-planes", kernel="torch")
    codebook.experts = LAYERS
    with pytest.raises(UserError, match="policy bit-planes: does not support a mixture of experts"):
        sparsify(model, codebook, policy="bit-planes")


def test_a_mixture_of_experts_runs_on_stored_bits(tmp_path):
    folder = tiny.make_workplace(tmp_path, "mixtral")
    results = train.train(load_config(None, overrides(folder, policies="[dense,static]", bytes="null")))
    dense, static = results["policies"]
    bits = (4 + (16 + 32) / E) * (D - 2) / D + 16 * 2 / D
    assert dense["bytes_share"] == pytest.approx(bits / 16)
    assert 0.4 * bits / 16 < static["bytes_share"] < 0.6 * bits / 16
    with pytest.raises(UserError, match="^policies: bit-planes does not support a mixture of experts; leave it out"):
        train.train(load_config(None, overrides(folder, policies="[bit-planes]", **{"run.name": "planes"})))
