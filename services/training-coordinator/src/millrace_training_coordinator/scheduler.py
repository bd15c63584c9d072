"""The state machine of a run: plan + status + event -> status, and status -> what to do next. Values only, no processes, no clock.

A stage waits until all it depends on succeeded. A failed attempt is retried after a growing wait while the manifest's retries
last; an interrupted one (the coordinator stopped it, the machine went away) is repeated at once and costs no retry. Once a stage
has failed for good no further stage starts, those running end by themselves, and the run fails. A cancelled run's stages are stopped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")

# Attempts of one stage that may be interrupted before it counts as failed: a stage that takes the machine down must end.
MAX_INTERRUPTIONS = 10


class RunState(StrEnum):
    """State of a run."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen."""
        return self in {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}


class StageState(StrEnum):
    """State of a stage."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen."""
        return self in {StageState.SUCCEEDED, StageState.FAILED, StageState.SKIPPED}


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "SUCCEEDED"
    RETRYABLE = "RETRYABLE"
    PERMANENT = "PERMANENT"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """What the state machine needs to know of a stage."""

    name: str
    depends_on: tuple[str, ...] = ()
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits before retries: `first_s`, doubled each time, at most `limit_s`."""

    first_s: float = 1.0
    limit_s: float = 60.0

    def wait_s(self, failures: int) -> float:
        """Wait after the `failures`-th failure."""
        return min(self.limit_s, self.first_s * float(2 ** (failures - 1)))


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Where a stage stands."""

    state: StageState = StageState.WAITING
    attempts: int = 0
    failures: int = 0
    interruptions: int = 0
    failure: str = ""
    retry_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run stands; `stages` has every planned stage."""

    stages: Mapping[str, StageStatus]
    state: RunState = RunState.PENDING
    cancel_requested: bool = False
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The next attempt of `stage` starts."""

    stage: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Attempt `attempt` of `stage` ended; a report about another attempt than the running one changes nothing."""

    stage: str
    attempt: int
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody asked to end the run."""


