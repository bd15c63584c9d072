"""What a gate counts: values in [0, 1] of each arm, made from running sums. Pure.

Latencies are known to the width of a histogram bucket (empty buckets are not sent, so lower edges are not known): a request whose bucket ends
above the bound counts as slow where that makes passing harder, and one whose bucket ends more than a bucket's width above it where that
makes failing easier.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from millrace_rollout_controller import value_gates
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.value_gates import Valued, tracked, values

QUANTILES = {"latencyP50Ms": 0.5, "latencyP95Ms": 0.95, "latencyP99Ms": 0.99}
"""Share of requests at or below each latency metric."""
BUCKET_WIDTH = 1.1
"""Most that a latency bucket's upper edge is above its lower one; the gateways' are 5 % wide."""
SLOW_TO_LEARN = 10.0
"""Requests of stable beyond its percentile that are seen before the percentile is believed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch, as a gate's failing and as its passing side see it."""

    failing: Sums
    passing: Sums
    stable: Sums


def slow_share(gate: Gate) -> float:
    """Share of requests that may be slower than the gate's percentile."""
    return 1.0 - QUANTILES[gate.metric or ""]


def bound(gate: Gate) -> float:
    """What the tests of a gate with `max` or `min` are about."""
    if gate.metric in QUANTILES:
        return slow_share(gate)
    return value_gates.scaled_bound(gate, (gate.max if gate.max is not None else gate.min) or 0.0)


def allowed_loss(gate: Gate) -> float:
    """The loss that must not be exceeded in a comparison; one of latencies has its margin in the threshold."""
    return 0.0 if gate.metric in QUANTILES else (gate.margin or 0.0) / value_gates.width(gate)


def loss(gate: Gate, mean: float, gap: float) -> float:
    """How much worse than stable the candidate seems to be.

    Args:
        gate: a comparison.
        mean: of the candidate's values.
        gap: by how much it is above stable's at the same time.
    """
    if value_gates.is_root(gate):
        gap = math.sqrt(max(mean, 0.0)) - math.sqrt(max(mean - gap, 0.0))
    return -gap if gate.higher_is_better else gap


def measure(gate: Gate, candidate: Counts, stable: Counts, threshold: float | None = None) -> Measured:
    """The gate's values in one batch.

    Args:
        gate: whose.
        candidate: what arrived of the candidate.
        stable: what arrived of stable in the same time.
        threshold: of a latency comparison: what stable's percentile is believed to be, in ms; None while it is not known, then nothing counts.
    """
    if gate.metric in QUANTILES:
        if gate.compare is None:
            limit = gate.max or 0.0
            failing = slower(candidate.latency, limit * BUCKET_WIDTH)
            return Measured(failing, slower(candidate.latency, limit), slower(stable.latency, limit * BUCKET_WIDTH))
        if threshold is None:
            return Measured(Sums(), Sums(), Sums())
        passing = slower(candidate.latency, threshold * (1.0 + (gate.margin or 0.0)))
        return Measured(slower(candidate.latency, threshold), passing, slower(stable.latency, threshold))
    mine = means(gate, candidate)
    return Measured(mine, mine, means(gate, stable))


def means(gate: Valued, counts: Counts) -> Sums:
    """The sums of a metric of means: values in [0, 1], but those of any unit without a range."""
    if (value := tracked(gate)) is not None:
        return values(value, counts)
    match gate.metric:
        case "errorRate":
            return Sums(n=counts.requests, total=counts.errors, square=counts.errors)
        case "outcome/accuracy":
            return Sums(n=counts.outcomes, total=counts.correct, square=counts.correct)
        case "outcome/brier":
            return Sums(n=counts.outcomes, total=counts.brier_sum, square=counts.brier_square_sum)
    return Sums()


def slower(latency: Mapping[str, int], bound_ms: float) -> Sums:
    """Requests, 1 for those whose bucket ends above `bound_ms`."""
    n = float(sum(latency.values()))
    slow = float(sum(count for upper, count in latency.items() if float(upper) > bound_ms))
    return Sums(n=n, total=slow, square=slow)


def percentile(gate: Gate, latency: Mapping[str, int]) -> float | None:
    """Upper edge of the bucket with the gate's percentile, in ms; None while there are too few requests to know it."""
    n, share = sum(latency.values()), slow_share(gate)
    if n * share < SLOW_TO_LEARN:
        return None
    finite = sorted((float(edge) for edge in latency if float(edge) < float("inf")), reverse=True)
    found = None
    for edge in finite:
        # The smallest edge above which no more than the allowed share lies, else the largest there is.
        if found is not None and slower(latency, edge).total > n * share:
            break
        found = edge
    return found
