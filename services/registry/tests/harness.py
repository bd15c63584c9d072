"""A client for tests, a registry in process, and one as a process of its own."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import yaml
from millrace_api.common.v1 import common_pb2
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_registry.app import build
from millrace_registry.settings import RegistrySettings

R = registry_pb2


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Client:
    """The stub, with errors as `MillraceError` and shorthands for what every test needs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = registry_pb2_grpc.RegistryServiceStub(channel)

    async def call(self, method: str, request: object) -> Any:
        try:
            return await getattr(self.stub, method)(request)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None

    async def put(self, content: bytes, *, sha256: str = "", size: int | None = None, chunk: int = 1 << 20) -> Any:
        def parts() -> Iterator[R.PutArtifactRequest]:
            size_bytes = len(content) if size is None else size
            yield R.PutArtifactRequest(header=R.PutArtifactHeader(sha256=sha256 or sha(content), size_bytes=size_bytes))
            for start in range(0, len(content), chunk):
                yield R.PutArtifactRequest(chunk=content[start : start + chunk])

        return await self.call("PutArtifact", parts())

    async def get(self, sha256: str) -> bytes:
        try:
            return b"".join([a.chunk async for a in self.stub.GetArtifact(R.GetArtifactRequest(sha256=sha256))])
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None

    async def create_model(self, name: str = "m") -> Any:
        return await self.call("CreateModel", R.CreateModelRequest(model=R.Model(name=name)))

    async def register(self, version: str = "1.0.0", content: bytes = b"onnx", **changes: Any) -> Any:
        await self.put(content)
        request = R.RegisterVersionRequest(version=model_version(version, content, **changes), actor="ann")
        return await self.call("RegisterVersion", request)

    async def approve(self, version: str, stage: int = R.STAGE_PRODUCTION, comment: str = "looks good") -> Any:
        request = R.ApproveRequest(model="m", version=version, to_stage=stage, actor="bob", comment=comment)
        return (await self.call("Approve", request)).version

    async def move(self, version: str, *stages: int, expected_revision: int = 0) -> Any:
        for stage in stages:
            request = R.TransitionStageRequest(
                model="m", version=version, to_stage=stage, actor="ann", expected_revision=expected_revision
            )
            answer = await self.call("TransitionStage", request)
        return answer.version

    async def promote(self, version: str) -> Any:
        await self.approve(version)
        return await self.move(version, R.STAGE_TESTING, R.STAGE_STAGING, R.STAGE_PRODUCTION)

    async def version(self, version: str = "") -> Any:
        return (await self.call("GetVersion", R.GetVersionRequest(model="m", version=version))).version

    async def audit(self, **request: Any) -> Any:
        return await self.call("ListAudit", R.ListAuditRequest(**request))


def model_version(version: str = "1.0.0", content: bytes = b"onnx", **changes: Any) -> R.ModelVersion:
    fields: dict[str, Any] = {
        "model": "m",
        "version": version,
        "artifacts": [common_pb2.Artifact(path="model.onnx", sha256=sha(content), size_bytes=len(content))],
        "platform": "onnxruntime_onnx",
        "signature": R.Signature(
            inputs=[R.TensorSpec(name="features", datatype="FP32", shape=[2])],
            outputs=[R.TensorSpec(name="probability", datatype="FP32", shape=[1])],
            feature_names=["view__a", "view__b"],
        ),
        "lineage": R.Lineage(
            run_id="run-1",
            training_set_digest="a" * 64,
            definitions_hash="b" * 64,
            table_versions=[common_pb2.TableVersion(table="flights", version=7)],
            code_hash="c" * 64,
            lock_hash="d" * 64,
            seed=-(1 << 63),
        ),
        "metrics": {"auc": 0.83, "log_loss": 0.4},
        "tags": {"team": "flights", "empty": ""},
    }
    return R.ModelVersion(**{**fields, **changes})


@asynccontextmanager
async def serving(settings: RegistrySettings) -> AsyncIterator[Client]:
    async with running(await build(settings), settings) as address, open_channel(address) as channel:
        yield Client(channel)


class Process:
    """A registry as a process of its own, for tests that kill it."""

    def __init__(self, settings: RegistrySettings, folder: Path, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._config = folder / "registry.yaml"
        fields = {**settings.model_dump(mode="json"), "listen": self.address}
        self._config.write_text(yaml.safe_dump(fields), encoding="utf-8")
        self._log = (folder / "registry.log").open("ab")
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "millrace_registry", "--config", str(self._config)]
        self._process = subprocess.Popen(command, stderr=self._log, env=os.environ)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    async def ready(self) -> None:
        deadline = time.monotonic() + 60
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            while time.monotonic() < deadline:
                try:
                    await stub.ListModels(R.ListModelsRequest(), timeout=5, wait_for_ready=True)
                except grpc.aio.AioRpcError:
                    assert self._process.poll() is None, "the registry ended"
                else:
                    return
        raise AssertionError("the registry did not start")
