"""A thousand rollouts a kind of gate: how often equal versions are rolled back, and versions worse by the margin promoted. Seeded.

Figures of these runs are printed with `pytest -s` and stand in the README.
"""

import math

import numpy as np
import pytest
from millrace_kit.group_sequential import planned_boundaries, spent
from millrace_kit.power import Claim, Plays, draw
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Sample, log_mean, two_arms
from millrace_rollout_controller import drift_gates, gates, verdicts
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.drift_gates import DriftState
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.manifest import Gate

RUNS = 1000
ALPHA = 0.05
MOST_FALSE = ALPHA + 2.33 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
"""What 1,000 rollouts show in at most 1 of 100 cases when the true rate is 5 %."""
ACCURACY = Gate(metric="outcome/accuracy", compare="notWorseThanStable", margin=0.05)


def play(claim: Claim, candidate: float, stable: float, *, looks: int, batch: int, seed: int) -> Plays:
    rng, plays = np.random.default_rng(seed), Plays(claim, RUNS)
    for _ in range(looks):
        mine = draw(rng, RUNS, batch, candidate, binary=claim.binary)
        plays.absorb(mine, draw(rng, RUNS, batch * 4, stable, binary=claim.binary))
    return plays


@pytest.mark.parametrize(
    ("kind", "claim", "mean"),
    [
        ("errorRate compare", Claim(margin=0.005), 0.02),
        ("outcome/accuracy compare", Claim(margin=0.01, higher_is_better=True), 0.8),
        ("outcome/brier compare", Claim(margin=0.005, binary=False), 0.15),
        ("latencyP50Ms compare", Claim(margin=0.0), 0.5),
        ("latencyP95Ms compare", Claim(margin=0.0), 0.05),
        ("latencyP99Ms compare", Claim(margin=0.0), 0.01),
        ("errorRate max, at the bound", Claim(bound=0.02), 0.02),
        ("latencyP99Ms max, at the bound", Claim(bound=0.01), 0.01),
        ("outcome/accuracy min, at the bound", Claim(bound=0.8, higher_is_better=True), 0.8),
    ],
)
def test_equal_versions_are_rarely_rolled_back(kind: str, claim: Claim, mean: float) -> None:
    plays = play(claim, mean, mean, looks=100, batch=20, seed=1)
    print(f"{kind}: {plays.failed.mean():.1%} of {RUNS} rollouts of equal versions rolled back")
    assert plays.failed.mean() <= MOST_FALSE


@pytest.mark.parametrize(
    ("kind", "claim", "candidate", "stable"),
    [
        ("errorRate compare", Claim(margin=0.02), 0.04, 0.02),
        ("outcome/accuracy compare", Claim(margin=0.05, higher_is_better=True), 0.75, 0.8),
        ("outcome/brier compare", Claim(margin=0.02, binary=False), 0.17, 0.15),
        ("outcome/accuracy compare, maxSamples", Claim(margin=0.05, higher_is_better=True, most=2000), 0.75, 0.8),
        ("errorRate compare, maxSamples", Claim(margin=0.02, most=2000), 0.04, 0.02),
        ("outcome/brier compare, maxSamples", Claim(margin=0.02, binary=False, most=2000), 0.17, 0.15),
    ],
)
def test_versions_worse_by_the_margin_are_rarely_promoted(
    kind: str, claim: Claim, candidate: float, stable: float
) -> None:
    plays = play(claim, candidate, stable, looks=100, batch=20, seed=2)
    print(f"{kind}: {plays.passed.mean():.1%} of {RUNS} rollouts of versions worse by the margin passed")
    assert plays.passed.mean() <= MOST_FALSE


