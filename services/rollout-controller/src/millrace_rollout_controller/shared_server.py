"""A server that holds several versions of a model: a candidate joins what runs already, and leaves it again.

On one machine the controller does this itself, in a cluster the loader in the server's pod. The server has a repository of its own, which
begins empty. Versions are added one after the other, in the order in which they are wanted:
files with their digests proved, memory asked for, loaded by the server, warmed. A server that starts anew gets again what is wanted by then.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc.aio
from millrace_kit.clock import Clock
from millrace_kit.errors import DataLossError, FailedPreconditionError, MillraceError

from millrace_rollout_controller import memory, repository
from millrace_rollout_controller.executor import ArtifactSource, Wanted
from millrace_rollout_controller.plans import INSUFFICIENT_MEMORY, ArmSeen, Refusal
from millrace_rollout_controller.probe import Probe
from millrace_rollout_controller.replica import Record
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.settings import TritonSettings

log = logging.getLogger(__name__)
LOOK_S = 0.2
"""Time between two looks at what a server should hold."""
SHARED = "shared"
"""In a server's record, in the place of a version."""
RETRY_S = 2.0
"""Wait before a version that could not be loaded is tried again; doubles with each failure to load it."""
RETRY_MAX_S = 60.0
"""Longest such wait: a load that fails may take the server's process with it, and stable's calls."""
ARGUMENTS = ("--model-control-mode=explicit", "--strict-readiness=false", "--exit-on-error=false")
"""Of a server whose versions come and go: what cannot be loaded is nobody else's trouble."""


class Process(Protocol):
    """The server's process; on one machine a `Replica`."""

    @property
    def record(self) -> Record:
        """Which process it is: `pid` 0 for none."""
        ...

    @property
    def endpoint(self) -> str:
        """`host:port` of its gRPC."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it answers, whatever it holds."""
        ...

    @property
    def retiring(self) -> bool:
        """Whether it is on its way out."""
        ...

    @property
    def trouble(self) -> str:
        """Why it does not run."""
        ...


@dataclass
class _Held:
    """One version in one server."""

    want: Wanted
    probe: Probe
    ready: bool = False
    probed_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    idle_since: float | None = None
    """Since when no gateway may send calls for it here."""
    refusal: Refusal | None = None
    loaded: bool = False
    attempts: int = 0
    """Failed loads in a row."""


