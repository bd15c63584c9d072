"""Topics of somebody else on a real broker, and sources that read them."""

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient, NewTopic
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub

WAIT_S = 60.0


def new_topic(address: str, partitions: int = 1) -> str:
    name = f"foreign-{uuid4().hex[:12]}"
    admin = AdminClient({"bootstrap.servers": address})  # its futures fail when it is gone
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)
    return name


Headers = Sequence[tuple[str, bytes]]


def produce(
    address: str,
    topic: str,
    values: Iterable[Any],
    *,
    partition: int = 0,
    headers: Headers = (),
    key: bytes | None = None,
) -> None:
    """Write `values`: bytes as they are, None as a tombstone, anything else as JSON."""
    producer = ck.Producer({"bootstrap.servers": address, "linger.ms": 5})
    for value in values:
        given = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
        while True:
            try:
                producer.produce(topic, given, partition=partition, headers=list(headers), key=key)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


def committed(address: str, group: str, topic: str, partition: int = 0) -> int:
    consumer = ck.Consumer({"bootstrap.servers": address, "group.id": group})
    try:
        return consumer.committed([ck.TopicPartition(topic, partition)], timeout=20)[0].offset
    finally:
        consumer.close()


def topic_source(address: str, *topics: str, name: str = "orders", **changes: Any) -> pb.Source:
    columns = changes.pop("columns", {})
    contract = changes.pop("contract", "flights")
    kafka = pb.KafkaSource(bootstrap_servers=[address], topics=topics, **changes)
    return pb.Source(name=name, contract=contract, kafka=kafka, columns=columns)


async def register(sources: SourceServiceStub, source: pb.Source) -> pb.Source:
    return (await sources.RegisterSource(pb.RegisterSourceRequest(source=source))).source


async def status(sources: SourceServiceStub, name: str = "orders") -> pb.SourceStatus:
    return (await sources.ListSources(pb.ListSourcesRequest(name=name))).sources[0].status


async def until(sources: SourceServiceStub, wanted, name: str = "orders") -> pb.SourceStatus:
    """Wait until a source's status is as `wanted` says."""
    deadline = time.monotonic() + WAIT_S
    while True:
        found = await status(sources, name)
        if wanted(found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


def landed(count: int):
    """Whether so many records of a source are settled."""
    return lambda found: found.accepted + found.duplicates + found.rejected >= count
