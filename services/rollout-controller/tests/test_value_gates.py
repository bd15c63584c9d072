"""Gates on values beside the label and on groups of predictions: verdicts, evidence, manifests, and false verdicts by simulation. Seeded."""

import math
from functools import reduce

import numpy as np
import pytest
from millrace_kit.asymptotic import START, log_evidence, tuned, value_variance
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.power import Claim, Plays, draw
from millrace_kit.sequential import Sample
from millrace_rollout_controller import gates, verdicts
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.evidence import Evidence, Poll, advance
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.goals import tracked_values
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.segment_gates import GROUPS
from millrace_rollout_controller.value_gates import Tracked, tracked, values

from .world import spec

REVENUE = Gate(metric="business/revenue", compare="notWorseThanStable", margin=1.0, better="Higher")
BOUNDED = REVENUE.model_copy(update={"value_range": (0.0, 100.0)})
BY_CARRIER = Gate(metric="outcome/accuracy", compare="notWorseThanStable", margin=0.05, segment="outcome/carrier")
RUNS = 600
ALPHA = 0.05
MOST_FALSE = ALPHA + 2.33 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def counts(gate: Gate, groups: dict[str, np.ndarray]) -> Counts:
    """Figures of values by group, and of all together, as the drift monitor would sum them."""
    value = tracked(gate)
    assert value is not None
    groups = {**groups, "": np.concatenate([*groups.values()])} if "" not in groups else groups
    lower, upper = (-math.inf, math.inf) if value.lower is None else (value.lower, value.upper)
    sums = {}
    for name, found in groups.items():
        kept = np.clip(found, lower, upper)
        sums[name] = Sums(n=len(kept), total=float(kept.sum()), square=float((kept**2).sum()))
    return Counts(values={value.key: sums})


def walk(gate: Gate, candidate, stable, *, looks: int = 150, seed: int = 0) -> tuple[str, int, str]:
    """Verdict, candidate values until then, evidence; `candidate` and `stable` draw a batch by group."""
    rng, state, n = np.random.default_rng(seed), begin_step(GateState()), 0
    for _ in range(looks):
        mine = candidate(rng)
        n += sum(map(len, mine.values()))
        state = GateState.model_validate_json(state.model_dump_json())
        state = gates.absorb(gate, state, counts(gate, mine), counts(gate, stable(rng)))
        view = verdicts.judge(gate, state, 4)
        if view.verdict != "undecided":
            break
    return view.verdict, n, view.evidence


def purchases(rng: np.random.Generator, n: int, factor: float = 1.0) -> np.ndarray:
    """What callers pay: a fifth buys, for 10 on average."""
    return (rng.random(n) < 0.2) * np.minimum(rng.lognormal(1.8, 1.0, n), 100.0) * factor


@pytest.mark.parametrize("gate", [REVENUE, BOUNDED])
@pytest.mark.parametrize(("factor", "verdict"), [(0.2, "fail"), (1.3, "pass")])
def test_revenue_is_compared_with_and_without_a_range(gate: Gate, factor: float, verdict: str) -> None:
    for seed in range(3):
        found, n, words = walk(
            gate,
            lambda rng: {"": purchases(rng, 40, factor)},
            lambda rng: {"": purchases(rng, 160)},
            seed=seed,
            looks=400,
        )
        assert found == verdict, words
        assert ("asymptotic" in words) == (gate is REVENUE)
        assert n >= START or gate is BOUNDED


@pytest.mark.parametrize(
    ("gate", "mean", "verdict"),
    [
        (Gate(metric="business/delay_minutes", max=10), 5.0, "pass"),
        (Gate(metric="business/delay_minutes", max=10), 20.0, "fail"),
        (Gate(metric="business/delay_minutes", max=10, valueRange=(0, 300)), 5.0, "pass"),
        (Gate(metric="business/delay_minutes", max=10, valueRange=(0, 300)), 20.0, "fail"),
        (Gate(metric="business/score", min=-3, valueRange=(-50, 50)), 5.0, "pass"),
        (Gate(metric="outcome/mae", max=10), 20.0, "fail"),
        (Gate(metric="outcome/rmse", max=15, valueRange=(0, 100)), 5.0, "pass"),
        (Gate(metric="outcome/rmse", max=15, valueRange=(0, 100)), 30.0, "fail"),
        (Gate(metric="outcome/mae", compare="notWorseThanStable", margin=3, valueRange=(0, 100)), 15.0, "fail"),
    ],
)
def test_bounds_and_errors(gate: Gate, mean: float, verdict: str) -> None:
    power = 2 if gate.metric == "outcome/rmse" else 1
    found, _, words = walk(
        gate, lambda rng: {"": rng.exponential(mean, 50) ** power}, lambda rng: {"": rng.exponential(5, 50) ** power}
    )
    assert found == verdict, words
    assert ("asymptotic" in words) == gate.is_asymptotic


