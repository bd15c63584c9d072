"""Failures as Feast's clients understand them.

Feast's server sends a JSON text that itself holds JSON: module, class and message of one of its exceptions. Its client raises that
exception; this service's reasons and messages ride along in the message.
"""

import json
from collections.abc import Sequence

import grpc
from millrace_kit.errors import InvalidArgumentError, MillraceError

_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_FEAST_CLASS = {
    "FEATURE_SERVICE_NOT_FOUND": "FeatureServiceNotFoundException",
    "FEATURE_VIEW_NOT_FOUND": "FeatureViewNotFoundException",
    "FEATURE_NAME_COLLISION": "FeatureNameCollisionError",
    "REQUEST_DATA_MISSING": "RequestDataNotFoundInEntityRowsException",
}


def no_service(name: str, project: str) -> MillraceError:
    """There is no such feature service."""
    message = f"Feature service {name} does not exist in project {project}"
    return MillraceError(grpc.StatusCode.NOT_FOUND, "FEATURE_SERVICE_NOT_FOUND", message, {"name": name})


def no_view(name: str, project: str) -> MillraceError:
    """There is no such feature view."""
    message = f"Feature view {name} does not exist in project {project}"
    return MillraceError(grpc.StatusCode.NOT_FOUND, "FEATURE_VIEW_NOT_FOUND", message, {"name": name})


def no_feature(view: str, feature: str) -> MillraceError:
    """The view has no such feature."""
    message = f"Feature {feature} does not exist in feature view {view}"
    return MillraceError(grpc.StatusCode.NOT_FOUND, "FEATURE_NOT_FOUND", message, {"view": view, "feature": feature})


def collision(names: Sequence[str]) -> InvalidArgumentError:
    """Features of one answer would have one name."""
    problem = f"have the same name: {', '.join(names)}; ask with full_feature_names"
    return InvalidArgumentError("features", problem, "FEATURE_NAME_COLLISION")


def no_request_data(names: Sequence[str]) -> InvalidArgumentError:
    """On-demand views need values that only the request has."""
    problem = f"lack the request fields {', '.join(names)}, which on-demand views need"
    return InvalidArgumentError("entities", problem, "REQUEST_DATA_MISSING")


def unexpected() -> MillraceError:
    """Anything else; what it was stands in the log only, since it may hold a secret."""
    return MillraceError(grpc.StatusCode.INTERNAL, "INTERNAL", "unexpected error; see the service's log")


def http_status(error: MillraceError) -> int:
    """The HTTP status that says the same."""
    return _HTTP_STATUS.get(error.code, 500)


def http_body(error: MillraceError) -> bytes:
    """The error as Feast's server writes it."""
    detail = {
        "module": "feast.errors",
        "class": _FEAST_CLASS.get(error.reason, "FeastError"),
        "message": error.message,
        "reason": error.reason,
    }
    return json.dumps(json.dumps(detail)).encode()
