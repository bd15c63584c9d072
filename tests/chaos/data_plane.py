"""Ingestion and the feature service as real processes over a real Kafka, a real Redis and a Delta lake, with clients that never give up.

Everything that can be killed is a `Victim`: killed with SIGKILL and started again on what it kept. Redis keeps nothing but a snapshot that
may have been taken a while before, so it comes back empty or with an old state.
"""

import random
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import grpc
import pyarrow as pa
import redis
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from millrace.areas.data import arrow_ipc
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.ingestion.v1 import ingestion_pb2
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from parts.kafka import start_kafka
from parts.redis import start_redis
from parts.server import Server, free_port

CONTRACT = "events"
BASE = datetime(2013, 5, 1, 12, tzinfo=UTC)
READ_AT = BASE + timedelta(hours=3)
USERS = [f"u{i}" for i in range(9)]
ROWS = 20
WRITERS = 3
PACE_S = 0.03
RETRY_S = 0.05
CALL_S = 15.0
REPEAT_SHARE = 0.15
"""Batches that are sent again after their answer, and batches that hold an event again."""
# A client finds a server that came back within this long; gRPC's own longest wait is two minutes.
CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]

Oracle = dict[str, list[tuple[datetime, int]]]
"""Per user (event time, amount) of every acknowledged event."""


class Victim(Protocol):
    """One process that can be killed."""

    def kill(self) -> None:
        """End it without a goodbye."""

    def start(self) -> None:
        """Start it on what it kept."""


@dataclass
class Service:
    """A service's real process on a port of its own."""

    name: str
    folder: Path
    settings: dict[str, Any]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "config.yaml"
        settings = {**self.settings, "listen": f"127.0.0.1:{self.port}", "state_dir": str(self.folder / "state")}
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        program = Path(sys.executable).parent / f"millrace-{self.name}"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(program), "--config", str(config)], stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Broker:
    """Kafka; what it had answered for is on disk."""

    folder: Path
    port: int = field(default_factory=free_port)
    server: Server | None = None

    def start(self) -> None:
        self.server = start_kafka(self.folder, port=self.port)

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()


@dataclass
class Store:
    """Redis; `chance` decides whether it leaves a snapshot of an earlier moment."""

    folder: Path
    chance: random.Random
    port: int = field(default_factory=free_port)
    server: Server | None = None

    def start(self) -> None:
        self.server = start_redis(self.folder, port=self.port)
        if self.chance.random() < 0.5:
            with redis.Redis(port=self.port) as client:
                client.save()
        else:
            (self.folder / "dump.rdb").unlink(missing_ok=True)

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()


@dataclass
class Plane:
    """All of it."""

    folder: Path
    chance: random.Random
    victims: dict[str, Victim] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def lake(self) -> str:
        return str(self.folder / "lake" / CONTRACT)

    @property
    def broker(self) -> str:
        return self.addresses["kafka"]

    def start(self) -> None:
        kafka, store = Broker(self.folder / "kafka"), Store(self.folder / "redis", self.chance)
        bus = {"kind": "kafka", "bootstrap_servers": [f"127.0.0.1:{kafka.port}"], "request_timeout_s": 8.0}
        common = {"lake_url": str(self.folder / "lake"), "bus": bus, "drain_s": 0.0}
        ingestion = Service("ingestion", self.folder / "ingestion", common)
        url = f"redis://127.0.0.1:{store.port}"
        online = {"kind": "redis", "redis": {"url": url, "read_timeout_s": 5.0}}
        sets = str(self.folder / "sets")
        feature = Service(
            "feature", self.folder / "feature", {**common, "training_sets_url": sets, "online_store": online}
        )
        self.victims = {"kafka": kafka, "redis": store, "ingestion": ingestion, "feature": feature}
        self.addresses = {name: f"127.0.0.1:{victim.port}" for name, victim in self.victims.items()}  # type: ignore[attr-defined]
        for victim in self.victims.values():
            victim.start()

    def stop(self) -> None:
        for victim in reversed(self.victims.values()):
            victim.kill()

    @contextmanager
    def channel(self, name: str) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(self.addresses[name], CHANNEL) as channel:
            yield channel


