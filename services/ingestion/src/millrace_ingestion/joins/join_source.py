"""Runs the steps of one join and lands their records, each exactly once.

A step is kept before its first record lands and done after its last one has (`store.py`). The records' event ids follow from those of the
inputs' records, so that what a broken-off step had landed is left out when it is done again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
from millrace_kit.clock import Clock

from millrace_ingestion import metrics
from millrace_ingestion.arrow_records import stream_bytes
from millrace_ingestion.contracts import Contract
from millrace_ingestion.joins.inputs import JoinInput
from millrace_ingestion.joins.outputs import Maker, layout
from millrace_ingestion.joins.planning import Look, Planner
from millrace_ingestion.joins.position import Position
from millrace_ingestion.joins.rows import Joiner, Step
from millrace_ingestion.joins.specs import JoinKind, JoinSpec
from millrace_ingestion.joins.store import JoinStore
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.models import Incoming, Outcome
from millrace_ingestion.sources.specs import JoinProgress, Progress, Source
from millrace_ingestion.sources.topic_source import Lanes

log = logging.getLogger(__name__)

CrashPoint = Callable[[str], None]
STEPS = ("join_planned", "join_landed", "join_done")
"""What a crash point is told, beside the steps of landing."""


class JoinLanes(Lanes, Protocol):
    """What is used of the ingestor."""

    def landed_version(self, name: str) -> int:
        """The newest version of a contract's table that this process knows of; looks nowhere."""
        ...


@dataclass(frozen=True)
class JoinLimits:
    """See the settings of the same names."""

    step_records: int
    batch_records: int
    batch_bytes: int
    window: int
    poll_s: float
    look_s: float


