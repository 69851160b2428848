"""Sparse FFNs equal masked ones, run dense for many tokens, leave no trace; a fixed cache decodes as `generate`."""

import gc
import math

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import apc
import tiny
import train
from apc import ops
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data import attention
from apc.data.ffn import activation_function, find_ffns
from apc.data.models import load_model
from apc.ops.sparse_ffn import act
from apc.predict.predictor import at_16_bits
from apc.sparse import decode, sparse_ffn, timing
from apc.sparse.decode import GreedyDecoder, attend
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POLICIES = [
    ("predicted", "cluster", {}),
    ("predicted", "cluster", {"predictor.lookahead": 1}),
    ("predicted", "cluster", {"predictor.lookahead": 2}),
    ("soft", "cluster", {}),
    ("static", "cluster", {}),
    ("neuron-predictor", "neuron", {}),
    ("neuron-predictor", "low-bit", {}),
    ("neuron-threshold", "neuron", {}),
    ("neuron-threshold", "low-bit", {"predictor.bits": 2}),
    ("neuron-threshold", "low-bit", {"predictor.low_bit_projections": "[gate]", "predictor.lookahead": 1}),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("decode"))


@pytest.fixture(scope="module")
def trained(workplace):
    """A function that returns codebook and predictor of a run, with random offsets and corrections, as after tuning."""
    runs = {}

    def get(form, **changes):
        name = "-".join([form, *(str(value).strip("[]") for value in changes.values())])
        if name not in runs:
            settings = {"run.name": name, "predictor.form": form, **changes}
            train.train(load_config(None, tiny.tiny_overrides(workplace, stage="predict", **settings)))
            run = apc.load_run(workplace / "runs" / name)
            book, predictor = run.codebook.sites["neuron"], run.predictor.copy(corrects=True)
            predictor.thresholds = run.predictor.thresholds
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for value in (predictor.correct, predictor.correct_bias):
                    value.normal_(std=0.3, generator=generator)
            size = (*book.profiles.shape[:2], run.codebook.hidden_size)
            book.offsets = at_16_bits(torch.randn(size, generator=generator))
            runs[name] = (run.codebook, predictor.requires_grad_(False).eval().rounded())
        return runs[name]

    return get


def model_on(workplace, device, dtype="float32"):
    return load_model(ModelConfig(path=str(workplace / "model"), dtype=dtype, device=device), torch.device(device))[0]


WINDOWS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("policy", "form", "changes"), POLICIES)
def test_skipping_neurons_equals_masking_them(workplace, trained, device, policy, form, changes):
    """Of many tokens, which torch computes on the CPU, and of three, which numba does."""
    model = model_on(workplace, device)
    codebook, predictor = trained(form, **changes)
    for windows in (WINDOWS.to(device), WINDOWS[:1, :3].to(device)):
        dense = model(windows).logits
        masked = apc.sparsify(model, codebook, predictor, policy)(windows).logits
        apc.sparsify(model, codebook, predictor, policy, kernel="auto", max_sparse_tokens=math.inf)
        assert handle_of(model).kernel == ("numba" if device == "cpu" else "triton")
        skipped = model(windows).logits
        assert (skipped - masked).norm() < 1e-4 * (masked - dense).norm()
        assert torch.equal(apc.restore(model)(windows).logits, dense)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_run_dense_and_few_sparse(workplace, trained, device):
    model, windows = model_on(workplace, device), WINDOWS.to(device)
    codebook, predictor = trained("cluster")
    dense = model(windows).logits
    token = windows[:1, :1]
    masked_token = apc.sparsify(model, codebook, predictor, "predicted")(token).logits
    dense_token = apc.restore(model)(token).logits
    apc.sparsify(model, codebook, predictor, "predicted", kernel="auto", max_sparse_tokens=1)
    assert torch.allclose(model(windows).logits, dense, atol=1e-4)
    sparse_token = model(token).logits
    assert (sparse_token - masked_token).norm() < 1e-4 * (masked_token - dense_token).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "form", "changes"), POLICIES)
def test_the_crossover_is_measured(workplace, trained, policy, form, changes):
    model = model_on(workplace, "cuda")
    codebook, predictor = trained(form, **changes)

    def crossover(kernel):
        return handle_of(apc.sparsify(model, codebook, predictor, policy, kernel=kernel)).max_sparse_tokens

    assert 0 <= crossover("auto") <= 4 and crossover("triton") == 4
    # Times in the order of measuring: one token dense, one token sparse, two thirds of reading all weights; then dense
    # and sparse for more tokens.
    for times, tokens in (([1.0, 0.9, 0.7, 1.0, 0.96, 1.0, 0.98], 2), ([1.0, 0.9, 0.6], 0)):
        remaining = iter(times)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_ffn, "_time", lambda calls, device: next(remaining))  # noqa: B023
            assert crossover("auto") == tokens


