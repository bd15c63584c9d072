"""After all traffic: a window in which the new version may still be taken back; and steps that end when everything is decided."""

import pytest
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.gate_state import GateState
from millrace_rollout_controller.kubernetes.public_status import public
from millrace_rollout_controller.stages import guarded_until, stages

from .world import World, gate_state, spec

GUARD = """
steps: [{weight: 50}, {weight: 100}]
gates: [{metric: errorRate, max: 0.05}]
guard: {window: 1h}
"""
HELD_BACK = GUARD.replace("window: 1h", "window: 1h, holdBackPercent: 5")
DECIDED = """
steps: [{weight: 10, until: Decided, maxRequests: 500%s}, {weight: 50}, {weight: 100}]
gates: [{metric: errorRate, max: 0.05, required: Promotion}]
"""
ON_EVIDENCE = """
steps: [{weight: 5, minRequests: 100}, {weight: 20, minRequests: 200}, {weight: 50, minRequests: 400}, {weight: 100}]
gates: [{metric: errorRate, max: 0.05}]
advance: OnEvidence
"""


def guarded(rollout: str = GUARD) -> World:
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    world.verdict = "pass"
    for _ in range(60):
        if world.tick().guarding and world.status.step_since is not None:
            return world
    raise AssertionError(world.status.waiting)


def stable(world: World) -> str:
    assert world.status.stable is not None
    return world.status.stable.ref.version


@pytest.mark.parametrize(("rollout", "weight"), [(GUARD, 100), (HELD_BACK, 95)])
def test_the_version_before_stays_ready_through_the_window_and_then_goes(rollout: str, weight: float) -> None:
    world = guarded(rollout)
    assert (world.status.weight, stable(world)) == (weight, "1.0.0")
    # At 100 % late outcomes are no condition of the window's end; a held-back part goes over only while the gates still pass.
    world.verdict = "undecided" if weight == 100 else "pass"
    for _ in range(30):
        world.tick(seconds=100)
    assert world.status.candidate is not None
    assert world.running["1.0.0"] == 2
    assert "guarded until 2026-01-01" in world.status.waiting
    shown = public(world.wanted, world.status, generation=1, problem=None, last_action=None)
    assert shown["guardedUntil"].startswith("2026-01-01T01:")
    for _ in range(20):
        world.tick(seconds=100)
    assert stable(world) == "1.1.0"
    assert guarded_until(world.wanted, world.status) is None
    decisions = [one.decision for one in world.status.history]
    assert decisions[-2:] == (["Guarded", "Promoted"] if weight == 100 else ["StepPassed", "Promoted"])
    assert "Guarded" in decisions
    world.until("Promoted")
    for _ in range(20):
        world.tick()
    assert "1.0.0" not in world.running


@pytest.mark.parametrize("rollout", [GUARD, HELD_BACK])
def test_a_late_outcome_takes_the_version_back_at_once_after_all_traffic(rollout: str) -> None:
    world = guarded(rollout)
    for _ in range(10):
        world.tick(seconds=100)
    world.verdict = "fail"
    world.tick()
    assert world.status.route is not None
    assert world.status.route.weight("1.0.0") == 100
    world.until("RolledBack")
    assert world.status.history[-1].decision == "GateFailed"


@pytest.mark.parametrize("rollout", [GUARD, HELD_BACK])
def test_a_person_ends_the_window_either_way(rollout: str) -> None:
    world = guarded(rollout)
    assert world.act("promote") is None
    world.until("Promoted")
    assert stable(world) == "1.1.0"
    world = guarded(rollout)
    assert world.act("abort") is None
    world.until("RolledBack")
    assert stable(world) == "1.0.0"


@pytest.mark.parametrize("rollout", [GUARD, HELD_BACK])
def test_the_next_version_ends_the_window_and_is_compared_with_the_one_in_it(rollout: str) -> None:
    world = guarded(rollout)
    world.apply(spec("1.2.0", rollout))
    for _ in range(20):
        world.tick()
        if stable(world) == "1.1.0":
            break
    assert stable(world) == "1.1.0"
    world.tick()
    assert world.status.candidate is not None
    assert world.status.candidate.ref.version == "1.2.0"


