"""Values of outcomes beside the label: which the drift monitor has to track, how they are moved to [0, 1], and the test in the limit.

With a `valueRange` the drift monitor counts what lies beyond as the bound, so every value is in the range and the e-processes of the other gates
hold exactly. Without a range no test can be exact; then Waudby-Smith and others' asymptotic one is used (`millrace_kit.asymptotic`), with stable's
variance for the candidate where that is larger: rare large values (purchases) are often still missing among the candidate's few.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from pydantic import BaseModel

from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.shadow_pairs import WHOLE

if TYPE_CHECKING:
    from millrace_rollout_controller.manifest import Gate, Rollout

_MOST = 600.0
"""Logarithm beyond which evidence decides nothing more."""


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


class Limit(BaseModel):
    """What a test in the limit says; both are logarithms of evidence, 0 before it starts."""

    sharpest: float = 0.0
    """Fixed at the start."""
    against: float = 0.0
    for_it: float = 0.0


def tracked(gate: "Gate") -> Tracked | None:
    """What a gate needs to be tracked; None for one that needs nothing."""
    if not gate.is_value and gate.segment is None:
        return None
    lower, upper = gate.value_range if gate.value_range is not None else (None, None)
    metric = gate.metric or ""
    if metric == "outcome/rmse":
        metric, upper = "outcome/mse", None if upper is None else upper**2
    return Tracked(metric, lower, upper, gate.segment or "")


def tracked_values(rollout: "Rollout") -> frozenset[Tracked]:
    """What the gates of a rollout need to be tracked."""
    return frozenset(value for gate in rollout.gates if (value := tracked(gate)) is not None)


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


def width(gate: "Gate") -> float:
    """Width of the range; 1 for what is not moved."""
    return 1.0 if gate.value_range is None else gate.value_range[1] - gate.value_range[0]


def scaled_bound(gate: "Gate", bound: float) -> float:
    """A bound where the values were moved to; of a root mean square, of the squares."""
    power = 2 if gate.metric == "outcome/rmse" else 1
    lowest = gate.value_range[0] if gate.value_range is not None else 0.0
    return float(((bound - lowest) / width(gate)) ** power)


def unscaled(gate: "Gate", mean: float) -> float:
    """A mean in the metric's own unit."""
    if gate.metric == "outcome/rmse":
        mean = max(mean, 0.0) ** 0.5
    lowest = gate.value_range[0] if gate.value_range is not None else 0.0
    return mean * width(gate) + lowest


def kind(gate: "Gate", limit: Limit | None) -> str:
    """What is to be known of the test besides, for people; empty for the exact one."""
    if not gate.is_asymptotic:
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
