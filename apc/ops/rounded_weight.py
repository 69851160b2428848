"""Matrices of 8 bits a weight: as rows for kernels, and as a weight that looks like one of the model's own type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
FIXED = "weights that are stored at 8 bits can't be changed, moved or converted; do that before rounding"
_AT_ONCE = 64  # rows whose values are computed together: they stay in the cache


@dataclass(frozen=True)
class RoundedRows:
    """A matrix whose rows are rounded to 8 bits."""

    values: Tensor  # int8 [R, n]
    scales: Tensor  # float32 [R]
    evens_first: bool  # how the elements of a step are ordered
    columns: Tensor | None = None  # float32 [n], further factors, in the order of the elements

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.values.shape

    def at(self, numbers: Tensor) -> "RoundedRows":
        """A copy of the rows with these numbers, int64 [m]."""
        values, scales = (each.index_select(0, numbers) for each in (self.values, self.scales))
        return RoundedRows(values, scales, self.evens_first, self.columns)

    def clone(self) -> "RoundedRows":
        """A copy in memory of its own."""
        columns = None if self.columns is None else self.columns.clone()
        return RoundedRows(self.values.clone(), self.scales.clone(), self.evens_first, columns)

    def unrounded(self, dtype: torch.dtype) -> Tensor:
        """The values [R, n] of this type, each in its place."""
        from apc.ops._vectors import STEP  # imports numba

        n, result = self.shape[1], torch.empty(self.shape, dtype=dtype)
        whole = n // STEP * STEP if self.evens_first else 0
        for values, scales, to in zip(
            *(each.split(_AT_ONCE) for each in (self.values, self.scales, result)), strict=True
        ):
            floats = values * scales[:, None]
            if self.columns is not None:
                floats *= self.columns
            to[:, whole:] = floats[:, whole:]
            pairs = floats[:, :whole].unflatten(1, (-1, 2, STEP // 2)).transpose(2, 3)
            to[:, :whole].unflatten(1, (-1, STEP // 2, 2)).copy_(pairs)
        return result


class RoundedWeight(Tensor):
    """A matrix [R, n] in rows of 8 bits, or if `transposed` the matrix whose columns these are.

    Operations on it get its values, which are computed anew for each: a copy in the model's type exists only while an
    operation runs. An embedding computes only its tokens' rows. What would change the weight raises TypeError. `direct`
    has functions that take the place of operations which can read the rows themselves.
    """

    rows: RoundedRows
    transposed: bool
    direct: dict[Any, Callable[..., Any]] = {}

    @staticmethod
    def __new__(cls, rows: RoundedRows, dtype: torch.dtype, transposed: bool = False) -> "RoundedWeight":
        """A weight of this type with these rows, or columns."""
        R, n = rows.shape
        sizes, strides = ((n, R), (1, n)) if transposed else ((R, n), (n, 1))
        self = Tensor._make_wrapper_subclass(cls, sizes, strides, dtype=dtype, device=rows.values.device)  # type: ignore[attr-defined]
        self.rows, self.transposed = rows, transposed
        return self

    def __init__(self, rows: RoundedRows, dtype: torch.dtype, transposed: bool = False) -> None:
        """As `__new__`."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Its size and type, without its values."""
        return f"RoundedWeight({list(self.shape)}, {self.dtype}, stored at 8 bits)"

    @property
    def data(self) -> "RoundedWeight":  # type: ignore[override]
        """Itself, detached. Setting other data raises TypeError, as a model's `to` does for another type or device."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
            raise TypeError(FIXED)

    def unrounded(self) -> Tensor:
        """Its values in the model's type."""
        values = self.rows.unrounded(self.dtype)
        return values.T if self.transposed else values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the values; a view of the whole matrix stays rounded."""
        first, *others = args or (None,)
        if isinstance(first, RoundedWeight):
            if func is _aten.detach.default:
                return cls(first.rows, first.dtype, first.transposed)
            if func is _aten.t.default or _swaps(func, others):
                return cls(first.rows, first.dtype, not first.transposed)
            if func is _aten.clone.default and not others and not kwargs:
                return cls(first.rows.clone(), first.dtype, first.transposed)
            if func is _aten.embedding.default and not first.transposed:
                return first.rows.at(others[0].flatten()).unrounded(first.dtype).view(*others[0].shape, -1)
        if func in cls.direct:
            return cls.direct[func](*args, **kwargs or {})
        if func._schema.is_mutable:
            raise TypeError(f"{func}: {FIXED}")
        args, kwargs = tree_map_only(RoundedWeight, RoundedWeight.unrounded, (args, kwargs or {}))
        return func(*args, **kwargs)


def _swaps(func: Any, others: list) -> bool:
    """Whether an operation with these arguments transposes a matrix."""
    if func is _aten.transpose.int:
        return sorted(each % 2 for each in others) == [0, 1]
    return func is _aten.permute.default and [each % 2 for each in others[0]] == [1, 0]


def memory_of(tensor: Tensor) -> int:
    """Where a tensor's values are in memory."""
    return tensor.rows.values.data_ptr() if isinstance(tensor, RoundedWeight) else tensor.data_ptr()


def is_rounded(model: nn.Module) -> bool:
    """Whether a model has weights that are stored at 8 bits."""
    return any(isinstance(parameter, RoundedWeight) for parameter in model.parameters())
