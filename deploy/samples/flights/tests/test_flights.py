"""The four streams: what they promise about time, identity and contracts."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flights as data
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

SAMPLE = Path(__file__).resolve().parents[1]
START, END = datetime(2013, 3, 8, tzinfo=UTC), datetime(2013, 3, 12, tzinfo=UTC)  # summer time begins on 10 March
ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": data.INSTANT,
}


def contract(name: str) -> dict:
    return yaml.safe_load((SAMPLE / "contracts" / f"{name}.yaml").read_text())


def stream(name: str) -> pa.Table:
    return getattr(data, name)(START, END)


def breaks(column: dict, value: object) -> bool:
    """Whether a JSON value breaks its column's checks."""
    if value is None:
        return not column.get("nullable", False)
    kind = column["type"]
    fits = {
        "string": lambda: isinstance(value, str),
        "int64": lambda: isinstance(value, int) and not isinstance(value, bool),
        "double": lambda: isinstance(value, int | float) and not isinstance(value, bool),
        "bool": lambda: isinstance(value, bool),
        "timestamp": lambda: isinstance(value, str) and re.match(r"\d{4}-", value) is not None,
    }
    if not fits[kind]():
        return True
    if kind == "string":
        allowed, pattern = column.get("allowed"), column.get("pattern")
        return bool((allowed and value not in allowed) or (pattern and not re.fullmatch(pattern, value)))
    if kind in {"int64", "double"}:
        return not column.get("min", -np.inf) <= value <= column.get("max", np.inf)
    return False


@pytest.mark.parametrize("name", data.EVENT_TIMES)
def test_a_stream_follows_its_contract(name: str) -> None:
    table, promised = stream(name), contract(name)
    assert [(f.name, f.type) for f in table.schema] == [(c["name"], ARROW[c["type"]]) for c in promised["columns"]]
    assert table.num_rows > 200
    assert promised["event_time_column"] == data.EVENT_TIMES[name]
    instants = table[data.EVENT_TIMES[name]].to_pylist()
    assert instants == sorted(instants)
    assert instants[0] >= START
    assert instants[-1] < END
    ids = table[promised["event_id_column"]]
    assert pc.count_distinct(ids).as_py() == len(ids)
    for column in promised["columns"]:
        values = table[column["name"]].to_pylist()
        plain = [v.isoformat() if isinstance(v, datetime) else v for v in values]
        assert not [v for v in plain if breaks(column, v)], column["name"]


def test_ids_are_unique_over_the_year() -> None:
    year = data.flights(datetime(2013, 1, 1, tzinfo=UTC), datetime(2014, 1, 2, tzinfo=UTC))
    assert year.num_rows == 336_776
    assert pc.count_distinct(year["flight_id"]).as_py() == year.num_rows


def test_nothing_lands_before_it_left_and_flights_take_hours_not_days() -> None:
    left = dict(
        zip(*(data.departures(START, END)[c].to_pylist() for c in ("flight_id", "departed_epoch_min")), strict=True)
    )
    landed = data.outcomes(START, END).to_pylist()
    minutes = [row["landed_at"].timestamp() / 60 - left[row["flight_id"]] for row in landed if row["flight_id"] in left]
    assert len(minutes) > 2000
    assert min(minutes) > 20
    assert max(minutes) < 14 * 60


@pytest.mark.parametrize(
    ("flight_id", "landed"),
    [
        ("2013-01-01-UA-1545-EWR-0515", "2013-01-01T14:30"),  # Houston, 8:30 Central
        ("2013-01-01-HA-51-JFK-0900", "2013-01-02T01:16"),  # Honolulu, 15:16
        ("2013-01-01-B6-725-JFK-0545", "2013-01-01T14:04"),  # Aguadilla, which the table of airports lacks
    ],
)
def test_landings_are_read_on_the_destination_s_clock(flight_id: str, landed: str) -> None:
    day = data.outcomes(datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 1, 3, tzinfo=UTC)).to_pylist()
    row = next(row for row in day if row["flight_id"] == flight_id)
    assert row["landed_at"].astimezone(UTC).isoformat().startswith(landed)


def test_a_delay_is_the_same_by_clock_and_by_column() -> None:
    """Scheduled departure + scheduled duration + arrival delay is the landing, whatever the time zones."""
    scheduled = {row["flight_id"]: row for row in data.flights(START - timedelta(days=1), END).to_pylist()}
    for row in data.outcomes(START, END).to_pylist():
        flight = scheduled[row["flight_id"]]
        due = flight["sched_dep_at"] + timedelta(minutes=flight["sched_duration"] + row["arr_delay"])
        # An arrival across the change to summer time is an hour off its schedule's own clock.
        assert abs(row["landed_at"] - due) in {timedelta(0), timedelta(hours=1)}


def test_no_flight_is_reported_before_the_minute_after_its_schedule() -> None:
    scheduled = dict(zip(*(stream("flights")[c].to_pylist() for c in ("flight_id", "sched_dep_at")), strict=True))
    early = 0
    for row in stream("departures").to_pylist():
        if (due := scheduled.get(row["flight_id"])) is not None:
            assert row["reported_at"] > due
            early += row["dep_delay"] < 0
    assert early > 500


def test_late_is_more_than_fifteen_minutes() -> None:
    landed = stream("outcomes").to_pylist()
    assert all(row["late"] == (row["arr_delay"] > 15) for row in landed)
    assert all(row["enroute_delay"] == row["arr_delay"] - row["dep_delay"] for row in landed)
    assert {row["arr_delay"] for row in landed} >= {15, 16}


def test_weather_is_the_same_number_in_single_precision() -> None:
    table = stream("weather")
    for name in data.WEATHER:
        values = table[name].drop_null().to_numpy()
        assert np.array_equal(values, values.astype(np.float32).astype(np.float64))


def test_replay_loses_nothing_and_tells_nothing_early() -> None:
    slices = list(data.replay(START, END, timedelta(hours=1)))
    assert [s.start for s in slices[1:]] == [s.end for s in slices[:-1]]
    assert (slices[0].start, slices[-1].end) == (START, END)
    for name, column in data.EVENT_TIMES.items():
        parts = [s.records[name] for s in slices]
        assert pa.concat_tables(parts).equals(stream(name))
        for one in slices:
            instants = one.records[name][column].to_pylist()
            assert all(one.start <= instant < one.end for instant in instants)
    assert sum(s.requests.num_rows for s in slices) == stream("flights").num_rows


def test_every_malformed_row_is_broken_as_it_says() -> None:
    seen = set()
    for name, lines, reasons in data.malformed():
        assert len(lines) == len(reasons)
        columns = {column["name"]: column for column in contract(name)["columns"]}
        for line, reason in zip(lines, reasons, strict=True):
            seen.add(reason)
            if reason == data.MALFORMED:
                with pytest.raises((ValueError, AssertionError)):
                    assert isinstance(json.loads(line), dict)
                continue
            row = json.loads(line)
            broken = [column for column in columns if breaks(columns[column], row.get(column))]
            assert len(broken) == 1, (line, broken)
    assert seen == {
        "WRONG_TYPE", "OUT_OF_RANGE", "NULL_NOT_ALLOWED", "MISSING_EVENT_ID", "NOT_ALLOWED_VALUE", "PATTERN_MISMATCH", "MALFORMED_JSON",
    }  # fmt: skip
