"""Mergeable sketches: exact counts over frozen bins, one flat vector of integers per window.

A numeric feature is cut at (at most) 512 quantiles of its reference, a discrete one (at most 64 distinct values) has one bin per
value and one for values the reference never had. Counts are exact, so two sketches merge by addition, in any order, and the only
error is what happens inside a bin: the true KS distance lies in [D, D + heaviest bin], and D itself never overstates it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_EDGES = 512
MAX_CATEGORIES = 64


@dataclass(frozen=True, slots=True)
class Bins:
    """How one column is counted.

    Args:
        values: ascending; cut points `v` of a numeric column (bin i holds v[i-1] < x <= v[i], the last bin x > v[-1]), or the
            known values of a discrete one (the last bin holds all others).
        discrete: which of the two.
        low: smallest reference value.
        high: largest reference value.
    """

    values: Floats
    discrete: bool
    low: float
    high: float

    @property
    def size(self) -> int:
        """Bins, the last one included."""
        return len(self.values) + 1

    @property
    def slots(self) -> int:
        """Places in a sketch: the bins, then nulls, then values outside the reference's range."""
        return self.size + 2

    def indices(self, column: Floats) -> npt.NDArray[np.intp]:
        """Bin of every value of `column`, which holds no NaN."""
        if len(self.values) == 0:
            return np.zeros(len(column), dtype=np.intp)
        places = np.searchsorted(self.values, column, side="left")
        if self.discrete:
            near = self.values[np.minimum(places, len(self.values) - 1)]
            places = np.where(near == column, places, len(self.values))
        return places

    def count(self, column: Floats) -> Counts:
        """Counts of `column`, shape (slots,); NaN is null."""
        column = as_served(column)
        present = column[~np.isnan(column)]
        counts = np.zeros(self.slots, dtype=np.int64)
        counts[: self.size] = np.bincount(self.indices(present), minlength=self.size)
        counts[self.size] = len(column) - len(present)
        counts[self.size + 1] = self.outside(present)
        return counts

    def outside(self, present: Floats) -> int:
        """How many of `present` the reference could not have held: beyond its range, or a value it never had."""
        if self.discrete:
            return int(np.count_nonzero(self.indices(present) == len(self.values)))
        return int(np.count_nonzero((present < self.low) | (present > self.high)))


def as_served(column: Floats) -> Floats:
    """The values as a model is given them: FP32, the precision of its input tensor.

    Training sets hold float64 and the prediction log what was sent; without this, every value that FP32 cannot hold exactly
    (4.60312 and most others) would look like one the reference never had.
    """
    with np.errstate(over="ignore"):
        return column.astype(np.float32).astype(np.float64)


def fit_bins(column: Floats) -> Bins:
    """Freeze the bins of a reference column; NaN is left out, a column without values gets one bin."""
    present = np.sort(as_served(column[~np.isnan(column)]))
    if len(present) == 0:
        return Bins(np.empty(0), discrete=True, low=0.0, high=0.0)
    distinct = np.unique(present)
    low, high = float(present[0]), float(present[-1])
    if len(distinct) <= MAX_CATEGORIES:
        return Bins(distinct, discrete=True, low=low, high=high)
    ranks = np.ceil(np.arange(1, MAX_EDGES + 1) * len(present) / MAX_EDGES).astype(np.int64) - 1
    return Bins(np.unique(present[ranks]), discrete=False, low=low, high=high)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each column's counts stand in a sketch: the features, then the model's output."""

    columns: tuple[Bins, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, columns: Sequence[Bins]) -> "Layout":
        """The layout of `columns`, in order."""
        ends = np.cumsum([0, *(bins.slots for bins in columns)])
        return cls(tuple(columns), tuple(int(end) for end in ends))

    def empty(self) -> Counts:
        """A sketch of nothing."""
        return np.zeros(self.offsets[-1], dtype=np.int64)

    def part(self, sketch: Counts, index: int) -> Counts:
        """Counts of one column, shape (slots,); a view."""
        return sketch[self.offsets[index] : self.offsets[index + 1]]

    def count(self, rows: Floats) -> Counts:
        """Sketch of `rows`, shape (n, columns)."""
        if rows.ndim != 2 or rows.shape[1] != len(self.columns):
            raise ValueError(f"rows of shape {rows.shape} do not fit {len(self.columns)} columns")
        return np.concatenate([bins.count(rows[:, index]) for index, bins in enumerate(self.columns)])


def pack(sketch: Counts) -> bytes:
    """A sketch as bytes: little-endian int64, zlib."""
    return zlib.compress(sketch.astype("<i8").tobytes(), 1)


def unpack(content: bytes) -> Counts:
    """The sketch that `pack` made."""
    return np.frombuffer(zlib.decompress(content), dtype="<i8").astype(np.int64)
