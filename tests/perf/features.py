"""Online reads of 50 features in 5 views: the feature service beside Feast's own SDK and a raw store. A request is one read.

All contestants answer one caller that asks again as soon as it has its answer, in turn, for several rounds. The feature service is its
real process over gRPC; Feast's SDK and the raw reads run in the caller's process, so their stores' processor time and the caller's own
count for them, while for the service only the service's counts. Feast's SDK keeps the newest rows only, so the same rows are compared;
windowed features, which it cannot serve, are measured beside them.
"""

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from deltalake import write_deltalake
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub

from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report

VIEWS, WIDTH, ENTITIES = 5, 10, 1000
ROUNDS = 5
WINDOWS = [timedelta(hours=hours) for hours in (1, 6, 24, 72, 168)]
# Goals: Feast's SDK in the caller's process is the bar for processor time, though the service is behind a socket.
CPU_OF_FEAST, CPU_OF_FEAST_100, CPU_MS, CPU_MS_100 = 1.0, 0.5, 1.0, 10.0


@dataclass
class Case:
    """A contestant while it is measured."""

    name: str
    read: Callable[[list[int]], object]
    """Reads the features of these entities."""
    rows: int
    reads: int
    pids: list[int]
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def round(self, number: int) -> None:
        """One round over entities chosen alike for every contestant."""
        chosen = np.random.default_rng(number + 10).integers(0, ENTITIES, (self.reads, self.rows)).tolist()
        cpu, started = cpu_seconds(self.pids), time.perf_counter()
        for entities in chosen:
            at = time.perf_counter()
            self.read(entities)
            self.latencies.append((time.perf_counter() - at) * 1000)
        self.rates.append(self.reads / (time.perf_counter() - started))
        self.cpu_ms.append((cpu_seconds(self.pids) - cpu) * 1000 / self.reads)

    def forget(self) -> None:
        """Drop the warm-up."""
        self.rates.clear()
        self.cpu_ms.clear()
        self.latencies.clear()

    def result(self) -> Contestant:
        """Medians over rounds, latencies over all reads."""
        ordered = sorted(self.latencies)
        return Contestant(
            self.name, median(self.rates), median(self.cpu_ms), quantile(ordered, 0.5), quantile(ordered, 0.99)
        )


def columns(view: int) -> list[str]:
    """Feature names of one view."""
    return [f"f{view}_{number}" for number in range(WIDTH)]


def rows(view: int, now: datetime) -> pa.Table:
    """One row per entity and view."""
    values = np.random.default_rng(view).normal(size=(WIDTH, ENTITIES))
    times = pa.array([now - timedelta(minutes=5)] * ENTITIES, pa.timestamp("us", "UTC"))
    features = {name: values[i] for i, name in enumerate(columns(view))}
    return pa.table({"user": [f"u{i}" for i in range(ENTITIES)], "at": times, **features})


def history(now: datetime) -> pa.Table:
    """Events over a week: 60 per entity."""
    chance = np.random.default_rng(7)
    count = ENTITIES * 60
    ages = chance.integers(0, 7 * 86_400_000_000, count)
    stamps = np.int64(now.timestamp() * 1e6) - ages
    users = [f"u{i}" for i in chance.integers(0, ENTITIES, count)]
    return pa.table(
        {"user": users, "at": pa.array(stamps, pa.timestamp("us", "UTC")), "amount": chance.integers(0, 1000, count)}
    )


def definitions(folder: Path) -> tuple[list[Any], list[Any]]:
    """Feast objects: (of both sides, windowed ones of the feature service alone)."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, StreamFeatureView, ValueType
    from feast.aggregation import Aggregation
    from feast.types import Float64, String

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    views: list[Any] = [
        FeatureView(
            name=f"view{number}",
            entities=[user],
            ttl=timedelta(days=365),
            schema=[Field(name="user", dtype=String), *[Field(name=name, dtype=Float64) for name in columns(number)]],
            source=FileSource(name=f"rows{number}", path=str(folder / f"rows{number}.parquet"), timestamp_field="at"),
        )
        for number in range(VIEWS)
    ]
    batch = FileSource(name="events_lake", path=str(folder / "events.parquet"), timestamp_field="at")
    events = PushSource(name="events", batch_source=batch)
    windowed: list[Any] = []
    for number, window in enumerate(WINDOWS):
        aggregations = [
            Aggregation(
                column="amount",
                function=f,
                time_window=window / part,
                slide_interval=timedelta(minutes=5),
                name=f"{f}_{part}",
            )
            for f in ("count", "sum", "mean", "min", "max")
            for part in (1, 2)
        ]
        schema = [Field(name="user", dtype=String), *[Field(name=a.name, dtype=Float64) for a in aggregations]]
        windowed.append(
            StreamFeatureView(
                name=f"windows{number}",
                entities=[user],
                schema=schema,
                source=events,
                timestamp_field="at",
                aggregations=aggregations,
            )
        )
    shared = [user, *views, FeatureService(name="wide", features=views)]
    return shared, [*windowed, FeatureService(name="windows", features=windowed), events]


def registry(objects: list[Any]) -> bytes:
    """The objects as a serialized Feast registry."""
    from feast.protos.feast.core.Registry_pb2 import Registry

    content = Registry()
    kinds = {
        "Entity": "entities",
        "FeatureView": "feature_views",
        "StreamFeatureView": "stream_feature_views",
        "FeatureService": "feature_services",
    }
    for item in objects:
        if type(item).__name__ in kinds:
            getattr(content, kinds[type(item).__name__]).append(item.to_proto())
    return bytes(content.SerializeToString())


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[int]:
    """A process while the context is open; yields its id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.terminate()


