"""Two versions of a model inside one server: who gets which version, whatever the call looks like."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
import models
import numpy as np
import pytest
from gateway import CANDIDATE, MODEL, Gateway, arm, eventually, gateway, route
from load import INFER, infer_request
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.routes import check_routes
from millrace_kit.errors import InvalidArgumentError
from tritonclient.grpc import service_pb2
from tritonclient.grpc.aio import InferenceServerClient, InferInput

NUMBERS = {"1.0.0": "1000000000000", "1.1.0": "1000001000000"}
LARGE_MIB = 60


class Shared(models.Model):
    """Holds two versions; each says itself in its answers, and no version at all is the wrong one."""

    async def ModelInfer(self, request, context):
        response = await super().ModelInfer(request, context)
        response.model_version = await known(request.model_version, context)
        return response

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name == self.model and request.version in NUMBERS.values())

    async def ModelMetadata(self, request, context):
        return service_pb2.ModelMetadataResponse(name=request.name, versions=[await known(request.version, context)])


async def known(number: str, context: grpc.aio.ServicerContext) -> str:
    if number not in NUMBERS.values():
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no version {number!r}")
    return number


def shared(version: str, address: str, weight: float, role: int = CANDIDATE, **fields: object) -> rollout_pb2.Arm:
    made = arm(version, address, weight=weight, role=role)
    made.MergeFrom(rollout_pb2.Arm(server_version=NUMBERS[version], **fields))
    return made


def both(address: str, weight: float, **fields: object) -> tuple[rollout_pb2.Arm, rollout_pb2.Arm]:
    stable = shared("1.0.0", address, 100 - weight, rollout_pb2.ARM_ROLE_STABLE)
    return stable, shared("1.1.0", address, weight, **fields)


async def said_and_asked(
    channel: grpc.aio.Channel, request: service_pb2.ModelInferRequest, compression: grpc.Compression, **metadata: str
) -> tuple[str, str]:
    """The version as Envoy names it, and the number the server was asked for."""
    call = channel.unary_unary(
        INFER,
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )(
        request,
        timeout=10,
        compression=compression,
        metadata=[(key.replace("_", "-"), value) for key, value in metadata.items()],
    )
    response = await call
    rows, columns = request.inputs[0].shape
    (answer,) = response.raw_output_contents
    np.testing.assert_allclose(np.frombuffer(answer, "<f4"), np.full(rows, columns, np.float32))
    assert response.model_name == MODEL
    return str(dict(await call.initial_metadata())["x-millrace-version"]), response.model_version


async def requests_of(g: Gateway) -> dict[str, tuple[int, int]]:
    """Requests and errors by version."""
    figures = await g.figures()
    assert figures is not None
    return {found.version: (found.requests, found.errors) for found in figures.versions}


async def split(g: Gateway, compression: grpc.Compression) -> Counter[str]:
    """Calls of many callers, small and larger, with and without metadata; who answered."""
    found: Counter[str] = Counter()
    for i in range(120):
        request = infer_request(1 + i % 3, 3 + 40 * (i % 7))
        if i % 2 and compression is grpc.Compression.NoCompression:
            # What a caller says of the server's own versions counts for nothing.
            request.model_version = "7"
        named = {"x_millrace_model": MODEL} if i % 5 else {}
        said, asked = await said_and_asked(g.public_channel, request, compression, x_user=str(i), **named)
        assert asked == NUMBERS[said]
        found[said] += 1
    return found


async def test_every_call_reaches_the_version_it_was_split_to() -> None:
    # The model server is in this process, which is busy for a while with large tensors.
    patient = {"health_timeout_s": 10.0}
    async with gateway(envoy=patient) as (g, rollout), models.serving(Shared("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(*both(address, 30), testers=["*"], timeout_ms=60_000)))
        found: Counter[str] = Counter()
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            found += (once := await split(g, compression))
            assert 15 <= once["1.1.0"] <= 60
            for version, number in NUMBERS.items():
                chosen = await said_and_asked(
                    g.public_channel, infer_request(), compression, x_millrace_version=version
                )
                assert chosen == (version, number)

        async def counted() -> bool:
            return await requests_of(g) == {version: (found[version], 0) for version in NUMBERS}

        await eventually(counted, "figures of each version, without those of testers")

        # All to the candidate's number, and each of the other kinds of calls.
        arms = (shared("1.0.0", address, 0, 0), shared("1.1.0", address, 100, rollout_pb2.ARM_ROLE_STABLE))
        await rollout.in_force(rollout.set(route(*arms, timeout_ms=60_000)))
        client = InferenceServerClient(
            g.public, channel_args=[("grpc.max_send_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
        )
        assert await client.is_model_ready(MODEL)
        assert list((await client.get_model_metadata(MODEL)).versions) == [NUMBERS["1.1.0"]]
        assert await streamed(client, (1, 20_000, 3)) == [(NUMBERS["1.1.0"], size) for size in (1, 20_000, 3)]
        answer = await g.predict("flight", a=1.0, b=2.0, c=3.0)
        assert (answer.outputs[0], answer.version) == (6.0, "1.1.0")
        for headers in ({"x-millrace-model": MODEL}, {}):
            size = (LARGE_MIB << 20) // 4
            large = await client.infer(MODEL, [ones(size)], headers=headers, client_timeout=60)
            assert large.as_numpy("probability").tolist() == [[float(size)]]
        await client.close()

        # A shadow in the same server: the copies ask for the candidate.
        before = (await requests_of(g))["1.1.0"][0]
        await rollout.in_force(rollout.set(route(*both(address, 0, mirror_percent=100))))
        for i in range(20):
            metadata = {"x_millrace_model": MODEL, "x_user": str(i)}
            said = await said_and_asked(g.public_channel, infer_request(), grpc.Compression.NoCompression, **metadata)
            assert said == ("1.0.0", NUMBERS["1.0.0"])

        async def copied() -> bool:
            requests, errors = (await requests_of(g))["1.1.0"]
            return requests >= before + 20 and not errors

        await eventually(copied, "copies as the candidate's figures")


def ones(size: int) -> InferInput:
    tensor = InferInput("features", [1, size], "FP32")
    tensor.set_data_from_numpy(np.ones((1, size), np.float32))
    return tensor


async def streamed(client: InferenceServerClient, sizes: Sequence[int]) -> list[tuple[str, float]]:
    """Which version answered each request of a stream, and what."""

    async def requests() -> AsyncIterator[dict[str, object]]:
        for size in sizes:
            yield {"model_name": MODEL, "inputs": [ones(size)]}

    found = []
    async for result, error in client.stream_infer(requests(), headers={"x-millrace-model": MODEL}):
        assert error is None
        found.append((result.get_response().model_version, float(result.as_numpy("probability")[0, 0])))
    return found


def test_a_number_that_is_none_is_refused() -> None:
    wrong = arm("1.0.0", "127.0.0.1:9001")
    wrong.server_version = "../1"
    with pytest.raises(InvalidArgumentError, match=r"arms\[0\].server_version"):
        check_routes(rollout_pb2.Routes(generation=1, models=[route(wrong)]))
