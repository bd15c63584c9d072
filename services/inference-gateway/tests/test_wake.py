"""A version that is asleep: its calls are held by the real Envoy while a real Triton starts, and none fails."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from gateway import FEATURES, MODEL, Gateway, Rollout, arm, eventually, gateway, route
from load import infer_request
from millrace_api.rollout.v1 import rollout_pb2
from test_http import http_call, json_body
from tritonclient.grpc import service_pb2_grpc

pytest.importorskip("millrace_rollout_controller", reason="a real Triton is started by the rollout controller's code")
pytest.importorskip("onnx")
WIDTH = len(FEATURES)
HELD_AT_MOST = 20


def asleep(**fields: object) -> rollout_pb2.ModelRoute:
    sleeping = arm("1.0.0")
    sleeping.asleep = True
    return route(sleeping, may_sleep=True, **fields)


class Servers:
    """Plays the controller: when the gateway asks, a Triton starts (the first time) and the route names it."""

    def __init__(self, g: Gateway, rollout: Rollout, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self._g, self._rollout, self._folder, self._stack = g, rollout, folder, stack
        self.address = ""
        self._waking: asyncio.Task[None] | None = None
        self.answered = 0
        rollout.on_wake = self._begin

    async def sleep(self) -> None:
        if self._waking is not None:
            await self._waking
        self._waking = None
        self._rollout.wakes.clear()
        await self._rollout.in_force(self._rollout.set(asleep()))

    def _begin(self) -> None:
        # Two questions are one wake.
        self._waking = self._waking or asyncio.create_task(self._wake())

    async def _wake(self) -> None:
        from real_triton import triton

        if not self.address:
            self.address, _process = await self._stack.enter_async_context(triton(self._folder, WIDTH))
        else:
            # As long as it takes until everybody who shall be held is held.
            await eventually(lambda: self.hold(self.held), "calls are held")
        self._rollout.set(route(arm("1.0.0", self.address), may_sleep=True))

    held = 0

    async def hold(self, calls: int) -> bool:
        """Whether so many calls are held."""
        found = await self._g.figures()
        assert found is None or all(one.held <= one.running for one in found.activity)
        return found is not None and sum(one.held for one in found.activity) >= calls


@contextlib.asynccontextmanager
async def sleeping(**changes: object) -> AsyncIterator[tuple[Gateway, Rollout, Servers]]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        g, rollout = await stack.enter_async_context(gateway(**changes))
        servers = Servers(g, rollout, folder, stack)
        await servers.sleep()
        yield g, rollout, servers


async def test_calls_of_a_version_that_is_asleep_are_held_and_answered() -> None:
    async with sleeping(wake={"max_held_calls": HELD_AT_MOST}) as (g, rollout, servers):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(g.public_channel)

        # Shorter than any start: the caller gets what it asked for, and the wake goes on without it.
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.ModelInfer(infer_request(), timeout=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        answer = await stub.ModelInfer(infer_request(), timeout=60)
        assert answer.raw_output_contents
        assert set(rollout.wakes) == {(MODEL, "1.0.0")}

        # Every way in: metadata or none, HTTP, Predict, a stream.
        for call in (_named(stub), _http(g), _predict(g), _stream(stub)):
            servers.held = 1
            await servers.sleep()
            await call

        servers.held = HELD_AT_MOST
        await servers.sleep()
        calls = [asyncio.ensure_future(stub.ModelInfer(infer_request(), timeout=60)) for _ in range(HELD_AT_MOST)]
        await asyncio.gather(*calls)

        # One more than may wait: refused at once, with the time to come again; nobody else is.
        servers.held = HELD_AT_MOST + 1
        await servers.sleep()
        calls = [asyncio.ensure_future(stub.ModelInfer(infer_request(), timeout=60)) for _ in range(HELD_AT_MOST)]
        await eventually(lambda: servers.hold(HELD_AT_MOST), "all are held")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(infer_request(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "max_held_calls" in (refused.value.details() or "")
        assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "5"
        status, headers, body = await asyncio.to_thread(_infer_by_http, g)
        assert (status, headers["retry-after"]) == (503, "5")
        assert b"max_held_calls" in body
        servers.held = HELD_AT_MOST
        await asyncio.gather(*calls)

        # How much it is used is told as long as it may sleep.
        found = await g.figures()
        assert found is not None
        (one,) = found.activity
        assert (one.version, one.running) == ("1.0.0", 0)
        assert one.started >= 2 * HELD_AT_MOST
        await stub.ModelInfer(infer_request(), timeout=60)
        found = await g.figures()
        assert found is not None
        assert found.activity[0].started == one.started + 1
        await rollout.in_force(rollout.set(route(arm("1.0.0", servers.address))))
        found = await g.figures()
        assert found is not None
        assert not found.activity


async def test_a_wake_that_takes_too_long_says_what_it_waits_for() -> None:
    async with gateway(wake={"max_wait_s": 1.0, "retry_after_s": 7}) as (g, rollout):
        rollout.wake_waits_for = "needs 300 MiB; what could give way has calls under way"
        await rollout.in_force(rollout.set(asleep()))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(g.public_channel)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.ModelInfer(infer_request(), timeout=60)
        assert late.value.code() is grpc.StatusCode.UNAVAILABLE
        assert f"did not wake within 1 s; retry later ({rollout.wake_waits_for})" in (late.value.details() or "")
        assert dict(late.value.trailing_metadata() or ())["retry-after"] == "7"


async def _named(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    await stub.ModelInfer(infer_request(), metadata=[("x-millrace-model", MODEL)], timeout=60)


async def _stream(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    async def requests():
        for _ in range(3):
            yield infer_request()

    answers = [
        one async for one in stub.ModelStreamInfer(requests(), metadata=[("x-millrace-model", MODEL)], timeout=60)
    ]
    assert len(answers) == 3


async def _http(g: Gateway) -> None:
    status, headers, _body = await asyncio.to_thread(_infer_by_http, g)
    assert (status, headers["x-millrace-version"]) == (200, "1.0.0")


def _infer_by_http(g: Gateway) -> tuple[int, dict[str, str], bytes]:
    return http_call(f"http://{g.public}/v2/models/{MODEL}/infer", json_body())


async def _predict(g: Gateway) -> None:
    assert (await g.predict("flight", a=1.0, b=2.0, c=3.0)).version == "1.0.0"
