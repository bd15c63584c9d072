"""The route table as Envoy's messages: models by metadata, splits by hash, rules by CEL, everything else a clear refusal."""

import base64
from typing import TypeAlias

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import UInt32Value, UInt64Value
from google.rpc import error_details_pb2, status_pb2
from xds.core.v3 import extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from millrace_inference_gateway.envoy_clusters import PYTHON_CLUSTER, SERVER_CLUSTER, duration, packed
from millrace_inference_gateway.envoy_mirrors import MODEL_HEADER, mirror_policies
from millrace_inference_gateway.envoy_rules import both, header_equals, rule_predicate
from millrace_inference_gateway.routes import WEIGHT_UNITS, Arm, Route, RouteTable, Rule
from millrace_inference_gateway.settings import GatewaySettings

ROUTES_NAME = "routes"
LUA_FILTER = "millrace.model_name"
V2 = "/inference.GRPCInferenceService/"
INFER = V2 + "ModelInfer"
STREAM_INFER = V2 + "ModelStreamInfer"
_MODEL_METHODS = "ModelInfer|ModelStreamInfer|ModelReady|ModelMetadata|ModelConfig|ModelStatistics"
_SERVER_METHODS = "ServerLive|ServerReady|ServerMetadata|RepositoryIndex"
_PYTHON_SERVICES = (
    "millrace_api.prediction.v1.PredictionService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.reflection.v1.ServerReflection",
)
_NOT_FOUND, _UNIMPLEMENTED = 5, 12
# `unavailable` and `refused-stream` are calls the server did not take; `reset-before-request` ones it never saw.
_RETRY_UNPROCESSED = "connect-failure,refused-stream,reset-before-request,unavailable"

RouteMessage: TypeAlias = route_components_pb2.Route


def route_configuration(table: RouteTable, settings: GatewaySettings) -> route_pb2.RouteConfiguration:
    """Every route. The matcher tries the rules first, then the plain routes in order."""
    plain = [
        *(message for route in table.routes.values() for message in _model_routes(route, settings)),
        _server_route(),
        _unnamed_route(),
        _refusal("unknown model", _regex(V2, _MODEL_METHODS), _NOT_FOUND, "MODEL_NOT_FOUND", _no_model()),
        *(_python_route(service) for service in _PYTHON_SERVICES),
        _refusal(
            "unknown method",
            route_components_pb2.RouteMatch(prefix="/"),
            _UNIMPLEMENTED,
            "UNIMPLEMENTED",
            "the gateway does not have the method %REQ(:path)%",
        ),
    ]
    matcher = matcher_pb2.Matcher(on_no_match=_routes_action(plain))
    for route in table.routes.values():
        for rule in route.rules:
            matcher.matcher_list.matchers.append(_rule_matcher(route, rule, settings))
    host = route_components_pb2.VirtualHost(
        name="public",
        domains=["*"],
        matcher=matcher,
        # A client without metadata has its body held until it is whole, for the model's name; never more than a message may have.
        request_body_buffer_limit=UInt64Value(value=settings.max_message_mib << 20),
        response_headers_to_add=[_header("x-millrace-prediction-id", "%REQ(x-request-id)%")],
    )
    return route_pb2.RouteConfiguration(
        name=ROUTES_NAME, virtual_hosts=[host], response_headers_to_remove=["x-envoy-upstream-service-time"]
    )


def _no_model() -> str:
    return "no model named '%REQ(x-millrace-model)%'"


def _regex(prefix: str, methods: str) -> route_components_pb2.RouteMatch:
    pattern = prefix.replace(".", r"\.") + f"({methods})"
    return route_components_pb2.RouteMatch(safe_regex=regex_pb2.RegexMatcher(regex=pattern))


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _arm_headers(arm: Arm) -> list[base_pb2.HeaderValueOption]:
    headers = [_header("x-millrace-version", arm.version)]
    return [*headers, _header("x-millrace-digest", arm.digest)] if arm.digest else headers


def _retry(settings: GatewaySettings) -> route_components_pb2.RetryPolicy:
    return route_components_pb2.RetryPolicy(
        retry_on=_RETRY_UNPROCESSED + (",reset" if settings.envoy.retry_lost_calls else ""),
        num_retries=UInt32Value(value=settings.envoy.max_retries),
        retry_host_predicate=[
            route_components_pb2.RetryPolicy.RetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=packed(previous_hosts_pb2.PreviousHostsPredicate()),
            )
        ],
        host_selection_retry_max_attempts=5,
    )


def _action(route: Route, settings: GatewaySettings) -> route_components_pb2.RouteAction:
    timeout = duration(route.timeout_ms / 1000)
    action = route_components_pb2.RouteAction(
        timeout=timeout,
        idle_timeout=duration(settings.envoy.stream_idle_s),
        # A caller's own, shorter deadline (grpc-timeout) counts too.
        max_stream_duration=route_components_pb2.RouteAction.MaxStreamDuration(grpc_timeout_header_max=timeout),
    )
    if settings.envoy.max_retries:
        action.retry_policy.CopyFrom(_retry(settings))
    if route.sticky_header:
        action.hash_policy.append(
            route_components_pb2.RouteAction.HashPolicy(
                header=route_components_pb2.RouteAction.HashPolicy.Header(header_name=route.sticky_header)
            )
        )
    return action


