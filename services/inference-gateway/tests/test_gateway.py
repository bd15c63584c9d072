"""The gateway end to end: real Envoy, the Python process beside it, small model servers behind."""

import asyncio
import contextlib
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import grpc.aio
import models
import numpy as np
import pytest
from gateway import (
    CANDIDATE,
    MODEL,
    Features,
    Gateway,
    Rollout,
    arm,
    eventually,
    free_ports,
    gateway,
    listens,
    peers,
    route,
)
from load import INFER, infer, infer_request, load
from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.bus import PREDICTIONS, open_bus
from tritonclient.grpc import service_pb2
from tritonclient.grpc.aio import InferenceServerClient, InferInput


@contextlib.asynccontextmanager
async def two_versions():
    async with models.serving(models.Model("1.0.0")) as first, models.serving(models.Model("1.1.0")) as second:
        yield first, second


async def test_unmodified_triton_client() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        client = InferenceServerClient(g.public, channel_args=[("grpc.max_send_message_length", 64 << 20)])
        assert await client.is_server_live()
        assert await client.is_server_ready()

        async def own() -> bool:
            return (await client.get_server_metadata()).name == "millrace-inference-gateway"

        await eventually(own, "the gateway's own metadata; until Envoy finds it healthy a model server answers")
        assert [m.name for m in (await client.get_model_repository_index()).models] == [MODEL]
        assert await client.is_model_ready(MODEL)
        assert (await client.get_model_metadata(MODEL)).name == MODEL
        small = InferInput("features", [2, 3], "FP32")
        small.set_data_from_numpy(np.array([[1, 2, 3], [4, 5, 6]], np.float32))
        assert (await client.infer(MODEL, [small])).as_numpy("probability").tolist() == [[6.0], [15.0]]
        large = InferInput("features", [1, 4 << 20], "FP32")
        large.set_data_from_numpy(np.ones((1, 4 << 20), np.float32))
        assert (await client.infer(MODEL, [large])).as_numpy("probability").tolist() == [[float(4 << 20)]]
        await client.close()


async def test_predict_and_figures_and_log() -> None:
    async with gateway() as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        generation = rollout.set(route(arm("1.0.0", address)))
        await rollout.in_force(generation)
        answer = await g.predict("flight-1", a=1.0, c=4.0)
        assert list(answer.outputs) == [5.0]
        assert (answer.version, answer.digest, answer.max_feature_age_ms) == ("1.0.0", "1" * 64, 7)
        assert list(answer.missing_features) == ["b"]
        assert model.metadata["x-user"] == "flight-1"
        assert model.metadata["x-request-id"] == answer.prediction_id
        for _ in range(4):
            await infer(g.public_channel, x_millrace_model=MODEL, x_millrace_subject="flight-2", x_user="u")

        async def logged():
            found = await g.figures()
            return found if found and found.logged == 5 else None

        figures = await eventually(logged, "five predictions on the bus")
        assert figures.dropped == 0
        assert figures.routes_generation == generation
        (version,) = figures.versions
        assert (version.model, version.version, version.requests, version.errors) == (MODEL, "1.0.0", 5, 0)
        assert math.isinf(version.latency[-1].le_ms)
        assert sum(bucket.count for bucket in version.latency) == 5

        bus = await open_bus(g.settings.bus)
        subscription = await bus.subscribe([PREDICTIONS], group="test")
        batches = [events_pb2.PredictionsMade.FromString(m.value) for m in await subscription.fetch()]
        found = {p.prediction_id: p for batch in batches for p in batch.predictions}
        assert len(found) == 5
        mine = found[answer.prediction_id]
        assert (mine.path, mine.subject, mine.definitions_hash) == ("predict", "flight-1", "d" * 64)
        assert mine.features[0] == 1.0
        assert math.isnan(mine.features[1])
        assert list(mine.outputs) == [5.0]
        others = [p for p in found.values() if p.path == "v2"]
        assert len(others) == 4
        for other in others:
            assert (other.subject, other.version, list(other.features), list(other.outputs)) == (
                "flight-2", "1.0.0", [1.0, 1.0, 1.0], [3.0],
            )  # fmt: skip
            assert other.latency_ms > 0
        await subscription.close()
        await bus.close()


