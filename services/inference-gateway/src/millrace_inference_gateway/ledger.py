"""Holds the prediction log against an independent count: what Envoy itself wrote down as answered.

Envoy drops access-log entries while nobody takes them (this process is down, or too slow), and those it still holds when it is killed.
For each V2 call it answers it also appends one byte to a file, one file a start of Envoy; the file's size is the count, and it outlives
both processes. Calls counted there and not reported after some time are missing from the log: while traffic flows a lower bound,
after a moment of quiet exact.
"""

import asyncio
import logging
import zlib
from pathlib import Path

from millrace_inference_gateway.envoy_files import write_atomically
from millrace_inference_gateway.prediction_log import PredictionLog

log = logging.getLogger(__name__)

# Longer than Envoy keeps an entry to itself.
SETTLE_S = 1.0
# Looks at an Envoy that ended without any change, before its count is closed.
QUIET_LOOKS = 3
CLOSED = "closed"


def instance_key(instance: str) -> int:
    """A start of Envoy as a number for the journal."""
    data = instance.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


class Ledger:
    """Compares what Envoy answered with what it reported.

    Args:
        folder: where Envoy counts.
        log_: what was reported, and where missing calls are counted.
    """

    def __init__(self, folder: Path, log_: PredictionLog) -> None:
        self._folder = folder
        self._log = log_
        self._answered: dict[str, int] = {}
        self._missed: dict[str, int] = {}
        self._quiet: dict[str, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Look once a second until `stop`; what earlier processes found missing counts on."""
        self._log.missed(await asyncio.to_thread(self._closed))
        while not stop.is_set():
            self.look()
            try:
                await asyncio.wait_for(stop.wait(), SETTLE_S)
            except TimeoutError:
                continue

    def look(self) -> None:
        """Compare now with the look before; a few `stat` calls."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Instances are named by time (UUID 7): the last one is the running one.
        instances = sorted(path.name for path in self._folder.iterdir() if path.name != CLOSED)
        for instance in instances:
            before = self._answered.get(instance, 0)
            missing = before - self._log.reported(instance_key(instance))
            new = missing - self._missed.get(instance, 0)
            if new > 0:
                self._log.missed(new)
                self._missed[instance] = missing
            size = (self._folder / instance).stat().st_size
            self._quiet[instance] = self._quiet.get(instance, 0) + 1 if size == before and new <= 0 else 0
            self._answered[instance] = size
            if instance != instances[-1] and self._quiet[instance] >= QUIET_LOOKS:
                self._close(instance)

    def _closed(self) -> int:
        try:
            return int((self._folder / CLOSED).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def _close(self, instance: str) -> None:
        """An Envoy that ended: its figure becomes part of the sum, its file goes."""
        missed = self._missed.pop(instance, 0)
        if missed:
            log.warning("an Envoy that ended had answered %d calls it never reported", missed)
            write_atomically(self._folder / CLOSED, str(self._closed() + missed).encode())
        (self._folder / instance).unlink(missing_ok=True)
        self._log.forget(instance_key(instance))
        for counts in (self._answered, self._quiet):
            counts.pop(instance, None)