def test_no_values_and_too_few_hold() -> None:
    for gate in (REVENUE, BOUNDED, Gate(metric="business/clicked", min=0.1, segment="client")):
        state = begin_step(GateState())
        for _ in range(50):
            state = gates.absorb(gate, state, Counts(outcomes=10, correct=3), Counts(outcomes=10, correct=9))
        view = verdicts.judge(gate, state, 4)
        assert (view.verdict, view.candidate_samples) == ("undecided", 0)
        assert "no values of the candidate yet" in view.evidence
    state = begin_step(GateState())
    few = counts(REVENUE, {"": np.zeros(START - 1)})
    state = gates.absorb(REVENUE, state, few, counts(REVENUE, {"": np.full(START, 50.0)}))
    assert verdicts.judge(REVENUE, state, 4).verdict == "undecided"


def labels(rng: np.random.Generator, n: int, shares: dict[str, float]) -> dict[str, np.ndarray]:
    return {name: (rng.random(n) < share).astype(float) for name, share in shares.items()}


def test_a_bad_group_fails_the_gate_and_is_named() -> None:
    fine = dict.fromkeys([f"c{i}" for i in range(8)], 0.9)
    found, _, words = walk(
        BY_CARRIER, lambda rng: labels(rng, 5, {**fine, "UA": 0.4}), lambda rng: labels(rng, 20, {**fine, "UA": 0.9})
    )
    assert found == "fail", words
    assert words.startswith("segment 'UA' failed: candidate 0.")
    assert "8 of 9 segments within the limit so far: 'c0'" in words
    assert BY_CARRIER.text.endswith("by outcome/carrier")


def test_a_group_that_looks_bad_holds_the_pass_back() -> None:
    good = {"a": 0.95, "b": 0.95}
    state = begin_step(GateState())
    rng = np.random.default_rng(0)
    for _ in range(60):
        state = gates.absorb(
            BY_CARRIER,
            state,
            counts(BY_CARRIER, labels(rng, 20, good)),
            counts(BY_CARRIER, labels(rng, 40, {"a": 0.85, "b": 0.85})),
        )
    assert verdicts.judge(BY_CARRIER, state, 4).verdict == "pass"
    rare = counts(BY_CARRIER, {"a": np.ones(5), "rare": np.concatenate([np.ones(24), np.zeros(8)])})
    state = gates.absorb(BY_CARRIER, state, rare, counts(BY_CARRIER, {"a": np.ones(5), "rare": np.ones(40)}))
    view = verdicts.judge(BY_CARRIER, state, 4)
    assert view.verdict == "undecided"
    assert "1 of 3 segments look worse than allowed: 'rare'" in view.evidence


def test_a_fail_of_all_together_names_no_group_and_groups_are_bounded() -> None:
    names = [f"g{i}" for i in range(30)]
    found, _, words = walk(
        BY_CARRIER,
        lambda rng: labels(rng, 1, dict.fromkeys(names, 0.6)),
        lambda rng: labels(rng, 4, dict.fromkeys(names, 0.9)),
        looks=40,
    )
    assert found == "fail"
    assert words.startswith("all: candidate 0.")
    assert "of 18 segments" in words


@pytest.mark.parametrize("bounded", [False, True])
def test_figures_become_evidence_by_difference(bounded: bool) -> None:
    gate = (BOUNDED if bounded else REVENUE).model_copy(update={"segment": "client"})
    value = tracked(gate)
    assert value is not None
    assert tracked_values(spec("1.0.0").rollout) == frozenset()

    def poll(**totals: float) -> Poll:
        figures = {
            version: {"": Sums(n=n, total=n * 2.0, square=n * 5.0), "me": Sums(n=n, total=n * 2.0, square=n * 5.0)}
            for version, n in totals.items()
        }
        return Poll(
            outcomes={version.replace("_", "."): Counts(values={value.key: sums}) for version, sums in figures.items()}
        )

    def look(evidence: Evidence, found: Poll) -> Evidence:
        return advance(evidence, found, trial=1, step=0, candidate="1.1", stable="1.0", wanted=[gate], gateways=())

    evidence = look(Evidence(), Poll(outcomes={"1.0": Counts()}))
    # What is tracked only now sets the mark.
    evidence = look(evidence, poll(**{"1_0": 50}))
    assert evidence.gates[0].pending_stable.n == 0
    # The first outcomes of a version come in one batch, which counts.
    evidence = look(evidence, poll(**{"1_0": 150, "1_1": 500}))
    assert (evidence.gates[0].candidate.n, evidence.gates[0].stable.n) == (500, 100)
    assert evidence.gates[0].segments["me"].candidate.n == 500
    assert evidence.gates[0].candidate.mean == pytest.approx(0.02 if bounded else 2.0)
    # The drift monitor began anew: a mark, and on from there.
    evidence = look(evidence, poll(**{"1_0": 10, "1_1": 10}))
    evidence = look(evidence, poll(**{"1_0": 20, "1_1": 15}))
    assert (evidence.gates[0].candidate.n, evidence.gates[0].stable.n) == (505, 110)
    assert not evidence.candidate.values


def test_values_of_a_range_are_moved_to_the_unit() -> None:
    value = Tracked("business/x", -10.0, 30.0)
    sums = values(value, Counts(values={value.key: {"": Sums(n=3, total=20.0, square=1000.0)}}))
    given = (np.array([-10.0, 0.0, 30.0]) + 10) / 40
    assert (sums.n, sums.total, sums.square) == pytest.approx((3, given.sum(), (given**2).sum()))


DRAWS = {
    "normal": lambda rng, shape: rng.normal(5, 2, shape),
    "exponential": lambda rng, shape: rng.exponential(1, shape),
    "a fifth buys": lambda rng, shape: (rng.random(shape) < 0.2) * rng.lognormal(2, 1, shape),
    "one in twenty buys": lambda rng, shape: (rng.random(shape) < 0.05) * rng.lognormal(2, 1, shape),
}


def _limits(draw, *, share: float, gap: float, looks: int = 120, batch: int = 20, seed: int = 1):
    """Of `RUNS` rollouts in the limit: whether each was ever found worse, ever proved to lose less than `gap`, and when found worse."""
    rng, other = np.random.default_rng(seed), round(batch * (1 - share) / share)
    mine, theirs, sums, ratio = np.zeros((3, RUNS)), np.zeros((3, RUNS)), np.zeros(RUNS), 0.0
    h, failed, passed, when = np.zeros(RUNS), np.zeros(RUNS, bool), np.zeros(RUNS, bool), np.full(RUNS, np.inf)
    for _ in range(looks):
        x, y = draw(rng, (RUNS, batch)) - gap, draw(rng, (RUNS, other))
        mine += [np.full(RUNS, batch), x.sum(1), (x * x).sum(1)]
        theirs += [np.full(RUNS, other), y.sum(1), (y * y).sum(1)]
        sums += batch * (y.mean(1) - x.mean(1))
        ratio += batch**2 / other
        if mine[0, 0] < START or theirs[0, 0] < START:
            continue
        own, stable = value_variance(*mine), value_variance(*theirs)
        variance = np.maximum(own, stable) * mine[0] + stable * ratio
        h = np.where(h > 0, h, tuned(variance))
        failed |= log_evidence(sums, variance, h) >= -math.log(ALPHA)
        passed |= log_evidence(gap * mine[0] - sums, variance, h) >= -math.log(ALPHA)
        when[failed & np.isinf(when)] = mine[0, 0]
    return failed, passed, when


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("kind", DRAWS)
def test_equal_versions_are_rarely_rolled_back_in_the_limit(kind: str, share: float) -> None:
    failed, _, _ = _limits(DRAWS[kind], share=share, gap=0.0)
    print(
        f"values without a range, {kind}, candidate {share:.0%}: {failed.mean():.1%} of {RUNS} rollouts of equal versions rolled back"
    )
    assert failed.mean() <= MOST_FALSE


def test_versions_worse_by_the_margin_rarely_pass_in_the_limit_and_a_loss_is_found() -> None:
    for kind, gap in (("normal", 0.4), ("exponential", 0.2), ("a fifth buys", 0.9)):
        _, passed, when = _limits(DRAWS[kind], share=0.2, gap=gap, looks=250)
        rng = np.random.default_rng(0)
        deviation = DRAWS[kind](rng, 200_000).std()
        # Fixed size for a power of 0.8 at one look: the normal quantiles of 0.95 and 0.8, four values of stable for each of the candidate's.
        fixed = max(START, (1.645 + 0.842) ** 2 * deviation**2 * 1.25 / gap**2)
        late = float(np.quantile(when, 0.8))
        print(
            f"values without a range, {kind}, worse by {gap}: {passed.mean():.1%} passed, four of five failed by {late:.0f} values (fixed {fixed:.0f})"
        )
        assert passed.mean() <= MOST_FALSE
        assert late <= 5 * fixed


