"""A/B tests by a goal of any unit and by groups of predictions: results, verdicts, decisions, and false claims by simulation. Seeded."""

import json
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import comparisons, experiments
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.evidence import Evidence, Poll, advance
from millrace_rollout_controller.goals import compared, tracked_values
from millrace_rollout_controller.segment_gates import GROUPS
from millrace_rollout_controller.state import ComparisonView
from millrace_rollout_controller.value_gates import Goal, tracked

from .world import World, spec

Groups = Mapping[str, np.ndarray]
Arm = Callable[[np.random.Generator], Groups]
REVENUE = Goal("business/revenue", "Higher")
BOUNDED = Goal("business/revenue", "Higher", (0.0, 100.0))
RMSE, BOUNDED_RMSE = Goal("outcome/rmse"), Goal("outcome/rmse", None, (0.0, 60.0))
BY_CARRIER = Goal("business/revenue", "Higher", (0.0, 100.0), "outcome/carrier")
ALPHA = 0.05
RUNS = 300
AB_TEST = """
strategy: ABTest
abTest: {minRequests: 100, goal: business/revenue, better: Higher, valueRange: [0, 100], segment: outcome/carrier, onSuccess: Promote}
"""


def counts(goal: Goal, groups: Groups) -> Counts:
    """Figures of values by group and of all together, as the drift monitor would sum them; errors of a model are squared."""
    value = tracked(goal)
    assert value is not None
    lower, upper = (-math.inf, math.inf) if value.lower is None else (value.lower, value.upper)
    power = 2 if goal.metric == "outcome/rmse" else 1
    everything = {**groups, "": np.concatenate([*groups.values()])}
    sums = {}
    for name, found in everything.items():
        kept = np.clip(found**power, lower, upper)
        sums[name] = Sums(n=len(kept), total=float(kept.sum()), square=float((kept**2).sum()))
    return Counts(values={value.key: sums})


def results(goal: Goal, candidate: Arm, stable: Arm, *, looks: int = 40, seed: int = 0) -> list[ComparisonView]:
    rng, known = np.random.default_rng(seed), {goal.key: Comparison()}
    for _ in range(looks):
        new, old = counts(goal, candidate(rng)), counts(goal, stable(rng))
        known = {key: Comparison.model_validate_json(one.model_dump_json()) for key, one in known.items()}
        known = experiments.absorb(known, new, old, [goal])
    return experiments.results(known, Counts(), Counts(), [goal], 1.0 - ALPHA)


def purchases(rng: np.random.Generator, n: int, factor: float = 1.0) -> np.ndarray:
    """What callers pay: a fifth buys, for 10 on average."""
    return (rng.random(n) < 0.2) * np.minimum(rng.lognormal(1.8, 1.0, n), 100.0) * factor


@pytest.mark.parametrize("goal", [REVENUE, BOUNDED])
@pytest.mark.parametrize(("factor", "better"), [(2.0, "candidate"), (0.3, "stable"), (1.0, "undecided")])
def test_a_business_metric_tells_which_version_is_better(goal: Goal, factor: float, better: str) -> None:
    [view] = results(
        goal, lambda rng: {"": purchases(rng, 50, factor)}, lambda rng: {"": purchases(rng, 50)}, looks=100
    )
    assert view.better == better
    assert view.lower < view.candidate - view.stable < view.upper
    assert (view.candidate_samples, view.segment) == (5000, "")
    assert ("asymptotic" in view.evidence) == (goal is REVENUE)
    assert ("exact at every look for values of 0 to 100" in view.evidence) == (goal is BOUNDED)
    lower = Goal(goal.metric, "Lower", goal.value_range)
    [view] = results(
        lower, lambda rng: {"": purchases(rng, 50, factor)}, lambda rng: {"": purchases(rng, 50)}, looks=100
    )
    assert view.better == {"candidate": "stable", "stable": "candidate"}.get(better, better)


@pytest.mark.parametrize("goal", [RMSE, BOUNDED_RMSE])
@pytest.mark.parametrize(("error", "better"), [(7.0, "candidate"), (14.0, "stable"), (10.0, "undecided")])
def test_root_mean_squares_are_compared_in_their_own_unit(goal: Goal, error: float, better: str) -> None:
    [view] = results(
        goal, lambda rng: {"": rng.normal(0, error, 50)}, lambda rng: {"": rng.normal(0, 10, 50)}, looks=60
    )
    assert view.better == better
    assert view.stable == pytest.approx(10, rel=0.05)
    assert view.candidate == pytest.approx(error, rel=0.05)
    assert view.lower < error - 10 < view.upper
    assert view.upper - view.lower < 8
    assert "roots of the bounds of mean squares" in view.evidence


def test_values_of_any_size_are_silent_until_there_are_enough() -> None:
    few = {"": np.ones(START - 1)}
    assert results(REVENUE, lambda _: few, lambda rng: {"": purchases(rng, 500)}, looks=1) == []


