"""Chooses the next step of a join: the versions it takes in, within its limits, and the left records whose time is over with it."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from millrace_kit.clock import Clock

from millrace_ingestion.joins.inputs import JoinInput
from millrace_ingestion.joins.outputs import Layout, Read, times_of
from millrace_ingestion.joins.position import NEVER_US, Position, after, taken, watermark
from millrace_ingestion.joins.rows import Step
from millrace_ingestion.joins.specs import JoinKind

_US = 1_000_000


@dataclass
class Look:
    """What one look at the inputs found."""

    left_version: int
    right_version: int
    oldest_s: float | None = None
    """Commit time of the oldest version that the step takes in."""


class Planner:
    """The steps of one join. Blocking, and used from one thread at a time.

    Args:
        how: what is joined; changes with the contracts.
        left: the left table.
        right: the right table.
        clock: for inputs that are silent, and records that wait.
        limit: records of an input that one step takes in.
    """

    def __init__(self, how: Layout, left: JoinInput, right: JoinInput, clock: Clock, limit: int) -> None:
        self._how = how
        self._left = left
        self._right = right
        self._clock = clock
        self._limit = limit
        now = clock.monotonic()
        self._heard = [now, now]

    def begin(self) -> Position:
        """Where a join begins: what is in the left table now is taken in first, with what is in the right one."""
        left, right = self._left.newest(), self._right.newest()
        high = NEVER_US
        if self._how.spec.kind is JoinKind.LEFT:
            read = self._how.right
            for part in self._right.slice(right, read, [read.time], None, -NEVER_US):
                high = max(high, int(times_of(part, read.time).max()))
        return Position(left, right, 0, right_high_us=high)

    def next(self, position: Position) -> tuple[Step | None, Look]:
        """The next step, if there is anything to do.

        Raises:
            FailedPreconditionError: an input lost what is not joined yet.
        """
        look = Look(self._left.newest(), self._right.newest())
        if position.base_row is not None:
            rows = self._left.base_rows(position.left_version)
            end = position.base_row + self._limit
            goal = replace(position, base_row=end if end < rows else None)
        else:
            goal = self._goal(position, look)
        step = self._step(position, goal)
        high = replace(
            step.after,
            left_high_us=max(position.left_high_us, _high(step.left, self._how.left.time)),
            right_high_us=max(position.right_high_us, _high(step.right, self._how.right.time)),
        )
        high = replace(high, settled_us=self._settled(high))
        return (None if high == position else replace(step, after=high)), look

    def _goal(self, position: Position, look: Look) -> Position:
        spec = self._how.spec
        if spec.kind is JoinKind.AS_OF:
            until_s = self._clock.now().timestamp() - spec.wait_s if spec.wait_s else None
            left = taken(self._left.gained(position.left_version), self._limit, until_s)
            look.oldest_s = min((one.at_s for one in left if one.rows), default=None)
            return replace(after(position, left, ()), right_version=look.right_version)
        gained = self._left.gained(position.left_version), self._right.gained(position.right_version)
        left, right = (taken(commits, self._limit) for commits in gained)
        for side, commits in enumerate((left, right)):
            if any(one.rows for one in commits):
                self._heard[side] = self._clock.monotonic()
        look.oldest_s = min((one.at_s for one in (*left, *right) if one.rows), default=None)
        return after(position, left, right)

    def again(self, before: Position, goal: Position) -> Step:
        """The step that was begun, and perhaps broken off.

        Raises:
            FailedPreconditionError: an input lost what it takes in.
        """
        self._left.newest()
        self._right.newest()
        return self._step(before, goal)

    def _step(self, before: Position, goal: Position) -> Step:
        """The step between two positions, with the records that it takes in.

        Raises:
            FailedPreconditionError: an input lost them.
        """
        how = self._how
        none = Step(before, goal, _empty(self._left, how.left), _empty(self._right, how.right))
        if before.base_row is not None:
            return replace(none, left=self._left.base(before.left_version, how.left, before.base_row, goal.base_row))
        left = [one for one in self._left.gained(before.left_version) if one.version <= goal.left_version]
        step = replace(none, left=self._left.rows(left, how.left))
        if how.spec.kind is JoinKind.AS_OF:
            return step
        right = [one for one in self._right.gained(before.right_version) if one.version <= goal.right_version]
        return replace(step, right=self._right.rows(right, how.right))

    def _settled(self, position: Position) -> int:
        """Up to where the time of left records is over, for at most `limit` more of them."""
        spec = self._how.spec
        if spec.kind is not JoinKind.LEFT or position.base_row is not None:
            return position.settled_us
        now = self._clock.monotonic()
        quiet = [bool(spec.idle_s) and now - heard >= spec.idle_s for heard in self._heard]
        mark = watermark(
            position,
            now_us=int(self._clock.now().timestamp() * _US),
            idle_us=int(spec.idle_s * _US),
            silent=(quiet[0], quiet[1]),
        )
        until = mark - spec.open_us
        if mark == NEVER_US or until <= position.settled_us:
            return position.settled_us
        read = self._how.left
        since = None if position.settled_us == NEVER_US else position.settled_us
        times, cut = np.empty(0, np.int64), False
        for part in self._left.slice(position.left_version, read, [read.time], since, until):
            times = np.concatenate([times, times_of(part, read.time)])
            if len(times) > self._limit:
                times, cut = np.partition(times, self._limit - 1)[: self._limit], True
        if cut:
            return int(times.max())
        # Where nothing lies between, nothing changes: no step is made for the mere passing of time.
        return until if len(times) else position.settled_us


def _empty(table: JoinInput, read: Read) -> pa.Table:
    return table.rows((), read)


def _high(rows: pa.Table, time: str) -> int:
    return int(times_of(rows, time).max()) if rows.num_rows else NEVER_US
