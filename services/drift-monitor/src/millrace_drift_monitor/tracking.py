"""Values of outcomes whose sums gates want: by version, and by segment where asked, from the moment they were asked for.

A value beyond its declared bounds counts as the bound, so that a test for bounded values stays true whatever arrives.
"""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from millrace_drift_monitor.records import Columns, Outcome
from millrace_drift_monitor.tables import TRACKED, VALUE_TOTAL, VERSION_INFO

MAX_TRACKED = 64
"""Tracked values of one model."""
MAX_SEGMENTS = 16
"""Segments of one tracked value that are kept by name."""
MAX_SEGMENT_CHARACTERS = 64
WHOLE, OTHER, UNKNOWN = "", "other", "unknown"
BUSINESS, FEATURE, COLUMN, CLIENT = "business/", "feature/", "outcome/", "client"
METRICS = ("outcome/accuracy", "outcome/brier", "outcome/mae", "outcome/mse")


@dataclass(frozen=True, slots=True)
class Tracked:
    """One value of each outcome, and what tells its segments apart."""

    metric: str
    lower: float | None = None
    upper: float | None = None
    segment: str = ""

    @property
    def key(self) -> str:
        """Tells it from the model's others."""
        return json.dumps([self.metric, self.lower, self.upper, self.segment])

    @property
    def columns(self) -> set[str]:
        """Columns of the outcome's record that it needs."""
        found = {self.metric.removeprefix(BUSINESS)} if self.metric.startswith(BUSINESS) else set()
        return found | ({self.segment.removeprefix(COLUMN)} if self.segment.startswith(COLUMN) else set())


@dataclass(slots=True)
class ValueSums:
    """Sums of one tracked value, version and segment."""

    n: int = 0
    total: float = 0.0
    square: float = 0.0
    clipped: int = 0

    def add(self, value: float, *, clipped: bool) -> None:
        """Count one value."""
        self.n += 1
        self.total += value
        self.square += value * value
        self.clipped += clipped


class Scored(Protocol):
    """What is counted of a prediction whose outcome became known."""

    model: str
    version: str
    score: float | None
    is_correct: bool
    error: float
    outcome: Outcome
    features: bytes
    client: str


def tracked_of(connection: Connection) -> dict[str, list[Tracked]]:
    """Tracked values by model, in the order they were asked for."""
    found: dict[str, list[Tracked]] = defaultdict(list)
    for row in connection.execute(select(TRACKED).order_by(TRACKED.c.seq)):
        found[row.model].append(Tracked(row.metric, row.lower, row.upper, row.segment))
    return dict(found)


def replace(connection: Connection, model: str, values: Sequence[Tracked]) -> None:
    """Make `values` the model's; those that stay keep their sums."""
    wanted = {value.key: value for value in values}
    known = {value.key for value in tracked_of(connection).get(model, [])}
    for key in known - wanted.keys():
        connection.execute(delete(TRACKED).where(TRACKED.c.model == model, TRACKED.c.key == key))
        connection.execute(delete(VALUE_TOTAL).where(VALUE_TOTAL.c.model == model, VALUE_TOTAL.c.key == key))
    rows = [
        {"model": model, "key": key, "metric": v.metric, "lower": v.lower, "upper": v.upper, "segment": v.segment}
        for key, v in wanted.items()
        if key not in known
    ]
    if rows:
        connection.execute(insert(TRACKED), rows)


def figures(connection: Connection, model: str) -> list[tuple[Tracked, list[tuple[str, str, ValueSums]]]]:
    """Every tracked value of a model with (version, segment, sums)."""
    sums: dict[str, list[tuple[str, str, ValueSums]]] = defaultdict(list)
    table = VALUE_TOTAL.c
    query = select(VALUE_TOTAL).where(table.model == model).order_by(table.version, table.segment)
    for row in connection.execute(query):
        found = ValueSums(int(row.n), float(row.total), float(row.square), int(row.clipped))
        sums[row.key].append((row.version, row.segment, found))
    return [(value, sums[value.key]) for value in tracked_of(connection).get(model, [])]


