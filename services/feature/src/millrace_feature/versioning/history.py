"""Versions of definitions in SQL: their history, and which are kept served beside those in force.

That a pin has run out is decided once, by whoever takes it out of the table, so that replicas with other clocks follow the same versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from millrace_kit.errors import NotFoundError, ResourceExhaustedError
from millrace_kit.sql import reading, writing
from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, delete, func, insert, select, update

from millrace_feature.tables import applied_table, definitions_table, pins_table

PREVIOUS = "previous"
"""Name of the pin that definitions get when others come into force."""
MAX_PINS = 64


@dataclass(frozen=True, slots=True)
class Applied:
    """One time that definitions came into force."""

    number: int
    digest: str
    project: str
    at: datetime
    author: str
    rollback: bool


@dataclass(frozen=True, slots=True)
class Pin:
    """Definitions that are kept served; `until` is None for ever."""

    digest: str
    name: str
    until: datetime | None


class Versions:
    """The tables `applied` and `pins`. Safe from any thread; every method raises UnavailableError without the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def live(self) -> tuple[str, ...]:
        """Hashes that are followed and served: those in force first, then the pinned ones, sorted. Empty before anything is applied."""
        with reading(self._engine) as connection:
            newest = connection.execute(_newest()).scalar()
            if newest is None:
                return ()
            pinned = connection.execute(select(pins_table.c.digest).distinct()).scalars()
            return (newest, *sorted(set(pinned) - {newest}))

    def has_run_out(self, now: datetime) -> bool:
        """Whether a pin's time is over."""
        with reading(self._engine) as connection:
            return connection.execute(select(pins_table.c.digest).where(_over(now)).limit(1)).scalar() is not None

    def drop_run_out(self, now: datetime) -> None:
        """Take pins away whose time is over."""
        with writing(self._engine) as connection:
            connection.execute(delete(pins_table).where(_over(now)))

    def roll_back(self, digest: str, *, at: datetime, author: str, kept_s: int) -> bool:
        """Put earlier definitions in force; False when they are.

        Raises:
            NotFoundError: they were never in force here.
        """
        with writing(self._engine) as connection:
            newest = connection.execute(_newest()).scalar()
            if newest == digest:
                return False
            known = select(applied_table.c.id).where(applied_table.c.digest == digest).limit(1)
            if newest is None or connection.execute(known).scalar() is None:
                raise NotFoundError("definitions", digest)
            row = {"digest": digest, "at": at, "author": author, "rollback": True}
            connection.execute(insert(applied_table).values(row))
            keep_previous(connection, newest, at, kept_s)
            return True

    def pin(self, pin: Pin) -> None:
        """Keep definitions served; a pin of the same hash and name is replaced.

        Raises:
            NotFoundError: there are no such definitions.
            ResourceExhaustedError: there are too many pins.
        """
        with writing(self._engine) as connection:
            known = select(definitions_table.c.digest).where(definitions_table.c.digest == pin.digest)
            if connection.execute(known).scalar() is None:
                raise NotFoundError("definitions", pin.digest)
            _put(connection, pin)
            if (connection.execute(select(func.count()).select_from(pins_table)).scalar() or 0) > MAX_PINS:
                raise ResourceExhaustedError("max_pins", f"at most {MAX_PINS} pins may be held; take others away first")

    def unpin(self, digest: str, name: str) -> None:
        """Take a pin away.

        Raises:
            NotFoundError: there is none of that name.
        """
        with writing(self._engine) as connection:
            if not connection.execute(delete(pins_table).where(_is(digest, name))).rowcount:
                raise NotFoundError("pin", f"{digest}/{name}")

    def pins(self) -> Sequence[Pin]:
        """All pins, sorted."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(pins_table).order_by(pins_table.c.digest, pins_table.c.name)).all()
        return [Pin(row.digest, row.name, _aware(row.until)) for row in rows]

    def history(self, *, before: int | None, limit: int) -> Sequence[Applied]:
        """Times that definitions came into force, newest first, with numbers below `before`."""
        columns = (*applied_table.c, definitions_table.c.project)
        query = select(*columns).join(definitions_table, definitions_table.c.digest == applied_table.c.digest)
        if before is not None:
            query = query.where(applied_table.c.id < before)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(applied_table.c.id.desc()).limit(limit)).all()
        return [Applied(r.id, r.digest, r.project, utc(r.at), r.author, r.rollback) for r in rows]


def keep_previous(connection: Connection, digest: str, at: datetime, kept_s: int) -> None:
    """Pin what was in force until now for a while, so that going back to it needs no filling; 0 drops it at once."""
    if kept_s:
        _put(connection, Pin(digest, PREVIOUS, at + timedelta(seconds=kept_s)))


def utc(instant: datetime) -> datetime:
    """The instant with its zone, which SQLite forgets."""
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)


def _aware(instant: datetime | None) -> datetime | None:
    return utc(instant) if instant is not None else None


def _newest() -> Select[str]:
    return select(applied_table.c.digest).order_by(applied_table.c.id.desc()).limit(1)


def _over(now: datetime) -> ColumnElement[bool]:
    return and_(pins_table.c.until.is_not(None), pins_table.c.until <= now)


def _is(digest: str, name: str) -> ColumnElement[bool]:
    return and_(pins_table.c.digest == digest, pins_table.c.name == name)


def _put(connection: Connection, pin: Pin) -> None:
    changed = update(pins_table).where(_is(pin.digest, pin.name)).values(until=pin.until)
    if not connection.execute(changed).rowcount:
        connection.execute(insert(pins_table).values(digest=pin.digest, name=pin.name, until=pin.until))
