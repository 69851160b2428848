"""Predicts each token's cluster before its FFN runs: a bottleneck, then the clusters' logits, for a few tokens.

The `reduce` kernel computes the bottleneck. In the `score` kernel each program writes the best of its own
clusters, and the consumer takes the best of these candidates. Shape letters: see `apc.ops`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from apc.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton
from apc.ops.bits import describe, on_cpu
from apc.ops.ffn_arguments import EPSILON, MAX_TOKENS, Candidates, Prediction, PredictorWeights

_REDUCE_TILE = {"ROWS": 4, "num_warps": 8}  # ROWS: rows of the bottleneck's weights per program
SCORE_TILE = {"ROWS": 16, "num_warps": 8}  # ROWS: clusters per program


@triton.jit
def _reduce_kernel(
    hidden_ptr,  # float [n, E]
    weights_ptr,  # float [H, E]
    bias_ptr,  # float32 [H]
    inner_ptr,  # float32 [n, H], out
    E,
    H,
    epsilon,
    EARLY: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    h = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    weights = tl.load(
        weights_ptr + h[:, None] * E + e[None, :], mask=(h < H)[:, None] & (e < E)[None, :], other=0.0
    ).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=h < H, other=0.0)
    if EARLY:
        gdc_wait()
    for n in tl.static_range(N):
        hidden = tl.load(hidden_ptr + n * E + e, mask=e < E, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(hidden * hidden, axis=0) / E + epsilon)
        x = tl.sum(weights * hidden[None, :], axis=1) * scale + bias
        tl.store(inner_ptr + n * H + h, x * tl.sigmoid(x), mask=h < H)


@triton.jit
def store_best(weights, bias, inner, k, values_ptr, ids_ptr):
    """Write the largest logit of clusters k, and its cluster, to this program's element of [programs]."""
    logits = tl.sum(weights * inner[None, :], axis=1) + bias
    logits = tl.where(logits == logits, logits, float("-inf"))  # NaN input: any cluster is acceptable
    best = tl.max(logits, axis=0)
    tl.store(values_ptr + tl.program_id(0), best)
    tl.store(ids_ptr + tl.program_id(0), tl.min(tl.where(logits == best, k, 0x7FFFFFFF), axis=0))


@triton.jit
def _score_kernel(
    inner_ptr,  # float32 [n, H]
    weights_ptr,  # float [K, H]
    bias_ptr,  # float32 [K]
    values_ptr,  # float32 [n, C], out: the largest logit of each program's clusters
    ids_ptr,  # int32 [n, C], out: the cluster of that logit
    H,
    K,
    EARLY: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK_H)
    weights = tl.load(
        weights_ptr + k[:, None] * H + h[None, :], mask=(k < K)[:, None] & (h < H)[None, :], other=0.0
    ).to(tl.float32)
    bias = tl.load(bias_ptr + k, mask=k < K, other=float("-inf"))
    if EARLY:
        gdc_wait()
    for n in tl.static_range(N):
        inner = tl.load(inner_ptr + n * H + h, mask=h < H, other=0.0)
        store_best(weights, bias, inner, k, values_ptr + n * tl.num_programs(0), ids_ptr + n * tl.num_programs(0))


def predict_clusters(hidden: Tensor, predictor: PredictorWeights, by_triton: bool | None = None) -> Prediction:
    """The bottleneck and the candidates for each token's cluster, from FFN inputs float [n, E].

    by_triton: use the kernels, which take up to `MAX_TOKENS` tokens (None: on a GPU). Raises ValueError for
    other shapes.
    """
    by_triton = not on_cpu(hidden) if by_triton is None else by_triton
    n, E = check_hidden(hidden, by_triton)
    reduce, reduce_bias, expand, expand_bias = predictor
    H, K = len(reduce), len(expand)
    if reduce.shape != (H, E) or expand.shape != (K, H) or reduce_bias.shape != (H,) or expand_bias.shape != (K,):
        shapes = ", ".join(describe(value) for value in predictor)
        raise ValueError(
            "predict_clusters wants reduce [H, E], its bias [H], expand [K, H] and its bias [K] "
            f"for hidden {describe(hidden)}, got {shapes}"
        )
    inner, logits, clusters = torch.ops.apc.predict_clusters(hidden, *predictor, by_triton)
    return Prediction(inner, Candidates(logits, clusters))


