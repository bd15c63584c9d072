"""Candidate against stable, metric by metric, with bounds that hold at every look.

Means are `comparisons`. A goal with a segment has bounds of its own for every group of predictions: half of the error is for all predictions together,
half is split in equal parts over as many groups as can be told apart, as gates do, so all of the goal's bounds hold together.

99th percentiles. A share known to be p under the hypothesis "the percentile is x" is tested by a beta-binomial mixture at every bucket's
edge; edges that are not refused bound the percentile of an arm (Howard and Ramdas 2022), to a bucket's width. Each arm's bounds take half
of the error.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from millrace_kit.asymptotic import START

from millrace_rollout_controller import comparisons, measures, segment_gates, value_gates
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.goals import LATENCY
from millrace_rollout_controller.ratio import log_evidence
from millrace_rollout_controller.segment_gates import GROUPS
from millrace_rollout_controller.state import Better, ComparisonView
from millrace_rollout_controller.value_gates import Goal

P99 = 0.99
MAX_LATENCY_MS = 600_000.0
_NAMED = 6
"""Groups that are named in a sentence."""


def absorb(
    known: Mapping[str, Comparison], candidate: Counts, stable: Counts, goals: Sequence[Goal]
) -> dict[str, Comparison]:
    """What is known after one more batch, by the goals' keys."""
    return {
        goal.key: _absorb(goal, known.get(goal.key, Comparison()), candidate, stable)
        for goal in goals
        if goal.metric != LATENCY
    }


def _absorb(goal: Goal, known: Comparison, candidate: Counts, stable: Counts) -> Comparison:
    found = _add(goal, known, candidate, stable)
    if goal.segment is None:
        return found
    segments = dict(known.segments)
    for name, mine, theirs in segment_gates.groups(goal, candidate, stable):
        if name in segments or len(segments) < GROUPS:
            segments[name] = _add(goal, segments.get(name, Comparison()), mine, theirs)
    return found.model_copy(update={"segments": segments})


def _add(goal: Goal, known: Comparison, candidate: Counts, stable: Counts) -> Comparison:
    arms = measures.means(goal, candidate), measures.means(goal, stable)
    return comparisons.add(known, *arms, asymptotic=goal.is_asymptotic)


def results(
    known: Mapping[str, Comparison],
    candidate: Counts,
    stable: Counts,
    goals: Sequence[Goal],
    confidence: float,
) -> list[ComparisonView]:
    """Every metric with data of both arms; after a goal with a segment its groups.

    Args:
        known: means.
        candidate: all figures of the trial, for the percentile.
        stable: of the same time.
        goals: what to report.
        confidence: of each metric by itself, and of all bounds of one with a segment together.
    """
    found: list[ComparisonView] = []
    for goal in goals:
        if goal.metric == LATENCY:
            view = _percentile_view(candidate, stable, confidence)
            found += [view] if view is not None else []
        else:
            found += _mean_views(goal, known.get(goal.key, Comparison()), confidence)
    return found


def _mean_views(goal: Goal, known: Comparison, confidence: float) -> Iterator[ComparisonView]:
    alpha = 1.0 - confidence
    parts: dict[str, ComparisonView] = {}
    for name, one in sorted(known.segments.items()):
        if (part := _mean_view(goal, one, alpha / (2.0 * GROUPS), confidence, segment=name)) is not None:
            parts[name] = part
    whole = _mean_view(goal, known, alpha / 2.0 if goal.segment is not None else alpha, confidence)
    if whole is not None:
        silent = sorted(known.segments.keys() - parts.keys())
        yield whole.model_copy(update={"evidence": whole.evidence + _silent(silent)}) if silent else whole
    yield from parts.values()


def _silent(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _NAMED else ""
    return f"; no claim yet about {len(names)} segment{'s' if len(names) > 1 else ''}: {', '.join(map(repr, names[:_NAMED]))}{more}"


def _mean_view(
    goal: Goal, known: Comparison, alpha: float, confidence: float, segment: str = ""
) -> ComparisonView | None:
    bounds = comparisons.roots if value_gates.is_root(goal) else comparisons.difference
    found = bounds(known, alpha, asymptotic=goal.is_asymptotic)
    if found is None:
        return None
    lower, upper = (float(bound) * value_gates.width(goal) for bound in found)
    above = lower > 0.0
    better: Better = "undecided"
    if above or upper < 0.0:
        better = "candidate" if above == goal.higher_is_better else "stable"
    return ComparisonView(
        metric=goal.metric,
        candidate=value_gates.unscaled(goal, known.candidate.mean),
        stable=value_gates.unscaled(goal, known.stable.mean),
        candidate_samples=int(known.candidate.n),
        stable_samples=int(known.stable.n),
        lower=lower,
        upper=upper,
        confidence=confidence,
        better=better,
        segment=segment,
        evidence=_words(goal, segment),
    )


def _words(goal: Goal, segment: str) -> str:
    """How the bounds came about."""
    if goal.is_asymptotic:
        words = f"no valueRange, so asymptotic, from {START} values of each version on"
    else:
        words = "exact at every look"
        if goal.value_range is not None:
            words += f" for values of {goal.value_range[0]:g} to {goal.value_range[1]:g}"
    if value_gates.is_root(goal):
        words += "; roots of the bounds of mean squares"
    if goal.segment is not None:
        part = f"1/{2 * GROUPS}" if segment else "half"
        words += f"; {part} of the error, so that the bounds of all predictions and of every segment hold together"
    return words


def _percentile_view(candidate: Counts, stable: Counts, confidence: float) -> ComparisonView | None:
    one = _percentile_bounds(candidate.latency, (1.0 - confidence) / 2.0)
    two = _percentile_bounds(stable.latency, (1.0 - confidence) / 2.0)
    if one is None or two is None:
        return None
    lower, upper = one[0] - two[2], one[2] - two[0]
    return ComparisonView(
        metric=LATENCY,
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
