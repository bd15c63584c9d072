"""The bus of a cluster: Kafka, through kafka-python.

The client blocks, so every call runs in a thread: a small pool for publishing, one thread of its own per consumer (a consumer is not
thread-safe). The producer is idempotent and waits for all in-sync replicas. It is not transactional on purpose: a transaction's
markers take offsets of their own, so a consumer could not tell that it has read everything by comparing with `end_offsets`.
A batch instead goes out in waves that each fit one record batch, the next only when the one before is durable, and a producer that
failed is thrown away: what is missing after an error is the end of the batch, and publishing it again repeats but leaves no hole.
The package `crc32c` is not imported here, but without it kafka-python computes checksums in Python, at 10 MB/s.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import kafka
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, MessageSizeTooLargeError, TopicAlreadyExistsError, for_code

from millrace_kit.bus import Message, Outgoing, Starts, TopicPartition
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from millrace_kit.settings import BusSettings, KafkaSecurity
from millrace_kit.telemetry import BUS_CONSUMED, BUS_PUBLISHED

log = logging.getLogger(__name__)

# Largest single message; topics are made with room for it.
MAX_MESSAGE_BYTES = 64 << 20
# What one wave of a publish may hold (a larger single message is a wave by itself) and one record batch with it.
WAVE_BYTES = 1 << 20
# Bytes one fetch may return; keeps a consumer's memory bounded however large single messages are.
MAX_FETCH_BYTES = 64 << 20
PUBLISH_THREADS = 4
# A consumer that was killed is forgotten after this long, then its partitions go to the next; brokers allow no less than 6 s.
SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_MS = 2_000
METADATA_MS = 15_000
"""How old what is known of the topics may be: a group whose partitions were dealt out before they were known has none for so long at most."""
CLOSE_TIMEOUT_S = 5.0
# Room for a record batch's own header.
_ENVELOPE_BYTES = 4096

T = TypeVar("T")


class KafkaBus:
    """Publishes to and reads from a Kafka cluster."""

    def __init__(self, settings: BusSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(max_workers=PUBLISH_THREADS, thread_name_prefix="bus-publish")
        self._lock = threading.Lock()
        self._producer: kafka.KafkaProducer | None = None
        self._known_topics: set[str] = set()

    @classmethod
    async def open(cls, settings: BusSettings) -> "KafkaBus":
        """Connect to the brokers of `settings`.

        Raises:
            FailedPreconditionError: the settings name no broker.
            UnavailableError: no broker answered within `request_timeout_s`.
        """
        if not settings.bootstrap_servers:
            raise FailedPreconditionError("BUS_NOT_CONFIGURED", "bus.bootstrap_servers names no Kafka broker")
        bus = cls(settings)
        try:
            await bus._call(bus._open_producer)
        except BaseException:
            bus._threads.shutdown(wait=False)
            raise
        return bus

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[tuple[TopicPartition, int]]:
        """Append `messages` in order, each to the partition of its key; returns where each landed, once all are durable.

        Raises:
            FailedPreconditionError: a message is larger than the cluster takes; publishing again would not help.
            UnavailableError: not all were durable within `request_timeout_s`; publish all of them again.
        """
        rows = [(message, list(message.all_headers().items())) for message in messages]
        landed = await self._call(lambda: self._publish(rows))
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
    ) -> "KafkaSubscription":
        """Read `topics` as `group`: all their partitions from `at`, or a share of them from `starts` or the group's position.

        Partitions that are added to a topic later are read by an `at` subscription after it is opened again.
        """
        await self._call(lambda: self._make_topics(topics, time.monotonic() + self._settings.request_timeout_s))
        return await KafkaSubscription.open(self._settings, topics, group, at, starts)

    async def close(self) -> None:
        """Flush and disconnect."""

        def run() -> None:
            with self._lock:
                producer, self._producer = self._producer, None
            if producer is not None:
                producer.close(timeout=CLOSE_TIMEOUT_S)

        await asyncio.get_running_loop().run_in_executor(self._threads, run)
        self._threads.shutdown(wait=False)

    async def _call(self, work: Callable[[], T]) -> T:
        def run() -> T:
            with _as_unavailable():
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def _open_producer(self) -> kafka.KafkaProducer:
        """The one producer, made anew after a failure."""
        with self._lock:
            if self._producer is None:
                timeout_ms = int(self._settings.request_timeout_s * 1000)
                self._producer = kafka.KafkaProducer(
                    **kafka_options(self._settings),
                    metrics_enabled=False,
                    acks="all",
                    enable_idempotence=True,
                    max_in_flight_requests_per_connection=1,
                    batch_size=WAVE_BYTES + _ENVELOPE_BYTES,
                    max_request_size=MAX_MESSAGE_BYTES,
                    delivery_timeout_ms=timeout_ms,
                    max_block_ms=timeout_ms,
                    allow_auto_create_topics=False,
                )
            return self._producer

    def _drop_producer(self, failed: kafka.KafkaProducer) -> None:
        with self._lock:
            if self._producer is failed:
                self._producer = None
        failed.close(timeout=0)

    def _publish(
        self, rows: Sequence[tuple[Outgoing, list[tuple[str, bytes]]]]
    ) -> Sequence[tuple[TopicPartition, int]]:
        deadline = time.monotonic() + self._settings.request_timeout_s
        self._make_topics({message.topic for message, _headers in rows}, deadline)
        producer = self._open_producer()
        landed: list[tuple[TopicPartition, int]] = []
        try:
            for wave in _waves(rows):
                futures = [
                    producer.send(message.topic, message.value, message.key.encode(), headers)
                    for message, headers in wave
                ]
                for future in futures:
                    record = future.get(timeout=max(0.001, deadline - time.monotonic()))
                    landed.append((TopicPartition(record.topic, record.partition), record.offset))
        except MessageSizeTooLargeError as error:
            self._drop_producer(producer)
            metadata = {"limit": str(MAX_MESSAGE_BYTES)}
            raise FailedPreconditionError("MESSAGE_TOO_LARGE", f"Kafka refused a message: {error}", metadata) from error
        except BaseException:
            self._drop_producer(producer)
            raise
        return landed

    def _make_topics(self, topics: Sequence[str] | set[str], deadline: float) -> None:
        """Make those of `topics` that are not there, with the settings' partitions and replicas."""
        wanted = [topic for topic in topics if topic not in self._known_topics]
        if not wanted:
            return
        admin = KafkaAdminClient(**kafka_options(self._settings))
        try:
            left_ms = max(1, int((deadline - time.monotonic()) * 1000))
            there = set(admin.list_topics())
            missing = {
                topic: {
                    "num_partitions": self._settings.partitions,
                    "replication_factor": self._settings.replication_factor,
                    "configs": {"max.message.bytes": str(MAX_MESSAGE_BYTES), **self._settings.topic_configs},
                }
                for topic in wanted
                if topic not in there
            }
            if missing and not self._settings.create_topics:
                names = ", ".join(sorted(missing))
                message = f"Kafka has no topic {names}, and bus.create_topics is off: make it there"
                raise UnavailableError("BUS_TOPIC_MISSING", message, {"topics": names})
            if missing:
                answer = admin.create_topics(missing, timeout_ms=left_ms, raise_errors=False)
                for topic in answer["topics"]:
                    error = for_code(topic["error_code"])
                    if topic["error_code"] and error is not TopicAlreadyExistsError:
                        raise error(topic.get("error_message") or topic["name"])
                admin.wait_for_topics(list(missing), timeout_ms=left_ms)
        finally:
            admin.close()
        self._known_topics.update(wanted)


