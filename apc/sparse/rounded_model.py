"""Stores a model's matrices at 8 bits, once, for decoding on the CPU."""

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apc import ops
from apc.data.ffn import LayerFFN, find_ffns
from apc.data.quantise import stored
from apc.ops.rounded_weight import FIXED, RoundedWeight, is_rounded
from apc.sparse.sparse_ffn import activation_of, layer_ffns
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from apc.ops.rounded import RoundedFFN


@torch.no_grad()
def round_weights(model: nn.Module) -> nn.Module:
    """Rounds a model's matrices to 8 bits and stores only these, in place; returns the model.

    Rounded are attention's projections, the FFNs and the head, with the embedding if that is the head. Each row has a
    scale, its largest size over 127. Down projections have a scale for each neuron and a factor for each output.

    The steps of `GreedyDecoder` read the 8 bits, if our kernels run them. `sparsify` with kernel=numba then stores
    predictors of clusters at 8 bits, too. Everything else, such as prefill, scoring or `generate`, computes the values
    in the model's type in each call, one matrix at a time. Afterwards the model can't be moved, converted to another
    type or saved. Does nothing a second time.

    Raises UserError for a model that is not on the CPU or whose class or FFNs our kernels don't know, that has sparse
    FFNs already, or whose FFNs `quantise_ffns` rounded.
    """
    from apc.ops.rounded import rounded_ffn, rounded_weight  # imports numba
    from apc.sparse.model_step import CLASSES, is_known

    if is_rounded(model):
        return model
    kind, device = type(model).__name__, next(model.parameters()).device
    if device.type != "cpu":
        raise UserError(f"{kind}: round_weights: it is on {device}, 8 bits are for the CPU; move it there first")
    if handle_of(model) is not None:
        raise UserError(f"{kind}: round_weights: it has sparse FFNs already; call apc.restore(model) first")
    if not is_known(model):
        raise UserError(f"{kind}: round_weights: our kernels decode {', '.join(CLASSES)}; choose one of these")
    try:
        ffns = layer_ffns(find_ffns(model))
        activations = [activation_of(ffn) for ffn in ffns]
    except UserError as error:
        raise UserError(f"{kind}: round_weights: {str(error).removesuffix('; use kernel=None')}") from error
    for ffn in ffns:
        if (form := stored(ffn)) is not None:
            raise UserError(
                f"{ffn.name}: round_weights: its FFN is rounded to {form.bits} bits already; load the model anew"
            )
    for ffn, activation in zip(ffns, activations, strict=True):
        _round_ffn(ffn, rounded_ffn(_weights(ffn, activation)))
    whole: Any = model
    body, head = whole.model, whole.lm_head
    linears = [getattr(block.self_attn, f"{name}_proj") for block in body.layers for name in ("q", "k", "v", "o")]
    is_tied = head.weight is body.embed_tokens.weight
    for linear in [*linears, head]:
        _replace(linear, rounded_weight(linear.weight))
    if is_tied:
        body.embed_tokens.weight = head.weight
    model.register_state_dict_pre_hook(_refuse_to_save)
    model.__dict__["_apply"] = MethodType(_apply_unless_changed, model)
    return model


def _refuse_to_save(*_: object) -> None:
    raise UserError("a model whose matrices are stored at 8 bits can't be saved; save it before apc.round_weights")


def _apply_unless_changed(model: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `Module._apply`, which `to` and its like call: that would convert other weights before the error."""
    if any(convert(each) is not each for each in model.parameters() if isinstance(each, RoundedWeight)):
        raise TypeError(FIXED)
    return type(model)._apply(model, convert, recurse)


def _weights(ffn: LayerFFN, activation: str) -> ops.FFNWeights:
    return ops.FFNWeights(ffn.projection("gate"), ffn.projection("up"), ffn.down.weight.T, activation)


def _round_ffn(ffn: LayerFFN, rounded: "RoundedFFN") -> None:
    dtype = ffn.dtype
    assert ffn.gate is not None and ffn.up is not None  # as in all classes that the kernels know
    _replace(ffn.gate, RoundedWeight(rounded.gate, dtype))
    _replace(ffn.up, RoundedWeight(rounded.up, dtype))
    _replace(ffn.down, RoundedWeight(rounded.down, dtype, transposed=True))


def _replace(linear: nn.Module, weight: RoundedWeight) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)
