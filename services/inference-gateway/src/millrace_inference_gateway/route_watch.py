"""Follows the rollout controller: routes come in, the generation in force goes back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable

import grpc
import grpc.aio
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError

from millrace_inference_gateway.applier import Applier

log = logging.getLogger(__name__)

MAX_BACKOFF = 10
GENERATION_KEY = "x-millrace-generation"
# A controller that says nothing for so long after the start is away.
AWAY_S = 3.0


class RouteWatch:
    """One `WatchRoutes` call at a time, made again whenever it ends."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        applier: Applier,
        clock: Clock,
        *,
        gateway_id: str,
        figures_address: str,
        reconnect_s: float,
    ) -> None:
        self._figures_address = figures_address
        self._clock = clock
        self._made_at = clock.monotonic()
        # Generation the controller named in this run; None until it did.
        self._newest: int | None = None
        self._ready = False
        self._stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        self._applier = applier
        self._gateway_id = gateway_id
        self._reconnect_s = reconnect_s
        self._applied = asyncio.Event()
        applier.on_applied(self._applied.set)

    def ready(self) -> bool:
        """Whether calls may come: the routes in force are the controller's of this run, or it has none, or it is away and those of the
        last run have to do. A later loss of the controller changes nothing.

        A new replica must not take calls before it has routes, nor an old one that comes back after weeks with those of then.
        """
        table = self._applier.in_force
        if table is None or self._ready:
            return self._ready
        if self._newest is not None:
            self._ready = table.generation >= self._newest
        else:
            self._ready = table.generation > 0 and self._clock.monotonic() - self._made_at > AWAY_S
        return self._ready

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop`; without the controller the last known routes stay in force."""
        backoff = self._reconnect_s
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                watch = asyncio.ensure_future(self._watch())
                await asyncio.wait({watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not watch.done():
                    watch.cancel()
                    await asyncio.gather(watch, return_exceptions=True)
                    return
                backoff = self._reconnect_s if watch.result() else min(backoff * 2, self._reconnect_s * MAX_BACKOFF)
                await asyncio.wait({stopped}, timeout=backoff)
        finally:
            stopped.cancel()

    async def _watch(self) -> bool:
        """One call; whether it brought anything."""
        received = False
        call = self._stub.WatchRoutes(self._reports())
        try:
            self._note(await call.initial_metadata())
            async for response in call:
                received = True
                try:
                    self._applier.submit(response.routes)
                    self._newest = int(response.routes.generation)
                except InvalidArgumentError as error:
                    log.error("routes %d are refused: %s", response.routes.generation, error)  # noqa: TRY400 - the message says all
        except grpc.aio.AioRpcError as error:
            log.info("the rollout controller does not answer: %s", error.details() or error.code().name)
        finally:
            call.cancel()
        return received

    def _note(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Before the first routes the controller says which they will be, 0 for none; an older controller says nothing."""
        text = dict(metadata).get(GENERATION_KEY, "")
        if self._newest is None and isinstance(text, str) and text.isascii() and text.isdigit():
            self._newest = int(text)

    async def _reports(self) -> AsyncIterator[rollout_pb2.WatchRoutesRequest]:
        while True:
            self._applied.clear()
            table = self._applier.in_force
            generation = table.generation if table else 0
            yield rollout_pb2.WatchRoutesRequest(
                gateway_id=self._gateway_id, applied_generation=generation, figures_address=self._figures_address
            )
            await self._applied.wait()
