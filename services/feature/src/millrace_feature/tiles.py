"""Tiles: partial aggregates per entity and hop, and how they are made of rows and put together.

A tile holds count, sum, smallest and largest of one column's non-null values, and where a function needs it the sum of squared deviations
(Chan's), the first and last value with its time, and sketches (`sketches.py`). Windows are merged from whole tiles, never by
subtraction, so a minimum or maximum is right and a large value that left the window leaves no rounding behind. Counts, extremes, first and
last values and sketches are the same bits in whatever order tiles were made and merged; sums of integers are so up to 2^53; sums of
fractions and squared deviations agree to within rounding, since addition in another order rounds otherwise.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_feature.cells import Cells
from millrace_feature.functions import Schema
from millrace_feature.sketches import bucket_cells, distinct_cells, hashes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEPARATOR = "\x1f"
_MEANT = {"\\\\": "\\", "\\s": SEPARATOR}
_ESCAPED = re.compile(r"\\[\\s]")
MICROSECONDS = pa.timestamp("us", tz="UTC")


def encode_key(values: Sequence[str | int]) -> str:
    """One text per entity: the join keys' values joined by U+001F, which is escaped inside a value."""
    if len(values) == 1:
        return str(values[0])
    return SEPARATOR.join(str(v).replace("\\", "\\\\").replace(SEPARATOR, "\\s") for v in values)


def decode_key(key: str, count: int) -> list[str]:
    """The texts of the `count` values that `encode_key` joined."""
    if count == 1:
        return [key]
    return [_ESCAPED.sub(lambda found: _MEANT[found.group()], value) for value in key.split(SEPARATOR)]


def event_times(table: pa.Table, column: str) -> Ints:
    """Microseconds since the epoch; the column must hold no null."""
    times = table.column(column).cast(MICROSECONDS, safe=False).cast(pa.int64())
    return np.asarray(times.to_numpy(), dtype=np.int64)


def numbers(column: pa.ChunkedArray) -> Floats:
    """The column as float64, null as NaN; for a column that is no number, 0 where a value is and NaN where none is."""
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        filled = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan"))
    else:
        filled = pc.if_else(column.is_null(), pa.scalar(float("nan")), pa.scalar(0.0))
    return np.asarray(filled.to_numpy(), dtype=np.float64)


def group_keys(columns: Sequence[pa.ChunkedArray]) -> tuple[Ints, list[str]]:
    """(code per row, encoded key per code); the columns must hold no null."""
    codes: Ints | None = None
    values: list[Sequence[object]] = []
    for column in columns:
        encoded = column.combine_chunks().dictionary_encode()
        found = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int64)
        words = encoded.dictionary.to_pylist()
        codes = found if codes is None else codes * max(1, len(words)) + found
        values.append(words)
    if codes is None:
        raise ValueError("a view needs a join key")
    if len(columns) == 1:  # the dictionary is the list of keys
        return codes, [encode_key([str(word)]) for word in values[0]]
    distinct, dense = np.unique(codes, return_inverse=True)
    parts: list[list[object]] = []
    rest = distinct
    for words in reversed(values):
        size = max(1, len(words))
        parts.append([words[i] for i in (rest % size).tolist()])
        rest = rest // size
    keys = [encode_key([str(p) for p in row]) for row in zip(*reversed(parts), strict=True)]
    return dense.astype(np.int64), keys


class Stats(NamedTuple):
    """Partial aggregates; each array is [columns that have it, tiles] (or windows, or points)."""

    counts: Floats
    sums: Floats
    lows: Floats
    """Smallest value; +inf where there is none."""
    highs: Floats
    """Largest value; -inf where there is none."""
    spreads: Floats
    """Sum of squared deviations from the mean."""
    first_at: Floats
    """Microseconds since the epoch, exact until 2255; +inf where there is no value."""
    firsts: Floats
    """Of equal times the smallest value."""
    last_at: Floats
    """-inf where there is no value."""
    lasts: Floats
    """Of equal times the largest value."""

    def part(self, chosen: "slice | Ints | npt.NDArray[np.bool_]") -> "Stats":
        """Some of the tiles."""
        return Stats(*(array[:, chosen] for array in self))


NEUTRAL = (0.0, 0.0, np.inf, -np.inf, 0.0, np.inf, 0.0, -np.inf, 0.0)
"""What an empty tile holds, in the order of `Stats`."""


def heights(schema: Schema) -> tuple[int, ...]:
    """Rows of each array of `Stats`."""
    wide, first, last = len(schema.columns), len(schema.first), len(schema.last)
    return (wide, wide, wide, wide, len(schema.spread), first, first, last, last)


def neutral_stats(schema: Schema, size: int) -> Stats:
    """`size` empty tiles."""
    return Stats(*(np.full((high, size), value) for high, value in zip(heights(schema), NEUTRAL, strict=True)))


