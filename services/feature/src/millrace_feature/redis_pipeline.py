"""Reads from Redis over one connection, with the commands of many requests in one write and one round trip.

redis-py's asyncio pipelines take a connection each and cost hundreds of microseconds of Python; here a request's commands are packed and
its replies parsed by hiredis (C), and what comes in one turn of the event loop is written together. Replies come in the order of the
commands, so the oldest waiting request is the only one whose time has to be watched. What fails fails every waiting request: reads are
asked again by their callers, and the next one connects anew.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import hiredis
from redis.connection import parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from millrace_feature.settings import RedisSettings

CHECK_S = 0.05
"""Time between two looks at the oldest waiting request."""


class _Connection(asyncio.Protocol):
    """One connection: commands out, replies back in order."""

    def __init__(self, timeout_s: float, max_waiting: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int, float]] = deque()
        self._replies: list[Any] = []
        self._unsent: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # a loop's own class need not be asyncio's

    def ask(self, commands: Sequence[bytes]) -> "asyncio.Future[list[Any]]":
        """Send packed commands with whatever else is asked in this turn of the loop; the future holds one reply a command."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self.is_closed:
            future.set_exception(RedisConnectionError("the connection was lost"))
            return future
        if len(self._waiting) >= self._max_waiting:
            future.set_exception(RedisConnectionError(f"{self._max_waiting} reads wait for Redis already"))
            return future
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += commands
        now = self._loop.time()
        self._waiting.append((future, len(commands), now + self._timeout_s))
        if self._watch is None:
            self._watch = self._loop.call_later(CHECK_S, self._look)
        return future

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None and not self.is_closed:
            self._transport.write(b"".join(unsent))

    def _look(self) -> None:
        """Fail everything when the oldest request waits too long."""
        self._watch = None
        if not self._waiting or self.is_closed:
            return
        if self._loop.time() >= self._waiting[0][2]:
            self.fail(RedisTimeoutError(f"no answer within {self._timeout_s:g} s"))
            return
        self._watch = self._loop.call_later(CHECK_S, self._look)

    def data_received(self, data: bytes) -> None:
        """Hand replies to the requests in order."""
        reader, replies = self._reader, self._replies
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not Ellipsis:
                if not self._waiting:
                    self.fail(RedisConnectionError("Redis said something that nobody asked"))
                    return
                replies.append(reply)
                if len(replies) == self._waiting[0][1]:
                    future = self._waiting.popleft()[0]
                    if not future.done():  # its caller may have gone
                        _settle(future, replies)
                    self._replies = replies = []
        except hiredis.HiredisError as error:
            self.fail(RedisConnectionError(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits."""
        self.fail(RedisConnectionError(str(exc) if exc is not None else "Redis closed the connection"))

    def fail(self, error: Exception) -> None:
        """Close, and fail every waiting request."""
        self.is_closed = True
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for future, _count, _until in waiting:
            if not future.done():
                future.set_exception(error)


def _settle(future: "asyncio.Future[list[Any]]", replies: list[Any]) -> None:
    failure = next((reply for reply in replies if isinstance(reply, hiredis.ReplyError)), None)
    if failure is not None:
        future.set_exception(ResponseError(str(failure)))
    else:
        future.set_result(replies)


class Pipeline:
    """The commands of one request; the methods have the names and arguments of redis-py's."""

    def __init__(self, client: "PipelinedRedis") -> None:
        self._client = client
        self._commands: list[bytes] = []

    def hmget(self, name: str, fields: Sequence[str | int]) -> None:
        """Some fields of a hash."""
        self._commands.append(_packed("HMGET", name, *fields))

    def hmget_each(self, names: Sequence[str], fields: Sequence[str]) -> None:
        """The same fields of each of some hashes: one reply a hash."""
        asked = [field.encode() for field in fields]
        tail = b"".join([b"\r\n$%d\r\n%b" % (len(field), field) for field in asked]) + b"\r\n"
        head = b"*%d\r\n$5\r\nHMGET\r\n" % (len(asked) + 2)
        encoded = [name.encode() for name in names]
        self._commands += [b"%b$%d\r\n%b%b" % (head, len(name), name, tail) for name in encoded]

    def zrevrangebyscore(self, name: str, high: int | str, low: int | str, *, start: int, num: int) -> None:
        """Members of a sorted set from the highest score down."""
        self._commands.append(_packed("ZREVRANGEBYSCORE", name, high, low, "LIMIT", start, num))

    async def execute(self) -> list[Any]:
        """One reply a command.

        Raises:
            RedisError, OSError: Redis does not answer, or refuses a command.
        """
        return await self._client.ask(self._commands)


class PipelinedRedis:
    """A client whose requests share one connection, made at the first of them.

    Args:
        settings: address, credentials, TLS; `read_timeout_s` is also the longest time a connection may take to be made.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._url: dict[str, Any] = dict(parse_url(settings.url))
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None

    def pipeline(self, *, transaction: bool = False) -> Pipeline:
        """A request; transactions are not for reads."""
        assert not transaction
        return Pipeline(self)

    async def ask(self, commands: Sequence[bytes]) -> list[Any]:
        """One reply a command.

        Raises:
            RedisError, OSError: Redis does not answer, or refuses a command.
        """
        connection = self._connection
        if connection is None or connection.is_closed:
            connection = await self._connected()
        return await connection.ask(commands)

    async def _connected(self) -> _Connection:
        """The connection, made by whoever comes first while the others wait for it."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._done)
        return await asyncio.shield(self._connecting)

    def _done(self, task: "asyncio.Task[_Connection]") -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._connection = task.result()

    async def _connect(self) -> _Connection:
        settings, url = self._settings, self._url
        loop = asyncio.get_running_loop()

        def made() -> _Connection:
            return _Connection(settings.read_timeout_s, settings.max_waiting_reads)

        async with asyncio.timeout(settings.read_timeout_s):
            if "path" in url:
                _transport, connection = await loop.create_unix_connection(made, url["path"])
            else:
                host, port = url.get("host", "localhost"), url.get("port", 6379)
                context: ssl.SSLContext | None = None
                if settings.url.startswith("rediss:"):
                    context = await asyncio.to_thread(ssl.create_default_context, cafile=settings.ca_file or None)
                _transport, connection = await loop.create_connection(made, host, port, ssl=context)
            commands = self._greeting()
            if commands:
                try:
                    await connection.ask([_packed(*command) for command in commands])
                except BaseException as error:
                    connection.fail(RedisConnectionError(str(error)))
                    raise
        return connection

    def _greeting(self) -> list[tuple[str, ...]]:
        settings, url = self._settings, self._url
        password = settings.password or url.get("password") or ""
        username = settings.username or url.get("username") or ""
        commands: list[tuple[str, ...]] = []
        if password:
            commands.append(("AUTH", username, password) if username else ("AUTH", password))
        if url.get("db"):
            commands.append(("SELECT", str(url["db"])))
        return commands

    async def aclose(self) -> None:
        """Disconnect."""
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._connecting
        if self._connection is not None:
            self._connection.fail(RedisConnectionError("the client was closed"))


def _packed(*parts: str | int) -> bytes:
    """A command as it goes over the wire."""
    command: Any = parts  # hiredis' types say a tuple of one
    return bytes(hiredis.pack_command(command))
