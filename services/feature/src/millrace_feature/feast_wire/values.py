"""Values of one feature as Feast's type has them; NaN or None where there is none."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from millrace_feature.vectors import unpack

NAN = float("nan")
PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = 1, 2, 3, 4
"""`feast.serving.FieldStatus`. Like Feast's Python server this one says PRESENT to an empty value of a row that is there."""


def doubles(values: Sequence[Any]) -> list[float]:
    """DOUBLE."""
    try:
        return list(map(float, values))
    except TypeError:
        return [NAN if value is None else float(value) for value in values]


def _floats(values: Sequence[Any]) -> list[float]:
    """FLOAT: numbers that four bytes can hold."""
    with np.errstate(over="ignore"):
        found: list[float] = np.array(doubles(values), np.float32).astype(np.float64).tolist()
    return found


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # noqa: PLR0124 - NaN is not itself


def _each(convert: Callable[[Any], Any]) -> Callable[[Sequence[Any]], list[Any]]:
    def every(values: Sequence[Any]) -> list[Any]:
        return [None if _is_missing(value) else convert(value) for value in values]

    return every


def _seconds(value: Any) -> int:
    return int(value.timestamp()) if isinstance(value, datetime) else int(value)


CONVERTERS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "DOUBLE": doubles,
    "FLOAT": _floats,
    "INT32": _each(int),
    "INT64": _each(int),
    "BOOL": _each(bool),
    "STRING": _each(str),
    "UNIX_TIMESTAMP": _each(_seconds),
    "FLOAT_LIST": _each(partial(unpack, is_wide=False)),
    "DOUBLE_LIST": _each(partial(unpack, is_wide=True)),
}
"""By Feast's type: the ones that views may have (see `compiler.py`)."""
