"""Scheduled maintenance of the lake's tables: compaction, order, vacuum, log. One table at a time, while its batches wait."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from millrace_kit.errors import MillraceError

from millrace_ingestion import metrics
from millrace_ingestion.contracts import Contract
from millrace_ingestion.ingestor import Ingestor
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.landing import Landing
from millrace_ingestion.models import Pin
from millrace_ingestion.pins import PinStore

log = logging.getLogger(__name__)

Order = Literal["none", "key", "event_time", "key_and_event_time"]


@dataclass(frozen=True)
class Upkeep:
    """What a round does besides compaction; see the settings of the same names."""

    z_order: Order = "none"
    vacuum_retention_h: int = 0
    log_retention_h: int = 0

    def columns(self, contract: Contract) -> Sequence[str]:
        """Columns of the order; none for no order."""
        keys = contract.key_columns if self.z_order.startswith("key") else ()
        times = (contract.event_time_column,) if self.z_order.endswith("event_time") else ()
        return tuple(dict.fromkeys((*keys, *times)))


class Maintenance:
    """Rounds over every table.

    Args:
        ingestor: the tables.
        pins: versions that stay.
        upkeep: what to do.
        every_s: between two rounds.
    """

    def __init__(self, ingestor: Ingestor, pins: PinStore, upkeep: Upkeep, *, every_s: float) -> None:
        self._ingestor = ingestor
        self._pins = pins
        self._upkeep = upkeep
        self._every_s = every_s
        self._ordered: dict[str, int] = {}
        """Rows of each table when it was last put in order."""

    async def run(self, stop: asyncio.Event) -> None:
        """One round after another until `stop` is set, the first after a whole wait; a table that fails is left to the next round."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                await asyncio.wait([stopping], timeout=self._every_s)
                for contract in self._ingestor.contracts():
                    if stop.is_set():
                        return
                    await self._try(contract.name)
        finally:
            stopping.cancel()

    async def _try(self, name: str) -> None:
        started = time.perf_counter()
        try:
            await self.round(name)
        except MillraceError as error:
            metrics.MAINTENANCE_FAILURES.labels(name).inc()
            log.warning("maintenance of table %s failed: %s", name, error)
        metrics.MAINTENANCE_SECONDS.labels(name).observe(time.perf_counter() - started)

    async def round(self, name: str) -> int:
        """Look after one table; returns how many files a vacuum deleted.

        Raises:
            UnavailableError: the lake or the database does not answer.
        """
        deleted = await self._ingestor.lane(name).use(self._look_after)
        metrics.VACUUMED_FILES.labels(name).inc(deleted)
        return deleted

    def _look_after(self, landing: Landing) -> int:
        contract = landing.contract
        pins = self._pins.pins(contract.name)
        return landing.keep_up(lambda table: self._keep(table, contract, pins))

    def _keep(self, table: LakeTable, contract: Contract, pins: Sequence[Pin]) -> int:
        columns, rows = self._upkeep.columns(contract), table.rows()
        if columns and rows > self._ordered.get(contract.name, 0):
            table.z_order(columns)
            self._ordered[contract.name] = rows
        else:
            table.maintain()
        deleted = 0
        if self._upkeep.vacuum_retention_h:
            deleted = table.vacuum(self._upkeep.vacuum_retention_h, sorted({pin.version for pin in pins}))
        if self._upkeep.log_retention_h and not self._held(table, pins):
            table.clean_log(self._upkeep.log_retention_h)
        return deleted

    def _held(self, table: LakeTable, pins: Sequence[Pin]) -> bool:
        """Whether a pinned version is older than what would be left of the log; the log goes from its oldest end only."""
        oldest = min((pin.version for pin in pins), default=None)
        entry = None if oldest is None else table.entry(oldest)
        # delta-rs goes by the times of its own commits.
        cutoff = datetime.now(UTC) - timedelta(hours=self._upkeep.log_retention_h)
        return entry is not None and entry.at <= cutoff
