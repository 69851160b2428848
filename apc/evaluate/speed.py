"""What a policy is worth when the model decodes with it: tokens a second, and how what it says differs from the dense model.

Each scored window's first half is a prompt. Its second half is scored after it twice: with FFNs sparse throughout, and with a dense prefill, as in use. On a
GPU the second half's tokens are steps of the graph that is timed. Shape letters: n windows, S tokens of a window, V entries of the
vocabulary.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apc import ops
from apc.cluster.codebook import Codebook
from apc.evaluate.metrics import perplexity, perplexity_ratio
from apc.predict.predictor import Predictor
from apc.sparse.decode import GreedyDecoder, cache_keyword
from apc.sparse.policies import POLICIES
from apc.sparse.sparse_ffn import SparseFFNs
from apc.sparse.sparsify import handle_of, restore, sparsify
from apc.utils.errors import UserError

WINDOWS = 32  # that are scored, at most
CONTINUED = 4  # of them are also continued greedily
NEW_TOKENS = 64
TIMED_STEPS = 32


@dataclass(frozen=True)
class _Second:
    """The second halves of windows under one policy: losses float64 [n], divergence from the dense model and share of tokens whose likeliest next is the
    dense model's, both None for the dense model itself."""

    losses: Tensor
    divergence: float | None
    agreement: float | None


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
    """Records of `dense` and of the policies that kernels take, for the batch of one; see `apc.report.speed_table`. Leaves the model dense.

    windows: int64 [n, S], S at least 4. Raises UserError where no policy has a kernel, or windows are shorter.
    """
    names = [name for name in policies if name != "dense" and POLICIES[name].known_before_ffn()]
    left_out = [name for name in policies if name != "dense" and name not in names]
    if not names:
        raise UserError(
            f"speed=true: none of policies=[{','.join(policies)}] knows its mask before the FFN runs; add predicted, soft, neuron-predictor or static"
        )
    if windows.shape[1] < 4:
        raise UserError(
            f"speed=true: windows of {windows.shape[1]} tokens can't be halved into a prompt and what follows; raise data.seq_len"
        )
    windows = windows[torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()]
    half = windows.shape[1] // 2
    restore(model)
    records = []
    with tqdm(total=len(windows) * (1 + 2 * len(names)), desc="speed", unit=" windows", disable=not progress) as bar:
        dense, decoder = _Scorer(model, windows, half, bar), _recorded(model, windows, half)
        reference = dense.score(decoder, None, dense_prefill=True)
        records.append(_record("dense", reference, reference, reference) | _decode(decoder, tokenizer, windows, half))
        for name in names:
            held = _held(model)
            ffns = handle_of(sparsify(model, codebook, predictor, name, seed, kernel="auto"))
            extra = None if held is None else _held(model) - held
            pays_up_to, ffns.max_sparse_tokens = ffns.max_sparse_tokens, 1
            decoder = _recorded(model, windows, half)
            after, masked = (
                dense.score(decoder, ffns, dense_prefill=True),
                dense.score(decoder, ffns, dense_prefill=False),
            )
            record = _record(name, reference, after, masked) | _decode(decoder, tokenizer, windows, half)
            record["agrees_for"] = _agrees_for(records[0]["continued"], record["continued"])
            record["bytes_held"], record["pays_up_to"] = extra, pays_up_to if ffns.by_triton else None
            records.append(record)
            restore(model)
    step = records[0]["seconds_per_token"]
    for record in records:
        record["times_dense"] = step / record["seconds_per_token"]
    return {
        "windows": len(windows),
        "prompt": half,
        "policies": records,
        "left_out": left_out,
        "prompts": _texts(tokenizer, windows[:CONTINUED, :half]),
    }


def _record(name: str, dense: _Second, after: _Second, masked: _Second) -> dict:
    ratio, low, high = perplexity_ratio(after.losses, dense.losses)
    return {
        "policy": name, "perplexity": perplexity(after.losses), "ratio": ratio, "ratio_low": low, "ratio_high": high,
        "perplexity_masked": perplexity(masked.losses), "divergence": after.divergence, "agreement": after.agreement,
    }  # fmt: skip


class _Scorer:
    """Scores the second halves of windows after their first halves; `teacher` keeps the dense model's logits on the host, bfloat16 [n, S/2, V]."""

    def __init__(self, model: nn.Module, windows: Tensor, half: int, bar: tqdm):
        self.model, self.windows, self.half, self.bar = model, windows, half, bar
        self.device = next(model.parameters()).device
        self.keyword = cache_keyword(model)
        self.teacher: list[Tensor] = []

    def score(self, decoder: GreedyDecoder, ffns: SparseFFNs | None, dense_prefill: bool) -> _Second:
        """decoder: of the model as it is; ffns: those in it; None: it is the dense one, whose logits are kept."""
        losses, divergence, agreement = [], 0.0, 0.0
        for index, window in enumerate(self.windows):
            window = window[None].to(self.device)
            steps = decoder.device.type == "cuda"
            logits = (
                self._steps(decoder, window, ffns, dense_prefill)
                if steps
                else self._at_once(window, ffns, dense_prefill)
            )
            losses.append(F.cross_entropy(logits[:-1].float(), window[0, self.half + 1 :]).double())
            if ffns is None:
                self.teacher.append(logits.bfloat16().cpu())
            else:
                dense = self.teacher[index].to(self.device)
                divergence += ops.divergence(logits.float(), dense.float()).mean().item()
                agreement += (logits.bfloat16().argmax(-1) == dense.argmax(-1)).double().mean().item()
            self.bar.update()
        count, losses = len(self.windows), torch.stack(losses).cpu()
        return _Second(losses, None, None) if ffns is None else _Second(losses, divergence / count, agreement / count)

    def _steps(self, decoder: GreedyDecoder, window: Tensor, ffns: SparseFFNs | None, dense_prefill: bool) -> Tensor:
        """[S/2, V] of the second half, after the first: each token a step."""
        with contextlib.nullcontext() if dense_prefill else _all_sparse(ffns):
            decoder.prefill(window[:, : self.half])
        found = []
        for at in range(self.half, window.shape[1]):
            decoder.token.copy_(window[:, at : at + 1])
            decoder.step()
            found.append(decoder.logits[0].clone())
        return torch.stack(found)

    def _at_once(self, window: Tensor, ffns: SparseFFNs | None, dense_prefill: bool) -> Tensor:
        """The same in one forward pass for each half."""
        from transformers import DynamicCache

        cache = {self.keyword: DynamicCache(config=self.model.config)}
        with contextlib.nullcontext() if dense_prefill else _all_sparse(ffns):
            self.model(input_ids=window[:, : self.half], use_cache=True, **cache)
        with _all_sparse(ffns):
            return self.model(input_ids=window[:, self.half :], use_cache=True, **cache).logits[0]


@contextlib.contextmanager
def _all_sparse(ffns: SparseFFNs | None) -> Iterator[None]:
    """Calls of any number of tokens run sparse; None: there is nothing that could."""
    if ffns is None:
        yield
        return
    before, ffns.max_sparse_tokens = ffns.max_sparse_tokens, math.inf
    try:
        yield
    finally:
        ffns.max_sparse_tokens = before


def _recorded(model: nn.Module, windows: Tensor, half: int) -> GreedyDecoder:
    """A decoder of the model as it is, for one sequence as long as a window and what is decoded after its first half."""
    torch.compiler.reset()  # which keeps no more than eight versions of a function
    decoder = GreedyDecoder(model, 1, max(windows.shape[1], half + max(NEW_TOKENS, TIMED_STEPS + 8)) + 8)
    decoder.record(windows[:1, :half])
    return decoder


def _decode(decoder: GreedyDecoder, tokenizer, windows: Tensor, half: int) -> dict:
    """Seconds of a decoded token at batch 1 after a prompt, and greedy continuations of the first windows' prompts."""
    decoder.prefill(windows[:1, :half])
    seconds = []
    for _ in range(4):
        decoder.step()
    for _ in range(TIMED_STEPS):
        _wait(decoder.device)
        start = time.perf_counter()
        decoder.step()
        _wait(decoder.device)
        seconds.append(time.perf_counter() - start)
    continued = torch.cat([decoder.decode(window[None, :half], NEW_TOKENS) for window in windows[:CONTINUED]]).cpu()
    return {
        "seconds_per_token": statistics.median(seconds),
        "continued": continued.tolist(),
        "text": _texts(tokenizer, continued),
    }


def _agrees_for(dense: list[list[int]], sparse: list[list[int]]) -> float:
    """MaskInputs until a continuation first differs, on average."""
    counts = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(dense, sparse, strict=True)
    ]
    return sum(counts) / len(counts)


def _texts(tokenizer, tokens: Tensor) -> list[str]:
    return [tokenizer.decode(one, skip_special_tokens=True) for one in tokens]


def _held(model: nn.Module) -> int | None:
    """Bytes that torch holds on the model's GPU; None without one."""
    device = next(model.parameters()).device
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