@contextlib.contextmanager
def feature_service(folder: Path, objects: list[Any]) -> Iterator[tuple[FeatureServiceStub, int]]:
    """The service's real process with the definitions applied and the lake filled in."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "listen": address,
        "state_dir": str(folder / "state"),
        "lake_url": str(folder / "lake"),
        "training_sets_url": str(folder / "sets"),
        "bus": {"path": str(folder / "bus.sqlite")},
        "telemetry": {"log_level": "WARNING"},
    }
    config = folder / "feature.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "millrace-feature"), "--config", str(config)]
    with process(command) as pid, grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(60)
        stub = FeatureServiceStub(channel)
        request = pb.ApplyDefinitionsRequest(project="perf", feast_registry=registry(objects))
        stub.ApplyDefinitions(request, timeout=300)
        deadline = time.monotonic() + 120
        while not stub.GetProgress(pb.GetProgressRequest(), timeout=30).contracts:
            if time.monotonic() > deadline:
                raise TimeoutError("the feature service did not fill its views")
            time.sleep(0.1)
        yield stub, pid


def service_read(stub: FeatureServiceStub, service: str) -> Callable[[list[int]], object]:
    """Reads through the feature service."""

    def read(entities: list[int]) -> object:
        keys = [pb.EntityRow(values={"user": Value(string_value=f"u{i}")}) for i in entities]
        answer = stub.GetOnlineFeatures(pb.GetOnlineFeaturesRequest(feature_service=service, rows=keys), timeout=30)
        if len(answer.vectors) != len(entities) or len(answer.feature_names) != VIEWS * WIDTH:
            raise RuntimeError("a read came back short")
        return answer

    return read


def feast_read(
    folder: Path, objects: list[Any], tables: list[pa.Table], store: dict[str, Any]
) -> Callable[[list[int]], object]:
    """Reads through Feast's SDK from its own online store."""
    from feast import FeatureStore, RepoConfig

    name = store["type"]
    config = RepoConfig(
        project=f"perf_{name}",
        provider="local",
        registry=str(folder / f"{name}.db"),
        online_store=store,
        offline_store={"type": "file"},
        entity_key_serialization_version=3,
    )
    feast = FeatureStore(config=config)
    feast.apply(objects)
    for number, table in enumerate(tables):
        feast.write_to_online_store(f"view{number}", table.to_pandas())
    service = feast.get_feature_service("wide")

    def read(entities: list[int]) -> object:
        return feast.get_online_features(features=service, entity_rows=[{"user": f"u{i}"} for i in entities]).to_dict()

    answer = feast.get_online_features(features=service, entity_rows=[{"user": "u3"}]).to_dict()
    if answer["f0_0"] != [tables[0].column("f0_0")[3].as_py()]:
        raise RuntimeError("Feast answers with other values")
    return read


def redis_read(port: int, tables: list[pa.Table]) -> Callable[[list[int]], object]:
    """Pipelined HMGET, one hash per view and entity."""
    import redis

    client = redis.Redis(port=port)
    with client.pipeline(transaction=False) as pipe:
        for number, table in enumerate(tables):
            for i, record in enumerate(table.select(columns(number)).to_pylist()):
                pipe.hset(f"{number}:u{i}", mapping=record)
        pipe.execute()

    def read(entities: list[int]) -> object:
        with client.pipeline(transaction=False) as pipe:
            for i in entities:
                for number in range(VIEWS):
                    pipe.hmget(f"{number}:u{i}", columns(number))
            return [[float(v) for v in values] for values in pipe.execute()]

    return read


