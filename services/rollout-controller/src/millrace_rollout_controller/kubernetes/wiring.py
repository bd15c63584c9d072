"""The parts of a controller in a cluster, put together, and the order in which they begin: lead, read, restore the routes, decide."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import grpc.aio
from millrace_kit.clock import Clock
from millrace_kit.errors import UnavailableError
from millrace_kit.server import Worker

from millrace_rollout_controller.controller import Controller
from millrace_rollout_controller.hub import Hub
from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import Cluster
from millrace_rollout_controller.kubernetes.events import Events
from millrace_rollout_controller.kubernetes.executor import SYNC_TIMEOUT_S, KubernetesExecutor
from millrace_rollout_controller.kubernetes.leader import Leader
from millrace_rollout_controller.kubernetes.mirror import Mirror
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings
from millrace_rollout_controller.kubernetes.store import KubernetesStore

log = logging.getLogger(__name__)
RETRY_S = 1.0
"""Wait before the stored routes are asked for again."""


@dataclass(frozen=True)
class Parts:
    """What the service needs of the cluster."""

    store: KubernetesStore
    executor: KubernetesExecutor
    leader: Leader
    namespace: str
    workers: Callable[[Controller], Sequence[Worker]]
    closers: Sequence[Callable[[], Awaitable[None]]]


async def connect(
    settings: KubernetesSettings,
    hub: Hub,
    clock: Clock,
    open_loader: Callable[[str], grpc.aio.Channel],
    *,
    limit: int,
) -> Parts:
    """Connect and put the parts together; nothing is asked of the API server before the workers run."""
    cluster = await Cluster.connect(settings)
    leader = Leader(cluster, settings.lease, settings.pod_name, settings.pod_name if settings.label_own_pod else "")
    cluster.may_write = leader.holds
    waker = _Waker()
    path = f"/apis/{names.API_VERSION}/namespaces/{cluster.namespace}/{names.PLURAL}"
    mirror = Mirror(cluster, path, changed=waker.changed)
    executor = KubernetesExecutor(cluster, settings, mirror.get, waker.now, open_loader=open_loader, clock=clock)
    events = Events(cluster, settings.pod_name)
    store = KubernetesStore(
        cluster, mirror, events, check=executor.check, clock=clock, routes=settings.routes_config_map, limit=limit
    )
    watching: list[asyncio.Task[None]] = []

    async def end_watching() -> None:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)

    def workers(controller: Controller) -> Sequence[Worker]:
        waker.wake = controller.wake

        async def lead(stop: asyncio.Event) -> None:
            if not await _either(leader.acquired, stop):
                return
            await mirror.start(watching, SYNC_TIMEOUT_S)
            if await _restore(store, hub, clock, stop):
                await controller.run(stop)

        return [
            Worker("leader", leader.run),
            Worker("reconcile", lead),
            Worker("events", events.run),
            Worker("gateways", store.run),
        ]

    return Parts(store, executor, leader, cluster.namespace, workers, [cluster.close, leader.release, end_watching])


class _Waker:
    """Mirrors are made before the controller they wake."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None

    def now(self) -> None:
        """Have the controller look again."""
        self.wake()

    def changed(self, _name: str) -> None:
        self.wake()


async def _restore(store: KubernetesStore, hub: Hub, clock: Clock, stop: asyncio.Event) -> bool:
    """Begin with the routes of the leader before; False when the service stops first.

    Its gateways count as heard of now: they had nobody to connect to, and a rollout must not go on without them.
    """
    while not stop.is_set():
        try:
            table = await asyncio.to_thread(store.load_routes)
            gateways = await asyncio.to_thread(store.load_gateways)
        except UnavailableError as error:
            log.warning("the stored routes cannot be read yet: %s", error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RETRY_S)
            continue
        now = clock.now().timestamp()
        hub.restore(table, {name: replace(gateway, seen_at=now) for name, gateway in gateways.items()})
        return True
    return False


async def _either(wanted: asyncio.Event, stop: asyncio.Event) -> bool:
    """Wait for one of the two; whether it was the first."""
    tasks = [asyncio.create_task(event.wait()) for event in (wanted, stop)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    return wanted.is_set() and not stop.is_set()
