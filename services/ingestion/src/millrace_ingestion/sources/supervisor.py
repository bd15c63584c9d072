"""Keeps every source running that should: reads what is registered, starts, stops and tries again."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from millrace_kit.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    MillraceError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

from millrace_ingestion import metrics
from millrace_ingestion.sources.lease import Lease
from millrace_ingestion.sources.specs import FileSpec, Progress, Source, Standing, State
from millrace_ingestion.sources.store import SourceStore

log = logging.getLogger(__name__)

RETRY_MIN_S = 0.2
# Reasons that a new attempt settles: another process read on meanwhile.
_PASSING = {"SOURCE_MOVED", "OFFSET_OUT_OF_ORDER"}


class Runner(Protocol):
    """One attempt at reading a source."""

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop` is set, or until there is nothing more to do."""
        ...


@dataclass(frozen=True)
class SupervisorLimits:
    """See the settings of the same names."""

    max_sources: int
    poll_s: float
    retry_max_s: float


@dataclass
class _Running:
    source: Source
    standing: Standing
    progress: Progress
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Supervisor:
    """All sources of one process.

    Args:
        store: what is registered.
        lease: whether this process may read.
        prepare: makes sure that a source can be read beside the others that are registered, by this service's settings; raises when not.
        make_runner: makes one attempt.
        limits: sizes and waits.
    """

    def __init__(
        self,
        store: SourceStore,
        lease: Lease,
        *,
        prepare: Callable[[Source, Mapping[str, Source]], Awaitable[None]],
        make_runner: Callable[[Source, Standing, Progress], Runner],
        limits: SupervisorLimits,
    ) -> None:
        self._store = store
        self._lease = lease
        self._prepare = prepare
        self._make_runner = make_runner
        self._limits = limits
        self._running: dict[str, _Running] = {}
        self._progress: dict[str, Progress] = {}
        self._awake = asyncio.Event()
        self._registering = asyncio.Lock()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep sources running until `stop` is set."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._awake.clear()
                try:
                    await self._follow()
                except UnavailableError as error:
                    log.warning("what is registered is not known now: %s", error)
                waking = asyncio.create_task(self._awake.wait())
                await asyncio.wait([stopping, waking], timeout=self._limits.poll_s, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
        finally:
            stopping.cancel()
            await asyncio.gather(*(self._end(one) for one in list(self._running.values())))
            with contextlib.suppress(UnavailableError):
                await asyncio.to_thread(self._lease.release)

    async def _follow(self) -> None:
        """Let run exactly what should."""
        wanted = await asyncio.to_thread(self._store.sources) if await asyncio.to_thread(self._lease.hold) else {}
        for name, one in list(self._running.items()):
            found = wanted.get(name)
            over = found is None or found[1].state is not State.RUNNING
            if over or (found[0].version, found[1].turn) != (one.source.version, one.standing.turn):  # type: ignore[index]
                await self._end(one)
                del self._running[name]
        self._progress = {name: one for name, one in self._progress.items() if name in wanted}
        for name, (source, standing) in wanted.items():
            if standing.state is State.RUNNING and name not in self._running:
                progress = self._progress.setdefault(name, Progress())
                progress.trouble = ""
                one = _Running(source, standing, progress)
                self._running[name] = one
                one.task = asyncio.create_task(self._keep(one), name=f"source-{name}")

    async def _end(self, one: _Running) -> None:
        one.stop.set()
        if one.task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await one.task

    async def _keep(self, one: _Running) -> None:
        """Try again until the source is stopped, is done, or only people can settle its trouble."""
        name = one.source.name
        retry_s = RETRY_MIN_S
        while not one.stop.is_set():
            settled = one.progress.settled
            try:
                await self._make_runner(one.source, one.standing, one.progress).run(one.stop)
            except Exception as error:
                trouble = _as_trouble(error)
                metrics.SOURCE_TROUBLES.labels(name, trouble.reason).inc()
                log.warning("source %s: %s", name, trouble, exc_info=error if trouble is not error else None)
                if isinstance(trouble, FailedPreconditionError | InvalidArgumentError | NotFoundError) and (
                    trouble.reason not in _PASSING
                ):
                    await self._fail(name, trouble)
                    return
                one.progress.trouble = f"{trouble.reason}: {trouble.message}"
                if one.progress.settled > settled:
                    retry_s = RETRY_MIN_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await one.stop.wait()
                retry_s = min(self._limits.retry_max_s, retry_s * 2)
            else:
                return

    async def _fail(self, name: str, trouble: MillraceError) -> None:
        try:
            text = f"{trouble.reason}: {trouble.message}"
            await asyncio.to_thread(self._store.set_state, name, State.FAILED, text)
        except MillraceError as error:
            log.warning("source %s: its failure is not kept: %s", name, error)

    async def register(self, source: Source) -> tuple[Source, bool]:
        """Keep a source and let it run; an equal one is found again. Returns it with its version, and whether that is new.

        Raises:
            FailedPreconditionError: the settings do not allow it, or it would change what cannot change.
            ResourceExhaustedError: `max_sources` are there.
        """
        async with self._registering:
            there = await asyncio.to_thread(self._store.sources)
            await self._prepare(source, {name: one for name, (one, _standing) in there.items()})
            known = there.get(source.name)
            if known is not None:
                current, standing = known
                if source == replace(current, version=0, registered_at=None):
                    if standing.state in {State.FAILED, State.DONE}:
                        await self._set(source.name, State.RUNNING, turn=True)
                    return current, False
                _check_change(current, source)
            elif len(there) >= self._limits.max_sources:
                raise ResourceExhaustedError("max_sources", f"{len(there)} sources are registered")
            added = await asyncio.to_thread(self._store.add, source)
            self._awake.set()
            return added, True

    async def list(self, name: str) -> list[tuple[Source, Standing, Progress]]:
        """Every source, or the one of that name, and how it is doing.

        Raises:
            NotFoundError: there is none of that name.
        """
        found = await asyncio.to_thread(self._store.sources)
        if name and name not in found:
            raise NotFoundError("source", name)
        return [
            (source, standing, self._progress.get(key) or Progress())
            for key, (source, standing) in found.items()
            if not name or key == name
        ]

    async def pause(self, name: str) -> None:
        """Stop reading until it is resumed; where this process reads it, nothing lands once this returns."""
        await self._set(name, State.PAUSED)
        await self._end_now(name)

    async def resume(self, name: str) -> None:
        """Read on; what failed is tried again."""
        await asyncio.to_thread(self._store.forget_errors, name)
        await self._set(name, State.RUNNING, turn=True)

    async def look(self, name: str) -> None:
        """Look for new files now.

        Raises:
            FailedPreconditionError: the source reads topics, or is paused.
        """
        ((source, standing, _progress),) = await self.list(name)
        if not isinstance(source.spec, FileSpec):
            raise FailedPreconditionError("NOT_A_FILE_SOURCE", f"source {name!r} reads all the time")
        if standing.state is State.PAUSED:
            raise FailedPreconditionError("SOURCE_PAUSED", f"source {name!r} is paused; resume it")
        await self._set(name, State.RUNNING, turn=True)

    async def remove(self, name: str) -> None:
        """Forget a source. What it landed stays, and how far it read: under the same name it goes on there."""
        await self._set(name, State.REMOVED)
        await self._end_now(name)

    async def _end_now(self, name: str) -> None:
        if name in self._running:
            await asyncio.shield(self._end(self._running[name]))

    async def _set(self, name: str, state: State, *, turn: bool = False) -> None:
        await asyncio.to_thread(lambda: self._store.set_state(name, state, turn=turn))
        self._awake.set()


def _check_change(current: Source, source: Source) -> None:
    if current.contract != source.contract or type(current.spec) is not type(source.spec):
        raise FailedPreconditionError(
            "SOURCE_IDENTITY",
            f"source {source.name!r} reads into {current.contract!r}; its contract and kind stay: register another name",
            {"source": source.name, "contract": current.contract},
        )


def _as_trouble(error: Exception) -> MillraceError:
    if isinstance(error, MillraceError | ConflictError):
        return error
    if isinstance(error, ExceptionGroup):
        return _as_trouble(error.exceptions[0])
    return UnavailableError("SOURCE_FAILED", f"{type(error).__name__}: {error}")
