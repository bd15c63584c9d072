"""Dead letters on their topic, as Kafka Connect puts them there: the record as it came, the circumstances in headers.

The rows of the dead letters are the outbox: what is not marked as published is published, in the order of ids, at least once; copies have
the same `event-id`. Header names and stages are Kafka Connect's (`DeadLetterQueueReporter`, KIP-298); what has no such header is
under `millrace.`.
"""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from millrace_kit.bus import Bus, Outgoing, dead_letters_topic
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError

from millrace_ingestion import metrics
from millrace_ingestion.letter_store import LetterStore
from millrace_ingestion.models import Letter

log = logging.getLogger(__name__)

BATCH = 500
BATCH_BYTES = 16 << 20
# Wait between looks at the table: nobody is told when a group completes.
POLL_S = 0.5
RETRY_MIN_S = 0.1
RETRY_MAX_S = 10.0
PREFIX = "__connect.errors."
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class LetterRelay:
    """Publishes dead letters.

    Args:
        store: where they are.
        bus: where they go.
        clock: when they went.
    """

    def __init__(self, store: LetterStore, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop` is set; a bus or a database that does not answer is tried again with growing waits."""
        stopping = asyncio.ensure_future(stop.wait())
        retry_s = RETRY_MIN_S
        try:
            while not stop.is_set():
                try:
                    sent = await self.publish_once()
                    retry_s, wait_s = RETRY_MIN_S, 0.0 if sent else POLL_S
                except MillraceError as error:
                    metrics.LETTER_FAILURES.inc()
                    log.warning("dead letters could not be published, retry in %.1f s: %s", retry_s, error)
                    wait_s, retry_s = retry_s, min(RETRY_MAX_S, retry_s * 2)
                if wait_s:
                    await asyncio.wait([stopping], timeout=wait_s)
        finally:
            stopping.cancel()

    async def publish_once(self) -> int:
        """Publish the oldest that wait; returns how many.

        Raises:
            UnavailableError: the bus or the database did not answer; they stay.
        """
        letters = await asyncio.to_thread(self._store.unpublished, limit=BATCH, max_bytes=BATCH_BYTES)
        if letters:
            await self._bus.publish([message(letter) for letter in letters])
            now_us = (self._clock.now() - _EPOCH) // _MICROSECOND
            await asyncio.to_thread(self._store.mark_published, [letter.id for letter in letters], now_us)
            metrics.LETTERS_PUBLISHED.inc(len(letters))
        return len(letters)


def message(letter: Letter) -> Outgoing:
    """A dead letter as a message; a record that came over no topic names its source instead."""
    origin = letter.origin
    value = letter.record_json.encode() if origin is None or origin.value is None else origin.value
    described = f"{letter.column}: {letter.detail}" if letter.column else letter.detail
    headers: dict[str, bytes] = {
        "content-type": b"application/json" if letter.record_json else b"application/octet-stream"
    }
    key = letter.source
    if origin is not None:
        headers |= {name: content for name, content in origin.headers if content is not None}
        if origin.key is not None:
            key = origin.key.decode("utf-8", "replace")
            headers["millrace.key"] = origin.key
    headers |= {
        name: str(content).encode()
        for name, content in {
            f"{PREFIX}topic": origin.topic if origin else letter.source,
            f"{PREFIX}partition": origin.partition if origin else 0,
            f"{PREFIX}offset": origin.offset if origin else letter.offset,
            f"{PREFIX}connector.name": f"millrace-ingestion/{letter.contract}",
            f"{PREFIX}task.id": letter.source,
            f"{PREFIX}stage": letter.stage,
            f"{PREFIX}class.name": "millrace_ingestion",
            f"{PREFIX}exception.class.name": letter.exception or letter.reason,
            f"{PREFIX}exception.message": described,
            "millrace.contract": letter.contract,
            "millrace.reason": letter.reason,
            "millrace.column": letter.column,
            "millrace.source": letter.source,
            "millrace.source-offset": letter.offset,
            "millrace.received-at": letter.received_at.isoformat(),
            "event-id": f"{letter.contract}/dead-letter/{letter.id}",
        }.items()
    }
    return Outgoing(dead_letters_topic(letter.contract), key, value, headers)
