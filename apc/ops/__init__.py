"""Operations on bit-packed patterns: fast on CPU and CUDA, exact on both; `reference.py` says what each of them means."""

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
from apc.ops.kl_div import divergence, divergence_triton
from apc.ops.low_bit import low_bit_scores, low_bit_scores_triton
from apc.ops.low_bit_sm80 import low_bit_scores_b1
from apc.ops.predict import MAX_TOKENS, bottleneck, predict_clusters, predict_clusters_triton
from apc.ops.score_curve import score_curve, score_curve_triton
from apc.ops.sparse_ffn import (
    NextLayer,
    can_find,
    sparse_ffn,
    sparse_ffn_ahead,
    sparse_ffn_hopper,
    sparse_ffn_triton,
    whole_passes,
)
from apc.ops.topk import straight_through, straight_through_triton, top_mask, top_mask_triton

__all__ = [
    "NextLayer",
    "MAX_TOKENS",
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
    "can_find",
    "cut_or_fill",
    "divergence",
    "divergence_triton",
    "low_bit_scores",
    "low_bit_scores_b1",
    "low_bit_scores_triton",
    "mask_size",
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
    "straight_through",
    "straight_through_triton",
    "top_mask",
    "top_mask_triton",
    "unpack",
    "whole_passes",
]
