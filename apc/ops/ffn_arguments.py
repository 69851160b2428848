"""Arguments of the sparse FFN's operations that travel together. Shape letters: see `apc.ops`.

They are named tuples, which torch.compile traces as it does plain tuples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apc.ops.score_curve import ScoreCurve

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # the CUDA kernel knows them by these indices
MAX_TOKENS = 4  # tokens per call of the kernels, which keep the sums of all tokens in registers
GROUP = 64  # consecutive neurons that share a spacing in a `SpacedCopy`
EPSILON = torch.finfo(torch.float32).eps  # what torch's rms_norm adds to the mean square of a float32 input


class FFNWeights(NamedTuple):
    """The matrices of a gated FFN. All have hidden's dtype. The row stride may exceed E."""

    gate: Tensor  # float [D, E]
    up: Tensor  # float [D, E]
    down: Tensor  # float [D, E], the transposed down projection
    activation: str = "silu"  # one of `ACTIVATIONS`


class PredictorWeights(NamedTuple):
    """The weights that predict a token's cluster: SiLU(rms_norm(x) · reduceᵀ + reduce_bias) · expandᵀ + expand_bias."""

    reduce: Tensor  # float [H, E]
    reduce_bias: Tensor  # float32 [H]
    expand: Tensor  # float [K, H]
    expand_bias: Tensor  # float32 [K]


class Candidates(NamedTuple):
    """Candidates for each token's cluster. The largest logit wins, ties to the lowest cluster."""

    logits: Tensor  # float32 [n, C]
    clusters: Tensor  # int32 [n, C]


class Prediction(NamedTuple):
    """The result of a predictor."""

    bottleneck: Tensor  # float32 [n, H], SiLU(rms_norm(x) · reduceᵀ + reduce_bias)
    candidates: Candidates


class ActiveNeurons(NamedTuple):
    """The neurons that each token keeps."""

    masks: Tensor  # uint8 [n, W], one per token; with candidates uint8 [K, W], one per cluster
    candidates: Candidates | None = None
    active_list: Tensor | None = None  # the same neurons listed per thread block, from `sparse_ffn_ahead`


class Refinement(NamedTuple):
    """Which active neurons have their rows of up and down read, and not only that of gate; w is a column of W_down."""

    # float32 [2]: the least 2 log(|act(gate · x)| · ‖w‖), plus `up_part`, with which up is read, and the least
    # 2 log(|act(gate · x) · (up · x)| · ‖w‖) with which down is read
    thresholds: Tensor
    norms: Tensor  # float32 [D], ‖w‖
    up_part: Tensor | None = None  # float32 [n, D]


class OutputDelta(NamedTuple):
    """Terms added to an FFN's output: bottleneck · correct + correct_bias, and the offset of each token's cluster."""

    bottleneck: Tensor | None = None  # float32 [n, H]
    correct: Tensor | None = None  # float [H, E]
    correct_bias: Tensor | None = None  # float32 [E]
    offsets: Tensor | None = None  # float [K, E]; needs candidates


class NextLayer(NamedTuple):
    """The next FFN, whose active neurons are to be listed."""

    neurons: int
    masks: Tensor  # uint8 [K, W]
    candidates: Candidates | None = None  # None: those that the same call predicts


class LowBitCopy(NamedTuple):
    """A copy of gate and up at few bits that scores neurons, and when a token's input takes part in it."""

    planes: Tensor  # uint8 [b, P, D, W], or by input [b, P, E, W], the lowest bit first
    curve: ScoreCurve
    projections: tuple[str, ...]  # of gate and up, those that are copied
    norms: Tensor | None = None  # float32 [E]; with these, the copy lies by input
    least: Tensor | None = None  # float32 []: the least |x_i| · norms_i of an input that takes part


class SpacedCopy(NamedTuple):
    """A copy of gate and up that gives their outputs: levels by input, with a spacing for each group of neurons."""

    planes: Tensor  # uint8 [b, 2, E, W], the lowest bit first
    spacings: Tensor  # bfloat16 [2, E, ⌈D / GROUP⌉]
    norms: Tensor  # float32 [E]
    least: Tensor  # float32 []: the least |x_i| · norms_i of an input that takes part


class LowRank(NamedTuple):
    """Low-rank updates b · a of the three projections, each (a [r, inputs], b [outputs, r])."""

    gate: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class Correction(NamedTuple):
    """What is added to an FFN's output: SiLU(rms_norm(x) · reduceᵀ + reduce_bias) · correct + correct_bias."""

    reduce: Tensor  # float [H, E]
    reduce_bias: Tensor  # float32 [H]
    correct: Tensor  # float [H, E]
    correct_bias: Tensor  # float32 [E]


class Stages(NamedTuple):
    """How a staged FFN decides, besides its weights."""

    copy: LowBitCopy | SpacedCopy
    thresholds: Tensor  # float32 [3]: the least score with which rows of gate, up and down are read
    norms: Tensor  # float32 [D], of the neurons' columns of the down projection
    low_rank: LowRank | None = None
    correction: Correction | None = None