async def test_split_is_sticky_monotone_and_near_its_weight() -> None:
    async with gateway() as (g, rollout), two_versions() as (at_first, at_second):
        users = [f"user-{n}" for n in range(1000)]
        before: set[str] = set()
        for weight in (5, 20, 50, 100):
            arms = [
                arm("1.0.0", at_first, weight=100 - weight),
                arm("1.1.0", at_second, weight=weight, role=CANDIDATE),
            ]
            await rollout.in_force(rollout.set(route(*arms)))
            found = set()
            for start in range(0, len(users), 50):
                some = users[start : start + 50]
                versions = await asyncio.gather(
                    *(infer(g.public_channel, x_millrace_model=MODEL, x_user=user) for user in some)
                )
                found |= {user for user, version in zip(some, versions, strict=True) if version == "1.1.0"}
            share = len(found) / len(users)
            assert abs(share - weight / 100) <= 4 * math.sqrt(weight / 100 * (1 - weight / 100) / len(users))
            assert before <= found, "a caller left the candidate while its weight grew"
            before = found
        # Without the sticky header the split is random.
        await rollout.in_force(
            rollout.set(route(arm("1.0.0", at_first, weight=50), arm("1.1.0", at_second, weight=50, role=CANDIDATE)))
        )
        versions = [await infer(g.public_channel, x_millrace_model=MODEL) for _ in range(200)]
        assert 60 <= versions.count("1.1.0") <= 140


async def test_weights_and_versions_change_without_a_failed_request() -> None:
    async with contextlib.AsyncExitStack() as stack:
        g, rollout = await stack.enter_async_context(gateway())
        third = await stack.enter_async_context(models.serving(models.Model("1.1.0")))
        second, first = contextlib.AsyncExitStack(), contextlib.AsyncExitStack()
        stack.push_async_callback(second.aclose)
        stack.push_async_callback(first.aclose)
        at_first = await first.enter_async_context(models.serving(models.Model("1.0.0")))
        at_second = await second.enter_async_context(models.serving(models.Model("1.1.0")))
        await rollout.in_force(rollout.set(route(arm("1.0.0", at_first))))
        async with load(g) as counts:
            for flip in range(20):
                weight = (flip * 37) % 101
                old = arm("1.0.0", at_first, weight=100 - weight)
                new = arm("1.1.0", at_second, weight=weight, role=CANDIDATE)
                await rollout.in_force(rollout.set(route(old, new)))
            # The old version goes altogether, then its server does.
            await rollout.in_force(rollout.set(route(arm("1.1.0", at_second))))
            await counts.grow(20)
            await first.aclose()
            # And another server takes the place of the only one.
            await rollout.in_force(rollout.set(route(arm("1.1.0", third))))
            await counts.grow(20)
            await second.aclose()
            await counts.grow(50)
        assert counts.errors == []
        assert counts.done > 100


async def test_rules() -> None:
    async with gateway() as (g, rollout), two_versions() as (at_first, at_second):
        arms = [arm("1.0.0", at_first, weight=100), arm("1.1.0", at_second, weight=0, role=CANDIDATE)]

        async def versions(when: str, *calls: dict[str, str]) -> list[str]:
            made = route(*arms)
            made.rules.add(when=when, to=CANDIDATE)
            await rollout.in_force(rollout.set(made))
            return [await infer(g.public_channel, x_millrace_model=MODEL, **call) for call in calls]

        new, old = "1.1.0", "1.0.0"
        premium = "request.headers['X-User-Type'] == 'premium'"
        assert await versions(premium, {"x_user_type": "premium"}, {"x_user_type": "x"}, {}) == [new, old, old]
        # An absent header is CEL's error, which does not match, not even negated.
        assert await versions(
            "request.headers['x-user-type'] != 'premium'", {"x_user_type": "premium"}, {"x_user_type": "x"}, {}
        ) == [old, new, old]
        assert await versions(f"!({premium})", {"x_user_type": "premium"}, {"x_user_type": "x"}, {}) == [old, new, old]
        either = (
            "request.headers['a'] in ['1', '2'] || !('b' in request.headers) && request.headers['c'].startsWith('x')"
        )
        assert await versions(either, {"a": "2", "b": "1"}, {"c": "xy"}, {"b": "1", "c": "xy"}, {"a": "3"}) == [
            new, new, old, old,
        ]  # fmt: skip
        assert await versions("request.headers['a'].matches('^u[0-9]+$')", {"a": "u12"}, {"a": "u"}) == [new, old]


async def test_refusals() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))

        async def fails(code: grpc.StatusCode, text: str, method: str, body: bytes, **metadata: str) -> None:
            call = g.public_channel.unary_unary(method)
            given = [(k.replace("_", "-"), v) for k, v in metadata.items()]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(body, timeout=5, metadata=given)
            assert (caught.value.code(), text in caught.value.details()) == (code, True), caught.value.details()

        code = grpc.StatusCode
        unknown = service_pb2.ModelInferRequest(model_name="nobody").SerializeToString()
        await fails(code.NOT_FOUND, "'nobody'", INFER, unknown)
        await fails(code.NOT_FOUND, "'nobody'", INFER, unknown, x_millrace_model="nobody")
        await fails(code.INVALID_ARGUMENT, "model_name", INFER, b"")
        await fails(code.INVALID_ARGUMENT, "model_name", INFER, b"\xff" * 100)
        await fails(code.UNIMPLEMENTED, "Nothing", "/inference.GRPCInferenceService/Nothing", b"")
        load = service_pb2.RepositoryModelLoadRequest(model_name=MODEL).SerializeToString()
        path = "/inference.GRPCInferenceService/RepositoryModelLoad"
        await fails(code.UNIMPLEMENTED, "RepositoryModelLoad", path, load, x_millrace_model=MODEL)
        await fails(code.UNIMPLEMENTED, "GetFigures", "/millrace_api.prediction.v1.GatewayService/GetFigures", b"")

        async def predict_fails(code: grpc.StatusCode, text: str, **fields: object) -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await g.predictions.Predict(prediction_pb2.PredictRequest(**fields), timeout=5)
            assert (caught.value.code(), text in caught.value.details()) == (code, True), caught.value.details()

        await predict_fails(code.INVALID_ARGUMENT, "model:")
        await predict_fails(code.NOT_FOUND, "'nobody'", model="nobody")
        await predict_fails(code.INVALID_ARGUMENT, "inputs.a: join key", model=MODEL)
        await predict_fails(code.INVALID_ARGUMENT, "subject:", model=MODEL, subject="x" * 300)
        await predict_fails(code.INVALID_ARGUMENT, "sticky_key:", model=MODEL, sticky_key="a\nb")


async def test_a_client_cannot_choose_a_prediction_id() -> None:
    async with gateway() as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        wanted = "00000000-0000-4000-8000-000000000000"
        ids = set()
        for _ in range(3):
            call = g.public_channel.unary_unary(INFER, request_serializer=lambda m: m.SerializeToString())
            pending = call(infer_request(), metadata=[("x-millrace-model", MODEL), ("x-request-id", wanted)], timeout=5)
            await pending
            ids.add(dict(await pending.initial_metadata())["x-millrace-prediction-id"])
        assert len(ids) == 3
        assert wanted not in ids
        assert model.metadata["x-request-id"] in ids


