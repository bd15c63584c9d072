"""Random bytes and random messages to every method of every service: each gets a proper status, and the service stays up.

The methods are found by reflection, so a new service or method is covered without a word here. Failures print the bytes to send again.
"""

import asyncio
import importlib
import typing
from collections.abc import AsyncIterator, Iterator, Sequence
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
from millrace_kit.server import Service, running
from millrace_kit.settings import parse_settings

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


def services() -> Sequence[str]:
    """Modules `millrace_<service>.app` of the installed services."""
    commands = entry_points(group="console_scripts")
    return sorted(e.module for e in commands if e.name.startswith("millrace-") and e.module.endswith(".app"))


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
    if not hasattr(app, "build"):
        pytest.skip(f"{module} serves no gRPC")
    kind = typing.get_type_hints(app.build)["settings"]
    fields: dict[str, object] = {
        "listen": "127.0.0.1:0", "state_dir": str(folder / "state"), "drain_s": 0, "bus": {"path": str(folder / "bus.sqlite")},
    }  # fmt: skip
    fields |= {name: NOWHERE for name in kind.model_fields if name.endswith("_address")}
    fields |= {name: "127.0.0.1:0" for name in kind.model_fields if name.endswith("_listen")}
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


async def send(channel: grpc.aio.Channel, method: MethodDescriptor, requests: Sequence[bytes]) -> Failure | None:
    """Send raw requests; a failure when the status is one no client should ever see."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    timeout_s = STREAM_S if method.server_streaming else CALL_S

    async def several() -> AsyncIterator[bytes]:
        for request in requests:
            yield request

    call = getattr(channel, kind)(path)(several() if method.client_streaming else requests[0], timeout=timeout_s)
    try:
        if method.server_streaming:
            async for _answer in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        ran_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not method.server_streaming
        if error.code() in FORBIDDEN or ran_out:
            return Failure(path, error.code().name, error.details() or "", tuple(requests))
    return None


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
    failures: list[Failure] = []
    # A worker that a request ended would raise here, at the end of the block.
    async with running(service, settings) as address:
        found = await asyncio.to_thread(methods, address)
        assert {m.containing_service.full_name for m in found} == set(service.grpc_services)
        async with grpc.aio.insecure_channel(address) as channel:
            for method in found:
                for requests in attempts(method, seed):
                    failure = await send(channel, method, requests)
                    if failure is not None:
                        failures.append(failure)
            health = health_pb2_grpc.HealthStub(channel)
            for name in service.grpc_services:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert not failures, "\n".join(str(failure)[:2000] for failure in failures[:10])