Event = Started | Ended | CancelRequested


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now."""

    start: tuple[str, ...] = ()
    """Stages whose next attempt may start, in the order of the plan."""
    stop: tuple[str, ...] = ()
    """Running stages to be stopped."""
    wake_at: datetime | None = None
    """When to look again although nothing happened."""


def apply(plan: Sequence[PlannedStage], run: RunStatus, event: Event, now: datetime, backoff: Backoff) -> RunStatus:
    """The run after `event`. An event that does not fit (late, repeated) changes nothing."""
    if run.state.ended:
        return run
    match event:
        case Started(stage):
            run = _start(plan, run, stage, now)
        case Ended():
            run = _end(plan, run, event, now, backoff)
        case CancelRequested():
            run = replace(run, cancel_requested=True)
    return _settle(plan, run, now)


def decide(plan: Sequence[PlannedStage], run: RunStatus, now: datetime) -> Decision:
    """What to do for a run as it stands at `now`."""
    if run.state.ended:
        return Decision()
    if run.cancel_requested:
        return Decision(stop=tuple(s.name for s in plan if run.stages[s.name].state is StageState.RUNNING))
    start: list[str] = []
    waits: list[datetime] = []
    for stage in plan:
        status = run.stages[stage.name]
        if status.state is StageState.WAITING and _met(stage, run):
            start.append(stage.name)
        elif status.state is StageState.RETRYING and status.retry_at is not None:
            if status.retry_at <= now:
                start.append(stage.name)
            else:
                waits.append(status.retry_at)
    return Decision(tuple(start), (), min(waits, default=None))


def _met(stage: PlannedStage, run: RunStatus) -> bool:
    return all(run.stages[name].state is StageState.SUCCEEDED for name in stage.depends_on)


def _with(run: RunStatus, name: str, status: StageStatus) -> RunStatus:
    return replace(run, stages={**run.stages, name: status})


def _start(plan: Sequence[PlannedStage], run: RunStatus, name: str, now: datetime) -> RunStatus:
    if name not in decide(plan, run, now).start:
        return run
    status = run.stages[name]
    started = replace(
        status,
        state=StageState.RUNNING,
        attempts=status.attempts + 1,
        retry_at=None,
        started_at=status.started_at or now,
    )
    return replace(_with(run, name, started), state=RunState.RUNNING)


def _end(plan: Sequence[PlannedStage], run: RunStatus, event: Ended, now: datetime, backoff: Backoff) -> RunStatus:
    status = run.stages.get(event.stage)
    if status is None or status.state is not StageState.RUNNING or status.attempts != event.attempt:
        return run
    failed = replace(status, state=StageState.FAILED, failure=event.reason, finished_at=now)
    match event.outcome:
        case Outcome.SUCCEEDED:
            ended = replace(status, state=StageState.SUCCEEDED, finished_at=now)
        case _ if run.cancel_requested:
            ended = replace(failed, failure="cancelled")
        case Outcome.INTERRUPTED:
            count = status.interruptions + 1
            again = replace(failed, state=StageState.RETRYING, interruptions=count, retry_at=now, finished_at=None)
            given_up = replace(failed, failure=f"interrupted {count} times, last: {event.reason}", interruptions=count)
            ended = again if count <= MAX_INTERRUPTIONS else given_up
        case Outcome.RETRYABLE:
            retries = next(stage.retries for stage in plan if stage.name == event.stage)
            count = status.failures + 1
            if count <= retries:
                at = now + timedelta(seconds=backoff.wait_s(count))
                ended = replace(failed, state=StageState.RETRYING, failures=count, retry_at=at, finished_at=None)
            else:
                ended = replace(failed, failures=count)
        case Outcome.PERMANENT:
            ended = replace(failed, failures=status.failures + 1)
    return _with(run, event.stage, ended)


def _settle(plan: Sequence[PlannedStage], run: RunStatus, now: datetime) -> RunStatus:
    """Skip what can no longer run, and end the run when nothing is left."""
    doomed = any(status.state is StageState.FAILED for status in run.stages.values())
    if doomed or run.cancel_requested:
        for stage in plan:
            status = run.stages[stage.name]
            if status.state is StageState.WAITING:
                run = _with(run, stage.name, replace(status, state=StageState.SKIPPED))
            elif status.state is StageState.RETRYING:
                ended = replace(status, state=StageState.FAILED, retry_at=None, finished_at=now)
                run = _with(run, stage.name, ended)
    states = [status.state for status in run.stages.values()]
    if not all(state.ended for state in states):
        return run
    if run.cancel_requested:
        state = RunState.CANCELLED
    elif all(state is StageState.SUCCEEDED for state in states):
        state = RunState.SUCCEEDED
    else:
        state = RunState.FAILED
    return replace(run, state=state, finished_at=now)


@dataclass(frozen=True, slots=True)
class Claim:
    """Resources a stage holds while it runs, or the machine's whole budget."""

    cpus: float
    memory_mib: int
    gpus: int = 0

    def fits(self, free: "Claim") -> bool:
        """Whether `free` has room for this."""
        room = self.cpus <= free.cpus + 1e-9 and self.memory_mib <= free.memory_mib
        return room and self.gpus <= free.gpus

    def minus(self, other: "Claim") -> "Claim":
        """What is left after `other`."""
        return Claim(self.cpus - other.cpus, self.memory_mib - other.memory_mib, self.gpus - other.gpus)


def admit(candidates: Iterable[tuple[T, Claim]], running: Iterable[Claim], budget: Claim) -> list[T]:
    """The candidates that may start now, first come first served.

    The first one that does not fit holds back all behind it: small stages cannot starve a large one.
    """
    free = budget
    for claim in running:
        free = free.minus(claim)
    admitted: list[T] = []
    for candidate, claim in candidates:
        if not claim.fits(free):
            break
        admitted.append(candidate)
        free = free.minus(claim)
    return admitted
