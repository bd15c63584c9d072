"""Partners by key and time, in numpy: rows of the right side sorted by key and time, and a range of them for each row of the left.

Only pairs within the bounds are ever made, however many records share a key, and never more at once than asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

I64 = npt.NDArray[np.int64]
_NO_KEY = -1


@dataclass(frozen=True)
class Pairs:
    """Rows that belong together: places in the left and in the right table."""

    left: I64
    right: I64


class Keys:
    """Key values of one table, as numbers that other tables' rows are looked up in.

    Args:
        columns: the key columns of the table.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray]) -> None:
        self._values: list[pa.Array] = []
        self._combined: list[I64] = []
        codes: I64 | None = None
        for column in columns:
            values = pc.unique(column).drop_null()
            self._values.append(values)
            own = _index(column, values)
            if codes is None:
                codes = own
                continue
            wide = _widen(codes, own, len(values))
            known = np.unique(wide[wide != _NO_KEY])
            self._combined.append(known)
            codes = _places(wide, known)
        assert codes is not None
        self.codes: I64 = codes
        """The number of each row; -1 with a null in its key."""

    def of(self, columns: Sequence[pa.ChunkedArray]) -> I64:
        """The numbers of another table's rows; -1 where this table has no such key."""
        codes = _index(columns[0], self._values[0])
        for column, values, known in zip(columns[1:], self._values[1:], self._combined, strict=True):
            codes = _places(_widen(codes, _index(column, values), len(values)), known)
        return codes


def _index(column: pa.ChunkedArray, values: pa.Array) -> I64:
    found = pc.fill_null(pc.index_in(column, value_set=values, skip_nulls=True), _NO_KEY)
    return found.to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def _widen(codes: I64, more: I64, count: int) -> I64:
    """Two numbers of a row as one; both are below the number of rows of a table, so that it fits."""
    return np.where((codes == _NO_KEY) | (more == _NO_KEY), _NO_KEY, codes * max(1, count) + more)


def _places(values: I64, known: I64) -> I64:
    if not len(known):
        return np.full(len(values), _NO_KEY, np.int64)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where((values != _NO_KEY) & (known[places] == values), places, _NO_KEY).astype(np.int64)


@dataclass(frozen=True)
class Ranges:
    """For each left row the range of its partners in `order`, the right rows by key, time and (where it was given) rank."""

    order: I64
    start: I64
    count: I64

    def pairs(self, limit: int) -> Iterator[Pairs]:
        """Every pair, at most `limit` at once, by left row and then by the partner's time."""
        ends = np.cumsum(self.count)
        total = int(ends[-1]) if len(ends) else 0
        for first in range(0, total, limit):
            numbers = np.arange(first, min(total, first + limit))
            left = np.searchsorted(ends, numbers, side="right")
            place = self.start[left] + numbers - (ends[left] - self.count[left])
            yield Pairs(left, self.order[place])

    def newest(self) -> Pairs:
        """For each left row that has partners the last of them."""
        left = np.nonzero(self.count)[0]
        return Pairs(left, self.order[self.start[left] + self.count[left] - 1])


def ranges(
    left: tuple[I64, I64], right: tuple[I64, I64], *, before_us: int, after_us: int, rank: I64 | None = None
) -> Ranges:
    """The partners of every left row.

    Args:
        left: key numbers and event times in microseconds.
        right: the same of the right rows.
        before_us: how far a partner may lie before.
        after_us: how far behind.
        rank: order of right rows of the same key and time.
    """
    right_code, right_time = right
    used = np.nonzero(right_code != _NO_KEY)[0]
    code, time = right_code[used], right_time[used]
    order = np.lexsort((time, code) if rank is None else (rank[used], time, code))
    times = np.unique(time)
    # Key and time as one number: times are counted, so that it fits.
    width = len(times) + 1
    placed = (code * width + np.searchsorted(times, time))[order]
    left_code, left_time = left
    low = left_code * width + np.searchsorted(times, left_time - before_us, side="left")
    high = left_code * width + np.searchsorted(times, left_time + after_us, side="right")
    start = np.searchsorted(placed, low, side="left")
    count = np.searchsorted(placed, high, side="left") - start
    return Ranges(used[order], start, np.where(left_code == _NO_KEY, 0, count))
