"""Lets `model.generate` decode by our own steps on the CPU."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from apc.sparse.decode import cache_keyword
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from apc.sparse.model_step import ModelStepCPU

_MASKED = "the attention has a mask, or positions that do not count up"
_READ = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict")


class OwnSteps:
    """Stands in for a model's forward, while `own_steps` is on.

    reason: why the last pass did not run, or did not prepare, our step; None if it did.
    """

    reason: str | None

    def __init__(self, model: nn.Module) -> None:
        self._model, self._own, self._keyword = model, model.forward, cache_keyword(model)
        self._cache: StaticCache | None = None  # of the step
        self._step: ModelStepCPU | None = None  # None: the kernels can't compute the model, for the reason `_refusal`
        self._refusal: str | None = None
        self.reason = "there was no pass yet"

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's output: by our step if one token follows a cache that it knows, else by the model's forward."""
        cache, token = named.get(self._keyword), named.get("input_ids")
        self.reason = None if inputs else self._not_supported(cache, token, named)
        if self.reason is not None or cache is None or token is None:
            return self._own(*inputs, **named)
        follows = cache is self._cache and token.shape[1] == 1
        if follows and self._step is None:
            self.reason = self._refusal
            return self._own(**named)
        if follows and self._step is not None and self._step.is_current():
            if not _sees_all(named, int(cache.get_seq_length())):
                self.reason = _MASKED
                return self._own(**named)
            logits = self._step(token).clone()
            return CausalLMOutputWithPast(logits=logits[:, None], **{self._keyword: cache})  # type: ignore[arg-type]
        output = self._own(**named)
        self._cache, self._step, self._refusal = cache, None, None if _sees_all(named, _last(cache)) else _MASKED
        if self._refusal is None:
            self._prepare(cache, token, output.logits[:, -1])
        self.reason = self._refusal
        return output

    def _not_supported(self, cache: Any, token: Tensor | None, named: dict[str, Any]) -> str | None:
        if type(cache) is not StaticCache or not named.get("use_cache", True):
            return "the cache is not a StaticCache; call generate with cache_implementation=static"
        if token is None or len(token) != 1:
            return "there are several sequences, or embeddings in place of tokens"
        others = [name for name, value in named.items() if name not in (*_READ, self._keyword) and value is not None]
        others = [name for name in others if named[name] is not False]
        return f"the call has {', '.join(others)}" if others else None

    def _prepare(self, cache: StaticCache, tokens: Tensor, logits: Tensor) -> None:
        """Makes the step that follows a pass of tokens [1, n] with these last logits [1, V]."""
        from apc.sparse.model_step import ModelStepCPU, NotSupported  # imports numba

        try:
            with torch.no_grad():
                step = ModelStepCPU(self._model, cache)
                step.check(tokens[:, -1:], _last(cache), logits, tokens.shape[1])
        except NotSupported as error:
            self._refusal = str(error)
            return
        self._step = step


def _last(cache: StaticCache) -> int:
    """The position of the last token in a cache."""
    return int(cache.get_seq_length()) - 1


def _sees_all(named: dict[str, Any], position: int) -> bool:
    """Whether a pass's last token, at this position, attends to itself and to all tokens before it."""
    positions, mask = named.get("position_ids"), named.get("attention_mask")
    if positions is not None and int(positions.flatten()[-1]) != position:
        return False
    masks = mask.values() if isinstance(mask, dict) else [mask]  # by kind of layer
    return all(each is None or bool(_kept(each)[: position + 1].all()) for each in masks)


def _kept(mask: Tensor) -> Tensor:
    """What the last token attends to, by a mask int64 [1, n], bool [1, 1, n, S], or a term of this shape in scores."""
    last = mask.reshape(-1, mask.shape[-1])[-1]
    return last if mask.dtype == torch.bool or mask.dim() == 2 else last == 0


@contextlib.contextmanager
def own_steps(model: nn.Module) -> Iterator[OwnSteps]:
    """Within the block, `model.generate(…, cache_implementation="static")` decodes by our own steps, with any sampling.

    Those of `GreedyDecoder`: for one sequence of a Llama, Mistral, Qwen2 or Qwen3 model on the CPU, dense or sparse, or
    rounded by `round_weights`. Where they can't be used, the model's forward runs, and `reason` of what the block gets
    says why.

    Raises UserError for a model on another device, or within another block for the same model.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise UserError(f"own_steps: the model is on {device}, and this is for the CPU; use apc.GreedyDecoder on a GPU")
    if "forward" in model.__dict__:
        raise UserError("own_steps: the model's forward is replaced already; leave that block first")
    steps = OwnSteps(model)

    @functools.wraps(model.forward)  # generate reads its signature
    def forward(*inputs: Any, **named: Any) -> Any:
        return steps(*inputs, **named)

    forward.own_steps = True  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del model.__dict__["forward"]
