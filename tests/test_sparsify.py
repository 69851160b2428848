"""`sparsify` equals a masked forward pass that is written independently, and `restore` leaves no trace."""

import pytest
import torch
import torch.nn.functional as F

import apc
import tiny
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.policies import POLICIES
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError

K, LAYERS, E, WIDTH = 5, 3, 32, 52


def random_masks(*shape, D, m):
    return ops.pack(ops.top_mask(torch.rand(*shape, D), m))


def make_codebook(sites=("neuron",), scope="layer", weighting="energy", active="threshold"):
    G = LAYERS if scope == "layer" else 1
    books, widths = {}, {}
    for site in sites:
        D = widths[site] = E if site == "down" else WIDTH
        m = ops.mask_size(D, 0.5)
        books[site] = SiteCodebook(
            random_masks(G, K, D=D, m=m), torch.rand(G, K, D).half(), torch.ones(G, K, dtype=torch.int64),
            random_masks(LAYERS, D=D, m=m), torch.full((LAYERS,), 0.02),
        )  # fmt: skip
    return Codebook(books, widths, LAYERS, E, WIDTH, scope, weighting, 0.5, active, 0.5)


def make_predictor(codebook, form="cluster", lookahead=0):
    torch.manual_seed(5)
    outputs = {site: K if form == "cluster" else D for site, D in codebook.widths.items()}
    predictor = Predictor(PredictorHeader(LAYERS, E, 8, outputs, form, lookahead)).requires_grad_(False)
    predictor.thresholds = torch.linspace(-0.3, 0.2, LAYERS)
    return predictor


def importance_of(ffn, site, values):
    return values.abs() * (torch.stack([column.norm() for column in ffn.down.weight.T]) if site == "neuron" else 1)


def slow_mask(policy, codebook, predictor, layer, site, ffn, values, inputs, gate):
    """Each token's mask, one after the other, from the definitions."""
    book, D = codebook.sites[site], values.shape[-1]
    centroids = ops.unpack(book.centroids[layer if codebook.scope == "layer" else 0], D).int()
    m, rows = int(codebook.density * D + 0.5), []
    for token, row in enumerate(importance_of(ffn, site, values)):
        if codebook.active == "top":
            active = torch.zeros(D, dtype=torch.bool)
            active[sorted(range(D), key=lambda i: (-float(row[i]), i))[:m]] = True  # noqa: B023
        else:
            active = row >= book.thresholds[layer]
        active &= row > 0
        if policy == "exact":
            rows.append(active)
            continue
        if policy == "static":
            rows.append(ops.unpack(book.static[layer], D))
            continue
        if policy == "gate":
            rows.append(ops.top_mask(gate[token].abs(), m))
            continue
        if policy in ("oracle", "thresholded-oracle"):
            weights = {"binary": active.double(), "energy": row.double() ** 2, "magnitude": row.double()}[
                codebook.weighting
            ]
            captured = [(float((weights * centroids[k]).sum()), -k) for k in range(K)]
            nearest = centroids[-max(captured)[1]].bool()
            rows.append(nearest & active if policy == "thresholded-oracle" else nearest)
            continue
        hidden = inputs[max(layer - predictor.lookahead, 0)][token]
        hidden = hidden / (hidden.pow(2).mean() + torch.finfo(torch.float32).eps).sqrt()
        logits = (
            F.silu(hidden @ predictor.reduce[layer] + predictor.reduce_bias[layer]) @ predictor.expand[site][layer]
            + predictor.expand_bias[site][layer]
        )
        if policy == "predicted":
            rows.append(centroids[int(logits.argmax())].bool())
        elif policy == "soft":
            profiles = book.profiles[layer if codebook.scope == "layer" else 0].float()
            rows.append(ops.top_mask(logits.softmax(-1) @ profiles, m))
        elif policy == "neuron-threshold":
            rows.append(logits >= predictor.thresholds[layer])
        else:
            rows.append(ops.top_mask(logits, m))
    return torch.stack(rows)


def slow_logits(model, codebook, predictor, policy, tokens):
    """An independent masked forward pass: plain matrix products in place of each FFN."""
    inputs, originals = {}, [layer.mlp.forward for layer in model.model.layers]

    def ffn_forward(index, mlp):
        def forward(hidden):
            flat = hidden.flatten(0, -2)
            inputs[index] = flat
            if hasattr(mlp, "gate_up_proj"):
                gate, up = (flat @ mlp.gate_up_proj.weight.T).chunk(2, dim=-1)
                act, parts = mlp.activation_fn, type("Parts", (), dict(down=mlp.down_proj))
            else:
                gate, up = flat @ mlp.gate_proj.weight.T, flat @ mlp.up_proj.weight.T
                act, parts = mlp.act_fn, type("Parts", (), dict(down=mlp.down_proj))

            def masked(site, values):
                if site not in codebook.sites:
                    return values
                return values * slow_mask(policy, codebook, predictor, index, site, parts, values, inputs, act(gate))

            gate, up = masked("gate", gate), masked("up", up)
            return masked("down", masked("neuron", act(gate) * up) @ mlp.down_proj.weight.T).view_as(hidden)

        return forward

    try:
        for index, layer in enumerate(model.model.layers):
            layer.mlp.forward = ffn_forward(index, layer.mlp)
        return model(tokens).logits
    finally:
        for layer, original in zip(model.model.layers, originals, strict=True):
            layer.mlp.forward = original


