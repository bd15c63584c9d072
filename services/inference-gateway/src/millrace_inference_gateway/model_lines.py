"""Connections to Envoy's inner listener, HTTP/1.1, one call at a time on each."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc
from httptools import HttpParserError, HttpResponseParser
from millrace_kit.errors import MillraceError, UnavailableError

from millrace_inference_gateway.grpc_http1 import framed, status_error, timeout_header, unframed

MAX_HEADERS = 128
# A call that Envoy should have ended by its own deadline gets this much more before its connection is given up.
PATIENCE_S = 0.05


@dataclass(slots=True)
class LineAnswer:
    """One answer: headers and trailers together, and the one message."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: list[bytes] = field(default_factory=list)
    size: int = 0


class _Line(asyncio.Protocol):
    """One connection."""

    def __init__(self, max_bytes: int, lost: "Callable[[_Line], None]") -> None:
        self._max_bytes = max_bytes
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._answer = LineAnswer()
        self._waiting: asyncio.Future[LineAnswer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        """The call under way fails."""
        self._transport = None
        self._fail("the connection to Envoy ended")
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
        self._transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        """Read on."""
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self._fail("Envoy's answer is not HTTP")
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
            self._fail("the model's answer is too large")
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
            waiting.set_exception(UnavailableError("ENVOY_UNAVAILABLE", problem))


class ModelLines:
    """At most `count` connections; a call beyond that waits for one, within its deadline."""

    def __init__(self, socket: Path, count: int, max_message_bytes: int) -> None:
        self._socket = socket
        self._max_bytes = max_message_bytes
        self._idle: list[_Line] = []
        self._busy: set[_Line] = set()
        self._places = asyncio.Semaphore(count)
        self._closed = False

    async def call(
        self, path: bytes, metadata: Sequence[tuple[bytes, bytes]], message: bytes, timeout_s: float
    ) -> tuple[bytes, dict[bytes, bytes]]:
        """Call `path`; returns the answer's message and its headers.

        Raises:
            UnavailableError: Envoy is away, or went away.
            MillraceError: the status the call ended with; DEADLINE_EXCEEDED after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s + PATIENCE_S), self._places:
                answer = await self._exchange(path, metadata, message, until)
        except TimeoutError:
            text = f"no answer of the model within {timeout_s * 1000:.0f} ms"
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise MillraceError(code, "MODEL_DEADLINE_EXCEEDED", text) from None
        if (error := status_error(answer.status, answer.headers)) is not None:
            raise error
        body = unframed(b"".join(answer.body), answer.headers.get(b"grpc-encoding", b"identity"), self._max_bytes)
        return body, answer.headers

    async def _exchange(
        self, path: bytes, metadata: Sequence[tuple[bytes, bytes]], message: bytes, until: float
    ) -> LineAnswer:
        line = self._take() or await self._open()
        self._busy.add(line)
        whole = False
        try:
            left_s = until - time.monotonic()
            answer = await line.send(_request(path, metadata, message, left_s))
            whole = True
        finally:
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
        try:
            _transport, line = await asyncio.get_running_loop().create_unix_connection(
                lambda: _Line(self._max_bytes, self._forget), str(self._socket)
            )
        except OSError as error:
            raise UnavailableError("ENVOY_UNAVAILABLE", f"Envoy does not listen: {error.strerror or error}") from None
        return line

    def _forget(self, line: _Line) -> None:
        if line in self._idle:
            self._idle.remove(line)

    async def close(self) -> None:
        """Disconnect."""
        self._closed = True
        for line in (*self._idle, *self._busy):
            line.close()


def _request(path: bytes, metadata: Sequence[tuple[bytes, bytes]], message: bytes, timeout_s: float) -> bytes:
    lines = b"".join([b"%b: %b\r\n" % pair for pair in metadata])
    body = framed(message)
    return (
        b"POST %b HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/grpc\r\nte: trailers\r\n"
        b"grpc-timeout: %b\r\ncontent-length: %d\r\n%b\r\n%b"
        % (path, timeout_header(timeout_s), len(body), lines, body)
    )
