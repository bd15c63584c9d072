"""Training sets in small steps: every labelled row is there, with the plain definition's values, and the same bytes however many steps it takes."""

import math
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_feature import point_in_time, training
from millrace_feature.lake import Lake, Limits
from millrace_feature.plan import Aggregate, Definitions, LatestView, ServicePlan, ViewUse, WindowView
from millrace_feature.training import Build, Labels

MINUTE = 60_000_000
START = datetime(2024, 5, 1, tzinfo=UTC)
TTL = 20
LATEST = LatestView("newest", "events", "at", ("user",), TTL * MINUTE, ("amount",))
WINDOWS = WindowView(
    "windows", "events", "at", ("user",), 5 * MINUTE,
    (Aggregate("n", "amount", "count", 10 * MINUTE), Aggregate("top", "amount", "max", 30 * MINUTE)),
)  # fmt: skip
FEATURES = ("newest__amount", "windows__n", "windows__top")
PLAN = ServicePlan(
    "main", FEATURES, (ViewUse("newest", "newest", ("user",)), ViewUse("windows", "windows", ("user",))), (), ()
)
DEFINITIONS = Definitions(
    "test",
    "0" * 64,
    (("events", "at"), ("asks", "at"), ("outcomes", "at")),
    (("user", "int64"),),
    (LATEST, WINDOWS),
    (PLAN,),
)
LABELS = Labels("asks", "outcomes", "id", "label", start_us=None, end_us=None, known_at_us=None)
Event = tuple[int | None, int, float | None]


def instants(minutes: list[int]) -> pa.Array:
    return pa.array([START + timedelta(minutes=m) for m in minutes], pa.timestamp("us", "UTC"))


def write(root: Path, asks: list[tuple[int | None, int]], events: list[Event]) -> Lake:
    ids = list(range(len(asks)))
    users = pa.array([u for u, _m in asks], pa.int64())
    write_deltalake(f"{root}/asks", pa.table({"id": ids, "user": users, "at": instants([m for _u, m in asks])}))
    labels = pa.table(
        {"id": pa.array(ids, pa.int64()), "at": instants([999] * len(ids)), "label": [float(i) for i in ids]}
    )
    write_deltalake(f"{root}/outcomes", labels)
    for part in (events[::2], events[1::2]):
        columns = {
            "user": pa.array([u for u, _m, _a in part], pa.int64()),
            "at": instants([m for _u, m, _a in part]),
            "amount": pa.array([a for _u, _m, a in part], pa.float64()),
        }
        write_deltalake(f"{root}/events", pa.table(columns), mode="append")
    return Lake(str(root), Limits(256, 1, root / "spill"))


def built(lake: Lake, target: Path, rows_at_once: int = 4) -> pa.Table:
    versions = {"asks": 0, "outcomes": 0, "events": 1}
    done = Build(lake, PLAN, DEFINITIONS, LABELS, max_rows=1000, rows_at_once=rows_at_once).run(versions, target)
    table = pq.read_table(target)
    assert table.num_rows == done.rows
    return table


def plain(events: list[Event], user: int | None, at: int) -> list[float]:
    """What the features mean."""
    if user is None:
        return [math.nan] * 3
    mine = [(m, a) for u, m, a in events if u == user]
    before = [(m, -math.inf if a is None else a) for m, a in mine if m <= at]
    newest = max(before, default=(-1000, math.nan))
    amount = newest[1] if at - newest[0] <= TTL and newest[1] != -math.inf else math.nan
    end = at // 5 * 5
    ten = [a for m, a in mine if a is not None and end - 10 <= m < end]
    thirty = [a for m, a in mine if a is not None and end - 30 <= m < end]
    return [amount, float(len(ten)), max(thirty, default=math.nan)]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(point_in_time, "PART_ROWS", 7)
    monkeypatch.setattr(point_in_time, "BATCH_ROWS", 5)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 1, 2, 3, 9]), st.integers(0, 90)), min_size=1, max_size=14),
    st.lists(
        st.tuples(st.sampled_from([None, 1, 2, 3]), st.integers(0, 90), st.sampled_from([None, 1.0, 2.0, 5.5])),
        min_size=2,
        max_size=40,
    ),
)
def test_no_row_is_dropped_and_each_is_right(asks: list[tuple[int | None, int]], events: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        lake = write(root, asks, events)
        table = built(lake, root / "a.parquet")
        # Ordered by instant, then by the join value.
        expected = sorted((at, number, plain(events, user, at)) for number, (user, at) in enumerate(asks))
        assert table.column("id").to_pylist() == [number for _at, number, _values in expected]
        for place, feature in enumerate(FEATURES):
            found = table.column(feature).to_pylist()
            assert repr(found) == repr([values[place] for _at, _number, values in expected]), feature
        built(lake, root / "b.parquet", rows_at_once=1000)
        assert (root / "a.parquet").read_bytes() == (root / "b.parquet").read_bytes()


def test_labels_that_feast_drops(tmp_path: Path) -> None:
    # Feast 0.67's default store gives 2 of these 4 rows: those of an entity with only later or expired rows are gone.
    asks: list[tuple[int | None, int]] = [(1, 10), (2, 10), (3, 60), (4, 10)]
    events: list[Event] = [(1, 5, 1.0), (2, 30, 2.0), (3, 5, 3.0)]
    table = built(write(tmp_path, asks, events), tmp_path / "set.parquet")
    assert table.column("id").to_pylist() == [0, 1, 3, 2]
    assert repr(table.column("newest__amount").to_pylist()) == "[1.0, nan, nan, nan]"


def test_a_column_that_came_later(tmp_path: Path) -> None:
    lake = write(tmp_path, [(1, 10)], [(1, 5, 1.0), (1, 6, 2.0)])
    newer = pa.table({"user": [1], "at": instants([4]), "amount": [3.0], "shop": ["x"]})
    write_deltalake(f"{tmp_path}/events", newer, mode="append", schema_mode="merge")
    with lake.query({"events": 1}) as old, lake.query({"events": 2}) as new:
        assert "shop" not in old.columns["events"]
        rows: list[Any] = new.arrow('SELECT shop FROM lake_events ORDER BY "at"').column("shop").to_pylist()
    assert rows == ["x", None, None]
