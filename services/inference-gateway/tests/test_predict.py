"""Predict through the door that Envoy brings it to: real Envoy, HTTP/1.1 inside, gRPC outside."""

import asyncio
import gzip
import struct

import grpc
import grpc.aio
import models
import pytest
from gateway import MODEL, Features, arm, eventually, gateway, route
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from millrace_api.common.v1 import common_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_inference_gateway import grpc_http1
from millrace_kit.errors import InvalidArgumentError, MillraceError, NotFoundError, ResourceExhaustedError

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
