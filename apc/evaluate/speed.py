"""Decoding speed of policies in tokens a second, and how their predictions differ from the dense model's.

The first half of each scored window is a prompt. The second half is then scored twice: with FFNs sparse throughout, and
after a dense prefill, as in real use. On a GPU each token of the second half is one step of the same CUDA graph that is
timed.

A machine's speed drifts, and other work on it comes and goes. So policies are timed in turn, in rounds: dense, a, b,
dense, a, b, …, dense. Each time is compared with the dense model's time at that moment, which is interpolated between
the dense times before and after it. So a steady drift cancels, and differences between rounds show the noise.

On the CPU, decoders of all policies exist side by side, and there are eight short rounds. On a GPU, removing a policy's
sparse FFNs makes its CUDA graph useless, because the down projections move in memory. Recording a graph again takes
half a minute. But a GPU's times are steady. So a policy is timed twice with one graph, before and after its scoring,
and the dense model once more at the end: dense, dense, a, a, b, b, dense.

Shape letters: n windows, S tokens in a window, V entries of the vocabulary.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.data.ffn import find_ffns, first_device
from apc.evaluate.metrics import perplexity, perplexity_ratio
from apc.predict.predictor import Predictor
from apc.sparse.decode import GreedyDecoder, cache_keyword, config_of
from apc.sparse.policies import kernel_policies, make_policy
from apc.sparse.sparse_ffn import KERNEL_ON, SparseFFNs, check_model
from apc.sparse.sparsify import handle_of, restore, sparsify
from apc.utils.errors import UserError
from apc.utils.machine import cpu_name
from apc.utils.progress import Bar
from apc.utils.progress import progress as progress_bar

WINDOWS = 32  # most windows to score
CONTINUED = 4  # windows whose prompts are also continued greedily; one if nothing is scored
NEW_TOKENS = 64  # of each continuation
ROUNDS = {"cpu": 8, "cuda": 2}  # how often a policy is timed
TIMED_STEPS = 32  # of a policy, in all rounds together


def check(model: nn.Module, policies: Sequence[str], seq_len: int) -> None:
    """Raises UserError unless a policy and the model's FFNs have kernels, and windows of `seq_len` are long enough."""
    if not set(policies) & set(known := kernel_policies(first_device(find_ffns(model)).type)):
        problem = f"no kernel on this device runs any of policies=[{','.join(policies)}]"
        raise UserError(f"speed=true: {problem}; add one of {', '.join(known)}")
    if seq_len < 4:
        problem = f"windows of {seq_len} tokens are too short for a prompt and a continuation"
        raise UserError(f"speed=true: {problem}; raise data.seq_len")
    try:
        check_model(find_ffns(model))
    except UserError as error:
        problem = str(error).removesuffix("; use kernel=None")
        raise UserError(f"speed=true: {problem}; leave out speed=true for this model") from error


def with_kernels(
    model: nn.Module, codebook: Codebook, predictor: Predictor | None, policies: Sequence[str], seed: int = 0
) -> list[str]:
    """Those of the policies that a kernel runs on the model's device, as codebook and predictor are."""
    device = first_device(find_ffns(model)).type
    known, way = kernel_policies(device), KERNEL_ON[device]
    runs = lambda name: name in known and make_policy(name, codebook, predictor, seed).kernel_by(way) is not None
    return [name for name in policies if runs(name)]


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer,
    codebook: Codebook,
    predictor: Predictor | None,
    windows: Tensor,
    bytes_shares: Mapping[str, float | None],
    seed: int = 0,
    progress: bool = True,
    known: Mapping[str, dict] | None = None,
) -> dict:
    """Speed and quality of the dense model and of the policies with kernels, at batch 1. Leaves the model dense.

    `apc.evaluate.tables.speed_tables` shows the result. windows: int64 [n, S], S at least 4; bytes_shares: the policies
    with the bytes that they read, as shares of the dense FFN's, or None if unknown; known: records of the dense model
    and these policies as `Evaluator.policies` returns them, whose perplexities are shown, and nothing is scored here.

    Raises UserError as `check` does.
    """
    check(model, list(bytes_shares), windows.shape[1])
    names = with_kernels(model, codebook, predictor, list(bytes_shares), seed)
    left_out = [name for name in bytes_shares if name != "dense" and name not in names]
    windows = windows[torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()]
    half = windows.shape[1] // 2
    prompts = windows[: CONTINUED if known is None else 1, :half]
    restore(model)
    records: list[dict] = []
    times: list[Timing] = []
    decoders: dict[str, GreedyDecoder] = {}

    def installed(name: str, max_sparse_tokens: float | None) -> SparseFFNs | None:
        """Makes the model run the policy; None for the dense model."""
        handle = handle_of(sparsify(model, codebook, predictor, name, seed, "auto", max_sparse_tokens))
        assert handle is None or isinstance(handle, SparseFFNs)  # as with any kernel
        return handle

    scored = len(windows) if known is None else 0
    with progress_bar(scored * (1 + 2 * len(names)), "speed", enabled=progress) as bar:
        scorer = _Scorer(model, windows, half, bar)
        on_gpu = scorer.device.type == "cuda"
        for name in ("dense", *names):
            bar.update(0, name)
            bytes_before, crossover = _gpu_bytes(model), None
            ffns = installed(name, None)
            bytes_held = _gpu_bytes(model) - bytes_before
            if ffns is not None:
                crossover, ffns.max_sparse_tokens = ffns.max_sparse_tokens, 1
            decoder = _recorded(model, windows, half)
            if on_gpu:
                times.append(_time(name, decoder, prompts[:1]))
            if known is None:
                record = scorer.record(name, decoder, ffns)
            else:
                same = ("policy", "perplexity", "ratio", "ratio_low", "ratio_high")
                record = {key: known[name][key] for key in same}
                record |= dict.fromkeys(("perplexity_masked", "divergence", "agreement"))
            continued = torch.cat([decoder.decode(prompt, NEW_TOKENS) for prompt in prompts.split(1)]).cpu()
            record |= {"continued": continued.tolist(), "text": _texts(tokenizer, continued)}
            record["own_steps"] = decoder.reason
            if ffns is not None:
                record["agrees_for"] = _mean_agreement(records[0]["continued"], record["continued"])
                record["bytes_held"] = bytes_held if on_gpu else None
                record["pays_up_to"] = None if ffns.kernel == "torch" else crossover
            records.append(record)
            if on_gpu:
                times.append(_time(name, decoder, prompts[:1]))
            else:
                decoder.prefill(prompts[:1])
                decoders[name] = decoder
            restore(model)
        bar.update(0, "rounds")
        rounds = 0 if on_gpu else ROUNDS["cpu"]
        for name in [*["dense", *names] * rounds, "dense"]:
            installed(name, 1)
            if on_gpu:
                times.append(_time(name, _recorded(model, windows, half), prompts[:1]))
            else:
                times.append(_time(name, decoders[name]))
    restore(model)
    ratios = paired_ratios(times)
    for record in records:
        own = [timing.seconds for timing in times if timing.policy == record["policy"]]
        record |= {"seconds_per_token": statistics.median(own), "seconds_low": min(own), "seconds_high": max(own)}
        record |= speed_up(ratios[record["policy"]], bytes_shares.get(record["policy"]))
    return {
        "machine": torch.cuda.get_device_name(scorer.device) if on_gpu else cpu_name(),
        "windows": scored,
        "prompt": half,
        "policies": records,
        "left_out": left_out,
        "prompts": _texts(tokenizer, prompts),
    }


