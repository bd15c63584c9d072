"""Columns as steps see them, and the one meaning a value has in a request, a lake row and a training set."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Column = Floats | Sequence[Any]
"""Numbers with NaN where missing, or values with None where missing."""

NAN = float("nan")
MISSING = "<missing>"
"""Name of the category of missing values in an output's name."""


def as_floats(column: Column) -> Floats:
    """Numbers and booleans as float64, NaN where missing; a new array, never the caller's.

    Raises:
        TypeError: the column holds texts or times.
    """
    if isinstance(column, np.ndarray):
        return np.array(column, np.float64)
    for value in column:
        if value is not None and not isinstance(value, float | int):  # bool is an int
            raise TypeError(f"needs numbers, not {type(value).__name__}")
    return np.array([NAN if value is None else value for value in column], np.float64)


def category_of(value: Any) -> str | None:
    """The category a value stands for; None for a missing one.

    Numbers are one category whatever they travel as: 7, 7.0 and, for a column of booleans, true and 1 are the same.

    Raises:
        TypeError: a time is no category.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, datetime):
        raise TypeError("needs texts, numbers or booleans, not datetime")
    number = float(value)
    return None if math.isnan(number) else f"{number:.17g}"


def as_categories(column: Column) -> list[str | None]:
    """`category_of` every value."""
    values = column.tolist() if isinstance(column, np.ndarray) else column
    return [category_of(value) for value in values]


def as_texts(column: Column) -> list[str | None]:
    """Texts, None where missing.

    Raises:
        TypeError: the column holds something else.
    """
    if isinstance(column, np.ndarray):
        raise TypeError("needs texts, not numbers")
    for value in column:
        if value is not None and not isinstance(value, str):
            raise TypeError(f"needs texts, not {type(value).__name__}")
    return list(column)


def as_times(column: Column) -> list[datetime | None]:
    """Instants in UTC, None where missing; numbers are seconds since the epoch.

    Raises:
        TypeError: the column holds texts.
    """
    found: list[datetime | None] = []
    for value in column.tolist() if isinstance(column, np.ndarray) else column:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            found.append(None)
        elif isinstance(value, datetime):
            found.append(value.astimezone(UTC))
        elif isinstance(value, str):
            raise TypeError("needs times, not str")
        else:
            found.append(datetime.fromtimestamp(value, UTC))
    return found


def by_value(function: Callable[[float], float], values: Floats) -> Floats:
    """`function` of every value that is a number, NaN elsewhere and where it is not defined.

    One value at a time by the C library: numpy's vector units may give another last bit for another length of array.
    """

    def safe(value: float) -> float:
        if value != value:  # noqa: PLR0124 - NaN is not itself
            return NAN
        try:
            return function(value)
        except (ValueError, OverflowError):
            return NAN

    return np.array([safe(value) for value in values.tolist()], np.float64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a training set."""

    columns: list[Column]
    label: Floats
    folds: Ints
    """Fold of each row, by its join value."""


class Rows(Protocol):
    """What a step learns from: its inputs, as often as it wants, in batches or one column whole."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the columns of a batch."""
        ...

    def batches(self) -> Iterator[Batch]:
        """Every row once, in the set's order; a batch is bounded, so a step that only sums needs no more memory for more rows."""
        ...

    def numbers(self, place: int) -> Floats:
        """Input `place` whole, without missing values: 8 bytes a row, for what quantiles need."""
        ...
