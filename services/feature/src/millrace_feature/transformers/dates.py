"""Instants to places on circles: 23:59 lies beside 0:00, December beside January. All in UTC; a missing instant stays missing."""

import calendar
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from millrace_feature.transformers.columns import NAN, Column, Floats, as_times
from millrace_feature.transformers.steps import Parameters, Step

Part = Literal["minute", "hour", "day_of_week", "day_of_month", "month", "day_of_year"]


def _days_in_month(t: datetime) -> int:
    return calendar.monthrange(t.year, t.month)[1]


_TURNS: dict[str, Callable[[datetime], float]] = {
    "minute": lambda t: (t.minute * 60 + t.second) / 3600,
    "hour": lambda t: (t.hour * 3600 + t.minute * 60 + t.second) / 86_400,
    "day_of_week": lambda t: t.weekday() / 7,
    "day_of_month": lambda t: (t.day - 1) / _days_in_month(t),
    "month": lambda t: (t.month - 1) / 12,
    "day_of_year": lambda t: (t.timetuple().tm_yday - 1) / (366 if calendar.isleap(t.year) else 365),
}
"""Part of a whole turn, 0 to below 1."""


class DateParameters(Parameters):
    """Of kind `date`."""

    parts: tuple[Part, ...] = Field(default=("hour", "day_of_week"), min_length=1, max_length=6, strict=False)
    """Which circles; each gives `<name>_<part>_sin` and `<name>_<part>_cos`."""


class Date(Step):
    """Sine and cosine of parts of a date. Numbers are taken as seconds since the epoch."""

    kind = "date"
    Given: ClassVar[type[Parameters]] = DateParameters

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """Two columns a part."""
        del folds
        outputs: list[Floats] = []
        for column in columns:
            times = as_times(column)
            for part in self.given.parts:
                angles = [None if t is None else 2 * math.pi * _TURNS[part](t) for t in times]
                outputs.extend(_of(angles, function) for function in (math.sin, math.cos))
        return outputs

    def _named(self) -> tuple[str, ...]:
        names: list[Any] = [self.root(i) for i in range(len(self.names))]
        return tuple(f"{n}_{part}_{f}" for n in names for part in self.given.parts for f in ("sin", "cos"))


def _of(angles: list[float | None], function: Callable[[float], float]) -> Floats:
    return np.array([NAN if angle is None else function(angle) for angle in angles], np.float64)
