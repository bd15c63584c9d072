"""Private servers to measure: started by the controller's own executor, in a folder of the tuner's, and gone afterwards.

So a version's files are fetched and proved exactly as for a rollout, and a tuner that was killed leaves servers that the next one finds and stops.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil
from millrace_kit.clock import Clock
from millrace_kit.content import sha256_file
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from millrace_rollout_controller.executor import ArtifactSource, Wanted
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.reconciler import Refusal
from millrace_rollout_controller.replica import Record
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.settings import TritonSettings
from millrace_rollout_controller.state import ArtifactRef, VersionRef
from millrace_rollout_controller.tuning.configuration import Configuration
from millrace_rollout_controller.tuning.decision import ROUNDS, Side
from millrace_rollout_controller.tuning.load import ClosedLoop
from millrace_rollout_controller.tuning.points import Point, Usage, enough, summarize
from millrace_rollout_controller.tuning.search import ServerFailedError
from millrace_rollout_controller.warm_gate import Window

METADATA_TIMEOUT_S = 10.0
MEASURED = (
    "max_batch_size", "timeout_ms", "instances", "queue_delay_us", "batching", "rate_limit", "model_warmup",
)  # fmt: skip
"""Fields of the manifest's block that a measured server has; all others say where and how many servers run."""
LOOK_S = 0.05
"""Time between two looks whether a server is ready."""


@dataclass(frozen=True, slots=True)
class Method:
    """How points are measured."""

    window_s: float = 1.0
    """Least length of a window."""
    min_requests: int = 100
    """Least requests of one: of three the 99th percentile then has three requests above it."""
    max_windows: int = 10
    """After so many a point is not steady."""
    share: float = 0.10
    """Most difference between three windows in a row that are steady."""


class Kept:
    """An `ArtifactSource` that asks for each file once: every configuration has the same."""

    def __init__(self, source: ArtifactSource, folder: Path) -> None:
        self._source = source
        self._folder = folder

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        """See `ArtifactSource.fetch`."""
        kept = self._folder / artifact.sha256
        if not kept.exists() or await asyncio.to_thread(sha256_file, kept) != artifact.sha256:
            kept.parent.mkdir(parents=True, exist_ok=True)
            await self._source.fetch(artifact, kept)
        await asyncio.to_thread(shutil.copyfile, kept, target)


