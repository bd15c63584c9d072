"""Unary calls that have to be cheap, made: HTTP/1.1 over kept connections, one call at a time on each. `call_door` answers them.

What is called may be Envoy's Unix socket or another service's port. A gRPC library in Python costs several times as much a call.
"""

import asyncio
import itertools
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
from httptools import HttpParserError, HttpResponseParser

from millrace_kit.client import DNS_SCHEME
from millrace_kit.errors import MillraceError, UnavailableError
from millrace_kit.grpc_http1 import framed, status_error, timeout_header, unframed
from millrace_kit.settings import TlsSettings
from millrace_kit.tls import CertificateFiles

MAX_HEADERS = 128
# A call that the other side should have ended by its own deadline gets this much more before its connection is given up.
PATIENCE_S = 0.05
# Longest wait for a connection to one address, TLS included.
CONNECT_S = 1.0

Metadata = Iterable[tuple[bytes, bytes]]
Open = Callable[[Callable[[], asyncio.Protocol]], Awaitable[Any]]
"""Connects, as an event loop's `create_connection` does: (transport, protocol)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is called, as errors name it."""

    name: str
    """Whose connections these are: "Envoy"."""
    answerer: str
    """Who does not answer in time: "the model"."""
    away: str
    """Reason of UNAVAILABLE."""
    late: str
    """Reason of DEADLINE_EXCEEDED."""
    repeats: bool = False
    """Whether a call may be made again when a connection that was kept has ended without a byte of its answer."""


@dataclass(slots=True)
class LineAnswer:
    """One answer: headers and trailers together, and the one message."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: list[bytes] = field(default_factory=list)
    size: int = 0


class _Line(asyncio.Protocol):
    """One connection."""

    def __init__(self, peer: Peer, max_bytes: int, lost: "Callable[[_Line], None]") -> None:
        self._peer = peer
        self._max_bytes = max_bytes
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._answer = LineAnswer()
        self._waiting: asyncio.Future[LineAnswer] | None = None
        self.has_answered = False
        """Whether a byte of the answer to the newest call has come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """The call under way fails."""
        self._transport = None
        self._fail(f"the connection to {self._peer.name} ended")
        self._lost(self)

    def close(self) -> None:
        """Give the connection up, and with it the call under way."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether a call may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> "asyncio.Future[LineAnswer]":
        """Send one whole request."""
        assert self._transport is not None
        self._parser = HttpResponseParser(self)
        self._answer = LineAnswer()
        self._waiting = asyncio.get_running_loop().create_future()
        self.has_answered = False
        self._transport.write(request)
        return self._waiting

    def expire(self) -> None:
        """The call under way has taken too long."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(TimeoutError())

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self.has_answered = True
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self._fail(f"the answer of {self._peer.name} is not HTTP")
            self.close()

    def on_status(self, _status: bytes) -> None:
        """An answer begins."""
        self._answer.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if len(self._answer.headers) < MAX_HEADERS:
            self._answer.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        """A piece of the message."""
        self._answer.size += len(body)
        if self._answer.size > self._max_bytes:
            self._fail(f"the answer of {self._peer.answerer} is too large")
            self.close()
        else:
            self._answer.body.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(self._answer)

    def _fail(self, problem: str) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(UnavailableError(self._peer.away, problem))


def to_socket(path: Path) -> Open:
    """Connections to a Unix socket."""
    return lambda made: asyncio.get_running_loop().create_unix_connection(made, str(path))


def to_port(target: str, tls: TlsSettings | None = None) -> Open:
    """Connections to `host:port` (`dns:///host:port` is the same): to every address of the name in turn, to the next where one refuses.

    The name is looked up at each connection, and certificates are the newest then.

    Raises:
        CertificateError: the files of `tls` cannot be used.
    """
    host, _, port = target.removeprefix(DNS_SCHEME).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    files = CertificateFiles(tls) if tls is not None else None
    turns = itertools.count()

    async def connect(made: Callable[[], asyncio.Protocol]) -> Any:
        loop = asyncio.get_running_loop()
        secure: dict[str, Any] = {"ssl": files.client_context(), "server_hostname": host} if files is not None else {}
        found = sorted({str(entry[4][0]) for entry in await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)})
        first = next(turns) % len(found)
        problem: OSError | None = None
        for address in (*found[first:], *found[:first]):
            try:
                async with asyncio.timeout(CONNECT_S):
                    return await loop.create_connection(made, address, int(port), **secure)
            except OSError as error:  # TimeoutError is one
                problem = error
        assert problem is not None
        raise problem

    return connect


