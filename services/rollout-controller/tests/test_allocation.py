"""A split that follows the result: less is lost than with a fixed one, inside its bounds, and the test's own verdict stays valid."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from millrace_rollout_controller.allocation import chance_better, next_weight
from millrace_rollout_controller.comparisons import Comparison, difference
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.experiments import absorb
from millrace_rollout_controller.manifest import Bandit
from millrace_rollout_controller.value_gates import Goal

from .world import World, spec

BATCH, BATCHES = 100, 100
BLOCK = Bandit()
ROLLOUT = """
strategy: ABTest
abTest: {split: 50, allocation: Thompson, duration: 10m, bandit: {minWeight: 20, maxChange: 10, minSamples: 100, interval: 60s}}
gates: [{metric: errorRate, max: 0.05}]
"""


@dataclass
class Run:
    """What a simulated test came to."""

    share: float
    """Of the requests that the candidate got."""
    right: float
    weights: list[float]
    known: Comparison
    wrong: bool
    """Some look said that equal versions differ."""


def play(
    seed: int, candidate: float, stable: float, *, allocates: bool = True, tide: float = 0.0, looks: bool = False
) -> Run:
    """An A/B test of predictions that are right with the given chances, which the time of day moves by up to `tide`."""
    chance = np.random.default_rng(seed)
    weight, weights, right, got = 50.0, [50.0], 0.0, 0
    known: dict[str, Comparison] = {}
    wrong = False
    for number in range(BATCHES):
        moved = tide * math.sin(number / 8.0)
        mine = int(chance.binomial(BATCH, weight / 100.0))
        sides = (mine, candidate), (BATCH - mine, stable)
        one, two = (Counts(outcomes=n, correct=int(chance.binomial(n, mean + moved))) for n, mean in sides)
        known = absorb(known, one, two, [Goal("outcome/accuracy")])
        right, got = right + one.correct + two.correct, got + mine
        now = known["outcome/accuracy"]
        if allocates and min(now.candidate.n, now.stable.n) >= BLOCK.min_samples:
            weight = next_weight(weight, chance_better(now, Goal("outcome/accuracy")), BLOCK)
        weights.append(weight)
        if looks and number % 10 == 9:
            low, high = difference(now, 0.05) or (-1.0, 1.0)
            wrong = wrong or low > 0 or high < 0
    return Run(got / (BATCH * BATCHES), right, weights, known["outcome/accuracy"], wrong)


def test_less_is_lost_than_with_a_fixed_split_and_the_better_version_gets_most() -> None:
    for candidate, stable in ((0.85, 0.78), (0.78, 0.85)):
        best = max(candidate, stable)
        runs = [play(seed, candidate, stable) for seed in range(30)]
        fixed = [play(seed, candidate, stable, allocates=False) for seed in range(30)]
        lost, lost_fixed = (
            best * BATCH * BATCHES - float(np.mean([run.right for run in found])) for found in (runs, fixed)
        )
        shares = [run.share if candidate > stable else 1.0 - run.share for run in runs]
        print(f"lost {lost:.0f} of a fixed split's {lost_fixed:.0f}; the better one got {np.mean(shares):.1%}")
        assert lost < 0.5 * lost_fixed
        assert np.mean(shares) > 0.75
        assert min(shares) > 0.5


def test_bounds_hold_at_every_move() -> None:
    for run in (play(seed, 0.9, 0.5) for seed in range(10)):
        assert all(10.0 <= weight <= 90.0 for weight in run.weights)
        assert max(abs(b - a) for a, b in zip(run.weights, run.weights[1:], strict=False)) <= 10.0
        assert run.weights[-1] == 90.0
    assert next_weight(50.0, 0.505, BLOCK) == 50.0, "a move that is hardly one is none"


def test_a_tide_that_moves_both_versions_moves_no_weight_far() -> None:
    """Totals of each version would call the one better that had the larger share at the better hour."""
    ends = [np.mean(play(seed, 0.6, 0.6, tide=0.3).weights[50:]) for seed in range(40)]
    assert abs(np.mean(ends) - 50.0) < 10.0


def test_the_verdict_stays_valid_while_its_result_moves_the_split() -> None:
    runs = [play(seed, 0.8, 0.8, tide=0.15, looks=True) for seed in range(200)]
    wrong = sum(run.wrong for run in runs)
    print(f"equal versions told apart in {wrong} of {len(runs)} runs")
    assert wrong <= 10


@pytest.mark.parametrize(
    ("metric", "total", "expected"),
    [
        ("outcome/accuracy", 3.0, 0.9987),
        ("errorRate", 3.0, 0.0013),
        ("outcome/brier", -3.0, 0.9987),
        ("outcome/accuracy", 0, 0.5),
    ],
)
def test_chance_by_the_metrics_direction(metric: str, total: float, expected: float) -> None:
    assert chance_better(Comparison(total=total, variance=1.0), Goal(metric)) == pytest.approx(expected, abs=1e-4)
    assert chance_better(Comparison(), Goal("errorRate")) == 0.5


def test_the_chance_of_values_of_any_size_is_by_their_own_variance() -> None:
    values = Sums(n=1000.0, total=20_000.0, square=410_000.0)
    known = Comparison(weight=1000.0, square_weight=2000.0, total=450.0, variance=1.0, candidate=values, stable=values)
    deviations = 450.0 / math.sqrt(2000.0 * 10_000.0 / 999.0)
    expected = 0.5 * math.erfc(-deviations / math.sqrt(2.0))
    assert chance_better(known, Goal("business/revenue", "Higher")) == pytest.approx(expected)
    assert chance_better(known, Goal("outcome/rmse")) == pytest.approx(1.0 - expected)


def test_the_reconciler_moves_one_weight_after_the_other_is_in_force_and_time_goes_on() -> None:
    world = World(spec("1.0.0", ROLLOUT), lag=2).served()
    world.apply(spec("1.1.0", ROLLOUT))
    world.until("Progressing")
    world.comparisons = {
        "outcome/accuracy": Comparison(
            weight=50, total=5.0, variance=1.0, candidate=Sums(n=99, total=90), stable=Sums(n=500, total=300)
        )
    }
    world.requests, world.verdict = 1000, "pass"
    for _ in range(100):
        world.tick()
    assert world.status.weight == 50, "fewer values than the first move needs"
    known = world.comparisons["outcome/accuracy"]
    world.comparisons = {"outcome/accuracy": known.model_copy(update={"candidate": Sums(n=100, total=90)})}
    weights = []
    for _ in range(300):
        status = world.tick()
        weights.append(status.weight)
    assert sorted(set(weights)) == [60, 70, 80]
    assert [weights.count(w) >= 60 for w in (60, 70)] == [True, True], "one move an interval"
    # The test's ten minutes ran on while the weight moved.
    for _ in range(250):
        status = world.tick()
    assert "promote or abort" in status.waiting
    assert world.act("set-weight", 33) is None
    assert {world.tick().weight for _ in range(100)} == {33}
