"""Brings routes in force in Envoy, in an order that loses no request, and says so only when Envoy itself says so.

1. New servers join their clusters, old ones stay; wait until Envoy knows the clusters and finds the new servers healthy.
2. The routes change; wait until Envoy has them.
3. Servers that left leave their clusters. Versions no longer named stay known for a grace time, so that running calls end.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError
from prometheus_client import Counter, Gauge

from millrace_inference_gateway.envoy_admin import EnvoyAdmin, EnvoyDownError
from millrace_inference_gateway.envoy_files import (
    EnvoyFiles,
    remove_endpoints,
    write_clusters,
    write_endpoints,
    write_routes,
)
from millrace_inference_gateway.routes import Arm, RouteTable, check_routes
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.store import RouteStore

log = logging.getLogger(__name__)

POLL_S = 0.02
# Longest wait for new servers to pass their first health check; after it the routes change all the same, for the controller
# decides who is ready, and a version without healthy servers has to be seen.
HEALTH_WAIT_S = 5.0
_VERSIONS = r"(version_text|warming_clusters)$"
GENERATION = Gauge("millrace_gateway_routes_generation", "Generation of the routes in force.")
REFUSED = Counter("millrace_gateway_routes_refused_total", "Routes that were wrong and not used.")


@dataclass(frozen=True, slots=True)
class _Retired:
    arm: Arm
    until: float


class Applier:
    """Owns the routes: those wanted, those in force."""

    def __init__(
        self, settings: GatewaySettings, files: EnvoyFiles, admin: EnvoyAdmin, store: RouteStore, clock: Clock
    ) -> None:
        self._settings = settings
        self._files = files
        self._admin = admin
        self._store = store
        self._clock = clock
        self._wanted = store.load()
        self._in_force: RouteTable | None = None
        self._retired: dict[str, _Retired] = {}
        self._changed = asyncio.Event()
        self._changed.set()
        self._listeners: list[Callable[[], None]] = []

    @property
    def table(self) -> RouteTable:
        """The routes wanted, which may be a moment ahead of those in force."""
        return self._wanted

    @property
    def in_force(self) -> RouteTable | None:
        """The routes Envoy has; None before it was first asked."""
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
        self._store.save(routes)
        self._wanted = table
        self._changed.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep Envoy at the routes wanted until `stop`."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                wanted = self._wanted
                if self._changed.is_set():
                    self._changed.clear()
                    if not await self._try(wanted):
                        # Envoy is down or refuses: the files are right, look again soon.
                        self._changed.set()
                        await asyncio.wait({stopped}, timeout=0.25)
                        continue
                await self._prune()
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({stopped, changed}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            stopped.cancel()

    async def _try(self, table: RouteTable) -> bool:
        try:
            async with asyncio.timeout(self._settings.apply_timeout_s):
                await self._apply(table)
        except (EnvoyDownError, TimeoutError) as error:
            log.warning("routes %d are not in force yet: %s", table.generation, error or "Envoy takes long")
            return False
        except OSError as error:
            log.error("routes %d cannot be written: %s", table.generation, error)  # noqa: TRY400 - the message says all
            return False
        self._in_force = table
        GENERATION.set(table.generation)
        log.info("routes %d are in force", table.generation)
        for listener in self._listeners:
            listener()
        return True

    async def _apply(self, table: RouteTable) -> None:
        both = self._with_old(table)
        versions = await asyncio.to_thread(self._write_clusters, both)
        await self._until_known(versions)
        await self._until_healthy(table)
        routes = await asyncio.to_thread(write_routes, self._files, table, self._settings)
        await self._until_known({"rds.routes.version_text": routes})
        exact = await asyncio.to_thread(write_endpoints, self._files, table)
        await self._until_known({f"cluster.{name}.version_text": version for name, version in exact.items()})

    def _with_old(self, table: RouteTable) -> RouteTable:
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
                old = before[arm.cluster].endpoints if arm.cluster in before else ()
                arms.append(replace(arm, endpoints=tuple(dict.fromkeys((*arm.endpoints, *old)))))
            arms += [r.arm for r in self._retired.values() if r.arm.model == model]
            routes[model] = replace(route, arms=tuple(arms))
        for retired in self._retired.values():
            model = retired.arm.model
            if model not in routes and self._in_force and model in self._in_force.routes:
                routes[model] = replace(self._in_force.routes[model], arms=(retired.arm,))
        return RouteTable(table.generation, routes)

    def _write_clusters(self, table: RouteTable) -> dict[str, str]:
        versions = {
            f"cluster.{name}.version_text": version for name, version in write_endpoints(self._files, table).items()
        }
        versions["cluster_manager.cds.version_text"] = write_clusters(self._files, table, self._settings)
        return versions

    async def _until_known(self, versions: dict[str, str]) -> None:
        while True:
            stats = await self._admin.stats(_VERSIONS)
            known = all(
                any(name.endswith(suffix) and text == version for name, text in stats.texts.items())
                for suffix, version in versions.items()
            )
            if known and stats.numbers.get("cluster_manager.warming_clusters", 0) == 0:
                return
            await asyncio.sleep(POLL_S)

    async def _until_healthy(self, table: RouteTable) -> None:
        wanted = {
            (name, f"{endpoint.host}:{endpoint.port}")
            for name, arm in table.arms.items()
            for endpoint in arm.endpoints
            if endpoint.is_ip
        }
        deadline = self._clock.monotonic() + HEALTH_WAIT_S
        while wanted and (missing := wanted - await self._admin.healthy_servers()):
            if self._clock.monotonic() > deadline:
                log.warning("changing the routes with unhealthy servers: %s", sorted(missing))
                return
            await asyncio.sleep(POLL_S)

    async def _prune(self) -> None:
        """Forget versions whose grace time is over."""
        now = self._clock.monotonic()
        if self._in_force is None or not self._retired or any(r.until > now for r in self._retired.values()):
            return
        self._retired.clear()
        table = self._in_force
        try:
            await asyncio.to_thread(self._write_clusters, table)
            await asyncio.to_thread(remove_endpoints, self._files, list(table.arms))
        except OSError as error:
            log.error("old versions cannot be removed: %s", error)  # noqa: TRY400 - the message says all
