"""Gates keep their promises, by simulation with a look after every batch. Everything is seeded.

Figures of these runs are printed with `pytest -s` and stand in the README.
"""

import math

import numpy as np
import pytest
from millrace_kit.sequential import (
    ODDS_ABOVE,
    ODDS_BELOW,
    Sample,
    log_growth,
    log_mean,
    one_arm,
    two_arms,
)
from millrace_rollout_controller import gates, measures, verdicts
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.gate_state import GateState, begin_step, log_fail
from millrace_rollout_controller.manifest import Gate

NEEDED = math.log(20)
RUNS = 500


def gate(**fields: object) -> Gate:
    return Gate.model_validate(fields)


ACCURACY = gate(metric="outcome/accuracy", compare="notWorseThanStable", margin=0.05)
BRIER = gate(metric="outcome/brier", compare="notWorseThanStable", margin=0.02)


def binary(rng: np.random.Generator, n: int, mean: np.ndarray | float) -> Sample:
    hits = rng.binomial(n, np.broadcast_to(mean, (RUNS,))).astype(float)
    return Sample(np.full(RUNS, float(n)), hits, hits)


def ever(logs: np.ndarray) -> np.ndarray:
    return np.asarray(log_mean(logs) >= NEEDED)


@pytest.mark.parametrize("per_batch", [1, 5])
@pytest.mark.parametrize("stable_mean", [0.8, 0.02])
def test_two_equal_arms_are_rarely_told_apart_however_often_one_looks(per_batch: int, stable_mean: float) -> None:
    rng = np.random.default_rng(7)
    logs, rejected = np.zeros((RUNS, len(ODDS_ABOVE))), np.zeros(RUNS, bool)
    worse = ODDS_BELOW if stable_mean > 0.5 else ODDS_ABOVE
    for _ in range(1500 // per_batch):
        arms = binary(rng, per_batch, stable_mean), binary(rng, per_batch * 4, stable_mean)
        logs += two_arms(*arms, np.full(RUNS, stable_mean), 0.0, worse)
        rejected |= ever(logs)
    print(f"equal arms, mean {stable_mean}, {per_batch} a look: {rejected.mean():.3f} ever rejected")
    assert rejected.mean() <= 0.05


def test_a_day_that_moves_both_arms_alike_is_no_evidence() -> None:
    """Both accuracies swing between 0.6 and 0.9 while the estimate of stable's is always the overall mean: wrong nearly everywhere."""
    rng = np.random.default_rng(8)
    logs, rejected = np.zeros((RUNS, len(ODDS_ABOVE))), np.zeros(RUNS, bool)
    for look in range(600):
        mean = 0.75 + 0.15 * math.sin(look / 40)
        logs += two_arms(binary(rng, 5, mean), binary(rng, 20, mean), np.full(RUNS, 0.75), 0.0, ODDS_BELOW)
        rejected |= ever(logs)
    assert rejected.mean() <= 0.05


def test_a_candidate_worse_by_the_margin_rarely_passes() -> None:
    rng = np.random.default_rng(9)
    logs, passed = np.zeros((RUNS, len(ODDS_ABOVE))), np.zeros(RUNS, bool)
    for _ in range(400):
        logs += two_arms(binary(rng, 5, 0.75), binary(rng, 20, 0.8), np.full(RUNS, 0.8), -0.05, ODDS_ABOVE)
        passed |= ever(logs)
    print(f"worse by exactly the margin: {passed.mean():.3f} ever passed")
    assert passed.mean() <= 0.05


@pytest.mark.parametrize(("bound", "ratios"), [(0.05, ODDS_ABOVE), (0.05, ODDS_BELOW), (0.01, ODDS_ABOVE)])
def test_a_rate_at_its_bound_is_rarely_called_either_way(bound: float, ratios: np.ndarray) -> None:
    rng = np.random.default_rng(10)
    logs, rejected = np.zeros((RUNS, len(ratios))), np.zeros(RUNS, bool)
    for _ in range(3000):
        logs += one_arm(binary(rng, 1, bound), bound, ratios)
        rejected |= ever(logs)
    assert rejected.mean() <= 0.05


def test_the_two_arm_e_value_is_at_most_one_in_expectation_exactly() -> None:
    """Over all outcomes of one batch, not by simulation: on the border of the null and inside it."""
    n_c, n_s = 3, 7
    for shift in (0.0, -0.05, 0.03):
        for ratios in (ODDS_ABOVE, ODDS_BELOW):
            inside = -1.0 if ratios[0] > 1 else 1.0
            for believed in (0.1, 0.5, 0.9):
                for stable in (0.2, 0.55, 0.85):
                    for further in (0.0, 0.1):
                        mean = min(max(stable + shift + inside * further, 0.0), 1.0)
                        expected = np.zeros(len(ratios))
                        for k_c in range(n_c + 1):
                            for k_s in range(n_s + 1):
                                chance = math.comb(n_c, k_c) * mean**k_c * (1 - mean) ** (n_c - k_c)
                                chance *= math.comb(n_s, k_s) * stable**k_s * (1 - stable) ** (n_s - k_s)
                                arms = Sample.of(n_c, k_c), Sample.of(n_s, k_s)
                                expected += chance * np.exp(two_arms(*arms, np.asarray(believed), shift, ratios))
                        assert np.all(expected <= 1 + 1e-6), (shift, believed, stable, further, expected)


def test_the_bound_for_values_between_0_and_1_is_a_lower_bound() -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        values, center = rng.beta(0.5, 2, 20), np.asarray(rng.uniform(0.05, 0.95))
        slope = np.array([rng.uniform(-0.99 / (1 - center), 0.99 / center)])
        bound = log_growth(Sample.of(20, values.sum(), (values**2).sum()), center, slope)
        assert bound[0] <= np.log1p(slope[0] * (values - center)).sum() + 1e-9


def play(wanted: Gate, seed: int, candidate: float, stable: float, looks: int = 600) -> tuple[str, int]:
    """One rollout at 5 %: 5 candidate and 95 stable values a look, four steps in the manifest; verdict and candidate values."""
    rng = np.random.default_rng(seed)
    state, view = begin_step(GateState()), None
    for _ in range(looks):
        batch = []
        for n, mean in ((5, candidate), (95, stable)):
            if wanted.metric == "outcome/brier":
                values = rng.beta(mean * 4, (1 - mean) * 4, n)
                batch.append(Counts(outcomes=n, brier_sum=values.sum(), brier_square_sum=(values**2).sum()))
            else:
                batch.append(Counts(outcomes=n, correct=int(rng.binomial(n, mean))))
        state = gates.absorb(wanted, state, *batch)
        view = verdicts.judge(wanted, state, 4)
        if view.verdict != "undecided":
            return view.verdict, view.candidate_samples
    return "undecided", 0


@pytest.mark.parametrize(
    ("wanted", "candidate", "stable", "verdict", "most"),
    [
        (ACCURACY, 0.83, 0.80, "pass", 450),
        (ACCURACY, 0.80, 0.80, "pass", 1100),
        (ACCURACY, 0.72, 0.80, "fail", 500),
        (ACCURACY, 0.65, 0.80, "fail", 250),
        (BRIER, 0.15, 0.15, "pass", 900),
        (BRIER, 0.19, 0.15, "fail", 450),
    ],
)
def test_how_soon_a_verdict_comes(wanted: Gate, candidate: float, stable: float, verdict: str, most: int) -> None:
    played = [play(wanted, seed, candidate, stable) for seed in range(20)]
    delays = [n for found, n in played if found == verdict]
    print(f"{wanted.text}: candidate {candidate}, stable {stable}: {verdict} after a median of {np.median(delays):.0f}")
    assert len(delays) >= 19
    assert np.median(delays) <= most


def test_no_false_rollback_of_an_equal_version_by_the_whole_gate() -> None:
    verdicts = [play(ACCURACY, seed, 0.8, 0.8, looks=60)[0] for seed in range(40)]
    assert verdicts.count("fail") <= 2


def test_what_breaks_only_at_a_later_step_is_found_quickly() -> None:
    wanted = gate(metric="errorRate", max=0.05)
    state = begin_step(GateState())
    for _ in range(100):
        state = gates.absorb(wanted, state, Counts(requests=50), Counts())
    assert verdicts.judge(wanted, state, 4).verdict == "pass"
    state = begin_step(state)
    for look in range(1, 40):
        state = gates.absorb(wanted, state, Counts(requests=10, errors=3), Counts())
        view = verdicts.judge(wanted, state, 4)
        if view.verdict == "fail":
            break
        if look * 10 >= verdicts.STEP_SAMPLES:
            assert view.verdict == "undecided", "a step that looks bad does not pass on the credit of the one before"
    assert look <= 4


def test_latency_near_the_bound_counts_against_both_verdicts() -> None:
    wanted = gate(metric="latencyP99Ms", max=100)
    # Only buckets that are not empty are sent, as the gateway does.
    counts = Counts(latency={"21.0": 90, "104.0": 6, "300.0": 3, "inf": 1})
    measured = measures.measure(wanted, counts, Counts())
    failing, passing = measured.failing, measured.passing
    assert (failing.n, failing.total, passing.n, passing.total) == (100, 4, 100, 10)


def test_slow_versions_fail_within_few_requests_and_fast_ones_pass() -> None:
    wanted = gate(metric="latencyP99Ms", max=100)
    state = begin_step(GateState())
    state = gates.absorb(wanted, state, Counts(latency={"500.0": 4, "inf": 0}), Counts())
    assert verdicts.judge(wanted, state, 4).verdict == "fail"
    state = begin_step(GateState())
    n = 0
    while n < 1000:
        n += 1
        state = gates.absorb(wanted, state, Counts(latency={"100.0": 1, "inf": 0}), Counts())
        if verdicts.judge(wanted, state, 4).verdict == "pass":
            break
    assert 300 < n < 450


@pytest.mark.parametrize(
    "wanted", [ACCURACY, BRIER, gate(metric="errorRate", max=0.01), gate(metric="latencyP99Ms", max=1)]
)
def test_no_data_is_undecided(wanted: Gate) -> None:
    state = begin_step(GateState())
    for _ in range(100):
        state = gates.absorb(wanted, state, Counts(), Counts(requests=9, outcomes=9, correct=9))
    view = verdicts.judge(wanted, state, 4)
    assert (view.verdict, view.candidate_samples) == ("undecided", 0)
    assert "no data" in view.evidence


def test_a_difference_inside_the_margin_never_rolls_back() -> None:
    wanted = gate(metric="outcome/accuracy", compare="notWorseThanStable", margin=0.3)
    state = begin_step(GateState())
    for _ in range(300):
        state = gates.absorb(wanted, state, Counts(outcomes=100, correct=70), Counts(outcomes=100, correct=80))
    assert log_fail(state, 4) > NEEDED
    assert verdicts.judge(wanted, state, 4).verdict == "pass"
