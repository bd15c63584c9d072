"""Samples, rates and examples in SQL, shared by the replicas: any of them checks what any of them served, each sample once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from millrace_kit.sql import reading, writing
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from millrace_feature.consistency.comparison import KINDS, Kind, Tally
from millrace_feature.consistency.samples import Sample
from millrace_feature.rows import Scalar, from_text, to_text

SUMS = ("compared", "mismatched", "missing", "extra", "pairs", "error")
"""Fields of a `Tally`, in its order."""
MAX_RATES = 50_000
"""Rates of one answer; older windows are asked for by their time."""
metadata = MetaData()
samples_table = Table(
    "consistency_samples",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("digest", String(64), nullable=False),
    Column("feature_service", String(256), nullable=False),
    Column("entity", Text, nullable=False),
    Column("asked_us", BigInteger, nullable=False),
    Column("served_us", BigInteger, nullable=False, index=True),
    Column("vector", LargeBinary, nullable=False),
    Column("claimed_until_us", BigInteger, nullable=False),
)
windows_table = Table(
    "consistency_windows",
    metadata,
    Column("window_us", BigInteger, primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("feature_service", String(256), primary_key=True),
    Column("feature", String(512), primary_key=True),
    Column("width_us", BigInteger, nullable=False),
    *(Column(name, Double if name == "error" else BigInteger, nullable=False) for name in SUMS),
)
findings_table = Table(
    "consistency_findings",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("window_us", BigInteger, nullable=False, index=True),
    Column("digest", String(64), nullable=False),
    Column("feature_service", String(256), nullable=False),
    Column("feature", String(512), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("entity", Text, nullable=False),
    Column("asked_us", BigInteger, nullable=False),
    Column("served_us", BigInteger, nullable=False),
    Column("expected", Double),
    Column("served", Double),
    Column("versions", Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Logged:
    """A sample with its number."""

    id: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class Rates:
    """One feature in one window of time."""

    window_us: int
    """Where it begins, in microseconds since the epoch."""
    width_us: int
    digest: str
    feature_service: str
    feature: str
    tally: Tally


@dataclass(frozen=True, slots=True)
class Finding:
    """One served value that is not what the lake says."""

    window_us: int
    digest: str
    feature_service: str
    feature: str
    kind: Kind
    entity: Mapping[str, Scalar]
    asked_us: int
    served_us: int
    expected: float | None
    served: float | None
    versions: Mapping[str, int]


class ConsistencyLog:
    """What is waiting, and what was found. Safe from any thread; every method raises UnavailableError without the database.

    The schema is that of `Catalog`, which brings it up to date.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, samples: Sequence[Sample], *, max_waiting: int) -> int:
        """Keep as many of `samples` as there is room for among `max_waiting`; returns how many."""
        with writing(self._engine) as connection:
            there = connection.execute(select(func.count()).select_from(samples_table)).scalar_one()
            kept = samples[: max(0, max_waiting - there)]
            if kept:
                rows = [
                    {
                        "digest": s.digest,
                        "feature_service": s.feature_service,
                        "entity": to_text(s.entity),
                        "asked_us": s.asked_us,
                        "served_us": s.served_us,
                        "vector": np.asarray(s.values, "<f8").tobytes(),
                        "claimed_until_us": 0,
                    }
                    for s in kept
                ]
                connection.execute(insert(samples_table), rows)
            return len(kept)

    def claim(self, *, before_us: int, now_us: int, lease_us: int, limit: int) -> list[Logged]:
        """The oldest samples served before `before_us` that nobody else checks; they are this caller's for `lease_us`."""
        table = samples_table.c
        due = (table.served_us <= before_us) & (table.claimed_until_us <= now_us)
        chosen = select(table.id).where(due).order_by(table.served_us, table.id).limit(limit)
        chosen = chosen.with_for_update(skip_locked=True)
        with writing(self._engine) as connection:
            ids = connection.execute(chosen).scalars().all()
            if not ids:
                return []
            mine = update(samples_table).where(table.id.in_(ids)).values(claimed_until_us=now_us + lease_us)
            connection.execute(mine)
            rows = connection.execute(select(samples_table).where(table.id.in_(ids)).order_by(table.id)).all()
        return [
            Logged(
                row.id,
                Sample(
                    row.digest,
                    row.feature_service,
                    from_text(row.entity),
                    row.asked_us,
                    row.served_us,
                    tuple(np.frombuffer(row.vector, "<f8").tolist()),
                ),
            )
            for row in rows
        ]

    def finish(
        self, ids: Sequence[int], rates: Sequence[Rates], findings: Sequence[Finding], *, max_findings: int
    ) -> bool:
        """Drop checked samples and keep what came of them, in one transaction.

        Returns:
            False, with nothing kept, when another caller has finished some of them: the claim had run out.
        """
        with writing(self._engine) as connection:
            gone = connection.execute(delete(samples_table).where(samples_table.c.id.in_(ids)))
            if gone.rowcount != len(ids):
                connection.rollback()
                return False
            for one in rates:
                _add_rates(connection, one)
            for finding in findings:
                _add_finding(connection, finding, max_findings)
        return True

    def forget(self, before_us: int) -> None:
        """Drop windows that begin before `before_us`, and their examples."""
        with writing(self._engine) as connection:
            for table in (windows_table, findings_table):
                connection.execute(delete(table).where(table.c.window_us < before_us))

    def waiting(self) -> tuple[int, int | None]:
        """(samples that wait for their check, when the oldest was served)."""
        with reading(self._engine) as connection:
            count, oldest = connection.execute(select(func.count(), func.min(samples_table.c.served_us))).one()
        return count, oldest

    def rates(self, feature_service: str, start_us: int | None, end_us: int | None) -> list[Rates]:
        """Rates of the windows that begin in the range, newest first; an empty name takes every feature service."""
        table = windows_table.c
        query = _narrowed(select(windows_table), windows_table, feature_service, start_us, end_us)
        with reading(self._engine) as connection:
            ordered = query.order_by(table.window_us.desc(), table.feature_service, table.feature)
            rows = connection.execute(ordered.limit(MAX_RATES))
            return [_rates(row) for row in rows]

    def findings(self, feature_service: str, start_us: int | None, end_us: int | None, limit: int) -> list[Finding]:
        """Examples of these windows, newest first."""
        query = _narrowed(select(findings_table), findings_table, feature_service, start_us, end_us)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(findings_table.c.id.desc()).limit(limit)).all()
        return [_finding(row) for row in rows]


