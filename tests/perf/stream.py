"""Kafka → tiles → Redis: the feature worker at full speed and at half its goal's load, beside the least that the work can cost. A request is an event.

The worker is the service's real process over a real broker and a real Redis; it is started on a backlog, and its processor time is taken
between the first and the last transaction of the backlog, as seen in Redis. The floor does the same in the measuring process with nothing
around it: one consumer polls the same messages, numpy reduces them to the same tiles, and one pipeline writes the packed tiles, without
reading what stood there, without a transaction and without remembering batches. Latency at full speed is that of one batch of messages;
in the paced run it is freshness, from handing a message to the producer to the moment its position (one transaction with its
tiles) stands in Redis. At the end windows read through the service are compared with counts of everything that was sent.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import kafka
import numpy as np
import pyarrow as pa
import redis
import yaml
from deltalake import write_deltalake
from google.protobuf.timestamp_pb2 import Timestamp
from kafka.admin import KafkaAdminClient
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.events.v1.events_pb2 import RecordsLanded
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_feature.redis_layout import Keys
from millrace_kit.bus import records_topic

from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from parts.kafka import start_kafka
from parts.redis import start_redis
from parts.server import free_port

ENTITIES = 10_000
EVENTS, SMALL_EVENTS = 2_000, 250
"""Events of one message: in the backlog, and in the paced run."""
BACKLOG = 500
"""Messages of one round."""
ROUNDS = 3
PACED_S, WARM_S = 30.0, 5.0
DRAIN_S = 600.0
"""Longest wait for a worker that the paced load was too much for; its freshness then says so."""
HOP = timedelta(minutes=5)
LATE_SHARE = 0.01
"""Events up to an hour late; the others lie in the newest hops."""
BATCH = 64
"""Messages the floor takes at once, as the worker does (`fetch_messages`)."""
VARIETY = 50
"""Different messages; they come again under other offsets."""
TOPIC = records_topic("events")
PREFIX = "millrace:feature:"
# Goals: events for a second of one core, freshness at half that load, and how much more than the floor the whole worker may cost.
EVENTS_PER_CORE_S, FRESHNESS_MS, CPU_OF_FLOOR = 50_000, 1_000.0, 3.0


@dataclass(frozen=True)
class Rig:
    """What is measured."""

    config: Path
    """Settings of the feature service."""
    address: str
    """Where it will listen."""
    broker: str
    redis_port: int
    redis_pid: int
    base: datetime
    """Where the events' times begin."""


@dataclass
class Sent:
    """What was published so far."""

    messages: int = 0
    counts: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(ENTITIES, np.int64))
    """Events per entity."""


def definitions() -> bytes:
    """Two windows of five aggregates over two columns, per user."""
    from feast import Entity, FeatureService, Field, FileSource, PushSource, StreamFeatureView, ValueType
    from feast.aggregation import Aggregation
    from feast.protos.feast.core.Registry_pb2 import Registry
    from feast.types import Float64, String

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    events = PushSource(
        name="events", batch_source=FileSource(name="lake", path="millrace://events", timestamp_field="at")
    )
    aggregations = [
        Aggregation(
            column=column,
            function=function,
            time_window=timedelta(hours=hours),
            slide_interval=HOP,
            name=f"{column}_{function}_{hours}h",
        )
        for column in ("amount", "price")
        for function in ("count", "sum", "mean", "min", "max")
        for hours in (1, 24)
    ]
    view = StreamFeatureView(
        name="by_user",
        entities=[user],
        schema=[Field(name="user", dtype=String), *[Field(name=a.name, dtype=Float64) for a in aggregations]],
        source=events,
        timestamp_field="at",
        aggregations=aggregations,
    )
    registry = Registry()
    registry.entities.append(user.to_proto())
    registry.data_sources.append(events.to_proto())
    registry.stream_feature_views.append(view.to_proto())
    registry.feature_services.append(FeatureService(name="main", features=[view]).to_proto())
    return bytes(registry.SerializeToString())


