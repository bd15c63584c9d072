"""Sources in SQL. Every method blocks; callers use a thread."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.errors import ConflictError, NotFoundError
from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from millrace_ingestion.sources.convert import source_bytes, source_from_bytes
from millrace_ingestion.sources.specs import Source, Standing, State
from millrace_ingestion.sources.tables import SOURCE, SOURCE_FILE, SOURCE_START, SOURCE_STATE

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class SourceStore:
    """What is kept about sources.

    Args:
        engine: the service's database.
        clock: time of registrations and looks.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def _now_us(self) -> int:
        return (self._clock.now() - _EPOCH) // _MICROSECOND

    def sources(self) -> dict[str, tuple[Source, Standing]]:
        """The newest version of every source that is not removed, by name."""
        newest = select(SOURCE.c.name, func.max(SOURCE.c.version).label("version")).group_by(SOURCE.c.name).subquery()
        query = (
            select(SOURCE, SOURCE_STATE)
            .join(newest, (SOURCE.c.name == newest.c.name) & (SOURCE.c.version == newest.c.version))
            .join(SOURCE_STATE, SOURCE.c.name == SOURCE_STATE.c.name)
            .where(SOURCE_STATE.c.state != State.REMOVED.value)
            .order_by(SOURCE.c.name)
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
        return {
            row[SOURCE.c.name]: (
                source_from_bytes(
                    row[SOURCE.c.version], bytes(row[SOURCE.c.body]), _instant(row[SOURCE.c.registered_at_us])
                ),
                Standing(
                    State(row[SOURCE_STATE.c.state]),
                    row[SOURCE_STATE.c.error],
                    row[SOURCE_STATE.c.turn],
                    None if row[SOURCE_STATE.c.last_run_us] is None else _instant(row[SOURCE_STATE.c.last_run_us]),
                    row[SOURCE_STATE.c.last_result],
                ),
            )
            for row in rows
        }

    def add(self, source: Source) -> Source:
        """Keep a new version of a source, and let it run; returns it with its number.

        Raises:
            ConflictError: somebody else registered that version first.
        """
        now = self._now_us()
        body = source_bytes(source)
        newest = select(func.max(SOURCE.c.version)).where(SOURCE.c.name == source.name)
        try:
            with writing(self._engine) as connection:
                version = int(connection.execute(newest).scalar() or 0) + 1
                row = {"name": source.name, "version": version, "body": body, "registered_at_us": now}
                connection.execute(SOURCE.insert(), row)
                changed = connection.execute(
                    SOURCE_STATE.update()
                    .where(SOURCE_STATE.c.name == source.name)
                    .values(state=State.RUNNING.value, error="", turn=SOURCE_STATE.c.turn + 1, last_run_us=None)
                )
                if not changed.rowcount:
                    connection.execute(SOURCE_STATE.insert(), {"name": source.name, "state": State.RUNNING.value})
        except IntegrityError:
            message = f"source {source.name!r} was registered meanwhile"
            raise ConflictError("SOURCE_CHANGED", message, {"source": source.name}) from None
        return source_from_bytes(version, body, _instant(now))

    def set_state(self, name: str, state: State, error: str = "", *, turn: bool = False) -> None:
        """Decide about a source; `turn` asks for a look now.

        Raises:
            NotFoundError: there is none of that name.
        """
        table = SOURCE_STATE
        values: dict[str, object] = {"state": state.value, "error": error}
        if turn:
            values |= {"turn": table.c.turn + 1, "last_run_us": None}
        there = (table.c.name == name) & (table.c.state != State.REMOVED.value)
        with writing(self._engine) as connection:
            if not connection.execute(table.update().where(there).values(values)).rowcount:
                raise NotFoundError("source", name)

    def looked(self, name: str, result: str, *, done: bool) -> None:
        """Note a look for files that ended; `done` when there will be no other by itself."""
        values: dict[str, object] = {"last_run_us": self._now_us(), "last_result": result}
        running = SOURCE_STATE.c.state == State.RUNNING.value
        with writing(self._engine) as connection:
            connection.execute(SOURCE_STATE.update().where(SOURCE_STATE.c.name == name).values(values))
            if done:
                finish = SOURCE_STATE.update().where(SOURCE_STATE.c.name == name, running)
                connection.execute(finish.values(state=State.DONE.value))

    def starts(self, name: str) -> Mapping[tuple[str, int], int]:
        """Where reading began, by topic and partition."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(SOURCE_START).where(SOURCE_START.c.name == name)).all()
        return {(row.topic, row.partition): row.position for row in rows}

    def begin(self, name: str, topic: str, partition: int, position: int) -> int:
        """Keep where reading begins, unless another process was first; returns what holds."""
        row = {"name": name, "topic": topic, "partition": partition, "position": position}
        try:
            with writing(self._engine) as connection:
                connection.execute(SOURCE_START.insert(), row)
        except IntegrityError:
            return self.starts(name)[topic, partition]
        return position

    def files(self, name: str) -> Mapping[str, str]:
        """Files that are settled: the error of those that cannot be read, else an empty string, by identity."""
        query = select(SOURCE_FILE.c.identity, SOURCE_FILE.c.error).where(SOURCE_FILE.c.name == name)
        with reading(self._engine) as connection:
            return {row.identity: row.error for row in connection.execute(query)}

    def settle(self, name: str, identity: str, url: str, rows: int, error: str = "") -> None:
        """Note that a file landed whole, or why it cannot."""
        values = {"url": url, "rows": rows, "error": error, "finished_at_us": self._now_us()}
        this = (SOURCE_FILE.c.name == name) & (SOURCE_FILE.c.identity == identity)
        with writing(self._engine) as connection:
            if not connection.execute(SOURCE_FILE.update().where(this).values(values)).rowcount:
                connection.execute(SOURCE_FILE.insert(), {"name": name, "identity": identity, **values})

    def forget_errors(self, name: str) -> None:
        """Let files that could not be read be tried again."""
        with writing(self._engine) as connection:
            connection.execute(SOURCE_FILE.delete().where(SOURCE_FILE.c.name == name, SOURCE_FILE.c.error != ""))


def _instant(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND
