"""What another replica applied, pinned or allowed: noticed in the database they share. Pins that have run out are taken away here."""

import asyncio
import logging

from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError

from millrace_feature.definitions import Applier
from millrace_feature.settings import FeatureSettings
from millrace_feature.versioning.access import Access
from millrace_feature.versioning.history import Versions

log = logging.getLogger(__name__)


class DefinitionsFollower:
    """Has the stream worker follow whatever definitions are in force or pinned."""

    def __init__(
        self, *, applier: Applier, versions: Versions, access: Access, settings: FeatureSettings, clock: Clock
    ) -> None:
        self._applier = applier
        self._versions = versions
        self._access = access
        self._poll_s = settings.definitions_poll_s
        self._clock = clock

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
            now = self._clock.now()
            if await asyncio.to_thread(self._versions.has_run_out, now):
                await asyncio.to_thread(self._versions.drop_run_out, now)
            await self._applier.refresh()
            await asyncio.to_thread(self._access.look)
        except MillraceError as error:
            log.warning("the database did not say which definitions are in force: %s", error)
