"""Transactional outbox: a change and the message that tells of it are one SQL transaction, the bus comes after.

A service puts `outbox_table(metadata)` into its schema, calls `enqueue` inside the transaction that changes its state, and runs
a `Relay` as a worker. The relay publishes in the order of enqueueing and deletes a row only after the bus acknowledged it, so a
message is sent at least once; its `event-id` header is fixed at enqueueing, by which consumers drop the second copy.
"""

import asyncio
import json
import logging
from collections.abc import Sequence

from prometheus_client import Counter, Gauge
from sqlalchemy import BigInteger, Column, Connection, Engine, Integer, LargeBinary, MetaData, Table, Text, select

from millrace_kit.bus import Bus, Outgoing
from millrace_kit.errors import MillraceError
from millrace_kit.server import Worker
from millrace_kit.sql import reading, writing

log = logging.getLogger(__name__)

BATCH = 200
# Wait between looks at the table when nobody called `wake`: rows of another process, or of one that was killed.
POLL_S = 0.5
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0

PENDING = Gauge("millrace_outbox_pending", "Messages in the newest outbox batch still to be published.")
RELAYED = Counter("millrace_outbox_relayed_total", "Outbox messages the bus acknowledged.", ["topic"])
RELAY_FAILURES = Counter("millrace_outbox_relay_failures_total", "Times the bus refused a batch; it is tried again.")


def outbox_table(metadata: MetaData, name: str = "outbox") -> Table:
    """The outbox's table; `id` gives the order of publishing."""
    return Table(
        name,
        metadata,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("topic", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("value", LargeBinary, nullable=False),
        Column("headers", Text, nullable=False),
        sqlite_autoincrement=True,
    )


def enqueue(connection: Connection, table: Table, messages: Sequence[Outgoing]) -> None:
    """Add `messages` to the running transaction; their event ids and trace context are fixed here."""
    if messages:
        connection.execute(table.insert(), [_row(message) for message in messages])


def _row(message: Outgoing) -> dict[str, object]:
    headers = json.dumps({name: value.decode("latin-1") for name, value in message.all_headers().items()})
    return {"topic": message.topic, "key": message.key, "value": message.value, "headers": headers}


class Relay:
    """Publishes what stands in an outbox.

    Args:
        engine: database that holds the outbox.
        table: the outbox.
        bus: where the messages go.
    """

    def __init__(self, engine: Engine, table: Table, bus: Bus) -> None:
        self._engine = engine
        self._table = table
        self._bus = bus
        self._awake = asyncio.Event()

    @property
    def worker(self) -> Worker:
        """The background task for a `Service`."""
        return Worker("outbox-relay", self.run)

    def wake(self) -> None:
        """Look at the table now; call it on the event loop after a commit to publish without delay."""
        self._awake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop` is set; a bus that does not answer is tried again with growing waits."""
        retry_s = RETRY_MIN_S
        while not stop.is_set():
            self._awake.clear()
            try:
                sent = await self.relay_once()
                retry_s = RETRY_MIN_S
                wait_s = 0.0 if sent == BATCH else POLL_S
            except MillraceError as error:
                RELAY_FAILURES.inc()
                log.warning("outbox: the bus refused a batch, retry in %.1f s: %s", retry_s, error)
                self._awake.clear()
                wait_s, retry_s = retry_s, min(RETRY_MAX_S, retry_s * 2)
            if wait_s:
                await self._pause(stop, wait_s)

    async def relay_once(self) -> int:
        """Publish one batch and delete it; returns how many messages it held.

        Raises:
            UnavailableError: the bus did not acknowledge; the batch stays.
        """
        rows = await asyncio.to_thread(self._oldest)
        PENDING.set(len(rows))
        if not rows:
            return 0
        await self._bus.publish([message for _id, message in rows])
        await asyncio.to_thread(self._delete, [row_id for row_id, _message in rows])
        for _id, message in rows:
            RELAYED.labels(message.topic).inc()
        return len(rows)

    def _oldest(self) -> list[tuple[int, Outgoing]]:
        table = self._table
        query = select(table).order_by(table.c.id).limit(BATCH)
        with reading(self._engine) as connection:
            found = connection.execute(query).all()
        return [
            (
                row.id,
                Outgoing(
                    row.topic,
                    row.key,
                    bytes(row.value),
                    {k: v.encode("latin-1") for k, v in json.loads(row.headers).items()},
                ),
            )
            for row in found
        ]

    def _delete(self, ids: Sequence[int]) -> None:
        with writing(self._engine) as connection:
            connection.execute(self._table.delete().where(self._table.c.id.in_(ids)))

    async def _pause(self, stop: asyncio.Event, seconds: float) -> None:
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._awake.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
