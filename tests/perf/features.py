"""Online reads of 50 features in 5 views from Redis: the feature service beside Feast's own servers, its SDK and the least Redis can cost.

The same rows, one Redis, one machine, one run; contestants answer in turn for several rounds. Servers are their real processes
(`millrace-feature`, `feast serve`, `feast listen`), asked over HTTP by sockets with ready-made bytes and over gRPC without decoding, so that
the caller costs little; processor time is that of the server and of Redis together. The SDK and the raw reads run in the caller's
process, so there the caller's time counts too. Feast keeps newest rows only; windowed features, which it cannot serve, stand beside them.

Raw reads come in two kinds: ten fields of five hashes by redis-py's pipeline and made floats, as one writes it by hand; and the very
commands of the service packed and parsed by hiredis, with nothing made of the replies.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from deltalake import write_deltalake
from millrace_feature.compiler import compile_registry
from millrace_feature.plan import LatestView

from tests.perf.feature_servers import (
    Calls,
    feast_grpc,
    feast_servers,
    feature_service,
    http_calls,
    native_grpc,
    one_by_one,
    raw_by_hand,
    raw_commands,
    redis_server,
)
from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report

VIEWS, WIDTH, ENTITIES = 5, 10, 1000
ROUNDS = 5
WINDOWS = [timedelta(hours=hours) for hours in (1, 6, 24, 72, 168)]
CALLERS = 16
# The figures to reach: a tenth of the processor time of Feast's servers, three times that of raw reads, 100 rows in a millisecond.
FEAST, RAW, MS_100 = 10.0, 3.0, 1.0


@dataclass
class Case:
    """A contestant while it is measured."""

    name: str
    calls: Calls
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
        self.latencies += self.calls(chosen)
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


def sdk_calls(store: Any, tables: list[pa.Table]) -> Calls:
    """Reads through Feast's SDK in this process."""
    service = store.get_feature_service("wide")

    def read(entities: list[int]) -> object:
        return store.get_online_features(features=service, entity_rows=[{"user": f"u{i}"} for i in entities]).to_dict()

    answer = store.get_online_features(features=service, entity_rows=[{"user": "u3"}]).to_dict()
    if answer["f0_0"] != [tables[0].column("f0_0")[3].as_py()]:
        raise RuntimeError("Feast answers with other values")
    return one_by_one(read)


