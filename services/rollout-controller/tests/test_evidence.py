"""Evidence from running sums: counted once, across restarts of every side."""

from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import Evidence, GatewayFigures, Poll, advance
from millrace_rollout_controller.manifest import Gate

GATES = (Gate(metric="errorRate", max=0.05),)
A, B = "gateway-a:1", "gateway-b:1"


def step(evidence: Evidence, poll: Poll, *, trial: int = 1, at: int = 0, candidate: str = "2.0.0") -> Evidence:
    # Through JSON each time, as after a restart.
    after = advance(
        evidence, poll, trial=trial, step=at, candidate=candidate, stable="1.0.0", wanted=GATES, gateways=[A, B]
    )
    return Evidence.model_validate_json(after.model_dump_json())


def figures(instance: str, candidate: int, stable: int = 0, errors: int = 0) -> GatewayFigures:
    counts = {
        "2.0.0": Counts(requests=candidate, errors=errors, latency={"10.0": candidate}),
        "1.0.0": Counts(requests=stable),
    }
    return GatewayFigures(instance, counts)


def test_the_first_answer_only_sets_the_mark() -> None:
    evidence = step(Evidence(), Poll({A: figures("x", 100)}))
    assert evidence.candidate.requests == 0
    evidence = step(evidence, Poll({A: figures("x", 130, 50, 2)}))
    assert (evidence.candidate.requests, evidence.candidate.errors, evidence.stable.requests) == (30, 2, 50)
    assert evidence.gates[0].candidate.n == 30


def test_a_restarted_gateway_counts_from_zero_and_several_add_up() -> None:
    evidence = step(Evidence(), Poll({A: figures("x", 100), B: figures("p", 0)}))
    evidence = step(evidence, Poll({A: figures("y", 7), B: figures("p", 5)}))
    assert evidence.candidate.requests == 12
    evidence = step(evidence, Poll({B: figures("p", 6)}))
    assert evidence.candidate.requests == 13
    evidence = step(evidence, Poll({A: figures("y", 10)}))
    assert evidence.candidate.requests == 16


def test_no_answer_and_the_same_answer_add_nothing() -> None:
    evidence = step(Evidence(), Poll({A: figures("x", 1)}, {"2.0.0": Counts(outcomes=5, correct=5)}))
    again = step(step(evidence, Poll()), Poll({A: figures("x", 1)}, {"2.0.0": Counts(outcomes=5, correct=5)}))
    assert again.candidate == Counts(latency=again.candidate.latency)
    assert again.candidate.requests == again.candidate.outcomes == 0


def test_sums_that_fall_only_move_the_mark() -> None:
    evidence = step(Evidence(), Poll(outcomes={"2.0.0": Counts(outcomes=50, correct=40)}))
    evidence = step(evidence, Poll(outcomes={"2.0.0": Counts(outcomes=10, correct=10)}))
    assert evidence.candidate.outcomes == 0
    evidence = step(evidence, Poll(outcomes={"2.0.0": Counts(outcomes=13, correct=12)}))
    assert (evidence.candidate.outcomes, evidence.candidate.correct) == (3, 2)


def test_a_new_step_and_a_new_trial() -> None:
    evidence = step(Evidence(), Poll({A: figures("x", 0)}))
    evidence = step(evidence, Poll({A: figures("x", 10)}))
    evidence = step(evidence, Poll({A: figures("x", 15)}), at=1)
    assert (evidence.candidate.requests, evidence.step_candidate.requests) == (15, 5)
    assert len(evidence.gates[0].fail_logs) == 2
    evidence = step(evidence, Poll({A: figures("x", 18)}), trial=2)
    assert (evidence.candidate.requests, evidence.gates[0].candidate.n) == (3, 3)


def test_without_a_candidate_only_the_marks_move() -> None:
    evidence = step(Evidence(), Poll({A: figures("x", 0)}), candidate="")
    evidence = step(evidence, Poll({A: figures("x", 10)}), candidate="")
    evidence = step(evidence, Poll({A: figures("x", 12)}))
    assert evidence.candidate.requests == 2
