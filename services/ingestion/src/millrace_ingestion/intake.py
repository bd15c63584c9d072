"""Admission: how much may wait at once, and turning a producer's bytes into a checked batch."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
from millrace_kit.errors import ResourceExhaustedError

from millrace_ingestion import metrics
from millrace_ingestion.arrow_records import check_table, read_stream
from millrace_ingestion.checks import NO_TIME, Arrival, Checked
from millrace_ingestion.contracts import Contract
from millrace_ingestion.json_records import reader_for
from millrace_ingestion.models import RELEASE_SOURCE, REPLAY_SOURCE, HeldBatch, Incoming, Letter, Pending
from millrace_ingestion.rules import Policy

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Budget:
    """Batches and bytes that are accepted and not yet answered. A batch larger than the whole budget passes when it is alone."""

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._batches = 0
        self._bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take_now(self, size: int) -> None:
        """Take room for a batch of `size` bytes.

        Raises:
            ResourceExhaustedError: there is none.
        """
        if self._waiting or not self._fits(size):
            limit = "max_queued_batches" if self._batches >= self._max_batches else "max_queued_mib"
            raise ResourceExhaustedError(
                limit, f"{self._batches} batches ({self._bytes >> 20} MiB) wait to land; retry later"
            )
        self._take(size)

    async def take(self, size: int) -> None:
        """Wait for room; first come, first served."""
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size)
            else:
                self._waiting = deque(entry for entry in self._waiting if entry[1] is not turn)
                self._wake()
            raise

    def grow(self, extra: int) -> None:
        """Count a batch that was taken as larger; it has been decoded, so it is not refused any more."""
        self._bytes += extra
        self._show()

    def give(self, size: int) -> None:
        """Give room back."""
        self._batches -= 1
        self._bytes -= size
        self._wake()
        self._show()

    def _fits(self, size: int) -> bool:
        return self._batches < self._max_batches and (self._batches == 0 or self._bytes + size <= self._max_bytes)

    def _take(self, size: int) -> None:
        self._batches += 1
        self._bytes += size
        self._show()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._take(size)
                turn.set_result(None)

    def _show(self) -> None:
        metrics.QUEUED_BATCHES.set(self._batches)
        metrics.QUEUED_BYTES.set(self._bytes)


def decode(
    contract: Contract, incoming: Incoming, *, max_rows: int, max_bytes: int, arrival: Arrival = NO_TIME
) -> Pending:
    """Parse and check a batch.

    Raises:
        InvalidArgumentError: an Arrow payload is no Arrow IPC stream.
        ResourceExhaustedError: the batch is larger than the limits.
    """
    if incoming.json_lines is not None:
        checked = reader_for(contract).check(incoming.json_lines, max_rows=max_rows, arrival=arrival)
        return Pending(contract, incoming.source, incoming.offset, _traced(checked, incoming), after=incoming.after)
    payload = incoming.arrow_ipc or b""
    raw = read_stream(payload, max_rows=max_rows, max_bytes=max_bytes)
    checked = check_table(contract, raw, max_bytes=max_bytes, arrival=arrival)
    ignored = set(raw.column_names) - {column.name for column in contract.columns}
    if ignored:
        metrics.IGNORED_COLUMNS.labels(contract.name).inc(len(ignored))
    as_sent = not checked.rejects and raw.schema.equals(contract.arrow_schema())
    traced, kept = _traced(checked, incoming), payload if as_sent else None
    return Pending(contract, incoming.source, incoming.offset, traced, kept, after=incoming.after)


def _traced(checked: Checked, incoming: Incoming) -> Checked:
    """The batch with the origins of its refused records, and with the records that its source could not decode."""
    if not incoming.origins and not incoming.undecodable:
        return checked
    origins = incoming.origins
    rejects = [
        replace(reject, origin=origins[reject.row]) if reject.row < len(origins) else reject
        for reject in checked.rejects
    ]
    return replace(checked, rejects=[*rejects, *incoming.undecodable])


def decode_letters(contract: Contract, letters: Sequence[Letter]) -> Pending:
    """Dead letters as one batch of the reserved source."""
    payload = "\n".join(letter.record_json for letter in letters).encode()
    # Fresh is what was fresh when it came.
    received_us = np.asarray([(letter.received_at - _EPOCH) // _MICROSECOND for letter in letters], np.int64)
    arrival = Arrival(received_us, as_sent=False, quarantine=Policy.REJECT)
    checked = reader_for(contract).check(payload, max_rows=len(letters), arrival=arrival)
    ids = np.asarray([letter.id for letter in letters], np.int64)
    return Pending(contract, REPLAY_SOURCE, 0, checked, letter_ids=ids)


def decode_held(contract: Contract, batch: HeldBatch, records: pa.Table, *, max_bytes: int) -> Pending:
    """A quarantined batch as one batch of the reserved source; nothing holds it a second time."""
    received_us = (batch.received_at - _EPOCH) // _MICROSECOND
    arrival = Arrival(received_us, as_sent=False, quarantine=Policy.WARN)
    checked = check_table(contract, records, max_bytes=max_bytes, arrival=arrival)
    return Pending(contract, RELEASE_SOURCE, 0, checked, released_ids=[batch.id])
