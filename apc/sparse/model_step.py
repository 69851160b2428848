"""A decoding step by our own kernels, for Hugging Face models of Llama's kind, on the CPU and on a GPU.

The kernels are those of `apc.ops.decode_cpu` and `apc.ops.decode_gpu`. Importing this module imports numba.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from apc.data.ffn import find_ffns
from apc.ops import decode_cpu as kernels
from apc.ops.decode_gpu import StepGPU
from apc.ops.decode_packed import PackedStepGPU
from apc.ops.decoder_weights import AttentionWeights, DecoderWeights, DenseFFN, Layer, Unsupported
from apc.ops.ffn_arguments import FFNWeights
from apc.ops.packed_gpu import PackedClusterFFN
from apc.ops.rounded import Rows, rounded_ffn, rounded_predictor, rounded_rows, rows_of, stored_ffn
from apc.ops.rounded_weight import RoundedRows, is_rounded, memory_of
from apc.sparse.packed_weights import packed_ffn, packed_layers
from apc.sparse.sparse_ffn import SparseFFNs, activation_of, check_call, layer_ffns
from apc.sparse.sparsify import Handle, handle_of
from apc.utils.errors import UserError

# Classes of transformers whose models compute what the kernel computes.
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROTARY = ("default", "linear", "llama3", "yarn")  # kinds of rotary embeddings that do not depend on the text's length
# How far logits may be from the model's own, relative to their size; rounding alone gives less than half of it.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class NotSupported(Exception):
    """The kernel can't compute this model's step; the message says why."""


class ModelStep:
    """The step of a model after a cache, as long as both stay as they are.

    bits: of the weights that the step reads, if not those of the model's own type; it holds these weights beside the
    model's. Weights that were written through `.data` are then not noticed.

    Raises NotSupported for a model that the kernels can't compute.
    """

    def __init__(self, model: nn.Module, cache: StaticCache, bits: int | None) -> None:
        self._model, self._handle, self._bits = model, handle_of(model), bits
        self._sequences = len(_filled(getattr(cache.layers[0], "keys", None)))
        self._modules = list(model.modules())
        self._places = [
            (parts, name)
            for module in self._modules
            for parts in (module._modules, module._parameters)
            for name in parts
        ]
        with _as_not_supported():
            self.decoder = _decoder(model, cache, self._ffn_calls())
        self._lengths = [layer.cumulative_length for layer in cache.layers if isinstance(layer, StaticLayer)]
        self._contents, self._sparse = self._current_contents(), self._runs_sparse()

    def __call__(self, token: Tensor) -> Tensor:
        """The logits [n, V] after tokens int64 [n, 1], which go into the cache.

        On the CPU they are float32, and the next step overwrites them; on a GPU they are of the weights' type.
        """
        raise NotImplementedError

    def _ffn_calls(self) -> Sequence[kernels.AnyFFN]:
        """For each layer what the kernels take as its FFN."""
        raise NotImplementedError

    def _logits(self, decoder: DecoderWeights, token: Tensor, position: int) -> Tensor:
        """The logits [n, V] after tokens int64 [n, 1], by the kernels."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether the model has the weights, hooks and sparse FFNs that the step knows."""
        same = self._handle is handle_of(self._model) and self._sparse == self._runs_sparse()
        return same and self._contents == self._current_contents()

    def check(self, token: Tensor, position: int, logits: Tensor, count: int) -> None:
        """Raises NotSupported unless a step gives the logits [n, V] of a prefill that ended with tokens int64 [n, 1].

        The FFNs of a sparse model run as they did in the prefill, which had `count` tokens: often dense, where the step
        runs sparse. Nothing is rounded to fewer bits. The cache stays as it was.
        """
        sparse = self._handle if isinstance(self._handle, SparseFFNs) else None
        before = 0.0 if sparse is None else sparse.max_sparse_tokens
        decoder = self.decoder
        if self._handle is not None:
            calls = zip(decoder.layers, _module_calls(self._model), strict=True)
            layers = [each if isinstance(each.ffn, DenseFFN) else each._replace(ffn=call) for each, call in calls]
            decoder = decoder._replace(layers=layers)
        caches = [each[:, :, position] for layer in decoder.layers for each in layer.attention[-2:]]
        written = [each.clone() for each in caches]
        try:
            if sparse is not None and count > before:
                sparse.max_sparse_tokens = 0
            with _as_not_supported():
                own = self._logits(decoder, token, position).float()
        finally:
            if sparse is not None:
                sparse.max_sparse_tokens = before
            for each, values in zip(caches, written, strict=True):
                each.copy_(values)
        error = ((own - logits.float()).norm() / logits.float().norm()).item()
        if not error < _TOLERANCES[logits.dtype]:
            raise NotSupported(f"the kernel's logits differ from the model's by {error:.1%}")

    def _current_contents(self) -> list[int]:
        """Which modules, hooks and memory the model consists of."""
        parts = [parts.get(name) for parts, name in self._places]
        found = [memory_of(part) if isinstance(part, Tensor) else id(part) for part in parts]
        for module in self._modules:
            found += [len(module._forward_hooks), len(module._forward_pre_hooks), id(module.__dict__.get("forward"))]
        if self._bits is not None:
            found += [part._version for part in parts if isinstance(part, Tensor)]
        return found

    def _runs_sparse(self) -> bool:
        """Whether sparse FFNs run a step sparse."""
        return isinstance(self._handle, SparseFFNs) and self._handle.max_sparse_tokens >= self._sequences


