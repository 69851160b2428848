"""Perplexity over the bytes that a token reads: one series for each policy, and the frontier of all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apc.compare.finished import Finished
from apc.data.quantise import FULL_BITS
from apc.evaluate import tables

USEFUL, MAX_USEFUL = 2.0, 4.0  # see `largest_useful`


@dataclass(frozen=True)
class Point:
    """A policy in one run. bytes: per cent of the dense FFN's at 16 bits."""

    policy: str
    bytes: float
    perplexity: float
    run: str
    bits: int  # of a stored weight of the FFN, as `model.ffn_bits` says


@dataclass
class Series:
    """A policy's points, on an FFN stored at `bits` bits; for dense at any bits."""

    policy: str
    bits: int | None  # None: at any
    is_bound: bool
    points: list[Point] = field(default_factory=list)

    @property
    def few_bits(self) -> bool:
        """Whether it is a policy on an FFN stored at few bits."""
        return self.bits not in (None, FULL_BITS)

    @property
    def name(self) -> str:
        """The policy, and the bits of the FFN if they are few."""
        return f"{self.policy}, {self.bits}-bit FFN" if self.few_bits else self.policy

    def is_worth_drawing(self) -> bool:
        """Whether it has a point other than the level of the dense model at 16 bits."""
        return any(point.bytes <= 100 and (self.policy, point.bits) != ("dense", FULL_BITS) for point in self.points)

    def is_usable(self) -> bool:
        """Whether it is an alternative to the dense model at 16 bits."""
        return not self.is_bound and self.is_worth_drawing()

    def label(self, point: Point) -> str:
        """What the point is: its policy and run, or the bits of the dense model if they are few."""
        if self.bits is not None:
            return f"{self.name} ({point.run})"
        return "" if point.bits == FULL_BITS else f"{self.policy}, {point.bits}-bit FFN"


def short_names(runs: Sequence[Finished]) -> dict[Path, str]:
    """The runs' names by folder, without the words that all of them begin with."""
    prefix = os.path.commonprefix([run.name for run in runs]).rfind("-") + 1 if len(runs) > 1 else 0
    return {run.folder: run.name[prefix:] for run in runs}


def all_series(runs: Sequence[Finished]) -> list[Series]:
    """The series of runs that can be compared with each other. Equal results of several runs are one point."""
    names = short_names(runs)
    found: dict[tuple, Series] = {}
    known = set()
    for run in runs:
        bits = run.config.model.ffn_bits or FULL_BITS
        for name, record in run.policies.items():
            x, y = 100 * tables.to_float(record.get("bytes_share")), tables.to_float(record.get("perplexity"))
            if not (math.isfinite(x) and math.isfinite(y)) or (name, bits, round(x, 2), round(y, 2)) in known:
                continue
            known.add((name, bits, round(x, 2), round(y, 2)))
            key = name, None if name == "dense" else bits
            series = found.setdefault(key, Series(*key, is_bound=bool(record.get("excludes_finding"))))
            series.points.append(Point(name, x, y, names[run.folder], bits))
    return list(found.values())


def best(points: Iterable[Point]) -> list[Point]:
    """The points with a lower perplexity than all others with at most as many bytes, by increasing bytes.

    Bytes count as equal if they round to the same whole per cent.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (round(point.bytes), point.perplexity)):
        if not found or point.perplexity < found[-1].perplexity:
            found.append(point)
    return found


def dense_perplexity(every: Sequence[Series]) -> float | None:
    """The perplexity of the dense model at 16 bits; None if no run has it."""
    levels = (point for series in every if series.policy == "dense" for point in series.points)
    return next((point.perplexity for point in levels if point.bits == FULL_BITS), None)


def largest_useful(every: Sequence[Series]) -> float:
    """The perplexity up to which points are worth drawing.

    It is `USEFUL` times that of the dense model at 16 bits (without one, of the lowest point), or up to `MAX_USEFUL`
    times if a policy's best point would not be drawn without that. Points with more bytes than the dense model do not
    count.
    """
    values = [[point.perplexity for point in series.points if point.bytes <= 100] for series in every]
    lowest = [min(each) for each in values if each]
    dense = dense_perplexity(every) or min(lowest)
    return max(USEFUL * dense, *(value for value in lowest if value <= MAX_USEFUL * dense))
