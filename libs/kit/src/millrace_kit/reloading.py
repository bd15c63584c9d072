"""Client channels that follow changed certificates.

gRPC for Python fixes a channel's certificates when it is made. Here a new call goes over a channel with the newest ones; the
channel before it is closed when its last call has ended, so no call notices the change.
"""

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from millrace_kit.tls import CertificateFiles, Certificates


class _Generation:
    """One channel, the certificates it was made with, and the calls that run on it."""

    def __init__(self, certificates: Certificates, channel: Any, close: Callable[[Any], None]) -> None:
        self.certificates = certificates
        self.channel = channel
        self._close = close
        self._lock = threading.Lock()
        self._running = 0
        self._retired = False

    def enter(self) -> None:
        with self._lock:
            self._running += 1

    def leave(self, *_call: object) -> None:
        with self._lock:
            self._running -= 1
            ended = self._retired and self._running == 0
        if ended:
            self._close(self.channel)

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            ended = self._running == 0
        if ended:
            self._close(self.channel)


class _Generations:
    """The newest generation, made when a call finds that the certificates changed."""

    def __init__(self, files: CertificateFiles, make: Callable[[grpc.ChannelCredentials], Any]) -> None:
        self._files = files
        self._make = make
        self._lock = threading.Lock()
        self._current: _Generation | None = None

    def enter(self, close: Callable[[Any], None]) -> _Generation:
        """The newest generation with one more call on it."""
        newest = self._files.current()
        with self._lock:
            old = self._current
            if old is None or old.certificates is not newest:
                self._current = _Generation(newest, self._make(newest.channel_credentials()), close)
            else:
                old = None
            current = self._current
            assert current is not None
            current.enter()
        if old is not None:
            old.retire()
        return current

    def take(self) -> Any | None:
        """The newest channel, to be closed."""
        with self._lock:
            current, self._current = self._current, None
        return None if current is None else current.channel


class _Method:
    """A method of the channel; each call looks for the newest generation."""

    def __init__(
        self, enter: Callable[[], _Generation], kind: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._enter = enter
        self._kind = kind
        self._arguments = arguments
        self._options = options
        self._made: tuple[_Generation, Any] | None = None

    def _callable(self, generation: _Generation) -> Any:
        made = self._made
        if made is None or made[0] is not generation:
            made = generation, getattr(generation.channel, self._kind)(*self._arguments, **self._options)
            self._made = made
        return made[1]


class _AioMethod(_Method):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        generation = self._enter()
        try:
            call = self._callable(generation)(*arguments, **options)
            call.add_done_callback(generation.leave)
        except BaseException:
            generation.leave()
            raise
        return call


class _SyncMethod(_Method):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._kind.endswith("_stream"):
            return self._started("__call__", arguments, options)
        return self._answered("__call__", arguments, options)

    def with_call(self, *arguments: Any, **options: Any) -> Any:
        """The answer and its call."""
        return self._answered("with_call", arguments, options)

    def future(self, *arguments: Any, **options: Any) -> Any:
        """The call as a future."""
        return self._started("future", arguments, options)

    def _answered(self, way: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        generation = self._enter()
        try:
            return getattr(self._callable(generation), way)(*arguments, **options)
        finally:
            generation.leave()

    def _started(self, way: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        generation = self._enter()
        try:
            call = getattr(self._callable(generation), way)(*arguments, **options)
        except BaseException:
            generation.leave()
            raise
        if not call.add_callback(generation.leave):  # it has ended already
            generation.leave()
        return call


class AioReloadingChannel(grpc.aio.Channel):  # type: ignore[misc]
    """A `grpc.aio.Channel` whose new calls use the newest certificates.

    Args:
        files: certificates.
        make: makes a channel with the given credentials.
    """

    def __init__(self, files: CertificateFiles, make: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> None:
        self._generations = _Generations(files, make)
        self._closing: set[asyncio.Task[None]] = set()

    def _enter(self) -> _Generation:
        return self._generations.enter(self._close_soon)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _channel(self) -> grpc.aio.Channel:
        generation = self._enter()
        generation.leave()
        return generation.channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; running calls end after `grace` seconds at the latest."""
        channel = self._generations.take()
        if channel is not None:
            await channel.close(grace)
        await asyncio.gather(*self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """State of the newest channel."""
        return self._channel().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the newest channel leaves the state."""
        await self._channel().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the newest channel is connected."""
        await self._channel().channel_ready()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """A unary method."""
        return _AioMethod(self._enter, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """A server-streaming method."""
        return _AioMethod(self._enter, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """A client-streaming method."""
        return _AioMethod(self._enter, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """A method that streams both ways."""
        return _AioMethod(self._enter, "stream_stream", arguments, options)


class ReloadingChannel(grpc.Channel):  # type: ignore[misc]
    """A blocking `grpc.Channel` whose new calls use the newest certificates; subscriptions to its state are not offered."""

    def __init__(self, files: CertificateFiles, make: Callable[[grpc.ChannelCredentials], grpc.Channel]) -> None:
        self._generations = _Generations(files, make)

    def _enter(self) -> _Generation:
        # A channel must not be closed from one of its own call-backs, which run in its own thread.
        return self._generations.enter(lambda channel: threading.Thread(target=channel.close, daemon=True).start())

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """Tell `callback` the newest channel's states."""
        generation = self._enter()
        generation.leave()
        generation.channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """Stop telling it."""
        generation = self._enter()
        generation.leave()
        generation.channel.unsubscribe(callback)

    def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        channel = self._generations.take()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """A unary method."""
        return _SyncMethod(self._enter, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """A server-streaming method."""
        return _SyncMethod(self._enter, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """A client-streaming method."""
        return _SyncMethod(self._enter, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """A method that streams both ways."""
        return _SyncMethod(self._enter, "stream_stream", arguments, options)
