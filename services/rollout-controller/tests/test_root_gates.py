"""Comparisons of root mean squared errors: verdicts, the map from bounds of mean squares, and false verdicts by simulation. Seeded.

Many rollouts side by side, with a look at each request, through the very functions that the gate calls with one.
"""

import math

import numpy as np
import pytest
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from millrace_kit.power import BURN_IN
from millrace_kit.sequential import ODDS_ABOVE, Sample, log_mean, two_arms
from millrace_rollout_controller import comparisons, gates, verdicts
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Sums
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.manifest import Gate

from .test_value_gates import counts, walk

GATE = Gate(metric="outcome/rmse", compare="notWorseThanStable", margin=3.0)
TOP = 50.0
BOUNDED = GATE.model_copy(update={"value_range": (0.0, TOP)})
ALPHA = 0.05
RUNS = 300
ERRORS = {
    "normal": lambda rng, shape, deviation: rng.normal(0, deviation, shape),
    "Laplace": lambda rng, shape, deviation: rng.laplace(0, deviation / math.sqrt(2), shape),
    "mostly none": lambda rng, shape, deviation: (
        (rng.random(shape) < 0.2) * rng.normal(0, deviation * math.sqrt(5), shape)
    ),
}


def squares(deviation: float, n: int):
    return lambda rng: {"": rng.normal(0, deviation, n) ** 2}


@pytest.mark.parametrize("gate", [GATE, BOUNDED])
@pytest.mark.parametrize(("deviation", "verdict"), [(10.0, "pass"), (7.0, "pass"), (16.0, "fail")])
def test_it_is_compared_with_and_without_a_range(gate: Gate, deviation: float, verdict: str) -> None:
    found, n, words = walk(gate, squares(deviation, 40), squares(10.0, 80), looks=60)
    assert found == verdict, words
    assert ("asymptotic" in words) == (gate is GATE)
    assert n >= START or gate is BOUNDED
    apart = float(words.split("difference ")[1].split(" ")[0])
    assert apart == pytest.approx(deviation - 10, abs=1.5), "in the metric's own unit"


def test_worse_by_less_than_the_margin_neither_fails_nor_passes_soon() -> None:
    found, _, words = walk(BOUNDED, squares(12.9, 40), squares(10.0, 40), looks=60)
    assert found == "undecided", words


def test_a_step_of_its_own_holds_the_pass_back() -> None:
    rng, state = np.random.default_rng(0), begin_step(GateState())
    for _ in range(60):
        arms = (counts(BOUNDED, squares(d, n)(rng)) for d, n in ((8.0, 40), (10.0, 80)))
        state = gates.absorb(BOUNDED, state, *arms)
    assert verdicts.judge(BOUNDED, state, 4).verdict == "pass"
    state = begin_step(state)
    state = gates.absorb(BOUNDED, state, *(counts(BOUNDED, squares(d, n)(rng)) for d, n in ((16.0, 40), (10.0, 80))))
    view = verdicts.judge(BOUNDED, state, 4)
    assert (view.verdict, "this step's own figures" in view.evidence) == ("undecided", True)


def test_a_bad_group_fails_alone() -> None:
    gate = BOUNDED.model_copy(update={"segment": "outcome/carrier"})
    found, _, words = walk(
        gate,
        lambda rng: {"AA": rng.normal(0, 7, 40) ** 2, "UA": rng.normal(0, 18, 20) ** 2},
        lambda rng: {"AA": rng.normal(0, 10, 80) ** 2, "UA": rng.normal(0, 10, 40) ** 2},
    )
    assert found == "fail"
    assert words.startswith("segment 'UA' failed: candidate 1")


