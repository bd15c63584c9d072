"""V2 over gRPC beyond the small unary call: compression, decoupled models, large tensors."""

import grpc
import grpc.aio
import models
import numpy as np
import pytest
from gateway import MODEL, arm, eventually, gateway, route
from load import INFER, infer_request
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import PREDICTIONS, open_bus
from tritonclient.grpc import service_pb2
from tritonclient.grpc.aio import InferenceServerClient, InferInput

LARGE_MIB = 60


class Decoupled(models.Model):
    """Answers each request of a stream with its rows one by one, then with an empty final response."""

    async def ModelStreamInfer(self, requests, context):
        self.calls += 1
        async for request in requests:
            for value in np.frombuffer(request.raw_input_contents[0], "<f4"):
                response = service_pb2.ModelInferResponse(model_name=self.model, model_version=self.name, id=request.id)
                response.outputs.add(name="probability", datatype="FP32", shape=[1])
                response.raw_output_contents.append(np.float32(value).tobytes())
                yield service_pb2.ModelStreamInferResponse(infer_response=response)
            last = service_pb2.ModelInferResponse(model_name=self.model, model_version=self.name, id=request.id)
            last.parameters["triton_final_response"].bool_param = True
            yield service_pb2.ModelStreamInferResponse(infer_response=last)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_a_compressed_call_of_an_unmodified_client(algorithm: str) -> None:
    chance = np.random.default_rng(5)
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        client = InferenceServerClient(g.public)
        # Few bytes make fixed codes, many make codes of their own, noise makes blocks that are stored.
        values = [
            np.ones((2, 3), np.float32),
            np.arange(3000, dtype=np.float32).reshape(3, 1000),
            chance.integers(0, 4, (5, 500)).astype(np.float32),
            chance.normal(0, 1, (4, 5000)).astype(np.float32),
        ]
        for rows in values:
            tensor = InferInput("features", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            found = await client.infer(MODEL, [tensor], compression_algorithm=algorithm)
            np.testing.assert_allclose(
                found.as_numpy("probability")[:, 0], rows.sum(axis=1, dtype=np.float32), rtol=1e-4, atol=1e-3
            )
        await client.close()

        async def logged() -> bool:
            figures = await g.figures()
            return figures is not None and figures.logged >= 2

        await eventually(logged, "predictions on the bus")
        bus = await open_bus(g.settings.bus)
        subscription = await bus.subscribe([PREDICTIONS], group="test")
        first: list[float] = []
        while not first:
            for message in await subscription.fetch(timeout_s=0.2):
                for prediction in events_pb2.PredictionsMade.FromString(message.value).predictions:
                    first = first or list(prediction.features)
        assert first == [1.0, 1.0, 1.0]
        await subscription.close()
        await bus.close()


async def test_what_cannot_be_unpacked_is_refused() -> None:
    async with gateway() as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        chance = np.random.default_rng(6)
        for size in (0, 1, 10, 18, 100, 3000):
            call = g.public_channel.unary_unary(INFER, request_serializer=lambda m: m)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(chance.bytes(size), timeout=10, compression=grpc.Compression.Gzip)
            assert caught.value.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        assert model.calls == 0
        call = g.public_channel.unary_unary(INFER, request_serializer=lambda m: m.SerializeToString())
        await call(infer_request(), timeout=10, compression=grpc.Compression.Gzip)


async def test_a_decoupled_model_and_its_stream() -> None:
    async with gateway() as (g, rollout), models.serving(model := Decoupled("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        client = InferenceServerClient(g.public)

        async def requests():
            for size in (3, 0, 2):
                tensor = InferInput("features", [size], "FP32")
                tensor.set_data_from_numpy(np.arange(size, dtype=np.float32))
                yield {
                    "model_name": MODEL,
                    "inputs": [tensor],
                    "request_id": str(size),
                    "enable_empty_final_response": True,
                }

        found: dict[str, list[float]] = {}
        ends = 0
        async for result, error in client.stream_infer(requests(), headers={"x-millrace-model": MODEL}):
            assert error is None
            message = result.get_response()
            ends += message.parameters["triton_final_response"].bool_param
            if message.outputs:
                found.setdefault(message.id, []).extend(result.as_numpy("probability").tolist())
        assert (found, ends, model.calls) == ({"3": [0.0, 1.0, 2.0], "2": [0.0, 1.0]}, 3, 1)
        await client.close()

        async def counted() -> bool:
            figures = await g.figures()
            return [(v.version, v.requests, v.errors) for v in figures.versions] == [("1.0.0", 1, 0)]

        await eventually(counted, "the stream as one request")


async def test_a_large_tensor_passes() -> None:
    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address), timeout_ms=60_000)))
        client = InferenceServerClient(
            g.public, channel_args=[("grpc.max_send_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
        )
        size = (LARGE_MIB << 20) // 4
        tensor = InferInput("features", [1, size], "FP32")
        tensor.set_data_from_numpy(np.ones((1, size), np.float32))
        found = await client.infer(MODEL, [tensor], headers={"x-millrace-model": MODEL}, client_timeout=60)
        assert found.as_numpy("probability").tolist() == [[float(size)]]
        await client.close()