class Bench:
    """Measures configurations of one version.

    Args:
        executor: started already, and nobody else's.
        folder: the executor's.
        ref: the version.
        server: the manifest's block; what is not tuned stays, but see `measured`.
        bodies: requests to send.
        bound_ms: the bound on p99.
        method: how.
        clock: for latencies and deadlines.
        ready_s: longest time until a server is ready.
        until: monotonic time at which a point is broken off; it is not steady then.
    """

    def __init__(
        self,
        executor: LocalExecutor,
        folder: Path,
        ref: VersionRef,
        server: Server,
        bodies: Sequence[bytes],
        *,
        bound_ms: float,
        method: Method,
        clock: Clock,
        ready_s: float,
        until: float,
    ) -> None:
        self._executor = executor
        self._folder = folder
        self._ref = ref
        self._server = measured(server)
        self._bodies = bodies
        self._bound_ms = bound_ms
        self._method = method
        self._clock = clock
        self._ready_s = ready_s
        self._until = until
        self._up: dict[Configuration, str] = {}
        self.triton = ""
        """Version of the servers; known once one was up."""

    async def measure(self, configuration: Configuration, concurrency: int) -> Point:
        """One point: windows until they are steady.

        Raises:
            ServerFailedError: there is no server with this configuration.
        """
        endpoint = (await self._servers([configuration]))[0]
        before, began = self._times(endpoint), self._clock.monotonic()
        windows: list[Window] = []
        async with self._loop(endpoint, concurrency) as loop:
            while not self._enough(windows):
                windows.append(await loop.window(self._method.window_s, self._method.min_requests))
            after, passed = self._times(endpoint), self._clock.monotonic() - began
        usage = Usage((after[0] - before[0]) / passed, (after[1] - before[1]) / passed, after[2])
        return summarize(concurrency, windows, share=self._method.share, usage=usage)

    def _enough(self, windows: Sequence[Window]) -> bool:
        if not windows:
            return False
        over = self._clock.monotonic() >= self._until
        return over or enough(windows, self._bound_ms, self._method.share, self._method.max_windows)

    async def play(self, sides: Sequence[Side]) -> list[list[Window]]:
        """Each side once a round, in turn, while all their servers are up; who is first changes from round to round."""
        configurations = list(dict.fromkeys(configuration for configuration, _ in sides))
        endpoints = dict(zip(configurations, await self._servers(configurations), strict=True))
        played: list[list[Window]] = [[] for _ in sides]
        for number in range(ROUNDS):
            order = list(range(len(sides)))
            for index in order if number % 2 == 0 else reversed(order):
                configuration, concurrency = sides[index]
                async with self._loop(endpoints[configuration], concurrency) as loop:
                    played[index].append(await loop.window(self._method.window_s, self._method.min_requests))
        return played

    async def close(self) -> None:
        """Stop the servers."""
        with contextlib.suppress(TimeoutError):
            await self._servers([])

    def _loop(self, endpoint: str, concurrency: int) -> ClosedLoop:
        timeout_s = self._server.timeout_ms / 1000.0
        return ClosedLoop(endpoint, self._bodies, concurrency, timeout_s=timeout_s, clock=self._clock)

    async def _servers(self, configurations: Sequence[Configuration]) -> list[str]:
        """Endpoints of servers that are ready, one of each configuration; no others run then."""
        if configurations and list(self._up) == list(configurations):
            return list(self._up.values())
        self._up = {}
        wanted = [Wanted(_name(one), self._ref, 1, one.applied(self._server)) for one in configurations]
        names = {(want.deployment, self._ref.version) for want in wanted}
        end = self._clock.monotonic() + self._ready_s
        while True:
            await self._executor.converge(wanted, frozenset())
            seen = self._executor.seen()
            if seen.keys() == names and all(len(seen[name].ready) == 1 for name in names):
                break
            for name in names & seen.keys():
                _raise_refusal(seen[name].refusal)
            if self._clock.monotonic() > end:
                raise ServerFailedError(f"no server within {self._ready_s:g} s")
            await asyncio.sleep(LOOK_S)
        self._up = {
            one: seen[want.deployment, self._ref.version].ready[0]
            for one, want in zip(configurations, wanted, strict=True)
        }
        if self._up and not self.triton:
            self.triton = await _version(next(iter(self._up.values())))
        return list(self._up.values())

    def _times(self, endpoint: str) -> tuple[float, float, float]:
        """Processor time of the server and its model processes and of this process in seconds, and resident memory of the former in MiB."""
        own = sum(psutil.Process().cpu_times()[:2])
        port = int(endpoint.rpartition(":")[2])
        records = [Record.read(path) for path in (self._folder / "servers").glob("*.json")]
        cpu = memory = 0.0
        for record in records:
            if record is None or record.port != port:
                continue
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(record.pid)
                for process in (root, *root.children(recursive=True)):
                    cpu += sum(process.cpu_times()[:2])
                    memory += process.memory_info().rss / (1 << 20)
        return cpu, own, memory


async def _version(endpoint: str) -> str:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = await stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=METADATA_TIMEOUT_S)
    return str(found.version)


def _raise_refusal(refusal: Refusal | None) -> None:
    if refusal is None:
        return
    if refusal.reason == "ServerFailed":
        raise ServerFailedError(refusal.message)
    if refusal.permanent:
        raise FailedPreconditionError("MODEL_NOT_SERVED", f"{refusal.reason}: {refusal.message}")
    raise UnavailableError("NO_SERVER", f"{refusal.reason}: {refusal.message}")


def measured(server: Server) -> Server:
    """The block as it is measured: one server for one version, with what decides how it batches. Without the cache: it would answer repeated
    requests without the model.
    """
    return Server().model_copy(update={name: getattr(server, name) for name in MEASURED})


@contextlib.asynccontextmanager
async def running(executor: LocalExecutor, folder: Path) -> AsyncIterator[None]:
    """Have an executor of `private_executor` run; what an earlier tuner left is stopped with the first wish."""
    try:
        await executor.start()
        yield
    finally:
        await executor.close()
        await asyncio.to_thread(shutil.rmtree, folder / "files", ignore_errors=True)


def private_executor(folder: Path, settings: TritonSettings, source: ArtifactSource, clock: Clock) -> LocalExecutor:
    """An executor of the tuner's own; nothing is touched before it runs."""
    return LocalExecutor(folder, settings, Kept(source, folder / "files"), clock, drain_s=0.0, stop_on_close=True)


def _name(configuration: Configuration) -> str:
    digest = hashlib.sha256(configuration.words.encode()).hexdigest()[:8]
    return f"tune-{digest}-{os.getpid()}"
