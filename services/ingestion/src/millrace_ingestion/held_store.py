"""Quarantined batches in SQL. They come and go with the groups of `store.py`, in its transactions."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from millrace_kit.clock import Clock
from millrace_kit.sql import reading, writing
from sqlalchemy import Connection, Engine, Row, select

from millrace_ingestion.models import Group, HeldBatch
from millrace_ingestion.tables import COMMIT, QUARANTINE

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def hold(connection: Connection, group: Group, now_us: int) -> None:
    """Keep what a group holds, and what it releases, in the running transaction."""
    rows = [
        {
            "group_id": group.id,
            "contract": group.contract,
            "source": entry.source,
            "offset": entry.offset,
            "reason": entry.held.reason,
            "column": entry.held.column,
            "detail": entry.held.detail,
            "rows": entry.quarantined,
            "received_at_us": now_us,
        }
        for entry in group.entries
        if entry.held is not None
    ]
    if rows:
        connection.execute(QUARANTINE.insert(), rows)
    released = [held for entry in group.entries for held in entry.released_ids]
    if released:
        chosen = QUARANTINE.c.id.in_(released)
        connection.execute(QUARANTINE.update().where(chosen).values(release_group_id=group.id))


def unhold(connection: Connection, group_id: str) -> None:
    """Undo `hold` for a group that never happened, in the running transaction."""
    connection.execute(QUARANTINE.delete().where(QUARANTINE.c.group_id == group_id))
    released = QUARANTINE.c.release_group_id == group_id
    connection.execute(QUARANTINE.update().where(released).values(release_group_id=None))


class HeldStore:
    """Looking at quarantined batches, and discarding them. Every method blocks.

    Args:
        engine: the service's database.
        clock: when a batch was discarded.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def batches(
        self, contract: str, *, after: int = 0, limit: int, settled: bool = False, ids: Sequence[int] = ()
    ) -> list[HeldBatch]:
        """Batches by id, from the first above `after`; without `settled` only those that are still held.

        Raises:
            UnavailableError: the database does not answer.
        """
        query = (
            select(QUARANTINE)
            .join(COMMIT, QUARANTINE.c.group_id == COMMIT.c.id)
            .where(QUARANTINE.c.contract == contract, QUARANTINE.c.id > after, COMMIT.c.table_version.is_not(None))
        )
        if ids:
            query = query.where(QUARANTINE.c.id.in_(ids))
        if not settled:
            query = query.where(QUARANTINE.c.release_group_id.is_(None), QUARANTINE.c.discarded_at_us.is_(None))
        with reading(self._engine) as connection:
            return [_held(row) for row in connection.execute(query.order_by(QUARANTINE.c.id).limit(limit))]

    def discard(self, contract: str, ids: Sequence[int]) -> int:
        """Give up batches that are held; returns how many there were.

        Raises:
            UnavailableError: the database does not answer.
        """
        chosen = (
            QUARANTINE.c.contract == contract,
            QUARANTINE.c.id.in_(ids),
            QUARANTINE.c.release_group_id.is_(None),
            QUARANTINE.c.discarded_at_us.is_(None),
        )
        now_us = (self._clock.now() - _EPOCH) // _MICROSECOND
        with writing(self._engine) as connection:
            return connection.execute(QUARANTINE.update().where(*chosen).values(discarded_at_us=now_us)).rowcount


def _held(row: Row[Any]) -> HeldBatch:
    return HeldBatch(
        row.id,
        row.contract,
        row.source,
        row.offset,
        row.reason,
        row.column,
        row.detail,
        row.rows,
        _EPOCH + row.received_at_us * _MICROSECOND,
        row.release_group_id is not None,
        row.discarded_at_us is not None,
    )
