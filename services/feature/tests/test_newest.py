"""The newest row at or before each instant, against the plain definition of it."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_feature.newest import NewestRows
from millrace_feature.rows import order_of

SCHEMA = pa.schema([("a", pa.float64()), ("b", pa.string())])
FAR = 1 << 60
"""Makes entity and instant too wide for one word."""


def plain(rows: list[tuple], code: int, at: int, ttl: int) -> tuple:
    """What the result must be: (a, b) of the newest row, the last in order among equal times."""
    before = [row for row in rows if row[0] == code and row[1] <= at]
    if code < 0 or not before:
        return (None, None)
    best = max(before, key=lambda row: (row[1], order_of(row[2:])))
    return best[2:] if not ttl or at - best[1] <= ttl else (None, None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 3), st.integers(-9, 9)), max_size=12),
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(-12, 12),
            st.one_of(st.none(), st.sampled_from([0.5, 1.0, 2.0])),
            st.one_of(st.none(), st.sampled_from(["x", "y", "é"])),
        ),
        max_size=40,
    ),
    st.sampled_from([0, 3]),
    st.integers(1, 7),
    st.booleans(),
)
def test_is_what_it_says(points: list[tuple[int, int]], rows: list[tuple], ttl: int, batch: int, wide: bool) -> None:
    scale = FAR // 16 if wide else 1
    codes = np.array([c for c, _t in points], np.int64)
    newest = NewestRows(codes, np.array([t * scale for _c, t in points], np.int64))
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        values = pa.table([[r[2] for r in part], [r[3] for r in part]], schema=SCHEMA)
        newest.add(np.array([r[0] for r in part], np.int64), np.array([r[1] * scale for r in part], np.int64), values)
    found = newest.result(SCHEMA, ttl_us=ttl * scale)
    assert found.num_rows == len(points)  # never one instant less
    assert list(zip(*found.to_pydict().values(), strict=True)) == [plain(rows, c, t, ttl) for c, t in points]


def test_keeps_no_more_rows_than_it_needs() -> None:
    newest = NewestRows(np.zeros(3, np.int64), np.array([10, 20, 30], np.int64))
    for at in range(1, 1000):
        newest.add(np.zeros(1, np.int64), np.array([at % 31], np.int64), pa.table([[float(at)], ["x"]], schema=SCHEMA))
        assert newest.kept_rows <= 9
    found = newest.result(SCHEMA, ttl_us=0)
    assert found.column("a").to_pylist() == [971.0, 981.0, 991.0]


def test_lists_have_an_order_too() -> None:
    schema = pa.schema([("v", pa.list_(pa.float32()))])
    newest = NewestRows(np.zeros(1, np.int64), np.array([5], np.int64))
    values = pa.table([[[1.0, 2.0], [1.0, 3.0], None]], schema=schema)
    newest.add(np.zeros(3, np.int64), np.full(3, 4, np.int64), values)
    newest.add(np.zeros(1, np.int64), np.full(1, 4, np.int64), pa.table([[[1.0, 2.5]]], schema=schema))
    assert newest.result(schema, ttl_us=0).column("v").to_pylist() == [[1.0, 3.0]]
