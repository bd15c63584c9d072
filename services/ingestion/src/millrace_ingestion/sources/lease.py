"""Only one process reads sources: a table has one writer, and two that both get records would fence each other all the time.

The holder beats in the database. Another process takes the lease when it is free, or when it has seen no beat for a while by its own clock, so
clocks need not agree. The lease is for peace, not for truth: should two hold it for a moment, what landed decides all the same.
"""

from dataclasses import dataclass

from millrace_kit.clock import Clock
from millrace_kit.sql import writing
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from millrace_ingestion.sources.tables import SOURCE_LEASE

_ID = 1


@dataclass(frozen=True)
class _Seen:
    holder: str
    beat: int
    since: float


class Lease:
    """This process's claim to read sources. Every method blocks.

    Args:
        engine: the service's database.
        holder: a name of this process that no other has.
        clock: how long a beat was not seen.
        lease_s: silence after which the holder is taken for dead.
    """

    def __init__(self, engine: Engine, holder: str, clock: Clock, lease_s: float) -> None:
        self._engine = engine
        self._holder = holder
        self._clock = clock
        self._lease_s = lease_s
        self._seen: _Seen | None = None

    def hold(self) -> bool:
        """Beat, or take the lease where nobody does; whether this process holds it.

        Raises:
            UnavailableError: the database does not answer.
        """
        table = SOURCE_LEASE
        try:
            with writing(self._engine) as connection:
                row = connection.execute(select(table).where(table.c.id == _ID)).one_or_none()
                if row is None:
                    connection.execute(table.insert(), {"id": _ID, "holder": self._holder, "beat": 1})
                    return True
                if row.holder != self._holder and not self._silent(row.holder, row.beat):
                    return False
                unchanged = (table.c.id == _ID) & (table.c.holder == row.holder) & (table.c.beat == row.beat)
                values = {"holder": self._holder, "beat": row.beat + 1}
                return bool(connection.execute(table.update().where(unchanged).values(values)).rowcount)
        except IntegrityError:
            return False  # somebody else was first

    def release(self) -> None:
        """Let another process take it at once."""
        mine = SOURCE_LEASE.c.holder == self._holder
        with writing(self._engine) as connection:
            connection.execute(SOURCE_LEASE.update().where(mine).values(holder=""))

    def _silent(self, holder: str, beat: int) -> bool:
        """Whether nobody holds it, or the holder was not heard for `lease_s`."""
        now = self._clock.monotonic()
        if self._seen is None or (self._seen.holder, self._seen.beat) != (holder, beat):
            self._seen = _Seen(holder, beat, now)
        return not holder or now - self._seen.since >= self._lease_s
