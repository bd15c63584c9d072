"""Newest rows of many entities as arrays: what most reads of many rows are, and what answers are written from without looking at values.

A `FloatPart` is a `Part` whose lists are made only where something asks for them (on-demand functions, the consistency log); the writers
of answers take its arrays.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace_feature.packed_rows import NO_ROW
from millrace_feature.tiles import Floats, Ints

ROWS = 4
"""From so many rows on arrays cost less than lists."""
NOTHING: Any = np.array(None, object)
Bools = NDArray[np.bool_]
Marks = NDArray[np.uint8]


class FloatPart:
    """What one view gives for every row.

    Args:
        times_us: event time per row; `NO_ROW` where there is none.
        values: [rows, features], NaN where missing.
        ttl_us: age from which rows are expired; 0: never.
        at_us: instant of the read.
    """

    def __init__(self, times_us: Ints, values: Floats, *, ttl_us: int, at_us: int) -> None:
        self.instants = times_us
        self._at_us = at_us
        self.absent: Bools = times_us == NO_ROW
        self.late: Bools = ~self.absent & (times_us < at_us - ttl_us) if ttl_us else np.zeros(len(times_us), np.bool_)
        """Rows that are too old."""
        self.table = values
        """[rows, features], NaN where missing or too old."""
        self.is_whole = not (self.absent.any() or self.late.any())
        """Whether every row is there."""
        if ttl_us and self.late.any():
            self.table = np.where(self.late[:, None], np.nan, values)

    @cached_property
    def gone(self) -> Bools:
        """Rows without values."""
        return self.absent | self.late

    @cached_property
    def values(self) -> list[Any]:
        """As `Part` has it."""
        found: list[Any] = np.where(np.isnan(self.table), NOTHING, self.table).tolist()
        for row in np.flatnonzero(self.gone).tolist():
            found[row] = None
        return found

    @cached_property
    def expired(self) -> set[int]:
        """As `Part` has it."""
        return set(np.flatnonzero(self.late).tolist())

    @cached_property
    def ages_us(self) -> list[int]:
        """Age of the oldest row that is there."""
        times = self.instants if self.is_whole else self.instants[~self.gone]
        return [self._at_us - int(times.min())] if len(times) else []

    @cached_property
    def times_us(self) -> list[int | None]:
        """As `Part` has it."""
        times: list[int | None] = self.instants.tolist()
        if self.absent.any():
            return [None if absent else time for absent, time in zip(self.absent.tolist(), times, strict=True)]
        return times


@dataclass(frozen=True, slots=True)
class VectorTable:
    """Vectors of many rows."""

    values: Floats
    """[rows, features], NaN where missing."""
    marks: Marks
    """[rows, features], statuses."""
    max_age_ms: int
    """Age of the oldest value of all rows."""

    @staticmethod
    def of(
        pieces: Sequence[tuple[FloatPart, slice | list[int]]],
        max_age_ms: int,
        *,
        present: int,
        missing: int,
        expired: int,
    ) -> "VectorTable":
        """From parts and the features wanted of each, in vector order, with the numbers that say what a value is."""
        values = np.concatenate([part.table[:, chosen] for part, chosen in pieces], axis=1)
        marks = np.where(np.isnan(values), np.uint8(missing), np.uint8(present))
        at = 0
        for part, chosen in pieces:
            width = part.table[:1, chosen].shape[1]
            if part.late.any():
                marks[part.late, at : at + width] = expired
            at += width
        return VectorTable(values, marks, max_age_ms)

    def row(self, number: int) -> list[float]:
        """Values of one row."""
        found: list[float] = self.values[number].tolist()
        return found

    def count(self, mark: int) -> int:
        """How many values have this status."""
        return int(np.count_nonzero(self.marks == mark))


def doubles_fields(columns: Floats, tail: bytes) -> list[bytes]:
    """Per column the content of a Feast `FeatureVector`: one `Value` with a double a row, then `tail`; NaN is an empty `Value`.

    Args:
        columns: [features, rows].
        tail: statuses and event times, the same for all.
    """
    cells = np.empty(columns.shape, np.dtype([("head", "u1", 3), ("value", "<f8")]))
    cells["head"] = (0x0A, 0x09, 0x29)  # field `val`, nine bytes, field `double_val`
    cells["value"] = columns
    gaps = np.isnan(columns)
    out = []
    for number, has_gap in enumerate(np.logical_or.reduce(gaps, axis=1)):
        content = cells[number].tobytes()
        if has_gap:
            written = zip(gaps[number], struct.iter_unpack("11s", content), strict=True)
            content = b"".join([b"\x0a\x00" if missing else cell for missing, (cell,) in written])
        out.append(content + tail)
    return out


def time_fields(times_us: Ints) -> bytes | None:
    """Event times as `google.protobuf.Timestamp`s, each a field 3; None where one is missing or lies before 1970 or after 3058.

    Seconds and nanoseconds take as many bytes as the longest can have, which protobuf's readers accept.
    """
    seconds, micros = np.divmod(times_us, 1_000_000)
    if seconds.min() < 0 or seconds.max() >= 1 << 35:
        return None
    out = np.empty((len(times_us), 14), np.uint8)
    out[:, :3] = (0x1A, 12, 0x08)
    out[:, 8] = 0x10
    for start, numbers in ((3, seconds), (9, micros * 1000)):
        for place in range(5):
            out[:, start + place] = numbers >> 7 * place & 0x7F | (0x80 if place < 4 else 0)
    return out.tobytes()
