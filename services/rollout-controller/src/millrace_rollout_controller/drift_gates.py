"""The gate `drift/prediction`: are the candidate's predictions distributed as stable's are, on the same requests' time? Pure.

Scores come as counts of fine buckets that the drift monitor never changes. Stable's first scores freeze the cuts, about equally many scores
between each two. At every cut the shares at or below it are compared batch by batch, as any two arms are, so what moves both versions' traffic
alike cancels. The gate fails when the mean of these e-processes in both directions refutes "no difference" and the largest difference seen
(the Kolmogorov-Smirnov distance over the cuts) exceeds `max`. It passes when at every cut both "higher by `max` or more" and "lower by `max`
or more" are refuted: an intersection of tests, which needs no correction.
"""

import math
from collections.abc import Mapping

import numpy as np
from millrace_kit.power import BURN_IN, MEMORY
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Array, Sample, log_mean, two_arms
from pydantic import BaseModel

from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.state import GateView, Verdict

GROUPS = 8
"""Groups of scores with about equal shares of stable's."""
LEARN = 200
"""Scores of stable that freeze the cuts; they are not bet on."""


class DriftState(BaseModel):
    """What is known of the difference; one entry for every cut."""

    learning: dict[str, int] = {}
    cuts: list[int] = []
    fail_up: list[list[float]] = []
    """Logarithms of the products against "the candidate's share below the cut is at most stable's"."""
    fail_down: list[list[float]] = []
    pass_up: list[list[float]] = []
    """Logarithms against "the share is higher by `max` or more"."""
    pass_down: list[list[float]] = []
    candidate_n: float = 0.0
    stable_n: float = 0.0
    gaps: list[float] = []
    """Sums over batches of the candidate's count times the difference of the shares."""
    memory_n: float = 0.0
    memory: list[float] = []
    """Stable's scores below each cut, of those remembered."""
    pending_candidate: list[float] = []
    pending_stable: list[float] = []
    """A batch that still lacks one arm: scores below each cut, and all of them last."""


def absorb(state: DriftState, candidate: Mapping[str, int], stable: Mapping[str, int], bound: float) -> DriftState:
    """Learn the cuts, then bet on what arrived.

    Args:
        state: before.
        candidate: scores by bucket, which are whole numbers in the order of the scores.
        stable: the same.
        bound: the gate's `max`.
    """
    if not state.cuts:
        return _learn(state, stable)
    mine = _below(state.cuts, candidate) + np.array(state.pending_candidate or [0.0] * (len(state.cuts) + 1))
    theirs = _below(state.cuts, stable) + np.array(state.pending_stable or [0.0] * (len(state.cuts) + 1))
    if mine[-1] < 1 or theirs[-1] < 1:
        return state.model_copy(update={"pending_candidate": mine.tolist(), "pending_stable": theirs.tolist()})
    return _bet(state, mine, theirs, bound)


def _learn(state: DriftState, stable: Mapping[str, int]) -> DriftState:
    learning = dict(state.learning)
    for bucket, count in stable.items():
        learning[bucket] = learning.get(bucket, 0) + count
    total = sum(learning.values())
    if total < LEARN:
        return state.model_copy(update={"learning": learning})
    cuts: list[int] = []
    seen = 0
    buckets = sorted((int(bucket), count) for bucket, count in learning.items() if count)
    # The last bucket is no cut: everything lies at or below it. A model of one answer has a cut there all the same.
    for place, count in buckets[:-1] or buckets:
        seen += count
        if seen * GROUPS >= total * (len(cuts) + 1):
            cuts.append(place)
    cuts = cuts or [buckets[0][0]]
    zeros = [[0.0] * len(ODDS_ABOVE) for _ in cuts]
    update = {"fail_up": zeros, "fail_down": zeros, "pass_up": zeros, "pass_down": zeros}
    rest = {"learning": {}, "cuts": cuts, "gaps": [0.0] * len(cuts), "memory": [0.0] * len(cuts)}
    return state.model_copy(update=update | rest)


