"""Routes of all models, who has them in force, and which endpoints a gateway may still be sending to.

A gateway counts as alive while its stream is open and for `forget_s` after that (its Envoy goes on without it); one that keeps its
stream but does not acknowledge for `ack_s` is left out as well, so one stuck gateway cannot hold a rollout for ever.
"""

import asyncio
from dataclasses import dataclass

from millrace_kit.errors import UnavailableError

from millrace_rollout_controller.state import Route

MAX_HISTORY = 1000
MAX_GATEWAYS = 1000


@dataclass(slots=True)
class GatewaySeen:
    """One gateway as last heard of."""

    applied: int
    seen_at: float
    streams: int = 0
    figures_address: str = ""
    """Where it answers for its figures; empty where the settings name it."""


@dataclass(frozen=True, slots=True)
class Table:
    """Every model's route under one generation."""

    generation: int = 0
    routes: tuple[Route, ...] = ()

    @property
    def endpoints(self) -> frozenset[str]:
        """Every endpoint named; one that holds several versions also as `host:port/model/version`."""
        arms = [(route.model, arm) for route in self.routes for arm in route.arms]
        inside = (f"{e}/{model}/{arm.version}" for model, arm in arms if arm.server_version for e in arm.endpoints)
        return frozenset((*inside, *(e for _model, arm in arms for e in arm.endpoints)))


class Hub:
    """In memory; the controller stores the table before it publishes it, and the gateways' acknowledgements as they come.

    Args:
        table: what was last published.
        gateways: gateways known before a restart, with the wall-clock second they were last heard of.
        forget_s: how long a gateway without a stream still counts.
        ack_s: how long a gateway with a stream may stay behind and still count.
    """

    def __init__(self, table: Table, gateways: dict[str, GatewaySeen], *, forget_s: float, ack_s: float) -> None:
        self.table = table
        self.gateways = gateways
        self._forget_s = forget_s
        self._ack_s = ack_s
        self._published_at = 0.0
        self._changed: dict[str, int] = {route.model: table.generation for route in table.routes}
        self._history: list[Table] = [table]
        self._news = asyncio.Event()
        self._closed = False
        self.serving = True
        """Whether this replica may tell gateways anything; false until it leads."""

    def restore(self, table: Table, gateways: dict[str, GatewaySeen]) -> None:
        """Begin from what another replica left."""
        self.table, self.gateways = table, gateways
        self._changed = {route.model: table.generation for route in table.routes}
        self._history = [table]
        self.serving = True
        self._wake()

    def next_table(self, changes: dict[str, Route | None], now_s: float) -> Table | None:
        """The table with `changes`; None when they change nothing.

        Generations start from Unix milliseconds, so they rise even past a database that was lost.
        """
        routes = {route.model: route for route in self.table.routes}
        wanted = {model: route for model, route in changes.items() if routes.get(model) != route}
        if not wanted:
            return None
        routes.update({model: route for model, route in wanted.items() if route is not None})
        for model, route in wanted.items():
            if route is None:
                routes.pop(model, None)
        generation = max(self.table.generation + 1, int(now_s * 1000))
        return Table(generation, tuple(routes[model] for model in sorted(routes)))

    def publish(self, table: Table, now_s: float) -> None:
        """Put a stored table in force."""
        before = {route.model: route for route in self.table.routes}
        after = {route.model: route for route in table.routes}
        for model in before.keys() | after.keys():
            if before.get(model) != after.get(model):
                self._changed[model] = table.generation
        self.table = table
        self._published_at = now_s
        self._history.append(table)
        oldest = min((g.applied for g in self._alive(now_s)), default=table.generation)
        self._history = [t for t in self._history if t.generation >= oldest][-MAX_HISTORY:]
        self._wake()

    def connected(self, gateway: str, applied: int, now_s: float, figures_address: str = "") -> None:
        """A gateway opened a stream.

        Raises:
            UnavailableError: this replica does not lead; another one has the routes.
        """
        if not self.serving:
            raise UnavailableError("NOT_LEADER", "this replica stands by; the routes are the leader's")
        seen = self.gateways.get(gateway)
        if seen is None and len(self.gateways) >= MAX_GATEWAYS:
            silent = [name for name, g in self.gateways.items() if not g.streams]
            for name in sorted(silent, key=lambda name: self.gateways[name].seen_at)[:1]:
                del self.gateways[name]
        self.gateways[gateway] = GatewaySeen(applied, now_s, (seen.streams if seen else 0) + 1, figures_address)

    def acknowledged(self, gateway: str, applied: int, now_s: float) -> None:
        """A gateway has `applied` in force."""
        seen = self.gateways.get(gateway)
        if seen is not None:
            seen.applied, seen.seen_at = applied, now_s

    def disconnected(self, gateway: str, now_s: float) -> None:
        """A gateway's stream ended."""
        seen = self.gateways.get(gateway)
        if seen is not None:
            seen.streams, seen.seen_at = max(0, seen.streams - 1), now_s

    def settled(self, model: str, now_s: float) -> bool:
        """Whether every live gateway has the model's newest route."""
        needed = self._changed.get(model, 0)
        return all(gateway.applied >= needed for gateway in self._alive(now_s))

    def in_use(self, now_s: float) -> frozenset[str] | None:
        """Endpoints a live gateway may send to; None when one has a table that is not known here: then it may be any."""
        used = set(self.table.endpoints)
        known = {table.generation for table in self._history}
        for gateway in self._alive(now_s):
            if gateway.applied and gateway.applied not in known and gateway.applied < self.table.generation:
                return None
            # 0 is a gateway with nothing in force.
            for table in self._history:
                if gateway.applied and table.generation >= gateway.applied:
                    used |= table.endpoints
        return frozenset(used)

    def figures_addresses(self) -> list[str]:
        """Where connected gateways answer for their figures."""
        return sorted({g.figures_address for g in self.gateways.values() if g.streams and g.figures_address})

    def alive(self, now_s: float) -> int:
        """How many gateways count."""
        return len(self._alive(now_s))

    def _alive(self, now_s: float) -> list[GatewaySeen]:
        alive = []
        for gateway in self.gateways.values():
            if gateway.streams:
                late = gateway.applied < self.table.generation and now_s - self._published_at > self._ack_s
                if not late or now_s - gateway.seen_at <= self._ack_s:
                    alive.append(gateway)
            elif now_s - gateway.seen_at <= self._forget_s:
                alive.append(gateway)
        return alive

    async def newer(self, generation: int) -> Table | None:
        """Wait for a table newer than `generation`; None when the service is stopping."""
        while self.table.generation <= generation:
            if self._closed:
                return None
            await self._news.wait()
        return self.table

    def close(self) -> None:
        """End every wait."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
