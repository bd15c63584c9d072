"""Traffic that follows the result of an A/B test (`abTest.allocation: Thompson`). Pure; part of the reconciler.

Thompson sampling gives each caller to a version with the chance that this version is the better one, given what is known. Callers are split by a
hash, so that chance is the weight itself, and nothing is drawn. It comes from the differences of values that arrived at the same time
(`experiments`): their weighted sum is about normal with the variance seen, so what moves both versions alike (weather, hour of day) moves no weight,
which totals of each version would do as soon as their shares change.
"""

import math
from datetime import timedelta

from millrace_rollout_controller.comparisons import Comparison, variance_in_the_limit
from millrace_rollout_controller.manifest import Bandit
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.value_gates import Goal

LEAST_MOVE = 1.0
"""Percent below which a weight stays: callers change sides with every move."""


def chance_better(known: Comparison, goal: Goal) -> float:
    """Chance that the candidate is better, by a flat prior on the difference of the means; 0.5 while nothing varies.

    Roots of means are in the order of the means.
    """
    variance = variance_in_the_limit(known) if goal.is_asymptotic else known.variance
    if variance <= 0.0:
        return 0.5
    deviations = known.total / math.sqrt(variance)
    if not goal.higher_is_better:
        deviations = -deviations
    return 0.5 * math.erfc(-deviations / math.sqrt(2.0))


def next_weight(weight: float, chance: float, block: Bandit) -> float:
    """The candidate's next percent: the chance, between the bounds of both versions, at most `maxChange` away.

    Args:
        weight: percent now.
        chance: that the candidate is better.
        block: the bounds.
    """
    wanted = min(max(100.0 * chance, block.min_weight), 100.0 - block.min_weight)
    moved = min(max(wanted, weight - block.max_change), weight + block.max_change)
    return weight if abs(moved - weight) < LEAST_MOVE else round(moved, 2)


def allocated(d: Draft) -> float | None:
    """The weight that the result asks for now; None where weights do not follow it."""
    s, block = d.status, d.spec.rollout.ab_test
    if block is None or block.allocation != "Thompson" or s.step != 0:
        return None
    bandit = block.bandit or Bandit()
    since = s.allocated_at or s.step_since
    due = since is not None and d.now - since >= timedelta(seconds=seconds(bandit.interval, "interval"))
    if not due or s.paused or s.mismatch or d.evidence.trial != s.trial:
        return s.weight
    goal = block.as_goal
    known = d.evidence.comparisons.get(goal.key, Comparison())
    if min(known.candidate.n, known.stable.n) < bandit.min_samples:
        return s.weight
    return next_weight(s.weight, chance_better(known, goal), bandit)
