"""A model server that answers at once, and fails as often as it is told: `python -m tests.perf.failing_model PORT`.

V2 over gRPC with a fixed answer. It stands in for Triton where many thousand requests matter and the model does not.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2

MODEL = "flight-delay"
RATE = "/perf.Failing/Rate"
READY_S = 30.0


async def serve(port: int) -> None:
    """Until the process is ended."""
    chance, rate = random.Random(port), [0.0]
    answer = service_pb2.ModelInferResponse(model_name=MODEL, model_version=str(port))
    answer.outputs.add(name="probability", datatype="FP32", shape=[1, 1])
    answer.raw_output_contents.append(b"\0\0\0?")
    body = answer.SerializeToString()

    async def infer(_request: bytes, context: Any) -> bytes:
        if chance.random() < rate[0]:
            await context.abort(grpc.StatusCode.INTERNAL, "told to fail")
        return body

    async def set_rate(request: bytes, _context: Any) -> bytes:
        rate[0] = float(request)
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler(infer)}),
            grpc.method_handlers_generic_handler("perf.Failing", {"Rate": handler(set_rate)}),
        ]
    )
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@contextmanager
def running(ports: list[int]) -> Iterator[list[str]]:
    """One server process a port; their addresses."""
    program = [sys.executable, "-m", "tests.perf.failing_model"]
    processes = [subprocess.Popen([*program, str(port)]) for port in ports]
    try:
        for port in ports:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(READY_S)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)


async def fail(address: str, rate: float) -> None:
    """Let a server fail this share of its calls."""
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.unary_unary(RATE)(str(rate).encode(), timeout=10)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
