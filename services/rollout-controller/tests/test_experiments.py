"""Comparisons: their bounds hold at every look together, and they find what is there."""

import numpy as np
import pytest
from millrace_rollout_controller import experiments
from millrace_rollout_controller.comparisons import Comparison, difference
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.state import ComparisonView
from millrace_rollout_controller.value_gates import Goal

LOOKS = 60
ERRORS, ACCURACY = Goal("errorRate"), Goal("outcome/accuracy")


def _bounds(known: Comparison, confidence: float) -> tuple[float, float]:
    found = difference(known, 1.0 - confidence)
    assert found is not None
    return found


def counts(rng: np.random.Generator, n: int, mean: float) -> Counts:
    correct = int(rng.binomial(n, mean))
    errors = int(rng.binomial(n, 1.0 - mean))
    return Counts(requests=n, errors=errors, outcomes=n, correct=correct)


def watched(seed: int, candidate: float, stable: float, share: float = 0.5, drift: float = 0.0) -> bool:
    """Whether some look's bounds missed the truth."""
    rng = np.random.default_rng(seed)
    known: dict[str, Comparison] = {}
    for look in range(LOOKS):
        # The hour of the day moves both versions.
        shift = drift * np.sin(look / 5)
        n_c, n_s = rng.poisson(40 * share), rng.poisson(40 * (1 - share))
        new, old = counts(rng, n_c, candidate + shift), counts(rng, n_s, stable + shift)
        known = experiments.absorb(known, new, old, [ACCURACY])
        if known["outcome/accuracy"].weight:
            lower, upper = _bounds(known["outcome/accuracy"], 0.9)
            if not lower <= candidate - stable <= upper:
                return True
    return False


@pytest.mark.parametrize(
    ("candidate", "stable", "share", "drift"),
    [(0.8, 0.8, 0.5, 0.0), (0.97, 0.95, 0.5, 0.0), (0.7, 0.8, 0.1, 0.1), (0.99, 0.99, 0.2, 0.0)],
)
def test_bounds_hold_at_all_looks_together(candidate: float, stable: float, share: float, drift: float) -> None:
    missed = sum(watched(seed, candidate, stable, share, drift) for seed in range(100))
    # At most one in ten may miss; three deviations of the binomial above that would be 19.
    assert missed <= 19


def simulated(candidate: float, stable: float, looks: int) -> list[ComparisonView]:
    rng = np.random.default_rng(7)
    known: dict[str, Comparison] = {}
    total = Counts(), Counts()
    for _ in range(looks):
        new, old = counts(rng, 100, candidate), counts(rng, 100, stable)
        known = experiments.absorb(known, new, old, [ERRORS, ACCURACY])
        total = total[0].plus(new), total[1].plus(old)
    return experiments.results(known, *total, [ERRORS, ACCURACY], 0.95)


def test_a_difference_is_found_and_said_from_the_right_side() -> None:
    errors, accuracy = simulated(0.9, 0.8, 60)
    assert (errors.better, accuracy.better) == ("candidate", "candidate")
    assert errors.upper < 0 < accuracy.lower
    errors, accuracy = simulated(0.8, 0.9, 60)
    assert (errors.better, accuracy.better) == ("stable", "stable")
    assert accuracy.candidate_samples == accuracy.stable_samples == 6000
    assert {view.better for view in simulated(0.85, 0.85, 60)} == {"undecided"}


def test_rare_errors_give_narrow_bounds() -> None:
    rare, common = simulated(0.999, 0.999, 60)[0], simulated(0.5, 0.5, 60)[0]
    assert rare.upper - rare.lower < (common.upper - common.lower) / 3


def test_without_one_arm_there_is_no_result() -> None:
    known = experiments.absorb({}, Counts(requests=50), Counts(), [ERRORS])
    assert experiments.results(known, Counts(requests=50), Counts(), [ERRORS, Goal("latencyP99Ms")], 0.95) == []
    # The batch waited for the other arm.
    known = experiments.absorb(known, Counts(), Counts(requests=50), [ERRORS])
    assert experiments.results(known, Counts(), Counts(), [ERRORS], 0.95)[0].candidate_samples == 50


EDGES = [0.1 * 1.05**i for i in range(200)]


def latency(rng: np.random.Generator, n: int, scale: float) -> Counts:
    found: dict[str, int] = {}
    for index in np.searchsorted(EDGES, rng.exponential(scale, n)):
        key = repr(EDGES[index])
        found[key] = found.get(key, 0) + 1
    return Counts(requests=n, latency=found)


def test_percentiles_are_bounded_at_all_looks_together() -> None:
    truth, missed = float(-np.log(0.01) * 10), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        total, outside = Counts(), False
        for _ in range(25):
            total = total.plus(latency(rng, 200, 10.0))
            found = experiments._percentile_bounds(total.latency, 0.1)
            assert found is not None
            outside |= not found[0] <= truth <= found[2]
        missed += outside
    assert missed <= 13
    view = experiments.results(
        {}, latency(rng, 20_000, 20.0), latency(rng, 20_000, 10.0), [Goal("latencyP99Ms")], 0.95
    )[0]
    assert view.better == "stable"
    assert view.lower > 0
    assert view.stable == pytest.approx(truth, rel=0.15)
