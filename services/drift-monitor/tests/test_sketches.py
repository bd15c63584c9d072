"""Sketches are exact and merge in any order; profiles come back from bytes as they went."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from millrace_drift_monitor.profiles import (
    DISTANCE,
    RANGE,
    Profile,
    block_rows,
    dump_profile,
    group_rows,
    load_profile,
    natural_effect,
    profile_column,
)
from millrace_drift_monitor.sketches import MAX_CATEGORIES, MAX_EDGES, Layout, fit_bins, pack, unpack

numbers = hnp.arrays(np.float64, st.integers(0, 300), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@given(numbers, numbers, numbers)
@settings(max_examples=150, deadline=None)
def test_counts_of_parts_add_up_to_counts_of_the_whole(reference, a, b) -> None:
    bins = fit_bins(reference)
    whole = bins.count(np.concatenate([a, b]))
    np.testing.assert_array_equal(bins.count(a) + bins.count(b), whole)
    assert whole[: bins.size + 1].sum() == len(a) + len(b)
    assert whole[bins.size] == np.isnan(a).sum() + np.isnan(b).sum()
    np.testing.assert_array_equal(unpack(pack(whole)), whole)


@given(numbers, numbers)
@settings(max_examples=150, deadline=None)
def test_cumulative_counts_are_the_exact_distribution_function_at_the_cuts(reference, window) -> None:
    bins = fit_bins(reference)
    present = window[~np.isnan(window)]
    counts = bins.count(window)
    if not bins.discrete:
        expected = [np.count_nonzero(present <= cut) for cut in bins.values]
        np.testing.assert_array_equal(np.cumsum(counts[: bins.size])[:-1], expected)
    else:
        np.testing.assert_array_equal(counts[: bins.size - 1], [np.count_nonzero(present == v) for v in bins.values])


def test_the_reference_is_never_outside_its_own_range() -> None:
    rng = np.random.default_rng(0)
    for column in (rng.normal(size=5000), rng.integers(0, 9, 5000).astype(float)):
        bins = fit_bins(column)
        assert bins.count(column)[-1] == 0
        assert bins.count(np.array([1e9, -1e9, np.nan, np.inf]))[-1] == 3


def test_bins_are_bounded() -> None:
    rng = np.random.default_rng(0)
    assert len(fit_bins(rng.normal(size=100_000)).values) == MAX_EDGES
    few = fit_bins(rng.integers(0, MAX_CATEGORIES, 10_000).astype(float))
    assert (few.discrete, len(few.values)) == (True, MAX_CATEGORIES)
    heavy = fit_bins(np.concatenate([np.zeros(90_000), rng.normal(size=10_000)]))
    assert not heavy.discrete
    counts = heavy.count(np.zeros(10))
    assert counts.max() == 10


def test_a_profile_survives_bytes() -> None:
    rng = np.random.default_rng(1)
    groups, count = group_rows(np.arange(4000) * 1_000_000, 100_000_000, 50, 10)
    assert count == 40
    columns = [
        profile_column(values, groups, count)
        for values in (rng.normal(size=4000), rng.integers(0, 3, 4000).astype(float), np.full(4000, np.nan))
    ]
    profile = Profile(
        feature_names=("a", "b"),
        layout=Layout.of([c.bins for c in columns]),
        sketch=np.concatenate([c.counts for c in columns]),
        rows=4000,
        labels=3990,
        positives=100,
        accuracy=None,
        predictions=0,
        natural=np.stack([c.natural for c in columns]),
        natural_label=0.25,
        natural_accuracy=0.125,
        natural_windows=count,
    )
    again = load_profile(dump_profile(profile))
    assert again.feature_names == profile.feature_names
    assert (again.accuracy, again.labels, again.natural_windows) == (None, 3990, 40)
    assert (again.natural_label, again.natural_accuracy) == (0.25, 0.125)
    np.testing.assert_array_equal(again.sketch, profile.sketch)
    np.testing.assert_array_equal(again.natural, profile.natural)
    for mine, theirs in zip(again.layout.columns, profile.layout.columns, strict=True):
        np.testing.assert_array_equal(mine.values, theirs.values)
        assert (mine.discrete, mine.low, mine.high) == (theirs.discrete, theirs.low, theirs.high)


def test_natural_effects_are_those_of_each_window_against_the_others() -> None:
    """A column that stands still within a window: its windows are far from the whole, and the profile says so."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 300)
    slow = np.repeat(rng.normal(size=20), 300) + rng.normal(0, 0.01, 6000)
    fast = rng.normal(size=6000)
    assert profile_column(slow, groups, 20).natural[DISTANCE] > 0.9
    assert profile_column(slow, groups, 20).natural[RANGE] == pytest.approx(1.0)
    assert profile_column(fast, groups, 20).natural[DISTANCE] < 0.12
    assert profile_column(fast, groups, 20).natural[RANGE] < 0.02
    np.testing.assert_array_equal(profile_column(slow, groups, 0).natural, np.zeros(4))


def test_natural_effects_of_few_windows_are_extrapolated() -> None:
    """Of exponential effects, the level one window in 200 reaches is found from 15 windows about as from 200."""
    rng = np.random.default_rng(3)
    for windows in (15, 50, 200):
        levels = [natural_effect(rng.exponential(0.01, windows)) for _ in range(400)]
        exceeded = np.exp(-np.array(levels) / 0.01).mean()
        assert 1 / 600 < exceeded < 1 / 60, windows
    assert natural_effect(np.array([0.1, 0.9])) == pytest.approx(0.95)
    assert natural_effect(np.array([0.0, 3.0]), bounded=False) > 3.0


def test_windows_with_few_rows_say_nothing() -> None:
    times = np.concatenate([np.full(100, day * 86_400) for day in range(12)] + [np.full(3, 99 * 86_400)]) * 1_000_000
    groups, count = group_rows(times, 86_400_000_000, 50, 10)
    assert count == 12
    assert set(groups[-3:]) == {-1}
    assert group_rows(times, 86_400_000_000, 50, 13) == (None, 0)
    assert group_rows(None, 86_400_000_000, 50, 2) == (None, 0)
    blocks, count = block_rows(1050, 100, 10)
    assert (count, blocks[0], blocks[999], blocks[1000]) == (10, 0, 9, -1)
    assert block_rows(50, 100, 2) == (None, 0)


def test_values_rounded_to_the_models_precision_are_the_references_own() -> None:
    speeds = np.tile([0.0, 3.45234, 4.60312, 5.7539, 6.90468], 100)
    for reference in (speeds, np.random.default_rng(1).normal(size=5000)):
        bins = fit_bins(reference)
        served = reference.astype(np.float32).astype(np.float64)
        assert bins.count(served).tolist() == bins.count(reference).tolist()
        assert bins.count(served)[-1] == 0, "none is outside what the reference held"
