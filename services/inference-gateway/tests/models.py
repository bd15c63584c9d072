"""Model servers for tests: the V2 protocol and gRPC health, in this process or in one of their own.

`python models.py PORT NAME [delay_ms [host]]` runs one until it is killed. It answers every row with the sum of its features, and says
its name in the response's `model_version`.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

MAX_MESSAGE = 64 << 20


class Model(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, name: str, model: str = "flight-delay", delay_s: float = 0.0) -> None:
        self.name = name
        self.model = model
        self.delay_s = delay_s
        self.fail: grpc.StatusCode | None = None
        self.calls = 0
        self.metadata: dict[str, str] = {}
        self.max_rows = 1 << 20
        self.now = self.most_at_once = 0
        # Requests that are worked on at once; others wait.
        self.slots = asyncio.Semaphore(1 << 20)

    async def ModelInfer(self, request, context):
        self.calls += 1
        self.metadata = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        if self.delay_s:
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            async with self.slots:
                await asyncio.sleep(self.delay_s)
            self.now -= 1
        if self.fail is not None:
            await context.abort(self.fail, "told to fail")
        if request.model_name != self.model:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_name}")
        if request.inputs[0].shape[0] > self.max_rows:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {self.max_rows} rows")
        values = np.frombuffer(request.raw_input_contents[0], "<f4")
        rows = np.nan_to_num(values.reshape(request.inputs[0].shape)).sum(axis=1, dtype=np.float32).reshape(-1, 1)
        response = service_pb2.ModelInferResponse(model_name=self.model, model_version=self.name, id=request.id)
        output = response.outputs.add(name="probability", datatype="FP32")
        output.shape.extend(rows.shape)
        response.raw_output_contents.append(rows.tobytes())
        return response

    async def ModelStreamInfer(self, requests, context):
        async for request in requests:
            yield service_pb2.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, context))

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name == self.model)

    async def ModelMetadata(self, request, context):
        return service_pb2.ModelMetadataResponse(name=request.name, versions=[self.name], platform="test")

    async def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="model server")

    async def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)


async def start(model: Model, port: int = 0, host: str = "127.0.0.1") -> tuple[grpc.aio.Server, str]:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
    server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return server, f"{host}:{bound}"


@contextlib.asynccontextmanager
async def serving(model: Model, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """The model's address while the context is open."""
    server, address = await start(model, port, host)
    try:
        yield address
    finally:
        await server.stop(0)


async def main() -> None:
    model = Model(sys.argv[2], delay_s=float(sys.argv[3]) / 1000 if len(sys.argv) > 3 else 0.0)
    server, _address = await start(model, int(sys.argv[1]), sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1")
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
