"""The tests hold what they promise: against scipy on raw rows, and by seeded simulation."""

import numpy as np
import pytest
from millrace_drift_monitor.comparisons import (
    accuracy_drop,
    benjamini_hochberg,
    chi_square,
    cramers_v,
    ks,
    ks_distance,
    ks_resolution,
    psi,
    range_exits,
    rate_change,
)
from millrace_drift_monitor.sketches import fit_bins
from scipy import stats

# Two-sided 99.9 % band around a share of p over n runs.
BAND = 3.29


def upper(p: float, runs: int) -> float:
    return p + BAND * np.sqrt(p * (1 - p) / runs)


def split(reference: np.ndarray, window: np.ndarray):
    bins = fit_bins(reference)
    return bins.count(reference)[: bins.size], bins.count(window)[: bins.size]


@pytest.mark.parametrize("kind", ["normal", "lognormal", "ties", "integers"])
@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_ks_brackets_the_exact_distance(kind: str, shift: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        a, b = rng.normal(0, 1, 20_000), rng.normal(shift, 1, 1500)
        if kind == "lognormal":
            a, b = np.exp(a), np.exp(b)
        if kind == "ties":
            a, b = np.maximum(a, 0.3), np.maximum(b, 0.3)
        if kind == "integers":
            a, b = np.round(a * 300), np.round(b * 300)
        reference, window = split(a, b)
        exact = stats.ks_2samp(a, b, method="asymp")
        mine = ks(reference, window)
        assert mine.effect <= exact.statistic + 1e-12
        assert exact.statistic <= mine.effect + ks_resolution(reference, window) + 1e-12
        assert mine.p_value >= exact.pvalue * (1 - 1e-9)


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000, 1_000_000])
def test_false_alarms_of_ks_stay_below_alpha_at_every_size(n: int) -> None:
    """Equal distributions, window as large as the reference: at 1e6 rows tests on approximate sketches alarm most of the time."""
    runs = {1_000: 400, 10_000: 400, 100_000: 100, 1_000_000: 16}[n]
    rng = np.random.default_rng(n)
    alarms = sum(ks(*split(rng.normal(size=n), rng.normal(size=n))).p_value <= 0.05 for _ in range(runs))
    assert alarms / runs <= upper(0.05, runs)


