"""Brings routes and servers in force in Envoy, in an order that loses no request, and says so only when Envoy itself says so.

Routes:
1. New servers join their clusters, old ones stay; wait until Envoy knows the clusters and finds the new servers healthy.
2. The routes change; wait until Envoy has them.
3. Servers that left leave their clusters. Versions no longer named stay known for a grace time, so that running calls end.

Servers alone: those that come and go do so at once (Envoy gives a new one traffic after its first health check, and lets the calls of
one that left end). Only when nothing new is healthy yet do the old ones stay until something is.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError
from prometheus_client import Counter, Gauge

from millrace_inference_gateway.endpoints import EndpointSource, resolved
from millrace_inference_gateway.envoy_admin import EnvoyDownError
from millrace_inference_gateway.envoy_control import POLL_S, EnvoyControl, Servers, servers
from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.routes import Arm, RouteTable, check_routes
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.store import KeptRoutes, RouteStore

log = logging.getLogger(__name__)

# Longest wait for new servers to pass their first health check; after it the routes change all the same, for the controller
# decides who is ready, and a version without healthy servers has to be seen.
HEALTH_WAIT_S = 5.0
# When every version has a healthy server, the other new ones get this long.
SETTLE_S = 0.5
RETRY_S = 0.25
PRUNE_S = 0.5
GENERATION = Gauge("millrace_gateway_routes_generation", "Generation of the routes in force.")
REFUSED = Counter("millrace_gateway_routes_refused_total", "Routes that were wrong and not used.")
FOLLOWED = Counter("millrace_gateway_endpoint_changes_total", "Times servers changed under the same routes.")


class _SupersededError(Exception):
    """Something newer is wanted; start again with it."""


@dataclass(frozen=True, slots=True)
class _Retired:
    arm: Arm
    until: float


class Applier:
    """Owns the routes: those wanted, those in force."""

    def __init__(
        self,
        settings: GatewaySettings,
        envoy: EnvoyControl,
        store: RouteStore,
        source: EndpointSource,
        clock: Clock,
        *,
        weights: LatencyWeights | None = None,
    ) -> None:
        self._settings = settings
        self._envoy = envoy
        self._store = store
        self._source = source
        self._weights = weights
        self._clock = clock
        self._wanted = store.load()
        self._applied: RouteTable | None = None
        self._in_force: RouteTable | None = None
        self._retired: dict[str, _Retired] = {}
        self._news = asyncio.Event()
        self._health_deadline: float | None = None
        self._listeners: list[Callable[[], None]] = []
        source.on_changed(self._news.set)
        if weights is not None:
            weights.on_changed(self._news.set)

    @property
    def table(self) -> RouteTable:
        """The routes wanted, which may be a moment ahead of those in force."""
        return self._wanted.table

    @property
    def in_force(self) -> RouteTable | None:
        """The routes Envoy has, with the servers it has; None before it was first asked."""
        return self._in_force

    def on_applied(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever other routes are in force."""
        self._listeners.append(listener)

    def submit(self, routes: rollout_pb2.Routes) -> None:
        """Want `routes` from now on, and keep them for the next start.

        Raises:
            InvalidArgumentError: they are wrong; those before stay.
        """
        try:
            table = check_routes(routes)
        except InvalidArgumentError:
            REFUSED.inc()
            raise
        self._wanted = KeptRoutes(routes, table)
        self._store.save(self._wanted, resolved(table, self._source))
        self._news.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep Envoy at the routes and servers wanted until `stop`."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                self._news.clear()
                try:
                    done = await self._try(self._wanted)
                except _SupersededError:
                    continue
                if not done:
                    # Envoy is down or refuses: the files are right, look again soon.
                    await asyncio.wait({stopped}, timeout=RETRY_S)
                    continue
                await self._prune()
                news = asyncio.ensure_future(self._news.wait())
                await asyncio.wait({stopped, news}, timeout=PRUNE_S, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
        finally:
            stopped.cancel()

    async def _try(self, kept: KeptRoutes) -> bool:
        table = kept.table
        wanted = resolved(table, self._source, self._weights)
        if table is self._applied and wanted == self._in_force:
            return True
        try:
            async with asyncio.timeout(self._settings.apply_timeout_s):
                if table is self._applied and self._in_force is not None and _same_kind(wanted, self._in_force):
                    await self._follow(wanted, self._in_force)
                else:
                    await self._apply(wanted)
        except (EnvoyDownError, TimeoutError) as error:
            log.warning("routes %d are not in force yet: %s", table.generation, error or "Envoy takes long")
            return False
        except OSError as error:
            log.error("routes %d cannot be written: %s", table.generation, error)  # noqa: TRY400 - the message says all
            return False
        self._record(kept, wanted)
        return True

    def _record(self, kept: KeptRoutes, wanted: RouteTable) -> None:
        before, self._applied, self._in_force = self._applied, kept.table, wanted
        self._health_deadline = None
        GENERATION.set(wanted.generation)
        if before is kept.table:
            FOLLOWED.inc()
        else:
            log.info("routes %d are in force", wanted.generation)
            for listener in self._listeners:
                listener()
        if kept is not self._wanted:
            # Newer routes have come and are kept already.
            return
        try:
            self._store.save(kept, wanted)
        except OSError as error:
            log.error("routes %d cannot be kept: %s", wanted.generation, error)  # noqa: TRY400 - the message says all

    async def _apply(self, wanted: RouteTable) -> None:
        await self._envoy.clusters(self._with_old(wanted, await self._envoy.healthy()))
        await self._until_healthy(wanted)
        await self._envoy.routes(wanted)
        await self._envoy.endpoints(wanted.arms)

    async def _follow(self, wanted: RouteTable, before: RouteTable) -> None:
        old = before.arms
        changed = {name: arm for name, arm in wanted.arms.items() if arm.endpoints != old[name].endpoints}
        healthy = await self._envoy.healthy()
        joined = {name: _joined(arm, old[name], healthy) for name, arm in changed.items()}
        await self._envoy.endpoints(joined)
        kept = {name: arm for name, arm in changed.items() if joined[name] != arm}
        if kept:
            await self._until_any_healthy(kept)
            await self._envoy.endpoints(kept)

    def _with_old(self, table: RouteTable, healthy: Servers) -> RouteTable:
        """`table` and what served before: arms that left, and servers that left an arm."""
        now = self._clock.monotonic()
        wanted = table.arms
        before = self._in_force.arms if self._in_force else {}
        until = now + self._settings.envoy.grace_s
        self._retired = {n: r for n, r in self._retired.items() if n not in wanted and r.until > now}
        self._retired |= {name: _Retired(arm, until) for name, arm in before.items() if name not in wanted}
        routes = {}
        for model, route in table.routes.items():
            arms = []
            for arm in route.arms:
                old = before.get(arm.cluster, arm)
                # A Service says who leaves, and they leave at once; a list may lag behind, and the old stay to the end.
                arms.append(_joined(arm, old, healthy if arm.service else set()))
            arms += [r.arm for r in self._retired.values() if r.arm.model == model]
            routes[model] = replace(route, arms=tuple(arms))
        for retired in self._retired.values():
            model = retired.arm.model
            if model not in routes and self._in_force and model in self._in_force.routes:
                routes[model] = replace(self._in_force.routes[model], arms=(retired.arm,))
        return RouteTable(table.generation, routes)

    async def _until_healthy(self, table: RouteTable) -> None:
        """Wait for the servers Envoy did not have before."""
        before = self._in_force.arms if self._in_force else {}
        grown: list[set[tuple[str, str]]] = []
        new: set[tuple[str, str]] = set()
        for name, arm in table.arms.items():
            found = servers(name, arm)
            if joining := found - (servers(name, before[name]) if name in before else set()):
                grown.append(found)
                new |= joining
        started = self._clock.monotonic()
        while missing := new - (healthy := await self._envoy.healthy()):
            now = self._clock.monotonic()
            if now > self._deadline(now) or (now > started + SETTLE_S and all(found & healthy for found in grown)):
                log.warning("changing the routes with unhealthy servers: %s", sorted(missing))
                return
            await self._pause()

    async def _until_any_healthy(self, arms: dict[str, Arm]) -> None:
        """Wait until each of `arms` has a healthy server."""
        wanted = [servers(name, arm) for name, arm in arms.items()]
        while True:
            healthy = await self._envoy.healthy()
            now = self._clock.monotonic()
            if all(found & healthy for found in wanted) or now > self._deadline(now):
                return
            await self._pause()

    def _deadline(self, now: float) -> float:
        """End of waiting for health, counted from the first wait since something was last in force: news do not prolong it."""
        if self._health_deadline is None:
            self._health_deadline = now + HEALTH_WAIT_S
        return self._health_deadline

    async def _pause(self) -> None:
        await asyncio.sleep(POLL_S)
        if self._news.is_set():
            raise _SupersededError

    async def _prune(self) -> None:
        """Forget versions whose grace time is over."""
        now = self._clock.monotonic()
        if self._in_force is None or not self._retired or any(r.until > now for r in self._retired.values()):
            return
        self._retired.clear()
        try:
            await self._envoy.forget_others(self._in_force)
        except OSError as error:
            log.error("old versions cannot be removed: %s", error)  # noqa: TRY400 - the message says all


def _joined(arm: Arm, old: Arm, healthy: Servers) -> Arm:
    """`arm`, with the servers it had when none of the servers it shall have is known to be healthy."""
    if not arm.endpoints and arm.service and not arm.asleep:
        return arm
    if servers(arm.cluster, arm) & healthy:
        return arm
    known = {(endpoint.host, endpoint.port) for endpoint in arm.endpoints}
    stay = (endpoint for endpoint in old.endpoints if (endpoint.host, endpoint.port) not in known)
    return replace(arm, endpoints=(*arm.endpoints, *stay))


def _same_kind(one: RouteTable, two: RouteTable) -> bool:
    """Whether every cluster stays of its kind, so that changing its servers is enough: addresses or names."""
    old = two.arms
    return all(_by_address(arm) == _by_address(old[name]) for name, arm in one.arms.items())


def _by_address(arm: Arm) -> bool:
    return all(endpoint.is_ip for endpoint in arm.endpoints)
