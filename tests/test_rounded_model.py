"""A model with matrices of 8 bits computes what their values give, and decodes with the 8 bits as they are."""

import copy
import re

import pytest
import torch
from test_decode_cpu import TOKENS, TOLERANCE, logits_of, model_of
from test_decode_gpu import error_of, random_parts
from transformers import AutoConfig, AutoModelForCausalLM

import apc
from apc.ops.ffn_arguments import FFNWeights
from apc.ops.rounded import rounded_ffn, rounded_rows
from apc.ops.rounded_weight import FIXED, RoundedWeight, is_rounded
from apc.sparse.decode import GreedyDecoder
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError


def plain_copy(model):
    """The same model with plain weights of the same values."""
    other = model_of(model.config.model_type, model.dtype, tie_word_embeddings=model.config.tie_word_embeddings)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.data = ours.unrounded().contiguous() if isinstance(ours, RoundedWeight) else ours.detach().clone()
    return other


def matrices(model):
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("R, n", [(7, 96), (130, 45), (3, 33)])
def test_rows_give_their_values(dtype, R, n):
    matrix = torch.randn(R, n).to(dtype)
    rows = rounded_rows(matrix)
    values, scales = rows.unrounded(torch.float32), matrix.float().abs().amax(1, keepdim=True) / 127
    assert ((values - matrix.float()).abs() <= scales * 0.5001).all()
    assert (values / scales).sub((values / scales).round()).abs().max() < 1e-4
    assert rows.unrounded(dtype).equal(values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_down_have_factors_of_their_own(dtype):
    """A few large columns do not widen the steps of the others."""
    gate, up, down = (torch.randn(20, 77) for _ in range(3))
    down[:, ::9] *= 1000
    weights = FFNWeights(*(each.to(dtype) for each in (gate, up, down)))
    rows = rounded_ffn(weights).down
    small = torch.arange(77) % 9 > 0
    error = lambda values: (
        (values - weights.down.float())[:, small].norm() / weights.down[:, small].float().norm()
    ).item()
    assert error(rows.unrounded(torch.float32)) < 0.02 and rows.clone().unrounded(dtype).equal(rows.unrounded(dtype))
    assert error(rounded_rows(weights.down).unrounded(torch.float32)) > 0.5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_step_equals_the_models_own(kind, dtype):
    model = apc.round_weights(model_of(kind, dtype))
    plain, own = GreedyDecoder(plain_copy(model), 1, 16, mode=None), GreedyDecoder(model, 1, 16)
    expected = logits_of(plain)
    assert error_of(logits_of(own), expected) < TOLERANCE[dtype] and own.reason is None
    assert logits_of(GreedyDecoder(model, 1, 16, bits=8)).equal(logits_of(own))


def test_a_forward_pass_has_the_rounded_values():
    model = apc.round_weights(model_of(dtype=torch.bfloat16))
    tokens = TOKENS.expand(2, -1)
    assert model(tokens).logits.equal(plain_copy(model)(tokens).logits)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert model.generate(TOKENS, **options).equal(plain_copy(model).generate(TOKENS, **options))


def test_weights_are_stored_once():
    model = model_of(dtype=torch.bfloat16)
    before = {id(weight): weight.numel() for weight in matrices(model)}
    assert apc.round_weights(model) is model and apc.round_weights(model) is model
    weights = matrices(model)
    assert len(weights) == len(before) and all(isinstance(weight, RoundedWeight) for weight in weights)
    held = sum(weight.rows.values.numel() * weight.rows.values.itemsize for weight in weights)
    assert held == sum(before.values())  # a byte each
    decoder = GreedyDecoder(model, 1, 16)
    decoder.prefill(TOKENS)
    layer = decoder._own._step._weights.layers[1]
    own = model.model.layers[1]
    assert layer.attention.projections[0] is own.self_attn.q_proj.weight.rows
    assert layer.ffn.weights.down is own.mlp.down_proj.weight.rows


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_head_that_is_the_embedding_is_stored_once(dtype):
    model = apc.round_weights(model_of(dtype=dtype, tie_word_embeddings=True))
    embedding = model.model.embed_tokens
    assert model.lm_head.weight is embedding.weight and isinstance(embedding.weight, RoundedWeight)
    plain, own = GreedyDecoder(plain_copy(model), 1, 16, mode=None), GreedyDecoder(model, 1, 16)
    assert error_of(logits_of(own), logits_of(plain)) < TOLERANCE[dtype] and own.reason is None
    weights = own._own._step._weights
    assert weights.head.values.data_ptr() == weights.embedding.rows.values.data_ptr()
    tokens = torch.tensor([[3, 60], [0, 3]])
    assert embedding(tokens).equal(embedding.weight.unrounded()[tokens])
    for outside in (-1, 61):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]))
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_an_embedding_that_is_not_the_head_stays():
    model = apc.round_weights(model_of())
    assert not isinstance(model.model.embed_tokens.weight, RoundedWeight)


