"""One synchronous channel to a service: deadline on every call, trace context, errors as `MillraceError`."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from millrace_kit.errors import MillraceError
from millrace_kit.telemetry import trace_headers

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 30.0
# Training sets and reproductions are long work behind one call.
LONG_TIMEOUT_S = 1800.0


def _metadata() -> tuple[tuple[str, str], ...]:
    """The caller's trace context, when it is inside a span."""
    return tuple((name, value.decode("ascii")) for name, value in trace_headers().items())


def call(method: Callable[..., Any], request: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """Call a unary (or client-streaming) method.

    Raises:
        MillraceError: the service refused or did not answer within `timeout_s`.
    """
    try:
        return method(request, timeout=timeout_s, metadata=_metadata())
    except grpc.RpcError as error:
        raise MillraceError.from_rpc(error) from None


def stream(method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Iterator[Any]:
    """Call a server-streaming method; the stream ends with the iterator.

    Raises:
        MillraceError: the service refused or broke off.
    """
    answers = method(request, timeout=timeout_s, metadata=_metadata())
    try:
        yield from answers
    except grpc.RpcError as error:
        raise MillraceError.from_rpc(error) from None
    finally:
        answers.cancel()
