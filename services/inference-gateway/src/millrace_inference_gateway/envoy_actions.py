"""What the routes of both protocols share: deadlines, retries, splits, answers' headers, refusals."""

import base64
import json
from dataclasses import dataclass
from typing import TypeAlias

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.extensions.retry.priority.previous_priorities.v3 import previous_priorities_config_pb2
from envoy.type.matcher.v3 import string_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import UInt32Value
from google.rpc import error_details_pb2, status_pb2

from millrace_inference_gateway.caller_key import HEADER as STICKY_HEADER
from millrace_inference_gateway.envoy_access import access_options
from millrace_inference_gateway.envoy_clusters import LOW_PRIORITY, duration, packed
from millrace_inference_gateway.envoy_wake import wake_options
from millrace_inference_gateway.routes import WEIGHT_UNITS, Arm, Route
from millrace_inference_gateway.settings import GatewaySettings

LUA_FILTER = "millrace.model_name"
# What a server did not take or never saw; `unavailable` is a gRPC status, 503 the same by HTTP.
RETRY_UNPROCESSED = "connect-failure,refused-stream,reset-before-request,unavailable"
_RETRY_UNPROCESSED_HTTP = "connect-failure,refused-stream,reset-before-request,retriable-status-codes"
_HTTP_UNAVAILABLE = 503

# How a caller chooses a version, and how the routes of such calls are named.
VERSION_HEADER = "x-millrace-version"
# Calls that are the first to go when servers are busy.
PRIORITY_HEADER, LOW = "x-millrace-priority", "low"
PINNED = "pinned"

RouteMessage: TypeAlias = route_components_pb2.Route


def header(name: str, value: str) -> base_pb2.HeaderValueOption:
    """A header that replaces others of its name."""
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def arm_headers(arm: Arm) -> list[base_pb2.HeaderValueOption]:
    """Of every answer of the version."""
    headers = [header("x-millrace-version", arm.version)]
    return [*headers, header("x-millrace-digest", arm.digest)] if arm.digest else headers


def route_action(
    route: Route, settings: GatewaySettings, *, http: bool, stream: bool
) -> route_components_pb2.RouteAction:
    """Deadline, retries and hash of one model's calls; where they go is `aim`'s."""
    timeout = duration(route.timeout_ms / 1000)
    action = route_components_pb2.RouteAction(idle_timeout=duration(settings.envoy.stream_idle_s))
    if stream:
        action.timeout.CopyFrom(duration(0))
    else:
        action.timeout.CopyFrom(timeout)
        if settings.envoy.max_retries:
            action.retry_policy.CopyFrom(_retry(settings, http=http))
            if route.hedge_after_ms:
                # The late call goes on beside its copy; whichever answers first is the answer. Copies count as retries.
                action.retry_policy.per_try_timeout.CopyFrom(duration(route.hedge_after_ms / 1000))
                action.hedge_policy.hedge_on_per_try_timeout = True
        if not http:
            # A caller's own, shorter deadline (grpc-timeout) counts too.
            action.max_stream_duration.grpc_timeout_header_max.CopyFrom(timeout)
    if route.sticky_header:
        # The key that comes by baggage counts where the call has none of its own.
        for name in (route.sticky_header, STICKY_HEADER):
            by_header = route_components_pb2.RouteAction.HashPolicy.Header(header_name=name)
            action.hash_policy.append(route_components_pb2.RouteAction.HashPolicy(header=by_header, terminal=True))
    return action


@dataclass(frozen=True, slots=True)
class Target:
    """The one arm that all calls of a route go to, because of a rule or because their callers chose it."""

    arm: Arm
    pinned: bool = False

    @property
    def mark(self) -> str:
        """Part of the route's name that tells calls that chose their version."""
        return f"{PINNED}/" if self.pinned else ""


def _allow_wait(action: route_components_pb2.RouteAction, wait_s: float) -> None:
    """Deadlines that Envoy counts from the start of a call leave room for servers to start; the model call's own begins after that."""
    action.idle_timeout.FromNanoseconds(action.idle_timeout.ToNanoseconds() + round(wait_s * 1e9))
    if action.HasField("max_stream_duration"):
        longest = action.max_stream_duration.grpc_timeout_header_max
        longest.FromNanoseconds(longest.ToNanoseconds() + round(wait_s * 1e9))


