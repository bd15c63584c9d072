"""A real Triton with a small real ONNX model, started the way the rollout controller starts one."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import numpy as np
from gateway import eventually
from millrace_kit.content import sha256_file
from millrace_rollout_controller.manifest import Server
from millrace_rollout_controller.repository import Flavour, write
from millrace_rollout_controller.state import ArtifactRef, Tensor, VersionRef
from millrace_rollout_controller.triton import Triton, free_port, started_at, sweep
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

MODEL = "flight-delay"


class Folder:
    """Gives the files of a local folder as a version's artifacts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        shutil.copyfile(self._folder / artifact.path, target)


def mlp(width: int, hidden: int = 64, seed: int = 0) -> bytes:
    """A network of one hidden layer: features [n, width] -> probability [n, 1]."""
    chance = np.random.default_rng(seed)
    shapes = {"w1": (width, hidden), "b1": (hidden,), "w2": (hidden, 1), "b2": (1,)}
    weights = [
        numpy_helper.from_array(chance.normal(0, 0.1, shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["features", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        weights,
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )


@contextlib.asynccontextmanager
async def triton(folder: Path, width: int, name: str = "t0") -> AsyncIterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Address and process of a ready Triton that serves one model of `width` features."""
    source = folder / f"{name}-files"
    source.mkdir(parents=True)
    (source / "model.onnx").write_bytes(mlp(width))
    digest = sha256_file(source / "model.onnx")
    artifact = ArtifactRef(path="model.onnx", sha256=digest, size_bytes=(source / "model.onnx").stat().st_size)
    ref = VersionRef(
        model=MODEL, version="1.0.0", digest=digest, platform="onnxruntime_onnx", artifacts=(artifact,),
        inputs=(Tensor(name="features", datatype="FP32", shape=(width,)),),
        outputs=(Tensor(name="probability", datatype="FP32", shape=(1,)),),
    )  # fmt: skip
    repository = folder / f"{name}-repository"
    await write(repository, ref, Server(), Flavour(), Folder(source), max_bytes=1 << 30)
    made = await asyncio.to_thread(Triton.prepare, folder / "triton")
    port = free_port("127.0.0.1", frozenset())
    server_id = f"gw-{os.getpid()}-{name}"
    process = made.start(server_id, repository, "127.0.0.1", port, folder / f"{name}.log")
    since = started_at(process.pid) or 0.0
    address = f"127.0.0.1:{port}"
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def ready() -> bool:
                assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
                try:
                    answer = await stub.ModelReady(service_pb2.ModelReadyRequest(name=MODEL), timeout=1)
                except grpc.aio.AioRpcError:
                    return False
                return bool(answer.ready)

            await eventually(ready, "Triton is ready", 60)
        yield address, process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
        await asyncio.to_thread(sweep, process.pid, since, server_id)
