"""How much a gate needs to see: many rollouts at once through the very tests it uses. Seeded, so the same question has the same answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace_kit import asymptotic, group_sequential
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Array, Sample, log_mean, one_arm, two_arms

BURN_IN = 30
"""Values of stable that only teach its mean, before the first bet of a comparison."""
MEMORY = 1000.0
"""Values of stable its mean is estimated from; older ones fade."""
RUNS = 200
LOOKS = 120
POWER = 0.8
"""Share of rollouts that have the verdict after the answer's number of values."""
MOST = 5_000_000
"""Candidate values beyond which no answer is looked for."""
SPREAD = 4.0
"""Pseudo-counts of the Beta distribution that squared errors are taken from."""
Draw = Callable[[float], Sample]


@dataclass(frozen=True, slots=True)
class Claim:
    """A gate as its tests see it: about the mean of values in [0, 1]."""

    bound: float | None = None
    """Of one arm; None for a comparison."""
    margin: float | None = None
    """Of a comparison: how much worse the candidate's mean may be."""
    higher_is_better: bool = False
    binary: bool = True
    """Every value is 0 or 1."""
    alpha: float = 0.05
    steps: int = 1
    """Steps of the rollout; half of the power to fail is kept for the later ones."""
    most: int | None = None
    """Declared maximum of candidate values; then passing has a few looks instead of one after every value."""


class Plays:
    """Rollouts side by side; `absorb` is one look at all of them."""

    def __init__(self, claim: Claim, runs: int = RUNS) -> None:
        self._claim = claim
        self._needed = -math.log(claim.alpha)
        shape = runs, len(ODDS_ABOVE)
        self._fail_logs, self._pass_logs = np.zeros(shape), np.zeros(shape)
        self._memory_n, self._memory_total = np.zeros(runs), np.zeros(runs)
        self._n = np.zeros(runs)
        self._gap, self._ratio = np.zeros(runs), np.zeros(runs)
        self._total, self._square = np.zeros(runs), np.zeros(runs)
        self._stable_n, self._stable_total, self._stable_square = np.zeros(runs), np.zeros(runs), np.zeros(runs)
        self._looks = 0
        self._boundaries = group_sequential.planned_boundaries(claim.alpha) if claim.most else []
        self.failed: NDArray[np.bool_] = np.zeros(runs, bool)
        self.passed: NDArray[np.bool_] = np.zeros(runs, bool)
        """Whether the verdict was ever reached; the other one does not end a rollout here."""

    def absorb(self, candidate: Sample, stable: Sample) -> None:
        """One batch of every rollout."""
        better, worse = (ODDS_ABOVE, ODDS_BELOW) if self._claim.higher_is_better else (ODDS_BELOW, ODDS_ABOVE)
        self._n += candidate.n
        self._total += candidate.total
        self._square += candidate.square
        if self._claim.bound is not None:
            self._fail_logs += one_arm(candidate, self._claim.bound, worse)
            self._pass_logs += one_arm(candidate, self._claim.bound, better)
            self._judge(np.ones(len(self.failed), bool), self._total / self._n, self._claim.bound)
            return
        self._compare(candidate, stable, better, worse)

    def _compare(self, candidate: Sample, stable: Sample, better: Array, worse: Array) -> None:
        margin = self._claim.margin or 0.0
        sign = -1.0 if self._claim.higher_is_better else 1.0
        self._gap += candidate.n * (candidate.total / candidate.n - stable.total / stable.n)
        self._ratio += candidate.n**2 / stable.n
        self._stable_n += stable.n
        self._stable_total += stable.total
        self._stable_square += stable.square
        ready = (self._memory_n >= BURN_IN)[:, None]
        mean = (self._memory_total + 0.5) / (self._memory_n + 1.0)
        self._fail_logs += np.where(ready, two_arms(candidate, stable, mean, 0.0, worse), 0.0)
        self._pass_logs += np.where(ready, two_arms(candidate, stable, mean, sign * margin, better), 0.0)
        self._memory_n += stable.n
        self._memory_total += stable.total
        fade = np.minimum(1.0, MEMORY / self._memory_n)
        self._memory_n, self._memory_total = self._memory_n * fade, self._memory_total * fade
        loss = sign * self._gap / self._n
        self._judge(loss > margin, loss, margin)

    def _judge(self, far_enough: NDArray[np.bool_], loss: Array, limit: float) -> None:
        against = log_mean(self._fail_logs)
        if self._claim.steps > 1:
            against = np.logaddexp(against + math.log(0.5), math.log(0.5))
        self.failed |= (against >= self._needed) & far_enough
        right = loss <= limit if not (self._claim.bound is not None and self._claim.higher_is_better) else loss >= limit
        if self._claim.most is None:
            self.passed |= (log_mean(self._pass_logs) >= self._needed) & right
        elif self._looks < len(self._boundaries):
            self._look(loss, limit)

    def _look(self, loss: Array, limit: float) -> None:
        fraction = float(self._n[0]) / float(self._claim.most or 1)
        if fraction * group_sequential.LOOKS < self._looks + 1:
            return
        boundary = self._boundaries[self._looks]
        self._looks = int(min(fraction, 1.0) * group_sequential.LOOKS + 1e-9)
        shift = -limit if self._claim.higher_is_better else limit
        mine, theirs = (
            (self._n, self._total, self._square),
            (self._stable_n, self._stable_total, self._stable_square),
        )
        error = group_sequential.standard_error(mine, theirs, self._ratio, shift)
        self.passed |= (limit - loss) / error >= boundary


