"""The online store on a real Redis that takes TLS alone and asks for a password."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pyarrow as pa
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_feature.settings import RedisSettings
from millrace_kit.clock import FakeClock
from millrace_kit.errors import MillraceError
from parts.certificates import Authority, write
from parts.redis import start_redis

pytestmark = pytest.mark.redis
BASE = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
PASSWORD = "correct horse/battery"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSettings]:
    folder = tmp_path_factory.mktemp("redis")
    tls = write(folder / "certificate", Authority.new(), "localhost")
    server = start_redis(folder / "server", tls=tls, password=PASSWORD)
    yield RedisSettings(url=f"{server.address}/0", password=PASSWORD, ca_file=tls.ca_file, read_timeout_s=5)
    server.stop()


def rows(amount: int) -> pa.Table:
    return pa.table(
        {
            "user": ["a"], "shop": pa.array([1], pa.int64()), "amount": pa.array([amount], pa.int64()), "note": ["n"],
            "at": pa.array([BASE - timedelta(minutes=amount)], pa.timestamp("us", "UTC")),
        }
    )  # fmt: skip


def asked() -> pb.GetOnlineFeaturesRequest:
    at = Timestamp()
    at.FromDatetime(BASE)
    values = {
        "user": Value(string_value="a"), "shop": Value(int64_value=1), "limit": Value(double_value=9),
        "asked_at": Value(timestamp_value=at),
    }  # fmt: skip
    return pb.GetOnlineFeaturesRequest(feature_service="main", rows=[pb.EntityRow(values=values)], event_time=at)


async def test_values_are_written_and_read_over_tls(
    world, secured, small_objects, make_registry, wait_for_records
) -> None:
    world.redis = secured
    fact = world.land("events", rows(7))
    async with world.serve(FakeClock(BASE)) as stub:
        await stub.ApplyDefinitions(
            pb.ApplyDefinitionsRequest(project="test", feast_registry=make_registry(small_objects()))
        )
        await world.publish(fact, world.land("events", rows(12)))
        await wait_for_records(stub, events=2)
        answer = await stub.GetOnlineFeatures(asked())
        found = dict(zip(answer.feature_names, answer.vectors[0].values, strict=True))
        assert (found["by_user__amount_count_60m"], found["newest__amount"]) == (2, 7)


@pytest.mark.parametrize("wrong", ["password", "authority", "plain text"])
async def test_what_is_not_proved_is_unavailable(world, secured: RedisSettings, wrong: str, tmp_path: Path) -> None:
    if wrong == "password":
        world.redis = secured.model_copy(update={"password": "wrong"})
    elif wrong == "authority":
        other = write(tmp_path / "other", Authority.new("another"), "localhost")
        world.redis = secured.model_copy(update={"ca_file": other.ca_file})
    else:
        world.redis = secured.model_copy(update={"url": secured.url.replace("rediss:", "redis:")})
    world.land("events", rows(7))
    async with world.serve(FakeClock(BASE)) as stub, asyncio.timeout(60):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetProgress(pb.GetProgressRequest())
        error = MillraceError.from_rpc(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ONLINE_STORE_UNAVAILABLE")
        assert PASSWORD not in error.message
