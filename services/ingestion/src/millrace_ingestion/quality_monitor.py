"""Keeps the figures of `quality.py` in buckets of time: in memory, now and then in the database, and as metrics.

They are an aid to look, no part of what has to be exact: a process that is killed loses those since its last flush. In the database two
processes add to the same bucket.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError
from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, select

from millrace_ingestion import metrics
from millrace_ingestion.quality import Figures, decode, encode
from millrace_ingestion.tables import QUALITY

log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_Key = tuple[str, int]
"""Contract and the bucket's beginning."""


@dataclass(frozen=True)
class Bucket:
    """The figures of one contract and time."""

    start: datetime
    end: datetime
    figures: Figures


class QualityMonitor:
    """Observes commits of every contract; may be called from many threads.

    Args:
        engine: the service's database.
        clock: into which bucket a commit falls.
        bucket: length of a bucket.
        keep: how long buckets are kept.
        flush_s: between two looks at what has to be stored or removed.
        max_series: columns, and rules, of all contracts together that get metrics; the others are in the buckets only.
    """

    def __init__(
        self, engine: Engine, clock: Clock, *, bucket: timedelta, keep: timedelta, flush_s: float, max_series: int
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._bucket = bucket
        self._keep = keep
        self._flush_s = flush_s
        self._max_series = max_series
        self._series: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._waiting: dict[_Key, Figures] = {}

    def now_us(self) -> int:
        """The time that a commit belongs to, for `observe`."""
        return (self._clock.now() - _EPOCH) // _MICROSECOND

    def observe(self, contract: str, now_us: int, figures: Figures) -> None:
        """Take in one commit; see `quality.figures_of`."""
        length_us = self._bucket // _MICROSECOND
        with self._lock:
            self._waiting.setdefault((contract, now_us // length_us * length_us), Figures()).add(figures)
            self._show(contract, figures)

    def _show(self, contract: str, figures: Figures) -> None:
        for name, column in figures.columns.items():
            if not self._has_series(contract, name):
                continue
            metrics.COLUMN_VALUES.labels(contract, name).inc(column.values)
            metrics.COLUMN_NULLS.labels(contract, name).inc(column.nulls)
            metrics.COLUMN_DISTINCT.labels(contract, name).set(column.distinct)
            for gauge, value in (
                (metrics.COLUMN_MIN, column.minimum),
                (metrics.COLUMN_MAX, column.maximum),
                (metrics.COLUMN_MEAN, column.mean),
            ):
                if value is not None:
                    gauge.labels(contract, name).set(value)
        for (subject, check, policy), count in figures.failures.items():
            if self._has_series(contract, subject):
                metrics.CHECK_FAILURES.labels(contract, subject, check, policy.lower()).inc(count)

    def _has_series(self, contract: str, subject: str) -> bool:
        key = (contract, subject)
        if key not in self._series and len(self._series) < self._max_series:
            self._series.add(key)
        return key in self._series

    async def run(self, stop: asyncio.Event) -> None:
        """Store and remove buckets until `stop` is set, and once more then; what cannot be stored waits."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while True:
                last = stop.is_set()
                try:
                    await asyncio.to_thread(self.flush)
                except MillraceError as error:
                    log.warning("quality figures could not be stored: %s", error)
                if last:
                    return
                await asyncio.wait([stopping], timeout=self._flush_s)
        finally:
            stopping.cancel()

    def flush(self) -> None:
        """Add what was observed to the database, and remove what is too old there.

        Raises:
            UnavailableError: the database does not answer; the figures stay.
        """
        with self._flushing:
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            try:
                self._store(waiting)
            except BaseException:
                with self._lock:
                    for key, figures in waiting.items():
                        self._waiting.setdefault(key, Figures()).add(figures)
                raise

    def _store(self, waiting: dict[_Key, Figures]) -> None:
        oldest_us = (self._clock.now() - self._keep - _EPOCH) // _MICROSECOND
        with writing(self._engine) as connection:
            connection.execute(QUALITY.delete().where(QUALITY.c.start_us < oldest_us))
            for (contract, start_us), figures in waiting.items():
                place = (QUALITY.c.contract == contract, QUALITY.c.start_us == start_us)
                row = connection.execute(select(QUALITY.c.body).where(*place).with_for_update()).one_or_none()
                if row is None:
                    values = {"contract": contract, "start_us": start_us, "body": encode(figures), **_versions(figures)}
                    connection.execute(QUALITY.insert(), values)
                else:
                    stored = decode(bytes(row.body))
                    stored.add(figures)
                    change = {"body": encode(stored), **_versions(stored)}
                    connection.execute(QUALITY.update().where(*place).values(**change))

    def buckets(
        self, contract: str, *, since_us: int | None, until_us: int | None, version: int | None, limit: int
    ) -> list[Bucket]:
        """The newest `limit` buckets, oldest first.

        Args:
            contract: of which contract.
            since_us: those that end after it; microseconds since the epoch.
            until_us: those that begin before it.
            version: those whose commits' table versions enclose it.
            limit: how many.

        Raises:
            UnavailableError: the database does not answer.
        """
        self.flush()
        query = select(QUALITY).where(QUALITY.c.contract == contract)
        if since_us is not None:
            query = query.where(QUALITY.c.start_us > since_us - self._bucket // _MICROSECOND)
        if until_us is not None:
            query = query.where(QUALITY.c.start_us < until_us)
        if version is not None:
            query = query.where(QUALITY.c.first_version <= version, QUALITY.c.last_version >= version)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(QUALITY.c.start_us.desc()).limit(limit)).all()
        starts = [(_EPOCH + row.start_us * _MICROSECOND, decode(bytes(row.body))) for row in reversed(rows)]
        return [Bucket(start, start + self._bucket, figures) for start, figures in starts]


def _versions(figures: Figures) -> dict[str, int]:
    return {"first_version": figures.first_version, "last_version": figures.last_version}


def merged(buckets: Sequence[Bucket]) -> Bucket | None:
    """All as one; None for none."""
    if not buckets:
        return None
    total = Figures()
    for bucket in buckets:
        total.add(bucket.figures)
    return Bucket(buckets[0].start, buckets[-1].end, total)
