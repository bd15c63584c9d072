"""Two-sample tests on counts: a statistic, a p-value that holds in the worst case, and an effect that does not grow with n.

Every function compares a reference with a window, both given as counts, and says nothing about whether a change matters: that is
`verdicts`. With no rows on a side there is nothing to say: p-value 1, effect 0.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from millrace_drift_monitor.sketches import Counts, Floats

PSI_GROUPS = 10
# Below this expected count a chi-square cell is pooled (Cochran's rule).
MIN_EXPECTED = 5.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcome of one test.

    Args:
        statistic: test statistic.
        p_value: probability of one at least this extreme when nothing changed.
        effect: size of the change in the test's own unit.
        reference_count: rows of the reference that entered.
        window_count: rows of the window that entered.
    """

    statistic: float
    p_value: float
    effect: float
    reference_count: int
    window_count: int


def ks_distance(reference: Counts, window: Counts) -> float:
    """Largest difference of the two distribution functions at the bins' borders.

    Both functions are exact there, so this is at most the true distance, and below it by at most `ks_resolution`.
    """
    n, m = reference.sum(), window.sum()
    if n == 0 or m == 0:
        return 0.0
    return float(np.max(np.abs(np.cumsum(reference) / n - np.cumsum(window) / m)))


def ks_resolution(reference: Counts, window: Counts) -> float:
    """How far the true KS distance can be above `ks_distance`: what may hide inside one bin."""
    n, m = reference.sum(), window.sum()
    if n == 0 or m == 0:
        return 0.0
    return float(np.max(np.maximum(reference / n, window / m)))


def ks(reference: Counts, window: Counts) -> Comparison:
    """Kolmogorov-Smirnov on a histogram. The p-value is of the lower end of the distance, so it never claims too much.

    Small samples use the same finite-n distribution as `scipy.stats.ks_2samp(method="asymp")`.
    """
    n, m = int(reference.sum()), int(window.sum())
    if n == 0 or m == 0:
        return Comparison(0.0, 1.0, 0.0, n, m)
    distance = ks_distance(reference, window)
    effective = max(1, round(n * m / (n + m)))
    p_value = float(np.clip(stats.kstwo.sf(distance, effective), 0.0, 1.0))
    return Comparison(distance, p_value, distance, n, m)


def cramers_v(reference: Counts, window: Counts) -> float:
    """Cramer's V as with equally many rows on both sides: 0 for equal shares, 1 for no value in common.

    The textbook V of a 2 x k table shrinks when one sample is much larger; this one depends on the shares alone.
    """
    n, m = reference.sum(), window.sum()
    if n == 0 or m == 0:
        return 0.0
    p, q = reference / n, window / m
    total = p + q
    seen = total > 0
    return float(np.sqrt(0.5 * np.sum((p - q)[seen] ** 2 / total[seen])))


def chi_square(reference: Counts, window: Counts) -> Comparison:
    """Pearson's chi-square on value counts; rare values are pooled until every expected count is at least five."""
    n, m = int(reference.sum()), int(window.sum())
    effect = cramers_v(reference, window)
    if n == 0 or m == 0:
        return Comparison(0.0, 1.0, effect, n, m)
    table = _pooled(np.stack([reference, window]))
    if table.shape[1] < 2:
        return Comparison(0.0, 1.0, effect, n, m)
    result = stats.chi2_contingency(table, correction=False)
    return Comparison(float(result.statistic), float(result.pvalue), effect, n, m)


def _pooled(table: Counts) -> Counts:
    """`table` (2, k) with the rarest values merged until the smaller side expects `MIN_EXPECTED` of each."""
    order = np.argsort(table.sum(axis=0), kind="stable")
    ordered: Counts = table[:, order]
    expected: Floats = ordered.sum(axis=0) * float(ordered.sum(axis=1).min() / ordered.sum())
    rare = int(np.count_nonzero(expected < MIN_EXPECTED))
    while 0 < rare < len(expected) and expected[:rare].sum() < MIN_EXPECTED:
        rare += 1
    if rare == 0:
        return ordered
    pooled: Counts = np.concatenate([ordered[:, :rare].sum(axis=1, keepdims=True), ordered[:, rare:]], axis=1)
    return pooled