@dataclass(frozen=True)
class Timing:
    """Seconds per token of a policy in one round, and the moment of the measurement in seconds."""

    policy: str
    moment: float
    seconds: float


def paired_ratios(times: Sequence[Timing]) -> dict[str, list[float]]:
    """For each policy and round: the dense model's time at that moment, divided by the policy's.

    times: in order; the first and the last are dense. The dense time at a moment is interpolated between the ones
    before and after it.
    """
    dense = [timing for timing in times if timing.policy == "dense"]
    known = [timing.moment for timing in dense], [timing.seconds for timing in dense]
    ratios: dict[str, list[float]] = {}
    for timing in times:
        ratios.setdefault(timing.policy, []).append(float(np.interp(timing.moment, *known)) / timing.seconds)
    return ratios


def speed_up(ratios: Sequence[float], bytes_share: float | None) -> dict[str, float | str | None]:
    """The speed-up over dense: the median of the rounds' ratios, and their range without the highest and lowest eighth.

    `times_dense` is None where a figure would mislead, and `unclear` says why: rounds disagree about which is faster,
    or they gain more than is possible by reading only `bytes_share` of the dense FFN's bytes.
    """
    ordered = sorted(ratios)
    cut = len(ordered) // 8
    low, high = ordered[cut], ordered[-1 - cut]
    most, unclear = 1 / bytes_share if bytes_share else math.inf, None
    if low < 1 < high:
        unclear = (
            f"no difference from dense beyond the noise: rounds gave {low:.2f} to {high:.2f} × its speed; a quiet "
            "machine has less noise"
        )
    elif low > most:
        unclear = (
            f"rounds gave {low:.2f} to {high:.2f} × the dense speed, but the bytes read allow at most {most:.2f} ×; "
            "other work slowed the dense model, or it is slow by itself: measure again on a quiet machine"
        )
    figures = {"times_low": low, "times_high": high, "unclear": unclear}
    return {"times_dense": None if unclear else statistics.median(ordered)} | figures


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
        self.dense = torch.zeros(0)  # the dense model's losses

    def record(self, name: str, decoder: GreedyDecoder, ffns: SparseFFNs | None) -> dict:
        """The record of the model with its present FFNs, without times. The dense model's is the first."""
        losses, difference = self._score(decoder, ffns, dense_prefill=True)
        if ffns is None:
            self.dense = all_sparse = losses
        else:
            all_sparse, _ = self._score(decoder, ffns, dense_prefill=False)
        return _record(name, self.dense, losses, all_sparse) | difference

    def _score(
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
    decoder = GreedyDecoder(model, 1, max(windows.shape[1], half + max(NEW_TOKENS, 2 * TIMED_STEPS)) + 8)
    decoder.record(windows[:1, :half])
    return decoder


def _time(policy: str, decoder: GreedyDecoder, prompt: Tensor | None = None) -> Timing:
    """The median time of one round's steps, after one untimed step. prompt: if given, prefilled first."""
    if prompt is not None:
        decoder.prefill(prompt)
    decoder.step()
    seconds = []
    for _ in range(TIMED_STEPS // ROUNDS[decoder.device.type]):
        _wait(decoder.device)
        start = time.perf_counter()
        decoder.step()
        _wait(decoder.device)
        seconds.append(time.perf_counter() - start)
    return Timing(policy, start, statistics.median(seconds))


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
