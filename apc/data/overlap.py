"""How much of a text is also in another text, from samples of their word sequences.

A sequence is `WORDS` consecutive words, regardless of case, punctuation, spacing and line breaks. In scripts without
spaces between words, three characters count as a word. A line of `SHORTEST` to `WORDS` - 1 words is also a sequence,
so that short documents are recognised in any order. A sample keeps the sequences with the smallest hashes. So memory
does not grow with the text, and a sequence with a small hash that two texts share is in the samples of both.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors

WORDS = 8
SHORTEST = 4  # words of a line; shorter lines, such as headings, recur in unrelated texts
SAMPLE = 1 << 19  # most sequences in a sample; their hashes take 4 MiB
_CHUNK = 1 << 20  # characters that are hashed at a time
_WORD, _CHARACTER = 3, 1  # in thirds of a word: a word; a character in scripts without spaces
_UNSPACED = (  # Thai and Lao, Myanmar, Khmer, kana, Han
    *((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200)),
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)),
)
_KIND, _VERSION = "apc-fit-sequences", 1  # of the file in a run's folder


@dataclass(frozen=True)
class Sequences:
    """A sample of a text's sequences.

    hashes: uint64 [n], distinct and ascending; short: bool [n], whether the sequence is a whole line of fewer than
    `WORDS` words; words: float32 [n], the sequence's part of its line's words (all of them for a short line, else the
    line's words divided by its sequences), 0 if it spans several lines.
    """

    hashes: np.ndarray
    words: np.ndarray
    short: np.ndarray

    @property
    def bound(self) -> int:
        """The sample has every sequence of the text whose hash is at most this."""
        return int(self.hashes[-1]) if len(self.hashes) == SAMPLE else 2**64 - 1


def sample(text: str) -> Sequences:
    """The text's sequences with the smallest hashes."""
    kept, pending = Sequences(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, bool)), 0
    parts = [kept]
    for found in _sequences(text):
        small = found.hashes <= np.uint64(kept.bound)
        parts.append(Sequences(found.hashes[small], found.words[small], found.short[small]))
        pending += int(small.sum())
        if pending > SAMPLE:
            kept, pending = _smallest(parts), 0
            parts = [kept]
    return _smallest(parts)


def shared(text: Sequences, other: Sequences) -> float:
    """The share of a text's distinct sequences that another text has too, from 0 to 1.

    If the lines are in another order, sequences across line breaks differ. So the words of recurring short lines and of
    recurring sequences within lines are counted too. The larger of the two counts is the numerator.
    """
    compared = text.hashes <= np.uint64(min(text.bound, other.bound))
    recurs = np.isin(text.hashes[compared], other.hashes, assume_unique=True)
    long = ~text.short[compared]
    most = max(recurs[long].sum(), text.words[compared][recurs].sum())
    return min(1.0, float(most) / max(1, long.sum()))


def save(path: Path, sequences: Sequences, digest: str) -> None:
    """Writes the hashes to a file. digest: that of the text's windows."""
    hashes = torch.tensor(sequences.hashes.view(np.int64).tolist(), dtype=torch.int64)
    save_tensors(path, _KIND, _VERSION, {"text": digest}, {"hashes": hashes})


def load(path: Path, digest: str | None) -> Sequences:
    """The sequences in a file. Raises UserError if it is damaged or its text has another digest."""
    header, tensors = load_tensors(path, _KIND, (_VERSION,))
    if not isinstance(header, dict) or header.get("text") != digest:
        raise UserError(f"{path}: belongs to another fit text than the codebook; restore it from a copy, or delete it")
    hashes = tensors["hashes"].numpy().view(np.uint64)
    return Sequences(hashes, np.zeros(len(hashes), np.float32), np.zeros(len(hashes), bool))


def _smallest(parts: list[Sequences]) -> Sequences:
    hashes, first = np.unique(np.concatenate([part.hashes for part in parts]), return_index=True)
    kept = first[:SAMPLE]
    words, short = (np.concatenate([getattr(part, name) for part in parts])[kept] for name in ("words", "short"))
    return Sequences(hashes[:SAMPLE], words, short)


def _sequences(text: str) -> Iterator[Sequences]:
    """Yields all sequences of the text, `_CHUNK` characters at a time."""
    rest, begins_line = "", True
    for start in range(0, len(text), _CHUNK):
        part = rest + unicodedata.normalize("NFKC", text[start : start + _CHUNK]).casefold()
        codes = np.frombuffer(part.encode("utf-32-le"), np.uint32)
        lengths = _lengths()[np.minimum(codes, len(_lengths()) - 1)]
        before, after = np.append(0, lengths[:-1]), np.append(lengths[1:], 0)
        alone, word = lengths == _CHARACTER, lengths == _WORD
        begins = np.flatnonzero(alone | (word & (before != _WORD)))
        ends = np.flatnonzero(alone | (word & (after != _WORD))) + 1
        known = len(begins) - (start + _CHUNK < len(text))  # the last word may go on
        if known < 1:
            continue
        words, length = _mixed(_spans(codes, begins[:known], ends[:known])), lengths[begins[:known]].astype(np.int64)
        total = np.cumsum(length)
        last = np.searchsorted(total, total - length + WORDS * _WORD)  # of the sequence that begins with each word
        last = last[last < known]
        first = np.arange(len(last))
        line = np.cumsum(codes == ord("\n"))[begins]
        within = line[first] == line[last]
        of_line = np.bincount(line[:known]) / np.bincount(line[first], within, line[known - 1] + 1).clip(1)
        yield Sequences(
            _mixed(_spans(words, first, last + 1)),
            np.where(within, of_line[line[first]], 0).astype("f4"),
            np.zeros(len(first), bool),
        )
        starts = np.flatnonzero(np.diff(line[:known], prepend=-1))  # of lines
        thirds, stops = np.add.reduceat(length, starts), np.append(starts[1:], known)
        short = (thirds >= SHORTEST * _WORD) & (thirds < WORDS * _WORD)
        short[0] &= begins_line
        short[-1] &= line[known - 1] != line[-1] or known == len(begins)  # else the line may go on
        starts, stops = starts[short], stops[short]
        yield Sequences(_mixed(_spans(words, starts, stops)), (stops - starts).astype("f4"), np.ones(len(starts), bool))
        rest = part[begins[len(first)] :][-_CHUNK:] if len(first) < len(begins) else ""
        if len(first):
            begins_line = bool(line[len(first)] != line[len(first) - 1])


@cache
def _lengths() -> np.ndarray:
    """For each code point below 0x40000: `_WORD` if it is part of a word, `_CHARACTER`, or 0 if it separates words."""
    lengths = np.array(
        [_WORD if unicodedata.category(chr(code))[0] in "LMN" else 0 for code in range(0x40000)], np.uint8
    )
    for first, end in _UNSPACED:
        lengths[first:end] = np.where(lengths[first:end], _CHARACTER, 0)
    return lengths


def _spans(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial hash of the values in each span [begin, end), modulo 2**64."""
    base, inverse = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xF1DE83E19937733D)  # their product is 1
    powers = np.cumprod(np.full(len(values), base))
    sums = np.append(np.uint64(0), np.cumsum(values.astype(np.uint64) * powers))
    return (sums[ends] - sums[begins]) * np.cumprod(np.full(len(values) + 1, inverse))[begins]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads hashes over all 64 bits, as the last step of SplitMix64 does (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
