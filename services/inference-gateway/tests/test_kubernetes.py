"""Servers followed from EndpointSlices of a real API server, through a real Envoy."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import models
import pytest
from api_server import ApiServer, api_server, own_address
from gateway import MODEL, Features, Gateway, Rollout, arm, eventually, free_ports, gateway, listens, peers, route
from load import infer, load
from millrace_inference_gateway.endpoints import SliceEndpoints
from millrace_inference_gateway.envoy_admin import EnvoyAdmin, EnvoyDownError
from millrace_inference_gateway.settings import KubernetesSettings
from millrace_inference_gateway.slice_watch import FAILURES, SliceWatch
from millrace_kit.clock import SystemClock
from test_server_version import Shared, both, split

__all__ = ["api_server"]
pytestmark = pytest.mark.kubernetes
SERVICE = "delay-1-0-0"


def route_of(service: str = SERVICE, *listed: str):
    made = route(arm("1.0.0", *listed))
    made.arms[0].service = f"default/{service}:8001"
    return made


async def in_envoy(g: Gateway, *addresses: str, timeout_s: float = 5) -> float:
    """Seconds until Envoy has exactly these healthy servers."""
    admin, started = EnvoyAdmin(g.settings.envoy_admin_listen), time.monotonic()
    found: set[str] = set()

    async def ask() -> bool:
        nonlocal found
        with contextlib.suppress(EnvoyDownError):
            servers = await admin.healthy_servers()
            found = {address for cluster, address in servers if cluster == f"arm/{MODEL}/1.0.0"}
        return found == set(addresses)

    try:
        await eventually(ask, "these servers", timeout_s)
    except AssertionError as error:
        raise AssertionError(f"Envoy has {found}, not {addresses}\n{g.logs()}") from error
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def pods(count: int) -> AsyncIterator[list[str]]:
    host = own_address()
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(models.serving(models.Model(f"1.0.0-{n}"), host=host)) for n in range(count)
        ]


async def test_pods_come_and_go_without_a_failed_call(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    async with gateway(kubernetes=api_server.settings) as (g, rollout), pods(3) as (one, two, three):
        await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
        await asyncio.to_thread(api_server.put, "s-other", three, service="delay-2-0-0")
        await rollout.in_force(rollout.set(route_of()))
        await in_envoy(g, one)
        took: list[float] = []
        async with load(g) as counts:
            for turn in range(5):
                await asyncio.to_thread(api_server.put, "s-two", two, service=SERVICE)
                took.append(await in_envoy(g, one, two))
                await asyncio.to_thread(
                    api_server.put, "s-three", three, service=SERVICE, ready=turn % 2 == 0, serving=turn % 2 == 0
                )
                await in_envoy(g, *((one, two, three) if turn % 2 == 0 else (one, two)))
                await asyncio.to_thread(
                    api_server.put, "s-two", two, service=SERVICE, ready=False, serving=True, terminating=True
                )
                took.append(await in_envoy(g, *((one, three) if turn % 2 == 0 else (one,))))
                await asyncio.to_thread(api_server.remove, "s-two")
                await asyncio.to_thread(api_server.remove, "s-three")
                await in_envoy(g, one)
            # The only one is exchanged in one step.
            await asyncio.to_thread(api_server.put, "s-one", two, service=SERVICE)
            took.append(await in_envoy(g, two))
            await counts.grow(100)
        assert counts.errors == []
        assert counts.done > 100
        print(f"slices to Envoy: median {sorted(took)[len(took) // 2] * 1000:.0f} ms, most {max(took) * 1000:.0f} ms")
        assert sorted(took)[len(took) // 2] < 1.0
        # Scaled to nothing: a clear error; and back.
        await asyncio.to_thread(
            api_server.put, "s-one", two, service=SERVICE, ready=False, serving=False, terminating=True
        )
        await in_envoy(g)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(g.public_channel, x_millrace_model=MODEL)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        async def counted() -> bool:
            figures = await g.figures()
            return figures is not None and [(v.version, v.errors) for v in figures.versions] == [("1.0.0", 1)]

        await eventually(counted, "the version's error in the figures")
        await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
        await eventually(lambda: answers(g), "an answer")


async def answers(g: Gateway) -> bool:
    try:
        return await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
    except grpc.aio.AioRpcError:
        return False


async def test_two_versions_in_the_pods_of_one_service(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    host = own_address()
    async with (
        gateway(kubernetes=api_server.settings) as (g, rollout),
        models.serving(Shared("both"), host=host) as one,
        models.serving(Shared("both"), host=host) as two,
    ):
        made = route(*both(one, 30))
        for each in made.arms:
            each.service = f"default/{SERVICE}:8001"
        await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
        await rollout.in_force(rollout.set(made))
        await in_envoy(g, one)
        found = await split(g, grpc.Compression.NoCompression)
        assert 15 <= found["1.1.0"] <= 60
        # Another pod is ready: it takes stable's calls at once, the candidate's when the route says that it holds it.
        await asyncio.to_thread(api_server.put, "s-two", two, service=SERVICE)
        await in_envoy(g, one, two)
        admin = EnvoyAdmin(g.settings.envoy_admin_listen)
        assert {place for name, place in await admin.healthy_servers() if name == f"arm/{MODEL}/1.1.0"} == {one}
        assert (await split(g, grpc.Compression.NoCompression)).keys() == {"1.0.0", "1.1.0"}


async def test_the_api_server_goes_away_and_comes_back(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    port = free_ports(1)[0]
    host = own_address()
    command = [sys.executable, str(Path(models.__file__)), str(port), "1.0.0", "0", "0.0.0.0"]
    dies = subprocess.Popen(command)
    try:
        async with gateway(kubernetes=api_server.settings) as (g, rollout), pods(2) as (one, two):
            await eventually(lambda: asyncio.to_thread(listens, port), "the pod", 30)
            await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
            await asyncio.to_thread(api_server.put, "s-dies", f"{host}:{port}", service=SERVICE)
            await rollout.in_force(rollout.set(route_of()))
            await in_envoy(g, one, f"{host}:{port}")
            async with load(g) as counts:
                await counts.grow(50)
                await asyncio.to_thread(api_server.kill)
                await counts.grow(100)
                # A pod dies while nobody says so.
                dies.kill()
                dies.wait()
                await counts.grow(200)
                # A rollout goes on in the meantime.
                await rollout.in_force(rollout.set(route_of()))
                await asyncio.to_thread(api_server.start)
                await asyncio.to_thread(api_server.put, "s-dies", two, service=SERVICE)
                await in_envoy(g, one, two, timeout_s=15)
                await counts.grow(50)
            assert counts.errors == []
    finally:
        dies.kill()
        dies.wait()


async def test_a_gateway_starts_while_api_server_and_controller_are_away(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        g, rollout = Gateway(Path(folder), kubernetes=api_server.settings), Rollout()
        try:
            async with pods(2) as (one, two):
                async with peers(rollout, Features(), g.peer_ports):
                    g.start_python()
                    g.start_envoy()
                    await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
                    # The controller's list is of no use; the slices lead.
                    generation = rollout.set(route_of(SERVICE, "192.0.2.250:9"))
                    await rollout.in_force(generation)
                    await in_envoy(g, one)
                    await asyncio.to_thread(api_server.put, "s-one", two, service=SERVICE)
                    await in_envoy(g, two)
                await asyncio.to_thread(api_server.kill)
                g.kill_python()
                g.kill_envoy()
                for path in (Path(folder) / "envoy").glob("**/*.json"):
                    path.unlink()
                g.start_python()
                g.start_envoy()
                await g.generation(generation)
                await in_envoy(g, two)
                await eventually(lambda: answers(g), "an answer")
                await asyncio.to_thread(api_server.start)
                await asyncio.to_thread(api_server.put, "s-one", one, service=SERVICE)
                await in_envoy(g, one, timeout_s=15)
        except BaseException:
            print(g.logs())
            raise
        finally:
            await g.close()
            await asyncio.to_thread(api_server.start)


async def test_changes_that_are_gone_are_listed_again(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    settings = KubernetesSettings.model_validate(api_server.settings | {"watch_s": 1, "backoff_s": 0.05})
    source, stop = SliceEndpoints("default"), asyncio.Event()
    watch = SliceWatch(settings, source, SystemClock())
    # As after a restart of the API server, whose memory of changes starts anew: 410 Gone.
    watch._version = "1"
    await asyncio.to_thread(api_server.put, "s-one", "198.51.100.9:8001", service=SERVICE)
    task = asyncio.create_task(watch.run(stop))

    def known() -> list[str]:
        return sorted(address for pods in source._rotation.values() for address, _ports in pods)

    async def has(*addresses: str) -> None:
        await eventually(lambda: asyncio.sleep(0, known() == list(addresses)), f"{addresses}, not {known()}")

    await has("198.51.100.9")
    assert source.synced
    # Watches end each second; nothing is missed between them.
    for number in range(30):
        await asyncio.to_thread(api_server.put, "s-one", f"198.51.100.{number + 10}:8001", service=SERVICE)
        await has(f"198.51.100.{number + 10}")
    # A token that no longer counts: what is known stays.
    failures = FAILURES._value.get()
    api_server.token_file.write_text("wrong")
    await eventually(lambda: asyncio.sleep(0, FAILURES._value.get() > failures), "a refusal")
    assert known() == ["198.51.100.39"]
    api_server.token_file.write_text("millrace-test-admin")
    await asyncio.to_thread(api_server.put, "s-one", "198.51.100.50:8001", service=SERVICE)
    await has("198.51.100.50")
    stop.set()
    await task


async def test_servers_of_the_own_zone_come_first(api_server: ApiServer) -> None:
    await asyncio.to_thread(api_server.clear)
    host = own_address()
    servers = [models.Model(f"1.0.0-{n}") for n in range(3)]
    async with (
        gateway(kubernetes={**api_server.settings, "prefer_own_zone": True}) as (g, rollout),
        models.serving(servers[2], host=host) as far,
    ):
        (near, one), (also_near, two) = [await models.start(model, host=host) for model in servers[:2]]
        own = "192.168.7.7:7405"
        await asyncio.to_thread(api_server.put, "s-own", own, service="gateway", zone="a", pod=g.settings.gateway_id)
        for name, address, zone in (("s-one", one, "a"), ("s-two", two, "a"), ("s-far", far, "b")):
            await asyncio.to_thread(api_server.put, name, address, service=SERVICE, zone=zone, pod=name)
        await rollout.in_force(rollout.set(route_of()))
        await in_envoy(g, one, two, far)

        async def called(calls: int = 60) -> list[int]:
            before = [model.calls for model in servers]
            for _ in range(calls):
                await infer(g.public_channel, x_millrace_model=MODEL)
            return [model.calls - count for model, count in zip(servers, before, strict=True)]

        first, second, other = await called()
        assert min(first, second) > 0
        assert other == 0
        # Half of the own zone is gone, as far as the API server knows: it has less than its share, and the others help.
        await asyncio.to_thread(api_server.put, "s-two", two, service=SERVICE, zone="b", pod="s-two")
        await eventually(lambda: _all_called(called), "calls for every server")
        await asyncio.to_thread(api_server.put, "s-two", two, service=SERVICE, zone="a", pod="s-two")

        async def alone() -> bool:
            return (await called(20))[2] == 0

        await eventually(alone, "the own zone alone again")
        # All of the zone dies, and nobody has said so yet: no call fails but those that a server itself gave up.
        async with load(g) as counts:
            await counts.grow(20)
            await asyncio.gather(near.stop(1), also_near.stop(1))
            await counts.grow(40)
            await eventually(lambda: _far_only(called), "calls for the other zone")
        assert [error for error in counts.errors if error.code() is not grpc.StatusCode.CANCELLED] == []


async def _all_called(called) -> bool:
    return min(await called()) > 0


async def _far_only(called) -> bool:
    return (await called(10))[2] > 0