@pytest.mark.parametrize("policy", ["predicted", "static", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_ffns(policy, dtype):
    """Alone and in a step, as those of a model with plain weights."""
    model, kernel = apc.round_weights(model_of(dtype=dtype)), "numba" if policy == "predicted" else "torch"
    plain = plain_copy(model)
    parts = random_parts(model, decided=True)
    for each in (model, plain):
        apc.sparsify(each, *parts, policy, kernel=kernel if policy != "exact" else None, max_sparse_tokens=3)
    decoders = (
        GreedyDecoder(model, 1, 16),
        GreedyDecoder(model, 1, 16, mode=None),
        GreedyDecoder(plain, 1, 16, mode=None),
    )
    own, module, expected = map(logits_of, decoders)
    assert error_of(own, expected) < TOLERANCE[dtype] and error_of(module, expected) < TOLERANCE[dtype]
    assert decoders[0].reason is None or policy == "exact"
    if policy == "predicted":  # a decoder adds no copy of the predictor
        layer, ffn = decoders[0]._own._step._weights.layers[1], handle_of(model)._sparse[1]
        assert isinstance(ffn.predictor.expand, RoundedWeight)
        assert layer.ffn.predictor.reduce is ffn.predictor.reduce and layer.ffn.predictor.expand is ffn.predictor.expand
    apc.restore(model)
    assert is_rounded(model) and error_of(model(TOKENS).logits, plain_copy(model)(TOKENS).logits) < 1e-6


def test_copies_and_changes():
    model = apc.round_weights(model_of())
    decoder = GreedyDecoder(model, 1, 16)
    before = logits_of(decoder)
    other = copy.deepcopy(model)
    assert logits_of(GreedyDecoder(other, 1, 16)).equal(before)
    projection = model.model.layers[0].self_attn.q_proj
    doubled, converted, emptied = (
        lambda: projection.weight.mul_(2),
        lambda: other.to(torch.float64),
        lambda: other.to_empty(device="cpu"),
    )
    for change in (doubled, converted, emptied, other.half):
        with pytest.raises(TypeError, match=FIXED):
            change()
    assert {weight.dtype for weight in other.parameters()} == {torch.float32}  # nothing was converted before the error
    assert other.to(torch.float32) is other
    assert model.to(torch.float32).to("cpu") is model and logits_of(decoder).equal(before)
    projection.weight = other.model.layers[1].self_attn.q_proj.weight
    assert not logits_of(decoder).equal(before)  # the decoder notices new weights
    assert repr(projection.weight) == "RoundedWeight([128, 72], torch.float32, stored at 8 bits)"


def test_a_rounded_model_is_not_saved(tmp_path):
    model = apc.round_weights(model_of())
    with pytest.raises(UserError, match="^a model whose matrices are stored at 8 bits can't be saved; save it before"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(
        UserError, match="^quantise_ffns: the model's matrices are stored at 8 bits already; load the mo"
    ):
        apc.quantise_ffns(model, 4, 9)


def test_sparse_ffns_refuse_weights_of_another_form():
    model = apc.round_weights(model_of())
    apc.sparsify(model, *random_parts(model), "predicted", kernel="numba", max_sparse_tokens=3)
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.unrounded())
    with pytest.raises(UserError, match="stored at 8 bits now and were not at sparsify, .*; call apc.sparsify again$"):
        model(TOKENS[:, :1])


def model_with_biases():
    return model_of(mlp_bias=True)


def other_model():
    sizes = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=61)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))


def sparse_model():
    model = model_of()
    return apc.sparsify(model, *random_parts(model), "static", kernel="torch")


@pytest.mark.parametrize(
    "make, problem",
    [
        (other_model, "GPT2LMHeadModel: round_weights: our kernels decode LlamaForCausalLM, .*; choose one of these"),
        (
            model_with_biases,
            "LlamaForCausalLM: round_weights: .*: its projections have biases, which no kernel supports",
        ),
        (sparse_model, r"LlamaForCausalLM: round_weights: it has sparse FFNs already; call apc.restore\(model\) first"),
        (lambda: apc.quantise_ffns(model_of(), 4, 9), ".*: its FFN is rounded to 4 bits already; load the model anew"),
    ],
)
def test_models_that_are_refused(make, problem):
    model = make()
    with pytest.raises(UserError) as caught:
        apc.round_weights(model)
    assert re.fullmatch(problem, str(caught.value)) and not is_rounded(model)
