"""What users do with a transformers model, done with a sparsified one: each works as with masks, or is one line."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_decode_gpu import random_parts
from transformers import AutoModelForCausalLM

import apc
import tiny
from apc.utils.errors import UserError

TOKENS = torch.randint(100, (2, 7), generator=torch.Generator().manual_seed(3))
KERNELS = [(None, {}), ("numba", {"scoring": True}), ("torch", {"scoring": True})]
every_kernel = pytest.mark.parametrize(("kernel", "options"), KERNELS)


def fresh():
    torch.manual_seed(0)
    return tiny.make_model("llama")


def sparse(kernel=None, options=(), model=None):
    model = fresh() if model is None else model
    torch.manual_seed(1)
    return apc.sparsify(model, *random_parts(fresh()), "predicted", kernel=kernel, **dict(options))


def decoded(model, tokens=TOKENS, count=6, **options):
    """The tokens that follow, int64 [n, count]."""
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(tokens, **options)[:, -count:]


@every_kernel
def test_saving_gives_the_dense_model(tmp_path, kernel, options):
    model = sparse(kernel, options)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in fresh().state_dict().items():
        assert torch.equal(saved.state_dict()[name], value) and torch.equal(model.state_dict()[name], value)


@every_kernel
def test_copies_are_refused(kernel, options):
    model = sparse(kernel, options)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="can't be copied or pickled; call apc.restore.model. first"):
            copied(model)
    assert torch.equal(copy.deepcopy(apc.restore(model))(TOKENS).logits, fresh()(TOKENS).logits)


@every_kernel
def test_beams_samples_and_batches_as_with_masks(kernel, options):
    model, masked = sparse(kernel, options), sparse()
    assert torch.equal(decoded(model, num_beams=3), decoded(masked, num_beams=3))
    for each in (model, masked):
        torch.manual_seed(5)
        each.sampled = decoded(each, do_sample=True, temperature=0.8)
    assert torch.equal(model.sampled, masked.sampled)
    assert not torch.equal(decoded(model, count=12), decoded(fresh(), count=12))


@every_kernel
def test_left_padding_changes_nothing(kernel, options):
    model, padding = sparse(kernel, options), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.cat([padding, torch.ones_like(TOKENS)], 1)
    padded = decoded(model, torch.cat([padding, TOKENS], 1), attention_mask=mask)
    assert torch.equal(padded, decoded(model))
    assert torch.equal(padded[:1], decoded(model, TOKENS[:1]))


@every_kernel
def test_assistants(kernel, options):
    model, one = sparse(kernel, options), TOKENS[:1]
    assert torch.equal(decoded(model, one, assistant_model=fresh()), decoded(model, one))
    assert torch.equal(decoded(fresh(), one, assistant_model=model), decoded(fresh(), one))


@every_kernel
@torch.no_grad()
def test_the_whole_model_is_compiled(kernel, options):
    model = sparse(kernel, options)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(TOKENS[:, :1]).logits, model(TOKENS[:, :1]).logits)


@every_kernel
@torch.no_grad()
def test_adapters_of_peft(kernel, options):
    """Those on attention work on top of a sparse model; those on an FFN are named until they are merged."""

    def adapted(model, *targets):
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False)).eval()

    expected = sparse(kernel, options, adapted(fresh(), "q_proj").merge_and_unload())(TOKENS).logits
    torch.testing.assert_close(adapted(sparse(kernel, options), "q_proj")(TOKENS).logits, expected)
    on_top = sparse(kernel, options, adapted(fresh(), "q_proj"))
    torch.testing.assert_close(on_top(TOKENS).logits, expected)
    with pytest.raises(UserError, match="its up_proj was replaced after sparsify .*; merge adapters into the weights"):
        adapted(sparse(kernel, options), "up_proj")(TOKENS)
    with pytest.raises(UserError, match="its up_proj has an adapter .*; merge adapters first"):
        sparse(kernel, options, adapted(fresh(), "up_proj"))
    merged = adapted(sparse(kernel, options), "up_proj").merge_and_unload()
    again = sparse(None, {}, adapted(fresh(), "up_proj").merge_and_unload())
    torch.testing.assert_close(merged(TOKENS).logits, again(TOKENS).logits, rtol=1e-4, atol=1e-4)
