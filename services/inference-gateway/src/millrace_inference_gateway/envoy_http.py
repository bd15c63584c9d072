"""V2 over HTTP: routes to the model servers' own HTTP port, which speaks all of the protocol, the binary tensor extension too.

The model and, where a caller names one, the version are in the path, so nothing of a body is read. What is about the server as a whole
(live, ready, metadata, index, the OpenAPI page) is answered by Envoy itself from the routes it has.
"""

import re

from envoy.config.route.v3 import route_components_pb2
from envoy.type.matcher.v3 import regex_pb2

from millrace_inference_gateway.envoy_actions import (
    RouteMessage,
    Target,
    aim,
    answer,
    by_priority,
    header,
    route_action,
    without_lua,
)
from millrace_inference_gateway.envoy_mirrors import MODEL_HEADER, mirror_policies
from millrace_inference_gateway.openapi import openapi_page
from millrace_inference_gateway.routes import Route, RouteTable
from millrace_inference_gateway.settings import GatewaySettings

HTTP_MODELS = "/v2/models/"
# After the model's name; nothing gives the model's metadata.
_UNARY = "(/(infer|generate|ready|config|stats))?"
_STREAM = "/generate_stream"
_VERSION = "/versions/[^/]+"
SERVER_NAME = "millrace-inference-gateway"
EXTENSIONS = ("model_configuration", "statistics", "binary_tensor_data", "generate")
# The OpenAPI page is the largest answer Envoy gives by itself.
MAX_ANSWER_BYTES = 128 << 10


def http_model_routes(route: Route, settings: GatewaySettings, only: Target | None) -> list[RouteMessage]:
    """Routes of one model by its path; `only` sends all to one arm. Only calls that chose a version may have one in their path."""
    found = []
    pinned = only is not None and only.pinned
    version = f"({_VERSION})?" if pinned else ""
    for kind, tail in (("http", _UNARY), ("http-stream", _STREAM)):
        stream = kind == "http-stream"
        action = route_action(route, settings, http=True, stream=stream)
        if not stream and not pinned:
            action.request_mirror_policies.extend(mirror_policies(route, only.arm if only else None))
        if pinned:
            # The server knows the model by one version, its own; the gateway's are the registry's.
            action.regex_rewrite.pattern.CopyFrom(_regex(_VERSION))
        message = RouteMessage(
            name=f"{route.model}/{only.mark if only else ''}{kind}",
            match=_path(f"{HTTP_MODELS}{re.escape(route.model)}{version}{tail}"),
            route=action,
            request_headers_to_add=[header(MODEL_HEADER, route.model)],
        )
        if not settings.prediction_log.samples_payloads:
            for name, config in without_lua().items():
                message.typed_per_filter_config[name].CopyFrom(config)
        aim(message, route, only, settings, http=True)
        found += by_priority(message)
    return found


def path_names_version(version: str | None = None) -> str:
    """A pattern of paths that name that version, or any."""
    return f"{HTTP_MODELS}[^/]+/versions/{re.escape(version) if version is not None else '[^/]+'}(/.*)?"


def http_refusal(status: int, message: str) -> RouteMessage:
    """The refusal of whatever comes here, as Triton words its errors."""
    return answer("refusal", route_components_pb2.RouteMatch(prefix="/"), status, {"error": message})


def http_server_routes(table: RouteTable, version: str) -> list[RouteMessage]:
    """Answers about the gateway itself, and the refusal of everything else below the paths of HTTP."""
    index = [{"name": arm.model, "version": arm.version, "state": "READY"} for arm in table.arms.values()]
    metadata = {"name": SERVER_NAME, "version": version, "extensions": EXTENSIONS}
    return [
        answer("http live", _exact("/v2/health/live"), 200, {"live": True}),
        answer("http ready", _exact("/v2/health/ready"), 200, {"ready": True}),
        answer("http metadata", _exact("/v2"), 200, metadata),
        answer("http metadata", _exact("/v2/"), 200, metadata),
        answer("http index", _exact("/v2/repository/index"), 200, index),
        answer("openapi", _exact("/openapi.json"), 200, openapi_page(version)),
        no_such_path("/v2/"),
        no_such_path("/v1/"),
    ]


def no_such_path(prefix: str) -> RouteMessage:
    """The refusal of paths that mean nothing, as Triton words its errors."""
    text = "unknown model or path; /openapi.json names those the gateway has"
    return answer("unknown path", route_components_pb2.RouteMatch(prefix=prefix), 404, {"error": text})


def _path(pattern: str) -> route_components_pb2.RouteMatch:
    return route_components_pb2.RouteMatch(safe_regex=_regex(pattern))


def _exact(path: str) -> route_components_pb2.RouteMatch:
    return route_components_pb2.RouteMatch(path=path)


def _regex(pattern: str) -> regex_pb2.RegexMatcher:
    return regex_pb2.RegexMatcher(regex=pattern)
