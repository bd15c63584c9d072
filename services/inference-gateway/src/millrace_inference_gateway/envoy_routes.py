"""The route table as Envoy's messages: models by metadata or path, splits by hash, rules by CEL, everything else a clear refusal."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.type.matcher.v3 import http_inputs_pb2, regex_pb2
from google.protobuf.wrappers_pb2 import UInt32Value, UInt64Value
from xds.core.v3 import extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from millrace_inference_gateway.envoy_actions import (
    LUA_FILTER,
    RETRY_UNPROCESSED,
    VERSION_HEADER,
    RouteMessage,
    Target,
    aim,
    by_priority,
    header,
    refusal,
    route_action,
    without_lua,
)
from millrace_inference_gateway.envoy_clusters import PYTHON_CLUSTER, SERVER_CLUSTER, duration, packed
from millrace_inference_gateway.envoy_door import door_routes
from millrace_inference_gateway.envoy_http import (
    HTTP_MODELS,
    MAX_ANSWER_BYTES,
    http_model_routes,
    http_refusal,
    http_server_routes,
    no_such_path,
    path_names_version,
)
from millrace_inference_gateway.envoy_mirrors import MODEL_HEADER, mirror_policies
from millrace_inference_gateway.envoy_rules import (
    Predicate,
    either,
    header_equals,
    header_matches,
    header_present,
    rule_predicate,
)
from millrace_inference_gateway.routes import Route, RouteTable
from millrace_inference_gateway.settings import GatewaySettings

ROUTES_NAME = "routes"
V2 = "/inference.GRPCInferenceService/"
INFER = V2 + "ModelInfer"
STREAM_INFER = V2 + "ModelStreamInfer"
_UNARY_METHODS = "ModelInfer|ModelReady|ModelMetadata|ModelConfig|ModelStatistics"
_MODEL_METHODS = f"{_UNARY_METHODS}|ModelStreamInfer"
_SERVER_METHODS = "ServerLive|ServerReady|ServerMetadata|RepositoryIndex"
_PYTHON_SERVICES = (
    "millrace_api.prediction.v1.PredictionService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.reflection.v1.ServerReflection",
)
_NOT_FOUND, _PERMISSION_DENIED, _UNIMPLEMENTED = 5, 7, 12
_REASONS = {_NOT_FOUND: "VERSION_NOT_FOUND", _PERMISSION_DENIED: "VERSION_NOT_PERMITTED"}
_HTTP_CODES = {_NOT_FOUND: 404, _PERMISSION_DENIED: 403}


@dataclass(frozen=True, slots=True)
class _Protocol:
    """How one model's calls of a protocol become routes."""

    routes: Callable[[Route, Target | None], list[RouteMessage]]
    chose: Callable[[str | None], Predicate]
    """Holds for calls that chose that version, or any."""
    refuse: Callable[[int, str], RouteMessage]
    """Refuses everything with a gRPC status."""


def route_configuration(table: RouteTable, settings: GatewaySettings) -> route_pb2.RouteConfiguration:
    """Every route. A call finds its model's part by one look-up, whatever the number of models; there the rules come first."""
    grpc = _Protocol(
        lambda route, only: [*_grpc_model_routes(route, settings, only), _unknown_method()], _chose_by_header, _refuse
    )
    http = _Protocol(
        lambda route, only: [*http_model_routes(route, settings, only), no_such_path("/")], _chose_by_path, _refuse_http
    )
    about_no_model = matcher_pb2.Matcher(
        on_no_match=_routes_action(
            [
                _unnamed_route(),
                refusal("unknown model", _methods(_MODEL_METHODS), _NOT_FOUND, "MODEL_NOT_FOUND", _no_model()),
                _unknown_method(),
            ]
        )
    )
    by_name = {model: _model_part(route, grpc) for model, route in table.routes.items()}
    by_path = {f"{HTTP_MODELS}{model}": _model_part(route, http) for model, route in table.routes.items()}
    by_path[V2 + "Model"] = matcher_pb2.Matcher.OnMatch(matcher=_tree(MODEL_HEADER, by_name, about_no_model))
    matcher = matcher_pb2.Matcher(
        matcher_tree=matcher_pb2.Matcher.MatcherTree(
            input=_header_input(":path"), prefix_match_map=matcher_pb2.Matcher.MatcherTree.MatchMap(map=by_path)
        ),
        on_no_match=_routes_action(
            [
                _server_route(),
                *door_routes(without_lua()),
                *(_python_route(service) for service in _PYTHON_SERVICES),
                *http_server_routes(table, version("millrace-inference-gateway")),
                _unknown_method(),
            ]
        ),
    )
    host = route_components_pb2.VirtualHost(
        name="public",
        domains=["*"],
        matcher=matcher,
        # A client without metadata has its body held until it is whole, for the model's name; never more than a message may have.
        request_body_buffer_limit=UInt64Value(value=settings.max_message_mib << 20),
        response_headers_to_add=[header("x-millrace-prediction-id", "%REQ(x-request-id)%")],
    )
    return route_pb2.RouteConfiguration(
        name=ROUTES_NAME,
        virtual_hosts=[host],
        response_headers_to_remove=["x-envoy-upstream-service-time"],
        max_direct_response_body_size_bytes=UInt32Value(value=MAX_ANSWER_BYTES),
    )


