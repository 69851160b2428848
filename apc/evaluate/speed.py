"""Decoding speed of policies in tokens a second, and how their predictions differ from the dense model's.

The first half of each scored window is a prompt. The second half is then scored twice: with FFNs sparse throughout, and
after a dense prefill, as in real use. On a GPU each token of the second half is one step of the same CUDA graph that is
timed.

Shape letters: n windows, S tokens in a window, V entries of the vocabulary.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.evaluate.metrics import perplexity, perplexity_ratio
from apc.predict.predictor import Predictor
from apc.sparse.decode import GreedyDecoder, cache_keyword, config_of
from apc.sparse.policies import kernel_policies
from apc.sparse.sparse_ffn import SparseFFNs
from apc.sparse.sparsify import handle_of, restore, sparsify
from apc.utils.errors import UserError
from apc.utils.progress import Bar
from apc.utils.progress import progress as progress_bar

WINDOWS = 32  # most windows to score
CONTINUED = 4  # windows whose prompts are also continued greedily
NEW_TOKENS = 64  # of each continuation
TIMED_STEPS = 32


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer,
    codebook: Codebook,
    predictor: Predictor | None,
    windows: Tensor,
    policies: list[str],
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Speed and quality of the dense model and of the policies with kernels, at batch 1. Leaves the model dense.

    `apc.evaluate.tables.speed_tables` shows the result. windows: int64 [n, S], S at least 4.

    Raises UserError if no policy has a kernel, or the windows are shorter.
    """
    names = [name for name in policies if name in kernel_policies()]
    left_out = [name for name in policies if name != "dense" and name not in names]
    problem = f"none of policies=[{','.join(policies)}] knows its mask before the FFN runs"
    if not names:
        raise UserError(f"speed=true: {problem}; add one of {', '.join(kernel_policies())}")
    problem = f"windows of {windows.shape[1]} tokens are too short for a prompt and a continuation"
    if windows.shape[1] < 4:
        raise UserError(f"speed=true: {problem}; raise data.seq_len")
    windows = windows[torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()]
    half = windows.shape[1] // 2
    prompts = windows[:CONTINUED, :half]
    restore(model)
    with progress_bar(len(windows) * (1 + 2 * len(names)), "speed", enabled=progress) as bar:
        bar.update(0, "dense")
        scorer, decoder = _Scorer(model, windows, half, bar), _recorded(model, windows, half)
        dense, difference = scorer.score(decoder, None, dense_prefill=True)
        records = [_record("dense", dense, dense, dense) | difference | _decode(decoder, tokenizer, prompts)]
        for name in names:
            bar.update(0, name)
            bytes_before = _gpu_bytes(model)
            ffns = handle_of(sparsify(model, codebook, predictor, name, seed, kernel="auto"))
            assert isinstance(ffns, SparseFFNs)  # as with any kernel
            bytes_held = _gpu_bytes(model) - bytes_before
            crossover, ffns.max_sparse_tokens = ffns.max_sparse_tokens, 1
            decoder = _recorded(model, windows, half)
            losses, difference = scorer.score(decoder, ffns, dense_prefill=True)
            all_sparse, _ = scorer.score(decoder, ffns, dense_prefill=False)
            record = _record(name, dense, losses, all_sparse) | difference | _decode(decoder, tokenizer, prompts)
            record["agrees_for"] = _mean_agreement(records[0]["continued"], record["continued"])
            record["bytes_held"] = bytes_held if scorer.device.type == "cuda" else None
            record["pays_up_to"] = crossover if ffns.by_triton else None
            records.append(record)
            restore(model)
    for record in records:
        record["times_dense"] = records[0]["seconds_per_token"] / record["seconds_per_token"]
    return {
        "windows": len(windows),
        "prompt": half,
        "policies": records,
        "left_out": left_out,
        "prompts": _texts(tokenizer, prompts),
    }


def _record(name: str, dense: Tensor, losses: Tensor, all_sparse: Tensor) -> dict:
    """A policy's perplexities, after a dense prefill and sparse throughout, and the first one's ratio to dense.

    dense, losses, all_sparse: the losses of each window for the dense model and for these two cases, float64 [n].
    """
    ratios = zip(("ratio", "ratio_low", "ratio_high"), perplexity_ratio(losses, dense), strict=True)
    record = {"policy": name, "perplexity": perplexity(losses), **dict(ratios)}
    return record | {"perplexity_masked": perplexity(all_sparse)}


