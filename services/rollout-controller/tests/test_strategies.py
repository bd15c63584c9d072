"""Blue-green, A/B tests and shadows: cases by name, then anything at any time."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_rollout_controller.actions import VERBS, Refused, with_version
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Sums
from millrace_rollout_controller.state import Status

from .world import World, spec

BLUE_GREEN = """
strategy: BlueGreen
blueGreen: {mirrorPercent: 20, minRequests: 100, keepOldSeconds: 60}
gates: [{metric: errorRate, max: 0.05}]
progressDeadlineSeconds: 60
"""
AB_TEST = """
strategy: ABTest
abTest: {split: 50, minRequests: 100, goal: outcome/accuracy, onSuccess: Promote}
progressDeadlineSeconds: 60
"""
SHADOW = """
strategy: Shadow
shadow: {mirrorPercent: 30, minRequests: 100, onSuccess: Promote}
gates: [{metric: errorRate, max: 0.05}]
progressDeadlineSeconds: 60
"""


def begun(rollout: str, **fields: Any) -> World:
    """1.0.0 is stable and 1.1.0 is in its first stage."""
    world = World(spec("1.0.0", rollout, **fields)).served()
    world.apply(spec("1.1.0", rollout, **fields))
    world.until("Progressing")
    return world


def reasons(status: Status) -> list[str]:
    return [event.reason for event in status.events]


def weights(world: World, version: str, ticks: int) -> list[float]:
    found = []
    for _ in range(ticks):
        world.tick()
        assert world.published is not None
        found.append(world.published.weight(version))
    return found


def decided(better: str) -> Comparison:
    """A comparison whose bounds leave no doubt."""
    gap = {"candidate": 0.2, "stable": -0.2, "undecided": 0.0}[better]
    return Comparison(weight=5000, total=5000 * gap, variance=1000, candidate=Sums(n=10_000), stable=Sums(n=10_000))


def test_blue_green_previews_with_copies_then_switches_in_one_change() -> None:
    world = begun(BLUE_GREEN)
    assert weights(world, "1.1.0", 5) == [0] * 5
    assert "0 of 100 candidate requests" in world.status.waiting
    assert world.published is not None
    assert [(arm.version, arm.mirror) for arm in world.published.arms] == [("1.0.0", 0), ("1.1.0", 20)]
    world.requests, world.verdict = 100, "pass"
    assert set(weights(world, "1.1.0", 4)) <= {0, 100}
    assert world.until("Promoted").stable is not None
    assert [(arm.version, arm.weight, arm.mirror) for arm in world.published.arms] == [
        ("1.1.0", 100, 0),
        ("1.0.0", 0, 0),
    ]


def test_blue_green_keeps_the_old_version_for_undo_and_then_lets_it_go() -> None:
    world = begun(BLUE_GREEN)
    world.requests, world.verdict = 100, "pass"
    world.until("Promoted")
    assert world.status.previous_version == "1.0.0"
    for _ in range(20):
        world.tick()
    assert world.running == {"1.0.0": 2, "1.1.0": 2}
    # The registry is not needed to go back, and one look is enough to switch.
    world.registry.clear()
    assert world.act("undo") is None
    assert weights(world, "1.0.0", 1) == [100]
    world.until("Promoted")
    assert world.status.stable is not None
    assert (world.status.stable.ref.version, world.status.previous_version) == ("1.0.0", "1.1.0")
    assert world.act("undo") is None, "an undo can be undone"
    world.until("Promoted")
    for _ in range(80):
        world.tick()
    assert world.running == {"1.1.0": 2}
    assert "NoLongerKept" in reasons(world.status)


def test_blue_green_without_auto_promotion_waits_for_a_person() -> None:
    rollout = "strategy: BlueGreen\nblueGreen: {autoPromotion: false}"
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    world.until("Paused")
    assert set(weights(world, "1.1.0", 20)) == {0}
    assert "waits for promote" in world.status.waiting
    assert world.act("promote") is None
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.1.0"


def test_blue_green_watches_after_the_switch_and_switches_back() -> None:
    rollout = BLUE_GREEN.replace("minRequests: 100", "watchSeconds: 30")
    world = begun(rollout)
    world.verdict = "pass"
    world.until("Promoting")
    assert set(weights(world, "1.1.0", 10)) == {100}
    assert world.status.phase == "Promoting"
    world.verdict = "fail"
    assert weights(world, "1.1.0", 1) == [0]
    assert world.until("RolledBack").failed is not None


def test_rules_reach_a_preview_but_never_a_kept_version() -> None:
    rules = [{"when": "request.headers['x-user-type'] == 'tester'", "to": "candidate"}]
    world = begun(BLUE_GREEN, routing={"rules": rules})
    assert world.published is not None
    assert len(world.published.rules) == 1
    world.requests, world.verdict = 100, "pass"
    world.until("Promoted")
    world.tick()
    assert world.published.rules == ()
    assert [arm.leaving for arm in world.published.arms] == [False, True]


def test_an_ab_test_keeps_its_split_until_the_goal_decides() -> None:
    world = begun(AB_TEST)
    assert set(weights(world, "1.1.0", 5)) == {50}
    world.requests = 100
    world.comparisons = {"outcome/accuracy": decided("undecided")}
    assert set(weights(world, "1.1.0", 20)) == {50}
    assert "does not tell the versions apart" in world.status.waiting
    view = next(view for view in world.status.comparisons if view.metric == "outcome/accuracy")
    assert (view.better, view.candidate_samples) == ("undecided", 10_000)
    world.comparisons = {"outcome/accuracy": decided("stable")}
    assert set(weights(world, "1.1.0", 5)) == {50}
    assert world.status.phase == "Paused"
    world.comparisons = {"outcome/accuracy": decided("candidate")}
    world.until("Promoted")
    assert world.status.comparisons[0].better == "candidate", "the result stays"


@pytest.mark.parametrize("rollout", [AB_TEST, SHADOW])
def test_a_held_result_waits_for_a_person(rollout: str) -> None:
    world = begun(rollout.replace("onSuccess: Promote", "onSuccess: Hold"))
    world.requests, world.verdict = 5000, "pass"
    world.comparisons = {"outcome/accuracy": decided("candidate")}
    world.until("Paused")
    weight = world.status.weight
    assert set(weights(world, "1.1.0", 50)) == {weight}
    assert "waits for promote or abort" in world.status.waiting
    assert world.act("abort") is None
    world.until("RolledBack")
    world.apply(spec("1.2.0", rollout.replace("onSuccess: Promote", "onSuccess: Hold")))
    world.until("Paused")
    assert world.act("promote") is None
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.2.0"


def test_a_shadow_gets_copies_only_and_is_promoted_when_its_gates_have_passed() -> None:
    world = begun(SHADOW)
    assert world.published is not None
    assert [(arm.version, arm.weight, arm.mirror) for arm in world.published.arms] == [
        ("1.0.0", 100, 0),
        ("1.1.0", 0, 30),
    ]
    world.requests = 100
    assert set(weights(world, "1.1.0", 20)) == {0}
    assert "undecided" in world.status.waiting
    world.verdict = "pass"
    world.until("Promoted")


def test_a_failing_shadow_is_sent_away() -> None:
    world = begun(SHADOW)
    world.verdict = "fail"
    world.tick()
    assert world.published is not None
    assert not any(arm.mirror for arm in world.published.arms)
    world.until("RolledBack")


def test_set_weight_holds_until_resume_and_gates_go_on() -> None:
    rollout = "steps: [{weight: 5}, {weight: 20}]\ngates: [{metric: errorRate, max: 0.05}]"
    world = begun(rollout)
    world.verdict = "pass"
    assert world.act("set-weight", 33.25) is None
    world.tick()
    assert set(weights(world, "1.1.0", 20)) == {33.25}
    assert world.status.phase == "Paused"
    assert "held at 33.25 %" in world.status.waiting
    assert world.act("resume") is None
    seen = weights(world, "1.1.0", 10)
    assert seen[-1] == 100
    assert set(seen) >= {5, 20, 100}
    world = begun(rollout)
    world.act("set-weight", 0)
    assert set(weights(world, "1.1.0", 10)[1:]) == {0}
    world.verdict = "fail"
    world.until("RolledBack")


def test_undo_skips_the_steps_but_not_the_bounds() -> None:
    rollout = "steps: [{weight: 5, minRequests: 1000}]\ngates: [{metric: errorRate, max: 0.05}]"
    world = begun(rollout)
    world.act("promote")
    world.until("Promoted")
    for _ in range(20):
        world.tick()
    assert world.running == {"1.1.0": 2}, "a canary keeps nothing"
    assert world.act("undo") is None
    seen = weights(world, "1.0.0", 12)
    assert set(seen) == {0, 100}
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.0.0"
    # A bound that fails while the gateways still take the switch ends the undo.
    world.act("undo")
    world.tick()
    world.acknowledges = False
    for _ in range(3):
        world.tick()
    world.acknowledges = True
    world.verdict = "fail"
    for _ in range(10):
        world.tick()
    assert world.status.phase in {"RolledBack", "Promoted"}


def test_verbs_that_make_no_sense_are_refused_with_a_reason() -> None:
    world = World(spec("1.0.0")).served()
    for verb in ("promote", "pause", "resume", "abort"):
        assert reason(world.act(verb)) == "NO_ROLLOUT"
    assert reason(world.act("undo")) == "NO_PREVIOUS_VERSION"
    assert reason(world.act("set-weight")) == "INVALID_ARGUMENT"
    assert reason(world.act("promote", 5)) == "INVALID_ARGUMENT"
    world.apply(spec("1.1.0"))
    world.tick()
    assert reason(world.act("promote")) == "CANDIDATE_NOT_READY"
    assert reason(world.act("set-weight", 5)) == "CANDIDATE_NOT_READY"
    world.until("Progressing")
    for weight in (-1, 100.5, 3.333):
        assert reason(world.act("set-weight", weight)) == "INVALID_ARGUMENT"
    world.verdict, world.requests = "pass", 5000
    world.until("Promoted")
    world.apply(spec("1.2.0"))
    world.until("Progressing")
    assert reason(world.act("undo")) == "ROLLOUT_UNDER_WAY"
    shadow = begun(SHADOW)
    assert reason(shadow.act("set-weight", 5)) == "NOT_OF_THIS_STRATEGY"
    assert reason(begun(BLUE_GREEN).act("set-weight", 5)) == "NOT_OF_THIS_STRATEGY"
    first = World(spec("1.0.0"), broken={"1.0.0"})
    first.tick()
    assert reason(first.act("abort")) == "NO_STABLE_VERSION"


@pytest.mark.parametrize(
    "text",
    [
        "# why\nspec:\n  model: m\n  version: 1.0.0  # the good one\n  rollout: {steps: [{weight: 5}]}\n",
        '{"spec": {"model": "m", "version": "1.0.0", "server": {"replicas": 2}}}',
        "spec: {version: '1.0.0', model: m}",
    ],
)
def test_another_version_leaves_the_rest_of_the_text_alone(text: str) -> None:
    changed = with_version(text, "0.9.0-rc.1")
    before, after = yaml.safe_load(text), yaml.safe_load(changed)
    assert after["spec"].pop("version") == "0.9.0-rc.1"
    before["spec"].pop("version")
    assert after == before
    assert ("# the good one" in text) == ("# the good one" in changed)


def reason(refused: Refused | None) -> str:
    assert refused is not None
    return refused.reason


ROLLOUTS = [
    BLUE_GREEN, BLUE_GREEN.replace("minRequests: 100", "watchSeconds: 10, pause: {}"), AB_TEST, SHADOW,
    "steps: [{weight: 5}, {weight: 50, pause: {}}]\ngates: [{metric: errorRate, max: 0.05}]",
]  # fmt: skip
VERSIONS = ["1.0.0", "1.1.0", "1.2.0"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.integers(1, 8)),
        st.tuples(st.just("verdict"), st.sampled_from(["pass", "fail", "undecided"])),
        st.tuples(st.just("goal"), st.sampled_from(["candidate", "stable", "undecided"])),
        st.tuples(st.just("requests"), st.sampled_from([0, 5000])),
        st.tuples(st.just("acknowledges"), st.booleans()),
        st.tuples(st.just("apply"), st.tuples(st.sampled_from(VERSIONS), st.sampled_from(ROLLOUTS))),
        st.tuples(st.just("broken"), st.sets(st.sampled_from(VERSIONS))),
        st.tuples(st.just("verb"), st.tuples(st.sampled_from(VERBS), st.sampled_from([None, 0.0, 33.0, 100.0]))),
        st.tuples(st.just("wait"), st.sampled_from([1, 30, 100])),
    ),
    max_size=40,
)


def live(world: World, events: list[tuple[str, Any]]) -> World:
    for kind, value in events:
        match kind:
            case "tick":
                for _ in range(value):
                    world.tick()
            case "apply":
                world.apply(spec(*value))
            case "goal":
                world.comparisons = {"outcome/accuracy": decided(value)}
            case "verb":
                verb, weight = value
                world.act(verb, (weight or 0.0) if verb == "set-weight" else None)
            case "wait":
                world.tick(value)
            case _:
                setattr(world, kind, value)
        world.tick()
    return world


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.sampled_from(ROLLOUTS), st.integers(0, 3))
def test_whatever_happens_the_promises_hold_and_it_ends_well(
    events: list[tuple[str, Any]], last: str, lag: int
) -> None:
    # What would make it hurry: everything passes unless an event says otherwise.
    eager = World(spec("1.0.0", BLUE_GREEN), verdict="pass", requests=5000, lag=lag).served()
    eager.apply(spec("1.1.0", last))
    world = live(eager, events)
    world.broken, world.acknowledges, world.verdict, world.requests = set(), True, "pass", 5000
    world.comparisons = {"outcome/accuracy": decided("candidate")}
    world.status.paused = False
    world.apply(spec("1.2.0", last.replace("pause: {}", "pause: {duration: 1s}"), balancing="RoundRobin"))
    world.act("resume")
    world.until("Promoted")
    for _ in range(80):
        world.tick()
    assert world.running == {"1.2.0": 2}
    assert world.in_force is not None
    assert world.in_force.weight("1.2.0") == 100


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_a_restart_between_any_two_looks_changes_nothing(events: list[tuple[str, Any]]) -> None:
    without = World(spec("1.0.0", BLUE_GREEN), restart=False)
    with_restarts = World(spec("1.0.0", BLUE_GREEN), restart=True)
    assert live(without, events).status == live(with_restarts, events).status
    assert without.actions == with_restarts.actions
