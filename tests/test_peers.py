"""Peers equal plain implementations of their papers' rules, and spend their bytes where it costs least."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

import apc
import tiny
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.data.ffn import find_ffns
from apc.data.hooks import FFNHooks, FFNVisitor
from apc.evaluate.evaluator import Evaluator
from apc.sparse.policies import POLICIES, input_costs
from apc.sparse.policies.peers import RSparse, Teal, Wina, low_rank_maps
from apc.tune.calibrate import SamplePass
from apc.utils.errors import UserError

LAYERS, E, WIDTH, RANK = 3, 32, 52, 4
PEERS = ("teal", "wina", "r-sparse")
FAMILIES = ["llama", "phi3", "gpt2", "opt", "arcee"]


def make_codebook(family="llama"):
    """A codebook of one cluster, for a model of this family."""
    projections = 2 if family in tiny.UNGATED_FAMILIES else 3
    mask = ops.pack(torch.ones(LAYERS, 1, WIDTH, dtype=torch.bool) & (torch.arange(WIDTH) < 26))
    profiles, sizes = torch.ones(LAYERS, 1, WIDTH).half(), torch.ones(LAYERS, 1).long()
    site = SiteCodebook(mask, profiles, sizes, mask[:, 0], torch.zeros(LAYERS))
    settings = ("layer", "energy", 0.5, "top", 0.5)
    return Codebook({"neuron": site}, {"neuron": WIDTH}, LAYERS, E, WIDTH, *settings, projections=projections)


def sample_of(model, family="llama", windows=5, **changes):
    """A pass over random windows of 12 tokens."""
    tokens = torch.randint(0, tiny.VOCABULARY, (windows, 12), generator=torch.Generator().manual_seed(3))
    return SamplePass(model, find_ffns(model), make_codebook(family), None, tokens, **changes)


def calibrated(family, name, share=0.55):
    model = tiny.make_model(family)
    fit = sample_of(model, family)
    return model, fit.codebook.with_calibrated(name, POLICIES[name].calibrate(fit, share), {"bytes": share})


def weights_of(ffn):
    """Weights and biases of gate (or None), up and down, read from the modules themselves."""
    if ffn.gate_up is not None:
        gate, up = ((weight, None) for weight in ffn.gate_up.weight.chunk(2))
    else:
        gate, up = (None if part is None else plain(part) for part in (ffn.gate, ffn.up))
    return gate, up, plain(ffn.down)


def plain(linear):
    weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
    return weight, getattr(linear, "bias", None)


ACTIVATIONS = {
    "llama": F.silu,
    "phi3": F.silu,
    "gpt2": lambda x: F.gelu(x, approximate="tanh"),
    "opt": F.relu,
    "arcee": lambda x: F.relu(x).square(),
    "gemma3": lambda x: F.gelu(x, approximate="tanh"),
}


def slow_ffn(family, name, book, layer, ffn, x):
    """One layer's FFN for tokens x [n, E], from the papers' rules; also the shares of x and h that are read."""
    made = {part: value[layer] for part, value in book.calibrated[name].items()}

    def split(values, kind, norms):
        """values, where they are read and where they are skipped; zeros elsewhere"""
        if name != "wina":
            kept = values.abs() >= made[f"{kind}_thresholds"]
        else:
            m, scores = round(float(made[f"{kind}_shares"]) * values.shape[-1]), values.abs() * norms
            kept = torch.stack([torch.isin(torch.arange(len(row)), row.argsort(descending=True)[:m]) for row in scores])
        return values * kept, values * ~kept, kept.float().mean()

    def product(read, skipped, weights, projection):
        result = F.linear(read, *weights)
        if name == "r-sparse":
            U, S, V = torch.linalg.svd(weights[0].double(), full_matrices=False)
            rank = made[f"inner_{projection}"].shape[0]
            result = result + (skipped.double() @ ((U[:, :rank] * S[:rank]) @ V[:rank]).T).float()
        return result

    gate, up, down = weights_of(ffn)
    columns = torch.cat([weights[0] for weights in (gate, up) if weights is not None])
    *parts, x_share = split(x, "input", columns.norm(dim=0))
    values = product(*parts, up, "up")
    act = ACTIVATIONS[family]
    h = act(values) if gate is None else act(product(*parts, gate, "gate")) * values
    *parts, h_share = split(h, "neuron", down[0].norm(dim=0))
    return product(*parts, down, "down"), x_share, h_share


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_a_layers_output_equals_the_papers_rule(family, name):
    """Of the first layer, whose input no mask changes."""
    model, book = calibrated(family, name)
    ffns, seen, tokens = find_ffns(model), {}, torch.randint(0, tiny.VOCABULARY, (2, 11))
    dense = model(tokens).logits
    keep = lambda part, values: seen.update({part: values.flatten(0, -2)})
    handles = [
        ffns[0].linears[0].register_forward_pre_hook(lambda _, given: keep("input", given[0])),
        ffns[0].down.register_forward_hook(lambda _, given, output: keep("dense", output)),
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    apc.sparsify(model, book, policy=name)
    handle = ffns[0].down.register_forward_hook(lambda _, given, output: keep("output", output))
    masked = model(tokens).logits
    handle.remove()
    expected, *read = slow_ffn(family, name, book, 0, ffns[0], seen["input"])
    torch.testing.assert_close(seen["output"], expected, rtol=2e-3, atol=2e-3)
    assert (seen["output"] - seen["dense"]).abs().max() > 0.01
    assert all(0.1 < share < 1 for share in read)
    assert (masked - dense).abs().max() > 1e-2
    assert torch.equal(apc.restore(model)(tokens).logits, dense)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_equal_those_of_replaced_ffns(family, name):
    model, book = calibrated(family, name)
    ffns, tokens = find_ffns(model), torch.randint(0, tiny.VOCABULARY, (2, 11))
    for layer, block in enumerate(model.model.layers):
        block.mlp.forward = lambda x, at=layer: slow_ffn(family, name, book, at, ffns[at], x.flatten(0, 1))[0].view_as(
            x
        )
    expected = model(tokens).logits
    for block in model.model.layers:
        del block.mlp.forward
    masked = apc.sparsify(model, book, policy=name)(tokens).logits
    torch.testing.assert_close(masked, expected, rtol=5e-3, atol=5e-3)


class Zeros(FFNVisitor):
    """Replaces the FFN's input by zeros."""

    replaces_input = True

    def enter(self, layer, hidden):
        self.entered = getattr(self, "entered", 0) + 1
        return torch.zeros_like(hidden)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "falcon_h1"])
