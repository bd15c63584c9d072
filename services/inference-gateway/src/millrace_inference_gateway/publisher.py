"""Carries the journal to the bus in batches, each at least once and always with the same boundaries.

The boundaries of a batch are kept on disk before it is published. After a crash the same batch is published again, under the same
`journal_offset`, so a consumer may drop a batch whole once it has seen its offset.
"""

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import PREDICTIONS, Bus, Outgoing
from millrace_kit.errors import UnavailableError

from millrace_inference_gateway.envoy_files import write_atomically
from millrace_inference_gateway.journal import Entry, Journal, JournalReader
from millrace_inference_gateway.prediction_log import PredictionLog

log = logging.getLogger(__name__)

RETRY_S = 0.5
MAX_BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Position:
    """`next` is the first entry not acknowledged; `end` closes the batch under way, or equals `next`."""

    next: int
    end: int


class Publisher:
    """Publishes `journal` on `bus`."""

    def __init__(
        self, journal: Journal, bus: Bus, log_: PredictionLog, *, gateway_id: str, batch_entries: int, interval_s: float
    ) -> None:
        self._journal = journal
        self._reader = JournalReader(journal)
        self._bus = bus
        self._log = log_
        self._gateway_id = gateway_id
        self._batch_entries = batch_entries
        self._interval_s = interval_s
        self._kept = Position(0, 0)

    async def run(self, folder: Path, stop: asyncio.Event) -> None:
        """Publish until `stop`; then what is left, once, without waiting for a bus that does not answer."""
        path = folder / "published.json"
        position = self._load(path)
        self._kept = position
        while True:
            stopping, quiet = stop.is_set(), position.next >= self._journal.end
            try:
                while position.next < self._journal.end:
                    position = await self._publish_batch(path, position)
            except UnavailableError as error:
                log.warning("the bus does not take predictions: %s", error)
                if stopping:
                    return
                await _wait(stop, RETRY_S)
            # While more comes, the start of the next batch says that this one arrived; a batch that comes twice is dropped by its offset.
            if quiet or stopping:
                await self._keep(path, position)
            if stopping:
                return
            await _wait(stop, self._interval_s)

    async def _keep(self, path: Path, position: Position) -> None:
        if position != self._kept:
            await asyncio.to_thread(_save, path, position)
            self._kept = position
            # Not before it is kept: a batch that has to come again has to be whole.
            self._journal.trim(position.next)

    def _load(self, path: Path) -> Position:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            position = Position(int(fields["next"]), int(fields["end"]))
        except (OSError, ValueError, KeyError, TypeError):
            position = Position(self._journal.start, self._journal.start)
        # The journal decides: it may have been removed, or cut.
        first = min(max(position.next, self._journal.start), self._journal.end)
        return Position(first, min(max(position.end, first), self._journal.end))

    async def _publish_batch(self, path: Path, position: Position) -> Position:
        end = position.end if position.end > position.next else 0
        entries = await asyncio.to_thread(self._read, position.next, end)
        if not entries:
            return await self._skip_damage(path, position)
        after = entries[-1].offset + 1
        await self._keep(path, Position(position.next, after))
        await self._bus.publish(self._messages(entries))
        self._log.published(len(entries))
        return Position(after, after)

    def _read(self, start: int, end: int) -> list[Entry]:
        entries = self._reader.read(start, end or min(start + self._batch_entries, self._journal.end))
        if end:
            return entries
        size = 0
        for index, entry in enumerate(entries):
            size += len(entry.payload)
            if size > MAX_BATCH_BYTES and index:
                return entries[:index]
        return entries

    async def _skip_damage(self, path: Path, position: Position) -> Position:
        """Entries that can no longer be read are given up, and counted."""
        after = self._journal.next_file(position.next)
        log.error("journal entries %d to %d are damaged", position.next, after - 1)
        self._log.missed(after - position.next)
        await self._keep(path, Position(after, after))
        return Position(after, after)

    def _messages(self, entries: list[Entry]) -> list[Outgoing]:
        batches: dict[str, events_pb2.PredictionsMade] = {}
        for entry in entries:
            try:
                prediction = events_pb2.Prediction.FromString(entry.payload)
            except DecodeError:
                self._log.missed(1)
                continue
            batch = batches.get(prediction.model)
            if batch is None:
                batch = events_pb2.PredictionsMade(gateway_id=self._gateway_id, journal_offset=entry.offset)
                batches[prediction.model] = batch
            batch.predictions.append(prediction)
        return [
            Outgoing(
                PREDICTIONS,
                model,
                batch.SerializeToString(),
                {"event-id": f"{self._gateway_id}-{batch.journal_offset}".encode()},
            )
            for model, batch in batches.items()
        ]


def _save(path: Path, position: Position) -> None:
    write_atomically(path, json.dumps({"next": position.next, "end": position.end}).encode())


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