def test_every_group_has_its_own_result_and_a_part_of_the_error() -> None:
    def arm(factors: Mapping[str, float]) -> Arm:
        return lambda rng: {name: purchases(rng, 40, factor) for name, factor in factors.items()}

    whole, *parts = results(BY_CARRIER, arm({"AA": 1.0, "DL": 3.0, "UA": 0.1}), arm(dict.fromkeys(["AA", "DL", "UA"], 1.0)), looks=150)  # fmt: skip
    assert [(one.segment, one.better) for one in parts] == [("AA", "undecided"), ("DL", "candidate"), ("UA", "stable")]
    assert whole.better == "candidate"
    assert whole.candidate_samples == sum(one.candidate_samples for one in parts) == 150 * 120
    assert "half of the error" in whole.evidence
    assert "1/36 of the error" in parts[0].evidence
    alone, *_ = results(BOUNDED, arm({"": 1.0}), arm({"": 1.0}), looks=150)
    same, *_ = results(BY_CARRIER, arm({"": 1.0}), arm({"": 1.0}), looks=150)
    assert 1.0 < (same.upper - same.lower) / (alone.upper - alone.lower) < 1.2, "what looking at groups costs"


def test_groups_without_enough_values_are_named_and_their_number_is_bounded() -> None:
    goal = Goal("business/revenue", "Higher", None, "client")
    names = {f"c{i:02}": 20 if i == 3 else 300 for i in range(30)}

    def arm(rng: np.random.Generator) -> Groups:
        return {name: purchases(rng, n) for name, n in names.items()}

    whole, *parts = results(goal, arm, arm, looks=1)
    assert len(parts) == GROUPS - 1
    assert "no claim yet about 1 segment: 'c03'" in whole.evidence


