"""The bus: ordered, durable facts. Two implementations under one contract test, Kafka and an embedded log.

Delivery is at least once. A consumer keeps its positions in the same transaction as its effects and subscribes `at` them (alone) or
with `starts` (sharing the partitions with the others of its group), or it names a group and commits after its effects; in all cases a
message may come twice and must change nothing the second time.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from millrace_kit.bus.topics import DRIFT, MODELS, PREDICTIONS, TRAINING, dead_letters_topic, records_topic
from millrace_kit.clock import uuid7
from millrace_kit.errors import FailedPreconditionError
from millrace_kit.settings import BusSettings
from millrace_kit.telemetry import trace_headers

__all__ = [
    "DRIFT", "MODELS", "PREDICTIONS", "TRAINING", "Bus", "Message", "Outgoing", "Starts", "Subscription", "TopicPartition",
    "dead_letters_topic", "open_bus", "records_topic",
]  # fmt: skip

# The kubelet sets it in every pod.
IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
PROTOBUF = b"application/x-protobuf"


@dataclass(frozen=True, slots=True)
class TopicPartition:
    """One ordered log."""

    topic: str
    partition: int = 0


Starts = Callable[[Sequence[TopicPartition]], Mapping[TopicPartition, int]]
"""Asked, in a thread, where to begin in the partitions that just came to this consumer; 0 where its answer does not name one."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish; `event-id`, `content-type` and `traceparent` headers are added when absent."""

    topic: str
    key: str
    value: bytes
    headers: Mapping[str, bytes] = field(default_factory=dict)

    def all_headers(self) -> dict[str, bytes]:
        """The headers as they go out."""
        return {"content-type": PROTOBUF, "event-id": uuid7().encode(), **trace_headers(), **self.headers}


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it was read."""

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes
    headers: dict[str, bytes]
    timestamp_ms: int

    @property
    def place(self) -> TopicPartition:
        """The log it was read from."""
        return TopicPartition(self.topic, self.partition)


class Subscription(Protocol):
    """One consumer's reading position in some topics."""

    async def fetch(self, *, max_messages: int = 500, timeout_s: float = 1.0) -> Sequence[Message]:
        """The next messages in order per partition; empty when none came within `timeout_s`."""
        ...

    async def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Keep the next offset to read per partition for this group."""
        ...

    async def end_offsets(self) -> Mapping[TopicPartition, int]:
        """Offset after the newest message, per partition of the subscribed topics."""
        ...

    async def close(self) -> None:
        """Stop reading; the group's positions stay."""
        ...


class Bus(Protocol):
    """Publishes and subscribes."""

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[tuple[TopicPartition, int]]:
        """Append `messages` in order; returns where each landed, once all are durable.

        Raises:
            UnavailableError: the bus did not answer in time; publish the same messages again.
        """
        ...

    async def subscribe(
        self,
        topics: Sequence[str],
        *,
        group: str,
        at: Mapping[TopicPartition, int] | None = None,
        starts: Starts | None = None,
    ) -> Subscription:
        """Read `topics` as `group`.

        With `at`, every partition is read by this consumer alone, from the given offset (0 where it is not named). Otherwise the
        consumers of the group share the partitions, and each begins where `starts` says, or without it at the group's committed
        position or the beginning. An error of `starts` is raised by the `fetch` during which the partitions came.
        """
        ...

    async def close(self) -> None:
        """Flush and disconnect."""
        ...


async def open_bus(settings: BusSettings, environment: Mapping[str, str] | None = None) -> Bus:
    """The bus that `settings` name; `environment` is the process's own when None.

    Raises:
        FailedPreconditionError: the settings name no broker, or ask for the embedded log in a pod.
        UnavailableError: the bus does not answer.
    """
    if settings.kind == "kafka":
        from millrace_kit.bus.kafka_bus import KafkaBus

        return await KafkaBus.open(settings)
    if IN_CLUSTER in (os.environ if environment is None else environment) and not settings.embedded_in_cluster:
        raise FailedPreconditionError(
            "EMBEDDED_BUS_IN_CLUSTER",
            "bus.kind is embedded and this is a pod: pods share no log; set bus.kind to kafka",
            {"variable": IN_CLUSTER},
        )
    from millrace_kit.bus.embedded import EmbeddedBus

    return await EmbeddedBus.open(settings)
