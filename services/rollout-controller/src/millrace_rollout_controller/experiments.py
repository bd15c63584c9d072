r"""Candidate against stable, metric by metric, with bounds that hold at every look.

Difference of means. In a batch with n_c and n_s values the difference of the means, weighted by `w = n_c n_s / (n_c + n_s)`, is
`sum(a x_i) - sum(b y_j)` with `a = n_s / n` and `b = n_c / n`, both at most 1. Its sum over batches estimates a weighted mean of the
differences of batches, so whatever moves both arms alike (weather, hour of day) cancels. Deviations of such a sum are bounded at all times
together by Fan, Grama and Liu's (2015) supermartingale `exp(l S - psi(l) V)`, `psi(l) = -log(1 - l) - l`, where V sums the squares of the
terms' distances from what was expected of them before; a mixture over l inverts to an interval (Howard, Ramdas, McAuliffe and Sekhon 2021). V
makes it narrow where values hardly vary, as errors of a good model do.

99th percentiles. A share known to be p under the hypothesis "the percentile is x" is tested by a beta-binomial mixture at every bucket's
edge; edges that are not refused bound the percentile of an arm (Howard and Ramdas 2022), to a bucket's width. Each arm's bounds take half
of the error.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.manifest import Metric
from millrace_rollout_controller.ratio import log_evidence
from millrace_rollout_controller.state import ComparisonView

P99 = 0.99
MAX_LATENCY_MS = 600_000.0
BETS = 0.95 * 2.0 ** -np.arange(14)
"""The mixture's l, from bold bets for few values to careful ones for a million."""
WEIGHTS = np.array([1.0 / ((k + 1) * (k + 2)) for k in range(len(BETS))])
_LOG_WEIGHTS = np.log(WEIGHTS / WEIGHTS.sum())
_PSI = -np.log1p(-BETS) - BETS
_BISECTIONS = 60


class Comparison(BaseModel):
    """What is known of one metric of means."""

    weight: float = 0.0
    total: float = 0.0
    """Sum of weighted differences."""
    variance: float = 0.0
    candidate: Sums = Sums()
    stable: Sums = Sums()
    pending_candidate: Sums = Sums()
    pending_stable: Sums = Sums()
    """A batch that still lacks one arm."""


def absorb(
    known: Mapping[str, Comparison], candidate: Counts, stable: Counts, metrics: Sequence[Metric]
) -> dict[str, Comparison]:
    """What is known after one more batch."""
    return {
        metric: _absorb(known.get(metric, Comparison()), values(metric, candidate), values(metric, stable))
        for metric in metrics
        if metric != "latencyP99Ms"
    }


def values(metric: Metric, counts: Counts) -> Sums:
    """Values in [0, 1] of a metric of means."""
    match metric:
        case "errorRate":
            return Sums(n=counts.requests, total=counts.errors, square=counts.errors)
        case "outcome/accuracy":
            return Sums(n=counts.outcomes, total=counts.correct, square=counts.correct)
        case "outcome/brier":
            return Sums(n=counts.outcomes, total=counts.brier_sum, square=counts.brier_square_sum)
    raise ValueError(metric)


def _absorb(known: Comparison, candidate: Sums, stable: Sums) -> Comparison:
    candidate, stable = known.pending_candidate.plus(candidate), known.pending_stable.plus(stable)
    if candidate.n < 1 or stable.n < 1:
        return known.model_copy(update={"pending_candidate": candidate, "pending_stable": stable})
    n = candidate.n + stable.n
    weight = candidate.n * stable.n / n
    variance = (stable.n / n) ** 2 * _spread(candidate, _expected(known.candidate))
    variance += (candidate.n / n) ** 2 * _spread(stable, _expected(known.stable))
    return Comparison(
        weight=known.weight + weight,
        total=known.total + weight * (candidate.mean - stable.mean),
        variance=known.variance + variance,
        candidate=known.candidate.plus(candidate),
        stable=known.stable.plus(stable),
    )


def _expected(before: Sums) -> float:
    """The mean believed before the batch; half a value of doubt keeps it inside."""
    return (before.total + 0.5) / (before.n + 1.0)


