"""A closed loop of calls at one server: so many callers, each of whom sends its next request when the last was answered.

It sends serialized requests as they are, without Triton's client: encoding would be the generator's work, which shares the machine with the server.
Windows follow each other without a stop, as perf_analyzer's do.
"""

import asyncio
import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from millrace_kit.clock import Clock

from millrace_rollout_controller.warm_gate import Window
from millrace_rollout_controller.warming import METHOD

MAX_STRETCH = 10
"""A window without enough requests goes on, to at most so many times its length."""
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
PACE_S = 0.01
"""Wait of a caller whose request failed, so that refusals are no busy loop."""


class ClosedLoop:
    """Load on one server, while it is entered.

    Args:
        endpoint: `host:port` of its gRPC.
        bodies: serialized `ModelInferRequest`s, sent in turn.
        concurrency: callers.
        timeout_s: deadline of one request.
        clock: for latencies.
    """

    def __init__(
        self, endpoint: str, bodies: Sequence[bytes], concurrency: int, *, timeout_s: float, clock: Clock
    ) -> None:
        options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("send", "receive")]
        # A channel of its own: two that share a connection would share its state too.
        options.append(("grpc.use_local_subchannel_pool", 1))
        self._channel = grpc.aio.insecure_channel(endpoint, options=options)
        self._call = self._channel.unary_unary(METHOD)
        self._bodies = itertools.cycle(bodies)
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._clock = clock
        self._callers: list[asyncio.Task[None]] = []
        self._latencies_ms: list[float] = []
        self._failures = 0
        self._problem = ""

    async def __aenter__(self) -> Self:
        self._callers = [asyncio.create_task(self._go_on()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)
        await self._channel.close()

    async def window(self, seconds: float, min_requests: int) -> Window:
        """What is answered from now on, for `seconds` and at least `min_requests`."""
        self._latencies_ms, self._failures, self._problem = [], 0, ""
        began = self._clock.monotonic()
        end = began + seconds * MAX_STRETCH
        await asyncio.sleep(seconds)
        while self._asked < min_requests and self._clock.monotonic() < end:  # noqa: ASYNC110 - a window is a time
            await asyncio.sleep(seconds / MAX_STRETCH)
        return Window(tuple(self._latencies_ms), self._clock.monotonic() - began, self._failures, self._problem)

    @property
    def _asked(self) -> int:
        return len(self._latencies_ms) + self._failures

    async def _go_on(self) -> None:
        while True:
            began = self._clock.monotonic()
            try:
                await self._call(next(self._bodies), timeout=self._timeout_s)
                self._latencies_ms.append((self._clock.monotonic() - began) * 1000.0)
            except grpc.aio.AioRpcError as error:
                self._failures, self._problem = self._failures + 1, f"{error.code().name} {error.details()}"[:200]
                await asyncio.sleep(PACE_S)