def test_what_is_reported_and_tracked() -> None:
    wanted = spec("1.0.0", AB_TEST)
    assert [goal.metric for goal in compared(wanted)] == [
        "errorRate", "latencyP99Ms", "outcome/accuracy", "outcome/brier", "business/revenue",
    ]  # fmt: skip
    assert tracked_values(wanted.rollout) == {("business/revenue", 0.0, 100.0, "outcome/carrier")}
    plain = spec("1.0.0", "strategy: ABTest\nabTest: {goal: outcome/brier, segment: client}")
    assert [goal.segment for goal in compared(plain)] == [None, None, None, "client"]
    assert tracked_values(plain.rollout) == {("outcome/brier", None, None, "client")}
    assert tracked_values(spec("1.0.0", "strategy: ABTest").rollout) == frozenset()


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ("{goal: business/revenue}", "better"),
        ("{goal: outcome/accuracy, better: Higher}", "better"),
        ("{goal: business/a-b, better: Higher}", "goal"),
        ("{goal: outcome/auc}", "goal"),
        ("{goal: errorRate, segment: client}", "segment"),
        ("{goal: outcome/mae, segment: carrier}", "segment"),
        ("{goal: outcome/accuracy, valueRange: [0, 1]}", "valueRange"),
        ("{goal: outcome/rmse, valueRange: [1, 9]}", "valueRange"),
        ("{goal: business/x, better: Lower, valueRange: [3, 3]}", "valueRange"),
    ],
)
def test_a_wrong_goal_is_refused_with_its_field(block: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        spec("1.0.0", f"strategy: ABTest\nabTest: {block}")
    assert caught.value.metadata["field"] == f"spec.rollout.abTest.{field}"


def test_late_outcomes_become_the_result_by_difference() -> None:
    value = tracked(BY_CARRIER)
    assert value is not None

    def poll(**totals: int) -> Poll:
        one = {v: {"": Sums(n=n, total=n * 2.0, square=n * 5.0), "UA": Sums(n=n, total=n * 2.0, square=n * 5.0)} for v, n in totals.items()}  # fmt: skip
        return Poll(outcomes={v.replace("_", "."): Counts(values={value.key: sums}) for v, sums in one.items()})

    evidence = Evidence()
    for found in (Poll(outcomes={"1.0": Counts()}), poll(v1_0=50), poll(v1_0=150, v1_1=40), poll(v1_0=160, v1_1=60)):
        evidence = advance(
            evidence, found, trial=1, step=0, candidate="v1.1", stable="v1.0", wanted=(), gateways=(),
            compared=[Goal("outcome/accuracy"), BY_CARRIER],
        )  # fmt: skip
    known = evidence.comparisons[BY_CARRIER.key]
    assert (known.candidate.n, known.stable.n, known.segments["UA"].candidate.n) == (60, 110, 60)
    assert known.candidate.mean == pytest.approx(0.02)
    assert not evidence.candidate.values, "sums by group are in the comparison alone"


def decided(**better: str) -> dict[str, Comparison]:
    def one(name: str) -> Comparison:
        mean = {"candidate": 0.6, "stable": 0.4, "undecided": 0.5}[name]
        return Comparison(
            weight=10_000.0, square_weight=20_000.0, total=10_000.0 * (mean - 0.5), variance=500.0,
            candidate=Sums(n=10_000.0, total=10_000.0 * mean), stable=Sums(n=10_000.0, total=5000.0),
        )  # fmt: skip

    groups = {name: one(word) for name, word in better.items() if name != "whole"}
    return {BY_CARRIER.key: one(better["whole"]).model_copy(update={"segments": groups})}


def test_a_group_for_which_stable_is_better_keeps_it_from_promoting_and_all_is_kept_as_evidence() -> None:
    world = World(spec("1.0.0", AB_TEST)).served()
    world.apply(spec("1.1.0", AB_TEST))
    world.until("Progressing")
    world.requests = 100
    world.comparisons = decided(whole="candidate", UA="stable", AA="candidate")
    for _ in range(10):
        world.tick()
    assert world.status.weight == 50
    assert "business/revenue says that stable is better for 'UA'" in world.status.waiting
    world.comparisons = decided(whole="candidate", UA="undecided", AA="candidate")
    world.until("Promoted")
    decision = world.status.history[-1]
    said = {(one.metric, one.segment): one.better for one in decision.comparisons}
    assert said["business/revenue", ""] == said["business/revenue", "AA"] == "candidate"
    assert said["business/revenue", "UA"] == "undecided"
    bundle = json.loads(world.status.unsent[-1].text)
    kept = [one for one in bundle["decisions"][-1]["comparisons"] if one["segment"] == "UA"]
    assert kept[0]["evidence"].startswith("exact at every look for values of 0 to 100; 1/36 of the error")


DRAWS = {
    "normal": lambda rng, shape: rng.normal(5, 2, shape),
    "exponential": lambda rng, shape: rng.exponential(1, shape),
    "one in twenty buys": lambda rng, shape: (rng.random(shape) < 0.05) * rng.lognormal(2, 1, shape),
    "squares of normal errors": lambda rng, shape: rng.normal(0, 10, shape) ** 2,
    "squares of Laplace errors": lambda rng, shape: rng.laplace(0, 10, shape) ** 2,
}


@pytest.mark.parametrize("others", [1, 9])
@pytest.mark.parametrize("kind", DRAWS)
def test_equal_versions_are_rarely_told_apart_in_the_limit_with_a_look_at_each_request(kind: str, others: int) -> None:
    """The very sums of `comparisons.add`, of many tests side by side."""
    rng, mine, theirs = np.random.default_rng(2), np.zeros((3, RUNS)), np.zeros((3, RUNS))
    total, square_weight, h, wrong = np.zeros(RUNS), 0.0, np.zeros(RUNS), np.zeros(RUNS, bool)
    for look in range(1, 900):
        x, y = DRAWS[kind](rng, (RUNS, 1)), DRAWS[kind](rng, (RUNS, others))
        mine += [np.ones(RUNS), x[:, 0], x[:, 0] ** 2]
        theirs += [np.full(RUNS, others), y.sum(1), (y * y).sum(1)]
        total, square_weight = total + x[:, 0] - y.mean(1), square_weight + 1.0 + 1.0 / others
        if look < START:
            continue
        variance = np.maximum(value_variance(*mine), value_variance(*theirs)) * square_weight
        h = np.where(h > 0, h, tuned(variance))
        wrong |= log_evidence(np.abs(total), variance, h) >= math.log(2.0 / ALPHA)
    print(
        f"A/B without a range, {kind}, 1 to {others}: {wrong.mean():.1%} of {RUNS} tests of equal versions say one is better"
    )
    assert wrong.mean() <= ALPHA


def test_groups_of_equal_versions_are_rarely_told_apart() -> None:
    """Of all tests with a whole and six groups, in how many any bounds ever exclude the truth."""
    rng, means = np.random.default_rng(3), (0.1, 0.5, 0.8, 0.9, 0.95, 0.6)
    alphas = [ALPHA / 2, *(ALPHA / (2 * GROUPS) for _ in means)]
    totals, variances, sums, wrong = np.zeros((7, RUNS)), np.zeros((7, RUNS)), np.zeros((2, 7, RUNS)), np.zeros(RUNS, bool)  # fmt: skip
    each = np.array([30.0, *(5.0 for _ in means)])[:, None]
    for look in range(150):
        hits = rng.binomial(5, np.array(means)[None, :, None], (2, 6, RUNS)).astype(float)
        hits = np.concatenate([hits.sum(1, keepdims=True), hits], axis=1)
        expected = (sums + 0.5) / (look * each + 1.0)
        totals += hits[0] - hits[1]
        variances += (hits * (1.0 - 2.0 * expected) + each * expected**2).sum(0)
        sums += hits
        found = comparisons.bernstein(np.abs(totals), variances)
        wrong |= (found >= np.log(2.0 / np.array(alphas))[:, None]).any(0)
    print(f"A/B by segment: {wrong.mean():.1%} of {RUNS} tests of equal versions say one is better somewhere")
    assert wrong.mean() <= ALPHA
