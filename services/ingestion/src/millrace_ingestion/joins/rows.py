"""What one step of a join lands: from the rows that the step takes in, and the slice of the other side that lies in their bounds.

A step's records depend on the two positions that it lies between and on nothing else, so that a step that is done again makes the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.joins.inputs import JoinInput
from millrace_ingestion.joins.matching import I64, Keys, Pairs, Ranges, ranges
from millrace_ingestion.joins.outputs import Layout, Maker, times_of
from millrace_ingestion.joins.position import NEVER_US, Position
from millrace_ingestion.joins.specs import ANY_AGE_US, JoinKind

Mask = npt.NDArray[np.bool_]
# Chosen rows of an as-of join, for each left row, before those that better ones replaced are dropped.
_KEPT_FACTOR = 3


@dataclass
class Counts:
    """What a step did."""

    matched: int = 0
    unmatched: int = 0
    late: int = 0


@dataclass(frozen=True)
class Step:
    """From one position to the next."""

    before: Position
    after: Position
    left: pa.Table
    """Left records that it takes in."""
    right: pa.Table
    counts: Counts = field(default_factory=Counts)


class Joiner:
    """Makes the records of steps.

    Args:
        how: what is joined, and the records' columns.
        left: the left table.
        right: the right table.
        maker: makes records.
        limit: pairs made at once.
    """

    def __init__(self, how: Layout, left: JoinInput, right: JoinInput, maker: Maker, limit: int) -> None:
        self._how = how
        self._spec = how.spec
        self._left = left
        self._right = right
        self._maker = maker
        self._limit = limit

    def records(self, step: Step) -> Iterator[pa.Table]:
        """The step's records, in tables within the maker's limits.

        Raises:
            FailedPreconditionError: an input cannot be read as it was any more.
        """
        if self._spec.kind is JoinKind.AS_OF:
            yield from self._newest(step)
            return
        yield from self._new_left(step)
        yield from self._new_right(step)
        if step.after.settled_us > step.before.settled_us:
            yield from self._settled(step)

    def _pairs(self, step: Step, left: pa.Table, right: pa.Table, found: Ranges) -> Iterator[pa.Table]:
        for pairs in found.pairs(self._limit):
            step.counts.matched += len(pairs.left)
            yield from self._maker.pairs(left, right, pairs)

    def _alone(self, step: Step, left: pa.Table, mask: Mask) -> Iterator[pa.Table]:
        step.counts.unmatched += int(mask.sum())
        yield from self._maker.alone(left, mask)

    def _new_left(self, step: Step) -> Iterator[pa.Table]:
        """New left rows with everything of the right."""
        left, how = step.left, self._how
        if not left.num_rows:
            return
        times = times_of(left, how.left.time)
        matched = np.zeros(left.num_rows, np.bool_)
        for right, found in self._partners(step.after.right_version, left, how.right.columns):
            matched |= found.count > 0
            yield from self._pairs(step, left, right, found)
        if self._spec.kind is JoinKind.LEFT:
            yield from self._alone(step, left, ~matched & (times <= step.before.settled_us))

    def _partners(self, version: int, left: pa.Table, columns: tuple[str, ...]) -> Iterator[tuple[pa.Table, Ranges]]:
        """The right rows that may be partners of `left`, in batches, and which are."""
        how, spec = self._how, self._spec
        times = times_of(left, how.left.time)
        keys = Keys([left.column(name) for name in how.left.keys])
        first, last = int(times.min()) - spec.before_us, int(times.max()) + spec.after_us
        for right in self._right.slice(version, how.right, columns, first - 1, last):
            codes = keys.of([right.column(name) for name in how.right.keys])
            placed = codes, times_of(right, how.right.time)
            yield right, ranges((keys.codes, times), placed, before_us=spec.before_us, after_us=spec.after_us)

    def _new_right(self, step: Step) -> Iterator[pa.Table]:
        """New right rows with the left rows that were there before; of LEFT only those whose time is not over."""
        right, how, spec = step.right, self._how, self._spec
        if not right.num_rows:
            return
        times = times_of(right, how.right.time)
        keys = Keys([right.column(name) for name in how.right.keys])
        first, last = int(times.min()) - spec.after_us, int(times.max()) + spec.before_us
        new = step.left.column(how.left.id) if step.left.num_rows else None
        for given in self._left.slice(step.after.left_version, how.left, how.left.columns, first - 1, last):
            left = given if new is None else given.filter(pc.invert(pc.is_in(given.column(how.left.id), new)))
            left_times = times_of(left, how.left.time)
            codes = keys.of([left.column(name) for name in how.left.keys])
            found = ranges((codes, left_times), (keys.codes, times), before_us=spec.before_us, after_us=spec.after_us)
            if spec.kind is JoinKind.LEFT:
                over = left_times <= step.before.settled_us
                step.counts.late += int(found.count[over].sum())
                found = Ranges(found.order, found.start, np.where(over, 0, found.count))
            yield from self._pairs(step, left, right, found)

    def _settled(self, step: Step) -> Iterator[pa.Table]:
        """Left rows whose time is over with this step, and that have no partner."""
        how = self._how
        after = None if step.before.settled_us == NEVER_US else step.before.settled_us
        version = step.after.left_version
        for left in self._left.slice(version, how.left, how.left.columns, after, step.after.settled_us):
            matched = np.zeros(left.num_rows, np.bool_)
            columns = tuple(dict.fromkeys((how.right.time, *how.right.keys)))
            for _right, found in self._partners(step.after.right_version, left, columns):
                matched |= found.count > 0
            yield from self._alone(step, left, ~matched)

    def _newest(self, step: Step) -> Iterator[pa.Table]:
        """New left rows with the newest right row each."""
        left, how = step.left, self._how
        if not left.num_rows:
            return
        best = _Newest(left.num_rows)
        times = times_of(left, how.left.time)
        keys = Keys([left.column(name) for name in how.left.keys])
        version, before_us = step.after.right_version, self._spec.before_us
        after = None if before_us == ANY_AGE_US else int(times.min()) - before_us - 1
        for right in self._right.slice(version, how.right, how.right.columns, after, int(times.max())):
            codes = keys.of([right.column(name) for name in how.right.keys])
            right_times = times_of(right, how.right.time)
            ids = right.column(how.right.id)
            rank = np.empty(right.num_rows, np.int64)
            rank[pc.sort_indices(ids).to_numpy()] = np.arange(right.num_rows)
            found = ranges((keys.codes, times), (codes, right_times), before_us=before_us, after_us=0, rank=rank)
            best.offer(found.newest(), right, right_times, how.right.id)
        pairs, rows = best.chosen()
        step.counts.matched += len(pairs.left)
        if rows is not None:
            yield from self._maker.pairs(left, rows, pairs)
        yield from self._alone(step, left, best.without())


class _Newest:
    """The best partner of each left row among batches that pass by: the newest, of equal times the one with the greatest event id."""

    def __init__(self, count: int) -> None:
        self._time: I64 = np.full(count, NEVER_US, np.int64)
        self._row: I64 = np.full(count, -1, np.int64)
        self._kept: list[pa.Table] = []
        self._kept_rows = 0

    def offer(self, pairs: Pairs, right: pa.Table, times: I64, id_column: str) -> None:
        """Take what is better than what there is."""
        time, left = times[pairs.right], pairs.left
        wins = (time > self._time[left]) | (self._row[left] < 0)
        tied = np.nonzero(~wins & (time == self._time[left]))[0]
        if len(tied):
            own = pa.concat_tables(self._kept).column(id_column).take(pa.array(self._row[left[tied]]))
            other = right.column(id_column).take(pa.array(pairs.right[tied]))
            wins[tied] = pc.greater(other, own).to_numpy()
        left, rows = left[wins], pairs.right[wins]
        self._time[left] = time[wins]
        self._row[left] = self._kept_rows + np.arange(len(rows))
        self._kept.append(right.take(pa.array(rows)))
        self._kept_rows += len(rows)
        if self._kept_rows > _KEPT_FACTOR * len(self._row):
            self._drop_replaced()

    def _drop_replaced(self) -> None:
        there = np.nonzero(self._row >= 0)[0]
        self._kept = [pa.concat_tables(self._kept).take(pa.array(self._row[there]))]
        self._kept_rows = len(there)
        self._row[there] = np.arange(len(there))

    def chosen(self) -> tuple[Pairs, pa.Table | None]:
        """Pairs of left rows and rows of the table."""
        left = np.nonzero(self._row >= 0)[0]
        return Pairs(left, self._row[left]), pa.concat_tables(self._kept) if self._kept else None

    def without(self) -> Mask:
        """Which left rows have none."""
        return self._row < 0
