"""Newest rows: what a view without aggregations keeps.

Of two rows of one entity with the same event time the one whose values sort last wins (a missing value sorts first), so the answer does not
depend on the order rows arrive in and the lake's answer is the stream's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from millrace_feature.tiles import encode_key, event_times

Scalar = str | int | float | bool | datetime | None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one entity."""

    key: str
    time_us: int
    values: tuple[Scalar, ...]


def order_of(values: Sequence[Scalar]) -> tuple[tuple[int, Scalar], ...]:
    """Sort key of a row's values."""
    return tuple((0, 0) if value is None else (1, value) for value in values)


def known(value: Scalar) -> Scalar:
    """The value, with NaN as missing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def pick_rows(table: pa.Table, *, keys: Sequence[str], event_time: str, columns: Sequence[str]) -> list[Row]:
    """The rows of `table` that count: with event time and every key; one per key and time."""
    wanted = pc.is_valid(table.column(event_time))
    for key in keys:
        wanted = pc.and_(wanted, pc.is_valid(table.column(key)))
    rows = table.filter(wanted)
    times = event_times(rows, event_time).tolist()
    entities = [encode_key(k) for k in zip(*(rows.column(key).to_pylist() for key in keys), strict=True)]
    values = zip(*(map(known, rows.column(name).to_pylist()) for name in columns), strict=True)
    best: dict[tuple[str, int], tuple[Scalar, ...]] = {}
    for key, time_us, row in zip(entities, times, values, strict=True):
        place = (key, time_us)
        if place not in best or order_of(row) > order_of(best[place]):
            best[place] = row
    return [Row(key, time_us, row) for (key, time_us), row in best.items()]
