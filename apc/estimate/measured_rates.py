"""How fast the kernels were: rates of `benchmarks/results.csv`, by the shape that is nearest. Shape letters as in `apc.clustering`."""

import csv
import math
from collections.abc import Callable
from functools import cache

from apc.config.load import CONFIGS
from apc.utils.errors import UserError

RESULTS = CONFIGS.parent / "benchmarks" / "results.csv"


@cache
def rate(operation: str, implementation: str, K: int, D: int, note: str = "") -> float:
    """The rate that `benchmarks/results.csv` has for an operation on an H100, at the shape that is nearest to K × D; of equals the last row.

    note: what the row's note begins with. Raises UserError if there is no such row.
    """
    return _nearest(_rows(operation, implementation, note), lambda row: _apart(row["K"], K) + _apart(row["D"], D))


@cache
def rates(operation: str, implementation: str, K: int, D: int) -> list[float]:
    """The slower and the faster of the rates as of `rate` at the shapes that are nearest in K and nearest in D: the same where one shape is both."""
    rows = _rows(operation, implementation)
    by_clusters = _nearest(rows, lambda row: (_apart(row["K"], K), _apart(row["D"], D)))
    return sorted((by_clusters, _nearest(rows, lambda row: (_apart(row["D"], D), _apart(row["K"], K)))))


def _rows(operation: str, implementation: str, note: str = "") -> list[dict]:
    with RESULTS.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["operation"], row["implementation"]) == (operation, implementation)
        ]
    rows = [row for row in rows if "H100" in row["device"] and row["note"].startswith(note)]
    if not rows:
        raise UserError(f"{RESULTS}: has no row for {operation}, {implementation} on an H100; run `make bench` on one")
    return rows


def _apart(measured: str, size: int) -> float:
    return abs(math.log(max(int(measured), 1) / max(size, 1)))


def _nearest(rows: list[dict], distance: Callable[[dict], object]) -> float:
    least = min(map(distance, rows))
    return float([row for row in rows if distance(row) == least][-1]["rate"])