async def test_errors_are_counted_by_version() -> None:
    async with gateway() as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=300)))
        seen = []
        for fail in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, None):
            model.fail, model.delay_s = fail, (1.0 if fail is None else 0.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer(g.public_channel, x_millrace_model=MODEL)
            seen.append(caught.value.code())
        assert seen == [
            grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED,
        ]  # fmt: skip

        async def counted():
            found = await g.figures()
            return found if found and found.versions and found.versions[0].requests == 3 else None

        figures = await eventually(counted, "three requests counted")
        assert figures.versions[0].errors == 2
        assert figures.logged == 0


async def test_a_killed_replica_costs_no_client_an_error() -> None:
    port = free_ports(1)[0]
    killed = subprocess.Popen([sys.executable, str(Path(models.__file__)), str(port), "1.0.0", "5"])
    try:
        async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
            await eventually(lambda: asyncio.to_thread(listens, port), "the replica", 30)
            await rollout.in_force(rollout.set(route(arm("1.0.0", address, f"127.0.0.1:{port}"))))
            async with load(g) as counts:
                await counts.grow(50)
                killed.kill()
                killed.wait()
                await counts.grow(200)
            assert counts.errors == []
    finally:
        killed.kill()
        killed.wait()


async def test_v2_goes_on_without_python_and_python_without_envoy() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        generation = rollout.set(route(arm("1.0.0", address)))
        await rollout.in_force(generation)
        async with load(g) as counts:
            await counts.grow(50)
            g.kill_python()
            await counts.grow(100)
            g.start_python()
            await g.generation(generation)
            await counts.grow(100)
        assert counts.errors == []

        g.kill_envoy()
        assert await g.figures() is not None
        g.start_envoy()

        async def served() -> bool:
            try:
                return await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - the only error allowed
                return False

        await eventually(served, "V2 after Envoy's restart")
        # New routes get through to the new Envoy.
        await rollout.in_force(rollout.set(route(arm("1.0.1", address))))
        assert dict(await headers(g))["x-millrace-version"] == "1.0.1"


async def headers(g):
    call = g.public_channel.unary_unary(INFER, request_serializer=lambda m: m.SerializeToString())
    pending = call(infer_request(), metadata=[("x-millrace-model", MODEL)], timeout=5)
    await pending
    return await pending.initial_metadata()


async def test_last_known_routes_serve_without_a_controller() -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        g, rollout = Gateway(Path(folder)), Rollout()
        try:
            async with models.serving(models.Model("1.0.0")) as address:
                async with peers(rollout, Features(), g.peer_ports):
                    g.start_python()
                    g.start_envoy()
                    await rollout.in_force(generation := rollout.set(route(arm("1.0.0", address))))
                g.kill_python()
                g.kill_envoy()
                for path in (Path(folder) / "envoy").glob("*.json"):
                    path.unlink()
                g.start_python()
                g.start_envoy()
                await g.generation(generation)
                assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
        except BaseException:
            print(g.logs())
            raise
        finally:
            await g.close()


async def test_answered_predictions_outlive_kills_of_both_processes() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(generation := rollout.set(route(arm("1.0.0", address))))
        answered, v2 = set(), 0

        async def predict(count: int) -> None:
            wanted = len(answered) + count
            while len(answered) < wanted:
                try:
                    answered.add((await g.predict("flight", a=1.0, b=2.0, c=3.0)).prediction_id)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - the only error allowed
                    await asyncio.sleep(0.02)

        for turn in range(3):
            calling = asyncio.gather(*(predict(30) for _ in range(4)))
            for _ in range(20):
                await infer(g.public_channel, x_millrace_model=MODEL)
                v2 += 1
            g.kill_python()
            for _ in range(20):
                await infer(g.public_channel, x_millrace_model=MODEL)
                v2 += 1
            g.start_python()
            await g.generation(generation)
            await calling
            if turn == 1:
                # Envoy dies while nobody reads what it wrote.
                g.kill_python()
                for _ in range(20):
                    await infer(g.public_channel, x_millrace_model=MODEL)
                    v2 += 1
                await asyncio.to_thread(written, g, v2)
                g.kill_envoy()
                g.start_python()
                g.start_envoy()
                await eventually(lambda: asyncio.to_thread(listens, int(g.public.rpartition(":")[2])), "Envoy")
        bus = await open_bus(g.settings.bus)
        subscription = await bus.subscribe([PREDICTIONS], group="test")
        batches: dict[int, events_pb2.PredictionsMade] = {}

        async def all_there() -> bool:
            for message in await subscription.fetch(timeout_s=0.1):
                batch = events_pb2.PredictionsMade.FromString(message.value)
                # The same batch may come twice, never with other content under the same offset.
                assert batches.setdefault(batch.journal_offset, batch) == batch
            logged = {p.prediction_id for b in batches.values() for p in b.predictions if p.path == "predict"}
            return answered <= logged

        await eventually(all_there, "every answered prediction on the bus")

        async def accounted() -> bool:
            await all_there()
            found = await g.figures()
            logged = sum(p.path == "v2" for b in batches.values() for p in b.predictions)
            assert found is None or found.dropped == 0
            return logged == v2

        await eventually(accounted, "every V2 call logged, once", 15)
        assert len(answered) > 50
        await subscription.close()
        await bus.close()


def written(g, calls: int) -> None:
    """Wait until Envoy's log has so many clients' calls: it is written after the answers, in one go."""
    newest, deadline = max(g.settings.access_log.glob("*.log")), time.monotonic() + 5
    while sum(b'["v2"' in line and b"ModelInfer" in line for line in newest.read_bytes().splitlines()) < calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_random_bytes_at_every_port_harm_nothing() -> None:
    chance = random.Random(7)
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        for target in (g.public, g.python_address):
            host, _, port = target.partition(":")
            for _ in range(20):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(chance.randbytes(chance.randint(1, 3000)))
                with contextlib.suppress(OSError, TimeoutError):
                    await writer.drain()
                    await asyncio.wait_for(reader.read(100), 0.1)
                writer.close()
        good = infer_request().SerializeToString()
        for _ in range(200):
            body = bytearray(good if chance.random() < 0.5 else chance.randbytes(chance.randint(0, 200)))
            for _ in range(chance.randint(0, 4)):
                if body:
                    body[chance.randrange(len(body))] = chance.randrange(256)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await g.public_channel.unary_unary(INFER)(bytes(body), timeout=2)
        assert await infer(g.public_channel, x_millrace_model=MODEL) == "1.0.0"
        assert (await g.predict("f", a=1.0)).version == "1.0.0"