def table(events: int, seed: int, base: datetime) -> tuple[pa.Table, np.ndarray[Any, np.dtype[np.int64]]]:
    """(events around `base`, how many each entity has)."""
    chance = np.random.default_rng(seed)
    users = chance.integers(0, ENTITIES, events)
    late_us = np.where(chance.random(events) < LATE_SHARE, chance.integers(0, 3_600_000_000, events), 0)
    at_us = np.int64(base.timestamp() * 1e6) + chance.integers(0, 60_000_000, events) - late_us
    content = pa.table(
        {
            "event_id": [f"{seed}-{i}" for i in range(events)],
            "at": pa.array(at_us, pa.timestamp("us", "UTC")),
            "user": [f"u{i}" for i in users.tolist()],
            "amount": chance.integers(0, 1000, events),
            "price": chance.normal(20, 5, events),
        }
    )
    return content, np.bincount(users, minlength=ENTITIES)


class Source:
    """Publishes messages as ingestion does; every batch has an offset of its own."""

    def __init__(self, broker: str, events: int, base: datetime) -> None:
        self._producer = kafka.KafkaProducer(bootstrap_servers=[broker], acks="all", max_request_size=1 << 24)
        made = [table(events, seed + events, base) for seed in range(VARIETY)]
        self._payloads = []
        for content, _counts in made:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, content.schema) as stream:
                stream.write_table(content)
            self._payloads.append(sink.getvalue().to_pybytes())
        self._counts = [counts for _content, counts in made]

    def send(self, sent: Sent) -> None:
        """One message; it lies at offset `sent.messages` before the call."""
        number = sent.messages % VARIETY
        fact = RecordsLanded(
            contract="events",
            contract_version=1,
            arrow_ipc=self._payloads[number],
            table_version=1,
            source="perf",
            source_offset=sent.messages + 1,
            rows=int(self._counts[number].sum()),
        )
        self._producer.send(TOPIC, fact.SerializeToString(), b"events")
        sent.messages += 1
        sent.counts += self._counts[number]

    def flush(self) -> None:
        """Wait until everything is durable."""
        self._producer.flush(60)

    def close(self) -> None:
        """Disconnect."""
        self._producer.close()


