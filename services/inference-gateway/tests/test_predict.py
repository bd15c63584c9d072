"""Predict through the door that Envoy brings it to: real Envoy, HTTP/1.1 inside, gRPC outside."""

import asyncio
import gzip
import math
import struct

import grpc
import grpc.aio
import models
import pytest
from gateway import CANDIDATE, MODEL, STABLE, Features, arm, eventually, gateway, on_the_bus, route
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.predict_rows import Caller
from millrace_inference_gateway.predict_steps import checked_plan
from millrace_inference_gateway.routes import check_routes
from millrace_kit import grpc_http1
from millrace_kit.call_door import CallDoor, DoorCall
from millrace_kit.errors import InvalidArgumentError, MillraceError, NotFoundError, ResourceExhaustedError
from parts.server import free_port

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
READ = "/millrace_api.feature.v1.FeatureService/GetOnlineFeatures"
PREDICT = "/millrace_api.prediction.v1.PredictionService/Predict"


def request(**inputs: float) -> prediction_pb2.PredictRequest:
    values = {name: common_pb2.Value(double_value=value) for name, value in inputs.items()}
    return prediction_pb2.PredictRequest(model=MODEL, inputs=values)


async def test_look_ups_share_calls_and_one_wrong_row_is_its_callers_alone() -> None:
    features = Features()
    async with gateway(features=features) as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await g.predict(a=0.0)
        features.delay_s = 0.2
        features.rows.clear()
        wanted = [request(a=float(n)) if n % 7 else request(b=1.0) for n in range(40)]
        found = await asyncio.gather(
            *(g.predictions.Predict(one, timeout=20) for one in wanted), return_exceptions=True
        )
        for n, answer in enumerate(found):
            if n % 7:
                assert list(answer.outputs) == [float(n)]
            else:
                assert answer.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "inputs.a: join key" in answer.details()
        assert max(features.rows) > 1


