"""A decoding step on the CPU by `apc.ops.decode_cpu`, for Hugging Face models of Llama's kind."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from apc.data.ffn import find_ffns
from apc.ops import decode_cpu as kernels  # imports numba
from apc.ops._products import RoundedFFN, RoundedRows, Rows, rounded_rows
from apc.sparse.sparse_ffn import SparseFFNs, activation_of, check_call, layer_ffns
from apc.sparse.sparsify import Handle, handle_of
from apc.utils.errors import UserError

# Classes of transformers whose models compute what the kernel computes.
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# How far logits may be from the model's own, relative to their size; rounding alone gives less than half of it.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class NotSupported(Exception):
    """The kernel can't compute this model's step; the message says why."""


class ModelStep:
    """The step of a model after a cache, as long as both stay as they are.

    bits: None, or 8: the step reads matrices rounded to 8 bits, which are held beside the model's own.
    Raises NotSupported for a model that the kernel can't compute.
    """

    def __init__(self, model: nn.Module, cache: StaticCache, bits: int | None = None) -> None:
        self._model, self._handle = model, handle_of(model)
        self._places = [
            (parts, name)
            for module in model.modules()
            for parts in (module._modules, module._parameters)
            for name, part in parts.items()
            if part is not None
        ]
        self._contents, self._limit = self._current_contents(), self._max_sparse_tokens()
        try:
            self.decoder = _decoder(model, cache, _ffn_calls(model, self._handle))
            self._step = kernels.StepCPU(self.decoder if bits is None else _rounded(self.decoder))
        except (UserError, ValueError) as error:
            raise NotSupported(str(error)) from error

    def __call__(self, token: int, position: int) -> Tensor:
        """The logits float32 [1, V] after a token at this position; the next step overwrites them."""
        return self._step(token, position)

    def is_current(self) -> bool:
        """Whether the model has the weights and the sparse FFNs that the step reads."""
        same = self._handle is handle_of(self._model) and self._limit == self._max_sparse_tokens()
        return same and self._contents == self._current_contents()

    def check(self, token: int, position: int, logits: Tensor) -> None:
        """Raises NotSupported unless a step gives a prefill's logits [1, V]; that prefill ended with this token.

        FFNs run as they did in the prefill of position + 1 tokens: often dense, where the step runs sparse. Nothing is
        rounded to fewer bits.
        """
        sparse = self._handle if isinstance(self._handle, SparseFFNs) else None
        before = 0.0 if sparse is None else sparse.max_sparse_tokens
        try:
            if sparse is not None and position >= before:
                sparse.max_sparse_tokens = 0
            layers = [
                layer._replace(ffn=call)
                for layer, call in zip(self.decoder.layers, _module_calls(self._model), strict=True)
            ]
            own = kernels.StepCPU(self.decoder._replace(layers=layers))(token, position)
        finally:
            if sparse is not None:
                sparse.max_sparse_tokens = before
        error = ((own - logits.float()).norm() / logits.float().norm()).item()
        if not error < _TOLERANCES[logits.dtype]:
            raise NotSupported(f"the kernel's logits differ from the model's by {error:.1%}")

    def _current_contents(self) -> list[int]:
        """Which modules and which memory the model consists of."""
        parts = [parts.get(name) for parts, name in self._places]
        return [part.data_ptr() if isinstance(part, Tensor) else id(part) for part in parts]

    def _max_sparse_tokens(self) -> float | None:
        return self._handle.max_sparse_tokens if isinstance(self._handle, SparseFFNs) else None


def _rounded(decoder: kernels.DecoderWeights) -> kernels.DecoderWeights:
    """The same with its matrices rounded to 8 bits, without the embedding and what a sparse FFN reads besides rows."""

    def ffn_of(ffn: kernels.AnyFFN) -> kernels.AnyFFN:
        if isinstance(ffn, kernels.DenseFFN):
            gate, up, down = map(_rounded_rows, (ffn.gate, ffn.up, ffn.down))
            return kernels.DenseFFN(gate, up, down, ffn.activation)
        if isinstance(ffn, (kernels.StagedFFN, kernels.ClusterFFN)):
            gate, up, down = map(_rounded_rows, (ffn.weights.gate, ffn.weights.up, ffn.weights.down))
            return ffn._replace(weights=RoundedFFN(gate, up, down, ffn.weights.activation))
        return ffn

    layers = [
        layer._replace(
            attention=layer.attention._replace(projections=[*map(_rounded_rows, layer.attention.projections)]),
            ffn=ffn_of(layer.ffn),
        )
        for layer in decoder.layers
    ]
    return decoder._replace(layers=layers, head=_rounded_rows(decoder.head))


def _rounded_rows(matrix: Rows) -> RoundedRows:
    assert isinstance(matrix, Tensor)  # nothing is rounded yet
    return rounded_rows(matrix)


def _module_calls(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """For each layer a function of [1, E] that calls the module that is its FFN."""

    def call_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda hidden: module(hidden[None])[0]

    return [call_of(ffn.module) for ffn in layer_ffns(find_ffns(model))]


def _ffn_calls(model: nn.Module, handle: Handle | None) -> Sequence[kernels.AnyFFN]:
    """For each layer what the kernel takes as its FFN."""
    if isinstance(handle, SparseFFNs) and handle.max_sparse_tokens >= 1:
        return [own or call for own, call in zip(handle.kernel_ffns(), _module_calls(model), strict=True)]
    if handle is not None:
        return _module_calls(model)
    calls: list[kernels.AnyFFN] = []
    for ffn, call in zip(layer_ffns(find_ffns(model)), _module_calls(model), strict=True):
        own_forward = "forward" in ffn.module.__dict__ or bool(_hooks(ffn.module))
        try:
            check_call(ffn)
            activation = activation_of(ffn)
        except UserError:
            own_forward = True
        if own_forward:
            calls.append(call)
        else:
            gate, up = ffn.projection("gate").detach(), ffn.projection("up").detach()
            calls.append(kernels.DenseFFN(gate, up, ffn.down.weight.detach(), activation))
    return calls


def _hooks(module: nn.Module) -> list[Callable]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _decoder(model: Any, cache: StaticCache, ffns: Sequence[kernels.AnyFFN]) -> kernels.DecoderWeights:
    """The model's weights as the kernel takes them."""
    if type(model).__name__ not in _CLASSES or type(model).__module__.split(".")[0] != "transformers":
        raise NotSupported(f"it knows {', '.join(_CLASSES)}")
    body, handle = model.model, handle_of(model)
    parts = [body.embed_tokens, body.norm, model.lm_head]
    layers: list[kernels.Layer] = []
    for block, layer_cache, ffn in zip(body.layers, cache.layers, ffns, strict=True):
        attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
        projections = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")]
        head_norms = [getattr(attention, f"{name}_norm", None) for name in ("q", "k")]
        parts += [block, attention, *norms, *projections, *(norm for norm in head_norms if norm is not None)]
        if any(type(linear) is not nn.Linear for linear in projections):
            raise NotSupported("its attention has projections that are not plain linear layers")
        if type(layer_cache) is not StaticLayer:
            raise NotSupported(f"its cache has a {type(layer_cache).__name__}")
        layers.append(
            kernels.Layer(
                kernels.AttentionWeights(
                    norms[0].weight,
                    [linear.weight.detach() for linear in projections],
                    [linear.bias for linear in projections],
                    [None if norm is None else norm.weight for norm in head_norms],
                    *(cached[0] for cached in (layer_cache.keys, layer_cache.values) if cached is not None),
                ),
                norms[1].weight,
                ffn,
            )
        )
    for part in (model, body, *parts):
        if any(getattr(hook, "__self__", None) is not handle or handle is None for hook in _hooks(part)):
            raise NotSupported("it has forward hooks")
    if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
        raise NotSupported("its head is not a plain linear layer")
    if model.training:
        raise NotSupported("it is in training mode")
    length = layers[0].attention.keys.shape[1]
    cos, sin = body.rotary_emb(body.embed_tokens.weight[:1], torch.arange(length)[None])
    attention = body.layers[0].self_attn
    if cos.shape[-1] != attention.head_dim or "dynamic" in body.rotary_emb.rope_type:
        raise NotSupported("its rotary embedding covers a part of each head, or depends on the text's length")
    return kernels.DecoderWeights(
        embedding=body.embed_tokens.weight.detach(),
        layers=layers,
        norm=body.norm.weight,
        head=model.lm_head.weight.detach(),
        cos=cos[0],
        sin=sin[0],
        epsilon=body.norm.variance_epsilon,
        scaling=attention.scaling,
    )
