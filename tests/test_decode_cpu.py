"""A decoding step by the CPU's kernel equals the model's own, and a model that it can't compute keeps its own step."""

import copy
import math
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import apc
import tiny
import train
from apc import ops
from apc.config.load import load_config
from apc.ops._program import Program
from apc.ops.cluster_ffn_cpu import ClusterCall, ClusterFFN
from apc.ops.rounded import rounded_rows
from apc.ops.rounded_weight import RoundedWeight
from apc.predict.predictor import at_16_bits
from apc.sparse import layer_ffn
from apc.sparse.decode import GreedyDecoder
from apc.sparse.model_step import ModelStepCPU, NotSupported
from apc.utils.errors import UserError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
TOKENS = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(1))


def model_of(kind="llama", dtype=torch.float32, **changes):
    """A model of two layers with random weights, norms and biases."""
    settings = dict(
        vocab_size=61, hidden_size=72, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, pad_token_id=0, sliding_window=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | changes)).eval()
    for name, weight in model.named_parameters():
        shift = 1.0 if "norm" in name else 0.0
        weight.data = shift + 0.2 * torch.randn(weight.shape, generator=generator)
    return model.to(dtype)


def logits_of(decoder, tokens=TOKENS, steps=5):
    """The logits of the steps after a text, with given tokens, float32 [steps, V]."""
    decoder.prefill(tokens)
    logits = []
    for token in range(steps):
        decoder.token.fill_(token)
        logits.append(decoder.step()[0].float().clone())
    return torch.stack(logits)


def agree(model, tolerance, bits=None):
    fast, plain = GreedyDecoder(model, 1, 16, bits=bits), GreedyDecoder(model, 1, 16, mode=None)
    expected = logits_of(plain)
    assert ((logits_of(fast) - expected).norm() / expected.norm()).item() < tolerance
    return fast


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_step_equals_the_models_own(kind, dtype):
    """Qwen2 has biases, Qwen3 norms of the heads; E, D and V are no multiples of what the kernel reads at once."""
    decoder = agree(model_of(kind, dtype), TOLERANCE[dtype])
    assert decoder.reason is None


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"num_key_value_heads": 4, "head_dim": 64},
        *({"num_attention_heads": 2 * group, "hidden_size": 240} for group in (3, 5, 8)),
    ],
)
def test_other_heads_and_all_biases(changes):
    """Query heads of a key head are computed by 4, 3, 2 or one by one."""
    assert agree(model_of(**changes), 1e-5).reason is None


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations(activation):
    assert agree(model_of(hidden_act=activation), 1e-5).reason is None


def at_8_bits(model):
    """The model with matrices of values that rounding to 8 bits keeps."""
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data = rounded_rows(linear.weight.data).unrounded(linear.weight.dtype)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_at_8_bits(kind, dtype):
    decoder = agree(at_8_bits(model_of(kind, dtype)), 1.5 * TOLERANCE[dtype], bits=8)
    assert decoder.reason is None


def test_rounding_to_8_bits_changes_little():
    model = model_of()
    exact, rounded = (logits_of(GreedyDecoder(model, 1, 16, bits=bits)) for bits in (None, 8))
    assert 1e-4 < ((rounded - exact).norm() / exact.norm()).item() < 0.05


def test_8_bits_without_the_kernel_are_refused():
    with pytest.raises(ValueError, match="bits=3: choose None, 8 on the CPU or 4 on a GPU"):
        GreedyDecoder(model_of(), 1, 16, bits=3)
    for decoder, reason in (
        (GreedyDecoder(model_of(head_dim=16), 1, 16, bits=8), "heads of size 16"),
        (GreedyDecoder(model_of(), 1, 16, mode=None, bits=8), "mode=None"),
    ):
        with pytest.raises(UserError, match=f"^bits=8: {reason}.*; leave bits out"):
            decoder.prefill(TOKENS)


def test_it_decodes_as_generate_does():
    model = model_of()
    expected = model.generate(TOKENS, max_new_tokens=9, do_sample=False, eos_token_id=None)[:, TOKENS.shape[1] :]
    decoder = GreedyDecoder(model, 1, 16)
    for _ in range(2):  # a second text takes the place of the first
        assert torch.equal(decoder.decode(TOKENS, 9), expected)
    assert decoder.reason is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_repeat_their_bits(threads):
    """Also more threads than cores."""
    model, before = model_of(), torch.get_num_threads()
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    step = ModelStepCPU(model, decoder.cache)._step
    steps = lambda: torch.cat([step(token, TOKENS.shape[1] + token).clone() for token in range(5)])
    expected = steps()
    torch.set_num_threads(threads)
    try:
        first = steps()
        assert torch.equal(steps(), first)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(first, expected)


def test_nan_reaches_the_logits():
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = math.nan
    assert decoder.step().isnan().all()


def test_changed_weights_are_followed():
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(1.5)  # in place
        layer.self_attn.q_proj.weight = torch.nn.Parameter(layer.self_attn.q_proj.weight * 0.5)  # elsewhere in memory
    plain = GreedyDecoder(model, 1, 16, mode=None)
    plain.cache, plain._cached = decoder.cache, decoder._cached
    before = decoder.token.clone()
    fast = decoder.step().clone()
    plain.token.copy_(before)
    for layer_cache in plain.cache.layers:
        layer_cache.cumulative_length.fill_(plain._cached)
    torch.testing.assert_close(plain.step(), fast)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("decode-cpu"))
    tiny.save_model(folder / "model", head_dim=32)
    return folder


@pytest.fixture(scope="module")
def run_of(workplace):
    """A function that returns the run of a predictor's form, which it trains once."""
    trained = {}

    def run(form, name=None, **settings):
        name = name or form
        words = tiny.tiny_overrides(workplace, **{"run.name": name, "predictor.form": form}, **settings)
        if name not in trained:
            train.train(load_config(None, words))
        assert trained.setdefault(name, words) == words
        return apc.load_run(workplace / "runs" / name)

    return run


def test_a_model_in_stages(workplace, run_of):
    """The step runs the stages' kernel, also after the model went dense and sparse again."""
    run = run_of("low-bit", policies="[staged-neuron]", bytes=0.6, **{"predictor.inputs": 0.5})
    model = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    decoders = {mode: GreedyDecoder(model, 1, 16, mode=mode) for mode in ("default", None)}
    dense = logits_of(decoders["default"])
    for _ in range(2):
        apc.sparsify(model, run.codebook, run.predictor, "staged-neuron", kernel="numba", max_sparse_tokens=1)
        fast, plain = (logits_of(decoder) for decoder in decoders.values())
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fast, dense)
        apc.restore(model)
        torch.testing.assert_close(logits_of(decoders["default"]), dense)
    assert decoders["default"].reason is None