async def test_look_ups_by_plain_http_are_those_by_grpc() -> None:
    features, port, stops = Features(), free_port(), []

    async def read(call: DoorCall) -> bytes:
        asked = feature_pb2.GetOnlineFeaturesRequest.FromString(call.message)
        return (await features.GetOnlineFeatures(asked, None)).SerializeToString()

    def start() -> asyncio.Task[None]:
        door = CallDoor({READ: read}, max_message_bytes=1 << 20, max_concurrent=64)
        stops.append(asyncio.Event())
        return asyncio.create_task(door.run_on_port(f"127.0.0.1:{port}", stops[-1], 0, tls=None))

    running = start()
    reads = {"feature_reads_address": f"localhost:{port}"}
    async with (
        gateway(by_grpc := Features(), **reads) as (g, rollout),
        models.serving(models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        assert list((await g.predict(a=3.0)).outputs) == [3.0]
        wanted = [request(a=float(n)) if n % 7 else request(b=1.0) for n in range(40)]
        features.delay_s = 0.1
        found = await asyncio.gather(
            *(g.predictions.Predict(one, timeout=20) for one in wanted), return_exceptions=True
        )
        for n, answer in enumerate(found):
            if n % 7:
                assert list(answer.outputs) == [float(n)]
            else:
                assert (answer.code(), "inputs.a: join key" in answer.details()) == (INVALID_ARGUMENT, True)
        assert max(features.rows) > 1

        features.delay_s = 3.0
        with pytest.raises(grpc.aio.AioRpcError, match="the feature service does not answer within"):
            await g.predictions.Predict(request(a=1.0), timeout=1)
        features.delay_s = 0.0
        assert not by_grpc.rows

        # A service that listens for gRPC alone, as one of an earlier release does, is asked by that; and by HTTP as soon as it may be.
        stops[-1].set()
        await running
        assert list((await g.predict(a=4.0)).outputs) == [4.0]
        assert by_grpc.rows == [1]
        running, seen = start(), len(features.rows)

        async def by_http() -> bool:
            assert list((await g.predict(a=5.0)).outputs) == [5.0]
            return len(features.rows) > seen

        await eventually(by_http, "look-ups by HTTP")
    stops[-1].set()
    await running


async def test_an_error_comes_with_its_details_and_a_deadline_ends_the_model_call() -> None:
    async with gateway() as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predictions.Predict(prediction_pb2.PredictRequest(model="nobody"), timeout=5)
        (detail, *_rest) = rpc_status.from_call(caught.value).details
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        assert (info.reason, info.metadata["name"]) == ("MODEL_NOT_FOUND", "nobody")

        model.fail = grpc.StatusCode.INTERNAL
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predict(a=1.0)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        model.fail, model.delay_s = None, 5.0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predict(a=1.0)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        model.delay_s = 0.0
        # Whoever gives up leaves nothing behind that the next call could meet.
        assert (await g.predict(a=3.0)).outputs[0] == 3.0


async def test_compressed_and_broken_messages() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        answer = await g.predictions.Predict(request(a=2.0), timeout=10, compression=grpc.Compression.Gzip)
        assert answer.outputs[0] == 2.0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.public_channel.unary_unary(PREDICT)(b"\xff\xff", timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

        async def ended() -> bool:
            # The gRPC server has the same method for whoever reaches it directly.
            direct = await g.channel.unary_unary(PREDICT)(request(a=4.0).SerializeToString(), timeout=5)
            return prediction_pb2.PredictResponse.FromString(direct).outputs[0] == 4.0

        await eventually(ended, "Predict at the gRPC server")


def plan(**fields: object) -> rollout_pb2.PredictPlan:
    return json_format.ParseDict(fields, rollout_pb2.PredictPlan())


async def test_defaults_steps_and_what_the_caller_is_told() -> None:
    features = Features()
    async with gateway(features=features) as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        made = arm("1.0.0", address)
        made.predict.CopyFrom(
            plan(defaults={"b": 10.0}, post=[{"threshold": {"value": 12}}, {"labels": {"names": ["no", "yes"]}}])
        )
        await rollout.in_force(rollout.set(route(made)))
        answer = await g.predict("flight", a=1.0, c=4.0)
        assert (list(answer.outputs), list(answer.model_outputs), list(answer.labels)) == ([1.0], [15.0], ["yes"])
        assert (list(answer.missing_features), list(answer.defaulted_features)) == (["b"], ["b"])
        assert not answer.output_places
        other = await g.predict("flight", a=1.0)
        assert (list(other.outputs), list(other.labels)) == ([0.0], ["no"])
        assert list(other.missing_features) == ["b", "c"]
        assert list(other.defaulted_features) == ["b"]
        logged = {p.prediction_id: p for p in await on_the_bus(g, 2)}
        mine = logged[answer.prediction_id]
        assert (list(mine.features), list(mine.outputs)) == ([1.0, 10.0, 4.0], [15.0])
        assert (list(mine.answered), list(mine.labels), mine.cached) == ([1.0], ["yes"], False)

        made.predict.CopyFrom(
            plan(post=[{"top": {"count": 1}}, {"labels": {"names": ["late"]}}], hideModelOutputs=True)
        )
        await rollout.in_force(rollout.set(route(made)))
        hidden = await g.predict("flight", a=2.0, b=1.0, c=0.0)
        assert (list(hidden.outputs), list(hidden.labels), list(hidden.output_places)) == ([3.0], ["late"], [0])
        assert not hidden.model_outputs
        seen = {p.prediction_id: p for p in await on_the_bus(g, 3)}[hidden.prediction_id]
        assert (list(seen.outputs), list(seen.answered_places)) == ([3.0], [0])
        assert (hidden.max_feature_age_ms, list(seen.feature_ages)) == (7, [])

        assert features.asked_definitions == ""
        made.predict.definitions_hash = "e" * 64
        await rollout.in_force(rollout.set(route(made)))
        await g.predict("flight", a=2.0)
        assert features.asked_definitions == "e" * 64
        assert {p.definitions_hash for p in await on_the_bus(g, 4)} == {"d" * 64, "e" * 64}

        features.ages_ms = [5, -1, 0]
        asked = request(a=1.0)
        quiet = await g.predictions.Predict(asked, timeout=10)
        asked.with_feature_ages = True
        told = await g.predictions.Predict(asked, timeout=10)
        assert (quiet.max_feature_age_ms, list(quiet.feature_ages)) == (5, [])
        assert [(one.view, one.age_ms) for one in told.feature_ages] == [("view0", 5), ("view2", 0)]
        logged = {p.prediction_id: p for p in await on_the_bus(g, 6)}
        assert all(list(logged[a.prediction_id].feature_ages) == list(told.feature_ages) for a in (quiet, told))


def rules(**fields: object) -> common_pb2.ValueRules:
    return json_format.ParseDict(fields, common_pb2.ValueRules())


async def test_values_are_checked_before_a_model_is_asked() -> None:
    async with (
        gateway() as (g, rollout),
        models.serving(model := models.Model("1.0.0")) as address,
        models.serving(models.Model("1.1.0")) as other,
    ):
        made, candidate = arm("1.0.0", address), arm("1.1.0", other, weight=0, role=CANDIDATE)
        made.rules.CopyFrom(
            rules(
                features=[
                    {"name": "a", "min": 0, "max": 10},
                    {"name": "b", "max": 5, "policy": "VALUE_POLICY_CLIP"},
                    {"name": "c", "allowed": [0, 1], "policy": "VALUE_POLICY_WARN"},
                ]
            )
        )
        candidate.rules.CopyFrom(rules(features=[{"name": "b", "required": True}]))
        await rollout.in_force(rollout.set(route(made, candidate, testers=["*"])))
        answer = await g.predict("flight", a=1.0, b=7.0, c=3.0)
        assert list(answer.outputs) == [1.0 + 5.0 + 3.0]
        assert [(f.field, f.problem, f.clipped) for f in answer.findings] == [
            ("features['b']", common_pb2.VALUE_PROBLEM_ABOVE_MAX, True),
            ("features['c']", common_pb2.VALUE_PROBLEM_NOT_ALLOWED, False),
        ]
        (logged,) = await on_the_bus(g, 1)
        assert (list(logged.features), list(logged.findings)) == ([1.0, 5.0, 3.0], list(answer.findings))

        calls = model.calls
        for values, field, problem, index in (
            ({"a": 11.0}, "features['a']", "ABOVE_MAX", "0"),
            ({"a": 1.0, "b": float("nan")}, "inputs['b']", "NAN", None),
            ({"a": 1.0, "b": float("inf")}, "inputs['b']", "INFINITE", None),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await g.predict(**values)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            info = error_info(caught.value)
            assert (info.reason, info.metadata["field"], info.metadata["problem"]) == ("VALUE_REFUSED", field, problem)
            assert info.metadata.get("index") == index
        # The tester's version says what is right for the tester.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predictions.Predict(request(a=20.0), timeout=10, metadata=(("x-millrace-version", "1.1.0"),))
        assert error_info(caught.value).metadata["field"] == "features['b']"

        rows = [prediction_pb2.PredictRow(inputs=request(a=float(n)).inputs) for n in (1, 12, 2)]
        batch = await g.predictions.PredictBatch(prediction_pb2.PredictBatchRequest(model=MODEL, rows=rows), timeout=10)
        assert [r.WhichOneof("result") for r in batch.results] == ["response", "failure", "response"]
        said = batch.results[1].failure
        assert (said.reason, said.metadata["row"], said.metadata["field"]) == ("VALUE_REFUSED", "1", "features['a']")

        async def asked():
            yield prediction_pb2.PredictStreamRequest(call_id="x", request=request(a=-1.0))

        (found,) = [answer async for answer in g.predictions.PredictStream(asked(), timeout=10)]
        assert found.result.failure.metadata["problem"] == "BELOW_MIN"

        async def counted():
            figures = await g.figures()
            return figures if figures and figures.versions and figures.versions[0].requests == 2 else None

        # Nothing of what was refused is in the figures that gates judge.
        assert [v.errors for v in (await eventually(counted, "two calls of the model")).versions] == [0]
        assert model.calls == calls + 1


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info


async def test_a_batch_has_an_answer_or_an_error_for_each_row_and_few_model_calls() -> None:
    async with (
        gateway(batch_rows_together=8) as (g, rollout),
        models.serving(model := models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await g.predict(a=0.0)
        rows = [request(**({"a": float(n)} if n != 5 else {"b": 1.0})) for n in range(20)]
        batch = prediction_pb2.PredictBatchRequest(
            model=MODEL,
            rows=[prediction_pb2.PredictRow(inputs=one.inputs, subject=f"s{n}") for n, one in enumerate(rows)],
        )
        before = model.calls
        answer = await g.predictions.PredictBatch(batch, timeout=20)
        assert model.calls - before == 3
        ids = set()
        for n, result in enumerate(answer.results):
            if n == 5:
                assert (result.failure.code, result.failure.metadata["field"]) == (3, "inputs.a")
            else:
                assert list(result.response.outputs) == [float(n)]
                ids.add(result.response.prediction_id)
        assert len(ids) == 19

        # A model that does not take so many rows is asked row by row.
        model.max_rows = 1
        answer = await g.predictions.PredictBatch(batch, timeout=20)
        assert [list(r.response.outputs) for r in answer.results if r.HasField("response")] == [
            [float(n)] for n in range(20) if n != 5
        ]
        for wrong in ([], [prediction_pb2.PredictRow()] * 300):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await g.predictions.PredictBatch(prediction_pb2.PredictBatchRequest(model=MODEL, rows=wrong), timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_rows_of_a_batch_stay_on_their_side_of_a_split() -> None:
    async with (
        gateway() as (g, rollout),
        models.serving(models.Model("1.0.0")) as at_first,
        models.serving(models.Model("1.1.0")) as at_second,
    ):
        arms = [arm("1.0.0", at_first, weight=50), arm("1.1.0", at_second, weight=50, role=CANDIDATE)]
        await rollout.in_force(rollout.set(route(*arms)))
        subjects = [f"user-{n}" for n in range(30)]
        alone = {s: (await g.predict(s, a=1.0)).version for s in subjects}
        rows = [prediction_pb2.PredictRow(inputs=request(a=1.0).inputs, subject=s) for s in subjects]
        batch = prediction_pb2.PredictBatchRequest(model=MODEL, rows=rows)
        answer = await g.predictions.PredictBatch(batch, timeout=20)
        assert {s: r.response.version for s, r in zip(subjects, answer.results, strict=True)} == alone
        assert set(alone.values()) == {"1.0.0", "1.1.0"}


async def test_a_stream_answers_as_it_can_with_a_bound_on_what_is_under_way() -> None:
    async with gateway(max_stream_calls=4) as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await g.predict(a=0.0)
        model.delay_s = 0.05
        model.most_at_once = 0

        async def asked():
            for n in range(30):
                yield prediction_pb2.PredictStreamRequest(call_id=str(n), request=request(a=float(n)))
            yield prediction_pb2.PredictStreamRequest(call_id="wrong", request=request(b=1.0))

        found = {}
        async for answer in g.predictions.PredictStream(asked(), timeout=60):
            found[answer.call_id] = answer.result
        assert len(found) == 31
        assert found.pop("wrong").failure.reason == "INVALID_FIELD"
        assert {name: list(result.response.outputs) for name, result in found.items()} == {
            str(n): [float(n)] for n in range(30)
        }
        assert 1 < model.most_at_once <= 4


async def test_answers_that_may_be_given_again() -> None:
    async with (
        gateway() as (g, rollout),
        models.serving(model := models.Model("1.0.0")) as at_first,
        models.serving(models.Model("1.1.0")) as at_second,
    ):
        made = arm("1.0.0", at_first)
        made.predict.CopyFrom(plan(cache={"maxAgeMs": 60_000, "inputs": ["a"]}))
        await rollout.in_force(rollout.set(route(made)))
        # The first look-up tells which definitions are in force.
        first = await g.predict("one", a=1.0)
        calls = model.calls
        again = await g.predict("two", a=1.0, c=9.0)
        assert (again.cached, list(again.outputs), again.version) == (True, [1.0], "1.0.0")
        assert again.prediction_id != first.prediction_id
        assert not (await g.predict("one", a=2.0)).cached
        assert model.calls == calls + 1
        logged = {p.prediction_id: p for p in await on_the_bus(g, 3)}
        assert (logged[again.prediction_id].cached, logged[again.prediction_id].subject) == (True, "two")
        assert not logged[first.prediction_id].cached

        async def counted():
            found = await g.figures()
            return found if found and found.versions and found.versions[0].requests == 2 else None

        await eventually(counted, "only what the model answered among the figures")

        # With a second version in the traffic every request is evidence.
        candidate = arm("1.1.0", at_second, weight=50, role=CANDIDATE)
        made.weight = 50
        await rollout.in_force(rollout.set(route(made, candidate)))
        assert not (await g.predict("one", a=1.0)).cached
        # Another version's answers are its own.
        candidate.weight, candidate.role = 100, STABLE
        candidate.predict.CopyFrom(made.predict)
        await rollout.in_force(rollout.set(route(candidate)))
        other = await g.predict("one", a=1.0)
        assert (other.cached, other.version) == (False, "1.1.0")


def test_who_may_get_an_answer_made_for_somebody_else() -> None:
    message = rollout_pb2.Routes(models=[route(arm("1.0.0", "127.0.0.1:8001"), callers=["shop"])])
    narrow = check_routes(message).routes[MODEL]
    message.models[0].callers[:] = ["*"]
    wide = check_routes(message).routes[MODEL]
    shop, other = Caller(None, {b"x-millrace-client": b"shop"}), Caller(None, {})
    assert [c.may_share(narrow) for c in (shop, other)] == [True, False]
    assert [c.may_share(wide) for c in (shop, other)] == [True, True]
    assert not Caller(None, {b"x-millrace-version": b"1.0.0"}).may_share(wide)


def finished(outputs: list[float], *steps: dict[str, object]) -> tuple[list[float], list[str], list[int]]:
    return tuple(checked_plan(plan(post=list(steps)), "predict").finished(outputs))


def test_steps() -> None:
    names = {"labels": {"names": ["x", "y", "z"]}}
    assert finished([1.0, 1000.0], {"softmax": {}}, {"argmax": {}}, names) == ([1.0], ["y"], [])
    assert finished([-1000.0, 0.0, 1000.0], {"sigmoid": {}}) == ([0.0, 0.5, 1.0], [], [])
    assert finished([-1.0, 5.0], {"clip": {"min": 0, "max": 2}}) == ([0.0, 2.0], [], [])
    assert sum(finished([1.0, 2.0, 3.0], {"softmax": {}})[0]) == pytest.approx(1.0)
    # What is chosen keeps its place, and is named by it.
    few = [0.2, 0.5, 0.3]
    assert finished(few, {"top": {"count": 2}}, names) == ([0.5, 0.3], ["y", "z"], [1, 2])
    assert finished([1.0, 1.0, 0.0], {"top": {"count": 9}}) == ([1.0, 1.0, 0.0], [], [0, 1, 2])
    assert finished(few, {"at_least": {"value": 0.3}}, {"round": {"decimals": 0}}, names) == (
        [0, 0],
        ["y", "z"],
        [1, 2],
    )
    assert finished(few, {"at_least": {"value": 0.9}}, names) == ([], [], [])
    assert finished(few, {"keep": {"places": [2, 0, 7]}}) == ([0.3, 0.2], [], [2, 0])
    assert finished(few, {"drop": {"places": [1]}}, {"top": {"count": 1}}, names) == ([0.3], ["z"], [2])
    assert finished(few, {"drop": {"places": [1]}}, {"argmax": {}}, names) == ([2.0], ["z"], [])
    assert finished([0.123456, 2.5], {"round": {"decimals": 2}}) == ([0.12, 2.5], [], [])
    assert finished([math.nan, 1.0], {"at_least": {"value": 0}}) == ([1.0], [], [1])
    assert finished([math.nan, 1.0, 2.0], {"top": {"count": 2}}) == ([2.0, 1.0], [], [2, 1])
    for where, wrong in {
        "p.post[0]": {"post": [{}]},
        "p.post[0].clip": {"post": [{"clip": {"min": 3, "max": 2}}]},
        "p.post[0].threshold.value": {"post": [{"threshold": {"value": "NaN"}}]},
        "p.post[1]": {"post": [{"sigmoid": {}}, {"labels": {"names": ["x"]}}]},
        "p.post[2]": {"post": [{"argmax": {}}, {"labels": {"names": ["x"]}}, {"sigmoid": {}}]},
        "p.definitions_hash": {"definitions_hash": "x"},
        "p.post[0].keep.places": {"post": [{"keep": {}}]},
        "p.post[0].drop.places": {"post": [{"drop": {"places": [1, 1]}}]},
        "p.post[0].round.decimals": {"post": [{"round": {"decimals": 16}}]},
        "p.post[0].top.count": {"post": [{"top": {}}]},
        "p.post[0].at_least.value": {"post": [{"at_least": {"value": "NaN"}}]},
        "p.defaults['x']": {"defaults": {"x": "Infinity"}},
        "p.cache.max_age_ms": {"cache": {}},
        "p.post": {"post": [{"sigmoid": {}}] * 9},
    }.items():
        with pytest.raises(InvalidArgumentError) as caught:
            checked_plan(plan(**wrong), "p")
        assert caught.value.field == where


def test_frames() -> None:
    message = b"hello"
    assert grpc_http1.unframed(grpc_http1.framed(message), b"identity", 10) == message
    packed = gzip.compress(message)
    assert grpc_http1.unframed(struct.pack(">BI", 1, len(packed)) + packed, b"gzip", 10) == message
    bomb = gzip.compress(b"\0" * 100_000)
    with pytest.raises(ResourceExhaustedError):
        grpc_http1.unframed(struct.pack(">BI", 1, len(bomb)) + bomb, b"gzip", 1000)
    for body in (b"", b"\0\0\0\0", b"\0\0\0\0\2x", b"\2\0\0\0\1x", b"\1\0\0\0\1x"):
        with pytest.raises(InvalidArgumentError):
            grpc_http1.unframed(body, b"gzip", 10)
    with pytest.raises(MillraceError, match="br"):
        grpc_http1.unframed(b"\1\0\0\0\1x", b"br", 10)


def test_timeouts() -> None:
    assert grpc_http1.timeout_s(b"") is None
    assert [grpc_http1.timeout_s(t) for t in (b"2S", b"100m", b"3M", b"1H")] == [2.0, 0.1, 180.0, 3600.0]
    for wrong in (b"S", b"1", b"1x", b"-1S", b"123456789S", b"1.5S"):
        with pytest.raises(InvalidArgumentError):
            grpc_http1.timeout_s(wrong)
    assert grpc_http1.timeout_header(0.00001) == b"1m"


def test_statuses() -> None:
    answer = grpc_http1.error_answer(NotFoundError("model", "größe\r\nx: y"))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert rest == b""
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    error = grpc_http1.status_error(200, headers)
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "größe" in error.message
    assert grpc_http1.status_error(200, {b"grpc-status": b"0"}) is None
    away = grpc_http1.status_error(503, {})
    assert away is not None
    assert away.code is grpc.StatusCode.UNAVAILABLE
