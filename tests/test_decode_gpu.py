"""A decoding step by the kernels for a GPU equals the model's own; a model that they can't compute keeps its own."""

import pytest
import torch
from test_decode_cpu import TOLERANCE, model_of

import apc
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.ops import decode_gpu
from apc.ops.decode_gpu import StepGPU
from apc.ops.decoder_weights import Unsupported
from apc.ops.nvrtc import compile_program
from apc.ops.products_sm80 import Sizes
from apc.ops.sparse_ffn import act
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.decode import GreedyDecoder
from apc.sparse.model_step import ModelStepGPU, NotSupported
from apc.sparse.sparsify import handle_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # on the CPU by Triton's interpreter
TOKENS = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after the other."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(decode_gpu, "_PROGRAMS", 2)
        monkeypatch.setattr(decode_gpu, "_SHARES", 2)


def steps_of(model, device, steps=4):
    """The logits of steps after a text by the kernels and by the model, float32 [steps, 1, V] each."""
    model, tokens = model.to(device), TOKENS.to(device)
    plain, other = (GreedyDecoder(model, 1, 16, mode=None) for _ in range(2))
    for decoder in (plain, other):
        decoder.prefill(tokens)
    step, logits, expected = ModelStepGPU(model, other.cache), [], []
    for token in range(steps):
        plain.token.fill_(token)
        expected.append(plain.step().float())
        logits.append(step(torch.full((1, 1), token, device=device)).float())
    lengths = [int(layer.cumulative_length) for layer in other.cache.layers]
    assert set(lengths) == {tokens.shape[1] + steps}
    return torch.stack(logits), torch.stack(expected)


def random_parts(model, K=6, lookahead=0, corrects=False, decided=False):
    """A codebook of random masks, and a predictor of its clusters.

    decided: whether each layer always predicts the same cluster, so that rounding can't change it.
    """
    E, D, L = model.config.hidden_size, model.config.intermediate_size, model.config.num_hidden_layers
    masks = ops.pack(torch.rand(L * K, D) < 0.5).view(L, K, -1)
    profiles = torch.ones((), dtype=torch.float16).expand(L, K, D)
    book = SiteCodebook(
        masks, profiles, torch.ones(L, K, dtype=torch.int64), ops.pack(torch.ones(L, D) > 0), torch.zeros(L)
    )
    codebook = Codebook({"neuron": book}, {"neuron": D}, L, E, D, "layer", "energy", 0.5, "top", 0.5)
    predictor = Predictor(PredictorHeader(L, E, 8, {"neuron": K}, lookahead=lookahead, corrects=corrects))
    predictor = predictor.requires_grad_(False).eval()
    if decided:
        predictor.expand_bias["neuron"].copy_(100 * torch.nn.functional.one_hot(torch.randint(K, (L,)), K))
    return codebook, predictor.rounded()


