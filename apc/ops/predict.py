"""Which cluster a token is of, before its FFN runs: a bottleneck, and the largest of the clusters' logits, for a few tokens.

`reduce` makes the bottleneck, `score` the logits, of which each program keeps the best of its clusters: whoever wants the cluster finds the best of those.

Shape letters: n tokens, E hidden size, H bottleneck, K clusters, C candidates.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apc.ops.bits import describe, on_cpu
from apc.ops.sparse_ffn_sm90 import EPSILON

MAX_TOKENS = 4  # in a call of the kernels, whose registers hold the sums of all
_REDUCE_TILE = {"ROWS": 4, "num_warps": 8}  # weights of the bottleneck, and of clusters, whose rows a program reads
SCORE_TILE = {"ROWS": 16, "num_warps": 8}


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
    """Of clusters k the largest logit and whose it is, to this program's place."""
    logits = tl.sum(weights * inner[None, :], axis=1) + bias
    logits = tl.where(logits == logits, logits, float("-inf"))  # of an input that is no number any cluster will do
    best = tl.max(logits, axis=0)
    tl.store(values_ptr + tl.program_id(0), best)
    tl.store(ids_ptr + tl.program_id(0), tl.min(tl.where(logits == best, k, 0x7FFFFFFF), axis=0))


@triton.jit
def _score_kernel(
    inner_ptr,  # float32 [n, H]
    weights_ptr,  # float [K, H]
    bias_ptr,  # float32 [K]
    values_ptr,  # float32 [n, P], out: the largest logit of each program's clusters
    ids_ptr,  # int32 [n, P], out: whose it is
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


def predict_clusters(
    hidden: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    by_triton: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FFN inputs float [n, E] → the bottleneck float32 [n, H], and candidates for each token's cluster: logits float32 [n, C] and clusters int32 [n, C].

    The token's cluster is the candidate of the largest logit, of equal ones the lowest: SiLU(rms_norm(x) · reduceᵀ + bias) · expandᵀ + bias. reduce
    [H, E] and expand [K, H] of any float type, biases float32 [H], [K]. by_triton: by the kernels, which take up to `MAX_TOKENS` tokens (None: on a
    GPU). Raises ValueError for other shapes.
    """
    by_triton = not on_cpu(hidden) if by_triton is None else by_triton
    n, E = check_hidden(hidden, by_triton)
    H, K = len(reduce), len(expand)
    if reduce.shape != (H, E) or expand.shape != (K, H) or reduce_bias.shape != (H,) or expand_bias.shape != (K,):
        given = ", ".join(describe(value) for value in (reduce, reduce_bias, expand, expand_bias))
        raise ValueError(
            f"predict_clusters wants reduce [H, E], its bias [H], expand [K, H] and its bias [K] for hidden {describe(hidden)}, got {given}"
        )
    return torch.ops.apc.predict_clusters(hidden, reduce, reduce_bias, expand, expand_bias, by_triton)


def predict_clusters_triton(
    hidden: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`predict_clusters` by its Triton kernels: for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1."""
    (inner, values, ids), early = (
        like_predictions(hidden, reduce, expand, SCORE_TILE["ROWS"]),
        launch_early(hidden.device),
    )
    reduce_hidden(hidden, reduce, reduce_bias, inner, early)
    score_clusters(inner, expand, expand_bias, values, ids, early, **SCORE_TILE)
    return inner, values, ids


def score_clusters(
    inner: Tensor, expand: Tensor, bias: Tensor, values: Tensor, ids: Tensor, how: dict[str, bool], **tile: int
) -> None:
    (n, H), K = inner.shape, len(expand)
    with torch.cuda.device_of(inner):
        _score_kernel[(values.shape[1],)](
            inner, expand, bias, values, ids, H, K, N=n, BLOCK_H=triton.next_power_of_2(H), **how, **tile
        )


@torch.library.custom_op("apc::predict_clusters", mutates_args=())
def _predict_clusters(
    hidden: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor, by_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if by_triton:
        return predict_clusters_triton(hidden, reduce, reduce_bias, expand, expand_bias)
    inner = _bottleneck(hidden, reduce, reduce_bias, False)
    logits = inner @ expand.float().T + expand_bias
    values, ids = logits.masked_fill(logits.isnan(), -torch.inf).max(-1, keepdim=True)
    return inner, values, ids.int()


@_predict_clusters.register_fake
def _(
    hidden: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor, by_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return like_predictions(hidden, reduce, expand, SCORE_TILE["ROWS"] if by_triton else len(expand))


def like_predictions(hidden: Tensor, reduce: Tensor, expand: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `predict_clusters` gives, of so many clusters a candidate."""
    n, count = len(hidden), triton.cdiv(len(expand), rows)
    floats = functools.partial(hidden.new_empty, dtype=torch.float32)
    return floats((n, len(reduce))), floats((n, count)), hidden.new_empty((n, count), dtype=torch.int32)


def check_hidden(hidden: Tensor, by_triton: bool) -> torch.Size:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be float [n, E], got {describe(hidden)}")
    if by_triton and len(hidden) > MAX_TOKENS:
        raise ValueError(f"the kernels take up to {MAX_TOKENS} tokens, got hidden {describe(hidden)}")
    return hidden.shape


def bottleneck(hidden: Tensor, reduce: Tensor, bias: Tensor, by_triton: bool | None = None) -> Tensor:
    """hidden float [n, E], reduce [H, E], bias float32 [H] → SiLU(rms_norm(x) · reduceᵀ + bias), float32 [n, H]; by_triton as for `predict_clusters`."""
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
    reduce_hidden(hidden, reduce, bias, inner, launch_early(hidden.device))
    return inner


@_bottleneck.register_fake
def _(hidden: Tensor, reduce: Tensor, bias: Tensor, by_triton: bool) -> Tensor:
    return hidden.new_empty((len(hidden), len(reduce)), dtype=torch.float32)


def reduce_hidden(hidden: Tensor, reduce: Tensor, bias: Tensor, inner: Tensor, how: dict[str, bool]) -> None:
    (n, E), H = hidden.shape, len(reduce)
    with torch.cuda.device_of(hidden):
        grid, block = (triton.cdiv(H, _REDUCE_TILE["ROWS"]),), triton.next_power_of_2(E)
        _reduce_kernel[grid](
            hidden.contiguous(), reduce, bias, inner, E, H, EPSILON, N=n, BLOCK_E=block, **how, **_REDUCE_TILE
        )


@functools.cache
def launch_early(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that waits by itself for the one before it."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
