"""Where unary calls come in that have to be cheap: HTTP/1.1 on a Unix socket (from Envoy) or on a port, one answer a request.

The gRPC server has the same methods for whoever reaches it directly; this door does for its calls what the server's interceptors
do: a deadline, a limit on calls at once, errors as statuses, the duration metric, the caller's trace.
"""

import asyncio
import contextlib
import logging
import socket as sockets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from httptools import HttpParserError, HttpRequestParser

from millrace_kit.errors import InvalidArgumentError, MillraceError, PermissionDeniedError, ResourceExhaustedError
from millrace_kit.grpc_http1 import closing, error_answer, ok_answer, timeout_s, unframed
from millrace_kit.settings import TlsSettings
from millrace_kit.sockets import bound_socket
from millrace_kit.telemetry import RPC_SECONDS, is_recorded, server_span
from millrace_kit.tls import CertificateFiles

log = logging.getLogger(__name__)

MAX_HEADERS = 128
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class DoorCall:
    """One call as it came in."""

    message: bytes
    metadata: Mapping[bytes, bytes]
    remaining_s: float | None
    """What its deadline leaves; None without one."""
    client_names: Sequence[str] = ()
    """Names in the verified certificate of whoever calls; none without TLS."""


Method = Callable[[DoorCall], Awaitable[bytes]]


