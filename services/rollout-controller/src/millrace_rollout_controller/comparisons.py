r"""What is known of two arms' means, batch by batch at the same time, and bounds that hold at every look together. Pure.

In a batch with n_c and n_s values the difference of the means, weighted by `w = min(n_c, n_s)`, is `sum(a x_i) - sum(b y_j)` with `a = w / n_c` and
`b = w / n_s`: at most 1, and one of them 1, so that bets are as bold as they may be. Its sum over batches estimates a weighted mean of the
differences of batches, so whatever moves both arms alike (weather, hour of day) cancels.

Values in [0, 1]. Deviations of such a sum are bounded at all times together by Fan, Grama and Liu's (2015) supermartingale
`exp(l S - psi(l) V)`, `psi(l) = -log(1 - l) - l`, where V sums the squares of the terms' distances from what was expected of them before; a mixture
over l inverts to an interval (Howard, Ramdas, McAuliffe and Sekhon 2021). V makes it narrow where values hardly vary, as errors of a good model do.

Values of any size. `millrace_kit.asymptotic`'s mixture, each side with half of the error, and the larger of both versions' variances: rare large
values may still be missing among one's few. It says nothing before `START` values of each version.

Roots of means (RMSE). The difference of two roots is no mean, but for the difference d of the means and stable's mean m it is
`sqrt(m + d) - sqrt(m)`, which rises with d and shrinks towards 0 as m grows. So bounds of d and of m, which hold together, bound it (docs/decisions/0052).
Most of the error goes to d: its sign is the sign of the difference of the roots, whatever m is.
"""

import math
from collections.abc import Callable

import numpy as np
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from numpy.typing import NDArray
from pydantic import BaseModel

from millrace_rollout_controller.counts import Sums

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]
Evidence = Callable[[Array], Array]
"""Logarithm of the evidence of a deviation."""
BETS = 0.95 * 2.0 ** -np.arange(14)
"""The mixture's l, from bold bets for few values to careful ones for a million."""
WEIGHTS = np.array([1.0 / ((k + 1) * (k + 2)) for k in range(len(BETS))])
OF_DIFFERENCE = 0.8
"""Part of the error of a root's bounds that the difference of the means has; the rest is stable's mean's."""
_LOG_WEIGHTS = np.log(WEIGHTS / WEIGHTS.sum())
_PSI = -np.log1p(-BETS) - BETS
_DEVIATIONS = 6.0
"""Standard deviations at which the search for a radius begins."""
_BISECTIONS = 28
_DOUBLINGS = 1000
"""More than a double has."""


class Comparison(BaseModel):
    """What is known of one metric of means."""

    weight: float = 0.0
    square_weight: float = 0.0
    """Sum of squares of all values' weights."""
    total: float = 0.0
    """Sum of weighted differences."""
    variance: float = 0.0
    level: float = 0.0
    """Sum of stable's means with the differences' weights."""
    level_variance: float = 0.0
    level_weight: float = 0.0
    """Sum of squares of the weights of stable's values."""
    sharpest: float = 0.0
    """Of values of any size: where the test is sharpest, fixed when it starts; 0 before."""
    level_sharpest: float = 0.0
    candidate: Sums = Sums()
    stable: Sums = Sums()
    pending_candidate: Sums = Sums()
    pending_stable: Sums = Sums()
    """A batch that still lacks one arm."""
    segments: dict[str, "Comparison"] = {}
    """Of a goal with a segment: the groups, by their names."""


def add(known: Comparison, candidate: Sums, stable: Sums, *, asymptotic: bool = False) -> Comparison:
    """What is known after one more batch; values are in [0, 1], or with `asymptotic` of any size."""
    candidate, stable = known.pending_candidate.plus(candidate), known.pending_stable.plus(stable)
    if candidate.n < 1 or stable.n < 1:
        return known.model_copy(update={"pending_candidate": candidate, "pending_stable": stable})
    weight = min(candidate.n, stable.n)
    a, b = weight / candidate.n, weight / stable.n
    stable_spread = b**2 * _spread(stable, _expected(known.stable))
    found = Comparison(
        weight=known.weight + weight,
        square_weight=known.square_weight + weight * (a + b),
        total=known.total + weight * (candidate.mean - stable.mean),
        variance=known.variance + a**2 * _spread(candidate, _expected(known.candidate)) + stable_spread,
        level=known.level + weight * stable.mean,
        level_variance=known.level_variance + stable_spread,
        level_weight=known.level_weight + weight * b,
        sharpest=known.sharpest,
        level_sharpest=known.level_sharpest,
        candidate=known.candidate.plus(candidate),
        stable=known.stable.plus(stable),
        segments=known.segments,
    )
    if asymptotic and not found.sharpest and min(found.candidate.n, found.stable.n) >= START:
        found.sharpest = float(tuned(np.asarray(variance_in_the_limit(found))))
        found.level_sharpest = float(tuned(np.asarray(_one_value(found) * found.level_weight)))
    return found


def _expected(before: Sums) -> float:
    """The mean believed before the batch; half a value of doubt keeps it inside."""
    return (before.total + 0.5) / (before.n + 1.0)


def _spread(sums: Sums, center: float) -> float:
    """Sum of squared distances from `center`."""
    return max(0.0, sums.square - 2.0 * center * sums.total + sums.n * center**2)