def sqlite_read(folder: Path, tables: list[pa.Table]) -> Callable[[list[int]], object]:
    """One SELECT per view and entity."""
    connection = sqlite3.connect(folder / "raw.sqlite")
    for number, table in enumerate(tables):
        connection.execute(
            f"CREATE TABLE v{number} (user TEXT PRIMARY KEY, {', '.join(f'{c} REAL' for c in columns(number))})"
        )
        values = [tuple(record.values()) for record in table.select(["user", *columns(number)]).to_pylist()]
        connection.executemany(f"INSERT INTO v{number} VALUES ({', '.join('?' * (WIDTH + 1))})", values)
    connection.commit()

    def read(entities: list[int]) -> object:
        query = "SELECT * FROM v{} WHERE user = ?"
        return [
            connection.execute(query.format(number), (f"u{i}",)).fetchone() for i in entities for number in range(VIEWS)
        ]

    return read


def main() -> None:
    """Measure and report."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    now = datetime.now(tz=UTC)
    with tempfile.TemporaryDirectory(prefix="perf-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        tables = [rows(number, now) for number in range(VIEWS)]
        for number, table in enumerate(tables):
            write_deltalake(str(folder / "lake" / f"rows{number}"), table)
            pd.DataFrame(table.to_pandas()).to_parquet(folder / f"rows{number}.parquet")
        write_deltalake(str(folder / "lake" / "events"), history(now))
        shared, windowed = definitions(folder)
        stub, pid = stack.enter_context(feature_service(folder, [*shared, *windowed]))
        me = os.getpid()
        cases = [
            Case("feature service, 1 row", service_read(stub, "wide"), 1, 300, [pid]),
            Case("feature service, 100 rows", service_read(stub, "wide"), 100, 30, [pid]),
            Case("feature service, windows, 1 row", service_read(stub, "windows"), 1, 300, [pid]),
            Case("feature service, windows, 100 rows", service_read(stub, "windows"), 100, 30, [pid]),
        ]
        feast_sqlite = feast_read(folder, shared, tables, {"type": "sqlite", "path": str(folder / "feast.sqlite")})
        cases += [
            Case("Feast SDK on SQLite, 1 row", feast_sqlite, 1, 100, [me]),
            Case("Feast SDK on SQLite, 100 rows", feast_sqlite, 100, 10, [me]),
        ]
        if shutil.which("redis-server"):
            port = free_port()
            command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
            redis_pid = stack.enter_context(process(command))
            wait_for(port)
            feast_redis = feast_read(
                folder, shared, tables, {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
            )
            raw, store, pids = redis_read(port, tables), "Redis", [me, redis_pid]
            cases += [
                Case("Feast SDK on Redis, 1 row", feast_redis, 1, 100, pids),
                Case("Feast SDK on Redis, 100 rows", feast_redis, 100, 10, pids),
            ]
        else:
            raw, store, pids = sqlite_read(folder, tables), "SQLite", [me]
        cases += [Case(f"raw {store}, 1 row", raw, 1, 300, pids), Case(f"raw {store}, 100 rows", raw, 100, 30, pids)]
        for number in range(-1, ROUNDS):
            for case in cases:
                print(f"round {number + 1} of {ROUNDS}: {case.name}", file=sys.stderr)
                case.round(number)
                if number < 0:
                    case.forget()
    summarize([case.result() for case in cases])


def wait_for(port: int) -> None:
    """Wait until something listens on `port`."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def summarize(results: list[Contestant]) -> None:
    """The figures with goals, and the report."""
    cpu = {one.name: one.cpu_ms_per_request for one in results}
    feast = "Redis" if "Feast SDK on Redis, 1 row" in cpu else "SQLite"
    one, many = cpu["feature service, 1 row"], cpu["feature service, 100 rows"]
    ratios = [
        Ratio.at_most("1 row, cpu over Feast SDK", one / cpu[f"Feast SDK on {feast}, 1 row"], CPU_OF_FEAST),
        Ratio.at_most("100 rows, cpu over Feast SDK", many / cpu[f"Feast SDK on {feast}, 100 rows"], CPU_OF_FEAST_100),
        Ratio.at_most("50 windowed features, 1 row, cpu ms", cpu["feature service, windows, 1 row"], CPU_MS),
        Ratio.at_most("50 windowed features, 100 rows, cpu ms", cpu["feature service, windows, 100 rows"], CPU_MS_100),
    ]
    report("features", results, ratios)


if __name__ == "__main__":
    main()
