"""Calls for tests: one whose answer is checked, and a steady load of them."""

import asyncio
import contextlib

import grpc.aio
import numpy as np
from gateway import MODEL, eventually
from tritonclient.grpc import service_pb2

INFER = "/inference.GRPCInferenceService/ModelInfer"


def infer_request(rows: int = 1, columns: int = 3) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="features", datatype="FP32", shape=[rows, columns])
    request.raw_input_contents.append(np.ones((rows, columns), "<f4").tobytes())
    return request


async def infer(channel: grpc.aio.Channel, *, timeout_s: float = 5, **metadata: str) -> str:
    """The version that answered, by what Envoy says; checked against what the model says."""
    call = channel.unary_unary(
        INFER,
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )(infer_request(), timeout=timeout_s, metadata=[(k.replace("_", "-"), v) for k, v in metadata.items()])
    response = await call
    version = dict(await call.initial_metadata())["x-millrace-version"]
    assert response.model_version.startswith(version)
    return version


class Counts:
    """What a load did so far."""

    def __init__(self) -> None:
        self.done = 0
        self.errors: list[grpc.aio.AioRpcError] = []

    async def grow(self, by: int) -> None:
        wanted = self.done + by
        await eventually(lambda: asyncio.sleep(0, self.done >= wanted), f"{by} more requests")


@contextlib.asynccontextmanager
async def load(g, clients: int = 4):
    counts = Counts()

    async def call() -> None:
        while True:
            try:
                await infer(g.public_channel, x_millrace_model=MODEL, x_user=str(counts.done))
            except grpc.aio.AioRpcError as error:
                counts.errors.append(error)
            counts.done += 1

    tasks = [asyncio.create_task(call()) for _ in range(clients)]
    try:
        yield counts
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