def test_looks_at_a_declared_maximum_see_more_than_a_look_at_every_request() -> None:
    """Equal versions, margin 0.05 at accuracy 0.8: share promoted by 800 candidate outcomes, and the median until then."""
    shares, medians = {}, {}
    for most in (None, 800):
        rng = np.random.default_rng(3)
        claim = Claim(margin=0.05, higher_is_better=True, most=most)
        plays, when = Plays(claim, RUNS), np.full(RUNS, np.inf)
        for look in range(1, 81):
            plays.absorb(draw(rng, RUNS, 10, 0.8, binary=True), draw(rng, RUNS, 40, 0.8, binary=True))
            when[plays.passed & np.isinf(when)] = look * 10
        shares[most], medians[most] = plays.passed.mean(), float(np.median(when))
    print(f"promoted by 800: every request {shares[None]:.1%}, median {medians[None]:.0f}; ", end="")
    print(f"maxSamples 800 {shares[800]:.1%}, median {medians[800]:.0f}")
    assert shares[800] >= shares[None] + 0.05


def test_boundaries_are_those_of_the_literature() -> None:
    """Lan-DeMets with O'Brien-Fleming's shape, five looks, one-sided 0.025 (Jennison and Turnbull 2000)."""
    assert planned_boundaries(0.025) == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=0.002)
    assert spent(1.0, 0.05) == pytest.approx(0.05)


@pytest.mark.parametrize("most", [None, 400])
def test_the_gate_itself_says_what_the_simulation_says(most: int | None) -> None:
    required = {"required": "Promotion", "maxSamples": most} if most else {}
    wanted = Gate(metric="outcome/accuracy", compare="notWorseThanStable", margin=0.05, **required)
    claim = Claim(margin=0.05, higher_is_better=True, steps=4, most=most)
    every = set()
    for seed, candidate in enumerate((0.6, 0.7, 0.8, 0.85, 0.9)):
        rng = np.random.default_rng(seed)
        plays, state, said = Plays(claim, 1), begin_step(GateState()), {"pass": False, "fail": False}
        for _ in range(60):
            right, others = int(rng.binomial(10, candidate)), int(rng.binomial(40, 0.8))
            state = gates.absorb(wanted, state, Counts(outcomes=10, correct=right), Counts(outcomes=40, correct=others))
            plays.absorb(
                Sample(np.array([10.0]), np.array([float(right)]), np.array([float(right)])),
                Sample(np.array([40.0]), np.array([float(others)]), np.array([float(others)])),
            )
            verdict = verdicts.judge(wanted, state, 4).verdict
            said[verdict] = True
            assert plays.failed[0] == said["fail"]
            if not said["fail"] and most is None:
                assert plays.passed[0] == said["pass"]
        every |= {verdict for verdict, was in said.items() if was}
        assert plays.passed[0] == said["pass"] or said["fail"] or most is not None
    assert {"pass", "fail"} <= every


def _scores(rng: np.random.Generator, n: int, shift: float) -> dict[str, int]:
    buckets, counts = np.unique(np.floor(rng.normal(shift, 1.0, n) * 8).astype(int), return_counts=True)
    return {str(bucket): int(count) for bucket, count in zip(buckets, counts, strict=True)}


def test_equal_predictions_are_rarely_told_apart() -> None:
    """All cuts of 1,000 rollouts at once; a real gate is held against it below."""
    rng, cuts = np.random.default_rng(4), 7
    up, down = np.zeros((RUNS, cuts, len(ODDS_ABOVE))), np.zeros((RUNS, cuts, len(ODDS_ABOVE)))
    failed = np.zeros(RUNS, bool)
    shares = np.arange(1, cuts + 1) / (cuts + 1)

    def below(n: int) -> Sample:
        counts = np.cumsum(rng.multinomial(n, np.full(cuts + 1, 1 / (cuts + 1)), RUNS), axis=1)[:, :-1].astype(float)
        return Sample(np.full(counts.shape, float(n)), counts, counts)

    for _ in range(150):
        arms = below(10), below(40)
        up += two_arms(*arms, shares, 0.0, ODDS_ABOVE)
        down += two_arms(*arms, shares, 0.0, ODDS_BELOW)
        failed |= log_mean(np.concatenate([up, down], axis=1).reshape(RUNS, -1)) >= -math.log(ALPHA)
    print(f"drift/prediction: {failed.mean():.1%} of {RUNS} rollouts of equal versions rolled back")
    assert failed.mean() <= MOST_FALSE


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "pass"), (0.5, "fail")])
def test_how_soon_predictions_are_told_apart(shift: float, verdict: str) -> None:
    wanted, delays = Gate(metric="drift/prediction", max=0.1), []
    for seed in range(10):
        rng, state = np.random.default_rng(seed), GateState()
        for look in range(1, 120):
            candidate = Counts(scores=_scores(rng, 20, shift))
            state = gates.absorb(wanted, state, candidate, Counts(scores=_scores(rng, 80, 0.0)))
            view = verdicts.judge(wanted, state, 4)
            if view.verdict != "undecided":
                assert view.verdict == verdict, view.evidence
                delays.append(look * 20)
                break
    print(f"drift/prediction, shift {shift}: {verdict} after a median of {np.median(delays):.0f} candidate predictions")
    assert len(delays) >= 9