class _Scorer:
    """Scores the windows' second halves after their first halves.

    teacher: the dense model's logits of each second half, bfloat16 [S/2, V], on the host.
    """

    def __init__(self, model: nn.Module, windows: Tensor, half: int, bar: Bar):
        self.model, self.windows, self.half, self.bar = model, windows, half, bar
        self.device = next(model.parameters()).device
        self.keyword = cache_keyword(model)
        self.teacher: list[Tensor] = []

    def score(
        self, decoder: GreedyDecoder, ffns: SparseFFNs | None, dense_prefill: bool
    ) -> tuple[Tensor, dict[str, float | None]]:
        """The losses of the model with its present FFNs, float64 [n], and its difference from the dense model.

        divergence: in nats per token; agreement: the share of tokens after which both models predict the same token.
        decoder: decodes with that model; ffns: its sparse FFNs, or None for the dense model, whose logits become the
        teacher.
        """
        losses, divergence, agreement = [], 0.0, 0.0
        for index, window in enumerate(self.windows):
            window = window[None].to(self.device)
            if decoder.device.type == "cuda":
                logits = self._steps(decoder, window, ffns, dense_prefill)
            else:
                logits = self._at_once(window, ffns, dense_prefill)
            losses.append(F.cross_entropy(logits[:-1].float(), window[0, self.half + 1 :]).double())
            if ffns is None:
                self.teacher.append(logits.bfloat16().cpu())
            else:
                dense = self.teacher[index].to(self.device)
                divergence += ops.divergence(logits.float(), dense.float()).mean().item()
                agreement += (logits.bfloat16().argmax(-1) == dense.argmax(-1)).double().mean().item()
            self.bar.update()
        means = {"divergence": divergence, "agreement": agreement}
        difference = {key: None if ffns is None else value / len(self.windows) for key, value in means.items()}
        return torch.stack(losses).cpu(), difference

    def _steps(self, decoder: GreedyDecoder, window: Tensor, ffns: SparseFFNs | None, dense_prefill: bool) -> Tensor:
        """The logits of a window's second half [S/2, V], each token a decoding step."""
        with _all_sparse(None if dense_prefill else ffns):
            decoder.prefill(window[:, : self.half])
        logits = []
        for at in range(self.half, window.shape[1]):
            decoder.token.copy_(window[:, at : at + 1])
            logits.append(decoder.step()[0].clone())
        return torch.stack(logits)

    def _at_once(self, window: Tensor, ffns: SparseFFNs | None, dense_prefill: bool) -> Tensor:
        """The logits of a window's second half [S/2, V], in one forward pass for each half."""
        from transformers import DynamicCache

        cache = {self.keyword: DynamicCache(config=config_of(self.model))}
        with _all_sparse(None if dense_prefill else ffns):
            self.model(input_ids=window[:, : self.half], use_cache=True, **cache)
        with _all_sparse(ffns):
            return self.model(input_ids=window[:, self.half :], use_cache=True, **cache).logits[0]


@contextlib.contextmanager
def _all_sparse(ffns: SparseFFNs | None) -> Iterator[None]:
    """In the block, calls of any number of tokens run sparse; None changes nothing."""
    if ffns is None:
        yield
        return
    before, ffns.max_sparse_tokens = ffns.max_sparse_tokens, math.inf
    try:
        yield
    finally:
        ffns.max_sparse_tokens = before


def _recorded(model: nn.Module, windows: Tensor, half: int) -> GreedyDecoder:
    """A decoder of the model with its present FFNs, with room for a window and for decoding after its first half."""
    torch.compiler.reset()  # torch.compile keeps at most eight versions of a function
    decoder = GreedyDecoder(model, 1, max(windows.shape[1], half + max(NEW_TOKENS, TIMED_STEPS + 8)) + 8)
    decoder.record(windows[:1, :half])
    return decoder


def _decode(decoder: GreedyDecoder, tokenizer, prompts: Tensor) -> dict:
    """Seconds per decoded token after a prompt, at batch 1, and greedy continuations of all prompts."""
    decoder.prefill(prompts[:1])
    seconds = []
    for _ in range(4):
        decoder.step()
    for _ in range(TIMED_STEPS):
        _wait(decoder.device)
        start = time.perf_counter()
        decoder.step()
        _wait(decoder.device)
        seconds.append(time.perf_counter() - start)
    continued = torch.cat([decoder.decode(prompt, NEW_TOKENS) for prompt in prompts.split(1)]).cpu()
    return {
        "seconds_per_token": statistics.median(seconds),
        "continued": continued.tolist(),
        "text": _texts(tokenizer, continued),
    }


def _mean_agreement(dense: list[list[int]], sparse: list[list[int]]) -> float:
    """Tokens before a continuation first differs from the dense model's, averaged over continuations."""
    same = torch.tensor(dense) == torch.tensor(sparse)
    return same.long().cumprod(1).sum(1).double().mean().item()


def _texts(tokenizer, tokens: Tensor) -> list[str]:
    return [tokenizer.decode(one, skip_special_tokens=True) for one in tokens]


def _gpu_bytes(model: nn.Module) -> int:
    """Bytes that torch has allocated on the model's GPU; 0 on the CPU."""
    device = next(model.parameters()).device
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
