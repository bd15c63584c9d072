"""The executor of one machine: each replica is a tritonserver process."""

import asyncio
import contextlib
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from millrace_kit.clock import Clock
from millrace_kit.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, MillraceError
from pydantic.alias_generators import to_camel

from millrace_rollout_controller import repository, shared_server, triton
from millrace_rollout_controller.capacity import most
from millrace_rollout_controller.executor import ArtifactSource, PoolSeen, Wanted
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.pool_servers import PoolServers
from millrace_rollout_controller.reconciler import ArmSeen, Refusal
from millrace_rollout_controller.replica import Record, Replica
from millrace_rollout_controller.settings import TritonSettings
from millrace_rollout_controller.shared_server import SHARED, SharedServer

log = logging.getLogger(__name__)
_ONLY_IN_A_CLUSTER = (
    "node_selector", "tolerations", "affinity", "topology_spread_constraints", "runtime_class_name",
    "priority_class_name",
)  # fmt: skip
REFUSAL_RETRY_S = 2.0
"""Wait before a version whose repository could not be written is tried again."""


class LocalExecutor:
    """Starts, adopts and stops model servers on this machine.

    Args:
        folder: everything it keeps: repositories, records, logs.
        settings: limits.
        source: where artifacts come from.
        clock: for waits.
        drain_s: how long a server stays up after the last gateway forgot it.
        stop_on_close: whether `close` stops the servers.
    """

    def __init__(
        self,
        folder: Path,
        settings: TritonSettings,
        source: ArtifactSource,
        clock: Clock,
        *,
        drain_s: float,
        stop_on_close: bool,
    ) -> None:
        self._folder = folder.absolute()
        self._settings = settings
        self._source = source
        self._clock = clock
        self._drain_s = drain_s
        self._stop_on_close = stop_on_close
        self._flavour = repository.Flavour(threads=settings.onnx_threads)
        self._parts: triton.Triton | None = None
        self._replicas: dict[str, Replica] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._refusals: dict[tuple[str, str], Refusal] = {}
        self._shared: dict[str, SharedServer] = {}
        self._wanted: Sequence[Wanted] = ()
        self._left: list[Record] = []
        self._kept: frozenset[str] = frozenset()
        """Repositories of what is wanted, be it with no servers for now: a wake needs no registry."""
        self._pools = PoolServers(
            self._folder / "pools",
            settings,
            source,
            self._flavour,
            clock,
            drain_s=drain_s,
            taken=lambda: [replica.record.port for replica in list(self._replicas.values())],
        )

    def check(self, spec: Spec) -> None:
        """Refuse GPUs, autoscaling but to none and back, nodes, and more servers than the limit."""
        scaling = spec.server.autoscaling
        if scaling is not None and (scaling.min_replicas != 0 or most(spec.server) != spec.server.replicas):
            message = "on this machine is for sleep alone: minReplicas 0, and no maxReplicas above spec.server.replicas"
            raise InvalidArgumentError("spec.server.autoscaling", message)
        for field in _ONLY_IN_A_CLUSTER:
            if getattr(spec.server, field):
                raise InvalidArgumentError(f"spec.server.{to_camel(field)}", "is not available on this machine")
        for kind in ("limits", "requests"):
            for name, amount in getattr(spec.server.resources, kind).items():
                if re.search(r"gpu", name, re.IGNORECASE) and str(amount) != "0":
                    raise InvalidArgumentError(
                        f"spec.server.resources.{kind}[{name}]", "GPUs are not available on this machine"
                    )
        # A rollout needs the candidate's servers beside stable's, or a change of their kind new ones.
        if 2 * spec.server.replicas > self._settings.max_servers:
            raise InvalidArgumentError(
                "spec.server.replicas",
                f"needs twice as many servers, more than max_servers ({self._settings.max_servers})",
            )

    async def start(self) -> None:
        """Lay out Triton's parts and read the records of servers an earlier process left."""
        self._parts = await asyncio.to_thread(triton.Triton.prepare, self._folder / "triton")
        paths = sorted((self._folder / "servers").glob("*.json"))
        self._left = [record for path in paths if (record := Record.read(path)) is not None]
        await asyncio.to_thread(self._pools.start, self._parts)

    async def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """See `Executor.converge`."""
        self._reap()
        self._pools.converge([want for want in wanted if want.server.pool is not None], in_use)
        wanted = [want for want in wanted if want.server.pool is None]
        self._wanted = [want for want in wanted if want.replicas]
        names = {(want.deployment, _place(want)) for want in wanted}
        keys = await asyncio.to_thread(self._keys, wanted)
        self._adopt_left(wanted, keys)
        self._kept = frozenset(keys)
        for want, key in _groups(wanted, keys):
            self._converge_one(want, key)
        for replica in self._replicas.values():
            if (replica.record.deployment, replica.record.version) not in names:
                replica.retiring = True
        for name in self._refusals.keys() - names:
            del self._refusals[name]
        for server in self._shared.values():
            server.in_use = in_use
            if not server.replica.retiring:
                mine = [want for want in self._wanted if want.deployment == server.replica.record.deployment]
                server.wanted = {want.ref.version: want for want in mine}
        self._stop_idle(in_use)

    def seen(self) -> Mapping[tuple[str, str], ArmSeen]:
        """See `Executor.seen`."""
        groups: dict[tuple[str, str], list[Replica]] = {}
        for replica in self._replicas.values():
            groups.setdefault((replica.record.deployment, replica.record.version), []).append(replica)
        found: dict[tuple[str, str], ArmSeen] = {}
        for name in {n for n in groups if n[1] == SHARED}:
            mine = [self._shared[replica.record.id] for replica in groups.pop(name)]
            wanted = [want.ref.version for want in self._wanted if want.deployment == name[0]]
            found |= {(name[0], version): arm for version, arm in shared_server.arms(mine, wanted).items()}
        for name in groups.keys() | self._refusals.keys():
            replicas = groups.get(name, [])
            ready = tuple(sorted(r.endpoint for r in replicas if r.ready and not r.retiring))
            trouble = next((r.trouble for r in replicas if r.trouble and not r.ready), "")
            refusal = self._refusals.get(name)
            if refusal is None and trouble:
                refusal = Refusal("ServerFailed", trouble, permanent=False)
            found[name] = ArmSeen(ready, len(replicas), refusal)
        return found | self._pools.seen()

    def pools(self) -> Mapping[str, PoolSeen]:
        """See `Executor.pools`."""
        return self._pools.pools()

    async def close(self) -> None:
        """End the background work; the servers too, unless they are to go on."""
        await self._pools.close(stop=self._stop_on_close)
        if self._stop_on_close:
            for replica in self._replicas.values():
                replica.stop()
            if self._tasks:
                await asyncio.wait(self._tasks.values(), timeout=self._settings.stop_timeout_s * 2)
            for record in self._left:
                await asyncio.to_thread(triton.sweep, record.pid, record.since, record.id)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _keys(self, wanted: Sequence[Wanted]) -> list[str]:
        return [repository.key(want.ref, want.server, self._flavour) for want in wanted]

    def _adopt_left(self, wanted: Sequence[Wanted], keys: Sequence[str]) -> None:
        """Make replicas of the records an earlier process left; what nobody wants any more is stopped like any other."""
        by_key = {(want.deployment, _place(want), key): want for want, key in zip(wanted, keys, strict=True)}
        for record in self._left:
            want = by_key.get((record.deployment, record.version, record.key))
            self._add(record, want)
        self._left = []

    def _converge_one(self, want: Wanted, key: str) -> None:
        name = want.deployment, _place(want)
        mine = [r for r in self._replicas.values() if (r.record.deployment, r.record.version) == name]
        current = sorted((r for r in mine if r.record.key == key), key=lambda r: r.record.id)
        # A version that was on its way out and is wanted again keeps its servers.
        for replica in current[: want.replicas]:
            replica.retiring, replica.idle_since = False, None
        for replica in current[want.replicas :]:
            replica.retiring = True
        refusal = self._refusals.get(name)
        missing = 0 if refusal is not None and refusal.permanent else want.replicas - len(current)
        for _ in range(missing):
            if len(self._replicas) >= self._settings.max_servers:
                message = f"{self._settings.max_servers} model servers run, which is the limit (triton.max_servers)"
                self._refusals[name] = Refusal("ServerLimit", message, permanent=False)
                break
            record = Record(f"mr{uuid4().hex[:12]}", want.deployment, want.ref.model, _place(want), key, 0)
            self._add(record, want)
        if sum(self._serves(r) for r in current) >= want.replicas:
            self._refusals.pop(name, None)
            for replica in mine:
                if replica.record.key != key:
                    replica.retiring = True

    def _add(self, record: Record, want: Wanted | None) -> None:
        if self._parts is None:
            raise RuntimeError("start() comes first")
        shared = record.version == SHARED
        prepare = partial(self._prepare, want, record.key)
        if shared:
            prepare = partial(self._prepare_shared, want, record.id)
        choose = partial(self._choose_port, record.id)
        replica = Replica(
            record,
            want.ref if want else None,
            folder=self._folder / "servers",
            parts=self._parts,
            settings=self._settings,
            prepare=prepare,
            choose_port=choose,
            arguments=(*shared_server.ARGUMENTS * shared, *(self._parts.arguments(want.server) if want else ())),
            shared=shared,
        )
        replica.retiring = want is None
        self._replicas[record.id] = replica
        self._tasks[record.id] = asyncio.create_task(self._live(replica), name=f"server {record.id}")
        if shared:
            self._shared[record.id] = SharedServer(
                replica,
                self._folder / "repositories" / record.id,
                self._source,
                self._flavour,
                self._settings,
                self._clock,
                self._drain_s,
            )

    async def _live(self, replica: Replica) -> None:
        """The process's life, and beside it that of the versions in it."""
        server = self._shared.get(replica.record.id)
        if server is None:
            await replica.run()
            return
        inside = asyncio.create_task(server.run(), name=f"versions in {replica.record.id}")
        try:
            await replica.run()
        finally:
            inside.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await inside

    def _serves(self, replica: Replica) -> bool:
        server = self._shared.get(replica.record.id)
        return replica.ready if server is None else server.complete

    def _choose_port(self, server_id: str, wanted: int) -> int:
        taken = [r.record.port for r in list(self._replicas.values()) if r.record.id != server_id]
        return triton.free_port(self._settings.host, frozenset([*taken, *self._pools.ports]), wanted)

    async def _prepare_shared(self, want: Wanted | None, server_id: str) -> Path:
        """An empty repository; versions are added while the server runs."""
        if want is None:
            raise FailedPreconditionError("NOT_WANTED", "nobody wants this server")
        root = self._folder / "repositories" / server_id
        await asyncio.to_thread(repository.write_shared, root, want.ref, want.server, self._flavour)
        return root

    async def _prepare(self, want: Wanted | None, key: str) -> Path:
        """The model repository, with every digest proved just now."""
        if want is None:
            raise FailedPreconditionError("NOT_WANTED", "nobody wants this server")
        name = want.deployment, want.ref.version
        root = self._folder / "repositories" / key
        limit = self._settings.max_artifact_mib * 1024 * 1024
        async with self._locks.setdefault(key, asyncio.Lock()):
            try:
                if not await asyncio.to_thread(repository.intact, root, want.ref, want.server, self._flavour, limit):
                    if root.exists():
                        log.warning(
                            "repository %s of %s was changed on disk; it is written anew", key, want.ref.version
                        )
                    root.parent.mkdir(parents=True, exist_ok=True)
                    await repository.write(root, want.ref, want.server, self._flavour, self._source, max_bytes=limit)
            except DataLossError as error:
                self._refusals[name] = Refusal("DataLoss", f"DATA_LOSS: {error.message}; not loaded", permanent=True)
                raise
            except FailedPreconditionError as error:
                self._refusals[name] = Refusal(error.reason, error.message, permanent=True)
                raise
            except MillraceError as error:
                self._refusals[name] = Refusal("ArtifactUnavailable", error.message, permanent=False)
                await asyncio.sleep(REFUSAL_RETRY_S)
                raise
        return root

    def _stop_idle(self, in_use: frozenset[str] | None) -> None:
        now = self._clock.monotonic()
        for replica in self._replicas.values():
            if not replica.retiring or in_use is None or replica.endpoint in in_use:
                replica.idle_since = None
                continue
            replica.idle_since = now if replica.idle_since is None else replica.idle_since
            # What never was ready never had a request to finish.
            if not replica.ready or now - replica.idle_since >= self._drain_s:
                replica.stop()

    def _reap(self) -> None:
        """Let go of replicas whose life has ended, and of repositories nobody has a server for."""
        for server_id in [name for name, task in self._tasks.items() if task.done()]:
            task = self._tasks.pop(server_id)
            replica = self._replicas.pop(server_id)
            with contextlib.suppress(asyncio.CancelledError):
                if (error := task.exception()) is not None:
                    log.error("server %s", server_id, exc_info=error)
            if self._shared.pop(server_id, None) is not None:
                shutil.rmtree(self._folder / "repositories" / server_id, ignore_errors=True)
            key = replica.record.key
            if key not in self._kept and all(other.record.key != key for other in self._replicas.values()):
                shutil.rmtree(self._folder / "repositories" / key, ignore_errors=True)
                self._locks.pop(key, None)


def _place(want: Wanted) -> str:
    """What servers are told apart by: the version, unless they hold all of the deployment's."""
    return SHARED if repository.is_shared(want.server) else want.ref.version


def _groups(wanted: Sequence[Wanted], keys: Sequence[str]) -> list[tuple[Wanted, str]]:
    """What needs servers: each version, or the first one of those that share theirs."""
    found: dict[tuple[str, str], tuple[Wanted, str]] = {}
    for want, key in zip(wanted, keys, strict=True):
        name = want.deployment, _place(want)
        if name in found:
            most_wanted = max(want.replicas, found[name][0].replicas)
            found[name] = replace(found[name][0], replicas=most_wanted), found[name][1]
        else:
            found[name] = want, key
    return list(found.values())
