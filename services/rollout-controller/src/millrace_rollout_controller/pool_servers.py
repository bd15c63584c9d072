"""Pools on this machine: one Triton each, in which the models of many deployments are loaded and unloaded.

Which ones is decided elsewhere (`pool_plan`); here each deployment's versions in the server are a `SharedServer` of their own, around one
process. Loads take turns, so that what a load adds to the process's memory is that model's.
"""

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from uuid import uuid4

import grpc.aio
from millrace_kit.clock import Clock
from millrace_kit.errors import FailedPreconditionError

from millrace_rollout_controller import memory, metrics, repository, shared_server, triton
from millrace_rollout_controller.executor import ArtifactSource, PoolSeen, Wanted
from millrace_rollout_controller.kept_files import KeptFiles
from millrace_rollout_controller.plans import INSUFFICIENT_MEMORY, ArmSeen
from millrace_rollout_controller.probe import Probe
from millrace_rollout_controller.replica import Record, Replica
from millrace_rollout_controller.settings import TritonSettings
from millrace_rollout_controller.shared_server import SharedServer

log = logging.getLogger(__name__)
POOL = "pool"
"""In a server's record, in the place of a version; the pool's name stands in those of the deployment and of the model."""
MEASURE_S = 1.0
"""Time between two looks at the memory of a pool's server."""


@dataclass
class _Ledger:
    """What was measured of a pool's server; on disk, for the next controller."""

    pid: int = 0
    empty_bytes: int = 0
    """What this process takes without any model."""
    measured: dict[str, int] = field(default_factory=dict)
    """Bytes by digest of a version: the most that one of its loads added."""

    @classmethod
    def read(cls, path: Path) -> "_Ledger":
        """What a file says; nothing when it is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        """Keep it, whole or not at all."""
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(asdict(self)), encoding="utf-8")
        scratch.replace(path)


@dataclass
class _Pool:
    """One pool's server."""

    replica: Replica
    root: Path
    adopted: bool
    """An earlier controller started it, and it may hold what nobody wants any more."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    members: dict[str, SharedServer] = field(default_factory=dict)
    """By deployment."""
    lives: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    wanted: Sequence[Wanted] = ()
    ledger: _Ledger = field(default_factory=_Ledger)
    used_bytes: int = 0
    free_bytes: int = 0
    measured_for: frozenset[tuple[str, str]] | None = None
    """What was loaded when the memory was measured last; None is never."""
    measured_at: float = 0.0

    @property
    def loaded(self) -> frozenset[tuple[str, str]]:
        """What is in the server, by deployment and version."""
        return frozenset((d, v) for d, m in self.members.items() for v, one in m.held.items() if one.loaded)


class PoolServers:
    """Starts, adopts, fills and stops the pools' servers.

    Args:
        folder: everything it keeps.
        settings: limits.
        source: where artifacts come from.
        flavour: how graphs run.
        clock: for waits.
        drain_s: how long a version that was not asleep stays after the last gateway forgot it.
        taken: ports of other servers.
    """

    def __init__(
        self,
        folder: Path,
        settings: TritonSettings,
        source: ArtifactSource,
        flavour: repository.Flavour,
        clock: Clock,
        *,
        drain_s: float,
        taken: Callable[[], Iterable[int]],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._source = KeptFiles(folder / "files", source)
        self._flavour = flavour
        self._clock = clock
        self._drain_s = drain_s
        self._taken = taken
        self._parts: triton.Triton | None = None
        self._pools: dict[str, _Pool] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._left: list[Record] = []
        self._digests: set[str] = set()

    def start(self, parts: triton.Triton) -> None:
        """Read the records of servers an earlier process left. Blocking."""
        self._parts = parts
        paths = sorted((self._folder / "servers").glob("*.json"))
        self._left = [record for path in paths if (record := Record.read(path)) is not None]

    @property
    def ports(self) -> list[int]:
        """Of its servers."""
        return [pool.replica.record.port for pool in self._pools.values()]

    def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """As `Executor.converge`, of deployments in pools; a version that should not be loaded now is named with 0 replicas."""
        self._reap()
        by_pool: dict[str, list[Wanted]] = {}
        for want in wanted:
            if want.server.pool is not None:
                by_pool.setdefault(want.server.pool.name, []).append(want)
        for name, mine in by_pool.items():
            if name not in self._pools:
                self._open(name, mine)
            self._fill(self._pools[name], mine, in_use)
        for name in self._pools.keys() - by_pool.keys():
            self._fill(self._pools[name], [], in_use)
            if not self._pools[name].members:
                self._pools[name].replica.stop()
        for record in self._left:
            # Of a pool that nobody names any more; its models have no callers.
            triton.sweep(record.pid, record.since, record.id)
            (self._folder / "servers" / f"{record.id}.json").unlink(missing_ok=True)
        self._left = []
        digests = {artifact.sha256 for want in wanted for artifact in want.ref.artifacts}
        if digests != self._digests:
            self._digests = digests
            self._source.forget_all_but(digests)

    def seen(self) -> dict[tuple[str, str], ArmSeen]:
        """As `Executor.seen`."""
        found: dict[tuple[str, str], ArmSeen] = {}
        for pool in self._pools.values():
            for deployment, member in pool.members.items():
                arms = shared_server.arms([member], list(member.wanted))
                found |= {(deployment, version): arm for version, arm in arms.items()}
        return found

    def pools(self) -> dict[str, PoolSeen]:
        """See `Executor.pools`."""
        return {
            name: PoolSeen(
                {(want.deployment, want.ref.version): self._size(pool, want) for want in pool.wanted},
                pool.used_bytes,
                pool.free_bytes,
                fresh=pool.measured_for == pool.loaded,
            )
            for name, pool in self._pools.items()
        }

    async def close(self, *, stop: bool) -> None:
        """End the background work, and with `stop` the servers."""
        if stop:
            for pool in self._pools.values():
                pool.replica.stop()
            if self._tasks:
                await asyncio.wait(self._tasks.values(), timeout=self._settings.stop_timeout_s * 2)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _open(self, name: str, wanted: Sequence[Wanted]) -> None:
        if self._parts is None:
            raise RuntimeError("start() comes first")
        left = next((record for record in self._left if record.deployment == name), None)
        if left is not None:
            self._left.remove(left)
        record = left or Record(f"mr{uuid4().hex[:12]}", name, name, POOL, POOL, 0)
        root = self._folder / "repositories" / record.id
        replica = Replica(
            record,
            wanted[0].ref,
            folder=self._folder / "servers",
            parts=self._parts,
            settings=self._settings,
            prepare=partial(self._prepare, root),
            choose_port=self._choose_port,
            arguments=shared_server.ARGUMENTS,
            shared=True,
        )
        self._pools[name] = pool = _Pool(
            replica, root, adopted=left is not None, ledger=_Ledger.read(self._ledger(name))
        )
        self._tasks[name] = asyncio.create_task(self._live(name, pool), name=f"pool {name}")

    def _fill(self, pool: _Pool, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        pool.wanted = wanted
        for deployment in {want.deployment for want in wanted} - pool.members.keys():
            pool.members[deployment] = SharedServer(
                pool.replica, pool.root, self._source, self._flavour, self._settings, self._clock, self._drain_s,
                turn=partial(self._turn, pool),
            )  # fmt: skip
        for deployment, member in list(pool.members.items()):
            mine = [want for want in wanted if want.deployment == deployment]
            member.in_use = in_use
            member.wanted = {want.ref.version: want for want in mine if want.replicas}
            member.asleep = frozenset(want.ref.version for want in mine if not want.replicas)
            if not mine and not member.held:
                del pool.members[deployment]
                if (life := pool.lives.pop(deployment, None)) is not None:
                    life.cancel()
        self._enliven(pool)

    async def _live(self, name: str, pool: _Pool) -> None:
        """The process's life, and beside it those of the deployments' versions in it."""
        inside = asyncio.create_task(self._inside(pool), name=f"models in pool {name}")
        try:
            await pool.replica.run()
        finally:
            inside.cancel()
            await asyncio.gather(inside, *pool.lives.values(), return_exceptions=True)

    async def _inside(self, pool: _Pool) -> None:
        try:
            while True:
                pid = pool.replica.record.pid
                if pool.replica.ready and pid:
                    if pool.adopted:
                        pool.adopted = not await self._clear(pool)
                    stale = pool.measured_for != pool.loaded or self._clock.monotonic() - pool.measured_at >= MEASURE_S
                    # While a model is loaded its turn measures.
                    if stale and not pool.turn.locked():
                        await asyncio.to_thread(self._measure, pool, pid)
                    self._enliven(pool)
                await asyncio.sleep(shared_server.LOOK_S)
        finally:
            for life in pool.lives.values():
                life.cancel()

    def _enliven(self, pool: _Pool) -> None:
        """Let every deployment's versions begin; in an adopted server only when it holds nothing else any more."""
        for deployment in [] if pool.adopted or pool.measured_for is None else pool.members.keys() - pool.lives.keys():
            life = asyncio.create_task(pool.members[deployment].run(), name=f"{deployment} in a pool")
            pool.lives[deployment] = life

    async def _clear(self, pool: _Pool) -> bool:
        """Unload models of an adopted server that are nobody's any more; those of the others are their `SharedServer`'s to tidy."""
        wanted = {want.ref.model for want in pool.wanted if want.replicas}
        probe = Probe(pool.replica.endpoint, pool.wanted[0].ref) if pool.wanted else None
        if probe is None:
            return False
        try:
            for model in await probe.models(self._settings.probe_s) - wanted:
                await probe.unload(self._settings.start_timeout_s, model=model)
                await asyncio.to_thread(shutil.rmtree, pool.root / model, ignore_errors=True)
        except grpc.aio.AioRpcError as error:
            log.warning("pool server %s cannot be tidied now: %s", pool.replica.endpoint, error.details())
            return False
        finally:
            await probe.close()
        return True

    @contextlib.asynccontextmanager
    async def _turn(self, pool: _Pool, want: Wanted) -> AsyncIterator[None]:
        async with pool.turn:
            pid = pool.replica.record.pid
            needed = self._size(pool, want)
            before = await asyncio.to_thread(self._measure, pool, pid)
            if pool.free_bytes < needed:
                mib, version = memory.MIB, want.ref.version
                message = f"{version} needs {needed // mib} MiB, and {pool.free_bytes // mib} MiB of this machine's memory are free"
                raise FailedPreconditionError(INSUFFICIENT_MEMORY, message, {"version": version})
            await asyncio.to_thread(repository.open_model, pool.root, want.ref, want.server, self._flavour)
            began = self._clock.monotonic()
            yield
            metrics.POOL_LOADS.labels(pool.replica.record.model, want.ref.model).inc()
            metrics.POOL_LOAD_SECONDS.labels(pool.replica.record.model).observe(self._clock.monotonic() - began)
            after = await asyncio.to_thread(self._measure, pool, pid)
            known = pool.ledger.measured.get(want.ref.digest, 0)
            pool.ledger.measured[want.ref.digest] = max(known, after - before)
            await asyncio.to_thread(pool.ledger.write, self._ledger(pool.replica.record.model))

    def _measure(self, pool: _Pool, pid: int) -> int:
        """Bytes that the process and its children take now."""
        loaded = pool.loaded
        total, ledger = memory.used_bytes(pid), pool.ledger
        if ledger.pid != pid:
            ledger.pid, ledger.empty_bytes = pid, total
        pool.used_bytes = max(0, total - ledger.empty_bytes)
        pool.free_bytes = memory.free_bytes(pid, None)
        pool.measured_for, pool.measured_at = loaded, self._clock.monotonic()
        return total

    def _size(self, pool: _Pool, want: Wanted) -> int:
        """Bytes that a version takes: what was declared or measured, whichever is more; else by its files."""
        measured = pool.ledger.measured.get(want.ref.digest, 0)
        if measured and want.server.memory_mib is None:
            return measured
        settings = self._settings
        said = memory.needed_bytes(
            want.ref, want.server, factor=settings.memory_factor, base_mib=settings.memory_base_mib
        )
        return max(said, measured)

    async def _prepare(self, root: Path) -> Path:
        """An empty repository; models are added while the server runs."""
        await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
        root.mkdir(parents=True)
        return root

    def _ledger(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _choose_port(self, wanted: int) -> int:
        mine = [pool.replica.record.port for pool in self._pools.values() if pool.replica.record.port != wanted]
        return triton.free_port(self._settings.host, frozenset([*self._taken(), *mine]), wanted)

    def _reap(self) -> None:
        """Let go of pools whose server has ended."""
        for name in [name for name, task in self._tasks.items() if task.done()]:
            task, pool = self._tasks.pop(name), self._pools.pop(name)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("pool %s", name, exc_info=error)
            shutil.rmtree(pool.root, ignore_errors=True)