def test_a_promote_before_the_window_skips_the_steps_and_not_the_window() -> None:
    world = World(spec("1.0.0", GUARD)).served()
    world.apply(spec("1.1.0", GUARD))
    world.until("Progressing")
    assert world.act("promote") is None
    for _ in range(10):
        world.tick(seconds=10)
    assert world.status.guarding
    assert stable(world) == "1.0.0"
    assert world.act("promote") is None
    world.until("Promoted")


def test_an_undo_has_no_window() -> None:
    world = guarded()
    assert world.act("promote") is None
    world.until("Promoted")
    assert world.act("undo") is None
    for _ in range(20):
        world.tick()
    assert stable(world) == "1.0.0"


def decided(rest: str, requests: int) -> World:
    rollout = DECIDED % rest
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    world.until("Progressing")
    world.requests = requests
    for _ in range(5):
        world.tick()
    return world


def test_a_step_until_decided_waits_for_gates_that_only_the_promotion_requires() -> None:
    world = decided("", 499)
    assert world.status.step == 0
    assert "is undecided" in world.status.waiting
    world.verdict = "pass"
    for _ in range(5):
        world.tick()
    assert world.status.step > 0


def test_an_undecided_step_holds_at_its_maximum_or_rolls_back_where_that_is_asked_for() -> None:
    world = decided("", 500)
    assert world.status.weight == 10
    assert "promote or abort decides" in world.status.waiting
    assert decided(", onUndecided: Rollback", 499).status.weight == 10
    world = decided(", onUndecided: Rollback", 500)
    assert world.status.failed is not None
    assert world.status.failed.reason == "Undecided"
    assert "not decided within 500 requests of step 1" in world.status.failed.message


class Evident(World):
    """A world whose candidate has some requests in the whole trial, and a gate close to failing or not."""

    of_trial = 0
    close = False

    def evidence(self) -> Evidence:
        known = super().evidence()
        states: list[GateState] = [gate_state(self.verdict) for _ in known.gates]
        if self.close:
            states = [state.model_copy(update={"fail_logs": [[2.5] * 7]}) for state in states]
        return known.model_copy(update={"candidate": Counts(requests=self.of_trial), "gates": states})


def test_weights_follow_the_evidence_of_the_whole_rollout() -> None:
    assert [stage.min_requests for stage in stages(spec("1.0.0", ON_EVIDENCE))] == [100, 300, 700, 700]
    world = Evident(spec("1.0.0", ON_EVIDENCE)).served()
    world.apply(spec("1.1.0", ON_EVIDENCE))
    world.verdict = "pass"
    world.until("Progressing")
    world.of_trial = 650
    for _ in range(10):
        world.tick()
    assert world.status.weight == 50
    world.close, world.verdict = True, "undecided"
    for _ in range(4):
        world.tick()
    assert world.status.weight == 5
    assert "half the way to failing" in world.status.waiting
    world.close, world.verdict, world.of_trial = False, "pass", 690
    for _ in range(4):
        world.tick()
    assert world.status.weight == 50


@pytest.mark.parametrize(
    ("rollout", "field"),
    [
        (DECIDED.replace(", maxRequests: 500", "") % "", "spec.rollout.steps[0].maxRequests"),
        (DECIDED.replace("until: Decided, ", "") % "", "spec.rollout.steps[0].maxRequests"),
        (DECIDED % ", minRequests: 501", "spec.rollout.steps[0].maxRequests"),
        (GUARD.replace("1h", "0s"), "spec.rollout.guard.window"),
        (HELD_BACK.replace("50", "96"), "spec.rollout.guard.holdBackPercent"),
        ("strategy: BlueGreen\nguard: {window: 1h, holdBackPercent: 5}", "spec.rollout.guard.holdBackPercent"),
        ("strategy: BlueGreen\nadvance: OnEvidence", "spec.rollout.advance"),
    ],
)
def test_what_does_not_fit_is_refused(rollout: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        spec("1.0.0", rollout)
    assert caught.value.field == field
