"""Attention of transformers' models in float32 on a GPU."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "apc-sdpa"
_NO_GROUPS = nn.Module()  # with it, transformers neither repeats key heads nor passes grouped ones


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others
) -> tuple[Tensor, None]:
    """Attention as in transformers' `sdpa`, whose key heads are repeated first in float32.

    On a GPU torch's fused kernel for float32 needs as many key heads as query heads. Without it torch writes out all
    scores, which takes four times as long with 2,048 tokens.

    query: [B, heads, n, d]; key, value: [B, key heads, S, d]; attention_mask: [B, 1, n, S], bool or added to the
    scores, or None. Returns [B, n, heads, d] and None, as transformers expects.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or query.shape[2] == 1 or query.dtype != torch.float32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    others.setdefault("is_causal", getattr(module, "is_causal", True))
    return sdpa_attention_forward(_NO_GROUPS, query, key, value, attention_mask, **others)


def use_sdpa(model: PreTrainedModel) -> None:
    """Makes a model that uses transformers' `sdpa` use this one."""
    AttentionInterface.register(NAME, sdpa)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME
