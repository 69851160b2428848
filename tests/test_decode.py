"""Sparse FFNs in a model: the same as masks that multiply, dense where many tokens come at once, put back whole, and decoded with a fixed cache."""

import gc
import math

import pytest
import torch

import apc
import tiny
import train
from apc import ops
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.ops.sparse_ffn import act
from apc.predict.predictor import at_16_bits
from apc.sparse import decode, sparse_ffn, timing
from apc.sparse.decode import GreedyDecoder, attend
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POLICIES = [("predicted", "cluster", {}), ("predicted", "cluster", {"predictor.lookahead": 1}),
        ("predicted", "cluster", {"predictor.lookahead": 2}), ("soft", "cluster", {}), ("static", "cluster", {}),
        ("neuron-predictor", "neuron", {}), ("neuron-predictor", "low-bit", {}), ("neuron-threshold", "neuron", {}),
        ("neuron-threshold", "low-bit", {"predictor.bits": 2}),
        ("neuron-threshold", "low-bit", {"predictor.low_bit_projections": "[gate]", "predictor.lookahead": 1})]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("decode"))


@pytest.fixture(scope="module")
def made(workplace):
    """(codebook, predictor) of a run with these settings, with offsets and a correction as tuning leaves them."""
    found = {}

    def make(form, **changes):
        name = "-".join([form, *(str(value).strip("[]") for value in changes.values())])
        if name not in found:
            train.train(
                load_config(
                    None,
                    tiny.tiny_overrides(
                        workplace, stage="predict", **{"run.name": name, "predictor.form": form, **changes}
                    ),
                )
            )
            run = apc.load_run(workplace / "runs" / name)
            book, predictor = run.codebook.sites["neuron"], run.predictor.copy(corrects=True)
            predictor.thresholds = run.predictor.thresholds
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for value in (predictor.correct, predictor.correct_bias):
                    value.normal_(std=0.3, generator=generator)
            book.offsets = at_16_bits(
                torch.randn(*book.profiles.shape[:2], run.codebook.hidden_size, generator=generator)
            )
            found[name] = (run.codebook, predictor.requires_grad_(False).eval().rounded())
        return found[name]

    return make


def model_on(workplace, device, dtype="float32"):
    return load_model(ModelConfig(path=str(workplace / "model"), dtype=dtype, device=device), torch.device(device))[0]


WINDOWS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("policy", "form", "changes"), POLICIES)
def test_skipping_neurons_gives_what_masking_them_gives(workplace, made, device, policy, form, changes):
    model, windows = model_on(workplace, device), WINDOWS.to(device)
    codebook, predictor = made(form, **changes)
    dense = model(windows).logits
    masked = apc.sparsify(model, codebook, predictor, policy)(windows).logits
    found = apc.sparsify(model, codebook, predictor, policy, kernel="auto", max_sparse_tokens=math.inf)(windows).logits
    assert (found - masked).norm() < 1e-4 * (masked - dense).norm()
    assert torch.equal(apc.restore(model)(windows).logits, dense)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_run_dense_and_few_sparse(workplace, made, device):
    model, windows = model_on(workplace, device), WINDOWS.to(device)
    codebook, predictor = made("cluster")
    dense = model(windows).logits
    alone = [
        apc.sparsify(model, codebook, predictor, "predicted")(windows[:1, :1]).logits,
        apc.restore(model)(windows[:1, :1]).logits,
    ]
    apc.sparsify(model, codebook, predictor, "predicted", kernel="auto", max_sparse_tokens=1)
    assert torch.allclose(model(windows).logits, dense, atol=1e-4)
    found = model(windows[:1, :1]).logits
    assert (found - alone[0]).norm() < 1e-4 * (alone[0] - alone[1]).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "form", "changes"), POLICIES)
def test_how_many_tokens_run_sparse_is_measured(workplace, made, policy, form, changes):
    model = model_on(workplace, "cuda")
    codebook, predictor = made(form, **changes)
    hooks = handle_of(apc.sparsify(model, codebook, predictor, policy, kernel="auto"))
    assert 0 <= hooks.max_sparse_tokens <= 4
    sparse_pays = [
        ([1.0, 0.9, 0.7, 1.0, 0.96, 1.0, 0.98], 2),
        ([1.0, 0.9, 0.6], 0),
    ]  # of one token dense, sparse, and two thirds of reading all; of more
    for measured, tokens in sparse_pays:
        seconds = iter(measured)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_ffn, "_graph_seconds", lambda calls: next(seconds))  # noqa: B023
            assert (
                handle_of(apc.sparsify(model, codebook, predictor, policy, kernel="auto")).max_sparse_tokens == tokens
            )
    assert handle_of(apc.sparsify(model, codebook, predictor, policy, kernel="triton")).max_sparse_tokens == 4


