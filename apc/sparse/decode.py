"""Greedy decoding without the host in between: a step is one CUDA graph."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apc import ops
from apc.sparse.timing import graph_time
from apc.utils.errors import UserError

_ATTENTION = "apc-sdpa"


def cache_keyword(model: nn.Module) -> str:
    """What its forward calls the cache: `cache` since transformers 5.2x, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others,
):
    """transformers' `sdpa`, but for one token: its heads that share a key head are queries of that, in plain products, which torch.compile makes fast.
    `sdpa` writes keys and values again for each of them, and its kernels are for many tokens.

    query: [B, heads, n, d]; key, value: [B, key heads, S, d]; attention_mask: [B, 1, n, S], bool or added, or None → [B, n, heads, d], None
    """
    shared = key.shape[1]
    plain = (
        others.get("softcap") is None
        and others.get("position_bias") is None
        and (attention_mask is None or attention_mask.shape[1] == 1)
    )
    if query.shape[2] > 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    packed = query.reshape(len(query), shared, -1, query.shape[3])
    scores = (packed @ key.mT).float() * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = (
            scores.masked_fill(~attention_mask, -torch.inf)
            if attention_mask.dtype == torch.bool
            else scores + attention_mask
        )
    output = scores.softmax(-1).to(value.dtype) @ value
    return output.reshape(query.shape).transpose(1, 2), None


@contextlib.contextmanager
def _shared_heads(model: nn.Module) -> Iterator[None]:
    """The model's attention by `attend`, where it is `sdpa`."""
    before = model.config._attn_implementation
    if before == "sdpa":
        AttentionInterface.register(_ATTENTION, attend)
        AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["sdpa"])
        model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextlib.contextmanager
def _tuning_by_graphs() -> Iterator[None]:
    """torch.compile's tuning times candidates in CUDA graphs of the current stream, which the step will be one of too. Launched one by one from
    Python, kernels of a few µs take as long as their launches, and chance chooses among them.
    """
    import torch.compiler.config
    from torch._inductor.runtime.benchmarking import benchmarker

    benchmarker.benchmark_gpu = lambda call, **others: graph_time(call)  # of this one object; its class keeps its own
    try:
        with torch.compiler.config.patch(
            cache_key_tag="timed in graphs"
        ):  # what was chosen otherwise lies in Inductor's caches beside it
            yield
    finally:
        del benchmarker.benchmark_gpu


class GreedyDecoder:
    """Decodes greedily with a cache of fixed size; on a GPU a step is one CUDA graph, of the model as torch.compile makes it.

    model: a Hugging Face causal language model, sparse or not; batch, length: sequences, and the most tokens of each (more are a ValueError); mode:
    torch.compile's, without CUDA graphs of its own; None: not compiled; early: whether torch.compile's kernels may be on the GPU before the ones before
    them have ended, and wait there, on Hopper (an experiment of torch's: `triton.enable_pdl`).
    """

    def __init__(self, model: nn.Module, batch: int, length: int, mode: str | None = "default", early: bool = False):
        self.model, self.device = model, next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self._keyword = cache_keyword(model)
        self._call = (
            torch.compile(model.forward, dynamic=False, fullgraph=True, mode=mode)
            if mode and self.device.type == "cuda"
            else model.forward
        )
        self._length, self._held = length, 0  # tokens that the cache has room for, and holds
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._early = early

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> None:
        """Starts anew after tokens int64 [batch, n]; the next token of each is what follows greedily."""
        self._reserve(tokens.shape[1], anew=True)
        self.cache.reset()
        logits = self.model(input_ids=tokens.to(self.device), use_cache=True, **{self._keyword: self.cache}).logits[
            :, -1
        ]
        self.token.copy_(logits.argmax(-1, keepdim=True))

    def _reserve(self, count: int, anew: bool = False) -> None:
        """Room for so many tokens. Without it a GPU would write past the cache, which ends the process."""
        held = count if anew else self._held + count
        if held > self._length:
            raise ValueError(
                f"{held} tokens are more than the decoder's length of {self._length}; make it with a larger one"
            )
        self._held = held

    def _step(self) -> None:
        """Raises UserError where torch.compile cannot trace the model whole."""
        try:
            with _shared_heads(self.model):
                self.logits = self._call(input_ids=self.token, use_cache=True, **{self._keyword: self.cache}).logits[
                    :, -1
                ]
        except torch._dynamo.exc.Unsupported as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"{type(self.model).__name__}: torch.compile cannot trace a decoding step whole ({why}); leave out speed=true for it"
            ) from error
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.no_grad()
    def record(self, tokens: Tensor) -> None:
        """Records a step's CUDA graph, after tokens as in `prefill`, which has to come again after it."""
        if self.device.type != "cuda":
            return
        import torch._inductor.config

        with (
            torch.cuda.device(self.device),
            torch._inductor.config.patch({"triton.enable_pdl": self._early}),
        ):  # a graph is of the device at hand
            self.prefill(tokens)
            self._reserve(4)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with ops.whole_passes():
                with torch.cuda.stream(stream), _tuning_by_graphs():
                    for _ in range(3):
                        self._step()
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()

    @torch.no_grad()
    def step(self) -> None:
        """From `token` and the cache to the next `token` and its `logits`; nothing waits for the device."""
        self._reserve(1)
        if self._graph is not None:
            with torch.cuda.device(self.device):
                self._graph.replay()
        else:
            self._step()

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        """int64 [batch, n] → the `steps` tokens that follow, int64 [batch, steps]"""
        self.prefill(tokens)
        found = [self.token.clone()]
        for _ in range(steps - 1):
            self.step()
            found.append(self.token.clone())
        return torch.cat(found, dim=1)