def error_of(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


def check_recorded(decoder, plain, tokens=TOKENS):
    """A decoder records a step in bfloat16 and gives the logits of another."""
    decoder.record(tokens)
    logits = []
    for each in (decoder, plain):
        each.prefill(tokens)
        steps = []
        for token in range(4):
            each.token.fill_(token)
            steps.append(each.step().float().clone())
        logits.append(torch.stack(steps))
    assert decoder.reason is None and decoder._graph is not None
    assert error_of(*logits) < 3 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_step_equals_the_models_own(device, kind, dtype):
    """Qwen2 has biases, Qwen3 norms of the heads; E, D and V are no powers of two."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies matrices of bfloat16 numbers as if they were integers")
    model = model_of(kind, dtype, num_attention_heads=6, head_dim=16)
    assert error_of(*steps_of(model, device)) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 4}, {"attention_bias": True}, {"hidden_act": "gelu_pytorch_tanh"}]
)
def test_other_heads_biases_and_activations(device, changes):
    assert error_of(*steps_of(model_of(**changes), device)) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("long", [512, 4096])
def test_a_long_text(monkeypatch, device, long):
    """More keys than a program reads at a time, in a cache that is longer still; also with a long one's shares."""
    monkeypatch.setattr(decode_gpu, "_LONG", long)
    model = model_of(max_position_embeddings=2048).to(device)
    tokens = torch.randint(61, (1, 700 if device == "cuda" else 90), device=device)
    plain, other = (GreedyDecoder(model, 1, 1000, mode=None) for _ in range(2))
    for decoder in (plain, other):
        decoder.prefill(tokens)
    assert error_of(ModelStepGPU(model, other.cache)(plain.token), plain.step()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["predicted", "static"])
def test_sparse_ffns_within_a_step(device, policy):
    model = model_of().to(device)
    apc.sparsify(model, *random_parts(model), policy, kernel="torch", max_sparse_tokens=3)
    assert error_of(*steps_of(model, device)) < 1e-5


@pytest.mark.parametrize("known", [True, False])
def test_a_prefill_keeps_the_graph_of_a_model_that_stays(known):
    """A stand-in for the graph, on the CPU."""
    model = model_of() if known else model_of("phi3", pad_token_id=0)
    apc.sparsify(model, *random_parts(model), "static", kernel="torch", max_sparse_tokens=1)
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    assert (decoder.reason is None) == known
    decoder._graph = graph = object()
    decoder.prefill(TOKENS)
    handle_of(model).max_sparse_tokens = float("inf")  # a step of one token stays the same
    decoder.prefill(TOKENS)
    assert decoder._graph is graph
    handle_of(model).max_sparse_tokens = 0
    decoder.prefill(TOKENS)
    assert (decoder._graph is None) == known  # without our kernels nothing is known of the graph


@pytest.mark.gpu
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_decoder_records_sparse_ffns(lookahead):
    """With kernels, and lists of active neurons that are made beside attention."""
    model = model_of(dtype=torch.bfloat16, hidden_size=128, intermediate_size=300, num_hidden_layers=4).to("cuda")
    parts = random_parts(model, lookahead=lookahead, decided=True)
    apc.sparsify(model, *parts, "predicted", kernel="triton", max_sparse_tokens=1)
    decoder, plain = GreedyDecoder(model, 1, 16), GreedyDecoder(model, 1, 16, mode=None)
    check_recorded(decoder, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("policy, lookahead", [("predicted", 0), ("predicted", 1), ("static", 0)])
def test_the_decoder_records_several_sequences(n, policy, lookahead):
    model = model_of(dtype=torch.bfloat16, hidden_size=128, intermediate_size=304, num_hidden_layers=4).to("cuda")
    parts = random_parts(model, lookahead=lookahead, decided=True)
    apc.sparsify(model, *parts, policy, kernel="triton", max_sparse_tokens=n)
    decoder, plain = GreedyDecoder(model, n, 16), GreedyDecoder(model, n, 16, mode=None)
    tokens = torch.randint(61, (n, 7), generator=torch.Generator().manual_seed(4))
    check_recorded(decoder, plain, tokens)
    check_recorded(decoder, plain, tokens[:, :4])  # at another position


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "dtype", "reason"), [(2, torch.float32, "need a GPU and 16 bits"), (5, torch.bfloat16, "take up to 4")]
)
def test_batches_that_the_kernels_do_not_take(n, dtype, reason):
    decoder = GreedyDecoder(model_of(dtype=dtype).to("cuda"), n, 16)
    decoder.prefill(TOKENS.repeat(n, 1))
    assert reason in decoder.reason


@pytest.mark.gpu
def test_4_bits_are_for_one_sequence():
    decoder = GreedyDecoder(model_of(dtype=torch.bfloat16).to("cuda"), 2, 16, bits=4)
    with pytest.raises(apc.UserError, match="steps at 4 bits take one sequence"):
        decoder.prefill(TOKENS.repeat(2, 1))


@pytest.mark.gpu
def test_the_decoder_records_the_kernels():
    model = model_of("qwen3", torch.bfloat16).to("cuda")
    tokens = TOKENS.to("cuda")
    decoder, plain = GreedyDecoder(model, 1, 16), GreedyDecoder(model, 1, 16, mode=None)
    decoder.record(tokens)
    assert decoder.reason is None and decoder._graph is not None
    for _ in range(2):
        logits = []
        for each in (decoder, plain):
            each.prefill(tokens)
            each.token.fill_(5)
            logits.append(each.step().float().clone())
        assert error_of(*logits) < TOLERANCE[torch.bfloat16]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight * 0.5)
    decoder.prefill(tokens)
    assert decoder._graph is None and decoder.reason is None  # the graph had the old weights


def test_the_check_finds_another_models_logits_and_leaves_the_cache():
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16, mode=None)
    decoder.prefill(TOKENS)
    before = [layer.keys.clone() for layer in decoder.cache.layers]
    step = ModelStepGPU(model, decoder.cache)
    logits = model(TOKENS).logits[:, -1]
    step.check(TOKENS[:1, -1:], 6, logits, 7)
    with pytest.raises(NotSupported, match="the kernel's logits differ from the model's by"):
        step.check(TOKENS[:1, -1:], 6, logits.flip(-1), 7)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(decoder.cache.layers, before, strict=True))
    assert [int(layer.cumulative_length) for layer in decoder.cache.layers] == [7, 7]


def test_what_the_kernels_do_not_take_is_refused():
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16, mode=None)
    decoder.prefill(TOKENS)
    weights = ModelStepGPU(model, decoder.cache).decoder
    first = weights.layers[0]
    attention = first.attention
    many = attention._replace(keys=attention.keys.expand(2, -1, -1, -1).contiguous())
    wide = attention._replace(projections=[torch.zeros(20 * 2 * 32, 72), *attention.projections[1:]])
    for changed, reason in (
        (weights._replace(head=weights.head.half()), "several types"),
        (weights._replace(head=weights.head.T.contiguous().T), "aren't contiguous"),
        (weights._replace(cos=weights.cos[:, :24]), "heads of size 24, 2 to a key head"),
        (weights._replace(layers=[first._replace(attention=wide)]), "heads of size 32, 20 to a key head"),
        (weights._replace(layers=[first._replace(attention=many)]), "several sequences need a GPU and 16 bits"),
    ):
        with pytest.raises(Unsupported, match=reason):
            StepGPU(changed)


