"""What a plan cannot tell of a gate, and why; and what latencies have to be taken for, so that it can tell of some. Pure."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

SPREAD = "latencySpread"
"""Baseline's name: the standard deviation of a latency's logarithm."""
TO_LEARN = 10.0
"""Stable's requests beyond its percentile that are seen before a comparison of latencies begins."""
DRIFT_VALUES = 5.5
"""Predictions, times the square of the bound, until `drift/prediction` passes equal versions at even weights (measured)."""


def slower_shares(slow: float, margin: float, spread: float) -> tuple[float, float]:
    """Share of a candidate's requests above stable's percentile, as a comparison of latencies counts them.

    Args:
        slow: share of stable's own requests above it.
        margin: part by which the percentile may be longer.
        spread: standard deviation of the logarithm of latencies, taken to be normal.

    Returns:
        An equal version's above `1 + margin` times the percentile, and above the percentile that of a version slower by `margin`.
    """
    normal = NormalDist()
    edge, shift = normal.inv_cdf(1.0 - slow), math.log1p(margin) / spread
    return 1.0 - normal.cdf(edge + shift), 1.0 - normal.cdf(edge - shift)


def learning(slow: float, weight: float) -> int:
    """Candidate requests that pass while stable's percentile is learned, at a weight in percent."""
    return int(TO_LEARN / slow * weight / (100.0 - weight)) + 1


def reason(gate: Mapping[str, Any]) -> str:
    """Why a gate is not planned, with what can be said instead."""
    metric = gate.get("metric")
    limit = gate.get("failureLimit", 3)
    if metric is None:
        return f"one number of Prometheus each time it is asked, not a number of requests: passes at once, fails after {limit} answers in a row"
    if metric == "throughput":
        return f"windows of 10 s, not requests: passes after the first, fails after {limit} in a row"
    if metric == "drift/prediction":
        about = DRIFT_VALUES / float(gate["max"]) ** 2
        return f"how predictions are distributed decides; equal versions at even weights pass after about {about:,.0f} of the candidate's"
    if metric == "shadow/maxAbsDiff":
        return "how answers differ decides; where none does it passes after about 412 compared rows"
    if metric in {"shadow/labelFlipRate", "shadow/scoreShift"}:
        return f"how answers differ decides; where none does it passes after about {4.0 / float(gate['max']):,.0f} compared rows"
    return "it has no fixed number of requests"
