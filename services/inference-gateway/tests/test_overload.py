"""More calls than a version takes: its limit is found, low priority goes first, everybody is told when to come again, and no figure suffers."""

import asyncio
import contextlib
import urllib.request
from collections import Counter
from pathlib import Path

import grpc
import models
import pytest
from gateway import MODEL, arm, eventually, free_port, gateway, route
from google.rpc import error_details_pb2, status_pb2
from load import INFER, infer, infer_request
from millrace_inference_gateway.concurrency_limits import VersionLimit, Window
from millrace_inference_gateway.settings import AdaptiveSettings
from tritonclient.grpc import service_pb2

OK, UNAVAILABLE, EXHAUSTED = (
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
SLOTS, DELAY_S = 4, 0.03


class Callers:
    """Callers of one priority who call again as soon as they are answered, a little later when they are turned away."""

    def __init__(self, g, count: int, **metadata: str) -> None:
        self.codes: Counter[grpc.StatusCode] = Counter()
        self._tasks = [asyncio.create_task(self._call(g, metadata)) for _ in range(count)]

    async def _call(self, g, metadata: dict[str, str]) -> None:
        while True:
            try:
                await infer(g.public_channel, x_millrace_model=MODEL, timeout_s=20, **metadata)
            except grpc.aio.AioRpcError as error:
                self.codes[error.code()] += 1
                await asyncio.sleep(0.02)
            else:
                self.codes[OK] += 1

    def forget(self) -> None:
        self.codes.clear()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def calling(g, count: int, **metadata: str):
    callers = Callers(g, count, **metadata)
    try:
        yield callers
    finally:
        await callers.end()


async def metrics(port: int) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()

    lines = (await asyncio.to_thread(read)).splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def refused(reason: str, priority: str = "normal", model: str = MODEL) -> str:
    return f'millrace_gateway_refused_total{{model="{model}",priority="{priority}",reason="{reason}"}}'


async def test_a_version_gets_no_more_than_it_takes() -> None:
    port = free_port()
    adaptive = {"step_s": 0.2, "min_samples": 10, "measure_s": 60}
    async with (
        gateway(envoy={"adaptive": adaptive}, telemetry={"metrics_listen": f"127.0.0.1:{port}"}) as (g, rollout),
        models.serving(model := models.Model("1.0.0", delay_s=DELAY_S)) as address,
    ):
        model.slots = asyncio.Semaphore(SLOTS)
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=20_000)))
        limit = f'millrace_gateway_concurrency_limit{{model="{MODEL}",priority="normal",version="1.0.0"}}'

        async def found() -> float:
            return (await metrics(port)).get(limit, 0.0)

        async def shrunk() -> bool:
            return 0 < await found() <= 6 * SLOTS

        # First it is learned what an answer takes while nobody waits.
        async with calling(g, 2) as few:
            await eventually(lambda: asyncio.sleep(0, few.codes[OK] > 40), "some answers")
            assert set(few.codes) == {OK}
        async with calling(g, 48) as normal, calling(g, 8, x_millrace_priority="low") as low:
            await eventually(shrunk, "a limit near what the version takes")
            # Those that came before wait for their turn.
            await eventually(lambda: asyncio.sleep(0, model.now <= 6 * SLOTS), "the crowd at the servers gone")
            model.most_at_once = 0
            normal.forget()
            low.forget()
            await eventually(lambda: asyncio.sleep(0, normal.codes[OK] > 200), "answers under overload")
            # Without a limit all 56 would be there.
            assert model.most_at_once <= 10 * SLOTS
            assert normal.codes.keys() == {OK, UNAVAILABLE}
            assert low.codes[OK] / 8 < normal.codes[OK] / 48
            assert low.codes[OK] < 0.25 * low.codes.total()
            # Other routes take nothing of what was learned.
            await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=15_000)))
            model.most_at_once = 0
            normal.forget()
            await eventually(lambda: asyncio.sleep(0, normal.codes[OK] > 60), "answers under the new routes")
            assert model.most_at_once <= 10 * SLOTS
        counts = await metrics(port)
        assert counts[refused("version_full")] > 0
        assert counts[refused("version_full", "low")] > 0
        # Evidence is what model servers answered.
        versions = (await g.figures()).versions
        assert [v.errors for v in versions] == [0] * len(versions)
        assert sum(v.requests for v in versions) <= model.calls + 56
        # When the crowd has gone, everybody is welcome.
        async with calling(g, 4, x_millrace_priority="low") as low:
            await eventually(lambda: asyncio.sleep(0, low.codes[OK] > 20), "low priority served again")


