"""Values of outcomes beside the label: which the drift monitor has to track, how they are moved to [0, 1], and the test in the limit.

With a `valueRange` the drift monitor counts what lies beyond as the bound, so every value is in the range and the e-processes of the other gates
hold exactly. Without a range no test can be exact; then Waudby-Smith and others' asymptotic one is used (`millrace_kit.asymptotic`), with stable's
variance for the candidate where that is larger: rare large values (purchases) are often still missing among the candidate's few.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from pydantic import BaseModel

from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.shadow_pairs import WHOLE

ROOT, SQUARE = "outcome/rmse", "outcome/mse"
_MOST = 600.0
"""Logarithm beyond which evidence decides nothing more."""


class Valued(Protocol):
    """A gate, or the goal of an A/B test: a metric and how its values are known."""

    @property
    def metric(self) -> str | None:
        """Its name in manifests."""

    @property
    def better(self) -> str | None:
        """Of a business/ metric: Higher or Lower."""

    @property
    def value_range(self) -> tuple[float, ...] | None:
        """The smallest and the largest value; None for values of any size."""

    @property
    def segment(self) -> str | None:
        """What tells groups of predictions apart."""

    @property
    def is_value(self) -> bool:
        """About values of any unit, not of 0 to 1."""


def is_value(metric: str | None) -> bool:
    """Whether a metric has values of any unit, not of 0 to 1."""
    return (metric or "").startswith("business/") or metric in {"outcome/mae", ROOT}


def higher_is_better(metric: str | None, better: str | None) -> bool:
    """Whether larger values of a metric are better."""
    return metric == "outcome/accuracy" or better == "Higher"


def is_root(gate: Valued) -> bool:
    """Whether the metric is the root of a mean, which is what is tracked."""
    return gate.metric == ROOT


class Tracked(NamedTuple):
    """One value of each outcome, as the drift monitor keeps its sums."""

    metric: str
    lower: float | None = None
    upper: float | None = None
    segment: str = ""

    @property
    def key(self) -> str:
        """Tells it from the model's others."""
        return json.dumps(self)


@dataclass(frozen=True, slots=True)
class Goal:
    """One metric that an A/B test or a shadow run compares."""

    metric: str
    better: str | None = None
    """Of a business/ metric: Higher or Lower."""
    value_range: tuple[float, ...] | None = None
    segment: str | None = None

    @property
    def is_value(self) -> bool:
        """About values of any unit, not of 0 to 1."""
        return is_value(self.metric)

    @property
    def is_asymptotic(self) -> bool:
        """Compared in the limit of many values: nobody said how large they may be."""
        return self.is_value and self.value_range is None

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return higher_is_better(self.metric, self.better)

    @property
    def key(self) -> str:
        """Tells it from another goal, and from the same one with other bounds or segments."""
        value = tracked(self)
        return self.metric if value is None else value.key


class Limit(BaseModel):
    """What a test in the limit says; both are logarithms of evidence, 0 before it starts."""

    sharpest: float = 0.0
    """Fixed at the start."""
    against: float = 0.0
    for_it: float = 0.0


def tracked(gate: Valued) -> Tracked | None:
    """What a gate needs to be tracked; None for one that needs nothing."""
    if not gate.is_value and gate.segment is None:
        return None
    lower, upper = gate.value_range if gate.value_range is not None else (None, None)
    metric = gate.metric or ""
    if metric == ROOT:
        metric, upper = SQUARE, None if upper is None else upper**2
    return Tracked(metric, lower, upper, gate.segment or "")


def values(value: Tracked, counts: Counts) -> Sums:
    """The value's sums over all segments, moved to [0, 1] where it has a range."""
    sums = counts.values.get(value.key, {}).get(WHOLE, Sums())
    if value.lower is None or value.upper is None or not sums.n:
        return sums
    lower, wide = value.lower, value.upper - value.lower
    total = min(max((sums.total - sums.n * lower) / wide, 0.0), sums.n)
    square = (sums.square - 2.0 * lower * sums.total + sums.n * lower**2) / wide**2
    return Sums(n=sums.n, total=total, square=min(max(square, total**2 / sums.n), total))


def values_minus(now: Mapping[str, Sums], before: Mapping[str, Sums]) -> dict[str, Sums]:
    """The difference by segment; nothing of one whose count fell, as then the sums began anew."""
    found: dict[str, Sums] = {}
    for segment, sums in now.items():
        old = before.get(segment, Sums())
        if sums.n > old.n:
            square = max(sums.square - old.square, 0.0)
            found[segment] = Sums(n=sums.n - old.n, total=sums.total - old.total, square=square)
    return found


def width(gate: Valued) -> float:
    """Width of the range; 1 for what is not moved."""
    return 1.0 if gate.value_range is None else gate.value_range[1] - gate.value_range[0]


def scaled_bound(gate: Valued, bound: float) -> float:
    """A bound where the values were moved to; of a root mean square, of the squares."""
    power = 2 if is_root(gate) else 1
    lowest = gate.value_range[0] if gate.value_range is not None else 0.0
    return float(((bound - lowest) / width(gate)) ** power)


def unscaled(gate: Valued, mean: float) -> float:
    """A mean in the metric's own unit."""
    if is_root(gate):
        mean = max(mean, 0.0) ** 0.5
    lowest = gate.value_range[0] if gate.value_range is not None else 0.0
    return mean * width(gate) + lowest


def kind(limit: Limit | None, *, asymptotic: bool) -> str:
    """What is to be known of the test besides, for people; empty for the exact one."""
    if not asymptotic:
        return ""
    started = limit is not None and limit.sharpest > 0.0
    return f"; no valueRange, so asymptotic{'' if started else f', from {START} values of each version on'}"


def in_the_limit(
    limit: Limit | None, candidate: Sums, stable: Sums, ratio: float | None, *, loss: float, margin: float
) -> Limit:
    """Evidence of values without a range.

    Args:
        limit: what was known before.
        candidate: all values of the candidate.
        stable: all values of stable of the same time.
        ratio: sum over batches of the candidate's count squared by stable's; None for a bound.
        loss: sum of how much worse each of the candidate's values is than stable, or than the bound.
        margin: sum of what is allowed.
    """
    limit = limit or Limit()
    if candidate.n < START or (ratio is not None and stable.n < START):
        return limit
    mine, theirs = (
        float(value_variance(*np.array([s.n, s.total, s.square]))) if s.n >= 2 else 0.0 for s in (candidate, stable)
    )
    variance = max(mine, theirs) * candidate.n + theirs * (ratio or 0.0)
    sharpest = limit.sharpest or float(tuned(np.asarray(variance)))
    against, for_it = log_evidence(np.array([loss, margin - loss]), np.asarray(variance), np.asarray(sharpest))
    return Limit(sharpest=sharpest, against=min(float(against), _MOST), for_it=min(float(for_it), _MOST))