class Place:
    """Where the worker stands, asked of Redis."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port)
        self._key = Keys(PREFIX).positions(TOPIC)

    def applied(self) -> int:
        """Messages whose tiles can be read."""
        return int(self._client.hget(self._key, "0") or 0)  # type: ignore[arg-type]


@contextlib.contextmanager
def worker(rig: Rig) -> Iterator[tuple[FeatureServiceStub, int]]:
    """The feature service's process while the context is open; (stub, process id)."""
    command = [str(Path(sys.executable).parent / "millrace-feature"), "--config", str(rig.config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        try:
            with grpc.insecure_channel(rig.address) as channel:
                grpc.channel_ready_future(channel).result(60)
                yield FeatureServiceStub(channel), child.pid
        finally:
            child.terminate()
            child.wait(60)


def backlog_round(rig: Rig, source: Source, sent: Sent, place: Place) -> tuple[float, float, float, list[float]]:
    """One backlog: (events/s, worker's and Redis's cpu ms an event, ms a transaction)."""
    first = sent.messages
    for _number in range(BACKLOG):
        source.send(sent)
    source.flush()
    with worker(rig) as (_stub, pid):
        marks: list[tuple[float, int, float, float]] = []
        deadline = time.monotonic() + 300
        while not marks or marks[-1][1] < sent.messages:
            applied = place.applied()
            if applied > (marks[-1][1] if marks else first):
                marks.append((time.perf_counter(), applied, cpu_seconds([pid]), cpu_seconds([rig.redis_pid])))
            if time.monotonic() > deadline:
                raise TimeoutError(f"the worker stands at {applied} of {sent.messages}")
            time.sleep(0.005)
    if len(marks) < 2:
        raise RuntimeError("the backlog went in one transaction: make it longer")
    (start, old, cpu, redis_cpu), (end, new, cpu_end, redis_cpu_end) = marks[0], marks[-1]
    events = (new - old) * EVENTS
    steps = [(b[0] - a[0]) * 1000 for a, b in pairwise(marks)]
    return (
        events / (end - start),
        (cpu_end - cpu) * 1000 / events,
        (redis_cpu_end - redis_cpu) * 1000 / events,
        steps,
    )


def paced(pid: int, source: Source, sent: Sent, place: Place) -> tuple[float, float, list[float]]:
    """Half the goal's load for a while: (events/s, the worker's cpu ms an event, freshness in ms of each message)."""
    per_s = EVENTS_PER_CORE_S / 2 / SMALL_EVENTS
    begin, first = time.perf_counter(), sent.messages
    times: list[float] = []
    fresh: list[float] = []
    cpu, cpu_from, applied_from = 0.0, begin, first
    while True:
        now = time.perf_counter()
        if now - begin >= WARM_S and not cpu:
            cpu, cpu_from, applied_from = cpu_seconds([pid]), now, first + len(fresh)
        while len(times) < (now - begin) * per_s and now - begin < PACED_S:
            times.append(time.perf_counter())
            source.send(sent)
        applied, now = place.applied() - first, time.perf_counter()
        fresh += [(now - at) * 1000 for at in times[len(fresh) : applied]]
        if len(fresh) == len(times) and now - begin >= PACED_S:
            break
        if now - begin > PACED_S + DRAIN_S:
            raise TimeoutError(f"{len(times) - len(fresh)} messages are not readable")
        time.sleep(0.001)
    events = (first + len(fresh) - applied_from) * SMALL_EVENTS
    cost = (cpu_seconds([pid]) - cpu) * 1000 / events
    kept = [ms for ms, at in zip(fresh, times, strict=True) if at - begin >= WARM_S]
    return events / (time.perf_counter() - cpu_from), cost, kept


def reduce(contents: Sequence[pa.Table]) -> tuple[list[str], list[bytes]]:
    """(hash names, packed tiles) by plain numpy."""
    whole = pa.concat_tables(contents)
    users = whole.column("user").combine_chunks().dictionary_encode()
    hops = whole.column("at").cast(pa.int64()).to_numpy() // int(HOP.total_seconds() * 1e6)
    places = users.indices.to_numpy().astype(np.int64) << 32 | hops
    order = np.argsort(places, kind="stable")
    places = places[order]
    starts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
    values = np.stack([whole.column(c).to_numpy()[order] for c in ("amount", "price")])
    ends = np.r_[starts[1:], len(places)]
    stats = np.concatenate(
        [
            np.broadcast_to(ends - starts, (2, len(starts))),
            np.add.reduceat(values, starts, axis=1),
            np.minimum.reduceat(values, starts, axis=1),
            np.maximum.reduceat(values, starts, axis=1),
        ]
    )
    packed = np.ascontiguousarray(stats.T)
    words = users.dictionary.to_pylist()
    names = [f"floor:{words[code]}:{hop}" for code, hop in zip((places[starts] >> 32).tolist(), (places[starts] & 0xFFFFFFFF).tolist(), strict=True)]  # fmt: skip
    return names, [row.tobytes() for row in packed]


def floor_round(broker: str, client: Any, messages: int, *, whole: bool) -> tuple[float, float, list[float]]:
    """Consume the topic's first messages, and with `whole` reduce and write: (events/s, cpu ms an event, ms a batch)."""
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=[broker], fetch_max_bytes=64 << 20, max_partition_fetch_bytes=16 << 20
    )
    place = kafka.TopicPartition(TOPIC, 0)
    consumer.assign([place])
    consumer.seek(place, 0)
    done, steps = 0, []
    cpu, started = time.process_time(), time.perf_counter()
    while done < messages:
        at = time.perf_counter()
        records = [r for part in consumer.poll(timeout_ms=1000, max_records=BATCH).values() for r in part]
        records = records[: messages - done]
        done += len(records)
        if whole and records:
            contents = []
            for record in records:
                fact = RecordsLanded.FromString(record.value)
                with pa.ipc.open_stream(fact.arrow_ipc) as stream:
                    contents.append(stream.read_all())
            with client.pipeline(transaction=False) as pipe:
                for name, packed in zip(*reduce(contents), strict=True):
                    pipe.set(name, packed)
                pipe.execute()
        steps.append((time.perf_counter() - at) * 1000)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    consumer.close(autocommit=False)
    return messages * EVENTS / seconds, cpu * 1000 / (messages * EVENTS), steps


def check(stub: FeatureServiceStub, sent: Sent, until: datetime) -> None:
    """Every event that was sent is in the windows once."""
    at = Timestamp()
    at.FromDatetime(until)
    for start in range(0, ENTITIES, 1000):
        rows = [pb.EntityRow(values={"user": Value(string_value=f"u{i}")}) for i in range(start, start + 1000)]
        answer = stub.GetOnlineFeatures(
            pb.GetOnlineFeaturesRequest(feature_service="main", rows=rows, event_time=at), timeout=60
        )
        column = list(answer.feature_names).index("by_user__amount_count_24h")
        found = np.array([vector.values[column] for vector in answer.vectors])
        if not np.array_equal(found, sent.counts[start : start + 1000]):
            raise RuntimeError(
                f"the windows hold {found.sum():.0f} of {sent.counts[start : start + 1000].sum()} events"
            )


def contestant(name: str, rounds: Sequence[tuple[float, float, list[float]]]) -> Contestant:
    """Medians over rounds of (rate, cpu ms), quantiles over all latencies."""
    latencies = sorted(ms for one in rounds for ms in one[2])
    return Contestant(
        name,
        median([one[0] for one in rounds]),
        median([one[1] for one in rounds]),
        quantile(latencies, 0.5),
        quantile(latencies, 0.99),
    )


def main() -> None:
    """Measure and report."""
    base = datetime.now(tz=UTC).replace(second=0, microsecond=0) - timedelta(hours=2)
    with tempfile.TemporaryDirectory(prefix="perf-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        broker = start_kafka(folder / "kafka")
        stack.callback(broker.stop)
        store = start_redis(folder / "redis")
        stack.callback(store.stop)
        redis_port = int(store.address.rpartition(":")[2])
        admin = KafkaAdminClient(bootstrap_servers=[broker.address])
        admin.create_topics(
            {TOPIC: {"num_partitions": 1, "replication_factor": 1, "configs": {"max.message.bytes": str(1 << 24)}}}
        )
        admin.close()
        first, _counts = table(1, 0, base)
        write_deltalake(str(folder / "lake" / "events"), first.slice(0, 0), mode="append")
        address = f"127.0.0.1:{free_port()}"
        config = folder / "feature.yaml"
        settings = {
            "listen": address,
            "state_dir": str(folder / "state"),
            "lake_url": str(folder / "lake"),
            "training_sets_url": str(folder / "sets"),
            "bus": {"kind": "kafka", "bootstrap_servers": [broker.address]},
            "online_store": {"kind": "redis", "redis": {"url": store.address, "prefix": PREFIX}},
            "telemetry": {"log_level": "WARNING"},
        }
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        measure(Rig(config, address, broker.address, redis_port, store.server_pid, base))


def measure(rig: Rig) -> None:
    """Run the rounds and the paced load, check, and report."""
    sent, place = Sent(), Place(rig.redis_port)
    with worker(rig) as (stub, _pid):
        stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="perf", feast_registry=definitions()), timeout=300)
    source = Source(rig.broker, EVENTS, rig.base)
    full, redis_cpu, consumes, floors = [], [], [], []
    with redis.Redis(port=rig.redis_port, db=1) as client:
        for number in range(ROUNDS):
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
            rate, cpu, beside, steps = backlog_round(rig, source, sent, place)
            full.append((rate, cpu, steps))
            print(f"  {rate:,.0f} events/s, {1000 / cpu:,.0f} for a second of one core", file=sys.stderr)
            redis_cpu.append(beside)
            consumes.append(floor_round(rig.broker, client, BACKLOG, whole=False))
            floors.append(floor_round(rig.broker, client, BACKLOG, whole=True))
    source.close()
    small = Source(rig.broker, SMALL_EVENTS, rig.base)
    with worker(rig) as (stub, pid):
        print("half the goal's load", file=sys.stderr)
        fresh = paced(pid, small, sent, place)
        check(stub, sent, rig.base + timedelta(hours=2))
    small.close()
    results = [
        contestant("feature worker, backlog", full),
        contestant("feature worker, half load (freshness)", [fresh]),
        contestant("raw consume", consumes),
        contestant("raw consume, numpy, pipelined Redis", floors),
    ]
    worker_cpu, floor_cpu = results[0].cpu_ms_per_request, results[3].cpu_ms_per_request
    ratios = [
        Ratio.at_least("events for a second of one core", 1000 / worker_cpu, EVENTS_PER_CORE_S),
        Ratio.at_most("freshness p99 at half that load, ms", results[1].p99_ms, FRESHNESS_MS),
        Ratio.at_most("worker's cpu over the floor's", worker_cpu / floor_cpu, CPU_OF_FLOOR),
        Ratio.at_most("Redis's cpu over the worker's", median(redis_cpu) / worker_cpu, 1.0),
    ]
    report("stream", results, ratios)


if __name__ == "__main__":
    main()