def predict_clusters_triton(hidden: Tensor, predictor: PredictorWeights) -> Prediction:
    """`predict_clusters` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    prediction = empty_prediction(hidden, predictor.reduce, predictor.expand, SCORE_TILE["ROWS"])
    options = pdl_options(hidden.device)
    reduce_hidden(hidden, predictor.reduce, predictor.reduce_bias, prediction.bottleneck, options)
    score_clusters(prediction, predictor.expand, predictor.expand_bias, options, SCORE_TILE["ROWS"])
    return prediction


def score_clusters(
    prediction: Prediction, expand: Tensor, bias: Tensor, options: dict[str, bool], clusters_each: int
) -> None:
    """Write the candidates of a prediction from its bottleneck. clusters_each: clusters per program."""
    inner, (logits, clusters) = prediction
    (n, H), K = inner.shape, len(expand)
    tile = SCORE_TILE | {"ROWS": clusters_each}
    with torch.cuda.device_of(inner):
        _score_kernel[(logits.shape[1],)](
            inner, expand, bias, logits, clusters, H, K, N=n, BLOCK_H=triton.next_power_of_2(H), **options, **tile
        )


@torch.library.custom_op("apc::predict_clusters", mutates_args=())
def _predict_clusters(
    hidden: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor, by_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if by_triton:
        prediction = predict_clusters_triton(hidden, PredictorWeights(reduce, reduce_bias, expand, expand_bias))
        return prediction.bottleneck, *prediction.candidates
    inner = _bottleneck(hidden, reduce, reduce_bias, False)
    logits = inner @ expand.float().T + expand_bias
    best, clusters = logits.masked_fill(logits.isnan(), -torch.inf).max(-1, keepdim=True)
    return inner, best, clusters.int()


@_predict_clusters.register_fake
def _(
    hidden: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor, by_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inner, candidates = empty_prediction(hidden, reduce, expand, SCORE_TILE["ROWS"] if by_triton else len(expand))
    return inner, *candidates


def empty_prediction(hidden: Tensor, reduce: Tensor, expand: Tensor, clusters_each: int) -> Prediction:
    """An uninitialised prediction for FFN inputs [n, E], with one candidate per `clusters_each` clusters."""
    n, count = len(hidden), triton.cdiv(len(expand), clusters_each)
    floats = functools.partial(hidden.new_empty, dtype=torch.float32)
    candidates = Candidates(floats((n, count)), hidden.new_empty((n, count), dtype=torch.int32))
    return Prediction(floats((n, len(reduce))), candidates)


def check_hidden(hidden: Tensor, by_triton: bool) -> torch.Size:
    """The shape of FFN inputs. Raises ValueError unless they are float [n, E], and few enough for the kernels."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be float [n, E], got {describe(hidden)}")
    if by_triton and len(hidden) > MAX_TOKENS:
        raise ValueError(f"the kernels take up to {MAX_TOKENS} tokens, got hidden {describe(hidden)}")
    return hidden.shape


def bottleneck(hidden: Tensor, reduce: Tensor, bias: Tensor, by_triton: bool | None = None) -> Tensor:
    """SiLU(rms_norm(x) · reduceᵀ + bias), float32 [n, H]; hidden float [n, E], reduce [H, E], bias float32 [H].

    by_triton: as for `predict_clusters`. Raises ValueError for other shapes.
    """
    by_triton = not on_cpu(hidden) if by_triton is None else by_triton
    n, E = check_hidden(hidden, by_triton)
    if reduce.dim() != 2 or reduce.shape[1] != E or bias.shape != reduce.shape[:1]:
        raise ValueError(f"reduce {describe(reduce)} must be [H, {E}] and its bias {describe(bias)} [H]")
    return torch.ops.apc.bottleneck(hidden, reduce, bias, by_triton)


@torch.library.custom_op("apc::bottleneck", mutates_args=())
def _bottleneck(hidden: Tensor, reduce: Tensor, bias: Tensor, by_triton: bool) -> Tensor:
    if not by_triton:
        return F.silu(F.rms_norm(hidden.float(), hidden.shape[-1:]) @ reduce.float().T + bias)
    inner = hidden.new_empty((len(hidden), len(reduce)), dtype=torch.float32)
    reduce_hidden(hidden, reduce, bias, inner, pdl_options(hidden.device))
    return inner


@_bottleneck.register_fake
def _(hidden: Tensor, reduce: Tensor, bias: Tensor, by_triton: bool) -> Tensor:
    return hidden.new_empty((len(hidden), len(reduce)), dtype=torch.float32)


def reduce_hidden(hidden: Tensor, reduce: Tensor, bias: Tensor, inner: Tensor, options: dict[str, bool]) -> None:
    """Write the `bottleneck` to inner, float32 [n, H], by the Triton kernel."""
    (n, E), H = hidden.shape, len(reduce)
    with torch.cuda.device_of(hidden):
        grid, block = (triton.cdiv(H, _REDUCE_TILE["ROWS"]),), triton.next_power_of_2(E)
        _reduce_kernel[grid](
            hidden.contiguous(),
            reduce.contiguous(),
            bias,
            inner,
            E,
            H,
            EPSILON,
            N=n,
            BLOCK_E=block,
            **options,
            **_REDUCE_TILE,
        )


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel: programmatic dependent launch (EARLY) on GPUs that have it, from Hopper on.

    Such a kernel may start before the previous one has ended, and waits for it itself (`gdc_wait`).
    """
    early = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