def storages():
    """Addresses of all storages in memory that are as large as a down projection of the tiny model."""
    tensors = [
        value for value in gc.get_objects() if isinstance(value, torch.Tensor) and sorted(value.shape) == [32, 52]
    ]
    return {value.untyped_storage().data_ptr() for value in tensors}


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_stored_once_and_restored(workplace, trained, device):
    codebook, predictor = trained("cluster")
    gc.collect()
    others = storages()
    model = model_on(workplace, device)
    before = {name: value.clone().flatten() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    count = len(storages() - others)
    apc.sparsify(model, codebook, predictor, "predicted", kernel="auto")
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        assert weight.shape == (32, 52) and weight.T.is_contiguous() and not weight.is_contiguous()
    assert len(storages() - others) == count
    apc.restore(model)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(torch.equal(value.flatten(), before[name]) for name, value in model.state_dict().items())
    for layer in model.model.layers:
        assert "forward" not in layer.mlp.__dict__ and layer.mlp.down_proj.weight.is_contiguous()
    assert len(storages() - others) == count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("policy", "form", "changes"), [POLICIES[i] for i in (1, 3, 4, 5, 6, 9)])
def test_torch_compile_traces_a_whole_step(workplace, trained, device, policy, form, changes):
    """The first layer calls all operations: Inductor takes minutes for one that first comes up in a late layer."""
    model, token, called = model_on(workplace, device), WINDOWS[:1, :1].to(device), []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("apc."))
        return graph.forward

    apc.sparsify(model, *trained(form, **changes), policy, kernel="auto", max_sparse_tokens=1)
    expected = model(token).logits
    torch.compiler.reset()
    assert torch.allclose(
        torch.compile(model.forward, backend=backend, fullgraph=True)(token).logits, expected, atol=1e-5
    )
    in_first = 1 + next(at for at, name in enumerate(called) if name.startswith("apc.sparse_ffn"))
    assert len(called) > in_first and set(called[in_first:]) <= set(called[:in_first])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["dense", "predicted"])
def test_decoding_with_a_fixed_cache_equals_generate(workplace, trained, device, policy):
    model, windows = model_on(workplace, device), WINDOWS.to(device)
    apc.sparsify(model, *trained("cluster"), policy, kernel="auto", max_sparse_tokens=2)
    decoder = GreedyDecoder(model, 2, 40, mode=None)
    decoder.record(windows)
    decoded = decoder.decode(windows, 20)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    expected = model.generate(windows, attention_mask=torch.ones_like(windows), **options)[:, 12:]
    assert torch.equal(decoded, expected) and torch.equal(decoder.decode(windows, 20), decoded)


def test_tokens_beyond_the_cache_raise(workplace):
    decoder = GreedyDecoder(model_on(workplace, "cpu"), 2, 15, mode=None)
    assert decoder.decode(WINDOWS, 4).shape == (2, 4)  # the last decoded token needs no room
    with pytest.raises(ValueError, match="16 tokens are more than the decoder's length of 15"):
        decoder.step()
    with pytest.raises(ValueError, match="24 tokens"):
        decoder.prefill(torch.cat([WINDOWS, WINDOWS], dim=1))
    assert decoder.decode(WINDOWS, 4).shape == (2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_graph_and_single_kernels_decode_the_same(workplace, trained, dtype, lookahead):
    """In a graph, a layer's active neurons are listed beside the attention before it; without one, before attention."""
    model, windows = model_on(workplace, "cuda", dtype), WINDOWS[:1].cuda()
    codebook, predictor = trained("cluster", **({"predictor.lookahead": lookahead} if lookahead else {}))
    ffns = handle_of(apc.sparsify(model, codebook, predictor, "predicted", kernel="triton", max_sparse_tokens=1))
    decoder = GreedyDecoder(model, 1, 40, mode=None)
    decoder.record(windows)
    decoder.prefill(windows)
    decoder.token.fill_(7)
    for _ in range(3):
        decoder.step()
    by_graph, graph = decoder.logits.clone(), decoder._graph
    decoder.prefill(windows)
    decoder._graph = None
    decoder.token.fill_(7)
    for _ in range(3):
        decoder.step()
    assert graph is not None and torch.equal(decoder.logits, by_graph)
    assert any(ffns._can_prefetch) == (dtype == "bfloat16" and ops.can_prefetch(ops.FFNWeights(*ffns_of(model))))


def ffns_of(model):
    """gate, up and the transposed down of a model's first FFN."""
    ffn = find_ffns(model)[0]
    return ffn.projection("gate"), ffn.projection("up"), ffn.down.weight.T


@pytest.mark.parametrize(("policy", "lookahead"), [("dense", 0), ("predicted", 1)])
def test_torch_compile_traces_a_whole_step_of_a_decoder(workplace, trained, policy, lookahead):
    """The trace includes cache and attention; parts left out would run uncompiled from the eighth layer on."""
    model = model_on(workplace, "cpu")
    apc.sparsify(model, *trained("cluster", **{"predictor.lookahead": lookahead}), policy, kernel="torch")
    decoder, compiled = (GreedyDecoder(model, 2, 40, mode=None) for _ in range(2))
    torch.compiler.reset()
    compiled._call = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled.decode(WINDOWS, 5), decoder.decode(WINDOWS, 5))
    assert torch.allclose(compiled.logits, decoder.logits, atol=1e-5)


