"""Following a run: its changes and its log lines, until it ends.

Nothing is queued. A follower keeps a position in each log file and the revision it saw last, and reads on when its client took
what came before; a slow client costs nothing and misses no line, only intermediate states.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from millrace_kit.errors import ResourceExhaustedError

from millrace_training_coordinator import metrics
from millrace_training_coordinator.changes import Changes
from millrace_training_coordinator.executor import Executor, Place
from millrace_training_coordinator.runs import RunRecord
from millrace_training_coordinator.scheduler import StageState
from millrace_training_coordinator.store import Store

LOG_POLL_S = 0.2
CHUNK_BYTES = 1 << 16
# A longer line comes in pieces.
MAX_LINE_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an attempt's log."""

    stage: str
    attempt: int
    text: str


class Tail:
    """A position in one attempt's log."""

    def __init__(self, place: Place, read: Callable[[Place, int, int], bytes]) -> None:
        self._place = place
        self._read = read
        self._offset = 0
        self._rest = b""
        self.closed = False

    async def lines(self, *, complete: bool) -> AsyncIterator[Line]:
        """Lines written since the last call; with `complete` the log grows no more, and an unfinished last line counts."""
        while chunk := await asyncio.to_thread(self._read, self._place, self._offset, CHUNK_BYTES):
            self._offset += len(chunk)
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for line in whole:
                for piece in self._pieces(line):
                    yield piece
            while len(self._rest) > MAX_LINE_BYTES:
                yield self._line(self._rest[:MAX_LINE_BYTES])
                self._rest = self._rest[MAX_LINE_BYTES:]
        if complete:
            if self._rest:
                yield self._line(self._rest)
            self._rest = b""
            self.closed = True

    def _pieces(self, line: bytes) -> Iterator[Line]:
        for start in range(0, max(1, len(line)), MAX_LINE_BYTES):
            yield self._line(line[start : start + MAX_LINE_BYTES])

    def _line(self, raw: bytes) -> Line:
        text = raw.removesuffix(b"\r").decode("utf-8", "replace")
        return Line(self._place.stage, self._place.attempt, text)


class Follower:
    """Follows runs for at most `max_watchers` clients at once."""

    def __init__(self, store: Store, executor: Executor, changes: Changes, *, max_watchers: int) -> None:
        self._store = store
        self._executor = executor
        self._changes = changes
        self._max_watchers = max_watchers
        self._watchers = 0

    async def follow(self, run_id: str) -> AsyncIterator[RunRecord | Line]:
        """The run now, its changes and all its log lines; the ended run comes last.

        Raises:
            NotFoundError: no such run.
            ResourceExhaustedError: too many clients follow runs.
        """
        if self._watchers >= self._max_watchers:
            raise ResourceExhaustedError("max_watchers", f"{self._max_watchers} clients watch runs; retry later")
        self._watchers += 1
        metrics.WATCHERS.inc()
        try:
            async for event in self._follow(run_id):
                yield event
        finally:
            self._watchers -= 1
            metrics.WATCHERS.dec()

    async def _follow(self, run_id: str) -> AsyncIterator[RunRecord | Line]:
        tails: dict[Place, Tail] = {}
        seen = 0
        count = -1
        while True:
            if self._changes.count > count:
                count = self._changes.count
                run = await asyncio.to_thread(self._store.run, run_id)
            if run.revision > seen and not run.state.ended:
                seen = run.revision
                yield run
            for stage in run.new.plan:
                status = run.status.stages[stage.name]
                for attempt in range(1, status.attempts + 1):
                    place = Place(run_id, stage.name, attempt)
                    tail = tails.setdefault(place, Tail(place, self._executor.read_log))
                    # The state was read first: an attempt that is over wrote its last line before that.
                    over = attempt < status.attempts or status.state is not StageState.RUNNING
                    if not tail.closed:
                        async for line in tail.lines(complete=over):
                            yield line
            if run.state.ended:
                yield run
                return
            await self._changes.after(count, LOG_POLL_S)
