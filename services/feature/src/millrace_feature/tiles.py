"""Tiles: partial aggregates per entity and hop. Reducing rows to tiles and merging tiles to windows happens here and only here.

A tile holds count, sum, min and max of one column's non-null values. Windows are merged at read from whole tiles, never by
subtraction, so a minimum or maximum is right and a large value that left the window leaves no rounding behind. Sums of integers
are exact up to 2^53; sums of fractions agree between the stream and the lake to within rounding, since addition in
another order rounds otherwise.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEPARATOR = "\x1f"
MICROSECONDS = pa.timestamp("us", tz="UTC")


def encode_key(values: Sequence[str | int]) -> str:
    """One text per entity: the join keys' values joined by U+001F, which is escaped inside a value."""
    if len(values) == 1:
        return str(values[0])
    return SEPARATOR.join(str(v).replace("\\", "\\\\").replace(SEPARATOR, "\\s") for v in values)


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
    """Partial aggregates; each array is [columns, tiles] (or windows, or points)."""

    counts: Floats
    sums: Floats
    lows: Floats
    """Smallest value; +inf where there is none."""
    highs: Floats
    """Largest value; -inf where there is none."""

    def part(self, start: int, end: int) -> "Stats":
        """The tiles [start, end), as views."""
        return Stats(
            self.counts[:, start:end], self.sums[:, start:end], self.lows[:, start:end], self.highs[:, start:end]
        )


NEUTRAL = (0.0, 0.0, np.inf, -np.inf)
"""What an empty tile holds, in the order of `Stats`."""


def neutral_stats(columns: int, size: int) -> Stats:
    """`size` empty tiles."""
    counts, sums, lows, highs = (np.full((columns, size), value) for value in NEUTRAL)
    return Stats(counts, sums, lows, highs)


def joined_stats(first: Stats, second: Stats) -> Stats:
    """The tiles of both, in order."""
    counts, sums, lows, highs = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    return Stats(counts, sums, lows, highs)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one group, sorted by (code, hop)."""

    keys: list[str]
    """Encoded key per code."""
    codes: Ints
    hops: Ints
    """Start of the hop in hops since the epoch."""
    stats: Stats

    def __len__(self) -> int:
        return len(self.hops)


def reduce_rows(table: pa.Table, *, keys: Sequence[str], event_time: str, columns: Sequence[str], hop_us: int) -> Tiles:
    """Tiles of the rows of `table`; rows without event time or with a null key do not count."""
    wanted = pc.is_valid(table.column(event_time))
    for key in keys:
        wanted = pc.and_(wanted, pc.is_valid(table.column(key)))
    rows = table.filter(wanted)
    if rows.num_rows == 0:
        return Tiles([], np.zeros(0, np.int64), np.zeros(0, np.int64), neutral_stats(len(columns), 0))
    codes, words = group_keys([rows.column(key) for key in keys])
    hops = event_times(rows, event_time) // hop_us
    order = np.lexsort((hops, codes))
    codes, hops = codes[order], hops[order]
    starts = np.flatnonzero(np.r_[True, (codes[1:] != codes[:-1]) | (hops[1:] != hops[:-1])])
    values = np.stack([numbers(rows.column(name))[order] for name in columns])
    absent = np.isnan(values)
    stats = Stats(
        np.add.reduceat((~absent).astype(np.float64), starts, axis=1),
        np.add.reduceat(np.where(absent, 0.0, values), starts, axis=1),
        np.minimum.reduceat(np.where(absent, np.inf, values), starts, axis=1),
        np.maximum.reduceat(np.where(absent, -np.inf, values), starts, axis=1),
    )
    return Tiles(words, codes[starts], hops[starts], stats)


def merge_ranges(stats: Stats, starts: Ints, ends: Ints, functions: Collection[str]) -> Stats:
    """Merge the tiles [start, end) of each range. A neutral tile must stand after the last that is named.

    Sums, lows and highs are merged only where one of `functions` needs them; else they come back without windows.
    """
    pairs = np.empty(2 * len(starts), np.int64)
    pairs[::2], pairs[1::2] = starts, ends
    merged = Stats(
        np.add.reduceat(stats.counts, pairs, axis=1)[:, ::2],
        np.add.reduceat(stats.sums, pairs, axis=1)[:, ::2]
        if "sum" in functions or "mean" in functions
        else stats.sums[:, :0],
        np.minimum.reduceat(stats.lows, pairs, axis=1)[:, ::2] if "min" in functions else stats.lows[:, :0],
        np.maximum.reduceat(stats.highs, pairs, axis=1)[:, ::2] if "max" in functions else stats.highs[:, :0],
    )
    empty = starts >= ends
    if empty.any():  # reduceat gives the tile at `start` for an empty range
        for array, neutral in zip(merged, NEUTRAL, strict=True):
            if array.shape[1]:
                array[:, empty] = neutral
    return merged
