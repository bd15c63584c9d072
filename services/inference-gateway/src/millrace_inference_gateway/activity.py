"""How much each version that may be put to sleep is used, from Envoy's own statistics: whatever the protocol, whoever calls.

A version nobody knows the activity of is left out; the rollout controller never takes that for idleness.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from millrace_inference_gateway.envoy_admin import EnvoyDownError, EnvoyStats
from millrace_inference_gateway.routes import RouteTable

STATISTICS = r"^cluster\.(arm|http)/.*\.upstream_rq_(active|total)$"
Stats = Callable[[str], Awaitable[EnvoyStats]]


@dataclass(frozen=True, slots=True)
class Activity:
    """One version."""

    model: str
    version: str
    started: int
    """Requests sent to its servers since Envoy began."""
    running: int
    """Requests under way, held ones and clients that go around Envoy included."""
    held: int = 0
    """Of those, the held ones: nothing of them is with its servers."""


async def activity(
    table: RouteTable | None, stats: Stats, held: Mapping[tuple[str, str], int], followers: Mapping[str, int]
) -> list[Activity]:
    """Of every version in `table` that may be put to sleep.

    Args:
        table: the routes in force.
        stats: asks Envoy for statistics by a regular expression.
        held: calls that wait for a version to wake, by model and version.
        followers: clients that follow a model's servers without the proxy, by model; what they call nobody sees.
    """
    routes = [route for route in table.routes.values() if route.may_sleep] if table is not None else []
    if not routes:
        return []
    try:
        numbers = (await stats(STATISTICS)).numbers
    except EnvoyDownError:
        return []
    found = []
    for route in routes:
        for arm in route.arms:
            clusters = (f"cluster.{name}.upstream_rq" for name in (arm.cluster, arm.http_cluster))
            counts = [(numbers.get(f"{name}_total"), numbers.get(f"{name}_active")) for name in clusters]
            if any(total is None or active is None for total, active in counts):
                continue
            waits = held.get((arm.model, arm.version), 0)
            running = sum(active or 0 for _total, active in counts) + waits
            running += followers.get(arm.model, 0) if arm.weight else 0
            started = sum(total or 0 for total, _active in counts)
            found.append(Activity(arm.model, arm.version, started, running, waits))
    return found
