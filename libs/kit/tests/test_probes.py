"""What a kubelet sees: the process's HTTP endpoint tells the same story as gRPC health, from the first to the last moment."""

import asyncio
import http.client
import time

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.probes import STUCK_AFTER_S, Probes, serve_probes
from millrace_kit.server import Service, Worker, running
from millrace_kit.settings import ServiceSettings

DEADLINE_S = 10.0


def get(address: str, path: str) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def grpc_status(address: str) -> int:
    async with open_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        return int(answer.status)


async def until_readyz(address: str, status: int) -> str:
    end = time.monotonic() + DEADLINE_S
    while True:
        found, text = await asyncio.to_thread(get, address, "/readyz")
        if found == status:
            return text
        assert time.monotonic() < end, f"/readyz stays {found}"
        await asyncio.sleep(0.02)


def test_before_the_first_word_a_process_is_alive_and_not_ready() -> None:
    address = serve_probes("127.0.0.1:0", Probes())
    assert get(address, "/livez") == (200, "ok\n")
    assert get(address, "/readyz") == (503, "starting\n")
    assert get(address, "/nothing")[0] == 404


def test_metrics_stay_where_they_were() -> None:
    address = serve_probes("127.0.0.1:0", Probes())
    status, text = get(address, "/metrics")
    assert status == 200
    assert "millrace_rpc_server_duration_seconds" in text


def test_an_event_loop_that_does_not_turn_is_not_alive() -> None:
    now = [0.0]
    probes = Probes(monotonic=lambda: now[0])
    address = serve_probes("127.0.0.1:0", probes)
    now[0] = 10 * STUCK_AFTER_S  # however long start-up takes
    assert get(address, "/livez")[0] == 200
    probes.beat()
    now[0] += STUCK_AFTER_S - 1
    assert get(address, "/livez")[0] == 200
    now[0] += 1
    assert get(address, "/livez") == (503, "stuck for 60 s\n")


async def test_ready_follows_the_service_on_both_ways() -> None:
    probes, says = Probes(), [False]
    http_address = serve_probes("127.0.0.1:0", probes)
    service = Service("test", grpc_services=["a.B"], ready=lambda: says[0])
    async with running(service, ServiceSettings(drain_s=0), probes) as address:
        assert "not ready" in await until_readyz(http_address, 503)
        assert await grpc_status(address) == health_pb2.HealthCheckResponse.NOT_SERVING
        says[0] = True
        await until_readyz(http_address, 200)
        assert await grpc_status(address) == health_pb2.HealthCheckResponse.SERVING
        says[0] = False
        await until_readyz(http_address, 503)
        assert await grpc_status(address) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_service_that_cannot_say_is_not_ready() -> None:
    def broken() -> bool:
        raise ValueError

    probes = Probes()
    async with running(Service("test", ready=broken), ServiceSettings(drain_s=0), probes):
        assert probes.why_not_ready
    probes = Probes()
    async with running(Service("test"), ServiceSettings(drain_s=0), probes):
        assert not probes.why_not_ready


async def test_draining_says_no_while_calls_are_still_answered() -> None:
    probes, http_seen, grpc_seen = Probes(), asyncio.Event(), asyncio.Event()
    http_address = serve_probes("127.0.0.1:0", probes)

    async def wait(stop: asyncio.Event) -> None:
        await stop.wait()

    async def watch(address: str) -> None:
        assert await until_readyz(http_address, 503) == "draining\n"
        http_seen.set()
        assert await grpc_status(address) == health_pb2.HealthCheckResponse.NOT_SERVING  # a new connection still works
        grpc_seen.set()

    async with running(
        Service("test", workers=[Worker("w", wait)]), ServiceSettings(drain_s=0, shutdown_delay_s=1), probes
    ) as address:
        await until_readyz(http_address, 200)
        watching = asyncio.create_task(watch(address))
    await watching
    assert http_seen.is_set()
    assert grpc_seen.is_set()
    assert get(http_address, "/readyz") == (503, "draining\n")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
def test_the_bound_address_keeps_the_host(listen: str) -> None:
    address = serve_probes(listen, Probes())
    assert address.startswith(listen.rpartition(":")[0])
    assert not address.endswith(":0")
