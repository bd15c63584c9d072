"""What happens around every call, on both sides."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from millrace_kit.errors import InvalidArgumentError, MillraceError, PermissionDeniedError, ResourceExhaustedError
from millrace_kit.telemetry import RPC_SECONDS

log = logging.getLogger(__name__)


class ServerEdge(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Errors to statuses, a deadline for calls without one, a limit on calls at once, whose calls are taken, and the duration metric.

    Unexpected exceptions are logged whole and answered INTERNAL without their text: it may hold a secret.
    Health checks and reflection are left alone.
    """

    def __init__(self, *, default_deadline_s: float, max_concurrent: int, allowed_clients: Sequence[str] = ()) -> None:
        self._default_deadline_s = default_deadline_s
        self._max_concurrent = max_concurrent
        self._allowed_clients = frozenset(allowed_clients)
        self._running = 0
        self._wrapped: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler; once, since a method has the same one at every call."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = handler, self._wrap(handler, method)
        return known[1]

    def _wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        handler = _tolerant(handler)
        if handler.unary_unary:
            return handler._replace(unary_unary=self._unary(handler.unary_unary, method))
        if handler.stream_unary:
            return handler._replace(stream_unary=self._unary(handler.stream_unary, method))
        if handler.unary_stream:
            return handler._replace(unary_stream=self._stream(handler.unary_stream, method))
        return handler._replace(stream_stream=self._stream(handler.stream_stream, method))

    def _enter(self, context: grpc.aio.ServicerContext, method: str) -> None:
        # A Unix socket is reached only from the same pod, by a process that has no certificate.
        if self._allowed_clients and not context.peer().startswith("unix:"):
            names = client_names(context)
            if self._allowed_clients.isdisjoint(names):
                raise PermissionDeniedError(method, names)
        if self._running >= self._max_concurrent:
            raise ResourceExhaustedError(
                "max_concurrent_rpcs", f"{self._max_concurrent} calls are running; retry later"
            )
        self._running += 1

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        seconds = functools.cache(lambda code: RPC_SECONDS.labels(method, code.name))

        @functools.wraps(call)
        async def wrapped(request: Any, context: grpc.aio.ServicerContext) -> Any:
            started = time.perf_counter()
            code, entered = grpc.StatusCode.OK, False
            try:
                self._enter(context, method)
                entered = True
                request = _decoded(request)
                remaining = context.time_remaining()
                async with asyncio.timeout(self._default_deadline_s if remaining is None else None):
                    return await call(request, context)
            except BaseException as error:
                code = await _abort(context, error, method)
                raise
            finally:
                self._running -= entered
                seconds(code).observe(time.perf_counter() - started)

        return wrapped

    def _stream(self, call: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
        # Streams (watches, uploads) may live long: they end with their client, not at the default deadline.
        @functools.wraps(call)
        async def wrapped(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            started = time.perf_counter()
            code, entered = grpc.StatusCode.OK, False
            try:
                self._enter(context, method)
                entered = True
                async for response in call(_decoded(request), context):
                    yield response
            except GeneratorExit:
                code = grpc.StatusCode.CANCELLED
                raise
            except BaseException as error:
                code = await _abort(context, error, method)
                raise
            finally:
                self._running -= entered
                RPC_SECONDS.labels(method, code.name).observe(time.perf_counter() - started)

        return wrapped


def client_names(context: grpc.aio.ServicerContext) -> Sequence[str]:
    """Names in the client's certificate, which gRPC has verified; none without mutual TLS."""
    found = context.auth_context().get("x509_subject_alternative_name", ())
    return [name.decode("utf-8", "replace") for name in found]


class _Undecodable:
    """Stands for a request whose bytes are no message of the method's type."""


def _tolerant(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler, with bytes that cannot be decoded handed on as `_Undecodable`; by itself gRPC answers UNKNOWN to them."""
    decode = handler.request_deserializer
    if decode is None:
        return handler

    def attempt(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            return _Undecodable()

    return handler._replace(request_deserializer=attempt)


def _decoded(request: Any) -> Any:
    """The request, or a stream of requests, each checked for being one.

    Raises:
        InvalidArgumentError: it is none.
    """
    if isinstance(request, _Undecodable):
        raise InvalidArgumentError("request", "is not a message of this method's type")
    return _decoded_stream(request) if isinstance(request, AsyncIterable) else request


async def _decoded_stream(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


async def _abort(context: grpc.aio.ServicerContext, error: BaseException, method: str) -> grpc.StatusCode:
    """End the call with the status `error` stands for; returns its code where gRPC raises by itself."""
    match error:
        case MillraceError():
            status = rpc_status.to_status(error.to_status())
            code = error.code
        case asyncio.CancelledError():
            return grpc.StatusCode.CANCELLED
        case TimeoutError():
            failure = MillraceError(
                grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the call took too long", {"method": method}
            )
            status = rpc_status.to_status(failure.to_status())
            code = failure.code
        case grpc.aio.AbortError():
            return context.code() or grpc.StatusCode.UNKNOWN
        case grpc.aio.AioRpcError():
            # A call to another service failed: pass its reason on, it already says what to do.
            passed = MillraceError.from_rpc(error)
            status = rpc_status.to_status(passed.to_status())
            code = passed.code
        case NotImplementedError():
            failure = MillraceError(
                grpc.StatusCode.UNIMPLEMENTED,
                "UNIMPLEMENTED",
                "this service does not have that method",
                {"method": method},
            )
            status = rpc_status.to_status(failure.to_status())
            code = failure.code
        case Exception():
            log.error("unexpected error in %s", method, exc_info=error)
            failure = MillraceError(
                grpc.StatusCode.INTERNAL, "INTERNAL", "unexpected error; see the service's log", {"method": method}
            )
            status = rpc_status.to_status(failure.to_status())
            code = failure.code
        case _:
            return grpc.StatusCode.UNKNOWN
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(code, status.details, status.trailing_metadata)
    return code


class _DeadlineMixin:
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def _with_deadline(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        if details.timeout is not None:
            return details
        return grpc.aio.ClientCallDetails(
            details.method, self._timeout_s, details.metadata, details.credentials, details.wait_for_ready
        )


class UnaryDeadline(_DeadlineMixin, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Gives calls without a deadline the channel's own."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Add the deadline."""
        return await continuation(self._with_deadline(client_call_details), request)


class StreamUnaryDeadline(_DeadlineMixin, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    """The same for uploads."""

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Add the deadline."""
        return await continuation(self._with_deadline(client_call_details), request_iterator)