def products_by_torch(x, matrices, norm, epsilon, added, bias, residual, activation):
    """A stand-in for `products_sm80.products`."""
    total = x if added is None else x + added
    hidden = total if norm is None else torch.nn.functional.rms_norm(total, x.shape[1:], norm, epsilon)
    outputs = [hidden @ matrix.T for matrix in matrices]
    output = act(outputs[0], activation) * outputs[1] if activation else torch.cat(outputs, 1)
    return output + (0 if bias is None else bias) + (0 if residual is None else residual), total


def several_steps(model, n, policy=None, most=0, length=20, dtype=None):
    """The logits of steps of n sequences by the kernels and by the model, float32 [steps, n, V] each."""
    device = next(model.parameters()).device
    tokens = torch.randint(61, (n, 7), generator=torch.Generator().manual_seed(2)).to(device)
    if policy is not None:
        kernel = "torch" if device.type == "cpu" else "triton"
        apc.sparsify(model, *random_parts(model, decided=True), policy, kernel=kernel, max_sparse_tokens=most)
    plain, other = (GreedyDecoder(model, n, length, mode=None) for _ in range(2))
    for decoder in (plain, other):
        decoder.prefill(tokens)
    step, logits, expected = ModelStepGPU(model, other.cache), [], []
    step.check(tokens[:, -1:], 6, model(tokens).logits[:, -1], tokens.numel())
    for token in range(3):
        plain.token.copy_(torch.arange(n)[:, None] + token)
        expected.append(plain.step().float())
        logits.append(step(plain.token.clone() * 0 + torch.arange(n, device=device)[:, None] + token).float())
    return torch.stack(logits), torch.stack(expected)


@pytest.mark.parametrize("most", [0, 1, 2, None])
def test_steps_of_two_sequences(monkeypatch, most):
    """By a stand-in for the products; dense, with down projections stored by neuron, and sparse."""
    monkeypatch.setattr(decode_gpu.products_sm80, "refusal", lambda *given: None)
    monkeypatch.setattr(decode_gpu.products_sm80, "products", products_by_torch)
    model = model_of("qwen2")
    assert error_of(*several_steps(model, 2, None if most is None else "predicted", most)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("most", [0, 4, None])
def test_steps_of_several_sequences(n, kind, most):
    model = model_of(kind, torch.bfloat16, hidden_size=128, intermediate_size=296).to("cuda")
    error = error_of(*several_steps(model, n, None if most is None else "predicted", most))
    assert error < 3 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("E", [72, 576, 4096, 14336])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_products_with_several_vectors(n, E, dtype):
    """Against the formula, with every argument and with none; NaN stays in its vector."""
    draw = lambda *size: torch.randn(*size, device="cuda").to(dtype)
    matrices, x, norm = [draw(rows, E) * E**-0.5 for rows in (45, 19, 2100)], draw(n, E), draw(E)
    added, bias, residual = draw(n, E), torch.randn(2164, device="cuda"), draw(n, 2164)
    refusal = decode_gpu.products_sm80.refusal(n, matrices)
    assert refusal is None or f"no room for {n} vectors of 14336" in refusal
    if refusal is not None:
        pytest.skip(refusal)
    for given in (
        (norm, 1e-5, added, bias, residual, ""),
        (None, 0.0, None, None, None, ""),
        (norm, 1e-5, None, None, None, "silu"),
    ):
        used = [matrices[2], matrices[2].flip(0).contiguous()] if given[-1] else matrices
        output, total = decode_gpu.products_sm80.products(x, used, *given)
        floats = [None if each is None else each.float() if isinstance(each, torch.Tensor) else each for each in given]
        expected, sums = products_by_torch(x.float(), [each.float() for each in used], *floats)
        assert error_of(output.float(), expected) < 2 * TOLERANCE[dtype]
        assert torch.equal(total, sums.to(dtype))
    x[n - 1, 5] = torch.nan
    output, _ = decode_gpu.products_sm80.products(x, matrices, norm, 1e-5, None, None, None, "")
    assert output[n - 1].isnan().all() and not output[: n - 1].isnan().any()


def test_the_kernel_for_several_vectors_compiles():
    sizes = Sizes(4, 4096, "silu", torch.bfloat16, "sm_90a", 227 * 1024)
    assert sizes.batches == (4, 2) and sizes._replace(E=14336).batches == (3, 2)
    assert sizes._replace(n=1).batches == (4, 3) and sizes._replace(room=99 * 1024).batches == (2, 0)
    for each in (sizes, Sizes(1, 72, "", torch.float16, "sm_80", 163 * 1024)):
        assert each.shared < each.room and b"products" in compile_program(each.program())


def test_own_false_keeps_the_models_step():
    decoder = GreedyDecoder(model_of(), 1, 16, own=False)
    decoder.prefill(TOKENS)
    assert decoder.reason == "own=False" and decoder._own is None
    decoder.step()
