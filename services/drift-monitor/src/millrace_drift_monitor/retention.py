"""Removes what is too old or too many, a chunk a transaction, and counts it."""

import asyncio
from dataclasses import dataclass

from millrace_kit.clock import Clock
from sqlalchemy import Connection, Table, delete, func, select

from millrace_drift_monitor import metrics
from millrace_drift_monitor.answers import Answers
from millrace_drift_monitor.convert import now_micros
from millrace_drift_monitor.records import MICROS
from millrace_drift_monitor.settings import Retention
from millrace_drift_monitor.store import Store
from millrace_drift_monitor.tables import EVENT_WINDOW, FIGURE_SPAN, FINDING, OUTCOME, PREDICTION, SEEN_BATCH

# Rows removed in one transaction, so that the stream never waits long.
CHUNK = 5000


@dataclass(frozen=True, slots=True)
class _Limit:
    table: Table
    what: str
    max_rows: int
    has_age: bool


class Cleaner:
    """Keeps the tables within their limits.

    Args:
        store: the drift monitor's database.
        answers: counts what waits for outcomes.
        limits: how much is kept.
        clock: wall clock.
    """

    def __init__(self, store: Store, answers: Answers, limits: Retention, clock: Clock) -> None:
        self._store = store
        self._answers = answers
        self._limits = limits
        self._clock = clock
        self._tables = (
            _Limit(PREDICTION, "prediction", limits.max_predictions, has_age=True),
            _Limit(OUTCOME, "outcome", limits.max_outcomes, has_age=True),
            _Limit(SEEN_BATCH, "seen_batch", limits.max_seen_batches, has_age=False),
            _Limit(EVENT_WINDOW, "window", limits.max_windows, has_age=False),
            _Limit(FINDING, "finding", limits.max_findings, has_age=False),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Clean up every `interval_s` until `stop` is set."""
        while not stop.is_set():
            while not stop.is_set() and await asyncio.to_thread(self.clean_once):
                pass
            metrics.UNJOINED.set(await asyncio.to_thread(self._answers.waiting))
            try:
                await asyncio.wait_for(stop.wait(), self._limits.interval_s)
            except TimeoutError:
                continue

    def clean_once(self) -> bool:
        """Remove at most one chunk from each table; True when more may be left."""
        oldest_us = now_micros(self._clock.now()) - int(self._limits.max_age_s * MICROS)
        is_more = False
        for limit in self._tables:
            with self._store.write() as connection:
                removed = self._trim(connection, limit, oldest_us)
            metrics.REMOVED.labels(limit.what).inc(removed)
            is_more |= removed == CHUNK
        spans_us = now_micros(self._clock.now()) - int(self._limits.figures_age_s * MICROS)
        with self._store.write() as connection:
            connection.execute(delete(FIGURE_SPAN).where(FIGURE_SPAN.c.span_us < spans_us))
        return is_more

    def _trim(self, connection: Connection, limit: _Limit, oldest_us: int) -> int:
        table = limit.table
        newest = connection.execute(select(func.max(table.c.seq))).scalar()
        if newest is None:
            return 0
        # Sequence numbers rise by one a row, so this bounds the rows without counting them.
        is_over = table.c.seq <= newest - limit.max_rows
        if limit.has_age:
            is_over |= table.c.stored_us < oldest_us
        doomed = select(table.c.seq).where(is_over)
        if table is EVENT_WINDOW:
            doomed = doomed.where(table.c.closed_us.is_not(None))
        ids = connection.execute(doomed.order_by(table.c.seq).limit(CHUNK)).scalars().all()
        if not ids:
            return 0
        here = (table.c.seq >= ids[0]) & (table.c.seq <= ids[-1]) & is_over
        if table is EVENT_WINDOW:
            here &= table.c.closed_us.is_not(None)
        if table is PREDICTION:
            unjoined = select(func.count()).select_from(table).where(here, table.c.outcome.is_(None))
            metrics.UNJOINED_REMOVED.inc(connection.execute(unjoined).scalar_one())
        return int(connection.execute(delete(table).where(here)).rowcount)
