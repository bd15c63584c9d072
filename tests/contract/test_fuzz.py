"""Random bytes and random messages to every method of every service: each gets a proper status, and the service stays up.

The methods are found by reflection, so a new service or method is covered without a word here. Failures print the bytes to send again.
"""

import asyncio
import importlib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.server import Service, running
from millrace_kit.settings import ServiceSettings, parse_settings
from parts.server import free_port

from .messages import Messages

MESSAGES = 60
BYTES = 20
SEEDS = (1, 2)
CALL_S = 15.0
# Watches do not end by themselves: they are read this long.
STREAM_S = 0.3
FORBIDDEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
MACHINERY = ("grpc.health.", "grpc.reflection.")
NOWHERE = "127.0.0.1:1"
# Services without a gRPC server of their own.
HTTP_ONLY = {"millrace_console.app"}


def services() -> Sequence[str]:
    """Modules `millrace_<service>.app` of the installed services."""
    commands = entry_points(group="console_scripts")
    modules = {e.module for e in commands if e.name.startswith("millrace-") and e.module.endswith(".app")}
    return sorted(modules - HTTP_ONLY)


@dataclass(frozen=True)
class Failure:
    method: str
    status: str
    details: str
    sent: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.method} answered {self.status} ({self.details}) to {[s.hex() for s in self.sent]}"


async def wired(module: str, folder: Path) -> tuple[Service, Any]:
    """The service as its own `build` makes it, with state in `folder` and peers that are not there."""
    app = importlib.import_module(module)
    kind = typing.get_type_hints(app.build)["settings"]
    fields: dict[str, object] = {
        "listen": "127.0.0.1:0", "state_dir": str(folder / "state"), "drain_s": 0, "bus": {"path": str(folder / "bus.sqlite")},
    }  # fmt: skip
    fields |= {name: NOWHERE for name in kind.model_fields if name.endswith("_address")}
    fields |= {name: f"127.0.0.1:{free_port()}" for name in kind.model_fields if name.endswith("_listen")}
    fields |= {name: [] for name in kind.model_fields if name.endswith("_addresses")}
    known = {name: value for name, value in fields.items() if name in kind.model_fields}
    settings = parse_settings(kind, known, "fuzz")
    return await app.build(settings), settings


def methods(address: str) -> Sequence[MethodDescriptor]:
    """Every method of every service behind `address`, by reflection."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        names = [name for name in database.get_services() if not name.startswith(MACHINERY)]
        return [method for name in names for method in pool.FindServiceByName(name).methods]


def send(channel: grpc.Channel, method: MethodDescriptor, requests: Sequence[bytes]) -> Failure | None:
    """Send raw requests; a failure when the status is one no client should ever see."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    timeout_s = STREAM_S if method.server_streaming else CALL_S
    try:
        answer = getattr(channel, kind)(path)(
            iter(requests) if method.client_streaming else requests[0], timeout=timeout_s
        )
        if method.server_streaming:
            for _part in answer:
                pass
    except grpc.RpcError as error:
        ran_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not method.server_streaming
        if error.code() in FORBIDDEN or ran_out:
            return Failure(path, error.code().name, error.details() or "", tuple(requests))
    return None


def attack(address: str, found: Sequence[MethodDescriptor], seed: int) -> Sequence[Failure]:
    """Every attempt on every method. Blocking calls: the asynchronous client reports a write that came after the server's status as an
    error of its own.
    """
    with grpc.insecure_channel(address) as channel:
        tries = (send(channel, method, requests) for method in found for requests in attempts(method, seed))
        return [failure for failure in tries if failure is not None]


def attempts(method: MethodDescriptor, seed: int) -> Iterator[Sequence[bytes]]:
    """What is sent to one method."""
    make = Messages(seed)
    count = 3 if method.client_streaming else 1
    for _ in range(MESSAGES):
        whole = [make.message(method.input_type).SerializeToString() for _ in range(count)]
        yield whole
        if whole[0] and make.random.random() < 0.3:  # a good message with one wrong byte
            damaged = bytearray(whole[0])
            damaged[make.random.randrange(len(damaged))] ^= 1 << make.random.randrange(8)
            yield [bytes(damaged), *whole[1:]]
    for _ in range(BYTES):
        yield [make.bytes() for _ in range(count)]
    if method.client_streaming:
        yield []


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("module", services())
async def test_random_requests(module: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # defaults with relative paths stay in here
    service, settings = await wired(module, tmp_path)
    # A worker that a request ended would raise here, at the end of the block.
    async with running(service, settings) as address:
        # The gateway is not ready without its Envoy, and answers all the same; what is sent to a service changes neither.
        ready = service.ready is None or service.ready()
        expected = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        found = await asyncio.to_thread(methods, address)
        assert {m.containing_service.full_name for m in found} == set(service.grpc_services)
        failures = await asyncio.to_thread(attack, address, found, seed)
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in service.grpc_services:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                assert answer.status == expected
    assert not failures, "\n".join(str(failure)[:2000] for failure in failures[:10])


async def test_a_service_that_breaks_is_noticed() -> None:
    class Broken(registry_pb2_grpc.RegistryServiceServicer):
        async def GetModel(self, request, context):
            if not request.name:
                raise RuntimeError("broken")
            return registry_pb2.GetModelResponse()

    service = Service(
        "broken",
        [lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(Broken(), server)],
        ["millrace_api.registry.v1.RegistryService"],
    )
    async with running(service, ServiceSettings(drain_s=0)) as address:
        found = await asyncio.to_thread(methods, address)
        failures = await asyncio.to_thread(attack, address, found, 1)
    assert {failure.status for failure in failures} == {"INTERNAL"}
    assert {failure.method for failure in failures} == {"/millrace_api.registry.v1.RegistryService/GetModel"}
