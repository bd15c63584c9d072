"""A real coordinator on loopback, small pipelines of real processes, and waits with deadlines."""

import asyncio
import io
import tarfile
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from millrace_api.training.v1 import training_pb2 as pb
from millrace_api.training.v1 import training_pb2_grpc
from millrace_kit.client import open_channel
from millrace_kit.server import running
from millrace_kit.settings import BusSettings
from millrace_training_coordinator.app import build
from millrace_training_coordinator.settings import TrainingSettings

DEADLINE_S = 150.0


def archive(files: Mapping[str, str]) -> bytes:
    """A code archive; file times are fixed, so equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            content = textwrap.dedent(text).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def manifest(name: str = "demo", **fields: Any) -> str:
    return yaml.safe_dump({"name": name, **fields})


def stage(name: str, code: str, **fields: Any) -> dict[str, Any]:
    """A stage that runs a piece of Python."""
    return {"name": name, "command": ["python", "-c", textwrap.dedent(code)], **fields}


async def until(condition: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        answer = condition()
        if await answer if asyncio.iscoroutine(answer) else answer:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {DEADLINE_S} s for {what}")


class Client:
    """The calls of the tests."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = training_pb2_grpc.TrainingServiceStub(channel)

    async def register(self, text: str, files: Mapping[str, str] | None = None) -> pb.RegisterPipelineResponse:
        code = archive(files or {"main.py": "print('main')"})
        return await self.stub.RegisterPipeline(pb.RegisterPipelineRequest(manifest_yaml=text, code_tar_gz=code))

    async def start(self, pipeline: str = "demo", **fields: Any) -> pb.Run:
        return (await self.stub.StartRun(pb.StartRunRequest(pipeline=pipeline, **fields))).run

    async def get(self, run_id: str) -> pb.Run:
        return (await self.stub.GetRun(pb.GetRunRequest(id=run_id))).run

    async def cancel(self, run_id: str) -> pb.Run:
        return (await self.stub.CancelRun(pb.CancelRunRequest(id=run_id))).run

    async def watch(self, run_id: str) -> list[pb.WatchRunResponse]:
        return [event async for event in self.stub.WatchRun(pb.WatchRunRequest(id=run_id), timeout=DEADLINE_S)]

    async def ended(self, run_id: str) -> pb.Run:
        return (await self.watch(run_id))[-1].run

    async def run(self, text: str, files: Mapping[str, str] | None = None, **fields: Any) -> pb.Run:
        """Register, start, and wait for the end."""
        name = (await self.register(text, files)).name
        return await self.ended((await self.start(name, **fields)).id)

    async def stage_is(self, run_id: str, name: str, state: int) -> bool:
        return stages(await self.get(run_id))[name].state == state


def stages(run: pb.Run) -> dict[str, pb.StageRun]:
    return {s.name: s for s in run.stages}


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==2.4.0\n")
    return TrainingSettings(
        database_url=f"sqlite:///{tmp_path}/training.sqlite",
        work_dir=str(tmp_path / "work"),
        lock_file=str(lock),
        bus=BusSettings(path=str(tmp_path / "bus.sqlite")),
        cpus=4,
        retry_backoff_s=0.05,
        stop_grace_s=1.0,
        drain_s=5.0,
    )


@asynccontextmanager
async def coordinator(settings: TrainingSettings, **extra: Any) -> AsyncIterator[Client]:
    service = await build(settings, **extra)
    async with running(service, settings) as address, open_channel(address, timeout_s=DEADLINE_S) as channel:
        yield Client(channel)


@pytest.fixture
async def client(settings: TrainingSettings) -> AsyncIterator[Client]:
    async with coordinator(settings) as made:
        yield made
