"""The newest row at or before each of many instants, while rows pass by once in any order.

What a training set needs of a view without aggregations is at most one row per labelled instant, however many rows the view has. So the
instants are sorted once and every row is dropped into the interval between two instants of its entity that it lies in, where only the newest
row stays; in the end an instant whose interval got no row takes the row of the interval before. Memory is that of the instants and of one
row each, rows are neither sorted nor kept, and the result does not depend on their order.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millrace_feature.rows import known, order_of
from millrace_feature.tiles import Ints

NONE = np.iinfo(np.int64).min
"""Time of an interval without a row."""
KEPT_FACTOR = 2
"""Rows kept, for each interval, before those that newer ones replaced are dropped."""


class NewestRows:
    """Takes rows batch by batch; not safe for use from several threads.

    Args:
        codes: entity of each instant; negative ones have no rows.
        times: the instants in microseconds since the epoch.
    """

    def __init__(self, codes: Ints, times: Ints) -> None:
        self._steps, ranks = np.unique(times, return_inverse=True)
        """Distinct instants; instants are compared by rank, so that entity and instant fit one integer."""
        self._size = len(self._steps) + 1
        keys = np.where(codes < 0, -1, codes * self._size + ranks)
        self._keys, self._place_of = np.unique(keys, return_inverse=True)
        """(entity, rank) of each interval's end, sorted; -1 comes first when an instant has no entity."""
        self._entities = self._keys // self._size
        self._times = np.full(len(self._keys), NONE, np.int64)
        self._rows = np.full(len(self._keys), -1, np.int64)
        """Of each interval its row's number in the kept tables, one after the other."""
        self._kept: list[pa.Table] = []
        self._kept_rows = 0
        # Two steps find a row's interval: the rank of its time, then the interval of (entity, rank). One step does where both fit a word.
        self._first = int(times.min()) if len(times) else 0
        self._span = (int(times.max()) - self._first + 2) if len(times) else 1
        highest = int(codes.max()) + 1 if len(codes) else 0
        self._wide: Ints | None = None
        if highest * self._span < 1 << 62 and len(self._keys):
            at = self._steps[np.maximum(self._keys, 0) % self._size] - self._first
            self._wide = np.where(self._keys < 0, -1, self._entities * self._span + at)

    def add(self, codes: Ints, times: Ints, values: pa.Table) -> None:
        """Take rows: their entities (none negative), times and values, all of one length."""
        if not len(self._keys) or not len(codes):
            return
        places = self._places(codes, times)
        inside = places < len(self._keys)
        inside[inside] = self._entities[places[inside]] == codes[inside]
        inside[inside] = times[inside] >= self._times[places[inside]]
        rows = np.flatnonzero(inside)
        if not len(rows):
            return
        places, times = places[rows], times[rows]
        before = self._times[places]
        np.maximum.at(self._times, places, times)
        newest = times == self._times[places]
        rows, places, tied_with_old = rows[newest], places[newest], before[newest] == times[newest]
        numbers = np.arange(len(rows))
        holder = np.empty(len(self._keys), np.int64)
        holder[places] = numbers
        twice = holder[places] != numbers
        if twice.any() or tied_with_old.any():
            old = np.unique(places[tied_with_old])
            rows, places = self._without_ties(rows, places, np.union1d(places[twice], old), old, values)
        self._keep(values.take(pa.array(rows)), places)

    def _places(self, codes: Ints, times: Ints) -> Ints:
        """The interval each row would lie in: the first instant of its entity that is not before it."""
        if self._wide is not None:
            shifted = times - self._first
            late = shifted >= self._span - 1  # after the last instant of all, in no interval
            found = self._wide.searchsorted(codes * self._span + np.clip(shifted, 0, self._span - 1))
            return np.where(late, len(self._keys), found)
        ranks = self._steps.searchsorted(times)
        return self._keys.searchsorted(codes * self._size + ranks)

    def _without_ties(self, rows: Ints, places: Ints, tied: Ints, old: Ints, values: pa.Table) -> tuple[Ints, Ints]:
        """(rows, intervals) with one row an interval: of equal times the one whose values sort last stays.

        Args:
            rows: of `values`.
            places: their intervals.
            tied: intervals with more than one row.
            old: those of them whose kept row is one of these.
            values: the batch.
        """
        among = np.isin(places, tied)
        tied_rows, tied_places = rows[among], places[among]
        kept = self._joined(values).take(pa.array(self._rows[old]))
        best = _last_of_each(
            np.concatenate([old, tied_places]), pa.concat_tables([kept, values.take(pa.array(tied_rows))])
        )
        won = best[best >= len(old)] - len(old)  # where the kept row won nothing changes
        return np.concatenate([rows[~among], tied_rows[won]]), np.concatenate([places[~among], tied_places[won]])

    def _joined(self, like: pa.Table) -> pa.Table:
        return pa.concat_tables(self._kept) if self._kept else like.slice(0, 0)

    def _keep(self, values: pa.Table, places: Ints) -> None:
        self._rows[places] = np.arange(self._kept_rows, self._kept_rows + len(places))
        self._kept.append(values)
        self._kept_rows += len(places)
        if self._kept_rows > (KEPT_FACTOR + 1) * len(self._keys):
            self._drop_replaced(values)

    def _drop_replaced(self, like: pa.Table) -> None:
        filled = np.flatnonzero(self._rows >= 0)
        self._kept = [self._joined(like).take(pa.array(self._rows[filled]))]
        self._kept_rows = len(filled)
        self._rows[filled] = np.arange(len(filled))

    @property
    def kept_rows(self) -> int:
        """Rows in memory."""
        return self._kept_rows

    def result(self, values: pa.Schema, *, ttl_us: int) -> pa.Table:
        """The newest row at or before each instant, null where there is none or it is older than `ttl_us` (0: any age).

        An expired newest row hides older ones. Call it once, at the end.
        """
        filled = np.where(self._rows >= 0, np.arange(len(self._keys)), -1)
        nearest = np.maximum.accumulate(filled) if len(filled) else filled
        lies_in = np.maximum(nearest, 0)
        found = (nearest >= 0) & (self._entities[lies_in] == self._entities) & (self._keys >= 0)
        if ttl_us and len(filled):
            at = self._steps[np.maximum(self._keys, 0) % self._size]
            found &= at - np.where(found, self._times[lies_in], at) <= ttl_us
        rows = np.where(found, self._rows[lies_in], -1)[self._place_of]
        taken = self._joined(values.empty_table()).take(pa.array(rows, mask=rows < 0))
        self._kept.clear()
        return taken


def _last_of_each(places: Ints, values: pa.Table) -> Ints:
    """Per interval the number of the row whose values sort last; a missing value sorts first."""
    names = [f"c{i}" for i in range(values.num_columns)]
    table = values.rename_columns(names)
    if all(_sorts(kind) for kind in table.schema.types):
        keys = [(name, "ascending", "at_start") for name in ("place", *names)]
        ordered = table.append_column("place", pa.array(places))
        order = np.asarray(pc.sort_indices(ordered, sort_keys=keys).to_numpy())
    else:  # lists
        rows = zip(*(map(known, column.to_pylist()) for column in table.columns), strict=True)
        ranks = [(place, order_of(row)) for place, row in zip(places.tolist(), rows, strict=True)]
        order = np.array(sorted(range(len(ranks)), key=ranks.__getitem__), np.int64)
    sorted_places = places[order]
    return order[np.flatnonzero(np.r_[sorted_places[1:] != sorted_places[:-1], True])]


def _sorts(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_null(kind))
