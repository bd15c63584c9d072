"""Gates on answers compared with stable's: sums, verdicts with a look at every batch, segments, and their place in a rollout."""

from typing import Any

import numpy as np
import pytest
from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import convert, gates, verdicts
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import Evidence, GatewayFigures, Poll, advance
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.shadow_pairs import Pairs, minus, plus

from .world import World, spec

FLIPS = Gate(metric="shadow/labelFlipRate", max=0.02)
SHIFT = Gate(metric="shadow/scoreShift", max=0.05)
LARGEST = Gate(metric="shadow/maxAbsDiff", max=0.1)
ROLLOUT = """
shadow: {mirrorPercent: 50, minPairs: 200, segment: {header: x-country}}
steps: [{weight: 5}, {weight: 100}]
gates: [{metric: errorRate, max: 0.05}]
"""


def rows(n: int, flips: int = 0, shift: float = 0.0, **differences: dict[str, int]) -> Pairs:
    return Pairs(
        pairs=n,
        flips=flips,
        shift_sum=n * shift,
        shift_square_sum=n * shift**2,
        differences=differences or {"": {"0.0": n}},
    )


def judged(gate: Gate, *batches: dict[str, Pairs]) -> Any:
    state = begin_step(GateState())
    for batch in batches:
        state = gates.absorb(gate, state, Counts(shadow=batch), Counts())
    # A restart in between changes nothing.
    return verdicts.judge(gate, GateState.model_validate_json(state.model_dump_json()), 3)


def test_sums_add_up_and_subtract() -> None:
    one = {"": rows(10, 2, 0.1), "DE": rows(4, 1, 0.1)}
    both = plus(one, {"": rows(5, 1, 0.2), "FR": rows(5, 1, 0.2)})
    assert (both[""].pairs, both[""].flips, both["DE"].pairs, both["FR"].pairs) == (15, 3, 4, 5)
    rest = minus(both, one)
    assert rest.keys() == {"", "FR"}
    assert (rest[""].pairs, rest[""].flips, rest[""].differences) == (5, 1, {"": {"0.0": 5}})
    assert rest[""].shift_sum == pytest.approx(1.0)
    # A gateway that began anew.
    assert minus(one, both).keys() == {"DE"} - {"DE"}


def test_nothing_is_undecided() -> None:
    for gate in (FLIPS, SHIFT, LARGEST):
        view = judged(gate)
        assert (view.verdict, view.evidence) == ("undecided", "no pair of answers yet")


@pytest.mark.parametrize(
    ("gate", "good", "bad"),
    [
        (FLIPS, rows(50), rows(50, flips=10)),
        (SHIFT, rows(50, shift=0.01), rows(50, shift=0.2)),
        (LARGEST, rows(50), rows(50, **{"": {"0.0": 40, "0.5": 10}})),
    ],
)
def test_equal_answers_pass_and_others_fail(gate: Gate, good: Pairs, bad: Pairs) -> None:
    assert judged(gate, *[{"": good}] * 20).verdict == "pass"
    view = judged(gate, *[{"": bad}] * 4)
    assert view.verdict == "fail", view.evidence
    assert view.candidate_samples == 200


def test_a_difference_inside_a_bucket_is_not_held_against_it() -> None:
    # The bound lies inside the bucket: nobody knows on which side, so it neither passes nor fails by it.
    inside = rows(50, **{"": {"0.105": 50}})
    assert judged(LARGEST, *[{"": inside}] * 40).verdict == "undecided"


def test_one_tensor_can_be_meant() -> None:
    pairs = rows(50, **{"": {"9.0": 50}, "score": {"0.0": 50}, "rank": {"9.0": 50}})
    assert judged(Gate(metric="shadow/maxAbsDiff", max=0.1, tensor="score"), *[{"": pairs}] * 20).verdict == "pass"
    assert judged(Gate(metric="shadow/maxAbsDiff", max=0.1, tensor="rank"), *[{"": pairs}] * 20).verdict == "fail"
    assert judged(Gate(metric="shadow/maxAbsDiff", max=0.1, tensor="none"), *[{"": pairs}] * 20).verdict == "undecided"


def test_one_segment_that_goes_wrong_fails_the_gate() -> None:
    # Two in a hundred are flipped in all, as allowed, and half of those of one country.
    batch = {"": rows(250, flips=5), "DE": rows(240), "LI": rows(10, flips=5)}
    view = judged(FLIPS, *[batch] * 6)
    assert view.verdict == "fail", view.evidence
    assert "0.5000 in segment 'LI', the worst of 2" in view.evidence
    # Not proved yet, but it holds the pass back.
    early = judged(FLIPS, *[{"": rows(1000), "LI": rows(0)}] * 2, {"": rows(1000), "LI": rows(40, flips=1)})
    assert early.verdict == "undecided"


