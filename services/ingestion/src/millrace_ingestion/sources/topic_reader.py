"""One librdkafka consumer, all of whose calls run in one thread.

librdkafka fetches in threads of its own and keeps what it fetched in a bounded buffer; when nobody reads, it stops to fetch. Positions are
given by the caller at every assignment: the group's committed offsets are written for lag tools and never read.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import confluent_kafka as ck
from millrace_kit.errors import UnavailableError
from millrace_kit.settings import KafkaSecurity

from millrace_ingestion.sources.decoding import Message

log = logging.getLogger(__name__)

# A consumer that was killed is forgotten after this long, then its partitions go to the next; brokers allow no less than 6 s.
SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_MS = 2_000
# Messages taken out of librdkafka's buffer at once, as long as they are small.
SLICE = 500
T = TypeVar("T")
Place = tuple[str, int]
"""Topic and partition."""


@dataclass(frozen=True)
class Edge:
    """What a partition holds: offset of its oldest message, and the one after its newest."""

    low: int
    high: int


@dataclass(frozen=True)
class ReaderLimits:
    """Sizes and waits; see the settings of the same names."""

    records: int
    """Messages one `read` returns at most."""
    bytes: int
    """Size of them, about: the last slice may go beyond it."""
    buffer_kib: int
    linger_s: float
    timeout_s: float


class TopicReader:
    """Reads some topics as one member of a group.

    Args:
        options: librdkafka's, of the connection.
        topics: what is read.
        group: whose member this is.
        limits: sizes and waits.
        begin: called in this reader's thread with the edges of partitions that came; returns where to read them.
        release: called in this reader's thread with partitions that go, before somebody else gets them.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        topics: Sequence[str],
        group: str,
        limits: ReaderLimits,
        *,
        begin: Callable[[Mapping[Place, Edge]], Mapping[Place, int]],
        release: Callable[[Sequence[Place]], None],
    ) -> None:
        self._limits = limits
        self._topics = list(topics)
        self._begin = begin
        self._release = release
        self._collected: list[Message] = []
        self._failure: BaseException | None = None
        self._largest = 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="source")
        self._consumer: Any = None
        self._options = {
            **options,
            "group.id": group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "allow.auto.create.topics": False,
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "heartbeat.interval.ms": HEARTBEAT_MS,
            "queued.max.messages.kbytes": limits.buffer_kib,
            "fetch.wait.max.ms": max(1, min(500, int(limits.linger_s * 1000))),
            "socket.timeout.ms": int(limits.timeout_s * 1000),
            "partition.assignment.strategy": "range,roundrobin",
            "topic.metadata.refresh.interval.ms": 30_000,
        }

    async def open(self) -> None:
        """Connect.

        Raises:
            UnavailableError: no broker answers, or a topic is not there.
        """
        await self._call(self._open)

    async def read(self) -> Sequence[Message]:
        """The next messages in order per partition; empty when none came within the linger.

        Raises:
            UnavailableError: the brokers do not answer, or messages are gone.
            MillraceError: what `begin` or `release` raised.
        """
        return await self._call(self._read)

    async def commit(self, positions: Mapping[Place, int]) -> None:
        """Write positions for lag tools; it does not matter whether that succeeds."""
        offsets = [ck.TopicPartition(*place, position) for place, position in positions.items()]

        def commit() -> None:
            try:
                self._consumer.commit(offsets=offsets, asynchronous=True)
            except ck.KafkaException as error:
                log.debug("positions were not committed: %s", error)

        await self._call(commit)

    async def ends(self, places: Sequence[Place]) -> Mapping[Place, int]:
        """Offset after the newest message as far as it is known here; partitions without one are left out."""

        def look() -> dict[Place, int]:
            found = {}
            for place in places:
                edges = self._consumer.get_watermark_offsets(ck.TopicPartition(*place), cached=True)
                if edges is not None and edges[1] >= 0:
                    found[place] = edges[1]
            return found

        return await self._call(look)

    async def close(self) -> None:
        """Leave the group."""

        def close() -> None:
            if self._consumer is not None:
                self._consumer.close()

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, close)
        finally:
            self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return work()
            except ck.KafkaException as error:
                raise _unavailable(error.args[0]) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _open(self) -> None:
        self._consumer = ck.Consumer(self._options, logger=log)
        for topic in self._topics:
            found = self._consumer.list_topics(topic, timeout=self._limits.timeout_s).topics[topic]
            if found.error is not None:
                raise _unavailable(found.error, topic)
        self._consumer.subscribe(
            self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _read(self) -> list[Message]:
        self._collected = []
        size = 0
        deadline = time.monotonic() + self._limits.linger_s
        while len(self._collected) < self._limits.records and size < self._limits.bytes:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0:
                break
            many = min(SLICE, self._limits.records - len(self._collected), self._limits.bytes // self._largest + 1)
            got = self._consumer.consume(many, wait_s)
            self._raise_failure()
            for message in got:
                if message.error() is not None:
                    raise _unavailable(message.error(), message.topic() or "")
            lengths = list(map(len, got))
            if lengths:
                self._largest = max(*lengths, self._largest >> 1, 1)
                size += sum(lengths)
            self._collected += got
        return self._collected

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _on_assign(self, consumer: Any, partitions: Sequence[Any]) -> None:
        # An error must not go through librdkafka: it would lose it.
        try:
            edges = {}
            for one in partitions:
                low, high = consumer.get_watermark_offsets(one, timeout=self._limits.timeout_s)
                edges[one.topic, one.partition] = Edge(low, high)
            begins = self._begin(edges)
            consumer.assign([ck.TopicPartition(*place, position) for place, position in begins.items()])
        except ck.KafkaException as error:
            self._failure = _unavailable(error.args[0])
        except Exception as error:
            self._failure = error

    def _on_revoke(self, _consumer: Any, partitions: Sequence[Any]) -> None:
        self._drop(partitions)
        try:
            self._release([(one.topic, one.partition) for one in partitions])
        except Exception as error:
            self._failure = error

    def _on_lost(self, _consumer: Any, partitions: Sequence[Any]) -> None:
        self._drop(partitions)
        self._failure = UnavailableError("GROUP_LEFT", "the group went on without this consumer; it joins again")

    def _drop(self, partitions: Sequence[Any]) -> None:
        """Messages of partitions that go are somebody else's from now on."""
        gone = {(one.topic, one.partition) for one in partitions}
        self._collected = [one for one in self._collected if (one.topic(), one.partition()) not in gone]


def connection_options(bootstrap_servers: Sequence[str], security: KafkaSecurity) -> dict[str, Any]:
    """Librdkafka's options for some brokers."""
    options: dict[str, Any] = {
        "bootstrap.servers": ",".join(bootstrap_servers),
        "security.protocol": security.protocol.lower(),
        "client.id": "millrace-ingestion",
    }
    if security.protocol.endswith("SSL"):
        options |= {"ssl.endpoint.identification.algorithm": "https" if security.check_hostname else "none"}
        files = {"ca": security.ca_file, "certificate": security.cert_file, "key": security.key_file}
        options |= {f"ssl.{name}.location": file for name, file in files.items() if file}
    if security.protocol.startswith("SASL"):
        options |= {
            "sasl.mechanism": security.sasl_mechanism,
            "sasl.username": security.username,
            "sasl.password": security.password,
        }
    return options


def _unavailable(error: Any, topic: str = "") -> UnavailableError:
    what = f"{error.name()}: {error.str()}"
    return UnavailableError(
        "TOPIC_UNAVAILABLE", f"Kafka did not answer: {what}", {"topic": topic, "cause": error.name()}
    )