def _split(route: Route) -> route_components_pb2.WeightedCluster:
    split = route_components_pb2.WeightedCluster()
    # Envoy spreads a hash over the arms in their order, so that the first one's share grows without losing anybody.
    if route.sticky_header:
        split.use_hash_policy.value = True
    for arm in route.arms:
        if arm.weight:
            split.clusters.append(
                route_components_pb2.WeightedCluster.ClusterWeight(
                    name=arm.cluster, weight=UInt32Value(value=arm.weight), response_headers_to_add=_arm_headers(arm)
                )
            )
    assert sum(cluster.weight.value for cluster in split.clusters) == WEIGHT_UNITS
    return split


def _model_match(route: Route, match: route_components_pb2.RouteMatch) -> route_components_pb2.RouteMatch:
    match.headers.append(
        route_components_pb2.HeaderMatcher(name=MODEL_HEADER, string_match=string_pb2.StringMatcher(exact=route.model))
    )
    return match


def _model_routes(route: Route, settings: GatewaySettings, only: Arm | None = None) -> list[RouteMessage]:
    """Routes of one model: unary methods, and the stream whose life no request deadline may end. `only` sends all to one arm."""
    found = []
    unary = _MODEL_METHODS.replace("ModelStreamInfer|", "")
    for name, methods in (("unary", unary), ("stream", "ModelStreamInfer")):
        action = _action(route, settings)
        if name == "stream":
            action.timeout.CopyFrom(duration(0))
            action.ClearField("max_stream_duration")
            action.ClearField("retry_policy")
        else:
            action.request_mirror_policies.extend(mirror_policies(route, only))
        message = RouteMessage(
            name=f"{route.model}/{name}", match=_model_match(route, _regex(V2, methods)), route=action
        )
        if not settings.prediction_log.samples_payloads:
            message.typed_per_filter_config[LUA_FILTER].CopyFrom(_without_lua()[LUA_FILTER])
        if only is None:
            message.route.weighted_clusters.CopyFrom(_split(route))
        else:
            message.route.cluster = only.cluster
            message.response_headers_to_add.extend(_arm_headers(only))
        found.append(message)
    return found


def _rule_matcher(route: Route, rule: Rule, settings: GatewaySettings) -> matcher_pb2.Matcher.MatcherList.FieldMatcher:
    arm = next(arm for arm in route.arms if arm.candidate == rule.candidate and not arm.leaving)
    refusal = _refusal(
        "unknown method",
        route_components_pb2.RouteMatch(prefix="/"),
        _UNIMPLEMENTED,
        "UNIMPLEMENTED",
        "the gateway does not have the method %REQ(:path)%",
    )
    return matcher_pb2.Matcher.MatcherList.FieldMatcher(
        predicate=both(header_equals(MODEL_HEADER, route.model), rule_predicate(rule.when)),
        on_match=_routes_action([*_model_routes(route, settings, arm), _server_route(), refusal]),
    )


def _routes_action(routes: list[RouteMessage]) -> matcher_pb2.Matcher.OnMatch:
    action = extension_pb2.TypedExtensionConfig(
        name="routes", typed_config=packed(route_components_pb2.RouteList(routes=routes))
    )
    return matcher_pb2.Matcher.OnMatch(action=action)


def _unnamed_route() -> RouteMessage:
    """A call that does not say its model yet: the Lua filter reads it from the body and has the route chosen again, or refuses.

    It never gets as far as its cluster; a refusal could not stand here, because the limit for held bodies goes with a cluster.
    """
    match = _regex(V2, _MODEL_METHODS)
    match.headers.append(route_components_pb2.HeaderMatcher(name=MODEL_HEADER, present_match=False))
    return RouteMessage(name="unnamed", match=match, route=route_components_pb2.RouteAction(cluster=SERVER_CLUSTER))


def _server_route() -> RouteMessage:
    action = route_components_pb2.RouteAction(cluster=SERVER_CLUSTER, timeout=duration(5))
    action.retry_policy.retry_on = _RETRY_UNPROCESSED
    return RouteMessage(
        name="server", match=_regex(V2, _SERVER_METHODS), route=action, typed_per_filter_config=_without_lua()
    )


def _python_route(service: str) -> RouteMessage:
    action = route_components_pb2.RouteAction(cluster=PYTHON_CLUSTER, timeout=duration(0))
    # Nothing was done yet when a connection could not be made; anything later may have been answered.
    action.retry_policy.retry_on = "connect-failure,refused-stream,reset-before-request"
    return RouteMessage(
        name=service,
        match=route_components_pb2.RouteMatch(prefix=f"/{service}/"),
        route=action,
        typed_per_filter_config=_without_lua(),
    )


def _without_lua() -> dict[str, Any]:
    return {LUA_FILTER: packed(lua_pb2.LuaPerRoute(disabled=True))}


def _refusal(name: str, match: route_components_pb2.RouteMatch, code: int, reason: str, message: str) -> RouteMessage:
    """A gRPC error that Envoy answers by itself, with the same `ErrorInfo` any Millrace service sends."""
    status = status_pb2.Status(code=code, message=reason.replace("_", " ").lower())
    detail = status.details.add()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="millrace.dev"))
    encoded = base64.b64encode(status.SerializeToString()).decode().rstrip("=")
    return RouteMessage(
        name=name,
        match=match,
        direct_response=route_components_pb2.DirectResponseAction(status=404),
        response_headers_to_add=[
            _header("grpc-status", str(code)),
            _header("grpc-message", message),
            _header("grpc-status-details-bin", encoded),
        ],
    )
