"""Calls that the gateway turned away by itself, counted by model and reason.

They are no evidence: a version is not worse because more is asked of it than it takes, or by somebody who may not call it.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass

from envoy.data.accesslog.v3 import accesslog_pb2
from prometheus_client import Counter

from millrace_inference_gateway.access_log import MAX_CLIENT, MODEL_HEADER
from millrace_inference_gateway.client_refusals import count_client
from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.envoy_actions import LOW, PRIORITY_HEADER

REFUSED = Counter(
    "millrace_gateway_refused_total",
    "Calls turned away by the gateway: version_full, gateway_full, rate_limit, token, no_keys, api_key, not_permitted.",
    ["model", "reason", "priority"],
)
REFUSED_HEADER = "x-millrace-refused"
"""In which Envoy's scripts say why they turn a call away."""
_SCRIPT_REASONS = frozenset({"api_key", "no_keys"})
_HTTP_MODELS = "/v2/models/"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One call that no model server saw."""

    model: str
    """As the caller named it."""
    reason: str
    low: bool
    """Whether the call was of low priority."""
    client: str = ""
    """Who called, where the gateway knows."""


def has_unknown_key(entry: accesslog_pb2.HTTPAccessLogEntry) -> bool:
    """Whether the call had a token whose key is not known: the issuer may have a new one."""
    details = entry.response.response_code_details
    return details.startswith("jwt_authn_access_denied") and "kid" in details


def is_low(entry: accesslog_pb2.HTTPAccessLogEntry) -> bool:
    """Whether the call was of low priority."""
    return str(entry.request.request_headers.get(PRIORITY_HEADER, "")).lower() == LOW


def read_refusal(entry: accesslog_pb2.HTTPAccessLogEntry) -> Refusal | None:
    """Why the gateway turned the call away; None when it did not."""
    reason = _reason(entry)
    if not reason:
        return None
    model = entry.request.request_headers.get(MODEL_HEADER, "")
    if not model and entry.request.path.startswith(_HTTP_MODELS):
        model = entry.request.path.removeprefix(_HTTP_MODELS).partition("/")[0].partition("?")[0]
    return Refusal(model, reason, is_low(entry), entry.request.request_headers.get(CLIENT_HEADER, "")[:MAX_CLIENT])


def count_refusal(refusal: Refusal, known: Callable[[], Container[str]]) -> None:
    """Count it; a model that the routes do not have is counted without its name, which anybody may make up."""
    model = refusal.model if refusal.model in known() else ""
    REFUSED.labels(model, refusal.reason, "low" if refusal.low else "normal").inc()
    count_client(refusal.client, refusal.reason)


def _reason(entry: accesslog_pb2.HTTPAccessLogEntry) -> str:
    flags, details = entry.common_properties.response_flags, entry.response.response_code_details
    if flags.upstream_overflow:
        return "version_full"
    if flags.rate_limited:
        return "rate_limit"
    if details == "overload":
        return "gateway_full"
    if details.startswith("jwt_authn_access_denied"):
        return "token"
    if details.startswith("rbac_access_denied"):
        return "not_permitted"
    said = str(entry.response.response_headers.get(REFUSED_HEADER, ""))
    return said if details == "lua_response" and said in _SCRIPT_REASONS else ""