@torch.no_grad()
def test_gate_and_up_both_read_the_replaced_input_in_whatever_order_they_run(family):
    model = tiny.make_model("llama" if family == "falcon_h1" else family)
    if family == "falcon_h1":  # it runs up first
        sizes = type("Sizes", (), dict(hidden_size=E, intermediate_size=WIDTH, mlp_bias=False, hidden_act="silu"))
        sizes.mlp_multipliers = 1.0, 1.0
        for block in model.model.layers:
            block.mlp = FalconH1MLP(sizes)
    ffns, outputs, visitor = find_ffns(model), [], Zeros()
    hooks = FFNHooks(ffns, [], visitor)
    seen = [
        part.register_forward_hook(lambda module, given, output: outputs.append((module, given[0], output)))
        for ffn in ffns
        for part in ffn.linears[:-1]
    ]
    for _ in range(2):
        model(torch.arange(9)[None])
    hooks.remove()
    assert visitor.entered == 2 * LAYERS and len(outputs) == 2 * len(seen)
    for module, _, output in outputs:
        bias = getattr(module, "bias", None)
        expected = torch.zeros_like(output) if bias is None else bias.expand_as(output)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.UNGATED_FAMILIES])
def test_measuring_costs_leaves_the_model_dense(family):
    model = tiny.make_model(family).requires_grad_(False)
    fit = sample_of(model, family, windows=2)
    assert [norm is not None for norm in fit.norms] == [family in ("gemma2", "gemma3")] * LAYERS
    body, seen = model.get_decoder(), []
    dense = [body(window[None]).last_hidden_state for window in fit.windows]
    hook = body.register_forward_hook(lambda _, given, output: seen.append(output.last_hidden_state))
    costs = input_costs.costs(fit, Teal(fit.codebook, None, 0))
    hook.remove()
    assert len(seen) == 4, "for each window one pass with gradients, one with copies"
    for index, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, dense[index // 2], rtol=1e-4, atol=1e-4)
    assert costs.shape == (LAYERS, 2, len(input_costs.SKIPPED)) and costs.isfinite().all() and (costs >= 0).all()


def test_dropping_all_of_an_ffn_costs_more_than_dropping_half_of_it_also_before_a_norm():
    """The loss does not depend on the length of a norm's input, so gradients before it would give 0."""
    model = tiny.make_model("gemma3").requires_grad_(False)
    fit = sample_of(model, windows=2)
    assert fit.norms == [block.post_feedforward_layernorm for block in model.model.layers]
    costs = input_costs.costs(fit, Teal(fit.codebook, None, 0))
    assert (costs[..., -1] > costs[..., input_costs.SKIPPED.index(0.5)]).all()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_costs_are_the_fisher_information_of_what_is_skipped(family, name):
    """For one layer and token set: gradients and changed outputs from replaced forwards."""
    model = tiny.make_model(family).requires_grad_(False)
    fit = sample_of(model, windows=2)
    book = fit.codebook.with_calibrated(name, POLICIES[name].calibrate(fit, 0.6), {})
    rule = POLICIES[name](book, None, 0)
    found = input_costs.costs(fit, rule)
    layer, level, expected = 1, 5, torch.zeros(2, dtype=torch.float64)
    ffn, block, act = find_ffns(model)[layer], model.model.layers[layer], ACTIVATIONS[family]
    last = block.post_feedforward_layernorm if family == "gemma3" else block.mlp
    update = last if family == "gemma3" else lambda output: output
    for window, ids in enumerate(fit.windows):
        zeros, seen = torch.zeros(12, E, requires_grad=True), {}

        handles = [
            block.mlp.register_forward_pre_hook(lambda _, given: seen.update(x=given[0][0].detach())),  # noqa: B023
            last.register_forward_hook(lambda _, given, output: output + zeros[None]),  # noqa: B023
        ]
        logits = model(ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(window))
        (gradient,) = torch.autograd.grad(-logits.log_softmax(-1).gather(1, labels).sum(), zeros)
        gate, up, down = (weights[0] for weights in weights_of(ffn))
        x = seen["x"]

        def less(values, scores):
            """values without those of the lowest scores"""
            order = scores.argsort(-1)[:, : round(input_costs.SKIPPED[level] * values.shape[-1])]
            return values.scatter(1, order, 0.0)

        def added(kept, values, projection):
            return rule.completion(layer, projection, values - kept) if rule.completes else 0

        h = act(x @ gate.T) * (x @ up.T)
        kept = less(x, rule.input_scores(layer, x))
        few = act(kept @ gate.T + added(kept, x, "gate")) * (kept @ up.T + added(kept, x, "up"))
        kept_h = less(h, rule.neuron_scores(layer, h))
        outputs = few @ down.T, kept_h @ down.T + added(kept_h, h, "down")
        for kind, output in enumerate(outputs):
            change = update(output) - update(h @ down.T)
            expected[kind] += (change * gradient).sum(-1).double().square().mean() / 2 / len(fit.windows)
    torch.testing.assert_close(found[layer, :, level], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["teal", "r-sparse"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_on_the_calibration_text_the_calibrated_shares_are_read(family, name):
    model, book = calibrated(family, name)
    ffns, made, seen = find_ffns(model), book.calibrated[name], {}

    class Reader(FFNVisitor):
        def enter(self, layer, hidden):
            seen.setdefault(("input", layer), []).append(hidden.flatten())

        def visit(self, layer, site, values):
            seen.setdefault(("neuron", layer), []).append(values.flatten())

    hooks = FFNHooks(ffns, ["neuron"], Reader())
    for window in sample_of(model, family).windows:
        model(window[None])
    hooks.remove()
    for (kind, layer), values in seen.items():
        scores, threshold = torch.cat(values).abs(), made[f"{kind}_thresholds"][layer]
        ties = int((scores == threshold).sum())
        allowed = round(float(made[f"{kind}_shares"][layer]) * scores.numel())
        assert allowed - ties - 1 <= int((scores >= threshold).sum()) <= allowed + 1
    P, read = book.projections, [made[f"{kind}_shares"].double().mean() for kind in ("input", "neuron")]
    maps = POLICIES[name](book, None, 0).parameters_read("neuron")
    assert ((P - 1) * read[0] + read[1]) / P + maps / (P * E * WIDTH) == pytest.approx(0.55, abs=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_bytes_count_what_is_read(name):
    model, book = calibrated("llama", name)
    windows = torch.randint(0, tiny.VOCABULARY, (2, 24))
    plain, (record,) = (
        Evaluator(model, book, None, windows, torch.device("cpu")).policies(names, progress=False)
        for names in (["dense"], [name])
    )
    read, made = record["masked"]["read"], book.calibrated[name]
    assert read["gate"] == read["up"] != read["down"] == pytest.approx(record["masked"]["density"])
    rank = made["inner_up"].shape[1] if name == "r-sparse" else 0
    extra = {"teal": 0, "wina": E + WIDTH, "r-sparse": 3 * rank * (E + WIDTH)}[name]
    assert record["bytes_share"] == pytest.approx((2 * read["gate"] + read["down"]) / 3 + extra / (3 * E * WIDTH))
    assert record["bytes_share"] == pytest.approx(0.55, abs=0.06) and record["flops_share"] == record["bytes_share"]
    again = Evaluator(model, book, None, windows, torch.device("cpu")).policies(["dense", name], progress=False)
    assert again[0]["perplexity"] == plain[0]["perplexity"], "the dense pass replaces nothing"
    if name == "wina":
        sizes = [max(1, round(float(share) * E)) / E for share in made["input_shares"]]
        assert read["gate"] == pytest.approx(sum(sizes) / LAYERS), "each token reads the same number of inputs"
    bits = [math.comb(E, round(float(share) * E)) for share in made["input_shares"]]
    assert record["bits"] > sum(map(math.log2, bits)) / LAYERS


@torch.no_grad()
def test_with_maps_of_full_rank_nothing_is_lost():
    model, tokens = tiny.make_model(), torch.randint(0, tiny.VOCABULARY, (1, 9))
    made = low_rank_maps(find_ffns(model), E) | {
        f"{kind}_thresholds": torch.full((LAYERS,), 0.5) for kind in ("input", "neuron")
    }
    book = make_codebook().with_calibrated("r-sparse", made, {})
    dense = model(tokens).logits
    masked = apc.sparsify(model, book, policy="r-sparse")(tokens).logits
    assert (masked - dense).norm() < 5e-3 * dense.norm()
    without = book.with_calibrated("teal", made, {})
    masked = apc.sparsify(model, without, policy="teal")(tokens).logits
    assert (masked - dense).norm() > 0.1 * dense.norm()


def test_r_sparse_takes_the_rank_that_costs_least():
    model = tiny.make_model()
    fit, predicted = sample_of(model), {}
    rank = RSparse.calibrate(fit, 0.55)["inner_up"].shape[1]
    for part, other in itertools.product((1 / 32, 1 / 4), repeat=2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("apc.sparse.policies.peers.RANKS", (part, other))
            predicted[part, other] = RSparse.calibrate(fit, 0.55)["inner_up"].shape[1]
    alone = {predicted[part, part] for part in (1 / 32, 1 / 4)}
    assert predicted[1 / 32, 1 / 4] == predicted[1 / 4, 1 / 32] in alone and len(alone) == 2 and rank >= 1


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_reads_all_or_next_to_nothing(name):
    for share in (1.0, 0.06):
        model, book = calibrated("llama", name, share)
        made = book.calibrated[name]
        read = (2 * made["input_shares"].mean() + made["neuron_shares"].mean()) / 3
        assert 0 <= float(read) <= share + 1e-6
        assert apc.sparsify(model, book, policy=name)(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", (*PEERS, "cats"))
def test_what_a_peer_does_not_support_is_one_line(name):
    book = make_codebook()
    policy = POLICIES[name]
    with pytest.raises(
        UserError, match=rf"^policy {name}: the codebook has no thresholds for it; run train\.py with po"
    ):
        apc.sparsify(tiny.make_model(), book, policy=name)
    book = book.with_calibrated(name, {"thresholds": torch.zeros(LAYERS)}, {})
    with pytest.raises(
        UserError, match=f"^policy {name}: its masks depend on activations inside the FFN, which no ker"
    ):
        apc.sparsify(tiny.make_model(), book, policy=name, kernel="torch")
    book.experts = 1
    assert "mixture of experts" in policy.missing(book, None)
    book.experts, book.sites["up"] = 0, book.sites.pop("neuron")
    assert policy.missing(book, None) == "needs the site neuron"


def test_wina_ranks_by_the_norms_of_all_columns_that_an_input_meets():
    model = tiny.make_model("phi3")
    made = Wina.calibrate(sample_of(model), 0.5)
    for layer, block in enumerate(model.model.layers):
        torch.testing.assert_close(made["input_norms"][layer], block.mlp.gate_up_proj.weight.norm(dim=0))
        torch.testing.assert_close(made["neuron_norms"][layer], block.mlp.down_proj.weight.norm(dim=0))
