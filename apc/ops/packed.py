"""Matrices whose weights take 4 bits each, as the kernels for decoding on a GPU read them.

A weight is low + step · k, with k from 0 to 15. A group of consecutive weights in a row shares low and step, which take
8 bits each, as shares of the row's own units (`apc.data.quantise` finds them).

Shape letters: R rows, E weights of a row, G groups of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (32, 64, 128)  # sizes of a group that the kernels take
PER_WORD = 8  # weights in a word of 32 bits
_ALIGNED = 4  # words: rows start at multiples of 16 bytes


@dataclass(frozen=True)
class PackedRows:
    """A matrix [R, E] with 4 bits a weight.

    words: int32 [R, S]. A row holds E / 8 words of weights, then G bytes of steps, G bytes of lows, and the float32
    units of step and low; zeros fill it up to a multiple of 16 bytes. In a word, the weight with number i of 8 has the
    bits from 4 · (i // 2) on if i is even, and from 16 + 4 · (i // 2) on if it is odd: two neighbours become two
    numbers of 16 bits by one shift and one mask.
    """

    words: Tensor
    E: int
    group: int

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return torch.Size((len(self.words), self.E))

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.E // self.group

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return self.words.nbytes

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix's values, [R, E], computed in float32 and rounded to this type."""
        R, G, words = len(self.words), self.groups, self.words[:, : self.E // PER_WORD]
        index = torch.stack([words >> shift & 15 for shift in _shifts()], dim=2).view(R, G, self.group)
        rest = self.words[:, self.E // PER_WORD :].contiguous().view(torch.uint8)
        step, low = rest[:, :G].float(), rest[:, G : 2 * G].contiguous().view(torch.int8).float()
        at = _units_at(G)
        step_unit, low_unit = rest[:, at : at + 8].contiguous().view(torch.float32).unbind(1)
        step, low = step * step_unit[:, None], low * low_unit[:, None]
        return (low[:, :, None] + step[:, :, None] * index).view(R, self.E).to(dtype)


def pack_rows(index: Tensor, step: Tensor, low: Tensor, units: Tensor) -> PackedRows:
    """Packs weights low + step · index.

    index: integers from 0 to 15, [R, E]; step: uint8 [R, G] and low: int8 [R, G], in the units float32 [R, 2] of each
    row, step's first. Raises ValueError unless a group has one of the sizes `GROUPS`.
    """
    (R, E), G = index.shape, step.shape[1]
    group = E // G
    if group * G != E or group not in GROUPS:
        raise ValueError(f"{E} weights in {G} groups: a group must have {', '.join(map(str, GROUPS))}")
    each = index.int().view(R, E // PER_WORD, PER_WORD)
    words = torch.zeros(R, E // PER_WORD, dtype=torch.int32, device=index.device)
    for i, shift in enumerate(_shifts()):
        words |= each[:, :, i] << shift
    used = E // 2 + _units_at(G) + 8
    rows = torch.zeros(R, math.ceil(used / 4 / _ALIGNED) * _ALIGNED * 4, dtype=torch.uint8, device=index.device)
    rows[:, : E // 2] = words.view(torch.uint8)
    rows[:, E // 2 : E // 2 + G] = step
    rows[:, E // 2 + G : E // 2 + 2 * G] = low.view(torch.uint8)
    rows[:, used - 8 : used] = units.float().contiguous().view(torch.uint8)
    return PackedRows(rows.view(torch.int32), E, group)


def _shifts() -> list[int]:
    """Where the bits of a word's weights begin."""
    return [4 * (i // 2) + 16 * (i % 2) for i in range(PER_WORD)]


def _units_at(G: int) -> int:
    """The bytes between a row's weights and its units."""
    return math.ceil(2 * G / 4) * 4
