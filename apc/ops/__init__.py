"""Operations on bit-packed patterns: fast on CPU and CUDA, exact on both; `reference.py` says what each of them means."""

from apc.ops.assign import assign, assign_triton, assign_weighted, assign_weighted_triton
from apc.ops.bits import cut_or_fill, mask_size, pack, popcount, row_bytes, top_mask, unpack
from apc.ops.update import accumulate, accumulate_triton, accumulate_weighted, accumulate_weighted_triton, binarize, row_scales, row_totals, scales_of

__all__ = [
    "accumulate",
    "accumulate_triton",
    "accumulate_weighted",
    "accumulate_weighted_triton",
    "assign",
    "assign_triton",
    "assign_weighted",
    "assign_weighted_triton",
    "binarize",
    "cut_or_fill",
    "mask_size",
    "pack",
    "popcount",
    "row_bytes",
    "row_scales",
    "row_totals",
    "scales_of",
    "top_mask",
    "unpack",
]