def _narrowed(query: Any, table: Table, feature_service: str, start_us: int | None, end_us: int | None) -> Any:
    if feature_service:
        query = query.where(table.c.feature_service == feature_service)
    if start_us is not None:
        query = query.where(table.c.window_us >= start_us)
    if end_us is not None:
        query = query.where(table.c.window_us < end_us)
    return query


def _add_rates(connection: Connection, one: Rates) -> None:
    tally = one.tally
    sums = {name: getattr(tally, name) for name in SUMS}
    keys = {"window_us": one.window_us, "digest": one.digest, "feature_service": one.feature_service}
    keys["feature"] = one.feature
    made = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    added = made(windows_table).values(**keys, width_us=one.width_us, **sums)
    old = windows_table.c
    connection.execute(
        added.on_conflict_do_update(
            index_elements=list(keys), set_={name: old[name] + added.excluded[name] for name in SUMS}
        )
    )


def _add_finding(connection: Connection, finding: Finding, max_findings: int) -> None:
    """Keep it unless the window has `max_findings` of its feature and kind (replicas that finish together may keep a few more)."""
    table = findings_table.c
    same = (
        (table.window_us == finding.window_us)
        & (table.digest == finding.digest)
        & (table.feature_service == finding.feature_service)
        & (table.feature == finding.feature)
        & (table.kind == finding.kind)
    )
    there = connection.execute(select(func.count()).select_from(findings_table).where(same)).scalar_one()
    if there >= max_findings:
        return
    row = {
        "window_us": finding.window_us,
        "digest": finding.digest,
        "feature_service": finding.feature_service,
        "feature": finding.feature,
        "kind": finding.kind,
        "entity": json.dumps([list(finding.entity), to_text(list(finding.entity.values()))]),
        "asked_us": finding.asked_us,
        "served_us": finding.served_us,
        "expected": finding.expected,
        "served": finding.served,
        "versions": json.dumps(dict(finding.versions), sort_keys=True),
    }
    connection.execute(insert(findings_table).values(row))


def _rates(row: Any) -> Rates:
    tally = Tally(*(getattr(row, name) for name in SUMS))
    return Rates(row.window_us, row.width_us, row.digest, row.feature_service, row.feature, tally)


def _finding(row: Any) -> Finding:
    names, values = json.loads(row.entity)
    return Finding(
        window_us=row.window_us,
        digest=row.digest,
        feature_service=row.feature_service,
        feature=row.feature,
        kind=next(kind for kind in KINDS if kind == row.kind),
        entity=dict(zip(names, from_text(values), strict=True)),
        asked_us=row.asked_us,
        served_us=row.served_us,
        expected=row.expected,
        served=row.served,
        versions=json.loads(row.versions),
    )