class Client(threading.Thread):
    """Calls until it is told to stop; UNAVAILABLE and a passed deadline are the only errors it expects."""

    def __init__(self, plane: Plane) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.done = 0
        """Answered calls."""
        self.errors: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.plane = plane

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failure = error
            raise

    def work(self) -> None:
        raise NotImplementedError

    def set_up(self) -> None:
        """Register the contract and apply the definitions."""
        with self.plane.channel("ingestion") as ingestion, self.plane.channel("feature") as feature:
            register = ingestion_pb2.RegisterContractRequest(contract=contract())
            self.ask(IngestionServiceStub(ingestion).RegisterContract, register)
            apply = feature_pb2.ApplyDefinitionsRequest(project="chaos", feast_registry=definitions())
            self.ask(FeatureServiceStub(feature).ApplyDefinitions, apply)

    def ask(self, method: Any, request: Any) -> Any:
        """The answer, or None when told to stop."""
        while not self.stop.is_set():
            try:
                return method(request, timeout=CALL_S)
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
                self.errors[code.name] += 1
                if code not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                    raise
                self.stop.wait(RETRY_S)
        return None


def events(chance: random.Random, prefix: str) -> pa.Table:
    """Events with whole amounts, so that sums are exact in any order."""
    at = [BASE + timedelta(seconds=chance.uniform(0, 7200)) for _ in range(ROWS)]
    return pa.table(
        {
            "event_id": [f"{prefix}-{i}" for i in range(ROWS)],
            "at": pa.array(at, pa.timestamp("us", "UTC")),
            "user": [chance.choice(USERS) for _ in range(ROWS)],
            "amount": [chance.randrange(1000) for _ in range(ROWS)],
        }
    )


class Writer(Client):
    """One producer: each batch is sent until it is acknowledged, some of them again afterwards."""

    def __init__(self, plane: Plane, number: int, seed: int) -> None:
        super().__init__(plane)
        self.source = f"s{number}"
        self.sent: list[pa.Table] = []
        """New events of every batch that was sent, the last perhaps without an answer."""
        self.batches: list[tuple[ingestion_pb2.RecordBatch, int]] = []
        """Every batch with the number of its events that had come before."""
        self.chance = random.Random(f"{seed}-{number}")

    def work(self) -> None:
        with self.plane.channel("ingestion") as channel:
            stub = IngestionServiceStub(channel)
            while not self.stop.is_set():
                offset = len(self.sent) + 1
                fresh = events(self.chance, f"{self.source}-{offset}")
                again = self.chance.random() < REPEAT_SHARE and bool(self.sent)
                rows = pa.concat_tables([fresh, self.sent[-1].slice(0, 1)]) if again else fresh
                batch = ingestion_pb2.RecordBatch(
                    contract=CONTRACT, source=self.source, offset=offset, arrow_ipc=arrow_ipc(rows)
                )
                self.sent.append(fresh)
                self.batches.append((batch, int(again)))
                for _time in range(2 if self.chance.random() < REPEAT_SHARE else 1):
                    self.land(stub, batch, int(again))
                self.done += 1
                self.stop.wait(PACE_S)

    def land(self, stub: IngestionServiceStub, batch: ingestion_pb2.RecordBatch, again: int) -> None:
        answer = self.finish(stub, batch)
        assert (answer.accepted, answer.duplicates, answer.rejected) == (ROWS, again, 0), answer

    def finish(self, stub: IngestionServiceStub, batch: ingestion_pb2.RecordBatch) -> ingestion_pb2.WriteResponse:
        """Send until it is answered, also after `stop`: what was sent is then known to be in."""
        request = ingestion_pb2.WriteRequest(batch=batch)
        while (answer := self.ask(stub.Write, request)) is None:
            self.stop.clear()
            answered = self.ask(stub.Write, request)
            self.stop.set()
            if answered is not None:
                return answered
        return answer


