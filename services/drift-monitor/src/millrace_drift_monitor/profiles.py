"""The reference profile of one model version: frozen bins, their counts, and how far its own windows stray from it.

Days differ from each other, so one window of slowly moving features (a seven-day mean, the weather) is far from a half-year
reference although nothing is wrong. The profile therefore cuts the reference into windows of the monitor's length, compares each
with all the others, and keeps how large an effect one window in `RETURN_WINDOWS` shows: what is natural for this data.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millrace_drift_monitor.comparisons import cramers_v, ks_distance, psi_groups, psi_value
from millrace_drift_monitor.sketches import Bins, Counts, Floats, Layout, as_served, fit_bins

# An effect that one window in this many shows is natural.
RETURN_WINDOWS = 200
# Columns of `Profile.natural`.
DISTANCE, PSI, NULLS, RANGE = range(4)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a window is compared with.

    Args:
        feature_names: in vector order.
        layout: bins of the features, then of the model's output (no bins when no predictions were given).
        sketch: counts of the whole reference.
        rows: rows of the reference.
        labels: rows with a label.
        positives: of these, true ones.
        accuracy: on held-out rows; None when not given.
        predictions: held-out predictions behind the output's bins and the accuracy.
        natural: natural effects, shape (columns, 4): distance, PSI, null rate, out of range.
        natural_label: the same for the label rate.
        natural_accuracy: the same for a loss of accuracy.
        natural_windows: windows the natural effects come from; 0 says nothing is known.
    """

    feature_names: tuple[str, ...]
    layout: Layout
    sketch: Counts
    rows: int
    labels: int
    positives: int
    accuracy: float | None
    predictions: int
    natural: Floats
    natural_label: float
    natural_accuracy: float
    natural_windows: int

    @property
    def output(self) -> int:
        """Index of the output's column."""
        return len(self.feature_names)

    def part(self, index: int) -> Counts:
        """Reference counts of one column."""
        return self.layout.part(self.sketch, index)


@dataclass(frozen=True, slots=True)
class Column:
    """One profiled column: its bins, its counts and its natural effects, shape (4,)."""

    bins: Bins
    counts: Counts
    natural: Floats


def profile_column(values: Floats, groups: npt.NDArray[np.int64], group_count: int) -> Column:
    """Freeze a column and measure its natural effects over `groups` (a window number per row, -1 for none)."""
    values = as_served(values)
    bins = fit_bins(values)
    counts = bins.count(values)
    natural = np.zeros(4)
    if group_count:
        table = _group_counts(bins, values, groups, group_count)
        rest = table.sum(axis=0) - table
        effects = np.stack([_effects(bins, rest[index], table[index]) for index in range(group_count)])
        effects[:, RANGE] = _range_exits(bins, values, groups, table)
        natural = np.array([natural_effect(effects[:, test], bounded=test != PSI) for test in range(4)])
    return Column(bins, counts, natural)


def natural_effect(effects: Floats, *, bounded: bool = True) -> float:
    """The effect one window in `RETURN_WINDOWS` reaches, from the effects of the reference's windows, shape (windows,).

    With as many windows this is their largest effect. With fewer, the tail beyond the median is taken as exponential and
    extrapolated; an effect that ends at 1 (`bounded`) by at most half of what is left to 1.
    """
    largest, middle = float(np.max(effects)), float(np.median(effects))
    stretch = max(1.0, float(np.log(RETURN_WINDOWS) / np.log(max(2, len(effects)))))
    level = middle + stretch * (largest - middle)
    return min(level, (largest + 1) / 2) if bounded else level


def _group_counts(bins: Bins, values: Floats, groups: npt.NDArray[np.int64], group_count: int) -> Counts:
    """Counts per group, shape (groups, bins + 1): the bins, then nulls."""
    width = bins.size + 1
    places = np.full(len(values), bins.size, dtype=np.int64)
    present = ~np.isnan(values)
    places[present] = bins.indices(values[present])
    inside = groups >= 0
    flat = np.bincount(groups[inside] * width + places[inside], minlength=group_count * width)
    return flat.reshape(group_count, width).astype(np.int64)


def _effects(bins: Bins, rest: Counts, part: Counts) -> Floats:
    """Distance, PSI and null-rate difference of one window against the others; the range is measured apart."""
    a, b = rest[: bins.size], part[: bins.size]
    effects = np.zeros(4)
    if a.sum() and b.sum():
        effects[DISTANCE] = cramers_v(a, b) if bins.discrete else ks_distance(a, b)
        effects[PSI] = psi_value(a, b, psi_groups(a))[0]
    effects[NULLS] = abs(part[-1] / max(1, part.sum()) - rest[-1] / max(1, rest.sum()))
    return effects