def count(connection: Connection, joined: Sequence[Scored], tracked: Mapping[str, Sequence[Tracked]]) -> None:
    """Add what was joined to the sums."""
    by_model: dict[str, list[Scored]] = defaultdict(list)
    for one in joined:
        if one.model in tracked:
            by_model[one.model].append(one)
    for model, scored in sorted(by_model.items()):
        by_feature = any(value.segment.startswith(FEATURE) for value in tracked[model])
        names = _feature_names(connection, model) if by_feature else {}
        for value in tracked[model]:
            _add(connection, model, value.key, _sums(value, scored, names, _kept(connection, model, value)))


def _feature_names(connection: Connection, model: str) -> dict[str, list[str]]:
    query = select(VERSION_INFO.c.version, VERSION_INFO.c.feature_names).where(VERSION_INFO.c.model == model)
    return {row.version: json.loads(row.feature_names) for row in connection.execute(query)}


def _kept(connection: Connection, model: str, value: Tracked) -> set[str]:
    """Segments that are kept by name so far."""
    if not value.segment:
        return set()
    table = VALUE_TOTAL.c
    query = select(table.segment).distinct().where(table.model == model, table.key == value.key)
    return set(connection.execute(query).scalars()) - {WHOLE, OTHER, UNKNOWN}


def _sums(
    tracked: Tracked, scored: Sequence[Scored], names: Mapping[str, Sequence[str]], kept: set[str]
) -> dict[tuple[str, str], ValueSums]:
    sums: dict[tuple[str, str], ValueSums] = defaultdict(ValueSums)
    for one in scored:
        value = value_of(tracked.metric, one)
        if value is None:
            continue
        bounded = value if tracked.lower is None else min(max(value, tracked.lower), tracked.upper or 0.0)
        sums[one.version, WHOLE].add(bounded, clipped=bounded != value)
        if tracked.segment:
            segment = _segment(tracked.segment, one, names)
            if segment not in kept and segment not in {OTHER, UNKNOWN}:
                if len(kept) < MAX_SEGMENTS:
                    kept.add(segment)
                else:
                    segment = OTHER
            sums[one.version, segment].add(bounded, clipped=bounded != value)
    return sums


def value_of(metric: str, one: Scored) -> float | None:
    """The metric's value of one prediction; None where its outcome has none."""
    if metric.startswith(BUSINESS):
        found = one.outcome.columns.get(metric.removeprefix(BUSINESS))
        return found if isinstance(found, float) else None
    if one.score is None:
        return None
    match metric:
        case "outcome/accuracy":
            return float(one.is_correct)
        case "outcome/brier":
            return one.error
        case "outcome/mae":
            return abs(one.score - one.outcome.number)
        case _:
            difference = one.score - one.outcome.number
            return difference * difference


def _segment(by: str, one: Scored, names: Mapping[str, Sequence[str]]) -> str:
    if by == CLIENT:
        found: float | str | None = one.client
    elif by.startswith(COLUMN):
        found = one.outcome.columns.get(by.removeprefix(COLUMN))
    else:
        found = _feature(by.removeprefix(FEATURE), one.features, names.get(one.version, ()))
    if found is None or found == "":
        return UNKNOWN
    return f"{found:g}" if isinstance(found, float) else found[:MAX_SEGMENT_CHARACTERS]


def _feature(name: str, features: bytes, names: Sequence[str]) -> float | None:
    """A feature of a stored row; None where the row was not sampled, is another length, or has no value."""
    if name not in names or len(features) != 8 * len(names):
        return None
    (value,) = struct.unpack_from("<d", features, 8 * names.index(name))
    return float(value) if math.isfinite(value) else None


def _add(connection: Connection, model: str, key: str, sums: Mapping[tuple[str, str], ValueSums]) -> None:
    if not sums:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    upsert = dialect.insert(VALUE_TOTAL)
    added = ("n", "total", "square", "clipped")
    upsert = upsert.on_conflict_do_update(
        index_elements=["model", "key", "version", "segment"],
        set_={name: VALUE_TOTAL.c[name] + upsert.excluded[name] for name in added},
    )
    rows = [
        {"model": model, "key": key, "version": version, "segment": segment}
        | {name: getattr(found, name) for name in added}
        for (version, segment), found in sorted(sums.items())
    ]
    connection.execute(upsert, rows)


def dump_columns(columns: Columns) -> str | None:
    """As they are stored; None for none."""
    return json.dumps(columns) if columns else None


def load_columns(text: str | None) -> Columns:
    """What `dump_columns` wrote."""
    return json.loads(text) if text else {}