class Repeater(Writer):
    """Sends everything that another writer sent once more, in order."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer.plane, 0, 0)
        self.sent, self.batches = writer.sent, writer.batches

    def work(self) -> None:
        with self.plane.channel("ingestion") as channel:
            for batch, again in self.batches:
                self.land(IngestionServiceStub(channel), batch, again)
                self.done += 1


class Reader(Client):
    """Reads every user's values all the time; none may ever be higher than what was sent."""

    def __init__(self, plane: Plane, writers: Sequence[Writer]) -> None:
        super().__init__(plane)
        self.writers = writers
        self.newest: dict[str, tuple[float, ...]] = {}

    def work(self) -> None:
        with self.plane.channel("feature") as channel:
            stub = FeatureServiceStub(channel)
            while not self.stop.is_set():
                answer = self.ask(stub.GetOnlineFeatures, read_request())
                if answer is None:
                    return
                self.newest = values_of(answer)
                self.done += 1
                sent = oracle(self.writers)
                for user, (count, *_rest) in self.newest.items():
                    assert count <= len(sent[user]), f"{user} has {count} events, {len(sent[user])} were sent"
                self.stop.wait(PACE_S)


def oracle(writers: Sequence[Writer]) -> Oracle:
    """What was sent, by user."""
    found: Oracle = defaultdict(list)
    for writer in writers:
        for table in list(writer.sent):
            columns = (table[name].to_pylist() for name in ("user", "at", "amount"))
            for user, at, amount in zip(*columns, strict=True):
                found[user].append((at, amount))
    return found


def expected(known: Oracle) -> dict[str, tuple[float, ...]]:
    """(count, sum, min, max, newest amount) per user."""
    return {
        user: (
            float(len(rows)),
            float(sum(amount for _at, amount in rows)),
            float(min(amount for _at, amount in rows)),
            float(max(amount for _at, amount in rows)),
            float(max(rows)[1]),
        )
        for user, rows in known.items()
    }


def read_request() -> feature_pb2.GetOnlineFeaturesRequest:
    at = Timestamp()
    at.FromDatetime(READ_AT)
    rows = [feature_pb2.EntityRow(values={"user": Value(string_value=user)}) for user in USERS]
    return feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=rows, event_time=at)


def values_of(answer: feature_pb2.GetOnlineFeaturesResponse) -> dict[str, tuple[float, ...]]:
    names = [*(f"by_user__amount_{f}" for f in ("count", "sum", "min", "max")), "newest__amount"]
    places = [list(answer.feature_names).index(name) for name in names]
    return {user: tuple(v.values[i] for i in places) for user, v in zip(USERS, answer.vectors, strict=True)}


def contract() -> ingestion_pb2.DataContract:
    kinds = {"event_id": "STRING", "at": "TIMESTAMP", "user": "STRING", "amount": "INT64"}
    return ingestion_pb2.DataContract(
        name=CONTRACT,
        columns=[
            ingestion_pb2.Column(name=name, type=ingestion_pb2.ColumnType.Value(f"COLUMN_TYPE_{kind}"))
            for name, kind in kinds.items()
        ],
        event_id_column="event_id",
        event_time_column="at",
        key_columns=["user"],
    )


def definitions() -> bytes:
    """Windows over a day and the newest row, per user."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, StreamFeatureView, ValueType
    from feast.aggregation import Aggregation
    from feast.protos.feast.core.Registry_pb2 import Registry
    from feast.types import Float64, Int64, String

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    lake = FileSource(name="events_lake", path="millrace://events", timestamp_field="at")
    source = PushSource(name=CONTRACT, batch_source=lake)
    functions = ("count", "sum", "min", "max")
    windows = StreamFeatureView(
        name="by_user",
        entities=[user],
        schema=[Field(name="user", dtype=String), *[Field(name=f"amount_{f}", dtype=Float64) for f in functions]],
        source=source,
        timestamp_field="at",
        aggregations=[
            Aggregation(
                column="amount", function=f, time_window=timedelta(days=1), slide_interval=timedelta(minutes=5),
                name=f"amount_{f}",
            )
            for f in functions
        ],
    )  # fmt: skip
    newest = FeatureView(
        name="newest",
        entities=[user],
        ttl=timedelta(days=1),
        schema=[Field(name="user", dtype=String), Field(name="amount", dtype=Int64)],
        source=source,
    )
    made = Registry()
    made.entities.append(user.to_proto())
    made.data_sources.append(source.to_proto())
    made.stream_feature_views.append(windows.to_proto())
    made.feature_views.append(newest.to_proto())
    made.feature_services.append(FeatureService(name="main", features=[windows, newest]).to_proto())
    return bytes(made.SerializeToString())
