"""A topic of single JSON messages into Delta and the records topic, beside what only reading and parsing it costs. A request is a message.

The messages are there before the clock starts; the source is resumed, and the clock stops when every one has landed. The floor reads the same
topic with the same client in this process, decodes each message with msgspec into the contract's types, and throws it away.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import confluent_kafka as ck
import grpc
import msgspec
import pyarrow as pa
from confluent_kafka.admin import AdminClient, NewTopic
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from parts.kafka import start_kafka

from tests.perf.harness import Contestant, Ratio, cpu_seconds, median

ROUNDS = 3
MESSAGES = 200_000
TOPIC, SOURCE = "foreign-outcomes", "perf"
MESSAGES_PER_CORE_S = 50_000
WAIT_S = 300.0


class Outcome(msgspec.Struct, gc=False):
    """A message as the contract has it."""

    flight_id: str
    landed_at: int
    origin: str
    carrier: str
    tailnum: str | None
    dep_delay: float | None
    distance: int
    late: bool


def measure_topic(
    folder: Path, channel: grpc.Channel, pid: int, rows: Callable[[int, str], pa.Table]
) -> tuple[list[Contestant], list[Ratio]]:
    """Figures of the service `pid` behind `channel`; `rows` makes records with ids of their own."""
    broker = start_kafka(folder / "kafka")
    try:
        admin = AdminClient({"bootstrap.servers": broker.address})
        admin.create_topics([NewTopic(TOPIC, 1, 1)])[TOPIC].result(30)
        stub = SourceServiceStub(channel)
        kafka = pb.KafkaSource(bootstrap_servers=[broker.address], topics=[TOPIC])
        source = pb.Source(name=SOURCE, contract="outcomes", kafka=kafka)
        stub.RegisterSource(pb.RegisterSourceRequest(source=source), timeout=60)
        ours: list[tuple[float, float]] = []
        floor: list[tuple[float, float]] = []
        for number in range(ROUNDS):
            stub.PauseSource(pb.PauseSourceRequest(name=SOURCE), timeout=60)
            fill(broker.address, rows(MESSAGES, f"topic-{number}"))
            ours.append(timed(pid, lambda number=number: land(stub, (number + 1) * MESSAGES)))
            floor.append(timed(os.getpid(), lambda number=number: read(broker.address, number * MESSAGES)))
    finally:
        broker.stop()
    contestants = [
        contestant("ingestion, single JSON messages", ours),
        contestant("confluent-kafka and msgspec alone", floor),
    ]
    rate = 1000 / contestants[0].cpu_ms_per_request
    share = contestants[1].cpu_ms_per_request / contestants[0].cpu_ms_per_request
    return contestants, [
        Ratio.at_least("single messages for a second of one core", rate, MESSAGES_PER_CORE_S),
        Ratio.at_least("single messages: CPU of the floor over ours", share, 0.1),
    ]


def contestant(name: str, rounds: list[tuple[float, float]]) -> Contestant:
    """Medians over the rounds; latency has no meaning for a backlog."""
    rate = median([MESSAGES / seconds for seconds, _cpu in rounds])
    cpu_ms = median([cpu * 1000 / MESSAGES for _seconds, cpu in rounds])
    return Contestant(name, rate, cpu_ms, 0.0, 0.0)


def timed(pid: int, work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and processor seconds of `pid` while `work` runs."""
    cpu, started = cpu_seconds([pid]), time.perf_counter()
    work()
    return time.perf_counter() - started, cpu_seconds([pid]) - cpu


def fill(address: str, table: pa.Table) -> None:
    """Write every row as one message."""
    producer = ck.Producer({"bootstrap.servers": address, "linger.ms": 50, "queue.buffering.max.messages": 1_000_000})
    table = table.set_column(1, "landed_at", table.column("landed_at").cast(pa.int64()))
    for row in table.to_pylist():
        producer.produce(TOPIC, msgspec.json.encode(row))
        producer.poll(0)
    if producer.flush(60):
        raise RuntimeError("the broker did not take every message")


def land(stub: SourceServiceStub, total: int) -> None:
    """Resume the source and wait until `total` messages have landed."""
    stub.ResumeSource(pb.ResumeSourceRequest(name=SOURCE), timeout=60)
    deadline = time.monotonic() + WAIT_S
    while True:
        (found,) = stub.ListSources(pb.ListSourcesRequest(name=SOURCE), timeout=60).sources
        if found.status.rejected or found.status.duplicates:
            raise RuntimeError(f"messages were refused: {found.status}")
        if found.status.accepted >= total:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"not landed: {found.status}")
        time.sleep(0.02)


def read(address: str, first: int) -> None:
    """Read and decode one round's messages."""
    consumer = ck.Consumer({"bootstrap.servers": address, "group.id": "floor", "enable.auto.commit": False})
    consumer.assign([ck.TopicPartition(TOPIC, 0, first)])
    decode = msgspec.json.Decoder(Outcome).decode
    count = 0
    while count < MESSAGES:
        for message in consumer.consume(500, 1.0):
            decode(message.value())
            count += 1
    consumer.close()