def _one_value(known: Comparison) -> float:
    """The larger of both arms' estimated variances of one value."""
    arms = (known.candidate, known.stable)
    return max(float(value_variance(*np.array([s.n, s.total, s.square]))) if s.n >= 2 else 0.0 for s in arms)


def variance_in_the_limit(known: Comparison) -> float:
    """Estimated variance of the sum of weighted differences."""
    return _one_value(known) * known.square_weight


def bernstein(deviation: Array, variance: Array) -> Array:
    """Logarithm of the evidence of a deviation of a sum of values in [0, 1] whose terms' squared distances sum up to `variance`."""
    return _mixture(np.asarray(deviation, float), _LOG_WEIGHTS - _PSI * np.asarray(variance, float)[..., None])


def _mixture(deviation: Array, base: Array) -> Array:
    logs = base + BETS * deviation[..., None]
    top = logs.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(logs - top).sum(axis=-1)))


def _evidence_of_difference(known: Comparison, *, asymptotic: bool) -> Evidence | None:
    """Evidence of a deviation of the sum of differences, in either direction; None before the test starts."""
    if not np.all(known.weight) or (asymptotic and not np.all(known.sharpest)):
        return None
    return _evidence(known.variance) if not asymptotic else _in_the_limit(variance_in_the_limit(known), known.sharpest)


def _evidence_of_level(known: Comparison, *, asymptotic: bool) -> Evidence:
    if not asymptotic:
        return _evidence(known.level_variance)
    return _in_the_limit(_one_value(known) * known.level_weight, known.level_sharpest)


def _evidence(variance: float) -> Evidence:
    base = _LOG_WEIGHTS - _PSI * np.asarray(variance, float)[..., None]
    return lambda deviation: _mixture(deviation, base)


def _in_the_limit(variance: float, sharpest: float) -> Evidence:
    return lambda deviation: log_evidence(deviation, np.asarray(variance), np.asarray(sharpest))


def _radius(evidence: Evidence, alpha: float, start: float) -> Array:
    """Smallest deviation whose evidence reaches 1 / alpha, which rises with it; the search begins around `start`."""
    needed, high = -math.log(alpha), np.asarray(start, float) + 0.0
    for _ in range(_DOUBLINGS):
        short = evidence(high) < needed
        if not short.any():
            break
        high = np.where(short, 2.0 * high, high)
    low = np.zeros_like(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        reached = evidence(middle) >= needed
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high


def difference(known: Comparison, alpha: float, *, asymptotic: bool = False) -> Bounds | None:
    """Bounds of the weighted mean difference, candidate minus stable, that hold at every look together; None before the test starts.

    Args:
        known: the batches so far.
        alpha: chance that they ever miss it.
        asymptotic: the values are of any size.
    """
    evidence = _evidence_of_difference(known, asymptotic=asymptotic)
    if evidence is None:
        return None
    spread = variance_in_the_limit(known) if asymptotic else known.variance + 1.0
    radius = _radius(evidence, alpha / 2.0, _DEVIATIONS * np.sqrt(spread)) / known.weight
    middle = known.total / known.weight
    least = -math.inf if asymptotic else -1.0
    return np.maximum(middle - radius, least), np.minimum(middle + radius, -least)


def _level(known: Comparison, alpha: float, *, asymptotic: bool) -> Bounds:
    """The same of stable's mean of values that are at least 0; each side has all of `alpha`."""
    spread = _one_value(known) * known.level_weight if asymptotic else known.level_variance + 1.0
    evidence = _evidence_of_level(known, asymptotic=asymptotic)
    radius = _radius(evidence, alpha, _DEVIATIONS * np.sqrt(spread)) / known.weight
    middle = known.level / known.weight
    return np.maximum(middle - radius, 0.0), np.minimum(middle + radius, math.inf if asymptotic else 1.0)


def roots(known: Comparison, alpha: float, *, asymptotic: bool = False) -> Bounds | None:
    """Bounds of the difference of the means' roots, as `difference` gives them of the means."""
    between = difference(known, alpha * OF_DIFFERENCE, asymptotic=asymptotic)
    if between is None:
        return None
    (lower, upper), (low, high) = between, _level(known, alpha * (1.0 - OF_DIFFERENCE) / 2.0, asymptotic=asymptotic)
    return _root(lower, np.where(lower >= 0, high, low)), _root(upper, np.where(upper >= 0, low, high))


def _root(apart: Array, mean: Array) -> Array:
    """`sqrt(mean + apart) - sqrt(mean)` for the smallest mean from `mean` on that fits: none is below 0."""
    mean = np.maximum(mean, -apart)
    return np.asarray(np.sqrt(mean + apart) - np.sqrt(mean))


def log_for_root(known: Comparison | None, margin: float, alpha: float, *, asymptotic: bool) -> tuple[Array, float]:
    """Logarithm of the evidence that the candidate's root is less than `margin` above stable's, and of what is needed at `alpha`."""
    needed = -math.log(alpha * OF_DIFFERENCE)
    evidence = None if known is None else _evidence_of_difference(known, asymptotic=asymptotic)
    if known is None or evidence is None:
        return np.zeros(()), needed
    low, _ = _level(known, alpha * (1.0 - OF_DIFFERENCE), asymptotic=asymptotic)
    # The mean squares may be so far apart, or farther, as stable's may be larger.
    allowed = 2.0 * margin * np.sqrt(low) + margin**2
    return evidence(allowed * known.weight - known.total), needed
