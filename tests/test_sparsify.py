"""`sparsify` equals a masked forward pass that is written independently, and `restore` leaves no trace."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

import apc
import tiny
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.data.models import weights_digest, weights_sample
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.decode import cache_keyword
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
    codebook = Codebook(books, widths, LAYERS, E, WIDTH, scope, weighting, 0.5, active, 0.5)
    return codebook.with_calibrated("cats", {"thresholds": torch.linspace(0.1, 0.3, LAYERS)}, {"bytes": 0.5})


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
        if policy == "cats":
            rows.append(gate[token].abs() >= codebook.calibrated["cats"]["thresholds"][layer])
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


# The other calibrated policies have tests of their own.
MASKS = [name for name, policy in POLICIES.items() if not policy.calibrated or name == "cats"]
CASES = [("llama", policy, {}, {}) for policy in MASKS if policy not in ("dense", "random")]
CASES += [
    ("phi3", "oracle", {}, {}),
    ("phi3", "cats", {}, {}),
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


@torch.no_grad()
def test_without_a_policy_the_predictor_decides():
    codebook, tokens = make_codebook(), torch.arange(9)[None]
    for form, policy in (("cluster", "predicted"), ("neuron", "neuron-predictor"), (None, "static")):
        predictor = form and make_predictor(codebook, form)
        expected = apc.sparsify(tiny.make_model(), codebook, predictor, policy)(tokens).logits
        assert torch.equal(apc.sparsify(tiny.make_model(), codebook, predictor)(tokens).logits, expected)


# FFNs that compute more than down(act(gate) * up).
OTHER_FFNS = {
    "multipliers": lambda mlp, x: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(mlp.gate_proj(x) * 0.9)) * 1.1,
    "a clamp": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).clamp(max=50) * mlp.up_proj(x)),
    "a norm": lambda mlp, x: mlp.down_proj(F.rms_norm(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), (WIDTH,))),
    "a shift": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OTHER_FFNS)
def test_kernels_refuse_an_ffn_that_computes_something_else(kind, dtype):
    model, codebook, tokens = tiny.make_model().to(dtype), make_codebook(), torch.arange(9)[None]
    mlp, others = model.model.layers[1].mlp, [model.model.layers[layer].mlp for layer in (0, 2)]
    own = mlp.forward = lambda x: OTHER_FFNS[kind](mlp, x)
    dense = model(tokens).logits
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp \(LlamaMLP\): it computes more than down\(act\(gate\) \* up\)"
    ):
        apc.sparsify(model, codebook, kernel="torch")
    assert handle_of(model) is None and mlp.forward is own and all("forward" not in other.__dict__ for other in others)
    assert torch.equal(model(tokens).logits, dense)
    assert not torch.equal(apc.sparsify(model, codebook)(tokens).logits, dense)  # without a kernel


def with_multipliers(gate, down):
    """A model with the FFNs of Falcon-H1, which scale the gate's values and the output."""
    model = tiny.make_model()
    sizes = SimpleNamespace(hidden_size=E, intermediate_size=WIDTH, mlp_bias=False, hidden_act="silu")
    sizes.mlp_multipliers = gate, down
    for layer in model.model.layers:
        weights, layer.mlp = layer.mlp.state_dict(), FalconH1MLP(sizes)
        layer.mlp.load_state_dict(weights)
    return model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["static", "predicted", "soft"])
def test_kernels_run_the_multipliers_of_falcon_h1(policy):
    codebook, tokens = make_codebook(), torch.arange(9)[None]
    model, predictor = with_multipliers(0.3, 2.5), make_predictor(codebook)
    masked = apc.sparsify(model, codebook, predictor, policy)(tokens).logits
    sparse = apc.sparsify(model, codebook, predictor, policy, kernel="torch", scoring=True)(tokens).logits
    torch.testing.assert_close(sparse, masked, rtol=1e-4, atol=1e-4)
    plain = apc.sparsify(with_multipliers(1.0, 1.0), codebook, predictor, policy)(tokens).logits
    assert float((masked - plain).abs().max()) > 0.1
    ahead = make_predictor(codebook, lookahead=1)
    with pytest.raises(UserError, match=r"layers\.0\.mlp: it has multipliers, which kernels support without lookahead"):
        apc.sparsify(model, codebook, ahead, "predicted", kernel="torch")
    tensors = {"masks": codebook.sites["neuron"].centroids, "thresholds": torch.zeros(codebook.layers, 3)}
    staged = codebook.with_calibrated("staged-predicted", tensors, {})
    with pytest.raises(UserError, match="it has multipliers, which kernels support without .* and stages only"):
        apc.sparsify(model, staged, predictor, "staged-predicted", kernel="torch")
    with pytest.raises(UserError, match=r"\(FalconH1MLP\): it computes more than down"):
        apc.sparsify(with_multipliers(0.0, 1.0), codebook, kernel="torch")