class ModelStepCPU(ModelStep):
    """The step of one sequence on the CPU.

    bits: None, or 8: the step reads matrices rounded to 8 bits, as it does if `round_weights` has rounded the model.
    """

    def __init__(self, model: nn.Module, cache: StaticCache, bits: int | None = None) -> None:
        super().__init__(model, cache, 8 if is_rounded(model) else bits)
        with _as_not_supported():
            self._step = kernels.StepCPU(self.decoder if self._bits is None else _rounded(self.decoder))

    def __call__(self, token: Tensor) -> Tensor:
        """The next step overwrites the logits."""
        position = int(self._lengths[0])
        logits = self._step(int(token), position)
        for length in self._lengths:  # as torch's own step would leave it
            length.fill_(position + 1)
        return logits

    def _ffn_calls(self) -> Sequence[kernels.AnyFFN]:
        if not isinstance(self._handle, SparseFFNs):
            return _ffn_calls(self._model, self._handle)
        calls = zip(self._handle.kernel_ffns(), _module_calls(self._model), strict=True)
        return [own or call for own, call in calls]

    def _logits(self, decoder: DecoderWeights, token: Tensor, position: int) -> Tensor:
        exact = decoder is self.decoder and self._bits is None
        return (self._step if exact else kernels.StepCPU(decoder))(int(token), position)


class ModelStepGPU(ModelStep):
    """The step of up to four sequences on a GPU, at 4 bits of one, in kernels that a CUDA graph can record.

    bits: None, or 4: the step reads the layers' matrices at 4 bits, as `packed_weights` stores them.
    """

    def __init__(self, model: nn.Module, cache: StaticCache, bits: int | None = None) -> None:
        super().__init__(model, cache, bits)
        with _as_not_supported():
            if bits is None:
                self._step = StepGPU(self.decoder)
            else:
                self._step = step = PackedStepGPU(self.decoder, packed_layers(self.decoder, self._packed_ffns()))
                if not (error := step.error()) < _TOLERANCES[self.decoder.embedding.dtype]:
                    raise Unsupported(f"the kernel's products differ from the formula's by {error:.1%}")

    def _packed_ffns(self) -> list[PackedClusterFFN]:
        """For each layer its FFN at 4 bits. Raises UserError or Unsupported without kernels for them."""
        if isinstance(self._handle, SparseFFNs):
            return self._handle.packed_ffns()
        if self._handle is not None:
            raise Unsupported("masks run on a dense forward pass (kernel=None)")
        ffns = layer_ffns(find_ffns(self._model))
        if not all(isinstance(layer.ffn, DenseFFN) for layer in self.decoder.layers):
            raise Unsupported("an FFN computes more than down(act(gate) * up)")
        return [PackedClusterFFN(packed_ffn(ffn, activation_of(ffn))) for ffn in ffns]

    def __call__(self, token: Tensor) -> Tensor:
        """The logits stay."""
        logits = self._step(token, self._lengths[0])
        torch._foreach_add_(self._lengths, 1)
        return logits

    def _ffn_calls(self) -> Sequence[kernels.AnyFFN]:
        if isinstance(self._handle, SparseFFNs) and not self._runs_sparse():
            dense = [DenseFFN(gate, up, down.T, kind) for gate, up, down, kind in self._handle.dense_weights()]
            if dense:
                return dense
        return _ffn_calls(self._model, self._handle)

    def _logits(self, decoder: DecoderWeights, token: Tensor, position: int) -> Tensor:
        return StepGPU(decoder)(token, torch.full_like(self._lengths[0], position))


@contextlib.contextmanager
def _as_not_supported() -> Iterator[None]:
    """Within the block, what the kernels or the model refuse is NotSupported."""
    try:
        yield
    except (UserError, Unsupported) as error:
        raise NotSupported(str(error).removesuffix("; use kernel=None")) from error


