"""Newest rows: what a view without aggregations keeps.

Of two rows of one entity with the same event time the one whose values sort last wins (a missing value sorts first), so the answer does not
depend on the order rows arrive in and the lake's answer is the stream's.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from millrace_feature.tiles import encode_key, event_times

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_decode = msgspec.json.Decoder(list).decode

Scalar = str | int | float | bool | datetime | bytes | None
"""A value of a row; bytes are a vector as `vectors.py` packs it."""


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


def to_text(values: Sequence[Scalar]) -> str:
    """The values as the stores keep them; floats come back bit for bit."""

    def plain(value: object) -> object:
        if isinstance(value, datetime):
            return {"us": (value.astimezone(UTC) - EPOCH) // timedelta(microseconds=1)}
        if isinstance(value, bytes):
            return {"b64": base64.b64encode(value).decode("ascii")}
        raise TypeError(type(value).__name__)

    return json.dumps(values, default=plain)


def from_text(text: str | bytes) -> tuple[Scalar, ...]:
    """The values `to_text` wrote."""

    def scalar(value: Any) -> Scalar:
        if not isinstance(value, dict):
            found: Scalar = value
            return found
        return base64.b64decode(value["b64"]) if "b64" in value else EPOCH + timedelta(microseconds=value["us"])

    try:
        values = _decode(text)
    except msgspec.DecodeError:  # infinities, which JSON proper does not have
        values = json.loads(text)
    return tuple(map(scalar, values)) if any(type(value) is dict for value in values) else tuple(values)