@torch.no_grad()
@pytest.mark.parametrize("family", ["bitnet", "gemma3n_text"])
def test_kernels_refuse_families_with_another_ffn(family, monkeypatch):
    options = {
        "bitnet": dict(hidden_act="silu"),
        "gemma3n_text": dict(
            activation_sparsity_pattern=[0.0, 0.9, 0.0],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=tiny.VOCABULARY + 1,
            num_kv_shared_layers=0,
            altup_num_inputs=2,
            laurel_rank=8,
        ),
    }[family]
    monkeypatch.setitem(tiny.EVERY_FAMILY, family, dict(model_type=family, **options))
    with pytest.raises(UserError, match=r"\.mlp \(\w+MLP\): it computes more than"):
        apc.sparsify(tiny.make_model(family), make_codebook(), kernel="torch")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_all_neurons_kept_a_kernel_equals_the_dense_model(family, dtype):
    model, codebook, tokens = tiny.make_model(family).to(dtype), make_codebook(), torch.arange(9)[None]
    book = codebook.sites["neuron"]
    book.static = ops.pack(torch.ones(LAYERS, WIDTH, dtype=torch.bool))
    dense = model(tokens).logits
    sparse = apc.sparsify(model, codebook, kernel="torch", scoring=True)(tokens).logits
    assert (sparse - dense).float().norm() <= torch.finfo(dtype).eps * 10 * dense.float().norm()


def with_layer_index(mlp):
    def forward(hidden, layer_idx=None):
        return type(mlp).forward(mlp, hidden)

    mlp.forward = forward


def with_any_keywords(mlp):
    own = type(mlp).forward
    mlp.forward = lambda hidden, **others: own(mlp, hidden)


@torch.no_grad()
def test_ffns_that_take_more_than_their_input_are_named():
    model, codebook, hidden = tiny.make_model(), make_codebook(), torch.randn(1, 1, E)
    mlp = model.model.layers[1].mlp
    with_any_keywords(mlp)
    apc.sparsify(model, codebook, kernel="torch")
    assert torch.equal(mlp(x=hidden), mlp(hidden))
    with pytest.raises(UserError, match=r"layers\.1\.mlp: it was called with 2 arguments, kernels take its input only"):
        mlp(hidden, scale=2.0)
    apc.restore(model)
    with_layer_index(mlp)
    with pytest.raises(UserError, match=r"layers\.1\.mlp: its forward takes layer_idx besides its input"):
        apc.sparsify(model, codebook, kernel="torch")
    del mlp.forward, mlp.act_fn
    with pytest.raises(UserError, match=r"layers\.1\.mlp: its activation function was not found"):
        apc.sparsify(model, codebook, kernel="torch")
    with pytest.raises(UserError, match="weights are not in memory"):
        apc.sparsify(tiny.make_model().to("meta"), codebook)


def scaled(weight):
    return (weight.detach() * -1.5).contiguous()