class CallDoor:
    """The door.

    Args:
        methods: by path (`/package.Service/Method`); they get and give serialized messages.
        max_message_bytes: largest message taken.
        max_concurrent: calls at once; the next one gets RESOURCE_EXHAUSTED.
        allowed_clients: names of which a client's certificate must carry one; empty admits all that get in.
        max_connection_age_s: age from which a connection is ended with its next answer, so that clients spread over new replicas; 0 is none.
        quiet: begin no traces here; a caller's recorded trace is followed all the same.
        default_deadline_s: deadline of calls without one, and then all calls are ended at their deadline; None leaves that to the methods.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        *,
        max_message_bytes: int,
        max_concurrent: int,
        allowed_clients: Sequence[str] = (),
        max_connection_age_s: float = 0.0,
        quiet: bool = False,
        default_deadline_s: float | None = None,
    ) -> None:
        self._methods = {path.encode(): (path, method) for path, method in methods.items()}
        self.max_message_bytes = max_message_bytes
        self._max_concurrent = max_concurrent
        self._allowed_clients = frozenset(allowed_clients)
        self.max_connection_age_s = max_connection_age_s
        self._quiet = quiet
        self._default_deadline_s = default_deadline_s
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._seconds = {
            (path, code): RPC_SECONDS.labels(path, code.name) for path in methods for code in grpc.StatusCode
        }
        self.connections: set[_Connection] = set()

    async def run(self, socket: Path, stop: asyncio.Event, drain_s: float) -> None:
        """Serve at `socket` until `stop`; running calls then have `drain_s` to end."""
        socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Connection(self), str(socket), backlog=BACKLOG)
        socket.chmod(0o600)
        await self._serve(server, stop, drain_s)

    async def run_on_port(
        self, listen: str, stop: asyncio.Event, drain_s: float, *, tls: TlsSettings | None, share_port: bool = False
    ) -> None:
        """Serve at `listen` (`host:port`) until `stop`; with `tls` only clients with a certificate of its authority get in.

        Raises:
            OSError: the address is in use or none of this machine.
            CertificateError: the files of `tls` cannot be used.
        """
        context = CertificateFiles(tls).server_context() if tls is not None else None
        bound = bound_socket(listen, share_port=share_port)
        # So that a client whose machine is gone leaves; accepted connections have it from here.
        bound.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), sock=bound, ssl=context, backlog=BACKLOG)
        await self._serve(server, stop, drain_s)

    async def _serve(self, server: asyncio.Server, stop: asyncio.Event, drain_s: float) -> None:
        try:
            await stop.wait()
            server.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._idle.wait()
        finally:
            server.close()
            for connection in list(self.connections):
                connection.end()

    async def answer(
        self, path: bytes, headers: Mapping[bytes, bytes], body: bytes, client_names: Sequence[str] = ()
    ) -> bytes:
        """The whole HTTP answer to one call."""
        started = time.perf_counter()
        found = self._methods.get(path)
        if found is None:
            return error_answer(_no_method(path))
        name, method = found
        spanless = self._quiet and not is_recorded(headers)
        with contextlib.nullcontext(_nothing) if spanless else server_span(name, headers) as ended:
            try:
                self._admit(name, client_names)
                with self._place():
                    message = unframed(body, headers.get(b"grpc-encoding", b"identity"), self.max_message_bytes)
                    left_s = timeout_s(headers.get(b"grpc-timeout", b""))
                    call = DoorCall(message, headers, left_s, client_names)
                    if self._default_deadline_s is None:
                        answer = ok_answer(await method(call))
                    else:
                        async with asyncio.timeout(self._default_deadline_s if left_s is None else left_s):
                            answer = ok_answer(await method(call))
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                self._seconds[name, grpc.StatusCode.CANCELLED].observe(time.perf_counter() - started)
                raise
            except Exception as error:
                failure = _failure(error, name)
                code, answer = failure.code, error_answer(failure)
            ended(code)
        self._seconds[name, code].observe(time.perf_counter() - started)
        return answer

    def _admit(self, method: str, client_names: Sequence[str]) -> None:
        if self._allowed_clients and self._allowed_clients.isdisjoint(client_names):
            raise PermissionDeniedError(method, client_names)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._running >= self._max_concurrent:
            text = f"{self._max_concurrent} calls are running; retry later"
            raise ResourceExhaustedError("max_concurrent_rpcs", text)
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()


def _nothing(_code: grpc.StatusCode) -> None:
    """No span ends."""


class _Connection(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, door: CallDoor) -> None:
        self._door = door
        self._parser = HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._client_names: Sequence[str] = ()
        self._made_at = time.monotonic()
        self._start()

    def _start(self) -> None:
        self._path = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        self._transport = cast("asyncio.Transport", transport)
        self._client_names = _names(transport.get_extra_info("peercert"))
        self._door.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """The caller gave the call up: so does this process."""
        self._door.connections.discard(self)
        self._transport = None
        if self._task is not None:
            self._task.cancel()

    def end(self) -> None:
        """Close."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self.end()

    def on_url(self, url: bytes) -> None:
        """A request begins."""
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if len(self._headers) < MAX_HEADERS:
            self._headers[name] = value

    def on_body(self, body: bytes) -> None:
        """A piece of the message; what is too large is refused when it is whole, and not kept."""
        self._size += len(body)
        if self._size <= self._door.max_message_bytes + 5:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole: answer it."""
        if self._task is not None:
            # Neither Envoy nor `call_lines` sends a second request before the answer to the first.
            self.end()
            return
        whole = b"".join(self._body)
        path, headers, too_large = self._path, self._headers, self._size > len(whole)
        self._start()
        if too_large and self._transport is not None:
            text = f"the message is larger than {self._door.max_message_bytes} bytes"
            self._transport.write(error_answer(ResourceExhaustedError("max_message_mib", text)))
            return
        self._task = asyncio.get_running_loop().create_task(self._answer(path, headers, whole))

    async def _answer(self, path: bytes, headers: Mapping[bytes, bytes], body: bytes) -> None:
        try:
            answer = await self._door.answer(path, headers, body, self._client_names)
        finally:
            self._task = None
        if self._transport is None:
            return
        age_s = self._door.max_connection_age_s
        if age_s and time.monotonic() - self._made_at > age_s:
            self._transport.write(closing(answer))
            self._transport.close()
        else:
            self._transport.write(answer)


def _names(certificate: Mapping[str, Sequence[tuple[str, str]]] | None) -> Sequence[str]:
    return [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"]


def _failure(error: Exception, method: str) -> MillraceError:
    match error:
        case MillraceError():
            return error
        case DecodeError():
            return InvalidArgumentError("request", "is not a message of this method's type")
        case TimeoutError():
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            return MillraceError(code, "DEADLINE_EXCEEDED", "the call took too long", {"method": method})
        case _:
            log.error("unexpected error in %s", method, exc_info=error)
            text = "unexpected error; see the service's log"
            return MillraceError(grpc.StatusCode.INTERNAL, "INTERNAL", text, {"method": method})


def _no_method(path: bytes) -> MillraceError:
    text = "this service does not have that method"
    name = path.decode("ascii", "replace")
    return MillraceError(grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", text, {"method": name})