def _below(cuts: list[int], scores: Mapping[str, int]) -> Array:
    """Scores at or below each cut, and all of them last."""
    below = [float(sum(count for bucket, count in scores.items() if int(bucket) <= cut)) for cut in cuts]
    return np.array([*below, float(sum(scores.values()))])


def _bet(state: DriftState, mine: Array, theirs: Array, bound: float) -> DriftState:
    n, m = float(mine[-1]), float(theirs[-1])
    update: dict[str, object] = {
        "pending_candidate": [],
        "pending_stable": [],
        "candidate_n": state.candidate_n + n,
        "stable_n": state.stable_n + m,
        "gaps": (np.array(state.gaps) + n * (mine[:-1] / n - theirs[:-1] / m)).tolist(),
    }
    if state.memory_n >= BURN_IN:
        shape = mine[:-1].shape
        arms = (
            Sample(np.full(shape, n), mine[:-1], mine[:-1]),
            Sample(np.full(shape, m), theirs[:-1], theirs[:-1]),
        )
        mean = (np.array(state.memory) + 0.5) / (state.memory_n + 1.0)
        update |= {
            "fail_up": _add(state.fail_up, two_arms(*arms, mean, 0.0, ODDS_ABOVE)),
            "fail_down": _add(state.fail_down, two_arms(*arms, mean, 0.0, ODDS_BELOW)),
            "pass_up": _add(state.pass_up, two_arms(*arms, mean, bound, ODDS_BELOW)),
            "pass_down": _add(state.pass_down, two_arms(*arms, mean, -bound, ODDS_ABOVE)),
        }
    fade = min(1.0, MEMORY / (state.memory_n + m))
    update["memory_n"] = (state.memory_n + m) * fade
    update["memory"] = ((np.array(state.memory) + theirs[:-1]) * fade).tolist()
    return state.model_copy(update=update)


def _add(logs: list[list[float]], grew: Array) -> list[list[float]]:
    # The bound keeps the numbers finite, as in the other gates.
    found: list[list[float]] = np.clip(np.array(logs) + grew, -600.0, 600.0).tolist()
    return found


def log_fail(state: DriftState) -> float:
    """Logarithm of the mean of all cuts' e-processes in both directions."""
    return float(log_mean(np.array([*state.fail_up, *state.fail_down]).ravel()))


def log_pass(state: DriftState) -> float:
    """Logarithm of the weakest of the tests that all have to be won."""
    return float(np.min(log_mean(np.array([*state.pass_up, *state.pass_down]))))


def distance(state: DriftState) -> float:
    """Largest difference of the shares at or below a cut, over batches of the same time."""
    return float(np.max(np.abs(state.gaps))) / state.candidate_n if state.candidate_n else 0.0


def judge(gate: Gate, state: DriftState) -> GateView:
    """The verdict on what is known now."""
    needed, bound = -math.log(1.0 - gate.level), gate.max or 0.0
    verdict: Verdict = "undecided"
    if not state.cuts:
        words = f"{sum(state.learning.values())} of {LEARN} scores of stable that set the cuts"
    elif not state.candidate_n:
        words = "no data of the candidate yet"
    else:
        against, for_it, seen = log_fail(state), log_pass(state), distance(state)
        words = (
            f"distance {seen:.4f} over {int(state.candidate_n)} candidate and {int(state.stable_n)} stable predictions at the same time; "
            f"e-values {math.exp(min(for_it, 690.0)):.3g} for and {math.exp(min(against, 690.0)):.3g} against, {math.exp(needed):.3g} needed"
        )
        if against >= needed and seen > bound:
            verdict = "fail"
        elif for_it >= needed and seen <= bound:
            verdict = "pass"
    return GateView(
        gate=gate.text,
        verdict=verdict,
        evidence=words,
        candidate_samples=int(state.candidate_n),
        stable_samples=int(state.stable_n),
    )