def needed(claim: Claim, candidate: float, stable: float, share: float, verdict: str, *, seed: int = 0) -> int | None:
    """Candidate values after which `POWER` of the rollouts have the verdict; None when `MOST` are not enough.

    Args:
        claim: the gate.
        candidate: true mean of the candidate.
        stable: true mean of stable; counts in comparisons only.
        share: the candidate's part of the traffic, more than 0 and less than 1.
        verdict: "pass" or "fail".
        seed: of the random numbers.
    """
    horizon = float(claim.most or 400)
    while True:
        found = _delay(claim, candidate, stable, share, verdict, horizon=horizon, rng=np.random.default_rng(seed))
        if found is not None or (claim.most is not None and verdict == "pass"):
            return found
        horizon *= 4.0
        if horizon > MOST:
            return None


def values_needed(
    room: float, deviation: float, ratio: float, alpha: float, *, beyond: float = 0.0, seed: int = 0
) -> int | None:
    """Candidate values of any unit after which `POWER` of the rollouts have the verdict by the test in the limit; None beyond `MOST`.

    Args:
        room: how far the mean is from what is to be refuted.
        deviation: standard deviation of one value.
        ratio: the candidate's values for each of stable's; 0 for a bound.
        alpha: chance of a wrong verdict.
        beyond: the estimate has to exceed this too, as a comparison's margin to fail.
        seed: of the random numbers.
    """
    # Sums of values by their normal approximation, at looks a tenth apart.
    looks = np.unique((asymptotic.START * 1.1 ** np.arange(120)).astype(int))
    looks = looks[looks <= MOST]
    rng, sums, before = np.random.default_rng(seed), np.zeros(RUNS), 0
    scale = deviation**2 * (1.0 + ratio)
    h = asymptotic.tuned(np.asarray(scale * looks[0]))
    passed = np.zeros(RUNS, bool)
    for n in looks:
        sums += rng.normal((n - before) * room, math.sqrt((n - before) * scale), RUNS)
        before = n
        passed |= (asymptotic.log_evidence(sums, np.asarray(scale * n), h) >= -math.log(alpha)) & (sums > beyond * n)
        if passed.mean() >= POWER:
            return int(n)
    return None


def _delay(
    claim: Claim,
    candidate: float,
    stable: float,
    share: float,
    verdict: str,
    *,
    horizon: float,
    rng: np.random.Generator,
) -> int | None:
    plays = Plays(claim)
    batch = max(1, round(horizon / LOOKS))
    other = max(1, round(batch * (1.0 - share) / share))
    for look in range(1, math.ceil(horizon / batch) + 1):
        mine = draw(rng, RUNS, batch, candidate, binary=claim.binary)
        theirs = draw(rng, RUNS, other if claim.bound is None else 1, stable, binary=claim.binary)
        plays.absorb(mine, theirs)
        done = plays.passed if verdict == "pass" else plays.failed
        if done.mean() >= POWER:
            return look * batch
    return None


def draw(rng: np.random.Generator, runs: int, n: int, mean: float, *, binary: bool) -> Sample:
    """One batch of `n` values for every rollout: 0 or 1, or sums of Beta values by their normal approximation."""
    size = np.full(runs, float(n))
    if binary:
        hits = rng.binomial(n, min(max(mean, 0.0), 1.0), runs).astype(float)
        return Sample(size, hits, hits)
    a, b = mean * SPREAD, (1.0 - mean) * SPREAD
    if n <= 20:
        values = rng.beta(a, b, (runs, n))
        return Sample(size, values.sum(1), (values**2).sum(1), binary=False)
    second = mean * (a + 1.0) / (SPREAD + 1.0)
    third = second * (a + 2.0) / (SPREAD + 2.0)
    variance = second - mean**2
    total = np.clip(rng.normal(n * mean, math.sqrt(n * variance), runs), 0.0, float(n))
    square = n * second + (third - mean * second) / variance * (total - n * mean)
    return Sample(size, total, np.clip(square, total**2 / n, total), binary=False)
