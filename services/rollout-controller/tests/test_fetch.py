"""The init container's program and what it writes, served by a real Triton that is ready only when it is warm."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import yaml
from millrace_rollout_controller import triton
from millrace_rollout_controller.kubernetes.order import Ending, Order
from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.repository import Flavour, config
from millrace_rollout_controller.server_block import Server
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .peers import Peers, serving
from .support import onnx_model, until, version_ref


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with serving(Peers(contents={"1.0.0": onnx_model(0.1), "1.1.0": onnx_model(0.2)})) as made:
        yield made


def order(version: str, peers: Peers, backend: str = "pythonOnnx") -> Order:
    ref = version_ref(version, peers.contents[version])
    return Order(
        ref=ref, max_batch_size=8, instances=1, queue_delay_us=0, backend=backend, threads=1, gpu=False, warmup=20
    )


async def run(folder: Path, address: str, told: str) -> tuple[int, str]:
    settings = folder / "config.yaml"
    settings.write_text(yaml.safe_dump({"registry_address": address, "registry_timeout_s": 1.0}))
    environment = os.environ | {
        "MILLRACE_FETCH_ORDER": told,
        "MILLRACE_MODELS": str(folder / "models"),
        "MILLRACE_TERMINATION_LOG": str(folder / "ended"),
    }
    (folder / "models").mkdir(exist_ok=True)
    program = [sys.executable, "-c", "from millrace_rollout_controller.kubernetes.fetch import main; main()"]
    process = await asyncio.create_subprocess_exec(*program, "--config", str(settings), env=environment)
    code = await asyncio.wait_for(process.wait(), 60)
    ended = folder / "ended"
    return code, ended.read_text() if ended.exists() else ""


async def test_fetched_models_are_warm_before_they_are_ready(tmp_path: Path, peers: Peers) -> None:
    told = order("1.0.0", peers)
    assert await run(tmp_path, peers.address, told.model_dump_json()) == (0, "")
    assert await run(tmp_path, peers.address, told.model_dump_json()) == (0, "")
    parts = await asyncio.to_thread(triton.Triton.prepare, tmp_path / "triton")
    port = triton.free_port("127.0.0.1", frozenset())
    log = tmp_path / "log"
    process = parts.start("fetched", tmp_path / "models", "127.0.0.1", port, log)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    answer = await stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=2)
                except grpc.aio.AioRpcError:
                    return False
                return bool(answer.ready)

            await until(ready, 60, "the server is ready")
            statistics = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="flight-delay"), timeout=5)
            # Triton counts its own warm-up as no inference; it answers the first caller.
            assert statistics.model_stats[0].name == "flight-delay"
            answer = await stub.ModelInfer(sample_request(told.ref), timeout=10)
            assert answer.outputs[0].name == "probability"
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
    assert "warm" not in log.read_text().lower(), log.read_text()


async def test_other_bytes_are_never_written(tmp_path: Path, peers: Peers) -> None:
    peers.tampered.add("1.1.0")
    code, said = await run(tmp_path, peers.address, order("1.1.0", peers).model_dump_json())
    ending = Ending.model_validate_json(said)
    assert (code, ending.reason, ending.permanent) == (3, "DataLoss", True)
    assert "digest" in ending.message
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []


async def test_what_cannot_be_served_is_said(tmp_path: Path, peers: Peers) -> None:
    told = order("1.0.0", peers)
    other = told.model_copy(update={"ref": told.ref.model_copy(update={"platform": "tensorflow"})})
    code, said = await run(tmp_path, peers.address, other.model_dump_json())
    assert (code, Ending.model_validate_json(said).reason) == (3, "PLATFORM_UNSUPPORTED")
    code, said = await run(tmp_path, peers.address, "{}")
    assert (code, Ending.model_validate_json(said).reason) == (3, "OrderInvalid")


def test_the_full_image_gets_its_own_backend() -> None:
    ref = version_ref("1.0.0", b"x")
    text = config(ref, Server(), Flavour("onnxruntime", 2, gpu=True, warmup=50))
    assert 'backend: "onnxruntime"' in text
    assert "kind: KIND_GPU" in text
    assert 'default_model_filename: "model.onnx"' in text
    assert "count: 50" in text
    assert "zero_data: true" in text
    assert "artifacts" not in text