class CallLines:
    """At most `count` connections to `peer`; a call beyond that waits for one, within its deadline."""

    def __init__(self, open_: Open, peer: Peer, count: int, max_message_bytes: int) -> None:
        self._open_line = open_
        self._peer = peer
        self._max_bytes = max_message_bytes
        self._idle: list[_Line] = []
        self._busy: set[_Line] = set()
        self._places = asyncio.Semaphore(count)
        self._closed = False

    async def call(
        self, path: bytes, metadata: Metadata, message: bytes, timeout_s: float
    ) -> tuple[bytes, dict[bytes, bytes]]:
        """Call `path`; returns the answer's message and its headers.

        Raises:
            UnavailableError: the peer is away, or went away.
            MillraceError: the status the call ended with; DEADLINE_EXCEEDED after `timeout_s`.
        """
        until, pairs = time.monotonic() + timeout_s, list(metadata)

        def request() -> bytes:
            return _request(path, pairs, message, until - time.monotonic())

        try:
            kept = None if self._places.locked() else self._take()
            if kept is None:
                async with asyncio.timeout_at(_loop_time(until)), self._places:
                    answer = await self._asked(self._take(), request, until)
            else:
                async with self._places:  # there is one, so nothing is waited for
                    answer = await self._asked(kept, request, until)
        except TimeoutError:
            text = f"no answer of {self._peer.answerer} within {timeout_s * 1000:.0f} ms"
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise MillraceError(code, self._peer.late, text) from None
        if (error := status_error(answer.status, answer.headers)) is not None:
            raise error
        whole = answer.body[0] if len(answer.body) == 1 else b"".join(answer.body)
        return unframed(whole, answer.headers.get(b"grpc-encoding", b"identity"), self._max_bytes), answer.headers

    async def _asked(self, kept: _Line | None, request: Callable[[], bytes], until: float) -> LineAnswer:
        if kept is not None:
            try:
                return await self._exchange(kept, request(), until)
            except UnavailableError:
                # The peer ended it while it was silent; nothing was answered, and a new connection tells whether it is there.
                if not self._peer.repeats or kept.has_answered:
                    raise
        async with asyncio.timeout_at(_loop_time(until)):
            line = await self._open()
        return await self._exchange(line, request(), until)

    async def _exchange(self, line: _Line, request: bytes, until: float) -> LineAnswer:
        self._busy.add(line)
        whole = False
        # Instead of `asyncio.timeout`, which costs several times as much.
        timer = asyncio.get_running_loop().call_later(max(0.0, until - time.monotonic()) + PATIENCE_S, line.expire)
        try:
            answer = await line.send(request)
            whole = True
        finally:
            timer.cancel()
            self._busy.discard(line)
            if whole and line.is_open and answer.headers.get(b"connection") != b"close" and not self._closed:
                self._idle.append(line)
            else:
                line.close()
        return answer

    def _take(self) -> _Line | None:
        while self._idle:
            line = self._idle.pop()
            if line.is_open:
                return line
        return None

    async def _open(self) -> _Line:
        made = _Line(self._peer, self._max_bytes, self._forget)
        try:
            await self._open_line(lambda: made)
        except OSError as error:
            text = f"{self._peer.name} does not listen: {error.strerror or error}"
            raise UnavailableError(self._peer.away, text) from None
        if not made.is_open:
            raise UnavailableError(self._peer.away, f"{self._peer.name} ended the connection")
        return made

    def _forget(self, line: _Line) -> None:
        if line in self._idle:
            self._idle.remove(line)

    async def close(self) -> None:
        """Disconnect."""
        self._closed = True
        for line in (*self._idle, *self._busy):
            line.close()


def _loop_time(until: float) -> float:
    """When the other side should have ended a call that has until then (seconds of `time.monotonic`), by the loop's clock."""
    return asyncio.get_running_loop().time() + max(0.0, until - time.monotonic()) + PATIENCE_S


def _request(path: bytes, metadata: Sequence[tuple[bytes, bytes]], message: bytes, timeout_s: float) -> bytes:
    lines = b"".join([b"%b: %b\r\n" % pair for pair in metadata])
    body = framed(message)
    return (
        b"POST %b HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/grpc\r\nte: trailers\r\n"
        b"grpc-timeout: %b\r\ncontent-length: %d\r\n%b\r\n%b"
        % (path, timeout_header(timeout_s), len(body), lines, body)
    )