@pytest.mark.parametrize("between", [(-0.3, -0.1), (-0.3, 0.2), (0.1, 0.4), (-0.9, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("level", [(0.0, 0.2), (0.05, 0.6), (0.3, 0.31), (0.7, 1.0)])
def test_bounds_of_roots_are_the_extremes_over_all_means_that_fit(
    between: tuple[float, float], level: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stable, apart = np.meshgrid(np.linspace(*level, 801), np.linspace(*between, 801))
    fits = stable + apart >= 0
    if not fits.any():
        return
    every = np.sqrt((stable + apart)[fits]) - np.sqrt(stable[fits])
    monkeypatch.setattr(comparisons, "difference", lambda *_, **__: tuple(map(np.asarray, between)))
    monkeypatch.setattr(comparisons, "_level", lambda *_, **__: tuple(map(np.asarray, level)))
    found = comparisons.roots(Comparison(), ALPHA)
    assert found is not None
    lower, upper = map(float, found)
    assert lower <= every.min() + 1e-9
    assert upper >= every.max() - 1e-9
    if level[0] >= max(-between[0], 0.0):
        assert (lower, upper) == pytest.approx((every.min(), every.max()), abs=2e-3), "and no wider"


def test_no_claim_without_both_arms() -> None:
    assert comparisons.roots(Comparison(), ALPHA) is None
    one = comparisons.add(Comparison(), Sums(n=5, total=1, square=0.5), Sums())
    assert comparisons.roots(one, ALPHA) is None
    assert float(comparisons.log_for_root(None, 1.0, ALPHA, asymptotic=False)[0]) == 0.0


class Rollouts:
    """`RUNS` comparisons of values in [0, 1], one candidate's value and `others` of stable a look: the sums of `comparisons.add`."""

    def __init__(self, others: int) -> None:
        self.others, self.n = others, 0
        self.weight, self.square_weight, self.level_weight = 0.0, 0.0, 0.0
        self.total, self.variance, self.level, self.level_variance = np.zeros((4, RUNS))
        self._candidate, self._stable = np.zeros((2, RUNS))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        expected = (self._candidate + 0.5) / (self.n + 1.0), (self._stable + 0.5) / (self.n * self.others + 1.0)
        spread = ((y - expected[1][:, None]) ** 2).sum(1) / self.others**2
        self.weight, self.n = self.weight + 1.0, self.n + 1
        self.total = self.total + x[:, 0] - y.mean(1)
        self.variance = self.variance + (x[:, 0] - expected[0]) ** 2 + spread
        self.level, self.level_variance = self.level + y.mean(1), self.level_variance + spread
        self._candidate, self._stable = self._candidate + x[:, 0], self._stable + y.sum(1)


def test_the_simulated_sums_are_the_comparisons_own() -> None:
    rng, many, known = np.random.default_rng(1), Rollouts(3), Comparison()
    for _ in range(20):
        x, y = rng.random((RUNS, 1)), rng.random((RUNS, 3))
        many.add(x, y)
        arms = (Sums(n=v.shape[1], total=float(v[0].sum()), square=float((v[0] ** 2).sum())) for v in (x, y))
        known = comparisons.add(known, *arms)
    names = ("weight", "total", "variance", "level", "level_variance")
    mine = [np.broadcast_to(getattr(many, name), RUNS)[0] for name in names]
    assert mine == pytest.approx([getattr(known, name) for name in names])
    both = comparisons.roots(known, ALPHA), comparisons.roots(many, ALPHA)  # type: ignore[arg-type]
    assert [float(b) for b in both[0] or ()] == pytest.approx([float(b[0]) for b in both[1] or ()])


def _bounded(kind: str, deviation: float, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(np.minimum(ERRORS[kind](rng, shape, deviation) ** 2, TOP**2) / TOP**2)


@pytest.mark.parametrize("others", [1, 9])
@pytest.mark.parametrize("kind", ERRORS)
def test_equal_versions_are_rarely_rolled_back_with_a_look_at_each_request(kind: str, others: int) -> None:
    """The failing side with a range: the e-process on squares, whose order is the roots'."""
    rng, logs, failed = np.random.default_rng(4), np.zeros((RUNS, len(ODDS_ABOVE))), np.zeros(RUNS, bool)
    seen = np.zeros(RUNS)
    for look in range(600):
        x, y = _bounded(kind, 10.0, rng, (RUNS, 1)), _bounded(kind, 10.0, rng, (RUNS, others))
        if look * others >= BURN_IN:
            mine, theirs = (
                Sample(np.full(RUNS, float(v.shape[1])), v.sum(1), (v * v).sum(1), binary=False) for v in (x, y)
            )
            logs += two_arms(mine, theirs, (seen + 0.5) / (look * others + 1.0), 0.0, ODDS_ABOVE)
        seen += y.sum(1)
        failed |= log_mean(logs) >= -math.log(ALPHA)
    print(f"outcome/rmse, {kind} errors, 1 to {others}: {failed.mean():.1%} of {RUNS} equal versions rolled back")
    assert failed.mean() <= ALPHA


@pytest.mark.parametrize("others", [1, 9])
@pytest.mark.parametrize("kind", ["normal", "mostly none"])
def test_versions_worse_by_the_margin_rarely_pass_and_equal_ones_do(kind: str, others: int) -> None:
    """The passing side and the interval with a range, with a look at each request; the truth is that of the values within it."""
    sample = np.random.default_rng(0)
    true = [math.sqrt(_bounded(kind, d, sample, (RUNS, 2000)).mean()) for d in (10.0, 14.0)]
    margin = true[1] - true[0]
    rng, worse, equal = np.random.default_rng(5), Rollouts(others), Rollouts(others)
    passed, missed, right = np.zeros(RUNS, bool), np.zeros(RUNS, bool), np.zeros(RUNS, bool)
    for look in range(500):
        y = _bounded(kind, 10.0, rng, (RUNS, others))
        worse.add(_bounded(kind, 14.0, rng, (RUNS, 1)), y)
        equal.add(_bounded(kind, 10.0, rng, (RUNS, 1)), y)
        for one, said in ((worse, passed), (equal, right)):
            found, needed = comparisons.log_for_root(one, margin, ALPHA, asymptotic=False)  # type: ignore[arg-type]
            np.logical_or(said, found >= needed, out=said)
        if look % 5 == 0:
            lower, upper = comparisons.roots(worse, ALPHA) or (0.0, 0.0)  # type: ignore[arg-type]
            missed |= (lower > margin) | (upper < margin)
    print(f"outcome/rmse, {kind}, 1 to {others}: {passed.mean():.1%} worse by the margin passed, {missed.mean():.1%} missed, {right.mean():.0%} equal passed")  # fmt: skip
    assert passed.mean() <= ALPHA
    assert missed.mean() <= ALPHA
    assert right.mean() >= 0.9 or kind != "normal", "rare large errors take longer to be ruled out"


@pytest.mark.parametrize("others", [1, 9])
@pytest.mark.parametrize("kind", ERRORS)
def test_without_a_range_it_holds_in_the_limit_with_a_look_at_each_request(kind: str, others: int) -> None:
    rng = np.random.default_rng(6)
    mine, theirs, sums = np.zeros((3, RUNS)), np.zeros((3, RUNS)), np.zeros(RUNS)
    ratio, h, failed = 0.0, np.zeros(RUNS), np.zeros(RUNS, bool)
    for look in range(1, 900):
        x, y = ERRORS[kind](rng, (RUNS, 1), 10.0) ** 2, ERRORS[kind](rng, (RUNS, others), 10.0) ** 2
        mine += [np.ones(RUNS), x[:, 0], x[:, 0] ** 2]
        theirs += [np.full(RUNS, others), y.sum(1), (y * y).sum(1)]
        sums, ratio = sums + x[:, 0] - y.mean(1), ratio + 1.0 / others
        if look < START:
            continue
        own, stable = value_variance(*mine), value_variance(*theirs)
        variance = np.maximum(own, stable) * look + stable * ratio
        h = np.where(h > 0, h, tuned(variance))
        failed |= log_evidence(sums, variance, h) >= -math.log(ALPHA)
    print(
        f"outcome/rmse without a range, {kind}, 1 to {others}: {failed.mean():.1%} of {RUNS} equal versions rolled back"
    )
    assert failed.mean() <= ALPHA


@pytest.mark.parametrize("gate", [GATE, BOUNDED])
def test_the_whole_gate_rolls_no_equal_version_back_with_a_look_at_each_request(gate: Gate) -> None:
    failed = 0
    for seed in range(12):
        rng, state = np.random.default_rng(seed), begin_step(GateState())
        for _ in range(260):
            state = gates.absorb(gate, state, *(counts(gate, squares(10.0, 1)(rng)) for _ in range(2)))
            failed += verdicts.judge(gate, state, 3).verdict == "fail"
    # The simulations above say how often it may; these seeds are none of them.
    assert failed == 0