def aim(message: RouteMessage, route: Route, only: Target | None, settings: GatewaySettings, *, http: bool) -> None:
    """Send the calls of `message` to the route's arms by weight, or all to one; only of those who may."""
    for name, options in access_options(route, pinned=only is not None and only.pinned).items():
        message.typed_per_filter_config[name].CopyFrom(options)
    arm = only.arm if only is not None else next((arm for arm in route.arms if arm.asleep and arm.weight), None)
    if arm is not None and arm.asleep:
        for name, options in wake_options(arm, http=http).items():
            message.typed_per_filter_config[name].CopyFrom(options)
        _allow_wait(message.route, settings.wake.max_wait_s)
    if only is None:
        message.route.weighted_clusters.CopyFrom(_split(route, http=http))
    else:
        message.route.cluster = _cluster(only.arm, http=http)
        message.response_headers_to_add.extend(arm_headers(only.arm))


def by_priority(message: RouteMessage) -> list[RouteMessage]:
    """The route for calls of low priority, with limits of their own, then the same for all others."""
    low = RouteMessage()
    low.CopyFrom(message)
    low.route.priority = LOW_PRIORITY
    low.match.headers.append(
        route_components_pb2.HeaderMatcher(
            name=PRIORITY_HEADER, string_match=string_pb2.StringMatcher(exact=LOW, ignore_case=True)
        )
    )
    return [low, message]


def without_lua() -> dict[str, Any]:
    """Per-route configuration that keeps the Lua filter out."""
    return {LUA_FILTER: packed(lua_pb2.LuaPerRoute(disabled=True))}


def status_details(code: int, reason: str, *others: Message) -> str:
    """`grpc-status-details-bin` of an error that Envoy answers by itself: the `ErrorInfo` any Millrace service sends, and `others` behind it."""
    status = status_pb2.Status(code=code, message=reason.replace("_", " ").lower())
    for each in (error_details_pb2.ErrorInfo(reason=reason, domain="millrace.dev"), *others):
        status.details.add().Pack(each)
    return base64.b64encode(status.SerializeToString()).decode().rstrip("=")


def refusal(name: str, match: route_components_pb2.RouteMatch, code: int, reason: str, message: str) -> RouteMessage:
    """A gRPC error that Envoy answers by itself, with the same `ErrorInfo` any Millrace service sends."""
    return RouteMessage(
        name=name,
        match=match,
        direct_response=route_components_pb2.DirectResponseAction(status=404),
        response_headers_to_add=[
            header("grpc-status", str(code)),
            header("grpc-message", message),
            header("grpc-status-details-bin", status_details(code, reason)),
        ],
    )


def answer(name: str, match: route_components_pb2.RouteMatch, status: int, body: object) -> RouteMessage:
    """A JSON answer that Envoy gives by itself."""
    content = base_pb2.DataSource(inline_string=json.dumps(body, separators=(",", ":")))
    return RouteMessage(
        name=name,
        match=match,
        direct_response=route_components_pb2.DirectResponseAction(status=status, body=content),
        response_headers_to_add=[header("content-type", "application/json")],
        typed_per_filter_config=without_lua(),
    )


def _cluster(arm: Arm, *, http: bool) -> str:
    return arm.http_cluster if http else arm.cluster


def _retry(settings: GatewaySettings, *, http: bool) -> route_components_pb2.RetryPolicy:
    unprocessed = _RETRY_UNPROCESSED_HTTP if http else RETRY_UNPROCESSED
    policy = route_components_pb2.RetryPolicy(
        retry_on=unprocessed + (",reset" if settings.envoy.retry_lost_calls else ""),
        retriable_status_codes=[_HTTP_UNAVAILABLE] if http else [],
        num_retries=UInt32Value(value=settings.envoy.max_retries),
        retry_host_predicate=[
            route_components_pb2.RetryPolicy.RetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=packed(previous_hosts_pb2.PreviousHostsPredicate()),
            )
        ],
        host_selection_retry_max_attempts=5,
    )
    if settings.kubernetes is not None and settings.kubernetes.prefer_own_zone:
        # A zone that dies at once is known to be dead only after some health checks; the next try goes to the others.
        policy.retry_priority.name = "envoy.retry_priorities.previous_priorities"
        policy.retry_priority.typed_config.CopyFrom(
            packed(previous_priorities_config_pb2.PreviousPrioritiesConfig(update_frequency=1))
        )
    return policy


def _split(route: Route, *, http: bool) -> route_components_pb2.WeightedCluster:
    split = route_components_pb2.WeightedCluster()
    # Envoy spreads a hash over the arms in their order, so that the first one's share grows without losing anybody.
    if route.sticky_header:
        split.use_hash_policy.value = True
    for arm in route.arms:
        if arm.weight:
            split.clusters.append(
                route_components_pb2.WeightedCluster.ClusterWeight(
                    name=_cluster(arm, http=http),
                    weight=UInt32Value(value=arm.weight),
                    response_headers_to_add=arm_headers(arm),
                )
            )
    assert sum(cluster.weight.value for cluster in split.clusters) == WEIGHT_UNITS
    return split