def downs_held():
    """Storages in memory as large as one down projection of the tiny model, by their addresses."""
    tensors = [
        thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and sorted(thing.shape) == [32, 52]
    ]
    return {value.untyped_storage().data_ptr() for value in tensors}


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_stored_once_and_put_back(workplace, made, device):
    codebook, predictor = made("cluster")
    gc.collect()
    others = downs_held()
    model = model_on(workplace, device)
    before = {name: value.clone().flatten() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    held = len(downs_held() - others)
    apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        assert weight.shape == (32, 52) and weight.T.is_contiguous() and not weight.is_contiguous()
    assert len(downs_held() - others) == held
    apc.restore(model)
    assert (
        all(value is parameters[name] for name, value in model.named_parameters())
        and "forward" not in model.model.layers[0].mlp.__dict__
    )
    assert all(torch.equal(value.flatten(), before[name]) for name, value in model.state_dict().items())
    assert (
        all(layer.mlp.down_proj.weight.is_contiguous() for layer in model.model.layers)
        and len(downs_held() - others) == held
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("policy", "form", "changes"), POLICIES)
def test_a_step_is_traced_whole(workplace, made, device, policy, form, changes):
    """And the first layer has all operations: Inductor would need minutes for one that it meets first in the last of many."""
    model, token, called = model_on(workplace, device), WINDOWS[:1, :1].to(device), []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("apc."))
        return graph.forward

    apc.sparsify(model, *made(form, **changes), policy, kernel="auto", max_sparse_tokens=1)
    expected = model(token).logits
    torch.compiler.reset()
    assert torch.allclose(
        torch.compile(model.forward, backend=backend, fullgraph=True)(token).logits, expected, atol=1e-5
    )
    in_first = 1 + next(at for at, name in enumerate(called) if name.startswith("apc.sparse_ffn"))
    assert len(called) > in_first and set(called[in_first:]) <= set(called[:in_first])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["dense", "predicted"])
def test_decoding_with_a_fixed_cache_is_generate(workplace, made, device, policy):
    model, windows = model_on(workplace, device), WINDOWS.to(device)
    apc.sparsify(model, *made("cluster"), policy, kernel="auto", max_sparse_tokens=2)
    decoder = GreedyDecoder(model, 2, 40, mode=None)
    decoder.record(windows)
    found = decoder.decode(windows, 20)
    expected = model.generate(
        windows, attention_mask=torch.ones_like(windows), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )[:, 12:]
    assert torch.equal(found, expected) and torch.equal(decoder.decode(windows, 20), found)