def test_tuning_times_candidates_in_graphs(monkeypatch):
    from torch._inductor.runtime.benchmarking import benchmarker

    monkeypatch.setattr(decode, "graph_time", lambda call: call())
    with decode._tuning_by_graphs():
        assert benchmarker.benchmark(lambda a, b: a + b, (3,), {"b": 4}, device="cuda") == 7
        assert torch.compiler.config.cache_key_tag == "timed in graphs"
    assert "benchmark_gpu" not in vars(benchmarker)


@pytest.mark.gpu
def test_a_tuned_step_equals_the_models(workplace, trained, monkeypatch):
    model, windows = model_on(workplace, "cuda"), WINDOWS.cuda()
    apc.sparsify(model, *trained("cluster"), "predicted", kernel="auto", max_sparse_tokens=2)
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


def test_a_model_that_can_not_be_traced_is_named(workplace):
    model = model_on(workplace, "cpu")
    decoder = GreedyDecoder(model, 1, 20, mode=None)

    def broken(**given):
        torch._dynamo.graph_break()
        return model(**given)

    decoder._call = torch.compile(broken, backend="eager", fullgraph=True)
    with pytest.raises(
        UserError,
        match=r"^\w+ForCausalLM: torch.compile cannot trace a whole decoding step \(.+\); leave out speed=true",
    ):
        decoder.decode(WINDOWS[:1], 3)


@pytest.mark.parametrize("n", [1, 3])
def test_attention_with_shared_key_heads_equals_repeated_keys(n):
    query, key, value = torch.randn(2, 6, n, 8), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    mask = torch.rand(2, 1, n, 10) < 0.7
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    output, _ = attend(module, query, key, value, mask, scaling=0.3)
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_key_heads_give_the_attention_of_transformers(masked):
    query, key, value = (torch.randn(2, heads, 7, 8) for heads in (6, 3, 3))
    mask = torch.rand(2, 1, 7, 7).add(torch.eye(7)) > 0.4 if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    output, _ = attention.sdpa(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(output, expected, atol=1e-6)


def test_a_model_with_repeated_key_heads_decodes_as_before(workplace):
    """Also a padded batch, whose attention has a mask, and our decoder, which replaces the attention for a step."""
    model, padded = model_on(workplace, "cpu"), torch.ones_like(WINDOWS)
    padded[0, :4] = 0
    before = [model(WINDOWS).logits, model(WINDOWS, attention_mask=padded).logits]
    written = model.generate(WINDOWS[:1], max_new_tokens=6, do_sample=False)
    attention.use_sdpa(model)
    assert model.config._attn_implementation == attention.NAME
    for expected, mask in zip(before, (None, padded), strict=True):
        assert torch.allclose(model(WINDOWS, attention_mask=mask).logits, expected, atol=1e-5)
    assert torch.equal(model.generate(WINDOWS[:1], max_new_tokens=6, do_sample=False), written)
    decoded = GreedyDecoder(model, 1, 40, mode=None).decode(WINDOWS[:1], 6)
    assert torch.equal(decoded, written[:, WINDOWS.shape[1] :])
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.gpu
def test_float32_on_a_gpu_takes_torchs_fused_attention(workplace):
    model = model_on(workplace, "cuda")
    assert model.config._attn_implementation == attention.NAME
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION), torch.inference_mode():
        model(input_ids=WINDOWS.cuda())


def test_only_steps_replace_the_models_attention(workplace, monkeypatch):
    model, seen = model_on(workplace, "cpu"), []
    monkeypatch.setattr(
        decode, "attend", lambda *given, **named: seen.append(given[1].shape[2]) or attend(*given, **named)
    )
    GreedyDecoder(model, 2, 40, mode=None).decode(WINDOWS, 5)
    assert seen == [1] * 4 * len(model.model.layers) and model.config._attn_implementation == "sdpa"


def test_errors_name_what_has_no_kernel(workplace, trained):
    model = model_on(workplace, "cpu")
    codebook, predictor = trained("cluster")
    codebook = codebook.with_calibrated("cats", {"thresholds": torch.zeros(codebook.layers)}, {"bytes": 0.5})
    for policy, kernel, message in (
        ("oracle", "auto", "policy oracle: its masks depend on activations inside the FFN, which no kernel"),
        ("cats", "auto", "policy cats: its masks depend on activations inside"),
        ("predicted", "fast", "kernel=fast: choose auto, triton, numba, torch"),
        ("predicted", "triton", "kernel=triton: the model is on cpu, and kernels run on NVIDIA GPUs .triton. and on"),
    ):
        with pytest.raises(UserError, match=message):
            apc.sparsify(model, codebook, predictor, policy, kernel=kernel)
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
        x = torch.linspace(-4, 4, 50)
        assert torch.allclose(act(x, sparse_ffn.activation_of(ffn)), activation_function(ffn)(x), atol=1e-6)
