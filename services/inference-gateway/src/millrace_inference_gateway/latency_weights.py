"""Weights of servers from the latency their clients saw: who answers faster gets more (balancing ResponseTime).

The figures come from Envoy's access log, so they include what queues at a server. Once a second they become weights, relative to the
fastest server of the version; a server without news is slowly trusted again, so that one that was slow for a while comes back.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from millrace_inference_gateway.routes import Arm, Endpoint

TICK_S = 1.0
MAX_WEIGHT, MIN_WEIGHT = 100, 5
# Share of the newest second in the average.
NEWEST = 0.5
# What a second without a call takes off a server's average.
FORGETTING = 0.9
# Weights that moved less than this share stay, so that Envoy is not told of noise.
WORTH_TELLING = 0.15
# Servers remembered; the one not heard of for longest goes.
MAX_SERVERS = 10_000

Server = tuple[str, str, int]
"""Cluster of the version, host, gRPC port."""


@dataclass(slots=True)
class _Average:
    mean_ms: float = 0.0
    sum_ms: float = 0.0
    calls: int = 0


class LatencyWeights:
    """Averages by server, and the weights made of them."""

    def __init__(self) -> None:
        self._averages: dict[Server, _Average] = {}
        self._told: dict[Server, int] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_changed(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in the event loop, when weights have moved enough to matter."""
        self._listeners.append(listener)

    def record(self, server: Server, latency_ms: float) -> None:
        """Take one answered call."""
        average = self._averages.get(server)
        if average is None:
            if len(self._averages) >= MAX_SERVERS:
                del self._averages[next(iter(self._averages))]
            average = self._averages[server] = _Average()
        average.sum_ms += latency_ms
        average.calls += 1

    def tick(self) -> None:
        """End of a second: move the averages, and tell when the weights are others now."""
        for average in self._averages.values():
            if average.calls:
                newest = average.sum_ms / average.calls
                average.mean_ms = newest if not average.mean_ms else (1 - NEWEST) * average.mean_ms + NEWEST * newest
                average.sum_ms, average.calls = 0.0, 0
            else:
                average.mean_ms *= FORGETTING
        now = self._weights()
        moved = now.keys() != self._told.keys() or any(
            abs(weight - self._told[server]) > WORTH_TELLING * self._told[server] for server, weight in now.items()
        )
        if moved:
            self._told = now
            for listener in self._listeners:
                listener()

    def weighted(self, arm: Arm) -> Arm:
        """The arm with weights for its servers; one that nobody has called yet gets the most."""
        return replace(arm, endpoints=self._endpoints(arm.cluster, arm.endpoints))

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until `stop`."""
        while not stop.is_set():
            self.tick()
            try:
                await asyncio.wait_for(stop.wait(), TICK_S)
            except TimeoutError:
                continue

    def _endpoints(self, cluster: str, endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
        return tuple(
            replace(each, weight=self._told.get((cluster, each.host, each.port), MAX_WEIGHT)) for each in endpoints
        )

    def _weights(self) -> dict[Server, int]:
        fastest: dict[str, float] = {}
        for (cluster, _, _), average in self._averages.items():
            fastest[cluster] = min(fastest.get(cluster, average.mean_ms), average.mean_ms)
        return {
            server: max(MIN_WEIGHT, round(MAX_WEIGHT * fastest[server[0]] / average.mean_ms))
            for server, average in self._averages.items()
            if average.mean_ms
        }