def _spread(sums: Sums, center: float) -> float:
    """Sum of squared distances from `center`."""
    return max(0.0, sums.square - 2.0 * center * sums.total + sums.n * center**2)


def results(
    known: Mapping[str, Comparison],
    candidate: Counts,
    stable: Counts,
    metrics: Sequence[Metric],
    confidence: float,
) -> list[ComparisonView]:
    """Every metric with data of both arms.

    Args:
        known: means.
        candidate: all figures of the trial, for the percentile.
        stable: of the same time.
        metrics: which to report.
        confidence: of each metric by itself.
    """
    found: list[ComparisonView] = []
    for metric in metrics:
        view = (
            _percentile_view(candidate, stable, confidence)
            if metric == "latencyP99Ms"
            else _mean_view(metric, known.get(metric, Comparison()), confidence)
        )
        if view is not None:
            found.append(view)
    return found


def _mean_view(metric: Metric, known: Comparison, confidence: float) -> ComparisonView | None:
    if not known.weight:
        return None
    lower, upper = bounds(known, confidence)
    higher_is_better = metric == "outcome/accuracy"
    return ComparisonView(
        metric=metric,
        candidate=known.candidate.mean,
        stable=known.stable.mean,
        candidate_samples=int(known.candidate.n),
        stable_samples=int(known.stable.n),
        lower=lower,
        upper=upper,
        confidence=confidence,
        better="candidate" if (lower > 0 if higher_is_better else upper < 0)
        else "stable" if (upper < 0 if higher_is_better else lower > 0)
        else "undecided",
    )  # fmt: skip


def bounds(known: Comparison, confidence: float) -> tuple[float, float]:
    """Bounds of the weighted mean difference, candidate minus stable, that hold at every look together."""
    radius = _radius(known.variance, math.log(2.0 / (1.0 - confidence))) / known.weight
    middle = known.total / known.weight
    return max(-1.0, middle - radius), min(1.0, middle + radius)


def _radius(variance: float, needed: float) -> float:
    """Smallest deviation whose mixture reaches e^needed; the mixture rises with it."""

    def reached(deviation: float) -> bool:
        logs = _LOG_WEIGHTS + BETS * deviation - _PSI * variance
        top = float(np.max(logs))
        return top + math.log(float(np.sum(np.exp(logs - top)))) >= needed

    low, high = 0.0, 1.0
    while not reached(high):
        high *= 2.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _percentile_view(candidate: Counts, stable: Counts, confidence: float) -> ComparisonView | None:
    one = _percentile_bounds(candidate.latency, (1.0 - confidence) / 2.0)
    two = _percentile_bounds(stable.latency, (1.0 - confidence) / 2.0)
    if one is None or two is None:
        return None
    lower, upper = one[0] - two[2], one[2] - two[0]
    return ComparisonView(
        metric="latencyP99Ms",
        candidate=one[1],
        stable=two[1],
        candidate_samples=sum(candidate.latency.values()),
        stable_samples=sum(stable.latency.values()),
        lower=lower,
        upper=upper,
        confidence=confidence,
        better="candidate" if upper < 0 else "stable" if lower > 0 else "undecided",
    )


def _percentile_bounds(latency: Mapping[str, int], alpha: float) -> tuple[float, float, float] | None:
    """Lower bound, estimate and upper bound of the 99th percentile in ms; None without requests."""
    edges = sorted((min(float(edge), MAX_LATENCY_MS), count) for edge, count in latency.items() if count > 0)
    n = sum(count for _, count in edges)
    if not n:
        return None
    lower, estimate, upper, below = 0.0, None, MAX_LATENCY_MS, 0
    for edge, count in edges:
        below += count
        refused = log_evidence(below, n, P99) >= math.log(1.0 / alpha)
        if estimate is None and below >= P99 * n:
            estimate = edge
        if refused and below < P99 * n:
            # The next request seen lies in a bucket that begins here or later.
            lower = edge
        if refused and below > P99 * n:
            upper = min(upper, edge)
    return lower, estimate if estimate is not None else edges[-1][0], upper
