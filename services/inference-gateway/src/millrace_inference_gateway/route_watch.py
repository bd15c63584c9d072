"""Follows the rollout controller: routes come in, the generation in force goes back."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_kit.errors import InvalidArgumentError

from millrace_inference_gateway.applier import Applier

log = logging.getLogger(__name__)

MAX_BACKOFF = 10


class RouteWatch:
    """One `WatchRoutes` call at a time, made again whenever it ends."""

    def __init__(
        self, channel: grpc.aio.Channel, applier: Applier, *, gateway_id: str, figures_address: str, reconnect_s: float
    ) -> None:
        self._channel = channel
        self._figures_address = figures_address
        self._stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        self._applier = applier
        self._gateway_id = gateway_id
        self._reconnect_s = reconnect_s
        self._applied = asyncio.Event()
        applier.on_applied(self._applied.set)

    @property
    def connected(self) -> bool:
        """Whether the rollout controller can be asked now; what it has not sent then, there is not."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

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
            async for response in call:
                received = True
                try:
                    self._applier.submit(response.routes)
                except InvalidArgumentError as error:
                    log.error("routes %d are refused: %s", response.routes.generation, error)  # noqa: TRY400 - the message says all
        except grpc.aio.AioRpcError as error:
            log.info("the rollout controller does not answer: %s", error.details() or error.code().name)
        finally:
            call.cancel()
        return received

    async def _reports(self) -> AsyncIterator[rollout_pb2.WatchRoutesRequest]:
        while True:
            self._applied.clear()
            table = self._applier.in_force
            generation = table.generation if table else 0
            yield rollout_pb2.WatchRoutesRequest(
                gateway_id=self._gateway_id, applied_generation=generation, figures_address=self._figures_address
            )
            await self._applied.wait()
