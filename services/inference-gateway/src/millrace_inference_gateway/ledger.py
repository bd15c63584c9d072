"""Holds the prediction log against an independent count: Envoy's own counter of answered V2 calls.

Envoy drops access-log entries while nobody takes them (this process is down, or too slow). Its counter does not forget. Calls it
answered before one look and has not reported by the next are missing from the log; while traffic flows this is a lower bound,
after a second of quiet it is exact.
"""

import asyncio
import logging
import zlib

from millrace_inference_gateway.envoy_admin import EnvoyAdmin, EnvoyDownError
from millrace_inference_gateway.envoy_bootstrap import LEDGER_STAT, PUBLIC
from millrace_inference_gateway.prediction_log import PredictionLog

log = logging.getLogger(__name__)

# Longer than Envoy keeps an entry to itself.
SETTLE_S = 1.0
STAT = f"{PUBLIC}.{LEDGER_STAT}"


def instance_key(instance: str) -> int:
    """A start of Envoy as a number for the journal."""
    data = instance.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


class Ledger:
    """Compares what Envoy answered with what it reported."""

    def __init__(self, admin: EnvoyAdmin, log_: PredictionLog) -> None:
        self._admin = admin
        self._log = log_
        self._instance = 0
        self._answered = 0
        self._missed = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Look once a second until `stop`."""
        while not stop.is_set():
            try:
                await self.look()
            except EnvoyDownError:
                log.debug("Envoy does not answer; the ledger waits")
            try:
                await asyncio.wait_for(stop.wait(), SETTLE_S)
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Compare now with the look before.

        Raises:
            EnvoyDownError: Envoy does not answer.
        """
        instance = instance_key(await self._admin.instance())
        stats = await self._admin.stats(f"{LEDGER_STAT}$")
        received = self._log.received
        if instance == self._instance:
            calls = received.calls if received.instance == instance else 0
            missing = self._answered - calls
            if missing > self._missed:
                self._log.missed(missing - self._missed)
                self._missed = missing
        else:
            self._instance, self._missed = instance, 0
        self._answered = next((value for name, value in stats.numbers.items() if name.endswith(STAT)), 0)