def test_groups_of_equal_versions_are_rarely_rolled_back() -> None:
    """The gate's own tests (held against each other in `test_false_verdicts.py`), with the part of the error that each group has."""
    rng, shares = np.random.default_rng(6), (0.5, 0.8, 0.8, 0.9, 0.95, 0.6)
    alphas = [ALPHA / 2, *(ALPHA / (2 * GROUPS) for _ in shares)]
    plays = [Plays(Claim(margin=0.05, higher_is_better=True, alpha=alpha), RUNS) for alpha in alphas]
    for _ in range(100):
        arms = [[draw(rng, RUNS, n, share, binary=True) for n in (5, 20)] for share in shares]
        whole = (reduce(_plus, (arm[side] for arm in arms)) for side in (0, 1))
        for each, (mine, theirs) in zip(plays, [tuple(whole), *arms], strict=True):
            each.absorb(mine, theirs)
    failed = np.any([each.failed for each in plays], axis=0)
    print(f"outcome/accuracy by segment: {failed.mean():.1%} of {RUNS} rollouts of equal versions rolled back")
    assert failed.mean() <= MOST_FALSE


def _plus(one: Sample, other: Sample) -> Sample:
    return Sample(one.n + other.n, one.total + other.total, one.square + other.square)


GATES = "steps: [{weight: 50}]\ngates: [%s]"


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        ("{metric: business/, max: 1}", "metric"),
        ("{metric: business/a-b, max: 1}", "metric"),
        ("{metric: outcome/auc, max: 1}", "metric"),
        ("{metric: outcome/rmse, min: 0.1}", "min"),
        (
            "{metric: outcome/rmse, compare: notWorseThanStable, margin: 1, valueRange: [0, 9], maxSamples: 1000, required: Promotion}",
            "maxSamples",
        ),
        ("{metric: outcome/mae, min: 3}", "min"),
        ("{metric: outcome/mae, max: -3}", "max"),
        ("{metric: business/x, compare: notWorseThanStable, margin: 2}", "better"),
        ("{metric: business/x, max: 2, better: Lower}", "better"),
        ("{metric: outcome/mae, compare: notWorseThanStable, margin: 2, better: Lower}", "better"),
        ("{metric: errorRate, compare: notWorseThanStable, margin: 1.5}", "margin"),
        ("{metric: business/x, compare: notWorseThanStable, margin: 2, better: Lower, valueRange: [0, 2]}", "margin"),
        ("{metric: business/x, max: 2, valueRange: [3, 3]}", "valueRange"),
        ("{metric: business/x, max: 2, valueRange: [3]}", "valueRange"),
        ("{metric: business/x, max: 2, valueRange: [3, 9]}", "max"),
        ("{metric: outcome/mae, max: 2, valueRange: [1, 9]}", "valueRange"),
        ("{metric: errorRate, max: 0.5, valueRange: [0, 1]}", "valueRange"),
        ("{metric: errorRate, max: 0.5, segment: client}", "segment"),
        ("{metric: business/x, max: 2, segment: carrier}", "segment"),
        ("{promql: up, max: 2, segment: client}", "segment"),
        (
            "{metric: business/x, compare: notWorseThanStable, margin: 2, better: Lower, maxSamples: 1000, required: Promotion}",
            "maxSamples",
        ),
        (
            "{metric: outcome/accuracy, compare: notWorseThanStable, margin: 0.1, maxSamples: 1000, required: Promotion, segment: client}",
            "maxSamples",
        ),
    ],
)
def test_a_wrong_gate_is_refused_with_its_field(gate: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        spec("1.0.0", GATES % gate)
    assert caught.value.metadata["field"] == f"spec.rollout.gates[0].{field}"


def test_right_gates_say_what_has_to_be_tracked() -> None:
    gates_ = """
    {metric: business/revenue, compare: notWorseThanStable, margin: 2.5, better: Higher, valueRange: [0, 500], segment: feature/origin hub},
    {metric: business/clicked, min: 0.2, segment: client}, {metric: outcome/rmse, max: 20, valueRange: [0, 100]},
    {metric: outcome/mae, compare: notWorseThanStable, margin: 2}, {metric: outcome/accuracy, min: 0.8}"""
    rollout = spec("1.0.0", GATES % gates_).rollout
    assert tracked_values(rollout) == {
        ("business/revenue", 0.0, 500.0, "feature/origin hub"), ("business/clicked", None, None, "client"),
        ("outcome/mse", 0.0, 10_000.0, ""), ("outcome/mae", None, None, ""),
    }  # fmt: skip
    assert rollout.gates[0].text == "business/revenue notWorseThanStable (margin 2.5) by feature/origin hub"