CASES = [("llama", policy, {}, {}) for policy in POLICIES if policy not in ("dense", "random")]
CASES += [
    ("phi3", "oracle", {}, {}),
    ("phi3", "gate", {}, {}),
    ("gemma2", "soft", {}, {}),
    ("qwen3", "oracle", dict(weighting="binary"), {}),
    ("llama", "exact", dict(active="top"), {}),
    ("llama", "oracle", dict(scope="pooled", weighting="magnitude"), {}),
    ("llama", "predicted", dict(scope="pooled"), dict(lookahead=1)),
    ("llama", "soft", {}, dict(lookahead=2)),
    ("llama", "oracle", dict(sites=("gate", "up", "down"), weighting="binary"), {}),
    ("phi3", "oracle", dict(sites=("gate", "up", "down"), weighting="binary"), {}),
    ("phi3", "exact", dict(sites=("up",), weighting="binary"), {}),
    ("llama", "predicted", dict(sites=("gate", "up", "down"), weighting="binary"), {}),
]


@pytest.mark.parametrize(
    ("family", "policy", "book", "form"),
    CASES,
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@torch.no_grad()
def test_logits_equal_an_independent_masked_forward_pass(family, policy, book, form):
    model, codebook = tiny.make_model(family), make_codebook(**book)
    predictor = make_predictor(codebook, "neuron" if policy.startswith("neuron-") else "cluster", **form)
    tokens = torch.randint(0, tiny.VOCABULARY, (2, 11))
    dense = model(tokens).logits
    expected = slow_logits(model, codebook, predictor, policy, tokens)
    masked = apc.sparsify(model, codebook, predictor, policy)(tokens).logits
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-4)
    assert (masked - dense).abs().max() > 1e-2
    assert torch.equal(apc.restore(model)(tokens).logits, dense)


@torch.no_grad()
def test_random_masks_depend_on_the_seed():
    model, codebook = tiny.make_model(), make_codebook()
    tokens = torch.arange(9)[None]
    one, again, other = (apc.sparsify(model, codebook, policy="random", seed=seed)(tokens).logits for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("policy", ["dense", "oracle", "predicted", "soft"])
def test_generate_gives_the_same_with_and_without_a_cache(policy):
    model, codebook = tiny.make_model(), make_codebook()
    apc.sparsify(model, codebook, make_predictor(codebook), policy)
    prompt = torch.arange(7)[None]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(prompt, **options)
    assert cached.shape == (1, 15)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_a_second_sparsify_replaces_the_first():
    model, codebook = tiny.make_model(), make_codebook()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = apc.sparsify(model, codebook, policy="static")(tokens).logits
        apc.sparsify(model, codebook, policy="random")
        assert torch.equal(apc.sparsify(model, codebook, policy="static")(tokens).logits, expected)


@pytest.mark.parametrize("kernel", [None, "torch"])
def test_removing_the_handle_makes_the_model_dense(kernel):
    model, codebook, token = tiny.make_model(), make_codebook(), torch.arange(1)[None]
    assert handle_of(model) is None
    with torch.no_grad():
        dense = model(token).logits
        assert not torch.equal(apc.sparsify(model, codebook, policy="static", kernel=kernel)(token).logits, dense)
        handle_of(model).remove()
        torch.testing.assert_close(apc.restore(model)(token).logits, dense)


def test_errors_name_what_does_not_fit():
    codebook = make_codebook()
    with pytest.raises(UserError, match="the codebook belongs to another model: it has layers=3, the model 2"):
        apc.sparsify(tiny.make_model(layers=2), codebook)
    with pytest.raises(
        UserError, match="the codebook belongs to another model: it has 52 neurons at neuron, the model has 48"
    ):
        apc.sparsify(tiny.make_model(width=48), codebook)
    with pytest.raises(UserError, match="policy predicted: no predictor was given"):
        apc.sparsify(tiny.make_model(), codebook, policy="predicted")
    with pytest.raises(UserError, match="needs a predictor of form cluster, this one's is neuron"):
        apc.sparsify(tiny.make_model(), codebook, make_predictor(codebook, "neuron"), policy="soft")
    with pytest.raises(UserError, match="policy orcale: unknown; choose dense, exact"):
        apc.sparsify(tiny.make_model(), codebook, policy="orcale")
    other = Predictor(PredictorHeader(LAYERS, E, 8, {"neuron": K + 1}))
    with pytest.raises(UserError, match="the predictor belongs to another codebook"):
        apc.sparsify(tiny.make_model(), codebook, other, policy="predicted")


def test_initial_weights_do_not_depend_on_the_order_in_which_sites_are_named():
    """A seed gives each site the same weights, drawn in the order of their names."""
    made = []
    for sites in (["gate", "up", "down"], ["down", "gate", "up"]):
        torch.manual_seed(3)
        made.append(Predictor(PredictorHeader(2, 8, 4, dict.fromkeys(sites, 5))))
    assert list(made[0].expand) == ["down", "gate", "up"]
    for name, value in made[0].state_dict().items():
        assert torch.equal(value, made[1].state_dict()[name])
