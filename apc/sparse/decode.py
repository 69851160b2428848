"""Greedy decoding without the host's overhead: each step is one CUDA graph, or one call of compiled code on the CPU.

Shape letters: B sequences, n tokens, S capacity of the cache in tokens, d size of an attention head.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, StaticCache

from apc import ops
from apc.data import attention
from apc.sparse.timing import graph_time
from apc.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from apc.sparse.model_step import ModelStep, ModelStepCPU, ModelStepGPU

_ATTENTION = "apc-decode"
_BITS_ON = {"cpu": 8, "cuda": 4}  # of weights that our steps can read, besides those of the model's own type


def cache_keyword(model: nn.Module) -> str:
    """The name of a model's cache argument: `cache` since transformers 5.2x, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def config_of(model: nn.Module) -> PreTrainedConfig:
    """The configuration of a Hugging Face model."""
    return cast(PreTrainedConfig, model.config)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others
) -> tuple[Tensor, None]:
    """Attention as in transformers' `sdpa`, but faster for one token.

    For one token, query heads that share a key head become rows of plain matrix products, which torch.compile makes
    fast. `sdpa` repeats keys and values for each query head, and its kernels are made for many tokens.

    query: [B, heads, n, d]; key, value: [B, key heads, S, d]; attention_mask: [B, 1, n, S], bool or added to the
    scores, or None. Returns [B, n, heads, d] and None, as transformers expects.
    """
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    adds_terms = others.get("softcap") is not None or others.get("position_bias") is not None
    if query.shape[2] > 1 or per_head or adds_terms:
        return attention.sdpa(module, query, key, value, attention_mask, **others)
    d, scaling = query.shape[3], others.get("scaling")
    grouped = query.reshape(len(query), key.shape[1], -1, d)
    scores = (grouped @ key.mT).float() * (d**-0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    output = scores.softmax(-1).to(value.dtype) @ value
    return output.reshape(query.shape).transpose(1, 2), None


@contextlib.contextmanager
def _grouped_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, replaces the model's attention with `attend` if it is `sdpa`, or ours."""
    config = config_of(model)
    before = config._attn_implementation
    if before in ("sdpa", attention.NAME):
        AttentionInterface.register(_ATTENTION, attend)
        AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["sdpa"])
        config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _tuning_by_graphs() -> Iterator[None]:
    """Within the block, torch.compile's tuning times its candidates in CUDA graphs, as used for decoding.

    Launched one by one from Python, kernels of a few µs take as long as their launches, so the choice would be random.
    """
    import torch.compiler.config
    from torch._inductor.runtime.benchmarking import benchmarker

    # Replaces the method of this object only, not of its class.
    benchmarker.benchmark_gpu = lambda call, **others: graph_time(call)  # type: ignore[method-assign]
    try:
        # The tag separates these choices from others in Inductor's caches.
        with torch.compiler.config.patch(cache_key_tag="timed in graphs"):  # type: ignore[attr-defined]
            yield
    finally:
        del benchmarker.benchmark_gpu


