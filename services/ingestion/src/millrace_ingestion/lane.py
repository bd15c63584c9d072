"""One contract's queue: batches gather while a commit runs, then land together, in the order they came.

A failure (lake, database or bus) fails the group and everything queued behind it with UNAVAILABLE, and starts a new `epoch`:
a stream keeps the epoch it began with, so that none of its later batches can land before an earlier one is sent again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from millrace_api.events.v1.events_pb2 import RecordsLanded
from millrace_kit.bus import Bus, Outgoing, records_topic
from millrace_kit.errors import MillraceError, UnavailableError

from millrace_ingestion import metrics
from millrace_ingestion.arrow_records import stream_bytes
from millrace_ingestion.contracts import Contract
from millrace_ingestion.landing import Landing
from millrace_ingestion.models import Landed, Outcome, Pending
from millrace_ingestion.quality import figures_of
from millrace_ingestion.quality_monitor import QualityMonitor

log = logging.getLogger(__name__)

RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How a lane merges batches; see the settings of the same names."""

    max_commit_rows: int
    max_commit_batches: int
    max_commit_bytes: int
    linger_s: float
    publish_timeout_s: float


@dataclass(frozen=True)
class _Waiting:
    pending: Pending
    answer: asyncio.Future[Outcome]


class Lane:
    """Lands the batches of one contract, one group at a time.

    Args:
        landing: the blocking part; this lane is its only user.
        bus: where landed records are published.
        limits: sizes and waits.
        quality: told of every commit.
    """

    def __init__(self, landing: Landing, bus: Bus, limits: Limits, quality: QualityMonitor) -> None:
        self._quality = quality
        self._landing = landing
        self._bus = bus
        self._limits = limits
        self._queue: deque[_Waiting] = deque()
        self._awake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._open = False
        self._closed = False
        self.epoch = 0
        self.table_version = -1
        """The newest version that a commit of this lane made; -1 before the first."""

    @property
    def name(self) -> str:
        """The contract's name."""
        return self._landing.contract.name

    def submit(self, pending: Pending, epoch: int | None = None) -> asyncio.Future[Outcome]:
        """Queue a batch; the future has its outcome once it is durable.

        Raises:
            UnavailableError: the service stops, or a batch failed since `epoch`.
        """
        if self._closed:
            raise UnavailableError("STOPPING", "the service stops; send the batch again")
        if epoch is not None and epoch != self.epoch:
            raise _interrupted(self.name)
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(pending, answer))
        self._awake.set()
        return answer

    async def follow(self, contract: Contract) -> None:
        """Land by a new version of the contract from now on."""
        async with self._lock:
            self._landing.contract = contract
            self._open = False

    async def ready(self) -> None:
        """Make sure that the table is there and has the contract's columns.

        Raises:
            UnavailableError: the lake, the database or the bus does not answer.
        """
        await self.use(lambda _landing: None)

    async def settled(self) -> None:
        """Wait until everything of the batches that are answered is done."""
        async with self._lock:
            pass

    async def use(self, work: Callable[[Landing], T]) -> T:
        """Run `work` in a thread while no commit runs.

        Raises:
            UnavailableError: the lake, the database or the bus does not answer.
        """
        async with self._lock:
            try:
                await self._ensure_open()
                return await asyncio.to_thread(work, self._landing)
            except MillraceError:
                raise
            except Exception as error:
                self._open = False
                raise _unavailable(self.name, error) from error

    async def run(self, stop: asyncio.Event) -> None:
        """Land batches until `stop` is set and the queue is empty."""
        stopping = asyncio.create_task(_wait(stop))
        retry_s = RETRY_MIN_S
        try:
            while not (stop.is_set() and not self._queue):
                if not self._open:
                    retry_s = RETRY_MIN_S if await self._try_open() else await self._wait_retry(stopping, retry_s)
                    continue
                if not self._queue:
                    await self._wait_work(stopping)
                    continue
                if not stop.is_set():
                    await self._linger()
                async with self._lock:
                    await self._land(self._take())
        finally:
            stopping.cancel()
            self._closed = True
            self._fail_queue(UnavailableError("STOPPING", "the service stops; send the batch again"))

    async def _try_open(self) -> bool:
        async with self._lock:
            try:
                await self._ensure_open()
            except MillraceError as error:
                log.warning("contract %s cannot land now: %s", self.name, error)
                self._fail_queue(error)
                return False
            except Exception as error:
                log.exception("contract %s cannot land now", self.name)
                self._fail_queue(_unavailable(self.name, error))
                return False
            return True

    async def _ensure_open(self) -> None:
        """Open the landing, and publish and finish what an earlier process or attempt left."""
        if self._open:
            return
        for landed in await asyncio.to_thread(self._landing.open):
            log.info("contract %s: group %s is in the lake, publishing it again", self.name, landed.group_id)
            await self._publish(landed)
            await asyncio.to_thread(self._landing.finish, landed)
        self._open = True

    async def _wait_retry(self, stopping: asyncio.Task[None], seconds: float) -> float:
        await asyncio.wait([stopping], timeout=seconds)
        return min(RETRY_MAX_S, seconds * 2)

    async def _wait_work(self, stopping: asyncio.Task[None]) -> None:
        self._awake.clear()
        waiting = asyncio.create_task(_wait(self._awake))
        try:
            await asyncio.wait([stopping, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    async def _linger(self) -> None:
        """Give others a moment to join, unless there is a full group already."""
        if self._limits.linger_s and len(self._queue) < self._limits.max_commit_batches:
            await asyncio.sleep(self._limits.linger_s)

    def _take(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        rows = size = 0
        while self._queue and len(group) < self._limits.max_commit_batches:
            checked = self._queue[0].pending.checked
            rows, size = rows + checked.table.num_rows, size + checked.size
            if group and (rows > self._limits.max_commit_rows or size > self._limits.max_commit_bytes):
                break
            group.append(self._queue.popleft())
        return group

    async def _land(self, group: Sequence[_Waiting]) -> None:
        if not group:
            return
        started = time.perf_counter()
        try:
            landed = await asyncio.to_thread(self._landing.land, [waiting.pending for waiting in group])
            await self._publish(landed)
            await asyncio.to_thread(self._landing.finish, landed)
            self.table_version = landed.table_version
        except Exception as error:
            failure = error if isinstance(error, UnavailableError) else _unavailable(self.name, error)
            log.warning("contract %s: a group of %d batches did not land", self.name, len(group), exc_info=error)
            self._open = False
            metrics.BATCHES.labels(self.name, "failed").inc(len(group))
            _answer(group, [failure] * len(group))
            self._fail_queue(failure)
            return
        now_us = self._quality.now_us()
        _count(self.name, landed, time.perf_counter() - started)
        _answer(group, landed.results)
        try:
            await asyncio.to_thread(self._observe, group, landed, now_us)
            await asyncio.to_thread(self._landing.maintain)
        except Exception as error:
            # The batches are answered and safe; the table is opened anew and compacted next time.
            log.warning("contract %s: maintenance failed", self.name, exc_info=error)
            self._open = False

    def _observe(self, group: Sequence[_Waiting], landed: Landed, now_us: int) -> None:
        """Figures of the batches that were new."""
        fresh = [
            waiting.pending.checked
            for waiting, result in zip(group, landed.results, strict=True)
            if isinstance(result, Outcome) and not result.replayed
        ]
        findings = [finding for checked in fresh for finding in checked.findings]
        if fresh:
            tables = [piece.table for piece in landed.pieces]
            figures = figures_of(tables, landed.table_version, findings, len(fresh))
            self._quality.observe(self.name, now_us, figures)

    async def _publish(self, landed: Landed) -> None:
        messages = await asyncio.to_thread(_messages, landed)
        if not messages:
            return
        retry_s = RETRY_MIN_S
        deadline = time.monotonic() + self._limits.publish_timeout_s
        while True:
            try:
                await self._bus.publish(messages)
            except UnavailableError:
                if time.monotonic() + retry_s > deadline:
                    raise
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_MAX_S, retry_s * 2)
            else:
                return

    def _fail_queue(self, error: MillraceError) -> None:
        self.epoch += 1
        failed = list(self._queue)
        self._queue.clear()
        _answer(failed, [error] * len(failed))


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _messages(landed: Landed) -> list[Outgoing]:
    """One message a batch, in the order of the lake; its event id is the same however often it is published."""
    topic = records_topic(landed.contract)
    return [
        Outgoing(
            topic,
            landed.contract,
            RecordsLanded(
                contract=landed.contract,
                contract_version=landed.contract_version,
                arrow_ipc=piece.arrow_ipc or stream_bytes(piece.table),
                table_version=landed.table_version,
                source=piece.source,
                source_offset=piece.offset,
                rows=piece.rows,
            ).SerializeToString(),
            {"event-id": f"{landed.contract}/{piece.source}/{piece.offset}".encode()},
        )
        for piece in landed.pieces
    ]


def _answer(group: Sequence[_Waiting], results: Sequence[Outcome | MillraceError]) -> None:
    for waiting, result in zip(group, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, MillraceError):
            waiting.answer.set_exception(result)
            waiting.answer.exception()  # a client that went away leaves nobody to look at it
        else:
            waiting.answer.set_result(result)


def _count(name: str, landed: Landed, seconds: float) -> None:
    metrics.COMMIT_SECONDS.labels(name).observe(seconds)
    metrics.COMMIT_ROWS.labels(name).observe(sum(piece.rows for piece in landed.pieces))
    metrics.TABLE_VERSION.labels(name).set(landed.table_version)
    replayed = len(landed.results) - len(landed.entries)
    metrics.BATCHES.labels(name, "landed").inc(len(landed.entries))
    metrics.BATCHES.labels(name, "replayed").inc(replayed)
    for entry in landed.entries:
        metrics.RECORDS.labels(name, "accepted").inc(entry.accepted)
        metrics.RECORDS.labels(name, "duplicate").inc(entry.duplicates)
        metrics.RECORDS.labels(name, "rejected").inc(entry.rejected)
        metrics.RECORDS.labels(name, "quarantined").inc(entry.quarantined)
        metrics.REPLAYED_LETTERS.labels(name).inc(len(entry.landed_letters))
        for reject in entry.rejects:
            metrics.REJECTED.labels(name, reject.failure.reason).inc()


def _interrupted(name: str) -> UnavailableError:
    return UnavailableError(
        "EARLIER_BATCH_FAILED", "an earlier batch did not land; send from the first unanswered one", {"contract": name}
    )


def _unavailable(name: str, error: Exception) -> UnavailableError:
    metadata = {"contract": name, "cause": type(error).__name__}
    return UnavailableError(
        "LANDING_FAILED", f"the batch could not be landed now ({type(error).__name__}); send it again", metadata
    )
