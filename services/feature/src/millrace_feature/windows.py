"""Windows: merged from tiles at read, by one piece of code for online reads and training sets.

A window's middle comes from the coarsest tiles that fit, its ends from finer ones, and with a fresh head the events after the last complete
slide from the finest. Many windows of many entities are merged at once, so the price of a call is shared by all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from millrace_feature.cells import Cells
from millrace_feature.functions import ZERO_WHEN_EMPTY, Schema, columns_with, part_of, quantile_of
from millrace_feature.plan import WindowView
from millrace_feature.sketches import bucket_values, distinct_counts
from millrace_feature.tile_fields import Layout, Level, StoredLevel, layout_of
from millrace_feature.tiles import Floats, Ints, Stats, Tiles, combined, earliest, latest, neutral_stats

NAN = float("nan")
MERGE_POINTS = 65_536
"""Windows merged in one step; bounds the memory of a merge."""
MERGE_TILES = 4_000_000
"""Tiles looked at one by one in one step, where a function needs that."""


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What a read has to fetch per entity."""

    names: tuple[str, ...]
    levels: tuple[tuple[Level, tuple[int, ...], slice, slice], ...]
    """(level, numbers of its runs, places of its tiles in `names`, places of its sketches)."""


class WindowReader:
    """A view's windows; made once per definitions.

    Instants are in units of the view's step (`step_us`): windows end before the step an instant lies in.
    """

    def __init__(self, view: WindowView) -> None:
        self.name = view.name
        self.hop_us = view.step_us
        """Unit in which the ends of windows are given."""
        self.layout: Layout = layout_of(view)
        self.schema: Schema = view.schema
        self.empty = [0.0 if a.function in ZERO_WHEN_EMPTY else NAN for a in view.aggregates]
        self.missing = [NAN] * len(view.aggregates)
        self.is_fresh = view.head_us > 0
        """Whether events behind the last complete slide count."""
        self._hop = view.hop_us // view.step_us
        self._windows = [(width // view.step_us, slide // view.step_us) for width, slide in view.windows_us]
        windows, columns = view.windows_us, view.columns
        self._wanted: list[tuple[str, int, int]] = []
        """(function, row among the columns it is computed for, window) per feature."""
        for a in view.aggregates:
            column, part = columns.index(a.column), part_of(a.function)
            row = column if part is None else columns_with(self.schema, part).index(column)
            self._wanted.append((a.function, row, windows.index((a.window_us, a.slide_us or view.hop_us))))
        self._functions = frozenset(a.function for a in view.aggregates)
        self._fetched: tuple[int, FieldNames] | None = None

    def complete_us(self, end: int) -> int:
        """Up to which instant every window that ends before step `end` knows its events."""
        edges = [end if self.is_fresh else end // slide * slide for _width, slide in self._windows]
        return min(edges) * self.hop_us

    def fields(self, end: int) -> FieldNames:
        """The fields that windows which end before step `end` need."""
        if self._fetched is not None and self._fetched[0] == end:
            return self._fetched[1]
        runs: dict[str, set[int]] = {}
        for width, slide in self._windows:
            start = end // slide * slide - width
            bounds = (np.array([start]), np.array([end // slide * slide]), np.array([end]))
            for level, first, last in self._split(*bounds, self.layout.levels):
                a, b = int(first[0]), int(last[0])
                if a < b:
                    runs.setdefault(level.letter, set()).update(range(a // level.run, (b - 1) // level.run + 1))
        names: list[str] = []
        levels = []
        for level in self.layout.levels:
            numbers = tuple(sorted(runs.get(level.letter, ())))
            tiles = slice(len(names), len(names) + len(numbers))
            names += [f"{level.letter}{number}" for number in numbers]
            cells = slice(len(names), len(names) + (len(numbers) if self.schema.sketches else 0))
            names += [f"{level.letter.upper()}{number}" for number in numbers] if self.schema.sketches else []
            if numbers:
                levels.append((level, numbers, tiles, cells))
        found = FieldNames(tuple(names), tuple(levels))
        self._fetched = (end, found)
        return found

    def read(self, replies: Sequence[Sequence[bytes | None]], end: int) -> list[list[float]]:
        """Features per entity.

        Args:
            replies: per entity the contents of `fields(end)`.
            end: step that windows end before.
        """
        levels = [
            StoredLevel.of_fields(
                self.schema, level, numbers, [reply[tiles] for reply in replies], [reply[cells] for reply in replies]
            )
            for level, numbers, tiles, cells in self.fields(end).levels
        ]
        size = len(replies)
        found = self.features(levels, self.layout.levels, np.arange(size), np.full(size, end, np.int64))
        rows: list[list[float]] = found.T.tolist()
        return rows

    def features(self, stored: Sequence[StoredLevel], levels: Sequence[Level], codes: Ints, ends: Ints) -> Floats:
        """Features by point: [features, points].

        Args:
            stored: tiles.
            levels: what the windows are made of: all of the layout's, or the finest alone.
            codes: entity of each point, as in `levels`.
            ends: step that the point's windows end before.
        """
        size = len(codes)
        edges = [ends // slide * slide for _width, slide in self._windows]
        lasts = np.concatenate(edges)
        starts = np.concatenate([edge - width for edge, (width, _s) in zip(edges, self._windows, strict=True)])
        stops = np.tile(ends, len(edges)) if self.is_fresh else lasts
        split = self._split(starts, lasts, stops, levels)
        merged = self._merged(stored, np.tile(codes, len(edges)), split)
        finished = {function: merged.finish(function) for function in self._functions}
        out = np.empty((len(self._wanted), size))
        for row, (function, column, window) in zip(out, self._wanted, strict=True):
            row[:] = finished[function][column, window * size : (window + 1) * size]
        return out

    def _split(self, starts: Ints, lasts: Ints, ends: Ints, levels: Sequence[Level]) -> list[tuple[Level, Ints, Ints]]:
        """What of each level windows are made of, in order of time: (level, first tile, tile after the last one).

        Windows are [starts, lasts) on the edges of hops and, with a fresh head, [lasts, ends) behind.
        """
        by_letter = {level.letter: level for level in levels}
        if len(levels) == 1 and levels[0].letter == "f":
            return [(levels[0], starts, ends)]
        hop, hops, out = self._hop, by_letter.get("h"), []
        first, last = starts // hop, lasts // hop
        # Behind the last slide lie complete hops too, where a window slides by more than one.
        whole = ends // hop if self.is_fresh else last
        if hops is not None and (coarse := by_letter.get("c")) is not None:
            size = coarse.unit_us // hops.unit_us
            a, b = -(-first // size), whole // size
            fits = a < b
            out.append((hops, first, np.where(fits, a * size, whole)))
            out.append((coarse, np.where(fits, a, 0), np.where(fits, b, 0)))
            out.append((hops, np.where(fits, b * size, whole), whole))
        elif hops is not None:
            out.append((hops, first, whole))
        if (head := by_letter.get("f")) is not None and self.is_fresh:
            out.append((head, whole * hop, ends))
        return out

    def _merged(
        self, stored: Sequence[StoredLevel], codes: Ints, split: Sequence[tuple[Level, Ints, Ints]]
    ) -> "MergedWindows":
        by_letter = {found.level.letter: found for found in stored}
        total: Stats | None = None
        cells: list[Cells] = []
        for level, first, last in split:
            found = by_letter.get(level.letter)
            if found is None or not len(found.codes):
                continue
            tiles_from, tiles_to = _ranges(found, codes, first, last)
            part = merge_ranges(self.schema, found.stats, tiles_from, tiles_to, self._functions)
            total = part if total is None else combined(self.schema, total, part)
            if self.schema.sketches:
                cells.append(_cells_of(found.cells, tiles_from, tiles_to, self.schema))
        total = total if total is not None else neutral_stats(self.schema, len(codes))
        merged = Cells.joined(cells).reduced(self.schema) if len(cells) > 1 else (cells or [Cells.none()])[0]
        return MergedWindows(self.schema, total, merged)


@dataclass(frozen=True, slots=True)
class MergedWindows:
    """Partial aggregates per window."""

    schema: Schema
    stats: Stats
    cells: Cells

    def finish(self, function: str) -> Floats:
        """One function of every column that has what it needs: [columns, windows]."""
        stats, part = self.stats, part_of(function)
        of = list(range(len(self.schema.columns))) if part is None else columns_with(self.schema, part)
        counts = stats.counts[of]
        found: Floats
        with np.errstate(invalid="ignore", divide="ignore"):
            match function:
                case "count":
                    return stats.counts
                case "sum":
                    found = stats.sums
                case "mean":
                    found = stats.sums / counts
                case "min":
                    found = stats.lows
                case "max":
                    found = stats.highs
                case "first":
                    found = stats.firsts
                case "last":
                    found = stats.lasts
                case "var_pop" | "std_pop":
                    found = stats.spreads / counts
                case "var" | "std":
                    found = np.where(counts > 1, stats.spreads / (counts - 1), NAN)
                case "distinct":
                    return np.stack([self._distinct(column) for column in of])
                case _:
                    quantile = quantile_of(function)
                    found = np.stack([self._percentile(quantile, column) for column in of])
            if function.startswith("std"):
                found = np.sqrt(found)
        return np.where(counts > 0, found, NAN)

    def _distinct(self, column: int) -> Floats:
        points, _registers, ranks = self.cells.of_sketch(self.schema.sketches.index((column, "distinct")))
        return distinct_counts(points, ranks, self.stats.counts.shape[1])

    def _percentile(self, quantile: float, column: int) -> Floats:
        """The bucket that holds the value of rank floor(q (n - 1)); never outside the values seen."""
        points, cells, weights = self.cells.of_sketch(self.schema.sketches.index((column, "percentile")))
        size = self.stats.counts.shape[1]
        if not len(points):
            return np.full(size, NAN)
        sums = np.cumsum(weights)
        starts = points.searchsorted(np.arange(size))
        before = np.where(starts > 0, sums[starts - 1], 0)
        totals = np.r_[before[1:], sums[-1]] - before
        ranks = np.floor(quantile * np.maximum(totals - 1, 0)).astype(np.int64)
        places = np.minimum(sums.searchsorted(before + ranks, side="right"), len(cells) - 1)
        lows, highs = self.stats.lows[column], self.stats.highs[column]
        return np.clip(bucket_values(cells[places]), lows, np.maximum(lows, highs))


def _ranges(stored: StoredLevel, codes: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Numbers of the tiles of each point from hop `first` to before hop `last`."""
    low, span = int(stored.hops.min()), int(stored.hops.max() - stored.hops.min()) + 1
    places = stored.codes * (span + 1) + (stored.hops - low)
    base = codes * (span + 1)
    starts = places.searchsorted(base + np.clip(first - low, 0, span))
    return starts, np.maximum(starts, places.searchsorted(base + np.clip(last - low, 0, span)))


def _pairs(starts: Ints, ends: Ints) -> Ints:
    pairs = np.empty(2 * len(starts), np.int64)
    pairs[::2], pairs[1::2] = starts, ends
    return pairs


def merge_ranges(schema: Schema, stats: Stats, starts: Ints, ends: Ints, functions: frozenset[str]) -> Stats:
    """Merge the tiles [start, end) of each range. A neutral tile must stand after the last that is named.

    Sums, lows and highs are merged only where one of `functions` needs them; else they come back neutral.
    """
    size, pairs = len(starts), _pairs(starts, ends)
    out = neutral_stats(schema, size)
    used = starts < ends
    everything = bool(schema.spread or schema.sketches)
    # reduceat gives the tile at `start` for an empty range, so that stays neutral
    np.copyto(out.counts, np.add.reduceat(stats.counts, pairs, axis=1)[:, ::2], where=used)
    if everything or functions & {"sum", "mean"}:
        np.copyto(out.sums, np.add.reduceat(stats.sums, pairs, axis=1)[:, ::2], where=used)
    if everything or "min" in functions:
        np.copyto(out.lows, np.minimum.reduceat(stats.lows, pairs, axis=1)[:, ::2], where=used)
    if everything or "max" in functions:
        np.copyto(out.highs, np.maximum.reduceat(stats.highs, pairs, axis=1)[:, ::2], where=used)
    if not schema.is_plain and used.any():
        _merge_more(schema, stats, starts, ends, out)
    return out


def _merge_more(schema: Schema, stats: Stats, starts: Ints, ends: Ints, out: Stats) -> None:
    """What `merge_ranges` cannot merge over ranges that overlap without looking at each of their tiles."""
    for part in _steps(starts, ends):
        lengths = ends[part] - starts[part]
        chosen = np.flatnonzero(lengths > 0) + part.start
        lengths = lengths[lengths > 0]
        if not len(chosen):
            continue
        offsets = np.cumsum(lengths) - lengths
        tiles = np.repeat(starts[chosen] - offsets, lengths) + np.arange(int(lengths.sum()))
        if schema.spread:
            of = list(schema.spread)
            counts, sums = stats.counts[of], stats.sums[of]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                means = np.where(counts > 0, sums / counts, 0.0)[:, tiles]
                total = np.where(out.counts[of] > 0, out.sums[of] / out.counts[of], 0.0)[:, chosen]
                apart = means - np.repeat(total, lengths, axis=1)
                counted = counts[:, tiles]
                between = np.where(counted > 0, apart * apart * counted, 0.0) + stats.spreads[:, tiles]
            out.spreads[:, chosen] = np.add.reduceat(between, offsets, axis=1)
        if schema.first:
            found = earliest(stats.first_at[:, tiles], stats.firsts[:, tiles], offsets, lengths)
            out.first_at[:, chosen], out.firsts[:, chosen] = found
        if schema.last:
            found = latest(stats.last_at[:, tiles], stats.lasts[:, tiles], offsets, lengths)
            out.last_at[:, chosen], out.lasts[:, chosen] = found


def _steps(starts: Ints, ends: Ints) -> list[slice]:
    """Ranges in steps of at most `MERGE_TILES` tiles (or one range)."""
    sums = np.cumsum(np.maximum(ends - starts, 0))
    out, at = [], 0
    while at < len(sums):
        before = int(sums[at - 1]) if at else 0
        until = max(at + 1, int(sums.searchsorted(before + MERGE_TILES, side="right")))
        out.append(slice(at, until))
        at = until
    return out


def _cells_of(cells: Cells, starts: Ints, ends: Ints, schema: Schema) -> Cells:
    """The cells of each range of tiles, merged; their places are the numbers of the ranges."""
    first, last = cells.places.searchsorted(starts), cells.places.searchsorted(ends)
    last = np.maximum(first, last)
    found = []
    for part in _steps(first, last):
        lengths = (last - first)[part]
        offsets = np.cumsum(lengths) - lengths
        chosen = np.repeat(first[part] - offsets, lengths) + np.arange(int(lengths.sum()))
        points = np.repeat(np.arange(part.start, part.start + len(lengths)), lengths)
        found.append(Cells(points, cells.ids[chosen], cells.weights[chosen]).reduced(schema))
    return Cells.joined(found)


def window_features(view: WindowView, tiles: Tiles, codes: Ints, at_us: Ints) -> Mapping[str, Floats]:
    """The view's features per point, merged from `tiles` by the code online reads use.

    Args:
        view: the windows.
        tiles: all the view's tiles, of its finest unit, as `Query.tiles` gives them.
        codes: entity per point; -1 unknown, -2 null.
        at_us: instant per point.
    """
    reader = WindowReader(view)
    stored = [StoredLevel.of_tiles(reader.layout.levels[0], tiles)]
    ends = at_us // view.step_us
    if not len(codes):
        return {name: np.zeros(0) for name in view.features}
    first = int(ends.min())
    span = int(ends.max()) - first + 1
    points, inverse = np.unique(np.where(codes < 0, codes, codes * span + (ends - first)), return_inverse=True)
    known = points >= 0
    width = max(1, MERGE_POINTS // len(view.windows_us))
    out = np.repeat(np.array([reader.empty]).T, len(points), axis=1)
    places = np.flatnonzero(known)
    for at in range(0, len(places), width):
        part = places[at : at + width]
        found = reader.features(stored, reader.layout.levels[:1], points[part] // span, points[part] % span + first)
        out[:, part] = found
    out[:, points == -2] = NAN
    return {name: row[inverse] for name, row in zip(view.features, out, strict=True)}
