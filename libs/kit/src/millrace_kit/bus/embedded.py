"""The embedded log: one SQLite file (WAL) shared by the processes of one machine.

Every topic has one partition, 0. A publish is one transaction, so a batch lands whole or not at all. Readers poll; a poll that
finds nothing costs one read of the file's change counter.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from millrace_kit.bus import Message, Outgoing, Starts, TopicPartition
from millrace_kit.errors import UnavailableError
from millrace_kit.settings import BusSettings
from millrace_kit.telemetry import BUS_CONSUMED, BUS_PUBLISHED

POLL_S = 0.02
# Bytes one fetch may return; keeps a consumer's memory bounded however large single messages are.
MAX_FETCH_BYTES = 64 << 20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    topic TEXT NOT NULL, offset INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, headers TEXT NOT NULL,
    timestamp_ms INTEGER NOT NULL, PRIMARY KEY (topic, offset)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS position (
    consumer TEXT NOT NULL, topic TEXT NOT NULL, next_offset INTEGER NOT NULL, PRIMARY KEY (consumer, topic)
) WITHOUT ROWID;
"""

T = TypeVar("T")


class _Database:
    """One connection used from one thread, so that SQLite's calls never block the event loop."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bus")
        self._connection: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(
                self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(_SCHEMA)
            self._connection = connection
        return self._connection

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            return work(self._open())

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except sqlite3.OperationalError as error:
            raise UnavailableError("BUS_UNAVAILABLE", f"the embedded log did not answer: {error}") from error

    async def close(self) -> None:
        def run() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.get_running_loop().run_in_executor(self._thread, run)
        self._thread.shutdown(wait=False)


class EmbeddedBus:
    """The bus of a single machine."""

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._database = _Database(Path(settings.path), settings.request_timeout_s)

    @classmethod
    async def open(cls, settings: BusSettings) -> "EmbeddedBus":
        """Open the log, making its file when it is not there."""
        bus = cls(settings)
        await bus._database.call(lambda _connection: None)
        return bus

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[tuple[TopicPartition, int]]:
        """Append `messages` in one transaction."""
        rows = [
            (m.topic, m.key, m.value, json.dumps({k: v.decode("latin-1") for k, v in m.all_headers().items()}))
            for m in messages
        ]
        now_ms = time.time_ns() // 1_000_000

        def append(connection: sqlite3.Connection) -> list[tuple[TopicPartition, int]]:
            landed: list[tuple[TopicPartition, int]] = []
            ends: dict[str, int] = {}
            connection.execute("BEGIN IMMEDIATE")
            try:
                for topic, key, value, headers in rows:
                    if topic not in ends:
                        query = "SELECT COALESCE(MAX(offset), -1) + 1 FROM message WHERE topic = ?"
                        ends[topic] = connection.execute(query, (topic,)).fetchone()[0]
                    offset = ends[topic]
                    connection.execute(
                        "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?)", (topic, offset, key, value, headers, now_ms)
                    )
                    ends[topic] = offset + 1
                    landed.append((TopicPartition(topic), offset))
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            return landed

        landed = await self._database.call(append)
        for message in messages:
            BUS_PUBLISHED.labels(message.topic).inc()
        return landed

    async def subscribe(
        self,
        topics: Sequence[str],
        *,
        group: str,
        at: Mapping[TopicPartition, int] | None = None,
        starts: Starts | None = None,
    ) -> "EmbeddedSubscription":
        """Read `topics` as `group`, from `at`, from where `starts` says, or from the group's own position."""
        if at is None and starts is not None:
            at = await asyncio.to_thread(starts, [TopicPartition(topic) for topic in topics])
        database = _Database(Path(self._settings.path), self._settings.request_timeout_s)

        def start(connection: sqlite3.Connection) -> dict[str, int]:
            if at is not None:
                return {topic: at.get(TopicPartition(topic), 0) for topic in topics}
            rows = connection.execute("SELECT topic, next_offset FROM position WHERE consumer = ?", (group,)).fetchall()
            kept = dict(rows)
            return {topic: kept.get(topic, 0) for topic in topics}

        return EmbeddedSubscription(database, group, await database.call(start))

    async def close(self) -> None:
        """Close the file."""
        await self._database.close()


class EmbeddedSubscription:
    """One consumer's positions in the embedded log."""

    def __init__(self, database: _Database, group: str, positions: dict[str, int]) -> None:
        self._database = database
        self._group = group
        self._positions = positions
        self._seen_change = -1

    async def fetch(self, *, max_messages: int = 500, timeout_s: float = 1.0) -> Sequence[Message]:
        """The next messages; waits up to `timeout_s` for the first."""
        deadline = time.monotonic() + timeout_s
        while True:
            messages = await self._database.call(lambda connection: self._read(connection, max_messages))
            if messages or time.monotonic() >= deadline:
                for message in messages:
                    BUS_CONSUMED.labels(message.topic).inc()
                return messages
            await asyncio.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _read(self, connection: sqlite3.Connection, max_messages: int) -> list[Message]:
        change = connection.execute("PRAGMA data_version").fetchone()[0]
        if change == self._seen_change:
            return []
        found: list[Message] = []
        size = 0
        query = "SELECT offset, key, value, headers, timestamp_ms FROM message WHERE topic = ? AND offset >= ? ORDER BY offset LIMIT ?"
        for topic in self._positions:
            cursor = connection.execute(query, (topic, self._positions[topic], max_messages - len(found)))
            for offset, key, value, headers, timestamp_ms in cursor:
                decoded = {k: v.encode("latin-1") for k, v in json.loads(headers).items()}
                found.append(Message(topic, 0, offset, key, value, decoded, timestamp_ms))
                self._positions[topic] = offset + 1
                size += len(value)
                if size >= MAX_FETCH_BYTES:
                    return found
            if len(found) >= max_messages:
                return found
        # Only a read that emptied every topic may skip the next one.
        if not found:
            self._seen_change = change
        return found

    async def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Keep `positions` for the group."""
        rows = [(self._group, place.topic, offset) for place, offset in positions.items()]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany("INSERT OR REPLACE INTO position VALUES (?, ?, ?)", rows)
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

        await self._database.call(write)

    async def end_offsets(self) -> Mapping[TopicPartition, int]:
        """Offset after the newest message of each topic."""

        def read(connection: sqlite3.Connection) -> dict[TopicPartition, int]:
            query = "SELECT COALESCE(MAX(offset), -1) + 1 FROM message WHERE topic = ?"
            return {
                TopicPartition(topic): connection.execute(query, (topic,)).fetchone()[0] for topic in self._positions
            }

        return await self._database.call(read)

    async def close(self) -> None:
        """Close this consumer's connection."""
        await self._database.close()
