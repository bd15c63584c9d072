"""How far the stream is behind, for alerts: asked of bus and store from time to time, whether or not anybody calls GetProgress."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from millrace_kit.bus import TopicPartition
from millrace_kit.errors import UnavailableError

from millrace_feature.store import OnlineStore
from millrace_feature.worker import StreamWorker

log = logging.getLogger(__name__)

LOOK_S = 15.0


class LagMeter:
    """Exports messages not yet applied per contract."""

    def __init__(
        self, store: OnlineStore, worker: StreamWorker, ends: Callable[[], Awaitable[Mapping[TopicPartition, int]]]
    ) -> None:
        self._store = store
        self._worker = worker
        self._ends = ends

    async def run(self, stop: asyncio.Event) -> None:
        """Look every `LOOK_S` until `stop` is set; what does not answer is asked again the next time."""
        while not stop.is_set():
            try:
                ends = await self._ends()
                self._worker.note_lag(ends, await asyncio.to_thread(self._store.positions))
            except UnavailableError as error:
                log.info("the lag is not known: %s", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()
