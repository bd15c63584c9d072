"""Looking at dead letters, counting, choosing and discarding them. Every method blocks.

They come and go with the groups of `store.py`, in its transactions; those of a group that is not complete are invisible here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millrace_kit.sql import reading, writing
from sqlalchemy import ColumnElement, Engine, func, select

from millrace_ingestion.letter_rows import letter_of
from millrace_ingestion.models import Letter, LetterCount
from millrace_ingestion.tables import COMMIT, DEAD_LETTER

# Rows of one deleting transaction: others get their turn in between.
_DELETED_AT_ONCE = 1_000
_COMPLETE = (
    select(COMMIT.c.id).where(COMMIT.c.id == DEAD_LETTER.c.group_id, COMMIT.c.table_version.is_not(None)).exists()
)


@dataclass(frozen=True)
class Choice:
    """Which dead letters of a contract; empty texts and None choose all."""

    contract: str
    reason: str = ""
    column: str = ""
    source: str = ""
    since_us: int | None = None
    """Received at or after; microseconds since the epoch, as is `until_us`."""
    until_us: int | None = None
    """Received before."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """The choice in SQL."""
        letter = DEAD_LETTER.c
        found = [letter.contract == self.contract]
        for column, value in ((letter.reason, self.reason), (letter.column, self.column), (letter.source, self.source)):
            if value:
                found.append(column == value)
        if self.since_us is not None:
            found.append(letter.received_at_us >= self.since_us)
        if self.until_us is not None:
            found.append(letter.received_at_us < self.until_us)
        return found


class LetterStore:
    """Dead letters in SQL.

    Args:
        engine: the service's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def kept(self) -> int:
        """How many dead letters there are.

        Raises:
            UnavailableError: the database does not answer; so do the others.
        """
        with reading(self._engine) as connection:
            return int(connection.execute(select(func.count()).select_from(DEAD_LETTER)).scalar() or 0)

    def letters(self, choice: Choice, *, after: int, limit: int, only_open: bool = False) -> list[Letter]:
        """By id, from the first above `after`; `only_open` leaves out those that a replay has landed or can do nothing for."""
        query = select(DEAD_LETTER).where(_COMPLETE, DEAD_LETTER.c.id > after, *choice.conditions())
        if only_open:
            query = query.where(DEAD_LETTER.c.replay_group_id.is_(None), DEAD_LETTER.c.record_json != "")
        with reading(self._engine) as connection:
            return [letter_of(row) for row in connection.execute(query.order_by(DEAD_LETTER.c.id).limit(limit))]

    def counts(self, contract: str) -> list[LetterCount]:
        """By contract and reason; an empty `contract` counts all."""
        letter = DEAD_LETTER.c
        query: Any = select(
            letter.contract,
            letter.reason,
            func.count().label("letters"),
            func.count(letter.replay_group_id).label("replayed"),
        ).where(_COMPLETE)
        if contract:
            query = query.where(letter.contract == contract)
        query = query.group_by(letter.contract, letter.reason).order_by(letter.contract, letter.reason)
        with reading(self._engine) as connection:
            return [
                LetterCount(row.contract, row.reason, row.letters, row.replayed) for row in connection.execute(query)
            ]

    def discard(self, choice: Choice, limit: int | None = None) -> int:
        """Remove the oldest `limit` of them, all without; returns how many."""
        return self._remove([_COMPLETE, *choice.conditions()], limit)

    def trim(self, *, older_than_us: int | None, keep: int | None, published: bool) -> int:
        """Remove those received before an instant, and the oldest beyond a count; returns how many.

        Args:
            older_than_us: None removes none by age.
            keep: None removes none by count.
            published: only those that are on the dead-letter topic.
        """
        ready = [_COMPLETE, *([DEAD_LETTER.c.published_at_us != 0] if published else [])]
        removed = 0
        if older_than_us is not None:
            removed += self._remove([*ready, DEAD_LETTER.c.received_at_us < older_than_us], None)
        if keep is not None:
            newest = select(DEAD_LETTER.c.id).order_by(DEAD_LETTER.c.id.desc()).offset(keep).limit(1)
            with reading(self._engine) as connection:
                last = connection.execute(newest).scalar()
            if last is not None:
                removed += self._remove([*ready, DEAD_LETTER.c.id <= last], None)
        return removed

    def _remove(self, conditions: Sequence[ColumnElement[bool]], limit: int | None) -> int:
        removed = 0
        while limit is None or removed < limit:
            most = _DELETED_AT_ONCE if limit is None else min(_DELETED_AT_ONCE, limit - removed)
            chosen = select(DEAD_LETTER.c.id).where(*conditions).order_by(DEAD_LETTER.c.id).limit(most)
            with writing(self._engine) as connection:
                ids = connection.execute(chosen).scalars().all()
                connection.execute(DEAD_LETTER.delete().where(DEAD_LETTER.c.id.in_(ids)))
            removed += len(ids)
            if len(ids) < most:
                break
        return removed

    def unpublished(self, *, limit: int, max_bytes: int) -> list[Letter]:
        """The oldest that are not on the topic yet, at most `limit`, and no more than `max_bytes` of records unless one alone is larger."""
        letter = DEAD_LETTER.c
        size = func.length(letter.record_json) + func.coalesce(func.length(letter.origin_value), 0)
        waiting = select(letter.id, size.label("size")).where(letter.published_at_us == 0, _COMPLETE)
        with reading(self._engine) as connection:
            ids: list[int] = []
            total = 0
            for row in connection.execute(waiting.order_by(letter.id).limit(limit)):
                total += row.size
                if ids and total > max_bytes:
                    break
                ids.append(row.id)
            query = select(DEAD_LETTER).where(letter.id.in_(ids)).order_by(letter.id)
            return [letter_of(row) for row in connection.execute(query)] if ids else []

    def mark_published(self, ids: Sequence[int], now_us: int) -> None:
        """Note that these are on the topic."""
        chosen = DEAD_LETTER.c.id.in_(ids)
        with writing(self._engine) as connection:
            connection.execute(DEAD_LETTER.update().where(chosen).values(published_at_us=now_us))
