"""Removes dead letters that are too old or too many."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError

from millrace_ingestion.letter_store import LetterStore

log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class LetterRetention:
    """Keeps dead letters within a time and a number.

    Args:
        store: where they are.
        clock: what is old.
        max_age: None keeps them whatever their age.
        keep: None keeps any number.
        published: keep those that are not on the dead-letter topic yet.
        removed: told how many were removed.
        every_s: between two looks.
    """

    def __init__(
        self,
        store: LetterStore,
        clock: Clock,
        *,
        max_age: timedelta | None,
        keep: int | None,
        published: bool,
        removed: Callable[[int], None],
        every_s: float,
    ) -> None:
        self._store = store
        self._clock = clock
        self._max_age = max_age
        self._keep = keep
        self._published = published
        self._removed = removed
        self._every_s = every_s

    async def run(self, stop: asyncio.Event) -> None:
        """Look now and then until `stop` is set; a database that does not answer is asked the next time."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                try:
                    await self.trim()
                except MillraceError as error:
                    log.warning("old dead letters could not be removed: %s", error)
                await asyncio.wait([stopping], timeout=self._every_s)
        finally:
            stopping.cancel()

    async def trim(self) -> int:
        """Remove what is too old or too much now; returns how many.

        Raises:
            UnavailableError: the database does not answer.
        """
        if self._max_age is None and self._keep is None:
            return 0
        oldest = None if self._max_age is None else (self._clock.now() - self._max_age - _EPOCH) // _MICROSECOND
        count = await asyncio.to_thread(
            self._store.trim, older_than_us=oldest, keep=self._keep, published=self._published
        )
        if count:
            log.info("removed %d dead letters by age or number", count)
            self._removed(count)
        return count
