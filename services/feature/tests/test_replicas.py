"""Replicas over one Redis, one PostgreSQL and one Kafka: they share the work, and whatever dies, nothing counts twice or is lost."""

import asyncio
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import grpc
import grpc.aio
import pyarrow as pa
import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_feature.app import build
from millrace_feature.settings import OnlineStoreSettings, RedisSettings
from millrace_kit.bus import Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_kit.settings import BusSettings
from parts.redis import start_redis
from parts.server import free_port

BASE = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
USERS = [f"u{i}" for i in range(7)]
BATCHES, ROWS = 90, 20
DEADLINE_S = 240


def events(rng: random.Random) -> pa.Table:
    """Records of one hour; whole amounts, so that sums are exact in any order."""
    at = [BASE + timedelta(minutes=rng.uniform(0, 55)) for _ in range(ROWS)]
    return pa.table(
        {
            "event_id": pa.array([uuid4().hex for _ in at], pa.string()),
            "at": pa.array(at, pa.timestamp("us", "UTC")),
            "user": pa.array([rng.choice(USERS) for _ in at], pa.string()),
            "shop": pa.array([rng.randrange(3) for _ in at], pa.int64()),
            "amount": pa.array([rng.randrange(1000) for _ in at], pa.int64()),
            "note": pa.array(["n"] * ROWS, pa.string()),
        }
    )


def request() -> feature_pb2.GetOnlineFeaturesRequest:
    at = Timestamp()
    at.FromDatetime(BASE + timedelta(minutes=60))
    fixed = {
        "shop": common_pb2.Value(int64_value=1),
        "limit": common_pb2.Value(double_value=1),
        "asked_at": common_pb2.Value(timestamp_value=at),
    }
    rows = [feature_pb2.EntityRow(values={**fixed, "user": common_pb2.Value(string_value=user)}) for user in USERS]
    return feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=rows, event_time=at)


async def read(stub) -> list[tuple[float, float]]:
    """(count, sum) of the last hour per user."""
    answer = await stub.GetOnlineFeatures(request(), timeout=5)
    names = list(answer.feature_names)
    places = names.index("by_user__amount_count_60m"), names.index("by_user__amount_sum_60m")
    # The sum of an empty window is missing.
    return [(v.values[places[0]], v.values[places[1]] if v.values[places[0]] else 0.0) for v in answer.vectors]


def expected(tables: list[pa.Table]) -> list[tuple[float, float]]:
    rows = pa.concat_tables(tables).to_pylist()
    amounts = [[row["amount"] for row in rows if row["user"] == user] for user in USERS]
    return [(float(len(found)), float(sum(found))) for found in amounts]


@dataclass
class Replica:
    """A real process."""

    folder: Path
    settings: dict
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "feature.yaml"
        config.write_text(yaml.safe_dump({**self.settings, "listen": f"127.0.0.1:{self.port}"}), encoding="utf-8")
        code = "from millrace_feature.app import main; main()"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "--config", str(config)], stdout=log, stderr=log, cwd=self.folder
            )

    def end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None


async def until(what: str, ask, deadline_s: float = DEADLINE_S):
    async with asyncio.timeout(deadline_s):
        while True:
            try:
                if (found := await ask()) is not None:
                    return found
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError(what)