@dataclass
class SharedServer:
    """One server and what it holds; `run` is its life beside the process's own.

    Args:
        replica: the process.
        root: its model repository.
        source: where artifacts come from.
        flavour: how graphs run.
        settings: limits.
        clock: for waits.
        drain_s: how long a version stays after the last gateway forgot it.
        free_bytes: memory that one more version may take, asked in a thread; None measures the process, its limit and the machine.
    """

    replica: Process
    root: Path
    source: ArtifactSource
    flavour: repository.Flavour
    settings: TritonSettings
    clock: Clock
    drain_s: float
    free_bytes: Callable[[Server], int] | None = None
    wanted: Mapping[str, Wanted] = field(default_factory=dict)
    """By version, stable first."""
    in_use: frozenset[str] | None = None
    """As `Executor.converge` is told."""
    asleep: frozenset[str] = frozenset()
    """Versions that are not wanted now and known to have nothing under way: they need no time to drain."""
    turn: Callable[[Wanted], contextlib.AbstractAsyncContextManager[None]] | None = None
    """Of a server that holds other deployments' models too: around each load, instead of the look at its memory. Raises where there is no
    room."""
    held: dict[str, _Held] = field(default_factory=dict)
    """By version: what is in the server, and what is tried."""
    _process: tuple[int, float] = (0, 0.0)

    async def run(self) -> None:
        """Bring the server to what is wanted, again and again, until cancelled."""
        try:
            while True:
                try:
                    await self._look()
                except Exception:
                    log.exception("versions in server %s", self.replica.endpoint)
                await asyncio.sleep(LOOK_S)
        finally:
            for one in self.held.values():
                await one.probe.close()

    async def _look(self) -> None:
        record = self.replica.record
        if not self.replica.ready or not record.pid:
            for one in self.held.values():
                one.ready = False
            return
        if self._process != (record.pid, record.since):
            await self._begin((record.pid, record.since))
        for version, want in list(self.wanted.items()):
            if version not in self.held:
                self.held[version] = _Held(want, self._probe(want))
            one = self.held[version]
            one.want, one.idle_since = want, None
            if one.loaded:
                await self._watch(one)
            elif self.clock.monotonic() >= one.retry_at and not (one.refusal and one.refusal.permanent):
                await self._load(one)
        for version, one in list(self.held.items()):
            if version not in self.wanted and self._released(one):
                await self._unload(version, one)

    async def _begin(self, process: tuple[int, float]) -> None:
        """Another process than before: what it holds is what it says, which after a start is nothing.

        What could not be loaded waits on: it may be what ended the process before.
        """
        for version, one in list(self.held.items()):
            if one.refusal is None:
                await one.probe.close()
                del self.held[version]
        for version, want in self.wanted.items():
            if version not in self.held:
                await self._adopt(version, want)
        if self.wanted:
            await self._tidy()
        self._process = process

    async def _adopt(self, version: str, want: Wanted) -> None:
        probe = self._probe(want)
        try:
            if await probe.held(self.settings.probe_s):
                ready = await probe.ready(self.settings.probe_s)
                self.held[version] = _Held(want, probe, ready=ready, loaded=True)
        finally:
            if version not in self.held:
                await probe.close()

    async def _tidy(self) -> None:
        """Nothing may lie in the repository that the server does not hold: it would be loaded with the next version, unasked for."""
        here = {version: one for version, one in self.held.items() if one.loaded}
        model = next(iter(self.wanted.values())).ref.model
        if await asyncio.to_thread(repository.keep_versions, self.root, model, list(here)) and here:
            await next(iter(here.values())).probe.load(self.settings.start_timeout_s)

    def _probe(self, want: Wanted) -> Probe:
        return Probe(self.replica.endpoint, want.ref, shared=True)

    async def _watch(self, one: _Held) -> None:
        now = self.clock.monotonic()
        if now < one.probed_at + self.settings.probe_s:
            return
        one.probed_at = now
        one.failures = 0 if await one.probe.ready(self.settings.probe_s) else one.failures + 1
        one.ready = one.failures < 2

    async def _load(self, one: _Held) -> None:
        want = one.want
        try:
            async with self._its_turn(want):
                limit = self.settings.max_artifact_mib * 1024 * 1024
                await repository.add_version(self.root, want.ref, self.flavour, self.source, max_bytes=limit)
                await self._take_in(one)
        except DataLossError as error:
            one.refusal = Refusal("DataLoss", f"DATA_LOSS: {error.message}; not loaded", permanent=True)
        except FailedPreconditionError as error:
            held_back = error.reason == INSUFFICIENT_MEMORY
            one.refusal = Refusal(error.reason, error.message, permanent=not held_back)
        except MillraceError as error:
            one.refusal = Refusal("ArtifactUnavailable", error.message, permanent=False)
        except OSError as error:
            one.refusal = Refusal("RepositoryFailed", str(error)[:800], permanent=False)
        except grpc.aio.AioRpcError as error:
            one.refusal = Refusal("LoadFailed", " ".join((error.details() or "").split())[:800], permanent=False)
            one.attempts += 1
            log.warning("%s of %s is not loaded: %s", want.ref.version, want.ref.model, one.refusal.message)
            await self._take_out(one)
        else:
            one.refusal, one.loaded, one.ready, one.failures, one.attempts = None, True, True, 0, 0
            log.info("server %s holds %s %s", self.replica.endpoint, want.ref.model, want.ref.version)
        one.retry_at = self.clock.monotonic() + min(RETRY_S * 2 ** max(0, one.attempts - 1), RETRY_MAX_S)

    @contextlib.asynccontextmanager
    async def _its_turn(self, want: Wanted) -> AsyncIterator[None]:
        if self.turn is not None:
            async with self.turn(want):
                yield
        else:
            await asyncio.to_thread(self._check_memory, want)
            yield

    def _check_memory(self, want: Wanted) -> None:
        """Nothing is asked of a server that holds nothing yet: it was started to hold this."""
        if not any(one.loaded for one in self.held.values()):
            return
        needed = memory.needed_bytes(
            want.ref, want.server, factor=self.settings.memory_factor, base_mib=self.settings.memory_base_mib
        )
        if self.free_bytes is not None:
            free = self.free_bytes(want.server)
        else:
            free = memory.free_bytes(self.replica.record.pid, want.server.resources.limits.get("memory"))
        if free < needed:
            version, mib = want.ref.version, memory.MIB
            message = (
                f"{version} needs {needed // mib} MiB beside what the server holds, and {free // mib} MiB are free"
            )
            raise FailedPreconditionError(INSUFFICIENT_MEMORY, message, {"version": version})

    async def _take_in(self, one: _Held) -> None:
        await one.probe.load(self.settings.start_timeout_s)
        await one.probe.warm_up(
            requests=self.settings.warmup_requests,
            seconds=self.settings.warmup_s,
            timeout_s=self.settings.start_timeout_s,
        )

    async def _take_out(self, one: _Held) -> None:
        """Remove a version from the repository and from the server's memory; the others stay as they are."""
        await asyncio.to_thread(repository.remove_version, self.root, one.want.ref)
        timeout_s = self.settings.start_timeout_s
        with contextlib.suppress(grpc.aio.AioRpcError):
            if any(other.loaded for other in self.held.values() if other is not one):
                await one.probe.load(timeout_s)
            else:
                await one.probe.unload(timeout_s)

    def _released(self, one: _Held) -> bool:
        """Whether no gateway has sent calls for a version here for long enough."""
        place = f"{self.replica.endpoint}/{one.want.ref.model}/{one.want.ref.version}"
        if self.in_use is None or place in self.in_use:
            one.idle_since = None
            return False
        now = self.clock.monotonic()
        one.idle_since = now if one.idle_since is None else one.idle_since
        return not one.loaded or one.want.ref.version in self.asleep or now - one.idle_since >= self.drain_s

    async def _unload(self, version: str, one: _Held) -> None:
        """Let the version's last calls end, then its memory go; it counts as held until the server says so."""
        if one.loaded:
            one.ready = False
            await self._take_out(one)
            try:
                if await one.probe.held(self.settings.probe_s):
                    return
            except grpc.aio.AioRpcError:
                return
            log.info("server %s let %s %s go", self.replica.endpoint, one.want.ref.model, version)
        await one.probe.close()
        del self.held[version]

    @property
    def complete(self) -> bool:
        """Whether it holds what is wanted most, which is stable."""
        first = self.held.get(next(iter(self.wanted), ""))
        return self.replica.ready and first is not None and first.ready

    @property
    def settled(self) -> bool:
        """Whether it holds every version that is wanted, or said of it why not."""
        held = (self.held.get(version) for version in self.wanted)
        return all(one is not None and (one.ready or one.refusal is not None) for one in held)


def arms(servers: Sequence[SharedServer], wanted: Sequence[str]) -> dict[str, ArmSeen]:
    """What is seen of each version in a deployment's servers.

    Args:
        servers: all of the deployment's, those on their way out too.
        wanted: versions that should be in them.
    """
    found = {}
    for version in {*wanted, *(version for server in servers for version in server.held)}:
        mine = [(server, one) for server in servers if (one := server.held.get(version)) is not None]
        standing = [(server, one) for server, one in mine if not server.replica.retiring]
        ready = tuple(sorted(s.replica.endpoint for s, one in standing if one.ready and s.replica.ready))
        refusal = next((one.refusal for _, one in standing if one.refusal is not None), None)
        trouble = next((s.replica.trouble for s in servers if s.replica.trouble and not s.replica.ready), "")
        if refusal is None and trouble and version in wanted:
            refusal = Refusal("ServerFailed", trouble, permanent=False)
        holding = len(servers) if version in wanted else sum(one.loaded for _, one in mine)
        found[version] = ArmSeen(ready, holding, refusal)
    return found