@pytest.mark.parametrize("projections", ["[gate,up]", "[gate]"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_model_of_low_bit_masks(workplace, run_of, monkeypatch, projections, changed):
    """Scores above a threshold are the first of the stages, and the others keep all; also with a correction."""
    run = run_of("low-bit", name=f"flat-{projections[1:-1]}", **{"predictor.low_bit_projections": projections})
    predictor, generator = run.predictor.copy(corrects=changed), torch.Generator().manual_seed(3)
    predictor.thresholds = run.predictor.thresholds
    if changed:
        with torch.no_grad():
            for value in (predictor.correct, predictor.correct_bias):
                value.normal_(std=0.3, generator=generator)
    model = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    dense = logits_of(GreedyDecoder(model, 1, 16))
    predictor = predictor.requires_grad_(False).eval().rounded()
    apc.sparsify(model, run.codebook, predictor, "neuron-threshold", kernel="numba", max_sparse_tokens=1)
    fast, plain = (GreedyDecoder(model, 1, 16, mode=mode) for mode in ("default", None))
    expected = logits_of(plain)
    fast.prefill(TOKENS)
    monkeypatch.setattr(layer_ffn.ByLowBitCopy, "__call__", None)  # so no step calls it from Python
    torch.testing.assert_close(logits_of(fast), expected, rtol=1e-4, atol=1e-4)
    assert fast.reason is None and not torch.allclose(expected, dense, atol=1e-2)


@pytest.mark.parametrize(("form", "policy"), [("low-bit", "staged-neuron"), ("cluster", "predicted")])
def test_a_sparse_model_at_8_bits(workplace, run_of, form, policy):
    """Stored at 8 bits, or with these beside its weights, which prefill uses."""
    settings = dict(policies="[staged-neuron]", bytes=0.6, **{"predictor.inputs": 0.5}) if form == "low-bit" else {}
    run = run_of(form, **settings)
    given = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    stored, plain = (apc.round_weights(copy.deepcopy(given)) for _ in range(2))
    for module in plain.modules():
        if isinstance(getattr(module, "weight", None), RoundedWeight):
            module.weight = torch.nn.Parameter(module.weight.unrounded().contiguous())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other weights than the run's
        for model in (given, stored, plain):
            apc.sparsify(model, run.codebook, run.predictor, policy, kernel="numba", max_sparse_tokens=1)
    expected, exact = (logits_of(GreedyDecoder(model, 1, 16, mode=None)) for model in (plain, given))
    for model, bits, tolerance in ((stored, None, 1e-4), (given, 8, 0.03)):
        decoder = GreedyDecoder(model, 1, 16, bits=bits)
        assert ((logits_of(decoder) - expected).norm() / expected.norm()).item() < tolerance
        assert decoder.reason is None
    module = logits_of(GreedyDecoder(stored, 1, 16, mode=None))
    assert ((module - expected).norm() / expected.norm()).item() < 1e-4
    assert not torch.allclose(expected, exact, rtol=1e-4, atol=1e-4)


def test_a_sparse_model_that_runs_dense(workplace, run_of):
    """If sparse calls were never faster, a step reads all neurons; changed weights are followed."""
    run = run_of("cluster")
    model = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    apc.sparsify(model, run.codebook, run.predictor, "predicted", kernel="numba", max_sparse_tokens=0)
    assert agree(model, 1e-5).reason is None
    apc.sparsify(model, run.codebook, run.predictor, "predicted", kernel="numba", max_sparse_tokens=1)
    fast, plain = (GreedyDecoder(model, 1, 16, mode=mode) for mode in ("default", None))
    logits_of(fast)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = torch.nn.Parameter(3 * mlp.up_proj.weight.detach())
    torch.testing.assert_close(logits_of(fast), logits_of(plain), rtol=1e-4, atol=1e-4)


def test_a_mask_of_no_neuron_adds_nothing():
    """Also after a call whose mask kept some."""
    randn = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    weights = ops.FFNWeights(*(randn(45, 72) for _ in range(3)))
    heads = ops.PredictorWeights(randn(8, 72), torch.zeros(8), torch.zeros(2, 8), torch.tensor([1.0, 0.0]))
    masks, hidden = ops.pack(torch.tensor([[True], [False]]).expand(2, 45)), randn(1, 72)
    x, residual, program = torch.cat([hidden[0], torch.zeros(24)]), torch.zeros(96), Program()
    call = ClusterCall(ClusterFFN(weights, heads, masks), torch.float32)
    call.decide(program, hidden)
    call.compute(program, x, residual)
    call.prepare(2)
    program.run(2)
    expected = residual.clone()
    assert expected[:72].abs().min() > 0
    heads.expand_bias[1] = 2.0  # now the cluster of no neuron
    program.run(2)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("changed", [False, True])
def test_a_model_of_clusters(workplace, run_of, lookahead, changed):
    """The step predicts the clusters itself; as after tuning there can be corrections and offsets."""
    run = run_of("cluster", name=f"ahead-{lookahead}", **{"predictor.lookahead": lookahead})
    codebook, predictor, generator = run.codebook, run.predictor, torch.Generator().manual_seed(3)
    if changed:
        predictor = predictor.copy(corrects=True)
        with torch.no_grad():
            for value in (predictor.correct, predictor.correct_bias):
                value.normal_(std=0.3, generator=generator)
        book = codebook.sites["neuron"]
        size = (*book.profiles.shape[:2], codebook.hidden_size)
        book.offsets = at_16_bits(torch.randn(size, generator=generator))
    predictor = predictor.requires_grad_(False).eval().rounded()
    model = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    dense = logits_of(GreedyDecoder(model, 1, 16))
    apc.sparsify(model, codebook, predictor, "predicted", kernel="numba", max_sparse_tokens=1)
    fast, plain = (GreedyDecoder(model, 1, 16, mode=mode) for mode in ("default", None))
    expected = logits_of(plain)
    torch.testing.assert_close(logits_of(fast), expected, rtol=1e-4, atol=1e-4)
    assert fast.reason is None and not torch.allclose(expected, dense, atol=1e-2)


@pytest.mark.parametrize(("policy", "kernel"), [("soft", "numba"), ("predicted", "torch"), ("predicted", None)])
def test_other_sparse_ffns_are_called(workplace, run_of, policy, kernel):
    """Masks that a policy decides in Python, and masks without a kernel: the step calls the FFN's module."""
    run = run_of("cluster")
    model = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    apc.sparsify(model, run.codebook, run.predictor, policy, kernel=kernel)
    fast, plain = (GreedyDecoder(model, 1, 16, mode=mode) for mode in ("default", None))
    torch.testing.assert_close(logits_of(fast), logits_of(plain), rtol=1e-4, atol=1e-4)
    assert fast.reason is None


REFUSED = [
    (lambda: model_of(head_dim=16), "heads of size 16, which is not a multiple of 32"),
    (lambda: model_of("gemma3_text", sliding_window=8), "the kernel knows LlamaForCausalLM, MistralForCausalLM, "),
    (lambda: model_of("mistral", sliding_window=8), "the cache has a StaticSlidingWindowLayer"),
    (lambda: model_of(dtype=torch.float64), "LlamaForCausalLM: model.layers.0.mlp holds a Linear of torch.float64"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_another_model_keeps_its_own_step(make, reason):
    decoder = agree(make(), 1e-6)
    assert decoder.reason.startswith(reason)


def replace_forward(module):
    own = module.forward
    module.forward = lambda *given: 2 * own(*given)


CHANGES = {
    "the model has forward hooks": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "the model is in training mode": lambda model: model.train(),
    "the head is not": lambda model: setattr(model, "lm_head", torch.nn.Linear(72, 61)),
    "a module's forward is replaced": lambda model: replace_forward(model.model.layers[0].self_attn.k_proj),
    "the kernel's logits differ from": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0),
    "weights that are not in the CPU's memory": lambda model: setattr(model.model, "norm", model.model.norm.to("meta")),
}


@pytest.mark.parametrize("reason", [*CHANGES][:-1])
def test_a_changed_model_keeps_its_own_step(reason):
    """The first text too: a refused check leaves no trace in the cache."""
    model = model_of()
    CHANGES[reason](model)
    assert agree(model, 1e-6).reason.startswith(reason)


def test_weights_elsewhere_are_refused():
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    CHANGES[[*CHANGES][-1]](model)
    with pytest.raises(NotSupported, match=[*CHANGES][-1]):
        ModelStepCPU(model, decoder.cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _module, _given, out: 2 * out),
        lambda model: replace_forward(model.model.layers[0].mlp.gate_proj),
    ],
)
def test_a_changed_ffn_is_called(change):
    model = model_of()
    change(model)
    assert agree(model, 1e-5).reason is None


@pytest.mark.parametrize("bits", [None, 8])
def test_changes_between_texts_are_followed(bits):
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16, bits=bits)
    logits_of(decoder)
    with torch.no_grad():
        for parameter in model.model.layers[0].self_attn.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(logits_of(decoder), logits_of(GreedyDecoder(model, 1, 16, bits=bits)))
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    if bits is None:
        decoder.prefill(TOKENS)
        assert decoder.reason == "the model has forward hooks"
        hook.remove()
        decoder.prefill(TOKENS)
        assert decoder.reason is None
    else:
        with pytest.raises(UserError, match="^bits=8: the model has forward hooks; leave bits out"):
            decoder.step()


def test_the_cache_can_go_on_with_torchs_step():
    model = model_of()
    decoder, plain = GreedyDecoder(model, 1, 16), GreedyDecoder(model, 1, 16, mode=None)
    expected = logits_of(plain, steps=4)
    logits_of(decoder, steps=3)
    decoder.token.fill_(3)
    model.model.norm.register_forward_hook(lambda *_: None)  # so the next step is torch's
    torch.testing.assert_close(decoder.step()[0], expected[-1], rtol=1e-4, atol=1e-4)
    assert decoder.reason == "the model has forward hooks"


def test_several_sequences_take_the_models_own_step():
    decoder = GreedyDecoder(model_of(), 2, 16)
    decoder.prefill(TOKENS.expand(2, -1))
    assert decoder.step().shape == (2, 61)
    assert decoder.reason == "the decoder has 2 sequences at once"


@pytest.mark.parametrize(
    ("token", "position", "problem"), [(61, 0, "token 61"), (-1, 0, "token -1"), (0, 16, "position 16")]
)
def test_what_is_out_of_range_is_refused(token, position, problem):
    model = model_of()
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    with pytest.raises(IndexError, match=f"{problem} is not below"):
        ModelStepCPU(model, decoder.cache)._step(token, position)
