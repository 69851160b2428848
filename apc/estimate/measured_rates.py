"""Kernel rates from `benchmarks/results.csv`, for the nearest measured shape. K clusters, D neurons."""

import csv
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

from apc.utils.errors import UserError

# In a wheel, the table lies beside this file; in a checkout, in benchmarks/.
_INSTALLED = Path(__file__).resolve().with_name("results.csv")
RESULTS = _INSTALLED if _INSTALLED.is_file() else _INSTALLED.parents[2] / "benchmarks" / "results.csv"


@cache
def rate(operation: str, implementation: str, K: int, D: int, note: str = "") -> float:
    """The latest rate of an operation on an H100, at the measured shape nearest to K × D.

    note: the beginning of the row's note. Raises UserError if there is no such row.
    """
    return _nearest(_rows(operation, implementation, note), lambda row: (_apart(row["K"], K) + _apart(row["D"], D),))


@cache
def rates(operation: str, implementation: str, K: int, D: int) -> list[float]:
    """The slower and the faster of two rates: at the shape nearest in K, and at the shape nearest in D."""
    rows = _rows(operation, implementation)
    nearest_in_k = _nearest(rows, lambda row: (_apart(row["K"], K), _apart(row["D"], D)))
    nearest_in_d = _nearest(rows, lambda row: (_apart(row["D"], D), _apart(row["K"], K)))
    return sorted((nearest_in_k, nearest_in_d))


def _rows(operation: str, implementation: str, note: str = "") -> list[dict[str, str]]:
    wanted = (operation, implementation)
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["operation"], row["implementation"]) == wanted]
    rows = [row for row in rows if "H100" in row["device"] and row["note"].startswith(note)]
    if not rows:
        raise UserError(f"{RESULTS}: has no row for {operation}, {implementation} on an H100; run `make bench` on one")
    return rows


def _apart(measured: str, size: int) -> float:
    return abs(math.log(max(int(measured), 1) / max(size, 1)))


def _nearest(rows: list[dict[str, str]], distance: Callable[[dict[str, str]], tuple[float, ...]]) -> float:
    """The rate of the nearest row; of equally near rows, the last."""
    least = min(map(distance, rows))
    return float([row for row in rows if distance(row) == least][-1]["rate"])
