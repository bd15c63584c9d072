"""A pod of a server of several versions as plain processes: a real Triton, and the loader beside it."""

import asyncio
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil
import yaml
from millrace_api.rollout.v1 import loader_pb2, loader_pb2_grpc
from millrace_rollout_controller import shared_server, triton
from millrace_rollout_controller.kubernetes.order import Orders

_PROGRAM = [sys.executable, "-c", "from millrace_rollout_controller.kubernetes.loader import main; main()"]


@dataclass
class Pod:
    """Its folder and its processes."""

    folder: Path
    parts: triton.Triton
    registry: str
    port: int
    """Of Triton's gRPC."""
    loader_port: int
    probes_port: int
    memory_limit: str = ""
    server: "subprocess.Popen[bytes] | None" = None
    loader: "asyncio.subprocess.Process | None" = None
    starts: int = field(default=0)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def order(self, document: str) -> None:
        """What the kubelet puts into the volume."""
        path = self.folder / "orders.json"
        path.with_suffix(".new").write_text(document)
        path.with_suffix(".new").replace(path)

    def start_server(self) -> None:
        (self.folder / "models").mkdir(parents=True, exist_ok=True)
        self.starts += 1
        name = f"pod{self.port}x{self.starts}"
        log = self.folder / "triton.log"
        self.server = self.parts.start(
            name, self.folder / "models", "127.0.0.1", self.port, log, arguments=shared_server.ARGUMENTS
        )

    async def start_loader(self) -> None:
        settings = {
            "registry_address": self.registry, "registry_timeout_s": 1.0, "listen": "127.0.0.1:1",
            "telemetry": {"metrics_listen": "127.0.0.1:1"}, "drain_s": 0.0, "triton": {"probe_s": 0.5, "warmup_requests": 20},
        }  # fmt: skip
        (self.folder / "config.yaml").write_text(yaml.safe_dump(settings))
        environment = os.environ | {
            "MILLRACE_ORDERS": str(self.folder / "orders.json"),
            "MILLRACE_MODELS": str(self.folder / "models"),
            "MILLRACE_SERVER_PORT": str(self.port),
            "MILLRACE_LOADER_PORT": str(self.loader_port),
            "MILLRACE_PROBES_PORT": str(self.probes_port),
            "MILLRACE_MEMORY_LIMIT": self.memory_limit,
        }
        with (self.folder / "loader.log").open("ab") as log:
            self.loader = await asyncio.create_subprocess_exec(
                *_PROGRAM, "--config", str(self.folder / "config.yaml"), env=environment, stdout=log, stderr=log
            )

    async def ready(self) -> bool:
        """What the kubelet's probes of both containers say together."""
        urls = (
            f"http://127.0.0.1:{self.probes_port}/readyz",
            f"http://127.0.0.1:{self.port - 1}/v2/models/flight-delay/ready",
        )
        return all([await asyncio.to_thread(_answers, url) for url in urls])

    async def hold(self, orders: Orders | None = None) -> loader_pb2.HoldResponse | None:
        """As the controller asks; None while the loader does not answer."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.loader_port}") as channel:
            request = loader_pb2.HoldRequest(document=orders.model_dump_json() if orders else "")
            try:
                return await loader_pb2_grpc.LoaderServiceStub(channel).Hold(request, timeout=2)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return None
                raise

    async def held(self) -> dict[str, tuple[bool, str]]:
        """Versions: ready, and why not."""
        answer = await self.hold()
        return {one.version: (one.ready, one.reason) for one in answer.versions} if answer else {}

    def stubs(self) -> set[int]:
        """Processes of the models inside the server."""
        return (
            {child.pid for child in psutil.Process(self.server.pid).children(recursive=True)} if self.server else set()
        )

    async def kill_server(self) -> None:
        if self.server is not None:
            family = psutil.Process(self.server.pid).children(recursive=True)
            self.server.kill()
            await asyncio.to_thread(self.server.wait)
            for child in family:
                if child.is_running():
                    child.kill()

    async def kill_loader(self) -> None:
        if self.loader is not None and self.loader.returncode is None:
            self.loader.kill()
            await self.loader.wait()

    async def end(self) -> None:
        await self.kill_loader()
        if self.server is not None and self.server.poll() is None:
            await self.kill_server()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as page:
            return bool(page.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def make(folder: Path, parts: triton.Triton, registry: str, taken: set[int], memory_limit: str = "") -> Pod:
    """A pod with free ports; nothing runs in it yet."""
    ports = []
    for _ in range(2):
        ports.append(triton.free_port("127.0.0.1", frozenset(taken)))
        taken.add(ports[-1])
    return Pod(folder, parts, registry, ports[0], ports[1], ports[1] + 1, memory_limit)


@asynccontextmanager
async def running(pod: Pod, document: str) -> AsyncIterator[Pod]:
    pod.folder.mkdir(parents=True, exist_ok=True)
    pod.order(document)
    pod.start_server()
    await pod.start_loader()
    try:
        yield pod
    except BaseException:
        print((pod.folder / "loader.log").read_text()[-6000:])
        raise
    finally:
        await pod.end()
