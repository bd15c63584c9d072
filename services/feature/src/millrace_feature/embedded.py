"""The online store of one machine: SQLite for durability, memory for reads.

Every change is one SQLite transaction that also holds the bus positions and the batches seen, so after kill -9 the store resumes where
its last transaction ended and nothing counts twice. On start the groups are read back into memory.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace_kit.bus import TopicPartition
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from millrace_kit.sql import open_engine, reading
from sqlalchemy import Connection

from millrace_feature.index import FieldIndex, RowIndex
from millrace_feature.plan import LatestView, View, WindowView
from millrace_feature.rows import Row, from_text, to_text
from millrace_feature.store import (
    Ask,
    Change,
    Content,
    Followed,
    LatestAsk,
    Mark,
    NewestRow,
    WindowAsk,
    rows_bound_us,
    rows_of,
    tiles_of,
)
from millrace_feature.tile_fields import FieldChange, Fields, layout_of

FORMAT = 1
SEEN_LIMIT = 1_000_000
"""Batches remembered to recognise a second delivery; the bus repeats recent ones only."""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS grp (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL)",
    "DROP TABLE IF EXISTS tile",  # how an earlier version kept tiles; the groups are filled anew
    """CREATE TABLE IF NOT EXISTS field (
        grp INTEGER NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, content BLOB NOT NULL,
        PRIMARY KEY (grp, key, name)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS row (
        grp INTEGER NOT NULL, key TEXT NOT NULL, time_us INTEGER NOT NULL, content TEXT NOT NULL,
        PRIMARY KEY (grp, key, time_us)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS position (
        topic TEXT NOT NULL, part INTEGER NOT NULL, next_offset INTEGER NOT NULL, PRIMARY KEY (topic, part)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS seen (
        id INTEGER PRIMARY KEY AUTOINCREMENT, contract TEXT NOT NULL, source TEXT NOT NULL, source_offset INTEGER NOT NULL,
        UNIQUE (contract, source, source_offset))""",
    """CREATE TABLE IF NOT EXISTS followed (
        contract TEXT PRIMARY KEY, records INTEGER NOT NULL, watermark_us INTEGER, version INTEGER NOT NULL) WITHOUT ROWID""",
)
_PUT_FIELD = "INSERT OR REPLACE INTO field VALUES (?, ?, ?, ?)"
_PUT_ROW = "INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class _Memory:
    """`Answers` from the groups in memory."""

    followed: Mapping[str, Followed]
    tiles: Mapping[str, FieldIndex]
    rows: Mapping[str, RowIndex]

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        return self.tiles[ask.group].read(ask.reader, ask.keys, ask.end_hop)

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        return self.rows[ask.group].read(ask.keys, ask.time_us)

    def floats(self, ask: LatestAsk) -> None:
        """Rows lie in memory as values."""


class EmbeddedOnlineStore:
    """`OnlineStore` on one SQLite file, for one process."""

    is_shared = False

    def __init__(self, path: Path) -> None:
        self._engine = open_engine(f"sqlite:///{path}")
        self._tiles: dict[str, FieldIndex] = {}
        self._rows: dict[str, RowIndex] = {}
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in {0, FORMAT}:
                message = f"{path} has format {found}, this version reads {FORMAT}; move the file away to fill it anew"
                raise FailedPreconditionError("STORE_FORMAT", message, {"path": str(path), "format": str(found)})
            for statement in _SCHEMA:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
        self._followed = dict(self.followed())

    def exclusive(self) -> AbstractContextManager[None]:
        """Nobody else writes."""
        return nullcontext()

    def groups(self) -> Mapping[str, int]:
        """Group -> Delta version it was filled from."""
        with reading(self._engine) as connection:
            return dict(connection.exec_driver_sql("SELECT name, version FROM grp").tuples().all())

    def open(self, views: Iterable[View]) -> None:
        """Read the groups of `views` into memory."""
        for view in views:
            if view.group in self._tiles or view.group in self._rows:
                continue
            with reading(self._engine) as connection:
                number = _number(connection, view.group)
                if number is None:
                    continue
                if isinstance(view, WindowView):
                    index = FieldIndex(layout_of(view))
                    index.put(_read_fields(connection, number))
                    self._tiles[view.group] = index
                else:
                    rows = RowIndex()
                    rows.add(_read_rows(connection, number))
                    self._rows[view.group] = rows

    def reserve(self, view: View, version: int) -> bool:  # noqa: ARG002 - one process applies and fills in turn
        """Nothing is applied while a group is filled."""
        return True

    def fill(self, view: View, content: Content, *, version: int, followed: Followed | None) -> None:
        """Make the view's group from the lake at `version`."""
        with self._engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO grp (name, version) VALUES (?, ?)", (view.group, version))
            number = _number(connection, view.group)
            assert number is not None
            if isinstance(view, WindowView):
                _put_fields(connection, number, FieldChange(layout_of(view), tiles_of(content)).content(None))
            else:
                _put_rows(connection, number, rows_of(content))
            if followed is not None:
                _put_followed(connection, view.contract, followed)
        self.open([view])
        if followed is not None:
            self._followed = {**self._followed, view.contract: followed}

    def keep(self, groups: Iterable[str]) -> None:
        """Drop every group that is not named."""
        wanted = set(groups)
        for name in set(self.groups()) - wanted:
            with self._engine.begin() as connection:
                number = _number(connection, name)
                connection.exec_driver_sql("DELETE FROM field WHERE grp = ?", (number,))
                connection.exec_driver_sql("DELETE FROM row WHERE grp = ?", (number,))
                connection.exec_driver_sql("DELETE FROM grp WHERE id = ?", (number,))
            self._tiles.pop(name, None)
            self._rows.pop(name, None)

    def tidy(self) -> None:
        """Nothing is left to remove after `keep`."""

    def is_intact(self) -> bool:
        """Nobody else changes the file."""
        return True

    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        with reading(self._engine) as connection:
            found = connection.exec_driver_sql("SELECT contract, records, watermark_us, version FROM followed")
            return {contract: Followed(records, watermark, version) for contract, records, watermark, version in found}

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next bus offset to read."""
        with reading(self._engine) as connection:
            found = connection.exec_driver_sql("SELECT topic, part, next_offset FROM position")
            return {TopicPartition(topic, part): offset for topic, part, offset in found}

    def seen(self, marks: Sequence[Mark]) -> Collection[Mark]:
        """Those of some batches that were applied."""
        query = "SELECT 1 FROM seen WHERE contract = ? AND source = ? AND source_offset = ?"
        with reading(self._engine) as connection:
            return [mark for mark in marks if connection.exec_driver_sql(query, mark).first() is not None]

    def apply(self, change: Change) -> None:
        """Commit `change`, then show it to readers."""
        fields = [
            (group, found.content(self._tiles[group].get(found.entities, found.names))) for group, found in change.tiles
        ]
        kept = [(group, self._rows[group].winners(rows)) for group, rows in change.rows]
        with self._engine.begin() as connection:
            numbers = {name: n for n, name in connection.exec_driver_sql("SELECT id, name FROM grp")}
            for group, content in fields:
                _put_fields(connection, numbers[group], content)
            for group, rows in kept:
                _put_rows(connection, numbers[group], rows)
            query = "INSERT INTO seen (contract, source, source_offset) VALUES (?, ?, ?)"
            _execute(connection, query, list(change.seen))
            for contract, followed in change.followed.items():
                _put_followed(connection, contract, followed)
            places = [(p.topic, p.partition, offset) for p, offset in change.positions.items()]
            _execute(connection, "INSERT OR REPLACE INTO position VALUES (?, ?, ?)", places)
        for group, content in fields:
            self._tiles[group].put(content)
        for group, rows in kept:
            self._rows[group].add(rows)
        self._followed = {**self._followed, **change.followed}

    def prune(self, view: View, before_us: int, head_before_us: int) -> None:
        """Forget what no read at or after `before_us` needs."""
        with self._engine.begin() as connection:
            number = _number(connection, view.group)
            if isinstance(view, WindowView):
                dropped = self._tiles[view.group].prune(before_us - view.reach_us, head_before_us - view.hop_us)
                names = [(number, key, name) for key, name in dropped]
                _execute(connection, "DELETE FROM field WHERE grp = ? AND key = ? AND name = ?", names)
            else:
                _prune_rows(connection, number, view, before_us)
            last = connection.exec_driver_sql("SELECT max(id) FROM seen").scalar() or 0
            connection.exec_driver_sql("DELETE FROM seen WHERE id <= ?", (last - SEEN_LIMIT,))
        if isinstance(view, LatestView):
            self._rows[view.group].prune(rows_bound_us(view, before_us), keep_newest=not view.ttl_us)

    async def fetch(self, asks: Sequence[Ask], contracts: Sequence[str]) -> _Memory:  # noqa: ARG002 - all is in memory
        """Everything is in memory."""
        return _Memory(self._followed, self._tiles, self._rows)

    def keys(self, group: str) -> Sequence[str]:
        """The entities of a newest-row view's group."""
        rows = self._rows.get(group)
        if rows is None:
            raise UnavailableError("ONLINE_STORE_REBUILDING", "the view is made anew; try again", {"group": group})
        return rows.keys()

    def entities(self) -> int:
        """Entities with at least one tile or row, over all groups."""
        return sum(map(len, self._tiles.values())) + sum(map(len, self._rows.values()))

    async def close(self) -> None:
        """Close the file."""
        self._engine.dispose()


def _execute(connection: Connection, statement: str, rows: list[Any]) -> None:
    if rows:
        connection.exec_driver_sql(statement, rows)


def _number(connection: Connection, group: str) -> int | None:
    found = connection.exec_driver_sql("SELECT id FROM grp WHERE name = ?", (group,)).scalar()
    return int(found) if found is not None else None


def _put_followed(connection: Connection, contract: str, followed: Followed) -> None:
    row = (contract, followed.records, followed.watermark_us, followed.version)
    connection.exec_driver_sql("INSERT OR REPLACE INTO followed VALUES (?, ?, ?, ?)", row)


def _put_fields(connection: Connection, number: int, fields: Fields) -> None:
    rows = [(number, key, name, content) for key, named in fields for name, content in named.items()]
    _execute(connection, _PUT_FIELD, rows)


def _put_rows(connection: Connection, number: int, rows: Iterable[Row]) -> None:
    _execute(connection, _PUT_ROW, [(number, r.key, r.time_us, to_text(r.values)) for r in rows])


def _read_fields(connection: Connection, number: int) -> Fields:
    found = connection.exec_driver_sql("SELECT key, name, content FROM field WHERE grp = ?", (number,))
    return [(key, {name: content}) for key, name, content in found]


def _read_rows(connection: Connection, number: int) -> list[Row]:
    query = "SELECT key, time_us, content FROM row WHERE grp = ? ORDER BY key, time_us"
    found = connection.exec_driver_sql(query, (number,))
    return [Row(key, time_us, from_text(content)) for key, time_us, content in found]


def _prune_rows(connection: Connection, number: int | None, view: LatestView, before_us: int) -> None:
    bound = rows_bound_us(view, before_us)
    if view.ttl_us:
        connection.exec_driver_sql("DELETE FROM row WHERE grp = ? AND time_us < ?", (number, bound))
        return
    newest = """DELETE FROM row WHERE grp = ?1 AND time_us < (
        SELECT max(older.time_us) FROM row AS older WHERE older.grp = ?1 AND older.key = row.key AND older.time_us < ?2)"""
    connection.exec_driver_sql(newest, (number, bound))
