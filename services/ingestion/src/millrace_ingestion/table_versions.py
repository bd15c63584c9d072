"""Versions of the lake's tables: listing and pinning them. A vacuum runs while nothing else uses the table, so a pin is there or it is not."""

import asyncio
from datetime import datetime

from millrace_kit.errors import InvalidArgumentError, NotFoundError

from millrace_ingestion.ingestor import Ingestor
from millrace_ingestion.lake import LogEntry
from millrace_ingestion.landing import Landing
from millrace_ingestion.models import Pin
from millrace_ingestion.pins import PinStore

MAX_PINS = 10_000
"""Pins of one contract: each is looked at by every vacuum."""


class TableVersions:
    """Versions of every contract's table.

    Args:
        ingestor: the tables.
        pins: who needs which version.
    """

    def __init__(self, ingestor: Ingestor, pins: PinStore) -> None:
        self._ingestor = ingestor
        self._pins = pins

    async def newest(
        self, contract: str, *, before: int | None, limit: int
    ) -> tuple[list[LogEntry], dict[int, list[Pin]]]:
        """Versions below `before`, newest first, as far as the log reaches, with their pins.

        Raises:
            NotFoundError: there is no such contract.
            UnavailableError: the lake or the database does not answer.
        """

        def look(landing: Landing) -> list[LogEntry]:
            table = landing.table
            first = table.version if before is None else min(table.version, before - 1)
            found: list[LogEntry] = []
            for version in range(first, max(-1, first - limit), -1):
                entry = table.entry(version)
                if entry is None:
                    break
                found.append(entry)
            return found

        entries = await self._ingestor.lane(contract).use(look)
        pins: dict[int, list[Pin]] = {}
        for pin in await asyncio.to_thread(self._pins.pins, contract):
            pins.setdefault(pin.version, []).append(pin)
        return entries, pins

    async def pin(self, contract: str, version: int | None, owner: str, expires_at: datetime | None) -> Pin:
        """Keep a version, the newest without one, from being vacuumed.

        Raises:
            NotFoundError: no such version, or it cannot be read any more.
            InvalidArgumentError: there are too many pins.
            UnavailableError: the lake or the database does not answer.
        """

        def keep(landing: Landing) -> Pin:
            found = landing.table.at(version=landing.table.version if version is None else version)
            if found.lost:
                raise NotFoundError("table version", f"{contract}@{found.version}")
            if len(self._pins.pins(contract)) >= MAX_PINS:
                raise InvalidArgumentError("contract", f"has {MAX_PINS} pins; unpin what nobody needs")
            pin = Pin(contract, found.version, owner, expires_at)
            self._pins.put(pin)
            return pin

        return await self._ingestor.lane(contract).use(keep)

    async def unpin(self, contract: str, version: int | None, owner: str) -> int:
        """Remove an owner's pins, of one version or of all; returns how many.

        Raises:
            NotFoundError: there is no such contract.
            UnavailableError: the database does not answer.
        """
        self._ingestor.contract(contract)
        return await asyncio.to_thread(self._pins.remove, contract, version, owner)
