"""Calls that the gateway turned away by itself, counted by model and reason.

They are no evidence: a version is not worse because more is asked of it than it takes, or by somebody who may not call it.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass

from prometheus_client import Counter

from millrace_inference_gateway.access_log import CONNECTION_FAILED, MAX_CLIENT, OVERFLOW, RATE_LIMITED, Line
from millrace_inference_gateway.client_refusals import count_client
from millrace_inference_gateway.envoy_actions import LOW

REFUSED = Counter(
    "millrace_gateway_refused_total",
    "Calls turned away by the gateway: version_full, gateway_full, rate_limit, token, no_keys, api_key, not_permitted.",
    ["model", "reason", "priority"],
)
_SCRIPT_REASONS = frozenset({"api_key", "no_keys"})
_HTTP_MODELS = "/v2/models/"
_BY_JWT = "jwt_authn_access_denied"


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


def has_unknown_key(line: Line) -> bool:
    """Whether the call had a token whose key is not known: the issuer may have a new one."""
    details = line.details or ""
    return details.startswith(_BY_JWT) and "kid" in details


def is_low(line: Line) -> bool:
    """Whether the call was of low priority."""
    return line.priority is not None and line.priority.lower() == LOW


def read_refusal(line: Line) -> Refusal | None:
    """Why the gateway turned the call away; None when it did not."""
    reason = _reason(line)
    if not reason:
        return None
    model, path = line.model or "", line.path or ""
    if not model and path.startswith(_HTTP_MODELS):
        model = path.removeprefix(_HTTP_MODELS).partition("/")[0].partition("?")[0]
    return Refusal(model, reason, is_low(line), (line.client or "")[:MAX_CLIENT])


def count_refusal(refusal: Refusal, known: Callable[[], Container[str]]) -> None:
    """Count it; a model that the routes do not have is counted without its name, which anybody may make up."""
    model = refusal.model if refusal.model in known() else ""
    REFUSED.labels(model, refusal.reason, "low" if refusal.low else "normal").inc()
    count_client(refusal.client, refusal.reason)


def _reason(line: Line) -> str:
    details, flags = line.details or "", line.has_flags
    # Envoy says both where nothing listens any more, this process while it is away included.
    if OVERFLOW in flags and CONNECTION_FAILED not in flags:
        return "version_full"
    if RATE_LIMITED in flags:
        return "rate_limit"
    if details == "overload":
        return "gateway_full"
    if details.startswith(_BY_JWT):
        return "token"
    if details.startswith("rbac_access_denied"):
        return "not_permitted"
    return line.refused if line.refused in _SCRIPT_REASONS and details == "lua_response" else ""