def _rounded(decoder: DecoderWeights) -> DecoderWeights:
    """The same with its matrices rounded to 8 bits.

    The embedding stays, and of a sparse FFN what is neither a row nor a predictor of clusters.
    """

    def ffn_of(ffn: kernels.AnyFFN) -> kernels.AnyFFN:
        if isinstance(ffn, DenseFFN):
            gate, up, down = map(_rounded_rows, (ffn.gate, ffn.up, ffn.down))
            return DenseFFN(gate, up, down, ffn.activation)
        if isinstance(ffn, (kernels.StagedFFN, kernels.ClusterFFN)):
            ffn = ffn._replace(weights=rounded_ffn(ffn.weights))
        if isinstance(ffn, kernels.ClusterFFN) and ffn.predictor is not None:
            ffn = ffn._replace(predictor=rounded_predictor(ffn.predictor))
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
    return rounded_rows(matrix) if isinstance(matrix, Tensor) else matrix


def _module_calls(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """For each layer a function of [n, E] that calls the module that is its FFN."""

    def call_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda hidden: module(hidden[None])[0]

    return [call_of(ffn.module) for ffn in layer_ffns(find_ffns(model))]


def _ffn_calls(model: nn.Module, handle: Handle | None) -> Sequence[kernels.AnyFFN]:
    """For each layer its weights, or a function that calls its module."""
    if handle is not None:
        return _module_calls(model)
    calls: list[kernels.AnyFFN] = []
    for ffn, call in zip(layer_ffns(find_ffns(model)), _module_calls(model), strict=True):
        own_forward = any(_is_changed(part) for part in ffn.module.modules())
        try:
            check_call(ffn)
            activation = activation_of(ffn)
        except UserError:
            own_forward = True
        if own_forward:
            calls.append(call)
        else:
            gate, up, down = (each.detach() for each in (ffn.projection("gate"), ffn.projection("up"), ffn.down.weight))
            stored = stored_ffn(FFNWeights(gate, up, down.T, activation))
            calls.append(DenseFFN(gate, up, down, activation) if stored is None else kernels.ClusterFFN(stored))
    return calls


def _is_changed(module: nn.Module) -> bool:
    """Whether a module computes something else than its class does."""
    return bool(_hooks(module)) or "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def _hooks(module: nn.Module) -> list[Callable]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _filled(cached: Tensor | None) -> Tensor:
    if cached is None:
        raise NotSupported("the cache is empty")
    return cached


def is_known(model: nn.Module) -> bool:
    """Whether a model is of one of the `CLASSES`."""
    return type(model).__name__ in CLASSES and type(model).__module__.split(".")[0] == "transformers"


def _decoder(model: Any, cache: StaticCache, ffns: Sequence[kernels.AnyFFN]) -> DecoderWeights:
    """The model's weights as the kernel takes them."""
    if not is_known(model):
        raise NotSupported(f"the kernel knows {', '.join(CLASSES)}")
    body, handle = model.model, handle_of(model)
    parts = [body.embed_tokens, body.norm, model.lm_head]
    layers: list[Layer] = []
    for block, layer_cache, ffn in zip(body.layers, cache.layers, ffns, strict=True):
        attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
        projections = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")]
        head_norms = [getattr(attention, f"{name}_norm", None) for name in ("q", "k")]
        parts += [block, attention, *norms, *projections, *(norm for norm in head_norms if norm is not None)]
        if any(type(linear) is not nn.Linear for linear in projections):
            raise NotSupported("the attention has projections that are not plain linear layers")
        if type(layer_cache) is not StaticLayer:
            raise NotSupported(f"the cache has a {type(layer_cache).__name__}")
        layers.append(
            Layer(
                AttentionWeights(
                    norms[0].weight,
                    [rows_of(linear.weight) for linear in projections],
                    [linear.bias for linear in projections],
                    [None if norm is None else norm.weight for norm in head_norms],
                    keys=_filled(layer_cache.keys),
                    values=_filled(layer_cache.values),
                ),
                norms[1].weight,
                ffn,
            )
        )
    for part in (model, body, body.rotary_emb, *parts):
        own = part is model and hasattr(part.__dict__.get("forward"), "own_steps")
        if ("forward" in part.__dict__ and not own) or hasattr(part, "_hf_hook"):
            raise NotSupported("a module's forward is replaced")
        if any(getattr(hook, "__self__", None) is not handle or handle is None for hook in _hooks(part)):
            raise NotSupported("the model has forward hooks")
    if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
        raise NotSupported("the head is not a plain linear layer")
    if model.training:
        raise NotSupported("the model is in training mode")
    length, like = layers[0].attention.keys.shape[2], body.norm.weight
    cos, sin = body.rotary_emb(like[None], torch.arange(length, device=like.device)[None])
    attention = body.layers[0].self_attn
    if cos.shape[-1] != attention.head_dim or body.rotary_emb.rope_type not in _ROTARY:
        raise NotSupported("the rotary embedding covers a part of each head, or depends on the text's length")
    return DecoderWeights(
        embedding=body.embed_tokens.weight.detach(),
        layers=layers,
        norm=body.norm.weight,
        head=rows_of(model.lm_head.weight),
        cos=cos[0],
        sin=sin[0],
        epsilon=body.norm.variance_epsilon,
        scaling=attention.scaling,
    )