class JoinSource:
    """One join while it runs.

    Args:
        source: what is joined into what.
        lanes: where it lands.
        open_table: a reader of a contract's table.
        store: how far it is.
        clock: for inputs that are silent.
        progress: what is told about it.
        limits: sizes and waits.
        crash_point: called with each of `STEPS` as it is done.
    """

    def __init__(
        self,
        source: Source,
        *,
        lanes: JoinLanes,
        open_table: Callable[[str], LakeTable],
        store: JoinStore,
        clock: Clock,
        progress: Progress,
        limits: JoinLimits,
        crash_point: CrashPoint,
    ) -> None:
        spec = source.spec
        assert isinstance(spec, JoinSpec)
        self._source = source
        self._spec = spec
        self._lanes = lanes
        self._open_table = open_table
        self._store = store
        self._clock = clock
        self._progress = progress
        self._state = progress.join or JoinProgress()
        progress.join = self._state
        self._limits = limits
        self._crash_point = crash_point
        self._lane = source.lane("join")
        self._built_for: tuple[int, ...] = ()

    async def run(self, stop: asyncio.Event) -> None:
        """Join until `stop` is set."""
        self._follow()
        position, plan = await asyncio.to_thread(self._kept)
        if plan is not None:
            step = await asyncio.to_thread(self._planner.again, position, plan)
            position = await self._apply(step, Look(plan.left_version, plan.right_version))
        while not stop.is_set():
            self._follow()
            seen = self._known_versions()
            found, look = await asyncio.to_thread(self._planner.next, position)
            self._show(found.before if found else position, look)
            if found is None:
                await self._wait(seen, stop)
                continue
            position = await self._apply(found, look)
            self._show(position, look)

    def _contracts(self) -> tuple[Contract, Contract, Contract]:
        names = (self._spec.left, self._spec.right, self._source.contract)
        left, right, contract = (self._lanes.contract(name) for name in names)
        return left, right, contract

    def _follow(self) -> None:
        """Go by the contracts' newest versions."""
        left, right, contract = self._contracts()
        versions = (left.version, right.version, contract.version)
        if versions == self._built_for:
            return
        how = layout(self._spec, left, right, contract)
        limits = self._limits
        lefts, rights = (
            JoinInput(one, self._open_table(one.name), batch_rows=limits.step_records) for one in (left, right)
        )
        self._planner = Planner(how, lefts, rights, self._clock, limits.step_records)
        maker = Maker(how, limits.batch_records, limits.batch_bytes)
        self._joiner = Joiner(how, lefts, rights, maker, limits.batch_records)
        self._built_for = versions

    def _kept(self) -> tuple[Position, Position | None]:
        kept = self._store.find(self._source.name)
        if kept is not None:
            return kept.position, kept.plan
        position = self._planner.begin()
        self._store.begin(self._source.name, self._source.contract, self._spec.identity, position)
        return position, None

    def _known_versions(self) -> tuple[int, int]:
        return self._lanes.landed_version(self._spec.left), self._lanes.landed_version(self._spec.right)

    async def _wait(self, seen: tuple[int, int], stop: asyncio.Event) -> None:
        """Until an input gets a new version by this process, or it is time to look for those of others and for what waits."""
        until = self._clock.monotonic() + self._limits.look_s
        while self._known_versions() == seen and self._clock.monotonic() < until and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.poll_s):
                    await stop.wait()

    async def _apply(self, step: Step, look: Look) -> Position:
        """Land the step's records; returns where it leads."""
        name = self._source.name
        tables = self._joiner.records(step)
        first = await asyncio.to_thread(_next, tables)
        # Newer versions of a right table alone are nothing to remember: an as-of join takes the newest anyway.
        idle = self._spec.kind is JoinKind.AS_OF and step.after.left_version == step.before.left_version
        if first is None and idle and step.before.base_row is None:
            return step.after
        if first is not None:
            await asyncio.to_thread(self._store.plan, name, step.after)
            self._crash_point("join_planned")
            await self._land(first, tables)
            self._crash_point("join_landed")
        await asyncio.to_thread(self._store.done, name, step.after)
        self._crash_point("join_done")
        self._count(step, look)
        return step.after

    async def _land(self, first: pa.Table, tables: Iterator[pa.Table]) -> None:
        contract = self._source.contract
        last = await self._lanes.position(contract, self._lane)
        epoch = self._lanes.epoch(contract)
        answers: list[asyncio.Future[Outcome]] = []
        table: pa.Table | None = first
        try:
            while table is not None:
                batch = Incoming(contract, self._lane, last + 1, arrow_ipc=stream_bytes(table), after=last)
                answers.append(await self._lanes.accept(batch, epoch=epoch))
                last += 1
                while len(answers) >= self._limits.window:
                    self._landed(await answers.pop(0))
                table = await asyncio.to_thread(_next, tables)
            while answers:
                self._landed(await answers.pop(0))
        finally:
            if answers:
                await asyncio.wait(answers)

    def _landed(self, outcome: Outcome) -> None:
        self._progress.count(outcome)
        metrics.count_source(self._source.name, outcome.accepted, outcome.duplicates, outcome.rejected)

    def _count(self, step: Step, look: Look) -> None:
        self._progress.trouble = ""
        counts, state = step.counts, self._state
        state.matched += counts.matched
        state.unmatched += counts.unmatched
        state.late += counts.late
        for result, count in (("matched", counts.matched), ("unmatched", counts.unmatched), ("late", counts.late)):
            metrics.JOIN_ROWS.labels(self._source.name, result).inc(count)
        if look.oldest_s is not None:
            age_s = self._clock.now().timestamp() - look.oldest_s
            metrics.JOIN_FRESHNESS.labels(self._source.name).observe(max(0.0, age_s))

    def _show(self, position: Position, look: Look) -> None:
        self._state.position = position
        self._state.newest = look.left_version, look.right_version
        metrics.SOURCE_LAG.labels(self._source.name).set(self._state.lag)


def _next(tables: Iterator[pa.Table]) -> pa.Table | None:
    return next(tables, None)
