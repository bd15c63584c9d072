"""Looks for files at its times and lands each one once.

A file is a source of its own to the landing: its identity names the lane, and the number of its records that landed is the offset. A look
that is broken off goes on in the middle of the file. A file that cannot be read stops no other: it is noted and left alone until its content
changes or the source is resumed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import overload

from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, MillraceError, UnavailableError
from millrace_kit.record_files import Chunk, ChunkLimits, RecordFile, find_files, read_chunks, unchanged

from millrace_ingestion import metrics
from millrace_ingestion.arrow_records import stream_bytes
from millrace_ingestion.contracts import Contract
from millrace_ingestion.models import Incoming, Outcome
from millrace_ingestion.origins import Origin
from millrace_ingestion.sources.schedule import next_look
from millrace_ingestion.sources.specs import FileSpec, Progress, Source
from millrace_ingestion.sources.store import SourceStore
from millrace_ingestion.sources.topic_source import Lanes

log = logging.getLogger(__name__)

RETRY_MIN_S = 0.2
# Files whose trouble is named in a look's result; the others are counted.
_NAMED_ERRORS = 3


@dataclass(frozen=True)
class FileLimits:
    """See the settings of the same names."""

    batch_records: int
    batch_bytes: int
    window: int
    attempts: int
    retry_max_s: float
    max_files: int


@dataclass
class _Look:
    """What one look did."""

    files: int = 0
    records: int = 0
    errors: list[str] = field(default_factory=list)

    def result(self) -> str:
        """For people."""
        text = f"{self.files} new files, {self.records} records"
        if self.errors:
            more = len(self.errors) - _NAMED_ERRORS
            text += f"; {len(self.errors)} unreadable: {'; '.join(self.errors[:_NAMED_ERRORS])}"
            text += f"; and {more} more" if more > 0 else ""
        return text


class FileSource:
    """One source of files.

    Args:
        source: what is read.
        last: when the last look ended; None looks at once.
        lanes: where it lands.
        store: which files are settled.
        clock: when to look.
        progress: what is told about it.
        limits: sizes.
    """

    def __init__(
        self,
        source: Source,
        *,
        last: datetime | None,
        lanes: Lanes,
        store: SourceStore,
        clock: Clock,
        progress: Progress,
        limits: FileLimits,
    ) -> None:
        spec = source.spec
        assert isinstance(spec, FileSpec)
        self._source = source
        self._spec = spec
        self._last = last
        self._lanes = lanes
        self._store = store
        self._clock = clock
        self._progress = progress
        self._limits = limits

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop` is set, or once when there is no schedule."""
        while not stop.is_set():
            now = self._clock.now()
            due = next_look(self._spec, self._last, now)
            self._progress.next_run = due
            if due is None:
                return
            if due > now:
                # Woken now and then, so that a clock that is set does not matter.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(60.0, (due - now).total_seconds())):
                        await stop.wait()
                continue
            result = await self._look_with_retries(stop)
            if result is None:
                return
            self._last = self._clock.now()
            await self._looked(result)

    async def _looked(self, result: str) -> None:
        done = not (self._spec.cron or self._spec.interval_s)
        await asyncio.to_thread(lambda: self._store.looked(self._source.name, result, done=done))

    async def _look_with_retries(self, stop: asyncio.Event) -> str | None:
        """One look; its result, or the trouble of the last attempt. None when it was stopped."""
        retry_s = RETRY_MIN_S
        for attempt in range(1, self._limits.attempts + 1):
            try:
                return await self._look(stop)
            except (MillraceError, OSError) as error:
                trouble = f"{error.reason}: {error.message}" if isinstance(error, MillraceError) else str(error)
                log.warning("source %s: %s", self._source.name, trouble)
                metrics.SOURCE_TROUBLES.labels(self._source.name, type(error).__name__).inc()
            self._progress.trouble = trouble
            if attempt < self._limits.attempts:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await stop.wait()
                if stop.is_set():
                    return None
                retry_s = min(self._limits.retry_max_s, retry_s * 2)
        return f"failed after {self._limits.attempts} attempts: {trouble}"

    async def _look(self, stop: asyncio.Event) -> str | None:
        look = _Look()
        settled = await asyncio.to_thread(self._store.files, self._source.name)
        contract = self._lanes.contract(self._source.contract)
        for url in self._spec.urls:
            kind, limit = self._spec.format.value, self._limits.max_files
            found = await asyncio.to_thread(find_files, url, kind, limit=limit)
            for file in found:
                if file.identity in settled:
                    continue
                if stop.is_set():
                    return None
                try:
                    records = await self._land(file, contract, stop)
                except InvalidArgumentError as error:
                    look.errors.append(error.message)
                    await self._settle(file, 0, error.message)
                    continue
                if records is None:
                    return None
                look.files += 1
                look.records += records
        self._progress.trouble = ""
        return look.result()

    async def _settle(self, file: RecordFile, records: int, error: str = "") -> None:
        await asyncio.to_thread(self._store.settle, self._source.name, file.identity, file.url, records, error)

    async def _land(self, file: RecordFile, contract: Contract, stop: asyncio.Event) -> int | None:
        """Land what has not landed of a file; returns its number of records, or None when it was stopped."""
        lane = self._source.lane(file.identity)
        last = await self._lanes.position(contract.name, lane)
        epoch = self._lanes.epoch(contract.name)
        columns = {column.name: column.type.value.lower() for column in contract.columns}
        limits = ChunkLimits(self._limits.batch_records, self._limits.batch_bytes)
        chunks = read_chunks(file, columns, limits, after=last)
        answers: list[asyncio.Future[Outcome]] = []
        try:
            while (chunk := await asyncio.to_thread(_next, chunks)) is not None:
                batch = Incoming(
                    contract.name,
                    lane,
                    chunk.end,
                    arrow_ipc=stream_bytes(chunk.table) if chunk.table is not None else None,
                    json_lines=chunk.json_lines,
                    origins=FileOrigins(file.url, chunk),
                    after=last,
                )
                answers.append(await self._lanes.accept(batch, epoch=epoch))
                last = chunk.end
                while len(answers) >= self._limits.window:
                    self._count(await answers.pop(0))
                if stop.is_set():
                    break
            while answers:
                self._count(await answers.pop(0))
        finally:
            if answers:
                await asyncio.wait(answers)
        if stop.is_set():
            return None
        if not await asyncio.to_thread(unchanged, file):
            raise UnavailableError(
                "FILE_CHANGED", f"{file.url} changed while it was read; it is read again as it is now"
            )
        await self._settle(file, last)
        return last

    def _count(self, outcome: Outcome) -> None:
        self._progress.count(outcome)
        metrics.count_source(self._source.name, outcome.accepted, outcome.duplicates, outcome.rejected)


class FileOrigins(Sequence[Origin]):
    """Where the records of a chunk are; made when somebody looks."""

    def __init__(self, url: str, chunk: Chunk) -> None:
        self._url = url
        self._places = chunk.places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Origin: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Origin]: ...
    def __getitem__(self, index: int | slice) -> Origin | Sequence[Origin]:
        if isinstance(index, slice):
            return [Origin(self._url, 0, place) for place in self._places[index]]
        return Origin(self._url, 0, self._places[index])


def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    return next(chunks, None)
