"""One model server process from start to end: started or adopted, warmed, watched, restarted, stopped.

Its record on disk (id, port, process) is written before the process starts, so that a controller that was killed at any point finds the
process again, by number and start time or by the id on its command line.
"""

import asyncio
import contextlib
import json
import logging
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc.aio

from millrace_rollout_controller import triton
from millrace_rollout_controller.metrics import SERVER_RESTARTS
from millrace_rollout_controller.probe import Probe
from millrace_rollout_controller.settings import TritonSettings
from millrace_rollout_controller.state import VersionRef

log = logging.getLogger(__name__)
WATCH_S = 0.2
"""Time between two looks whether a process lives."""
STEADY_S = 60.0
"""A server that lived this long starts its backoff anew."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is on disk about one server."""

    id: str
    deployment: str
    model: str
    version: str
    key: str
    port: int
    pid: int = 0
    since: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record in a file; None when it is no record."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Replica:
    """One server; `run` is its life as a background task.

    Args:
        record: as on disk.
        ref: the version it serves; None for a leftover that is only stopped.
        folder: where records and logs are.
        prepare: makes the model repository ready and names its folder; raises when it cannot.
        choose_port: a free port, given the one wanted.
        arguments: of the server's command line, beside those every server has.
        shared: whether versions come and go in it; then it is ready when it answers at all.
    """

    def __init__(
        self,
        record: Record,
        ref: VersionRef | None,
        *,
        folder: Path,
        parts: triton.Triton,
        settings: TritonSettings,
        prepare: Callable[[], Awaitable[Path]],
        choose_port: Callable[[int], int],
        arguments: Sequence[str] = (),
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self._arguments = arguments
        self.record = record
        self.ref = ref
        self.ready = False
        self.retiring = False
        self.idle_since: float | None = None
        """Since when no gateway may send to it, by the executor's clock."""
        self.trouble = ""
        """Why the last start failed."""
        self._folder = folder
        self._parts = parts
        self._settings = settings
        self._prepare = prepare
        self._choose_port = choose_port
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = asyncio.Event()

    @property
    def endpoint(self) -> str:
        """`host:port` of the server's gRPC."""
        return f"{self._settings.host}:{self.record.port}"

    @property
    def log_path(self) -> Path:
        """Where the server writes."""
        return self._folder / "logs" / f"{self.record.model}-{self.record.version}-{self.record.id}.log"

    def alive(self) -> bool:
        """Whether its process runs."""
        if self._child is not None:
            return self._child.poll() is None
        return triton.runs(self.record.pid, self.record.since)

    def stop(self) -> None:
        """Make `run` stop the process and end."""
        self._stop.set()

    async def run(self) -> None:
        """Keep the server running until `stop`; cancelling leaves the process as it is."""
        await asyncio.to_thread(self._adopt)
        backoff = self._settings.backoff_s
        while not self._stop.is_set():
            lived = await self._one_life()
            self.ready = False
            if self._stop.is_set():
                break
            SERVER_RESTARTS.labels(self.record.model, self.record.version).inc()
            backoff = self._settings.backoff_s if lived > STEADY_S else backoff
            await self._wait(backoff)
            backoff = min(backoff * 2, self._settings.backoff_max_s)
        self.ready = False
        await self._end()
        await asyncio.to_thread(self._forget)

    async def _one_life(self) -> float:
        """Start (unless adopted), warm and watch one process; returns how long it was ready. Sets `trouble` when it failed."""
        clock = asyncio.get_running_loop().time
        try:
            if not self.alive():
                await self._start()
            if not await self._become_ready():
                await self._end()
                return 0.0
        except Exception as error:
            self.trouble = str(error) or type(error).__name__
            log.warning("server %s of %s does not start: %s", self.record.id, self.record.version, self.trouble)
            await self._end()
            return 0.0
        since = clock()
        self.ready, self.trouble = True, ""
        log.info("server %s of %s %s is ready", self.endpoint, self.record.model, self.record.version)
        await self._watch()
        return clock() - since

    def _adopt(self) -> None:
        if self.record.pid and triton.runs(self.record.pid, self.record.since):
            return
        found = triton.find(self.record.id)
        since = triton.started_at(found) if found is not None else None
        if found is not None and since is not None:
            self._keep(replace(self.record, pid=found, since=since))

    async def _start(self) -> None:
        repository = await self._prepare()
        port = await asyncio.to_thread(self._choose_port, self.record.port)
        await asyncio.to_thread(self._spawn, repository, port)

    def _spawn(self, repository: Path, port: int) -> None:
        triton.sweep(self.record.pid, self.record.since, self.record.id)
        self._keep(replace(self.record, port=port, pid=0, since=0.0))
        self._child = self._parts.start(
            self.record.id, repository, self._settings.host, port, self.log_path, arguments=self._arguments
        )
        since = triton.started_at(self._child.pid)
        self._keep(replace(self.record, pid=self._child.pid, since=since or 0.0))

    async def _become_ready(self) -> bool:
        """Wait until the model is loaded and answers steadily; says in `trouble` why it does not."""
        if self.ref is None:
            return True
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._settings.start_timeout_s
        probe = Probe(self.endpoint, self.ref)
        try:
            while not await self._answers(probe):
                if self._stop.is_set():
                    return False
                if not await asyncio.to_thread(self.alive):
                    self.trouble = f"the server ended: {await asyncio.to_thread(triton.last_lines, self.log_path)}"
                    return False
                if clock() > deadline:
                    self.trouble = f"not ready after {self._settings.start_timeout_s:g} s"
                    return False
                await self._wait(WATCH_S / 4)
            if self._shared:
                return True
            try:
                await probe.warm_up(
                    requests=self._settings.warmup_requests,
                    seconds=self._settings.warmup_s,
                    timeout_s=self._settings.start_timeout_s,
                )
            except grpc.aio.AioRpcError as error:
                self.trouble = f"it does not answer its own signature: {error.details()}"
                return False
            return True
        finally:
            await probe.close()

    async def _answers(self, probe: Probe) -> bool:
        timeout_s = self._settings.probe_s
        return await (probe.live(timeout_s) if self._shared else probe.ready(timeout_s))

    async def _watch(self) -> None:
        """Until the process ends, stops answering or is told to stop."""
        clock = asyncio.get_running_loop().time
        if self.ref is None:
            await self._stop.wait()
            return
        probe = Probe(self.endpoint, self.ref)
        failures, next_probe = 0, clock() + self._settings.probe_s
        try:
            while not self._stop.is_set():
                await self._wait(WATCH_S)
                if not await asyncio.to_thread(self.alive):
                    self.trouble = f"the server ended: {await asyncio.to_thread(triton.last_lines, self.log_path)}"
                    log.warning("server %s of %s: %s", self.endpoint, self.record.version, self.trouble)
                    return
                if clock() < next_probe:
                    continue
                next_probe = clock() + self._settings.probe_s
                failures = 0 if await self._answers(probe) else failures + 1
                self.ready = failures < 2
                if failures >= self._settings.probe_failures:
                    self.trouble = f"it left {failures} readiness questions unanswered"
                    await self._end()
                    return
                await asyncio.to_thread(triton.trim, self.log_path)
        finally:
            await probe.close()

    async def _end(self) -> None:
        """SIGTERM, wait, SIGKILL, and clear away what is left."""
        record = self.record
        await asyncio.to_thread(triton.terminate, record.pid, record.since)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.stop_timeout_s
        while await asyncio.to_thread(self.alive) and loop.time() < deadline:  # noqa: ASYNC110 - a process gives no event
            await asyncio.sleep(0.05)
        await asyncio.to_thread(triton.sweep, record.pid, record.since, record.id)
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)
            self._child = None

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _keep(self, record: Record) -> None:
        self.record = record
        path = self._folder / f"{record.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(asdict(record)), encoding="utf-8")
        scratch.replace(path)

    def _forget(self) -> None:
        (self._folder / f"{self.record.id}.json").unlink(missing_ok=True)
        self.log_path.unlink(missing_ok=True)