def test_predictions_that_differ_by_less_than_the_bound_never_roll_back() -> None:
    rng, state = np.random.default_rng(5), DriftState()
    for _ in range(60):
        state = drift_gates.absorb(state, _scores(rng, 200, 0.3), _scores(rng, 200, 0.0), 0.3)
    assert drift_gates.log_fail(state) > 10
    assert drift_gates.judge(Gate(metric="drift/prediction", max=0.3), state).verdict == "pass"


def test_a_model_of_one_answer_and_no_data_are_no_trouble() -> None:
    wanted, state = Gate(metric="drift/prediction", max=0.1), GateState()
    assert verdicts.judge(wanted, state, 4).verdict == "undecided"
    for _ in range(300):
        state = gates.absorb(wanted, state, Counts(), Counts(scores={"7": 5}))
    assert verdicts.judge(wanted, state, 4).verdict == "undecided"
    for _ in range(30):
        state = gates.absorb(wanted, state, Counts(scores={"9": 5}), Counts(scores={"7": 5}))
    assert verdicts.judge(wanted, state, 4).verdict == "fail"


LATENCY = Gate(metric="latencyP95Ms", compare="notWorseThanStable", margin=0.2)


def _latency(rng: np.random.Generator, n: int, factor: float) -> dict[str, int]:
    edges = 1.05 ** np.ceil(np.log(rng.lognormal(3.0, 0.3, n) * factor) / math.log(1.05))
    found: dict[str, int] = {}
    for edge in edges:
        found[repr(float(edge))] = found.get(repr(float(edge)), 0) + 1
    return found


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "pass"), (1.6, "fail")])
def test_latency_is_compared_at_the_percentile_of_stable(factor: float, verdict: str) -> None:
    for seed in range(5):
        rng, state, view = np.random.default_rng(seed), begin_step(GateState()), None
        for _ in range(200):
            candidate, stable = Counts(latency=_latency(rng, 20, factor)), Counts(latency=_latency(rng, 60, 1.0))
            state = gates.absorb(LATENCY, state, candidate, stable)
            view = verdicts.judge(LATENCY, state, 4)
            if view.verdict != "undecided":
                break
        assert state.threshold is not None
        assert 28 < state.threshold < 40
        assert view is not None
        assert view.verdict == verdict, view.evidence


def test_a_throughput_is_judged_by_whole_windows() -> None:
    wanted = Gate(metric="throughput", min=5, failureLimit=2)
    state = begin_step(GateState())
    for _ in range(10):
        state = gates.fill(wanted, state, 1.0, 6)
    assert verdicts.judge(wanted, state, 4).verdict == "pass"
    for _ in range(10):
        state = gates.fill(wanted, state, 1.0, 3)
    assert verdicts.judge(wanted, state, 4).verdict == "undecided"
    for _ in range(20):
        state = gates.fill(wanted, state, 1.0, 0)
    assert verdicts.judge(wanted, state, 4).verdict == "undecided", "nothing asked is nothing answered"
    assert verdicts.judge(wanted, gates.fill(wanted, state, None, 0), 4).verdict == "undecided"
    for _ in range(10):
        state = gates.fill(wanted, state, 1.0, 3)
    assert verdicts.judge(wanted, state, 4).verdict == "fail"
