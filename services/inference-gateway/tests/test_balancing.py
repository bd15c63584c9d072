"""What each kind of balancing, hedging and limit does, with the real Envoy before small model servers."""

import asyncio
import contextlib
import time
from collections import Counter

import grpc
import models
from gateway import MODEL, arm, eventually, gateway, route
from load import INFER, infer, infer_request
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.envoy_admin import EnvoyAdmin
from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.routes import Arm, Endpoint
from tritonclient.grpc import service_pb2


@contextlib.asynccontextmanager
async def servers(*delays_s: float):
    """Servers of one version; each says its number behind the version's name."""
    async with contextlib.AsyncExitStack() as stack:
        made = [models.Model(f"1.0.0-{n}", delay_s=delay) for n, delay in enumerate(delays_s)]
        yield made, [await stack.enter_async_context(models.serving(model)) for model in made]


async def all_healthy(g, addresses) -> None:
    """Envoy sends to a server after its first health check."""
    admin = EnvoyAdmin(g.settings.envoy_admin_listen)

    async def healthy() -> bool:
        return {a for c, a in await admin.healthy_servers() if c.startswith("arm/")} == set(addresses)

    await eventually(healthy, "all servers in the rotation")


async def answered_by(g, **metadata: str) -> str:
    call = g.public_channel.unary_unary(
        INFER,
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    named = [("x-millrace-model", MODEL), *((k.replace("_", "-"), v) for k, v in metadata.items())]
    return (await call(infer_request(), metadata=named, timeout=10)).model_version


async def test_round_robin_takes_turns() -> None:
    async with gateway() as (g, rollout), servers(0, 0, 0) as (_, addresses):
        made = route(arm("1.0.0", *addresses), balancing=rollout_pb2.BALANCING_ROUND_ROBIN)
        await rollout.in_force(rollout.set(made))
        await all_healthy(g, addresses)
        counts = Counter([await answered_by(g) for _ in range(60)])
        assert sorted(counts.values()) == [20, 20, 20]


async def test_least_request_spares_the_busy() -> None:
    async with gateway() as (g, rollout), servers(1.0, 0, 0) as (_, addresses):
        await rollout.in_force(rollout.set(route(arm("1.0.0", *addresses))))
        await all_healthy(g, addresses)

        async def caller() -> list[str]:
            return [await answered_by(g) for _ in range(30)]

        counts = Counter(v for found in await asyncio.gather(*(caller() for _ in range(6))) for v in found)
        assert counts["1.0.0-0"] < 180 / 3 / 2


async def test_response_time_gives_the_faster_more() -> None:
    async with gateway() as (g, rollout), servers(0.05, 0) as (_, addresses):
        made = route(arm("1.0.0", *addresses), balancing=rollout_pb2.BALANCING_RESPONSE_TIME)
        await rollout.in_force(rollout.set(made))
        await all_healthy(g, addresses)

        async def mostly_fast() -> bool:
            # One at a time: what is under way tells nothing, latency alone does.
            counts = Counter([await answered_by(g) for _ in range(40)])
            return counts["1.0.0-1"] >= 34

        await eventually(mostly_fast, "most calls at the faster server", 60)


def test_weights_of_latency() -> None:
    told = []
    weights = LatencyWeights()
    weights.on_changed(lambda: told.append(1))
    fast, slow, new = (Endpoint("127.0.0.1", port) for port in (1001, 1002, 1003))
    one = Arm("m", "1.0.0", "", False, 10_000, (fast, slow, new))

    def second(slow_ms: float | None) -> list[int]:
        weights.record((one.cluster, "127.0.0.1", 1001), 10)
        if slow_ms is not None:
            weights.record((one.cluster, "127.0.0.1", 1002), slow_ms)
        weights.tick()
        return [each.weight for each in weights.weighted(one).endpoints]

    assert second(40) == [100, 25, 100]
    assert len(told) == 1
    assert second(41) == [100, 25, 100]
    assert len(told) == 1, "noise is not told"
    assert second(10_000)[1] == 5, "never so little that nobody would see it recover"
    for _ in range(100):
        found = second(None)
    assert found[1] == 100, "a server without calls is trusted again"


async def test_consistent_hash_keeps_a_key_on_its_server() -> None:
    async with gateway() as (g, rollout), servers(0, 0, 0) as (_, addresses):
        made = route(arm("1.0.0", *addresses), balancing=rollout_pb2.BALANCING_CONSISTENT_HASH)
        await rollout.in_force(rollout.set(made))
        await all_healthy(g, addresses)
        keys = [f"key-{n}" for n in range(60)]
        before = {key: await answered_by(g, x_user=key) for key in keys}
        assert {key: await answered_by(g, x_user=key) for key in keys} == before
        counts = Counter(before.values())
        assert len(counts) == 3
        assert min(counts.values()) >= 8
        fewer = route(arm("1.0.0", *addresses[:2]), balancing=rollout_pb2.BALANCING_CONSISTENT_HASH)
        await rollout.in_force(rollout.set(fewer))
        await all_healthy(g, addresses[:2])
        after = {key: await answered_by(g, x_user=key) for key in keys}
        moved = [key for key in keys if before[key] != "1.0.0-2" and before[key] != after[key]]
        assert len(moved) <= 3, "others than the keys of the server that went moved"


async def test_hedging_answers_from_another_server() -> None:
    async with gateway() as (g, rollout), servers(3, 0) as (made, addresses):
        hedged = route(arm("1.0.0", *addresses), hedge_after_ms=100, timeout_ms=10_000)
        await rollout.in_force(rollout.set(hedged))
        await all_healthy(g, addresses)
        started = time.monotonic()
        found = Counter([await answered_by(g) for _ in range(20)])
        assert found == {"1.0.0-1": 20}
        assert made[0].calls > 0, "nothing was late"
        assert time.monotonic() - started < 3 * made[0].calls


async def test_a_server_that_joins_starts_slowly() -> None:
    window_s = 4.0
    async with gateway(envoy={"slow_start_s": window_s}) as (g, rollout), servers(0, 0) as (_, addresses):
        balancing = rollout_pb2.BALANCING_ROUND_ROBIN
        await rollout.in_force(rollout.set(route(arm("1.0.0", addresses[0]), balancing=balancing)))
        await all_healthy(g, addresses[:1])
        known = time.monotonic()
        await eventually(
            lambda: asyncio.sleep(0, time.monotonic() > known + window_s), "the first server's window over"
        )
        await rollout.in_force(rollout.set(route(arm("1.0.0", *addresses), balancing=balancing)))
        await all_healthy(g, addresses)
        first = Counter([await answered_by(g) for _ in range(20)])
        assert first["1.0.0-1"] <= 7

        async def full_share() -> bool:
            return Counter([await answered_by(g) for _ in range(20)])["1.0.0-1"] >= 9

        await eventually(full_share, "the whole share after the window")


async def test_limits_of_requests_and_of_those_that_wait() -> None:
    limits = {"max_requests": 2, "max_pending_requests": 1, "max_retries": 0}
    async with gateway(envoy=limits) as (g, rollout), servers(0.5) as (_, addresses):
        await rollout.in_force(rollout.set(route(arm("1.0.0", *addresses))))

        async def code() -> grpc.StatusCode:
            try:
                await infer(g.public_channel, x_millrace_model=MODEL)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        # With the connection up calls run at once, and do not all wait for it.
        assert await code() is grpc.StatusCode.OK
        codes = Counter(await asyncio.gather(*(code() for _ in range(12))))
        assert codes.keys() == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert 2 <= codes[grpc.StatusCode.OK] <= 4
        assert await code() is grpc.StatusCode.OK