def psi_groups(reference: Counts) -> Counts:
    """Group of each bin: at most `PSI_GROUPS` groups of consecutive bins with about equal reference shares."""
    n = reference.sum()
    if n == 0:
        return np.zeros(len(reference), dtype=np.int64)
    middle = (np.cumsum(reference) - reference / 2) / n
    groups: Counts = np.minimum((middle * PSI_GROUPS).astype(np.int64), PSI_GROUPS - 1)
    return groups


def psi_value(reference: Counts, window: Counts, groups: Counts) -> tuple[float, int]:
    """Population stability index over `groups` of bins, and how many groups the reference fills.

    Shares are smoothed by half a count a group, so that an empty group gives a large but finite value.
    """
    a = np.bincount(groups, weights=reference, minlength=PSI_GROUPS)
    b = np.bincount(groups, weights=window, minlength=PSI_GROUPS)
    used = (a + b) > 0
    size = int(np.count_nonzero(used))
    p = (a[used] + 0.5) / (a.sum() + 0.5 * size)
    q = (b[used] + 0.5) / (b.sum() + 0.5 * size)
    return float(np.sum((q - p) * np.log(q / p))), size


def psi(reference: Counts, window: Counts) -> Comparison:
    """Population stability index.

    Without change, PSI * nm / (n + m) is chi-square with (groups - 1) degrees of freedom (Yurdakul 2018), which gives the p-value.
    """
    n, m = int(reference.sum()), int(window.sum())
    if n == 0 or m == 0:
        return Comparison(0.0, 1.0, 0.0, n, m)
    value, size = psi_value(reference, window, psi_groups(reference))
    p_value = float(stats.chi2.sf(value * n * m / (n + m), size - 1)) if size > 1 else 1.0
    return Comparison(value, p_value, value, n, m)


def rate_change(reference_hits: int, reference_count: int, window_hits: int, window_count: int) -> Comparison:
    """Two proportions, exact and conditional (Fisher), two-sided by doubling the smaller tail.

    The effect is the absolute difference of the rates, the statistic the signed one.
    """
    n, m = reference_count, window_count
    if n == 0 or m == 0:
        return Comparison(0.0, 1.0, 0.0, n, m)
    difference = window_hits / m - reference_hits / n
    hits = reference_hits + window_hits
    lower = float(stats.hypergeom.cdf(window_hits, n + m, hits, m))
    upper = float(stats.hypergeom.sf(window_hits - 1, n + m, hits, m))
    return Comparison(difference, float(np.clip(2 * min(lower, upper), 0.0, 1.0)), abs(difference), n, m)


def range_exits(reference_count: int, outside: int, window_count: int) -> Comparison:
    """Values beyond everything the reference held; statistic and effect are their share of the window.

    Without change, each of the reference's and the window's values is equally likely to be an extreme one, so k or more of the
    window's beyond either end have probability at most (k + 1) * (m / (n + m))^k.
    """
    n, m = reference_count, window_count
    if n == 0 or m == 0:
        return Comparison(0.0, 1.0, 0.0, n, m)
    p_value = min(1.0, (outside + 1) * (m / (n + m)) ** outside)
    return Comparison(outside / m, p_value, outside / m, n, m)


def accuracy_drop(reference_accuracy: float, reference_count: int, correct: int, outcomes: int) -> Comparison:
    """Whether accuracy fell below the reference's; exact and one-sided.

    With a known number of held-out rows behind the reference it is Fisher's test (both sides are samples), else the binomial
    test against the stated accuracy. The effect is the drop, 0 when accuracy rose.
    """
    if outcomes == 0:
        return Comparison(0.0, 1.0, 0.0, reference_count, 0)
    difference = correct / outcomes - reference_accuracy
    if reference_count > 0:
        right = round(reference_accuracy * reference_count)
        p_value = float(stats.hypergeom.cdf(correct, reference_count + outcomes, right + correct, outcomes))
    else:
        p_value = float(stats.binom.cdf(correct, outcomes, reference_accuracy))
    return Comparison(difference, float(np.clip(p_value, 0.0, 1.0)), max(0.0, -difference), reference_count, outcomes)


def benjamini_hochberg(p_values: Floats) -> Floats:
    """P-values adjusted so that rejecting those at or below q keeps the false discovery rate at q (Benjamini-Hochberg 1995)."""
    if len(p_values) == 0:
        return p_values
    return np.asarray(stats.false_discovery_control(p_values, method="bh"), dtype=np.float64)