async def test_who_is_turned_away_is_told_when_to_come_again(tmp_path: Path) -> None:
    port = free_port()
    limits = {"max_requests": 8, "max_retries": 0, "retry_after_s": 2.5}
    async with (
        gateway(envoy=limits, telemetry={"metrics_listen": f"127.0.0.1:{port}"}) as (g, rollout),
        models.serving(model := models.Model("1.0.0", delay_s=1.0)) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=20_000)))
        waiting = [asyncio.create_task(infer(g.public_channel, x_millrace_model=MODEL)) for _ in range(8)]
        await eventually(lambda: asyncio.sleep(0, model.now == 8), "calls under way")
        call = g.public_channel.unary_unary(
            INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )(infer_request(), metadata=[("x-millrace-model", MODEL), ("x-millrace-priority", "normal")], timeout=5)
        assert await call.code() is UNAVAILABLE
        assert await call.details() == (
            f"model {MODEL}: has as many requests under way as it can take now; try again in 2.5 s"
        )
        trailers = dict(await call.trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "2500"
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(retry)
        assert (info.reason, info.domain, retry.retry_delay.ToMilliseconds()) == ("OVERLOADED", "millrace.dev", 2500)
        # Predict says the same of its model call.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predict("flight", a=1.0)
        assert caught.value.code() is UNAVAILABLE
        assert "as many requests under way" in caught.value.details()
        assert await asyncio.gather(*waiting) == ["1.0.0"] * 8

        async def counted() -> bool:
            return (await metrics(port)).get(refused("version_full"), 0) == 2

        await eventually(counted, "both refusals counted")

        async def evidence() -> bool:
            return [(v.requests, v.errors) for v in (await g.figures()).versions] == [(8, 0)]

        await eventually(evidence, "the eight that a server answered, and no more")


async def test_a_gateway_without_memory_says_so() -> None:
    port, stats = free_port(), free_port()
    more = {"telemetry": {"metrics_listen": f"127.0.0.1:{port}"}, "stats_listen": f"127.0.0.1:{stats}"}
    async with (
        gateway(envoy={"max_memory_mib": 1}, **more) as (g, rollout),
        models.serving(models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))

        async def full() -> grpc.aio.AioRpcError | None:
            try:
                await infer(g.public_channel, x_millrace_model=MODEL)
            except grpc.aio.AioRpcError as error:
                return error
            return None

        assert (await eventually(full, "a refusal")).code() is UNAVAILABLE

        async def counted() -> bool:
            return (await metrics(port)).get(refused("gateway_full"), 0) >= 1

        await eventually(counted, "refusals counted")
        # The kubelet sees that it lives.
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{stats}/ready", None, 5) as answer:
            assert answer.status == 200


def fed(
    rule: VersionLimit, slots: int, callers: int, steps: int, start: float = 0.0, *, base_ms: float = 20.0
) -> float:
    """Latency in the end of callers who call again at once, at servers that work on `slots` requests at once."""
    now, latency_ms, limit = start, base_ms, round(rule.limit) or rule.most
    for _ in range(steps):
        allowed = min(callers, limit)
        latency_ms = base_ms * max(1.0, allowed / slots)
        window = Window(now, [latency_ms] * 50, normal_ms=allowed * 1000.0)
        now += 1.0
        limit = rule.step(window, now).normal
    return latency_ms


def test_the_rule_finds_what_servers_take() -> None:
    settings = AdaptiveSettings(measure_s=100)
    rule = VersionLimit(settings, 4096, 0.25)
    # Few callers, no waiting: nothing is limited.
    fed(rule, 8, 4, 20)
    assert rule.limit == 4096
    assert fed(rule, 8, 500, 30, 20.0) < 20 * 3.5
    small = rule.limit
    assert 8 <= small < 40
    # More servers: the limit follows.
    fed(rule, 80, 500, 60, 50.0)
    assert rule.limit > 5 * small
    # It does not creep up though the latency without waiting is measured anew again and again.
    fed(rule, 8, 500, 3000, 110.0)
    assert rule.limit < 60


def test_low_priority_has_what_is_left() -> None:
    rule = VersionLimit(AdaptiveSettings(baseline_ms=10), 100, 0.25)
    assert rule.step(Window(0.0, [5.0] * 30, normal_ms=10_000), 1.0).low == 25
    assert rule.step(Window(1.0, [5.0] * 30, normal_ms=80_000), 2.0).low == 12
    full = rule.step(Window(2.0, [30.0] * 30, normal_ms=100_000), 3.0)
    assert (full.normal, full.low) == (75, 0)