@pytest.mark.parametrize("gate", [FLIPS, SHIFT])
def test_false_failures_with_a_look_at_every_batch_stay_below_the_promise(gate: Gate) -> None:
    rng = np.random.default_rng(7)
    failed = 0
    trials = 120
    for _ in range(trials):
        state = begin_step(GateState())
        for _ in range(40):
            # Exactly at the bound, in all and in every segment.
            batch: dict[str, Pairs] = {}
            for segment in ("a", "b", "c"):
                flips = int(rng.binomial(10, 0.02))
                shift = rng.beta(0.5, 9.5, 10)
                batch[segment] = Pairs(
                    pairs=10, flips=flips, shift_sum=float(shift.sum()), shift_square_sum=float((shift**2).sum())
                )
            batch[""] = batch["a"].plus(batch["b"]).plus(batch["c"])
            state = gates.absorb(gate, state, Counts(shadow=batch), Counts())
            if verdicts.judge(gate, state, 3).verdict == "fail":
                failed += 1
                break
    assert failed / trials <= 0.05


def test_a_gateways_figures_become_evidence() -> None:
    answer = prediction_pb2.GetFiguresResponse(instance_id="i")
    version = answer.versions.add(model="m", version="1.1.0", requests=30)
    shadow = version.shadow.add(segment="", pairs=20, label_flips=3, shift_sum=1.0, shift_square_sum=0.5)
    shadow.differences.add(tensor="").buckets.add(le=float("inf"), count=20)
    counts = convert.gateway_counts(answer, "m")
    evidence, begun = Evidence(), {"1.1.0": Counts()}
    for versions in (begun, counts):
        poll = Poll({"g": GatewayFigures("i", versions)})
        evidence = advance(
            evidence, poll, trial=1, step=0, candidate="1.1.0", stable="1.0.0", wanted=[FLIPS, LARGEST], gateways=["g"]
        )
    assert evidence.candidate.shadow[""].flips == 3
    assert verdicts.judge(LARGEST, evidence.gates[1], 1).verdict == "fail"


def test_a_canary_begins_with_copies_and_waits_for_pairs() -> None:
    world = World(spec("1.0.0", ROLLOUT)).served()
    world.apply(spec("1.1.0", ROLLOUT))
    world.until("Progressing")
    assert world.published is not None
    assert world.published.segment_header == "x-country"
    assert [(arm.version, arm.weight, arm.mirror) for arm in world.published.arms] == [
        ("1.0.0", 100, 0),
        ("1.1.0", 0, 50),
    ]
    world.verdict, world.pairs = "pass", 199
    for _ in range(5):
        world.tick()
    assert world.status.weight == 0
    assert world.status.waiting == "199 of 200 answers compared with stable's"
    world.pairs = 200
    world.tick()
    assert world.status.weight == 5
    assert world.until("Promoted").stable.ref.version == "1.1.0"


def test_copies_have_no_outcomes_and_a_canary_does_not_wait_for_them_there() -> None:
    gate = "gates: [{metric: outcome/accuracy, min: 0.5}]\n"
    rollout = "shadow: {minPairs: 10}\nsteps: [{weight: 5}, {weight: 100}]\n" + gate
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    world.pairs = 10
    for _ in range(15):
        world.tick()
    assert world.status.weight == 5, "the first weight comes without outcomes, the second does not"
    assert "outcome/accuracy" in world.status.waiting


@pytest.mark.parametrize(
    ("rollout", "field"),
    [
        ("gates: [{metric: shadow/scoreShift, max: 0.1}]", "spec.rollout.gates[0].metric"),
        ("shadow: {}\ngates: [{metric: shadow/scoreShift, max: 1.5}]", "spec.rollout.gates[0].max"),
        ("shadow: {}\ngates: [{metric: shadow/scoreShift, max: 0.1, tensor: p}]", "spec.rollout.gates[0].tensor"),
        ("shadow: {onSuccess: Promote, minPairs: 5}", "spec.rollout.shadow.onSuccess"),
        ("strategy: BlueGreen\nshadow: {}", "spec.rollout.shadow"),
    ],
)
def test_what_does_not_fit_is_named(rollout: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        spec("1.0.0", rollout)
    assert refused.value.field == field