@pytest.fixture
def cluster_settings(kafka_address: str, postgres_url: str, redis_url: str) -> dict:
    """What replicas share."""
    return {
        "bus": {"kind": "kafka", "bootstrap_servers": [kafka_address], "partitions": 3},
        "database_url": postgres_url,
        "online_store": {"kind": "redis", "redis": {"url": redis_url, "read_timeout_s": 5}},
        "definitions_poll_s": 0.2,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.kafka
@pytest.mark.postgres
@pytest.mark.redis
async def test_replicas_killed_under_load(world, small_objects, make_registry, cluster_settings, tmp_path) -> None:
    contract_topic = records_topic("events")
    settings = {**world.settings.model_dump(mode="json"), **cluster_settings}
    bus_settings = BusSettings.model_validate(settings["bus"], strict=False)
    replicas = [Replica(tmp_path / f"r{i}", {**settings, "state_dir": str(tmp_path / f"r{i}/state")}) for i in range(2)]
    rng = random.Random(5)
    bus = await open_bus(bus_settings)
    landed: list[pa.Table] = []
    try:
        for replica in replicas:
            replica.start()
        async with (
            open_channel(f"127.0.0.1:{replicas[0].port}") as first,
            open_channel(f"127.0.0.1:{replicas[1].port}") as second,
        ):
            stubs = [feature_pb2_grpc.FeatureServiceStub(channel) for channel in (first, second)]
            registry = make_registry(small_objects())
            apply = feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry)

            async def applied():
                return await stubs[0].ApplyDefinitions(apply, timeout=60)

            await until("definitions apply", applied)
            # The other replica was told nothing and reads all the same.
            assert await until("the other replica answers", lambda: read(stubs[1])) == [(0.0, 0.0)] * len(USERS)
            for number in range(BATCHES):
                table = events(rng)
                fact = world.land("events", table, source=f"s{number % 4}")
                landed.append(table)
                # Spread over the partitions, so that both replicas write the same groups at the same time.
                message = Outgoing(contract_topic, str(number), fact.SerializeToString())
                await bus.publish([message, message] if number % 9 == 0 else [message])
                if number in {25, 45, 65}:
                    victim = replicas[0] if number == 45 else replicas[1]
                    victim.end(signal.SIGKILL)
                    victim.start()
                await asyncio.sleep(0.03)
            wanted = expected(landed)

            async def right():
                answers = [await read(stub) for stub in stubs]
                assert all(a <= b for answer in answers for a, b in zip(answer, wanted, strict=True)), "counted twice"
                return answers if answers == [wanted, wanted] else None

            await until("both replicas have every record", right)
            replicas[0].end(signal.SIGTERM)
            table = events(rng)
            landed.append(table)
            fact = world.land("events", table, source="s0")
            await bus.publish([Outgoing(contract_topic, "last", fact.SerializeToString())])
            wanted = expected(landed)

            async def last():
                return True if await read(stubs[1]) == wanted else None

            await until("the one that is left follows all partitions", last)
    finally:
        for replica in replicas:
            replica.end(signal.SIGKILL)
        await bus.close()


@pytest.mark.redis
async def test_a_replica_that_was_told_nothing_answers(world, small_objects, make_registry, redis_url) -> None:
    world.redis = RedisSettings(url=redis_url, read_timeout_s=5)
    world.database_url = f"sqlite:///{world.root / 'shared.sqlite'}"
    landed = [events(random.Random(7)) for _ in range(2)]
    for table in landed:
        world.land("events", table)
    other = world.settings.model_copy(update={"state_dir": str(world.root / "other"), "definitions_poll_s": 0.1})
    async with world.serve() as first, running(await build(other), other) as address, open_channel(address) as channel:
        registry = make_registry(small_objects())
        await first.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))
        assert await read(first) == expected(landed)
        second = feature_pb2_grpc.FeatureServiceStub(channel)
        assert await until("the other replica answers", lambda: read(second)) == expected(landed)


@pytest.mark.redis
async def test_redis_goes_away_and_comes_back_empty(world, small_objects, make_registry, tmp_path) -> None:
    port = free_port()
    server = start_redis(tmp_path / "redis", port=port)
    world.redis = RedisSettings(url=f"redis://127.0.0.1:{port}", read_timeout_s=0.5)
    assert isinstance(world.settings.online_store, OnlineStoreSettings)
    rng = random.Random(6)
    try:
        async with world.serve() as stub:
            registry = make_registry(small_objects())
            await stub.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))
            landed = [events(rng) for _ in range(3)]
            for table in landed:
                await world.publish(world.land("events", table))

            async def right():
                return True if await read(stub) == expected(landed) else None

            await until("every record is there", right)
            server.kill()
            started = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read(stub)
            assert MillraceError.from_rpc(caught.value).reason == "ONLINE_STORE_UNAVAILABLE"
            assert time.monotonic() - started < 2
            landed.append(events(rng))
            fact = world.land("events", landed[-1])
            server = start_redis(tmp_path / "redis", port=port)
            wanted = expected(landed)
            # Never a wrong answer in between: empty windows would be one.
            seen: list[list[tuple[float, float]]] = []

            async def again():
                seen.append(await read(stub))
                return True if seen[-1] == wanted else None

            await until("values come from the lake", again)
            assert seen[:-1] == []
            await world.publish(fact)
            await world.publish(world.land("events", table := events(rng)))
            landed.append(table)
            await until("the stream goes on", right)
    finally:
        server.stop()