def joined_stats(*parts: Stats) -> Stats:
    """The tiles of all, in order."""
    return Stats(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def combined(schema: Schema, a: Stats, b: Stats) -> Stats:
    """Tile by tile, both together."""
    spreads, firsts_at, firsts, lasts_at, lasts = a.spreads, a.first_at, a.firsts, a.last_at, a.lasts
    if schema.spread:
        of = list(schema.spread)
        n, m = a.counts[of], b.counts[of]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            apart = np.where((n > 0) & (m > 0), b.sums[of] / m - a.sums[of] / n, 0.0)
            between = np.where(apart == 0.0, 0.0, apart * apart * (n * m / (n + m)))
        spreads = a.spreads + b.spreads + between
    if schema.first:
        take = (b.first_at < a.first_at) | ((b.first_at == a.first_at) & (b.firsts < a.firsts))
        firsts_at, firsts = np.where(take, b.first_at, a.first_at), np.where(take, b.firsts, a.firsts)
    if schema.last:
        take = (b.last_at > a.last_at) | ((b.last_at == a.last_at) & (b.lasts > a.lasts))
        lasts_at, lasts = np.where(take, b.last_at, a.last_at), np.where(take, b.lasts, a.lasts)
    lows, highs = np.minimum(a.lows, b.lows), np.maximum(a.highs, b.highs)
    return Stats(a.counts + b.counts, a.sums + b.sums, lows, highs, spreads, firsts_at, firsts, lasts_at, lasts)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one group, sorted by (code, hop)."""

    schema: Schema
    unit_us: int
    """Width of a tile."""
    keys: list[str]
    """Encoded key per code."""
    codes: Ints
    hops: Ints
    """Start of the tile in `unit_us` since the epoch."""
    stats: Stats
    cells: Cells
    """Sketches; places are numbers of tiles."""

    def __len__(self) -> int:
        return len(self.hops)

    def part(self, start: int, end: int) -> "Tiles":
        """The tiles [start, end)."""
        chosen = slice(start, end)
        cells = self.cells.between(start, end).moved(-start)
        return Tiles(
            self.schema, self.unit_us, self.keys, self.codes[chosen], self.hops[chosen], self.stats.part(chosen), cells
        )

    def coarser(self, unit_us: int) -> "Tiles":
        """The same in tiles of `unit_us`, which must be a multiple."""
        if unit_us == self.unit_us or not len(self):
            return Tiles(self.schema, unit_us, self.keys, self.codes, self.hops, self.stats, self.cells)
        hops = self.hops // (unit_us // self.unit_us)
        starts = _starts(self.codes, hops)
        stats = _reduced(self.schema, self.stats, starts)
        places = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(hops)]))
        cells = self.cells.at(places[self.cells.places], self.schema)
        return Tiles(self.schema, unit_us, self.keys, self.codes[starts], hops[starts], stats, cells)


def no_tiles(schema: Schema, unit_us: int) -> Tiles:
    """None."""
    none = np.zeros(0, np.int64)
    return Tiles(schema, unit_us, [], none, none, neutral_stats(schema, 0), Cells.none())


def merged_tiles(first: Tiles, second: Tiles) -> Tiles:
    """Both together; tiles of one entity and hop become one. When both have the same list of keys their codes mean the same."""
    keys, others = first.keys, second.codes
    if first.keys is not second.keys:
        place = {key: code for code, key in enumerate(first.keys)}
        for key in second.keys:
            place.setdefault(key, len(place))
        keys, others = list(place), np.array([place[key] for key in second.keys], np.int64)[second.codes]
    codes = np.concatenate([first.codes, others])
    hops = np.concatenate([first.hops, second.hops])
    order = np.lexsort((hops, codes))
    starts = _starts(codes[order], hops[order])
    stats = joined_stats(first.stats, second.stats).part(order)
    lengths = np.diff(np.r_[starts, len(order)])
    kept = stats.part(starts)
    twice = lengths > 1
    if twice.any():
        both = combined(first.schema, kept.part(twice), stats.part(starts[twice] + 1))
        for target, content in zip(kept, both, strict=True):
            target[:, twice] = content
    places = np.empty(len(order), np.int64)
    places[order] = np.repeat(np.arange(len(starts)), lengths)
    cells = first.cells.and_(second.cells.moved(len(first)))
    merged = cells.at(places[cells.places], first.schema)
    chosen = order[starts]
    return Tiles(first.schema, first.unit_us, keys, codes[chosen], hops[chosen], kept, merged)


def _starts(codes: Ints, hops: Ints) -> Ints:
    if not len(codes):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.r_[True, (codes[1:] != codes[:-1]) | (hops[1:] != hops[:-1])])


def _reduced(schema: Schema, stats: Stats, starts: Ints) -> Stats:
    """Tiles that follow each other as one, from each of `starts` to the next."""
    counts = np.add.reduceat(stats.counts, starts, axis=1)
    sums = np.add.reduceat(stats.sums, starts, axis=1)
    lows = np.minimum.reduceat(stats.lows, starts, axis=1)
    highs = np.maximum.reduceat(stats.highs, starts, axis=1)
    lengths = np.diff(np.r_[starts, stats.counts.shape[1]])
    spreads = stats.spreads[:, starts]
    if schema.spread:
        of = list(schema.spread)
        apart = _means(stats, of) - np.repeat(_means_of(counts[of], sums[of]), lengths, axis=1)
        between = _squares(apart, stats.counts[of])
        spreads = np.add.reduceat(stats.spreads, starts, axis=1) + np.add.reduceat(between, starts, axis=1)
    first_at, firsts = stats.first_at[:, starts], stats.firsts[:, starts]
    if schema.first:
        first_at, firsts = earliest(stats.first_at, stats.firsts, starts, lengths)
    last_at, lasts = stats.last_at[:, starts], stats.lasts[:, starts]
    if schema.last:
        last_at, lasts = latest(stats.last_at, stats.lasts, starts, lengths)
    return Stats(counts, sums, lows, highs, spreads, first_at, firsts, last_at, lasts)


def _means(stats: Stats, of: list[int]) -> Floats:
    return _means_of(stats.counts[of], stats.sums[of])


def _means_of(counts: Floats, sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, sums / counts, 0.0)


def _squares(apart: Floats, counts: Floats) -> Floats:
    """What values that far from a mean add to its squared deviations; 0 for no values, whatever their mean is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(counts > 0, apart * apart * counts, 0.0)


def latest(at: Floats, values: Floats, starts: Ints, lengths: Ints) -> tuple[Floats, Floats]:
    """(time, value) of the last value of each run; of equal times the largest. -inf where there is none."""
    newest = np.maximum.reduceat(at, starts, axis=1)
    is_newest = at == np.repeat(newest, lengths, axis=1)
    found = np.maximum.reduceat(np.where(is_newest, values, -np.inf), starts, axis=1)
    return newest, np.where(newest == -np.inf, 0.0, found)


def earliest(at: Floats, values: Floats, starts: Ints, lengths: Ints) -> tuple[Floats, Floats]:
    """(time, value) of the first value of each run; of equal times the smallest. +inf where there is none."""
    oldest = np.minimum.reduceat(at, starts, axis=1)
    is_oldest = at == np.repeat(oldest, lengths, axis=1)
    found = np.minimum.reduceat(np.where(is_oldest, values, np.inf), starts, axis=1)
    return oldest, np.where(oldest == np.inf, 0.0, found)


def reduce_rows(table: pa.Table, *, keys: Sequence[str], event_time: str, schema: Schema, unit_us: int) -> Tiles:
    """Tiles of the rows of `table`; rows without event time or with a null key do not count."""
    wanted = pc.is_valid(table.column(event_time))
    for key in keys:
        wanted = pc.and_(wanted, pc.is_valid(table.column(key)))
    rows = table if pc.all(wanted, min_count=0).as_py() else table.filter(wanted)
    if rows.num_rows == 0:
        return no_tiles(schema, unit_us)
    codes, words_of = group_keys([rows.column(key) for key in keys])
    times = event_times(rows, event_time)
    hops = times // unit_us
    order = _order(codes, hops)
    codes, hops, times = codes[order], hops[order], times[order]
    starts = _starts(codes, hops)
    values = np.stack([numbers(rows.column(name))[order] for name in schema.columns])
    absent = np.isnan(values)
    ones, known = (~absent).astype(np.float64), np.where(absent, 0.0, values)
    none = np.zeros((0, len(hops)))

    def seen_at(of: tuple[int, ...], never: float) -> Floats:
        return np.where(absent[list(of)], never, times.astype(np.float64)) if of else none

    single = Stats(
        ones, known, np.where(absent, np.inf, values), np.where(absent, -np.inf, values),
        np.zeros((len(schema.spread), len(hops))),
        seen_at(schema.first, np.inf), known[list(schema.first)], seen_at(schema.last, -np.inf), known[list(schema.last)],
    )  # fmt: skip
    places = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(hops)]))
    cells = []
    for number, (column, kind) in enumerate(schema.sketches):
        if kind == "distinct":
            words, valid = hashes(rows.column(schema.columns[column]))
            words, valid = words[order], valid[order]
            cells.append(Cells.of(number, places[valid], *distinct_cells(words[valid])))
        else:
            valid = ~absent[column]
            found = bucket_cells(values[column][valid])
            cells.append(Cells.of(number, places[valid], found, np.ones(len(found), np.int64)))
    stats = _reduced(schema, single, starts)
    return Tiles(schema, unit_us, words_of, codes[starts], hops[starts], stats, Cells.joined(cells).reduced(schema))


def _order(codes: Ints, hops: Ints) -> Ints:
    """Sorts by (code, hop); by one key where both fit into it, which is several times faster."""
    first = int(hops.min())
    span = int(hops.max()) - first + 1
    if span * (int(codes.max()) + 1) < 1 << 62:
        return np.argsort(codes * span + (hops - first), kind="stable")
    return np.lexsort((hops, codes))


def all_tiles(parts: Iterable[Tiles], schema: Schema, unit_us: int) -> Tiles:
    """All together."""
    found = no_tiles(schema, unit_us)
    for part in parts:
        found = merged_tiles(found, part) if len(found) else part
    return found
