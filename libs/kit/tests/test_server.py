"""A service on the kit: errors, deadlines, health, metrics of a real server on loopback."""

import asyncio
import signal

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.errors import InvalidArgumentError, MillraceError, NotFoundError, UnavailableError
from millrace_kit.server import Service, Worker, WorkerFailedError, running, serve
from millrace_kit.settings import ServiceSettings


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    async def GetModel(self, request, context):
        match request.name:
            case "bad":
                raise InvalidArgumentError("name", "is bad")
            case "gone":
                raise NotFoundError("model", request.name)
            case "slow":
                await asyncio.Event().wait()
            case "secret":
                raise RuntimeError("password=hunter2")
        return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=request.name))


def service(*workers: Worker) -> Service:
    return Service(
        "test",
        [lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(Servicer(), server)],
        ["millrace_api.registry.v1.RegistryService"],
        workers,
    )


async def call(name: str, settings: ServiceSettings | None = None, timeout_s: float = 10) -> registry_pb2.Model:
    settings = settings or ServiceSettings(drain_s=0)
    async with running(service(), settings) as address, open_channel(address, timeout_s=timeout_s) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        try:
            return (await stub.GetModel(registry_pb2.GetModelRequest(name=name))).model
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None


async def test_answers() -> None:
    assert (await call("m")).name == "m"


async def test_bad_input_names_the_field() -> None:
    with pytest.raises(MillraceError, match="name: is bad") as caught:
        await call("bad")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.metadata == {"field": "name"}


async def test_bytes_that_are_no_message_are_bad_input() -> None:
    async with running(service(), ServiceSettings(drain_s=0)) as address, open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/millrace_api.registry.v1.RegistryService/GetModel")(b"\xff\xff")
    error = MillraceError.from_rpc(caught.value)
    assert (error.code, error.metadata) == (grpc.StatusCode.INVALID_ARGUMENT, {"field": "request"})


async def test_reason_crosses_the_wire() -> None:
    with pytest.raises(MillraceError) as caught:
        await call("gone")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_unexpected_errors_keep_their_text_inside() -> None:
    with pytest.raises(MillraceError) as caught:
        await call("secret")
    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in str(caught.value)


async def test_client_deadline_is_added() -> None:
    with pytest.raises(MillraceError) as caught:
        await call("slow", timeout_s=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_server_deadline_for_calls_without_one() -> None:
    settings = ServiceSettings(default_deadline_s=0.2, drain_s=0)
    async with running(service(), settings) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await registry_pb2_grpc.RegistryServiceStub(channel).GetModel(registry_pb2.GetModelRequest(name="slow"))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_limit_on_calls_at_once() -> None:
    settings = ServiceSettings(max_concurrent_rpcs=1, drain_s=0)
    async with running(service(), settings) as address, open_channel(address) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        first = asyncio.ensure_future(stub.GetModel(registry_pb2.GetModelRequest(name="slow")))
        codes = set()
        for _ in range(200):
            try:
                await stub.GetModel(registry_pb2.GetModelRequest(name="m"))
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                break
        first.cancel()
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_health_and_unknown_method() -> None:
    async with running(service(), ServiceSettings(drain_s=0)) as address, open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="millrace_api.registry.v1.RegistryService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await registry_pb2_grpc.RegistryServiceStub(channel).ListModels(registry_pb2.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_failed_worker_ends_the_service() -> None:
    async def fail(stop: asyncio.Event) -> None:
        raise ValueError("broken")

    with pytest.raises(WorkerFailedError, match="breaker"):
        async with running(service(Worker("breaker", fail)), ServiceSettings(drain_s=0)):
            await asyncio.sleep(0.05)


async def test_a_worker_whose_database_is_away_runs_again_and_the_service_answers_meanwhile() -> None:
    runs: list[str] = []

    async def work(stop: asyncio.Event) -> None:
        runs.append("run")
        if len(runs) < 3:
            raise UnavailableError("DATABASE_UNAVAILABLE", "the database did not answer")
        runs.append("through")
        await stop.wait()

    ending = asyncio.create_task(serve(service(Worker("relay", work)), ServiceSettings(drain_s=0)))
    while "through" not in runs:
        await asyncio.sleep(0.01)
        assert not ending.done()
    assert runs == ["run", "run", "run", "through"]
    signal.raise_signal(signal.SIGTERM)
    await ending
