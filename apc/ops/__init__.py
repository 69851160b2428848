"""Operations on packed patterns and sparse FFNs, on CPU and CUDA.

`reference.py` defines the exact operations in plain torch: every implementation gives the same integers. The tests
compare the others with their formulas. A function whose name ends in `_triton`, `_b1` or `_hopper` is one kernel; the
function without the suffix chooses an implementation.

Shape letters, for all files of this package:

- G groups (usually the layers of a model), N patterns (rows), K clusters, D neurons.
- W bytes of a packed row of D bits: ⌈D/8⌉ rounded up to a multiple of 16, `row_bytes(D)`.
- n tokens of a decoding step, E hidden size, H bottleneck of the predictor, C candidates for a token's cluster.
- P projections and b bits of a low-bit copy, V entries of the vocabulary.
"""

from apc.ops.accumulate import (
    accumulate,
    accumulate_triton,
    accumulate_weighted,
    accumulate_weighted_triton,
    row_scales,
    row_totals,
    row_totals_triton,
    scales_of,
)
from apc.ops.assign import assign, assign_b1, assign_triton, assign_weighted, assign_weighted_triton
from apc.ops.assign_capacity import assign_with_capacity
from apc.ops.assign_hamming import assign_hamming
from apc.ops.binarize import binarize, binarize_triton, cut_or_fill
from apc.ops.bits import mask_size, pack, pack_triton, popcount, popcount_triton, row_bytes, unpack
from apc.ops.copy_scores import nominate_triton
from apc.ops.ffn_arguments import (
    GROUP,
    MAX_TOKENS,
    ActiveNeurons,
    Candidates,
    Correction,
    FFNWeights,
    LowBitCopy,
    LowRank,
    NextLayer,
    OutputDelta,
    Prediction,
    PredictorWeights,
    Refinement,
    SpacedCopy,
    Stages,
)
from apc.ops.kl_div import divergence, divergence_triton
from apc.ops.low_bit import low_bit_scores, low_bit_scores_triton
from apc.ops.low_bit_sm80 import low_bit_scores_b1
from apc.ops.predict import bottleneck, predict_clusters, predict_clusters_triton
from apc.ops.score_curve import ScoreCurve, score_curve, score_curve_triton
from apc.ops.sparse_ffn import (
    can_prefetch,
    sparse_ffn,
    sparse_ffn_ahead,
    sparse_ffn_hopper,
    sparse_ffn_triton,
    use_side_stream,
)
from apc.ops.staged_ffn import staged_ffn, staged_ffn_triton, staged_reads
from apc.ops.topk import straight_through, straight_through_triton, top_mask, top_mask_triton

__all__ = [
    "ActiveNeurons",
    "Candidates",
    "Correction",
    "FFNWeights",
    "GROUP",
    "LowBitCopy",
    "LowRank",
    "MAX_TOKENS",
    "NextLayer",
    "OutputDelta",
    "Prediction",
    "PredictorWeights",
    "Refinement",
    "ScoreCurve",
    "SpacedCopy",
    "Stages",
    "accumulate",
    "accumulate_triton",
    "accumulate_weighted",
    "accumulate_weighted_triton",
    "assign",
    "assign_b1",
    "assign_hamming",
    "assign_triton",
    "assign_weighted",
    "assign_weighted_triton",
    "assign_with_capacity",
    "binarize",
    "binarize_triton",
    "bottleneck",
    "can_prefetch",
    "cut_or_fill",
    "divergence",
    "divergence_triton",
    "low_bit_scores",
    "low_bit_scores_b1",
    "low_bit_scores_triton",
    "mask_size",
    "nominate_triton",
    "pack",
    "pack_triton",
    "popcount",
    "popcount_triton",
    "predict_clusters",
    "predict_clusters_triton",
    "row_bytes",
    "row_scales",
    "row_totals",
    "row_totals_triton",
    "scales_of",
    "score_curve",
    "score_curve_triton",
    "sparse_ffn",
    "sparse_ffn_ahead",
    "sparse_ffn_hopper",
    "sparse_ffn_triton",
    "staged_ffn",
    "staged_ffn_triton",
    "staged_reads",
    "straight_through",
    "straight_through_triton",
    "top_mask",
    "top_mask_triton",
    "unpack",
    "use_side_stream",
]