def test_naive_ks_on_an_approximate_sketch_would_fail_that() -> None:
    """The comparison the one above exists for: ranks off by 1 %, as a small quantile sketch has them, alarm nearly always."""
    rng = np.random.default_rng(1)
    n, alarms = 200_000, 0
    for _ in range(20):
        distance = stats.ks_2samp(rng.normal(size=2000), rng.normal(size=2000)).statistic  # 2000 kept of 200,000
        alarms += stats.kstwo.sf(distance, n // 2) <= 0.05
    assert alarms >= 15


def test_power_on_a_fifth_of_a_standard_deviation() -> None:
    rng = np.random.default_rng(2)
    found = sum(ks(*split(rng.normal(size=100_000), rng.normal(0.2, 1, 1000))).p_value <= 0.001 for _ in range(100))
    exact = sum(stats.ks_2samp(rng.normal(size=100_000), rng.normal(0.2, 1, 1000)).pvalue <= 0.001 for _ in range(100))
    assert found >= 95
    assert found >= exact - 3


def test_chi_square_is_scipys_and_its_effect_ignores_sample_sizes() -> None:
    reference, window = np.array([500, 300, 200]), np.array([40, 35, 25])
    result = stats.chi2_contingency([reference, window], correction=False)
    mine = chi_square(reference, window)
    assert (mine.statistic, mine.p_value) == pytest.approx((result.statistic, result.pvalue))
    balanced = stats.contingency.association(np.array([[500, 300, 200], [400, 350, 250]]), method="cramer")
    assert cramers_v(np.array([500, 300, 200]), np.array([400, 350, 250])) == pytest.approx(balanced)
    assert cramers_v(reference * 1000, window) == pytest.approx(mine.effect)
    assert cramers_v(np.array([5, 0]), np.array([0, 9])) == pytest.approx(1.0)


def test_false_alarms_of_chi_square_with_rare_values() -> None:
    rng = np.random.default_rng(4)
    shares = np.array([0.5, 0.3, 0.15, 0.04, 0.006, 0.003, 0.001])
    runs = 500
    alarms = 0
    for _ in range(runs):
        a, b = rng.multinomial(20_000, shares), rng.multinomial(300, shares)
        alarms += chi_square(a, b).p_value <= 0.05
    assert alarms / runs <= upper(0.05, runs)


def test_psi_under_no_change_and_under_change() -> None:
    rng = np.random.default_rng(5)
    runs, alarms = 400, 0
    for _ in range(runs):
        alarms += psi(*split(rng.gamma(2, size=20_000), rng.gamma(2, size=1000))).p_value <= 0.05
    assert alarms / runs <= upper(0.05, runs)
    same = psi(*split(rng.normal(size=50_000), rng.normal(size=5000)))
    moved = psi(*split(rng.normal(size=50_000), rng.normal(1, 1, 5000)))
    assert same.effect < 0.02
    # Of N(1,1) against N(0,1) the continuous PSI is exactly 1; ten groups see most of it.
    assert 0.75 < moved.effect < 1.0
    assert moved.p_value < 1e-100
    assert psi(np.array([10, 0]), np.array([0, 10])).effect < np.inf


def test_rate_change_is_fishers_and_holds_for_rare_nulls() -> None:
    mine = rate_change(3, 1000, 9, 400)
    low, high = (stats.fisher_exact([[9, 391], [3, 997]], alternative=a).pvalue for a in ("less", "greater"))
    assert mine.p_value == pytest.approx(min(1, 2 * min(low, high)))
    assert mine.effect == pytest.approx(9 / 400 - 3 / 1000)
    rng = np.random.default_rng(6)
    runs = 2000
    hits = np.stack([rng.binomial(50_000, 0.001, runs), rng.binomial(300, 0.001, runs)])
    alarms = sum(rate_change(int(a), 50_000, int(b), 300).p_value <= 0.05 for a, b in hits.T)
    assert alarms / runs <= upper(0.05, runs)


def test_range_exits_hold_although_the_range_is_the_references_own() -> None:
    rng = np.random.default_rng(7)
    runs, alarms = 2000, 0
    for _ in range(runs):
        a, b = rng.normal(size=400), rng.normal(size=400)
        alarms += range_exits(400, int(np.count_nonzero((b < a.min()) | (b > a.max()))), 400).p_value <= 0.05
    assert alarms / runs <= upper(0.05, runs)
    assert range_exits(10_000, 20, 500).p_value < 1e-20


@pytest.mark.parametrize("held_out", [0, 3000])
def test_accuracy_drop_is_exact(held_out: int) -> None:
    rng = np.random.default_rng(8)
    runs, alarms, found = 2000, 0, 0
    for _ in range(runs):
        reference = rng.binomial(held_out, 0.8) / held_out if held_out else 0.8
        alarms += accuracy_drop(reference, held_out, int(rng.binomial(400, 0.8)), 400).p_value <= 0.05
        found += accuracy_drop(reference, held_out, int(rng.binomial(400, 0.7)), 400).p_value <= 0.05
    assert alarms / runs <= upper(0.05, runs)
    assert found / runs > 0.95
    better = accuracy_drop(0.8, held_out, 390, 400)
    assert (better.effect, better.p_value > 0.99) == (0.0, True)


def test_nothing_is_said_without_rows() -> None:
    nothing, something = np.zeros(4, dtype=np.int64), np.array([1, 2, 3, 4])
    for test in (ks, chi_square, psi):
        for pair in ((nothing, nothing), (nothing, something), (something, nothing)):
            assert test(*pair).p_value == 1.0
    assert rate_change(0, 0, 3, 4).p_value == 1.0
    assert accuracy_drop(0.8, 0, 0, 0).p_value == 1.0
    assert ks_distance(nothing, something) == 0.0
    assert len(benjamini_hochberg(np.empty(0))) == 0


def test_benjamini_hochberg_controls_the_share_of_false_findings() -> None:
    """90 tests without and 10 with a change, correlated in pairs: false findings stay below q of all findings."""
    rng = np.random.default_rng(9)
    shares = []
    for _ in range(400):
        z = rng.normal(size=100)
        z[50:] = 0.7 * z[:50] + np.sqrt(1 - 0.49) * z[50:]
        z[:10] += 4
        found = benjamini_hochberg(stats.norm.sf(z)) <= 0.1
        shares.append(found[10:].sum() / max(1, found.sum()))
    assert np.mean(shares) <= 0.1 * 0.9 + BAND * np.std(shares) / 20
