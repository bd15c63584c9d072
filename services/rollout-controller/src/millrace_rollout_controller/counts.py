"""Figures as sums, so that they add up and subtract."""

from pydantic import BaseModel

from millrace_rollout_controller import shadow_pairs
from millrace_rollout_controller.shadow_pairs import Pairs


class Counts(BaseModel):
    """Figures of one version; sums, so that they add up and subtract."""

    requests: int = 0
    errors: int = 0
    latency: dict[str, int] = {}
    """Requests by upper bound of their latency bucket in ms (`inf` for the last)."""
    outcomes: int = 0
    correct: int = 0
    brier_sum: float = 0.0
    brier_square_sum: float = 0.0
    scores: dict[str, int] = {}
    """Predictions by bucket of their score; whole numbers in the order of the scores."""
    shadow: dict[str, Pairs] = {}
    """Rows that stable was asked too, by segment; empty is all of them."""
    values: "dict[str, dict[str, Sums]]" = {}
    """Of tracked values of outcomes, by the value's key and by segment; empty is all of them."""

    def plus(self, other: "Counts") -> "Counts":
        """The sum."""
        return Counts(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            latency=_plus(self.latency, other.latency),
            outcomes=self.outcomes + other.outcomes,
            correct=self.correct + other.correct,
            brier_sum=self.brier_sum + other.brier_sum,
            brier_square_sum=self.brier_square_sum + other.brier_square_sum,
            scores=_plus(self.scores, other.scores),
            shadow=shadow_pairs.plus(self.shadow, other.shadow),
            values={
                key: _sums_plus(self.values.get(key, {}), other.values.get(key, {}))
                for key in self.values.keys() | other.values.keys()
            },
        )


def _sums_plus(one: "dict[str, Sums]", other: "dict[str, Sums]") -> "dict[str, Sums]":
    return {name: one.get(name, Sums()).plus(other.get(name, Sums())) for name in one.keys() | other.keys()}


def _plus(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    total = dict(one)
    for bucket, count in other.items():
        total[bucket] = total.get(bucket, 0) + count
    return total


class Sums(BaseModel):
    """Count, sum and sum of squares of a metric's values."""

    n: float = 0.0
    total: float = 0.0
    square: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """The sum."""
        return Sums(n=self.n + other.n, total=self.total + other.total, square=self.square + other.square)

    @property
    def mean(self) -> float:
        """Mean value; 0 without values."""
        return self.total / self.n if self.n else 0.0