def _range_exits(bins: Bins, values: Floats, groups: npt.NDArray[np.int64], table: Counts) -> Floats:
    """Per window, the share of its values that lie outside the range of all the other windows."""
    rows = np.maximum(1, table[:, : bins.size].sum(axis=1))
    if bins.discrete:
        alone = (table[:, : bins.size] > 0) & (np.count_nonzero(table[:, : bins.size], axis=0) == 1)
        lonely: Floats = (table[:, : bins.size] * alone).sum(axis=1) / rows
        return lonely
    inside = (groups >= 0) & ~np.isnan(values)
    kept, owner = values[inside], groups[inside]
    highs, lows = np.full(len(table), -np.inf), np.full(len(table), np.inf)
    np.maximum.at(highs, owner, kept)
    np.minimum.at(lows, owner, kept)
    second_high, second_low = np.sort(highs)[-2], np.sort(lows)[1]
    shares: Floats = np.bincount(owner[(kept > second_high) | (kept < second_low)], minlength=len(table)) / rows
    return shares


def group_rows(
    times_us: npt.NDArray[np.int64] | None, window_us: int, min_count: int, min_windows: int
) -> tuple[npt.NDArray[np.int64] | None, int]:
    """Window number of each reference row, -1 in windows of fewer than `min_count` rows, and how many windows are left.

    Returns (None, 0) when the reference has no event times or fewer than `min_windows` windows.
    """
    if times_us is None or len(times_us) == 0:
        return None, 0
    _starts, owner, sizes = np.unique(times_us // window_us, return_inverse=True, return_counts=True)
    large = sizes >= min_count
    count = int(np.count_nonzero(large))
    if count < min_windows:
        return None, 0
    numbers = np.where(large, np.cumsum(large) - 1, -1)
    return numbers[owner].astype(np.int64), count


def block_rows(rows: int, window_rows: int, min_windows: int) -> tuple[npt.NDArray[np.int64] | None, int]:
    """Like `group_rows` for rows without times: consecutive blocks of `window_rows` rows.

    Held-out rows in time order give blocks that vary as windows do; shuffled ones give blocks that hardly vary.
    """
    count = rows // window_rows if window_rows else 0
    if count < min_windows:
        return None, 0
    numbers = np.arange(rows, dtype=np.int64) // window_rows
    return np.where(numbers < count, numbers, -1), count


def rate_differences(hits: Floats, groups: npt.NDArray[np.int64], group_count: int) -> Floats:
    """Rate of each window less that of all the others; `hits` holds 0, 1 or NaN (left out), windows without rows give 0."""
    known = ~np.isnan(hits) & (groups >= 0)
    counts = np.bincount(groups[known], minlength=group_count).astype(np.float64)
    sums = np.bincount(groups[known], weights=hits[known], minlength=group_count)
    with np.errstate(invalid="ignore", divide="ignore"):
        differences: Floats = sums / counts - (sums.sum() - sums) / (counts.sum() - counts)
    return np.nan_to_num(differences)


def dump_profile(profile: Profile) -> bytes:
    """A profile as bytes (compressed npz without pickles)."""
    columns = profile.layout.columns
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        feature_names=np.array(profile.feature_names, dtype=np.str_),
        values=np.concatenate([bins.values for bins in columns]),
        sizes=np.array([len(bins.values) for bins in columns], dtype=np.int64),
        discrete=np.array([bins.discrete for bins in columns]),
        ranges=np.array([(bins.low, bins.high) for bins in columns]),
        sketch=profile.sketch,
        counts=np.array(
            [profile.rows, profile.labels, profile.positives, profile.predictions, profile.natural_windows],
            dtype=np.int64,
        ),
        accuracy=np.array([np.nan if profile.accuracy is None else profile.accuracy]),
        natural=profile.natural,
        natural_rates=np.array([profile.natural_label, profile.natural_accuracy]),
    )
    return buffer.getvalue()


def load_profile(content: bytes) -> Profile:
    """The profile that `dump_profile` wrote."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        parts = np.split(file["values"], np.cumsum(file["sizes"])[:-1])
        columns = [
            Bins(values, bool(discrete), float(low), float(high))
            for values, discrete, (low, high) in zip(parts, file["discrete"], file["ranges"], strict=True)
        ]
        rows, labels, positives, predictions, windows = (int(n) for n in file["counts"])
        accuracy = float(file["accuracy"][0])
        return Profile(
            feature_names=tuple(str(name) for name in file["feature_names"]),
            layout=Layout.of(columns),
            sketch=file["sketch"].astype(np.int64),
            rows=rows,
            labels=labels,
            positives=positives,
            accuracy=None if np.isnan(accuracy) else accuracy,
            predictions=predictions,
            natural=file["natural"],
            natural_label=float(file["natural_rates"][0]),
            natural_accuracy=float(file["natural_rates"][1]),
            natural_windows=windows,
        )