def _model_part(route: Route, protocol: _Protocol) -> matcher_pb2.Matcher.OnMatch:
    """One model's routes: those of callers who chose a version first, then those of its rules, then those by weight."""
    cases: list[tuple[Predicate, list[RouteMessage]]] = []
    if route.testers:
        cases += [(protocol.chose(arm.version), protocol.routes(route, Target(arm, pinned=True))) for arm in route.arms]
        cases.append((protocol.chose(None), [protocol.refuse(_NOT_FOUND, "the model does not have this version here")]))
    else:
        text = "nobody may choose a version of this model (spec.routing.testers)"
        cases.append((protocol.chose(None), [protocol.refuse(_PERMISSION_DENIED, text)]))
    for rule in route.rules:
        arm = next(arm for arm in route.arms if arm.candidate == rule.candidate and not arm.leaving)
        cases.append((rule_predicate(rule.when), protocol.routes(route, Target(arm))))
    matcher = matcher_pb2.Matcher(on_no_match=_routes_action(protocol.routes(route, None)))
    for predicate, routes in cases:
        matcher.matcher_list.matchers.append(
            matcher_pb2.Matcher.MatcherList.FieldMatcher(predicate=predicate, on_match=_routes_action(routes))
        )
    return matcher_pb2.Matcher.OnMatch(matcher=matcher)


def _chose_by_header(version: str | None) -> Predicate:
    return header_present(VERSION_HEADER) if version is None else header_equals(VERSION_HEADER, version)


def _chose_by_path(version: str | None) -> Predicate:
    return either(_chose_by_header(version), header_matches(":path", path_names_version(version)))


def _refuse(code: int, message: str) -> RouteMessage:
    return refusal("refusal", route_components_pb2.RouteMatch(prefix="/"), code, _REASONS[code], message)


def _refuse_http(code: int, message: str) -> RouteMessage:
    return http_refusal(_HTTP_CODES[code], message)


def _tree(
    name: str, found: dict[str, matcher_pb2.Matcher.OnMatch], otherwise: matcher_pb2.Matcher
) -> matcher_pb2.Matcher:
    """A look-up by the value of a header."""
    if not found:
        return otherwise
    return matcher_pb2.Matcher(
        matcher_tree=matcher_pb2.Matcher.MatcherTree(
            input=_header_input(name), exact_match_map=matcher_pb2.Matcher.MatcherTree.MatchMap(map=found)
        ),
        on_no_match=otherwise.on_no_match,
    )


def _header_input(name: str) -> extension_pb2.TypedExtensionConfig:
    source = http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=name)
    return extension_pb2.TypedExtensionConfig(name="header", typed_config=packed(source))


def _no_model() -> str:
    return "no model named '%REQ(x-millrace-model)%'"


def _methods(methods: str) -> route_components_pb2.RouteMatch:
    pattern = V2.replace(".", r"\.") + f"({methods})"
    return route_components_pb2.RouteMatch(safe_regex=regex_pb2.RegexMatcher(regex=pattern))


def _unknown_method() -> RouteMessage:
    return refusal(
        "unknown method",
        route_components_pb2.RouteMatch(prefix="/"),
        _UNIMPLEMENTED,
        "UNIMPLEMENTED",
        "the gateway does not have the method %REQ(:path)%",
    )


def _grpc_model_routes(route: Route, settings: GatewaySettings, only: Target | None) -> list[RouteMessage]:
    """Routes of one model: unary methods, and the stream whose life no request deadline may end. `only` sends all to one arm."""
    found = []
    for name, methods in (("unary", _UNARY_METHODS), ("stream", "ModelStreamInfer")):
        stream = name == "stream"
        action = route_action(route, settings, http=False, stream=stream)
        if not stream and not (only and only.pinned):
            action.request_mirror_policies.extend(mirror_policies(route, only.arm if only else None))
        message = RouteMessage(
            name=f"{route.model}/{only.mark if only else ''}{name}", match=_methods(methods), route=action
        )
        if not settings.prediction_log.samples_payloads:
            message.typed_per_filter_config[LUA_FILTER].CopyFrom(without_lua()[LUA_FILTER])
        aim(message, route, only, settings, http=False)
        found += by_priority(message)
    return found


def _routes_action(routes: list[RouteMessage]) -> matcher_pb2.Matcher.OnMatch:
    action = extension_pb2.TypedExtensionConfig(
        name="routes", typed_config=packed(route_components_pb2.RouteList(routes=routes))
    )
    return matcher_pb2.Matcher.OnMatch(action=action)


def _unnamed_route() -> RouteMessage:
    """A call that does not say its model yet: the Lua filter reads it from the body and has the route chosen again, or refuses.

    It never gets as far as its cluster; a refusal could not stand here, because the limit for held bodies goes with a cluster.
    """
    match = _methods(_MODEL_METHODS)
    match.headers.append(route_components_pb2.HeaderMatcher(name=MODEL_HEADER, present_match=False))
    return RouteMessage(name="unnamed", match=match, route=route_components_pb2.RouteAction(cluster=SERVER_CLUSTER))


def _server_route() -> RouteMessage:
    action = route_components_pb2.RouteAction(cluster=SERVER_CLUSTER, timeout=duration(5))
    action.retry_policy.retry_on = RETRY_UNPROCESSED
    return RouteMessage(
        name="server", match=_methods(_SERVER_METHODS), route=action, typed_per_filter_config=without_lua()
    )


def _python_route(service: str) -> RouteMessage:
    action = route_components_pb2.RouteAction(cluster=PYTHON_CLUSTER, timeout=duration(0))
    # Nothing was done yet when a connection could not be made; anything later may have been answered.
    action.retry_policy.retry_on = "connect-failure,refused-stream,reset-before-request"
    return RouteMessage(
        name=service,
        match=route_components_pb2.RouteMatch(prefix=f"/{service}/"),
        route=action,
        typed_per_filter_config=without_lua(),
    )
