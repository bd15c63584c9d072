"""Rows as bytes: every value comes back as it was, and rows of floats as arrays."""

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_feature.packed_rows import NO_ROW, FloatRows, bound_of, pack_row, unpack_row

TIMES = st.integers(-(1 << 52), 1 << 52)
FLOATS = st.one_of(st.none(), st.floats(allow_nan=False))
VALUES = st.one_of(
    FLOATS,
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.booleans(),
    st.text(max_size=20),
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - the zone is added
    st.lists(st.floats(allow_nan=False, width=32), max_size=5),
)


def same(found: Any, given_value: Any) -> bool:
    """Equal in type and value, the sign of zero included."""
    if isinstance(given_value, float):
        return (
            isinstance(found, float)
            and found == given_value
            and math.copysign(1, found) == math.copysign(1, given_value)
        )
    return type(found) is type(given_value) and found == given_value


@settings(max_examples=50, deadline=None)
@given(TIMES, st.lists(VALUES, min_size=1, max_size=300))
def test_rows_come_back(time_us: int, values: list[Any]) -> None:
    packed = pack_row(time_us, tuple(values))
    found_us, found = unpack_row(packed)
    assert found_us == time_us
    assert len(found) == len(values)
    assert all(map(same, found, values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(TIMES, st.tuples(FLOATS, FLOATS, FLOATS))), min_size=1, max_size=20))
def test_rows_of_floats_are_arrays(rows: list[Any]) -> None:
    packed = [None if row is None else pack_row(*row) for row in rows]
    found = FloatRows(3).read(packed)
    assert found is not None
    times, values = found
    for i, row in enumerate(rows):
        assert times[i] == (NO_ROW if row is None else row[0])
        wanted = [math.nan if row is None or value is None else value for value in (row[1] if row else (None,) * 3)]
        assert np.array_equal(values[i], np.array(wanted), equal_nan=True)


@pytest.mark.parametrize("other", [(1, 2.0), (1.0,), (1.0, 2.0, 3.0), ("a", 1.0), (True, True)])
def test_other_rows_are_no_arrays(other: tuple[Any, ...]) -> None:
    assert FloatRows(2).read([pack_row(5, (1.0, 2.0)), pack_row(5, other)]) is None


@given(st.integers(0, 1 << 52), st.integers(0, 1 << 52))
def test_a_bound_sorts_between_instants(row_us: int, at_us: int) -> None:
    assert (pack_row(row_us, (1.0,)) >= bound_of(at_us)) == (row_us > at_us)