def assign_state(model):
    state = {name: scaled(value) if "mlp" in name else value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def set_data(model):
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.data = scaled(weight)


def set_parameters(model):
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.weight = torch.nn.Parameter(scaled(linear.weight))


def change_in_place(model):
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.mul_(-1.5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [None, "torch"])
@pytest.mark.parametrize("change", [assign_state, set_data, set_parameters, change_in_place])
def test_a_sparse_model_follows_its_weights(change, kernel):
    codebook, tokens, changed = make_codebook(), torch.arange(9)[None], tiny.make_model()
    options = dict(kernel=kernel, scoring=True)
    before = apc.sparsify(tiny.make_model(), codebook, **options)(tokens).logits
    change(changed)
    dense = changed(tokens).logits
    expected = apc.sparsify(changed, codebook, **options)(tokens).logits
    model = apc.sparsify(tiny.make_model(), codebook, **options)
    change(model)
    assert torch.equal(model(tokens).logits, expected) and not torch.allclose(before, expected)
    assert torch.equal(apc.restore(model)(tokens).logits, dense)
    assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()


class Adapter(torch.nn.Module):
    """A projection with something added, as peft's adapters are."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("kernel", [None, "torch"])
def test_adapters_on_an_ffn_are_named(kernel):
    model, codebook, tokens = tiny.make_model(), make_codebook(), torch.arange(9)[None]
    dense = model(tokens).logits
    apc.sparsify(model, codebook, kernel=kernel)
    mlp = model.model.layers[1].mlp
    linear, mlp.down_proj = mlp.down_proj, Adapter(mlp.down_proj)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp: its down_proj was replaced after sparsify \(by .*\.Adapter\); m"
    ):
        model(tokens)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp: its down_proj has an adapter \(.*Adapter\), which masks would miss; merge"
    ):
        apc.sparsify(model, codebook, kernel=kernel)
    mlp.down_proj = linear
    assert torch.equal(apc.restore(model)(tokens).logits, dense)


def test_peft_adapters_are_named_and_work_once_merged():
    peft = pytest.importorskip("peft")
    codebook, tokens = make_codebook(), torch.arange(9)[None]

    def adapted(model):
        torch.manual_seed(5)
        settings = peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings).eval()

    expected = apc.sparsify(adapted(tiny.make_model()).merge_and_unload(), codebook)(tokens).logits
    for kernel in (None, "torch"):
        model = adapted(apc.sparsify(tiny.make_model(), codebook, kernel=kernel, scoring=True))
        with pytest.raises(UserError, match="replaced after sparsify"):
            model(tokens)
        torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(UserError, match="has an adapter"):
            apc.sparsify(adapted(tiny.make_model()), codebook, kernel=kernel)


def test_a_converted_or_hooked_model_says_what_to_do():
    model, codebook, token = tiny.make_model(), make_codebook(), torch.arange(1)[None]
    apc.sparsify(model, codebook, kernel="torch").to(torch.bfloat16)
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp: its weights are torch\.bfloat16 .*; call apc\.sparsify again"
    ):
        model(token)
    sparse = apc.sparsify(model, codebook, kernel="torch")(token).logits
    assert torch.equal(sparse, apc.sparsify(tiny.make_model().bfloat16(), codebook, kernel="torch")(token).logits)
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UserError, match=r"layers\.2\.mlp: its up_proj has forward hooks, which a kernel does not call"):
        model(token)


@pytest.mark.parametrize("kernel", [None, "torch"])
def test_a_sparse_model_is_not_copied(kernel):
    model, codebook, token = tiny.make_model(), make_codebook(), torch.arange(1)[None]
    dense = model(token).logits
    apc.sparsify(model, codebook, kernel=kernel)
    for duplicate in (copy.deepcopy, pickle.dumps):
        for part in (model, model.model, model.model.layers[0].mlp):
            with pytest.raises(UserError, match=r"can't be copied or pickled; call apc\.restore\(model\) first"):
                duplicate(part)
    twin = copy.deepcopy(apc.restore(model))
    assert torch.equal(twin(token).logits, dense)
    assert not torch.equal(apc.sparsify(twin, codebook, kernel=kernel)(token).logits, dense)
    assert torch.equal(model(token).logits, dense)


DENSE_PASSES = {
    "scores": lambda model, ids: model(ids),
    "keywords": lambda model, ids: model(input_ids=ids, use_cache=False),
    "labels": lambda model, ids: model(ids, labels=ids, use_cache=True),
    "embeddings": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)),
    "no head": lambda model, ids: model.model(ids),
    "generate without a cache": lambda model, ids: model.generate(ids, use_cache=False, max_new_tokens=2),
    "generate in a batch": lambda model, ids: model.generate(torch.cat([ids, ids]), max_new_tokens=2),
}


@torch.no_grad()
@pytest.mark.parametrize("call", DENSE_PASSES)
def test_a_dense_pass_of_a_sparse_model_is_said_once(call, capsys):
    model, tokens = apc.sparsify(tiny.make_model(), make_codebook(), kernel="torch"), torch.arange(9)[None]
    capsys.readouterr()
    for _ in range(2):
        DENSE_PASSES[call](model, tokens)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("apc:"))
    count = {"generate in a batch": 2}.get(call, 9)
    assert line.startswith(f"apc: a forward pass of {count} tokens runs dense, as any above 1 does: its results are")
    assert line.endswith("; apc.sparsify(…, scoring=True) runs all passes under the masks")
    apc.restore(model)
    DENSE_PASSES[call](model, tokens)
    apc.sparsify(model, make_codebook(), kernel="torch", scoring=True)
    DENSE_PASSES[call](model, tokens)
    apc.sparsify(model, make_codebook())
    DENSE_PASSES[call](model, tokens)
    assert "apc:" not in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, dict(do_sample=True), dict(prefill_chunk_size=4), dict(prompt_lookup_num_tokens=2)]
)
def test_a_dense_prefill_is_not_said(options, capsys):
    model, tokens = apc.sparsify(tiny.make_model(), make_codebook(), kernel="torch"), torch.arange(9)[None]
    model.generate(tokens, max_new_tokens=4, **options)
    model(tokens, **{cache_keyword(model): DynamicCache(config=model.config)})
    assert "apc:" not in capsys.readouterr().err


@torch.no_grad()
def test_scoring_runs_whole_sequences_under_the_masks():
    codebook, tokens = make_codebook(), torch.randint(0, tiny.VOCABULARY, (2, 11))
    predictor = make_predictor(codebook)
    dense = tiny.make_model()(tokens).logits
    masked = apc.sparsify(tiny.make_model(), codebook, predictor)(tokens).logits
    scored = apc.sparsify(tiny.make_model(), codebook, predictor, kernel="torch", scoring=True)(tokens).logits
    torch.testing.assert_close(scored, masked, rtol=1e-4, atol=1e-4)
    assert (scored - dense).abs().max() > 1e-2
    with pytest.raises(UserError, match="scoring=True runs all calls sparse; leave out max_sparse_tokens=3"):
        apc.sparsify(tiny.make_model(), codebook, predictor, kernel="torch", max_sparse_tokens=3, scoring=True)


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


def fitted_on(model, **provenance):
    codebook = make_codebook()
    codebook.provenance = {"model": "tiny", "weights_sample": weights_sample(model)} | provenance
    return codebook


def says(model, codebook, **options):
    """What sparsify warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apc.sparsify(model, codebook, policy="static", **options)
    return [str(warning.message) for warning in caught]


def test_other_weights_of_the_same_shape_are_a_warning_that_names_both_or_an_error():
    model, other = tiny.make_model(), tiny.make_model(initializer_range=0.03)
    codebook, sample = fitted_on(model), weights_sample(other)
    other.config.name_or_path = "fine-tuned"
    (line,) = says(other, codebook)
    before = codebook.provenance["weights_sample"]["float32"][:12]
    assert line == (
        f"weights other than fitted: the codebook was fitted with tiny (weights {before}), "
        f"this is fine-tuned (weights {sample['float32'][:12]})"
    )
    apc.restore(other)
    with pytest.raises(
        UserError, match="^weights other than fitted: .*; use the codebook made for this model, or apc.sparsify"
    ):
        apc.sparsify(other, codebook, policy="static", strict=True)
    assert handle_of(other) is None
    apc.sparsify(other, codebook, policy="dense", strict=True)


def test_a_small_change_of_one_layers_attention_is_noticed():
    model = tiny.make_model()
    codebook = fitted_on(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(1.0001)
    assert len(says(model, codebook)) == 1


@pytest.mark.parametrize(
    ("stored", "fitted", "own"),
    [(torch.float32, torch.float32, torch.bfloat16), (torch.float32, torch.float16, torch.float32)]
    + [(torch.bfloat16, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16, torch.bfloat16)],
    ids=str,
)
def test_the_same_weights_in_another_type_are_the_same(stored, fitted, own):
    codebook = fitted_on(tiny.make_model().to(stored).to(fitted))
    assert says(tiny.make_model().to(stored).to(own), codebook, strict=True) == []


def test_a_model_that_is_sparse_already_keeps_its_weights():
    model = tiny.make_model()
    codebook = fitted_on(model)
    for kernel in ("torch", None, "torch"):
        assert says(model, codebook, kernel=kernel, strict=True) == []


def test_a_codebook_of_version_0_1_has_only_the_digest_of_all_weights():
    model = tiny.make_model()
    codebook = fitted_on(model, weights_sample=None, patterns={"weights": weights_digest(model)})
    assert says(model, codebook, strict=True) == []
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    (line,) = says(model, codebook)
    assert line.startswith("weights perhaps other than fitted: the codebook was fitted with tiny (weights ")
    codebook.provenance = {}
    assert says(model, codebook, strict=True) == []