def test_more_tokens_than_the_cache_has_room_for_are_refused(workplace):
    decoder = GreedyDecoder(model_on(workplace, "cpu"), 2, 15, mode=None)
    assert decoder.decode(WINDOWS, 4).shape == (2, 4)  # the last token that is decoded needs no room
    with pytest.raises(ValueError, match="16 tokens are more than the decoder's length of 15"):
        decoder.step()
    with pytest.raises(ValueError, match="24 tokens"):
        decoder.prefill(torch.cat([WINDOWS, WINDOWS], dim=1))
    assert decoder.decode(WINDOWS, 4).shape == (2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_decoded_by_the_kernels_in_one_graph(workplace, made, dtype, lookahead):
    """Where a layer's neurons are found beside the attention before it; without a graph, before that."""
    model, windows = model_on(workplace, "cuda", dtype), WINDOWS[:1].cuda()
    codebook, predictor = made("cluster", **({"predictor.lookahead": lookahead} if lookahead else {}))
    ffns = handle_of(apc.sparsify(model, codebook, predictor, "predicted", kernel="triton", max_sparse_tokens=1))
    decoder = GreedyDecoder(model, 1, 40, mode=None)
    decoder.record(windows)
    decoder.prefill(windows)
    decoder.token.fill_(7)
    for _ in range(3):
        decoder.step()
    found, clear = decoder.logits.clone(), decoder._graph
    decoder.prefill(windows)
    decoder._graph = None
    decoder.token.fill_(7)
    for _ in range(3):
        decoder.step()
    assert clear is not None and torch.equal(decoder.logits, found)
    assert any(ffns._can_prefetch) == (dtype == "bfloat16" and ops.can_find(*ffns_of(model)))


def ffns_of(model):
    """gate, up and the transposed down of its first FFN."""
    ffn = find_ffns(model)[0]
    return ffn.projection("gate"), ffn.projection("up"), ffn.down.weight.T


@pytest.mark.parametrize("policy", ["dense", "predicted"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_decoders_step_is_traced_whole(workplace, made, policy, lookahead):
    """With its cache and its attention; what is not would run uncompiled from the eighth layer on."""
    model = model_on(workplace, "cpu")
    apc.sparsify(model, *made("cluster", **{"predictor.lookahead": lookahead}), policy, kernel="torch")
    decoder, compiled = (GreedyDecoder(model, 2, 40, mode=None) for _ in range(2))
    torch.compiler.reset()
    compiled._call = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled.decode(WINDOWS, 5), decoder.decode(WINDOWS, 5))
    assert torch.allclose(compiled.logits, decoder.logits, atol=1e-5)


def test_tuning_is_timed_in_graphs_while_a_step_is_recorded(monkeypatch):
    from torch._inductor.runtime.benchmarking import benchmarker

    monkeypatch.setattr(decode, "graph_time", lambda call: call())
    with decode._tuning_by_graphs():
        assert benchmarker.benchmark(lambda a, b: a + b, (3,), {"b": 4}, device="cuda") == 7
        assert torch.compiler.config.cache_key_tag == "timed in graphs"
    assert "benchmark_gpu" not in vars(benchmarker)


@pytest.mark.gpu
def test_a_tuned_step_is_that_of_the_model(workplace, made, monkeypatch):
    model, windows = model_on(workplace, "cuda"), WINDOWS.cuda()
    apc.sparsify(model, *made("cluster"), "predicted", kernel="auto", max_sparse_tokens=2)
    times, timed = [], timing.graph_time
    monkeypatch.setattr(decode, "graph_time", lambda call: times.append(timed(call)) or times[-1])
    plain, tuned = (
        GreedyDecoder(model, 2, 40, mode=None),
        GreedyDecoder(model, 2, 40, "max-autotune-no-cudagraphs", early=True),
    )
    for decoder in (plain, tuned):
        decoder.record(windows)
        decoder.prefill(windows)
        decoder.step()
    assert times and all(0 < ms < 1000 for ms in times)
    assert torch.allclose(tuned.logits, plain.logits, atol=1e-3)


def test_a_model_that_can_not_be_traced_whole_is_named(workplace):
    model = model_on(workplace, "cpu")
    decoder = GreedyDecoder(model, 1, 20, mode=None)

    def broken(**given):
        torch._dynamo.graph_break()
        return model(**given)

    decoder._call = torch.compile(broken, backend="eager", fullgraph=True)
    with pytest.raises(
        UserError,
        match=r"^\w+ForCausalLM: torch.compile cannot trace a decoding step whole \(.+\); leave out speed=true",
    ):
        decoder.decode(WINDOWS[:1], 3)


@pytest.mark.parametrize("n", [1, 3])
def test_heads_that_share_keys_attend_without_repeating_them(n):
    query, key, value = torch.randn(2, 6, n, 8), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    mask = torch.rand(2, 1, n, 10) < 0.7
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    found, _ = attend(module, query, key, value, mask, scaling=0.3)
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(
        1, 2
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_steps_attend_so_and_leave_the_models_attention_as_it_was(workplace, monkeypatch):
    model, seen = model_on(workplace, "cpu"), []
    monkeypatch.setattr(
        decode, "attend", lambda *given, **named: seen.append(given[1].shape[2]) or attend(*given, **named)
    )
    GreedyDecoder(model, 2, 40, mode=None).decode(WINDOWS, 5)
    assert seen == [1] * 4 * len(model.model.layers) and model.config._attn_implementation == "sdpa"


def test_what_has_no_kernel_is_said(workplace, made, capsys):
    model = model_on(workplace, "cpu")
    codebook, predictor = made("cluster")
    for policy, kernel, message in (
        ("oracle", "auto", "policy oracle: its mask is known only after"),
        ("gate", "auto", "policy gate: its mask is known only after"),
        ("predicted", "fast", "kernel=fast: choose auto, triton, torch"),
        ("predicted", "triton", "kernel=triton: the model is on cpu"),
    ):
        with pytest.raises(UserError, match=message):
            apc.sparsify(model, codebook, predictor, policy, kernel=kernel)
    sparse_ffn._by_triton.said = False
    for _ in range(2):
        apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")
    assert capsys.readouterr().err.count("no Triton kernels") == 1
    apc.restore(model)
    book = codebook.sites["neuron"]
    kept, book.centroids = book.centroids, book.centroids.clone()
    book.centroids[1, 4] = 0
    with pytest.raises(UserError, match="cluster 4 of layer 1 keeps no neuron"):
        apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")
    book.centroids = kept
    model.model.layers[2].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(UserError, match="layers.2.mlp: its projections have biases"):
        apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")
    model.model.layers[2].mlp.down_proj.bias = None
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(UserError, match="layers.1.mlp: its activation Tanh has no kernel"):
        apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_a_kernel_for_its_activation(family):
    model = tiny.make_model(family)
    for ffn in find_ffns(model):
        name = sparse_ffn.activation_of(ffn)
        x = torch.linspace(-4, 4, 50)
        found = getattr(ffn.module, "act_fn", None) or ffn.module.activation_fn
        assert torch.allclose(act(x, name), found(x), atol=1e-6)