def cases(folder: Path, stack: contextlib.ExitStack, now: datetime) -> list[Case]:
    """Every contestant, started."""
    tables = [rows(number, now) for number in range(VIEWS)]
    for number, table in enumerate(tables):
        write_deltalake(str(folder / "lake" / f"rows{number}"), table)
        pd.DataFrame(table.to_pandas()).to_parquet(folder / f"rows{number}.parquet")
    write_deltalake(str(folder / "lake" / "events"), history(now))
    shared, windowed = definitions(folder)
    serialized = registry([*shared, *windowed])
    port, redis_pid = stack.enter_context(redis_server())
    address, http_port, pid = stack.enter_context(feature_service(folder, serialized, port))
    store, feast_http, feast_http_pid, feast_grpc_port, feast_grpc_pid = stack.enter_context(
        feast_servers(folder, shared, tables, port)
    )
    views = [v for v in compile_registry("perf", serialized).definitions.views if isinstance(v, LatestView)]
    me, wide = os.getpid(), {"feature_service": "wide"}
    refs = {"features": [f"view{number}:{name}" for number in range(VIEWS) for name in columns(number)]}
    ours, serving = [pid, redis_pid], "/feast.serving.ServingService/GetOnlineFeatures"
    python_serving = "/GrpcFeatureServer/GetOnlineFeatures"
    their_grpc = f"127.0.0.1:{feast_grpc_port}"
    names = [columns(number) for number in range(VIEWS)]
    return [
        Case("ours, Feast HTTP by service, 1 row", http_calls(http_port, wide, 1), 1, 300, ours),
        Case(f"ours, Feast HTTP by service, 1 row, {CALLERS} callers", http_calls(http_port, wide, CALLERS), 1, 1500, ours),
        Case("ours, Feast HTTP by features, 1 row", http_calls(http_port, refs, 1), 1, 300, ours),
        Case("ours, Feast gRPC by service, 1 row", feast_grpc(address, serving, "wide"), 1, 300, ours),
        Case(f"ours, Feast gRPC by service, 1 row, {CALLERS} callers", feast_grpc(address, serving, "wide", CALLERS), 1, 1500, ours),
        Case("ours, native gRPC, 1 row", native_grpc(address, "wide"), 1, 300, ours),
        Case(f"ours, native gRPC, 1 row, {CALLERS} callers", native_grpc(address, "wide", CALLERS), 1, 1500, ours),
        Case("ours, Feast HTTP by service, 100 rows", http_calls(http_port, wide, 1), 100, 50, ours),
        Case("ours, Feast gRPC by service, 100 rows", feast_grpc(address, serving, "wide"), 100, 50, ours),
        Case("ours, native gRPC, 100 rows", native_grpc(address, "wide"), 100, 50, ours),
        Case("ours, native gRPC, windows, 1 row", native_grpc(address, "windows"), 1, 150, ours),
        Case("ours, native gRPC, windows, 100 rows", native_grpc(address, "windows"), 100, 10, ours),
        Case("feast serve, HTTP by service, 1 row", http_calls(feast_http, wide, 1), 1, 60, [feast_http_pid, redis_pid]),
        Case("feast serve, HTTP by features, 1 row", http_calls(feast_http, refs, 1), 1, 100, [feast_http_pid, redis_pid]),
        Case("feast serve, HTTP by service, 100 rows", http_calls(feast_http, wide, 1), 100, 10, [feast_http_pid, redis_pid]),
        Case("feast listen, gRPC by service, 1 row", feast_grpc(their_grpc, python_serving, "wide"), 1, 60, [feast_grpc_pid, redis_pid]),
        Case(f"feast listen, gRPC by service, 1 row, {CALLERS} callers", feast_grpc(their_grpc, python_serving, "wide", CALLERS), 1, 200, [feast_grpc_pid, redis_pid]),
        Case("feast listen, gRPC by service, 100 rows", feast_grpc(their_grpc, python_serving, "wide"), 100, 10, [feast_grpc_pid, redis_pid]),
        Case("Feast SDK, 1 row", sdk_calls(store, tables), 1, 100, [me, redis_pid]),
        Case("Feast SDK, 100 rows", sdk_calls(store, tables), 100, 10, [me, redis_pid]),
        Case("raw Redis by redis-py, 1 row", raw_by_hand(port, tables, names), 1, 300, [me, redis_pid]),
        Case("raw Redis by redis-py, 100 rows", raw_by_hand(port, tables, names), 100, 30, [me, redis_pid]),
        Case("raw Redis, our commands, 1 row", raw_commands(port, views), 1, 500, [me, redis_pid]),
        Case("raw Redis, our commands, 100 rows", raw_commands(port, views), 100, 50, [me, redis_pid]),
    ]  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds that count")
    parser.add_argument("--only", default="", help="contestants whose names hold this, without figures to reach")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="perf-") as name, contextlib.ExitStack() as stack:
        found = [case for case in cases(Path(name), stack, datetime.now(tz=UTC)) if arguments.only in case.name]
        for number in range(-1, arguments.rounds):
            for case in found:
                print(f"round {number + 1} of {arguments.rounds}: {case.name}", file=sys.stderr)
                case.round(number)
                if number < 0:
                    case.forget()
    results = [case.result() for case in found]
    report("features", results, [] if arguments.only else figures(results))


def figures(results: list[Contestant]) -> list[Ratio]:
    """The figures with goals, all of processor time per read."""
    cpu = {one.name: one.cpu_ms_per_request for one in results}
    http, busy = (
        cpu["ours, Feast HTTP by service, 1 row"],
        cpu[f"ours, Feast HTTP by service, 1 row, {CALLERS} callers"],
    )
    over_grpc, raw = cpu["ours, Feast gRPC by service, 1 row"], cpu["raw Redis by redis-py, 1 row"]
    busy_grpc = cpu[f"ours, Feast gRPC by service, 1 row, {CALLERS} callers"]
    least = cpu["raw Redis, our commands, 1 row"]
    return [
        Ratio.at_least("HTTP by service, feast serve over ours", cpu["feast serve, HTTP by service, 1 row"] / http, FEAST),
        Ratio.at_least("gRPC by service, feast listen over ours", cpu["feast listen, gRPC by service, 1 row"] / over_grpc, FEAST),
        Ratio.at_least(f"gRPC by service, {CALLERS} callers, feast listen over ours", cpu[f"feast listen, gRPC by service, 1 row, {CALLERS} callers"] / busy_grpc, FEAST),
        Ratio.at_most("HTTP over raw Redis by redis-py", http / raw, RAW),
        Ratio.at_most(f"HTTP, {CALLERS} callers, over raw Redis by redis-py", busy / raw, RAW),
        Ratio.at_most(f"HTTP, {CALLERS} callers, over our commands alone", busy / least, RAW),
        Ratio.at_most("100 rows over HTTP, cpu ms", cpu["ours, Feast HTTP by service, 100 rows"], MS_100),
        Ratio.at_most("100 rows over Feast gRPC, cpu ms", cpu["ours, Feast gRPC by service, 100 rows"], MS_100),
        Ratio.at_most("100 rows over native gRPC, cpu ms", cpu["ours, native gRPC, 100 rows"], MS_100),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