class KafkaSubscription:
    """One consumer; all its calls run in one thread."""

    def __init__(self, settings: BusSettings, topics: Sequence[str], group: str) -> None:
        self._settings = settings
        self._topics = list(topics)
        self._group = group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bus-consume")
        self._consumer: kafka.KafkaConsumer | None = None

    @classmethod
    async def open(
        cls,
        settings: BusSettings,
        topics: Sequence[str],
        group: str,
        at: Mapping[TopicPartition, int] | None = None,
        starts: Starts | None = None,
    ) -> "KafkaSubscription":
        """Connect and take the starting positions.

        Raises:
            UnavailableError: no broker answered within `request_timeout_s`.
        """
        subscription = cls(settings, topics, group)
        try:
            await subscription._call(lambda: subscription._start(at, starts))
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def fetch(self, *, max_messages: int = 500, timeout_s: float = 1.0) -> Sequence[Message]:
        """The next messages in order per partition; empty when none came within `timeout_s`, the broker's absence included."""

        def poll() -> list[Message]:
            records = self._ready().poll(timeout_ms=int(timeout_s * 1000), max_records=max_messages)
            return [_message(record) for partition in records.values() for record in partition]

        messages = await self._call(poll)
        for message in messages:
            BUS_CONSUMED.labels(message.topic).inc()
        return messages

    async def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Keep the next offset to read per partition for this group.

        Raises:
            UnavailableError: the group did not take them (no broker, or the partition went to another consumer); what they cover
                comes again.
        """
        offsets = {
            kafka.TopicPartition(place.topic, place.partition): kafka.structs.OffsetAndMetadata(offset, "", -1)
            for place, offset in positions.items()
        }
        timeout_ms = self._timeout_ms()
        await self._call(lambda: self._ready().commit(offsets, timeout_ms=timeout_ms))

    async def end_offsets(self) -> Mapping[TopicPartition, int]:
        """Offset after the newest message, per partition of the subscribed topics."""

        def read() -> dict[TopicPartition, int]:
            ends = self._ready().end_offsets(self._partitions(), timeout_ms=self._timeout_ms())
            return {TopicPartition(place.topic, place.partition): offset for place, offset in ends.items()}

        return await self._call(read)

    async def close(self) -> None:
        """Leave the group; its positions stay."""

        def run() -> None:
            consumer, self._consumer = self._consumer, None
            if consumer is not None:
                consumer.close(autocommit=False, timeout_ms=int(CLOSE_TIMEOUT_S * 1000))

        with contextlib.suppress(RuntimeError):  # closed before: the thread is gone
            await asyncio.get_running_loop().run_in_executor(self._thread, run)
        self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[], T]) -> T:
        def run() -> T:
            with _as_unavailable():
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _start(self, at: Mapping[TopicPartition, int] | None, starts: Starts | None) -> None:
        consumer = kafka.KafkaConsumer(
            **kafka_options(self._settings),
            metrics_enabled=False,
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            fetch_max_bytes=MAX_FETCH_BYTES,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            metadata_max_age_ms=METADATA_MS,
        )
        self._consumer = consumer
        if at is None:
            # Known before the group is joined: else its first dealing out has no partitions, and the next one may be long in coming.
            for topic in self._topics:
                consumer.partitions_for_topic(topic)
            consumer.subscribe(self._topics, listener=_Beginnings(consumer, starts) if starts is not None else None)
            return
        partitions = self._partitions()
        consumer.assign(partitions)
        for place in partitions:
            consumer.seek(place, at.get(TopicPartition(place.topic, place.partition), 0))

    def _partitions(self) -> list[kafka.TopicPartition]:
        found = []
        for topic in self._topics:
            numbers = self._ready().partitions_for_topic(topic)
            if not numbers:
                raise UnavailableError("BUS_UNAVAILABLE", f"Kafka does not know topic {topic!r} yet", {"topic": topic})
            found += [kafka.TopicPartition(topic, number) for number in sorted(numbers)]
        return found

    def _ready(self) -> kafka.KafkaConsumer:
        if self._consumer is None:
            raise UnavailableError("BUS_CLOSED", "this subscription is closed")
        return self._consumer

    def _timeout_ms(self) -> int:
        return int(self._settings.request_timeout_s * 1000)


class _Beginnings(kafka.ConsumerRebalanceListener):  # type: ignore[misc]
    """Puts partitions that come to the consumer where the positions it keeps itself say."""

    def __init__(self, consumer: kafka.KafkaConsumer, starts: Starts) -> None:
        self._consumer = consumer
        self._starts = starts

    def on_partitions_revoked(self, revoked: set[kafka.TopicPartition]) -> None:
        """Nothing is kept per partition here."""

    def on_partitions_assigned(self, assigned: set[kafka.TopicPartition]) -> None:
        """Called by the consumer before it fetches from them."""
        places = [TopicPartition(place.topic, place.partition) for place in sorted(assigned)]
        found = self._starts(places) if places else {}
        for place in places:
            self._consumer.seek(kafka.TopicPartition(place.topic, place.partition), found.get(place, 0))


@contextlib.contextmanager
def _as_unavailable() -> Iterator[None]:
    """Kafka's errors as the bus's one error."""
    try:
        yield
    except (KafkaError, TimeoutError, OSError) as error:
        message = f"Kafka did not answer: {type(error).__name__}: {error}"
        raise UnavailableError("BUS_UNAVAILABLE", message) from error


def kafka_options(settings: BusSettings) -> dict[str, object]:
    """What every client of kafka-python is given to reach the brokers of `settings`."""
    timeout_ms = int(settings.request_timeout_s * 1000)
    return {
        "bootstrap_servers": list(settings.bootstrap_servers),
        "bootstrap_timeout_ms": timeout_ms,
        # Half, so that a lost connection is noticed and the request repeated within the whole.
        "request_timeout_ms": max(1, timeout_ms // 2),
        "reconnect_backoff_max_ms": 1000,
        **_security(settings.security),
    }


def _security(security: KafkaSecurity) -> dict[str, object]:
    options: dict[str, object] = {"security_protocol": security.protocol}
    if security.protocol.endswith("SSL"):
        options |= {
            "ssl_cafile": security.ca_file or None,
            "ssl_certfile": security.cert_file or None,
            "ssl_keyfile": security.key_file or None,
            "ssl_check_hostname": security.check_hostname,
        }
    if security.protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": security.sasl_mechanism,
            "sasl_plain_username": security.username,
            "sasl_plain_password": security.password,
        }
    return options


def _waves(
    rows: Sequence[tuple[Outgoing, list[tuple[str, bytes]]]],
) -> Iterator[Sequence[tuple[Outgoing, list[tuple[str, bytes]]]]]:
    """`rows` cut where more would not fit one record batch."""
    start, size = 0, 0
    for index, (message, headers) in enumerate(rows):
        length = len(message.value) + len(message.key) * 4 + sum(len(k) + len(v) + 8 for k, v in headers) + 64
        if index > start and size + length > WAVE_BYTES:
            yield rows[start:index]
            start, size = index, 0
        size += length
    if start < len(rows):
        yield rows[start:]


def _message(record: kafka.consumer.fetcher.ConsumerRecord) -> Message:
    return Message(
        record.topic,
        record.partition,
        record.offset,
        (record.key or b"").decode("utf-8", "replace"),
        record.value or b"",
        {name: value or b"" for name, value in record.headers},
        record.timestamp,
    )
