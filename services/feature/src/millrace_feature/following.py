"""Definitions that another replica applied: noticed in the database they share."""

import asyncio
import logging

from millrace_kit.errors import MillraceError

from millrace_feature.catalog import Catalog
from millrace_feature.settings import FeatureSettings
from millrace_feature.worker import StreamWorker

log = logging.getLogger(__name__)


class DefinitionsFollower:
    """Has the stream worker follow whatever definitions are in force."""

    def __init__(self, catalog: Catalog, worker: StreamWorker, settings: FeatureSettings) -> None:
        self._catalog = catalog
        self._worker = worker
        self._poll_s = settings.definitions_poll_s

    async def run(self, stop: asyncio.Event) -> None:
        """Look every `definitions_poll_s` until `stop` is set; a database that does not answer is asked again."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(self._poll_s):
                    await stop.wait()
            except TimeoutError:
                await self._look()

    async def _look(self) -> None:
        try:
            digest = await asyncio.to_thread(self._catalog.current_digest)
            if digest is None or digest == self._worker.wanted_digest:
                return
            stored = await asyncio.to_thread(self._catalog.get, digest)
            # An ApplyDefinitions of this replica may have come between; it stands in the database too.
            if digest == await asyncio.to_thread(self._catalog.current_digest):
                self._worker.switch(stored.definitions)
        except MillraceError as error:
            log.warning("the database did not say which definitions are in force: %s", error)