class GreedyDecoder:
    """Decodes greedily with a cache of fixed size.

    Steps run through our own kernels, dense or sparse, if these can compute the model: of one sequence by
    `apc.ops.decode_cpu`, whose logits are float32, or of up to four by `apc.ops.decode_gpu`. If not, `reason` says why
    after `prefill`, and steps run through the model itself, on a GPU compiled by torch.compile. There, `record` makes a
    step one CUDA graph.

    Args:
        model: a Hugging Face causal language model.
        batch: number of sequences.
        length: the largest number of tokens of a sequence; more raise ValueError.
        mode: on a GPU, the torch.compile mode of models that our kernels can't compute; it must not use CUDA graphs
            itself. None: the model's own step, on the CPU too.
        early: whether, on Hopper, torch.compile's kernels may start before the previous kernel has ended, and wait for
            it on the GPU (torch's experimental option `triton.enable_pdl`).
        bits: 8 makes the CPU's steps read matrices rounded to 8 bits, with a scale for each row; 4 makes a GPU's steps,
            of one sequence, read the layers' matrices at 4 bits, in groups of 32 weights (`apc.quantise_ffns`). They
            are held beside the model's own, which prefill uses. `prefill` raises UserError if the steps are not our
            kernels'. A model that `apc.round_weights` has rounded needs no `bits`.
        own: False: our kernels are not used.
    """

    reason: str | None

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        length: int,
        mode: str | None = "default",
        early: bool = False,
        bits: int | None = None,
        own: bool = True,
    ):
        if bits not in (None, *_BITS_ON.values()):
            raise ValueError(f"bits={bits}: choose None, {_BITS_ON['cpu']} on the CPU or {_BITS_ON['cuda']} on a GPU")
        self._bits = bits
        self.model, self.device = model, next(model.parameters()).device
        self.cache = StaticCache(config=config_of(model), max_cache_len=length)
        self._keyword = cache_keyword(model)
        accepts = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._last_only = {"logits_to_keep": 1} if accepts else {}
        self._mode = mode
        self._call: Callable | None = None
        self._length, self._cached = length, 0  # tokens that fit into the cache, and tokens in it
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._early = early
        self.reason = None if own else "own=False"
        if not mode:
            self.reason = "mode=None"
        elif batch > 1 and self.device.type == "cpu":
            self.reason = f"the decoder has {batch} sequences at once"
        self._may_use_kernels = self.reason is None and self.device.type in ("cpu", "cuda")
        self._own: ModelStepCPU | ModelStepGPU | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> None:
        """Starts a new text with tokens int64 [batch, n], and sets `token` to each sequence's likeliest next token."""
        self._reserve(tokens.shape[1], reset=True)
        self.cache.reset()
        tokens = tokens.to(self.device)
        logits = self._last_logits(self.model, tokens)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        own = _BITS_ON.get(self.device.type)
        if self._bits not in (None, own):
            raise UserError(f"bits={self._bits}: steps on {self.device.type} read {own} bits; set bits={own}")
        if self._may_use_kernels and (self._own is None or not self._own.is_current()):
            self._prepare(lambda step: step.check(tokens[:, -1:], tokens.shape[1] - 1, logits, tokens.numel()))
        self._check_bits()

    def _last_logits(self, call: Callable, tokens: Tensor) -> Tensor:
        """The logits [batch, vocabulary] after tokens int64 [batch, n], which go into the cache."""
        named = {self._keyword: self.cache} | (self._last_only if tokens.shape[1] > 1 else {})
        return call(input_ids=tokens, use_cache=True, **named).logits[:, -1]

    def _prepare(self, check: Callable[["ModelStep"], None] | None = None) -> None:
        """Makes our step for the model as it is now, or notes why there is none."""
        from apc.sparse.model_step import ModelStepCPU, ModelStepGPU, NotSupported  # imports numba

        before, self.reason = self._own, None
        try:
            if self.device.type == "cuda":
                self._own = ModelStepGPU(self.model, self.cache, self._bits)
            else:
                self._own = ModelStepCPU(self.model, self.cache, self._bits)
            if check is not None:
                check(self._own)
        except NotSupported as error:
            self._own, self.reason = None, str(error)
        if before is not None or self._own is not None:  # else the graph is of the model's own step
            self._graph = None

    def _check_bits(self) -> None:
        """Raises UserError if steps should read rounded weights and can't."""
        if self._bits is None:
            return
        if self._own is None:
            raise UserError(f"bits={self._bits}: {self.reason}; leave bits out")

    def _reserve(self, count: int, reset: bool = False) -> None:
        """Counts tokens before they go into the cache: a GPU that writes past it ends the process."""
        cached = count if reset else self._cached + count
        if cached > self._length:
            problem = f"{cached} tokens are more than the decoder's length of {self._length}"
            raise ValueError(f"{problem}; make it with a larger one")
        self._cached = cached

    def _step(self) -> None:
        """A step without a graph. Raises UserError if torch.compile cannot trace the whole model."""
        if self._own is not None and self.device.type == "cpu":  # numpy finds the largest sooner
            self.logits = self._own(self.token)
            self.token.fill_(int(self.logits.numpy().argmax()))
            return
        self.logits = self._models_step() if self._own is None else self._own(self.token)
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def _models_step(self) -> Tensor:
        """The logits of a step of the model itself."""
        if self._call is None:
            self._call = self.model.forward
            if self._mode and self.device.type == "cuda":
                self._call = torch.compile(self.model.forward, dynamic=False, fullgraph=True, mode=self._mode)
        try:
            with _grouped_attention(self.model):
                return self._last_logits(self._call, self.token)
        except torch._dynamo.exc.Unsupported as error:
            problem = f"torch.compile cannot trace a whole decoding step ({first_line(error)})"
            advice = "leave out speed=true for this model"
            raise UserError(f"{type(self.model).__name__}: {problem}; {advice}") from error

    @torch.no_grad()
    def record(self, tokens: Tensor) -> None:
        """Records the CUDA graph of a step that follows tokens int64 [batch, n]; call `prefill` again afterwards.

        A later `prefill` drops the graph if our kernels made it and the model has changed since.
        """
        if self.device.type != "cuda":
            return
        import torch._inductor.config

        # A graph belongs to the current device.
        with torch.cuda.device(self.device), torch._inductor.config.patch({"triton.enable_pdl": self._early}):
            self.prefill(tokens)
            self._reserve(4)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with ops.use_side_stream():
                with torch.cuda.stream(stream), _tuning_by_graphs():
                    for _ in range(3):
                        self._step()
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Computes the next `token` without waiting; the next step overwrites the returned `logits` [batch, words]."""
        self._reserve(1)
        if self._graph is not None:
            with torch.cuda.device(self.device):
                self._graph.replay()
        else:
            if self._own is not None and not self._own.is_current():
                self._prepare()
                self._check_bits()
            self._step()
        assert self.logits is not None
        return self.logits

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        """The next `steps` tokens int64 [batch, steps] after tokens int64 [batch, n]."""
        self.prefill(tokens)
        decoded = [self.token.clone()]
        for _ in range(steps - 1):
            self.step()
            decoded.append(self.token.clone())
        return torch.cat(decoded, dim=1)
