"""Whom the gateway refuses, and why, by the names that its authentication gives callers.

Names are limited: where they come from tokens there is no end to them.
"""

from prometheus_client import Counter

MAX_CLIENTS = 1000
OTHERS = "(others)"
"""Callers beyond the first `MAX_CLIENTS` that were refused something."""
INVALID = "invalid"
"""The call, or a row of a batch, is wrong: INVALID_ARGUMENT, by the gateway or by the model server."""

CLIENT_REFUSED = Counter(
    "millrace_gateway_client_refused_total",
    "Calls and rows refused, by caller: the reasons of millrace_gateway_refused_total, and invalid.",
    ["client", "reason"],
)
_names: set[str] = set()


def count_client(client: str, reason: str) -> None:
    """Count a refusal; `client` is empty where nobody knows who it was."""
    if client not in _names:
        if len(_names) >= MAX_CLIENTS:
            client = OTHERS
        else:
            _names.add(client)
    CLIENT_REFUSED.labels(client, reason).inc()
