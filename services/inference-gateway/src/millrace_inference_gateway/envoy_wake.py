"""How Envoy holds calls of a version that is asleep: a Lua filter that does nothing but on that version's routes.

On such a route it asks the Python process's wake door and lets the call go on to the same cluster when the door says that servers are
there. All other routes have no script, so they pay for the filter no more than the look whether there is one.
"""

from importlib import resources

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import UInt32Value

from millrace_inference_gateway.envoy_clusters import packed
from millrace_inference_gateway.envoy_door import unix_http1_cluster
from millrace_inference_gateway.routes import Arm
from millrace_inference_gateway.settings import WakeSettings

WAKE_FILTER = "millrace.wake"
WAKE_CLUSTER = "gateway_wake"
WAKE_PATH = "/millrace.wake/Hold"
# The door itself says when a wait is over; Envoy gives up only when it says nothing.
PATIENCE_S = 5.0
_SCRIPT = "hold"


def wake_cluster(socket: str, settings: WakeSettings) -> cluster_pb2.Cluster:
    """The wake door, at its Unix socket; room for more than may be held, so that it can say itself that there are too many."""
    most = UInt32Value(value=door_calls(settings))
    limits = circuit_breaker_pb2.CircuitBreakers.Thresholds(
        max_connections=most, max_pending_requests=most, max_requests=most
    )
    return unix_http1_cluster(WAKE_CLUSTER, socket, limits)


def door_calls(settings: WakeSettings) -> int:
    """Calls at the wake door at once, those included that it refuses."""
    return 2 * settings.max_held_calls + 64


def wake_filter(settings: WakeSettings) -> hcm_pb2.HttpFilter:
    """The filter: it knows the script, and runs it where a route says so."""
    text = resources.files(__package__).joinpath("wake.lua").read_text(encoding="utf-8")
    script = text.format(
        cluster=WAKE_CLUSTER,
        path=WAKE_PATH,
        wait_ms=round((settings.max_wait_s + PATIENCE_S) * 1000),
        retry_after_s=settings.retry_after_s,
    )
    lua = lua_pb2.Lua(source_codes={_SCRIPT: base_pb2.DataSource(inline_string=script)})
    return hcm_pb2.HttpFilter(name=WAKE_FILTER, typed_config=packed(lua))


def wake_options(arm: Arm, *, http: bool) -> dict[str, Any]:
    """Has the filter hold the calls of a route to `arm`."""
    cluster = arm.http_cluster if http else arm.cluster
    route = lua_pb2.LuaPerRoute(name=_SCRIPT)
    route.filter_context.update({"model": arm.model, "version": arm.version, "cluster": cluster})
    return {WAKE_FILTER: packed(route)}
