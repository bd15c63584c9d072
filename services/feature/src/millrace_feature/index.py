"""The online values in memory: what a read touches. Kept in step with the durable store by `embedded.py`.

Each entity's tiles are a few sorted arrays. A read finds the window bounds by binary search and merges each range with one vector
operation a statistic, so a 7-day window of five-minute tiles costs microseconds without a second, coarser level of tiles. The finished
windows of an entity are kept until its tiles or the hop change.
"""

import bisect
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from millrace_feature.plan import WindowView
from millrace_feature.rows import Row, Scalar, order_of
from millrace_feature.tiles import Floats, Ints, Stats, Tiles, joined_stats, merge_ranges, neutral_stats

NAN = float("nan")
START_TILES = 8
CHUNK = 256
"""Tiles or rows changed while readers wait."""


class WindowReader:
    """A view's windows as positions in merged arrays; made once per definitions."""

    def __init__(self, view: WindowView) -> None:
        columns, windows = view.columns, view.windows_us
        self.name = view.name
        self.hop_us = view.hop_us
        self.bounds = np.array([*(-(w // view.hop_us) for w in windows), 0], np.int64)
        """Start of each window, then the end of all, in hops from the asked one."""
        self._wanted = [(a.function, columns.index(a.column), windows.index(a.window_us)) for a in view.aggregates]
        self.functions = frozenset(a.function for a in view.aggregates)
        self.empty = [0.0 if a.function == "count" else NAN for a in view.aggregates]
        self.missing = [NAN] * len(view.aggregates)

    def finish(self, merged: Stats) -> list[float]:
        """The features in order, from statistics per window."""
        count, total, low, high = (array.tolist() for array in merged)
        out: list[float] = []
        for function, c, w in self._wanted:
            n = count[c][w]
            if function == "count":
                out.append(n)
            elif n == 0.0:
                out.append(NAN)
            elif function == "mean":
                out.append(total[c][w] / n)
            elif function == "sum":
                out.append(total[c][w])
            else:
                out.append(low[c][w] if function == "min" else high[c][w])
        return out


class TileSeries:
    """One entity's tiles in hop order, with at least one neutral tile after the last."""

    __slots__ = ("_cached", "hops", "size", "stats")

    def __init__(self, columns: int, capacity: int = START_TILES) -> None:
        self.size = 0
        self.hops: Ints = np.zeros(capacity, np.int64)
        self.stats = neutral_stats(columns, capacity)
        self._cached: dict[str, tuple[int, list[float]]] = {}

    @classmethod
    def of(cls, hops: Ints, stats: Stats) -> "TileSeries":
        """A series of sorted tiles."""
        size = len(hops)
        series = cls(len(stats.counts), max(START_TILES, size + 1))
        series.size = size
        series.hops[:size] = hops
        for target, content in zip(series.stats, stats, strict=True):
            target[:, :size] = content
        return series

    def add(self, hop: int, counts: Floats, sums: Floats, lows: Floats, highs: Floats) -> None:
        """Merge one tile in; each array is [columns]."""
        self._cached.clear()
        size, mine = self.size, self.stats
        at = size
        if size and hop <= self.hops[size - 1]:
            at = int(self.hops[:size].searchsorted(hop))
            if self.hops[at] == hop:
                mine.counts[:, at] += counts
                mine.sums[:, at] += sums
                np.minimum(mine.lows[:, at], lows, out=mine.lows[:, at])
                np.maximum(mine.highs[:, at], highs, out=mine.highs[:, at])
                return
        if size + 1 >= len(self.hops):
            room = len(self.hops)
            self.hops = np.concatenate([self.hops, np.zeros(room, np.int64)])
            self.stats = mine = joined_stats(mine, neutral_stats(len(mine.counts), room))
        if at < size:
            for array in (self.hops, *mine):
                array[..., at + 1 : size + 1] = array[..., at:size].copy()
        self.hops[at] = hop
        for target, content in zip(mine, (counts, sums, lows, highs), strict=True):
            target[:, at] = content
        self.size = size + 1

    def prune(self, before_hop: int) -> "TileSeries | None":
        """The series without tiles before `before_hop`; None when nothing is left."""
        size = self.size
        first = int(self.hops[:size].searchsorted(before_hop))
        if first == 0:
            return self
        return TileSeries.of(self.hops[first:size], self.stats.part(first, size)) if first < size else None

    def read(self, reader: WindowReader, end_hop: int) -> list[float]:
        """The view's features over windows that end before `end_hop`. The list is shared: do not change it."""
        cached = self._cached.get(reader.name)
        if cached is not None and cached[0] == end_hop:
            return cached[1]
        bounds = self.hops[: self.size].searchsorted(reader.bounds + end_hop)
        starts = bounds[:-1]
        ends = np.full(len(starts), bounds[-1], np.int64)
        values = reader.finish(merge_ranges(self.stats.part(0, self.size + 1), starts, ends, reader.functions))
        self._cached[reader.name] = (end_hop, values)
        return values


class TileIndex:
    """The tiles of one group by entity."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._series: dict[str, TileSeries] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._series)

    def load(self, tiles: Tiles) -> None:
        """Replace everything by `tiles` (sorted by code and hop)."""
        edges = (
            np.flatnonzero(np.r_[True, tiles.codes[1:] != tiles.codes[:-1], True]) if len(tiles) else np.zeros(1, int)
        )
        series: dict[str, TileSeries] = {}
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            key = tiles.keys[int(tiles.codes[start])]
            series[key] = TileSeries.of(tiles.hops[start:end], tiles.stats.part(start, end))
        with self._lock:
            self._series = series

    def add(self, tiles: Tiles) -> None:
        """Merge `tiles` in."""
        codes, hops = tiles.codes.tolist(), tiles.hops.tolist()
        for start in range(0, len(codes), CHUNK):
            with self._lock:
                for i in range(start, min(start + CHUNK, len(codes))):
                    key = tiles.keys[codes[i]]
                    series = self._series.get(key)
                    if series is None:
                        series = self._series[key] = TileSeries(self._columns)
                    counts, sums, lows, highs = tiles.stats
                    series.add(hops[i], counts[:, i], sums[:, i], lows[:, i], highs[:, i])

    def prune(self, before_hop: int) -> None:
        """Drop tiles before `before_hop`."""
        with self._lock:
            kept = {key: series.prune(before_hop) for key, series in self._series.items()}
            self._series = {key: series for key, series in kept.items() if series is not None}

    def read(self, reader: WindowReader, keys: Iterable[str | None], end_hop: int) -> list[list[float]]:
        """Features per key; a null key has none, an unknown one has empty windows."""
        out = []
        with self._lock:
            for key in keys:
                if key is None:
                    out.append(reader.missing)
                    continue
                series = self._series.get(key)
                out.append(reader.empty if series is None else series.read(reader, end_hop))
        return out


class RowSeries:
    """One entity's rows in event-time order."""

    __slots__ = ("times", "values")

    def __init__(self) -> None:
        self.times: list[int] = []
        self.values: list[tuple[Scalar, ...]] = []

    def beats(self, row: Row) -> bool:
        """Whether no row with the same time wins against `row`."""
        at = bisect.bisect_left(self.times, row.time_us)
        if at == len(self.times) or self.times[at] != row.time_us:
            return True
        return order_of(row.values) > order_of(self.values[at])

    def add(self, row: Row) -> None:
        """Keep `row` in place of one with the same time."""
        at = bisect.bisect_left(self.times, row.time_us)
        if at < len(self.times) and self.times[at] == row.time_us:
            self.values[at] = row.values
            return
        self.times.insert(at, row.time_us)
        self.values.insert(at, row.values)

    def at(self, time_us: int) -> tuple[int, tuple[Scalar, ...]] | None:
        """(time, values) of the newest row at or before `time_us`."""
        place = bisect.bisect_right(self.times, time_us)
        return (self.times[place - 1], self.values[place - 1]) if place else None

    def prune(self, before_us: int, *, keep_newest: bool) -> None:
        """Drop rows before `before_us`, but for the newest of them when `keep_newest`."""
        first = bisect.bisect_left(self.times, before_us)
        if keep_newest and first:
            first -= 1
        del self.times[:first], self.values[:first]


class RowIndex:
    """The rows of one group by entity."""

    def __init__(self) -> None:
        self._series: dict[str, RowSeries] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._series)

    def winners(self, rows: Iterable[Row]) -> list[Row]:
        """Those of `rows` (at most one per key and time) that no kept row with the same time beats."""
        return [row for row in rows if (series := self._series.get(row.key)) is None or series.beats(row)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep `rows`, which must be winners."""
        for start in range(0, len(rows), CHUNK):
            with self._lock:
                for row in rows[start : start + CHUNK]:
                    series = self._series.get(row.key)
                    if series is None:
                        series = self._series[row.key] = RowSeries()
                    series.add(row)

    def prune(self, before_us: int, *, keep_newest: bool) -> None:
        """Drop rows before `before_us`."""
        with self._lock:
            for series in self._series.values():
                series.prune(before_us, keep_newest=keep_newest)
            self._series = {key: series for key, series in self._series.items() if series.times}

    def read(self, keys: Iterable[str | None], time_us: int) -> list[tuple[int, tuple[Scalar, ...]] | None]:
        """The newest row per key at `time_us`; None where there is none."""
        with self._lock:
            found = [self._series.get(key) if key is not None else None for key in keys]
            return [series.at(time_us) if series is not None else None for series in found]
