"""Within `own_steps`, `generate` decodes by our steps where they can be used, and otherwise as without it."""

import pytest
import torch
from test_decode_cpu import model_of
from test_decode_gpu import random_parts

import apc
from apc.sparse.own_steps import OwnSteps

TOKENS = torch.randint(1, 61, (1, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """The passes, each with the reason why it was the model's own."""
    reasons, call = [], OwnSteps.__call__

    def counted(self, *inputs, **named):
        output = call(self, *inputs, **named)
        reasons.append(self.reason)
        return output

    monkeypatch.setattr(OwnSteps, "__call__", counted)
    return reasons


def generate(model, tokens=TOKENS, **options):
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0} | options
    torch.manual_seed(3)
    return model.generate(tokens, **options)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_generate_gives_the_same_tokens(calls, kind):
    """Also with sampling; each pass but the first is a step of one token, and no pass was refused."""
    model = model_of(kind)
    for options in ({}, {"do_sample": True, "top_p": 0.9, "temperature": 2.0}, {"repetition_penalty": 1.5}):
        expected = generate(model, **options)
        calls.clear()
        with apc.own_steps(model) as steps:
            assert generate(model, **options).equal(expected)
        assert calls == [None] * 5 and steps.reason is None
    assert "forward" not in model.__dict__


def test_the_steps_are_ours(monkeypatch):
    """The model's own forward runs for the prompt only."""
    model = model_of()
    with apc.own_steps(model) as steps:
        own, passes = steps._own, []
        steps._own = lambda **named: passes.append(named["input_ids"].shape[1]) or own(**named)
        generate(model)
    assert passes == [7]


def test_logits_stay_when_the_next_step_runs():
    model = model_of()
    result = lambda: generate(model, output_logits=True, return_dict_in_generate=True).logits
    expected = torch.cat(result())
    with apc.own_steps(model):
        logits = torch.cat(result())
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["predicted", "static"])
def test_sparse_models(calls, policy):
    model = model_of()
    apc.sparsify(model, *random_parts(model), policy, kernel="numba", max_sparse_tokens=1)
    expected = generate(model)
    with apc.own_steps(model):
        assert generate(model).equal(expected)
    assert calls == [None] * 5


def test_a_rounded_model(calls):
    model = apc.round_weights(model_of())
    expected = generate(model)
    with apc.own_steps(model):
        assert generate(model).equal(expected)
    assert calls == [None] * 5


def test_new_weights_are_noticed(calls):
    model = model_of()
    with apc.own_steps(model):
        before = generate(model)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        after = generate(model)
    assert after.equal(generate(model)) and not after.equal(before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": None}, "not a StaticCache"),
        ({"tokens": TOKENS.repeat(2, 1)}, "several sequences"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"attention_mask": (TOKENS[0, 0] != TOKENS).long()}, "the attention has a mask"),
    ],
)
def test_what_the_steps_do_not_take_runs_as_without_them(calls, options, reason):
    model = model_of()
    expected = generate(model, **options)
    with apc.own_steps(model) as steps:
        output = generate(model, **options)
    if not isinstance(output, torch.Tensor):
        output, expected = output.sequences, expected.sequences
    assert output.equal(expected) and reason in steps.reason


def test_a_model_that_the_kernels_do_not_know_is_asked_once(monkeypatch):
    from apc.sparse import model_step

    model, made = model_of("phi3", pad_token_id=0), []
    init = model_step.ModelStepCPU.__init__
    monkeypatch.setattr(model_step.ModelStepCPU, "__init__", lambda *given: made.append(1) or init(*given))
    expected = generate(model)
    with apc.own_steps(model) as steps:
        assert generate(model).equal(expected)
    assert "the kernel knows LlamaForCausalLM" in steps.reason and len(made) == 1


def test_it_is_refused_twice_and_taken_out_after_an_error():
    model = model_of()
    with pytest.raises(apc.UserError, match="forward is replaced already"), apc.own_steps(model), apc.own_steps(model):
        pass
    assert "forward" not in model.__dict__
    with apc.own_steps(model):
        generate(model)


@pytest.mark.gpu
def test_it_is_for_the_cpu():
    with pytest.raises(apc.UserError, match="use apc.GreedyDecoder on a GPU"), apc.own_steps(model_of().to("cuda")):
        pass
