"""The reconciler: cases by name, then anything at any time."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_rollout_controller.reconciler import Refusal
from millrace_rollout_controller.state import Status

from .support import version_ref
from .world import ROLLOUT, World, spec


def reasons(status: Status) -> list[str]:
    return [event.reason for event in status.events]


def condition(status: Status, kind: str) -> tuple[str, str]:
    return next((c.status, c.reason) for c in status.conditions if c.type == kind)


def canary(version: str = "1.1.0", **fields: Any) -> World:
    """1.0.0 is stable and `version` has its first weight."""
    world = World(spec("1.0.0")).served()
    for name, value in fields.items():
        setattr(world, name, value)
    world.apply(spec(version))
    world.until("Progressing")
    return world


def test_the_first_version_takes_all_traffic_when_it_is_ready() -> None:
    world = World(spec("1.0.0"), broken={"1.0.0"})
    for _ in range(5):
        assert world.tick().phase == "Preparing"
        assert world.published is None
    world.broken.clear()
    status = world.until("Promoted")
    assert world.in_force is not None
    assert world.in_force.weight("1.0.0") == 100
    assert condition(world.tick(), "Ready") == ("True", "Serving")
    assert condition(status, "Degraded")[0] == "False"
    assert status.observed_generation == 1
    assert world.in_force.input_tensor == "features"
    assert world.in_force.feature_service == "flight_delay"


def test_a_canary_goes_step_by_step_and_drains_the_old_version() -> None:
    world = canary()
    weights = set()
    world.requests = 100
    for _ in range(10):
        weights.add(world.status.weight)
        world.tick()
    assert weights == {5}, "undecided holds"
    world.verdict = "pass"
    while world.status.phase != "Promoted":
        weights.add(world.tick().weight)
    assert weights >= {5, 50, 100}
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.1.0"
    assert world.running == {"1.0.0": 2, "1.1.0": 2}, "the old version still drains"
    for _ in range(10):
        world.tick()
    assert world.running == {"1.1.0": 2}
    assert "ServersStopped" in reasons(world.status)
    assert world.in_force is not None
    assert [arm.version for arm in world.in_force.arms] == ["1.1.0"]


def test_a_candidate_in_stables_own_servers_has_a_number_and_waits_for_memory() -> None:
    world = World(spec("1.0.0", server={"replicas": 2, "placement": "Shared"})).served()
    assert world.in_force is not None
    assert [arm.server_version for arm in world.in_force.arms] == ["1000000000000"]
    world.broken = {"1.1.0"}
    world.refusals["1.1.0"] = Refusal(
        "InsufficientMemory", "1.1.0 needs 900 MiB, and 200 MiB are free", permanent=False
    )
    world.apply(spec("1.1.0", server={"replicas": 2, "placement": "Shared"}))
    for _ in range(500):
        status = world.tick()
    assert status.candidate is not None, "a wait for memory has no deadline"
    assert condition(status, "Progressing") == ("False", "InsufficientMemory")
    assert condition(status, "Ready") == ("True", "Serving")
    assert "200 MiB are free" in status.waiting
    world.broken, world.refusals = set(), {}
    world.until("Progressing")
    assert world.in_force is not None
    numbers = {arm.version: arm.server_version for arm in world.in_force.arms}
    assert numbers == {"1.0.0": "1000000000000", "1.1.0": "1000001000000"}
    assert condition(world.tick(), "Progressing") == ("True", "Progressing")


def test_too_few_requests_hold() -> None:
    world = canary(verdict="pass")
    world.requests = 99
    for _ in range(10):
        assert world.tick().weight == 5
    assert "99 of 100" in world.status.waiting
    world.requests = 100
    assert world.tick().weight == 50


def test_a_candidate_is_in_the_route_without_weight_before_it_gets_any() -> None:
    world = World(spec("1.0.0")).served()
    world.apply(spec("1.1.0"))
    seen = []
    while not seen or seen[-1] == 0:
        world.tick()
        if world.published and any(arm.version == "1.1.0" for arm in world.published.arms):
            seen.append(world.published.weight("1.1.0"))
    assert seen[0] == 0
    assert seen[-1] == 5


def test_one_failing_gate_rolls_back_at_once_and_the_version_is_not_tried_again() -> None:
    world = canary()
    world.verdict = "fail"
    status = world.tick()
    assert status.route is not None
    assert (status.phase, status.route.weight("1.1.0")) == ("RollingBack", 0)
    assert world.until("RolledBack").failed is not None
    for _ in range(20):
        assert world.tick().phase == "RolledBack"
    assert world.running == {"1.0.0": 2}
    assert condition(world.status, "Degraded") == ("True", "GateFailed")
    assert condition(world.status, "Ready") == ("True", "Serving")
    # Another spec, even one that only changes something else, is a new try.
    world.verdict = "undecided"
    world.apply(spec("1.1.0", balancing="RoundRobin"))
    assert world.until("Progressing").trial == 3


def test_servers_run_until_every_gateway_has_let_go() -> None:
    world = canary()
    world.verdict, world.acknowledges = "fail", False
    for _ in range(30):
        world.tick()
    assert world.status.phase == "RollingBack"
    assert world.running == {"1.0.0": 2, "1.1.0": 2}
    world.acknowledges = True
    world.until("RolledBack")
    for _ in range(10):
        world.tick()
    assert world.running == {"1.0.0": 2}


def test_weights_wait_for_the_gateways() -> None:
    world = canary(verdict="pass")
    world.requests, world.acknowledges = 1000, False
    world.tick()
    world.tick()
    for _ in range(10):
        assert world.tick().weight == 50
    assert "gateways" in world.status.waiting
    world.acknowledges = True
    world.until("Promoted")


def test_a_new_version_in_the_middle_goes_back_to_stable_and_starts_over() -> None:
    world = canary()
    world.apply(spec("1.2.0"))
    status = world.tick()
    assert status.route is not None
    assert status.route.weight("1.0.0") == 100
    assert "Superseded" in reasons(status)
    status = world.until("Progressing")
    assert status.candidate is not None
    assert (status.candidate.ref.version, status.step, status.weight) == ("1.2.0", 0, 5)


def test_the_stable_version_wanted_again_ends_the_canary() -> None:
    world = canary()
    world.apply(spec("1.0.0"))
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.0.0"
    for _ in range(10):
        world.tick()
    assert world.running == {"1.0.0": 2}


def test_a_candidate_that_never_gets_ready_is_rolled_back() -> None:
    world = World(spec("1.0.0"), broken={"1.1.0"}).served()
    world.apply(spec("1.1.0"))
    for _ in range(58):
        assert world.tick().phase == "Preparing"
    world.until("RolledBack")
    assert world.status.failed is not None
    assert world.status.failed.reason == "ProgressDeadlineExceeded"


def test_a_candidate_whose_servers_die_gets_no_traffic_and_is_rolled_back_in_time() -> None:
    world = canary()
    world.broken.add("1.1.0")
    status = world.tick()
    assert status.route is not None
    assert status.route.weight("1.1.0") == 0
    world.broken.clear()
    status = world.tick()
    assert status.route is not None
    assert status.route.weight("1.1.0") == 5
    world.broken.add("1.1.0")
    world.until("RolledBack", 70)


def test_stable_servers_that_die_keep_their_place_in_the_route() -> None:
    world = World(spec("1.0.0")).served()
    world.broken.add("1.0.0")
    status = world.tick()
    assert status.route is not None
    assert status.route.arms[0].endpoints == ("1.0.0:0", "1.0.0:1")
    assert condition(status, "Ready") == ("False", "NoReadyServers")
    assert condition(status, "Degraded") == ("True", "ServersMissing")


def test_another_signature_is_refused() -> None:
    world = World(spec("1.0.0")).served()
    other = version_ref("1.1.0", b"x")
    world.registry["1.1.0"] = other.model_copy(update={"feature_names": ("a", "b", "c", "e")})
    world.apply(spec("1.1.0"))
    world.until("RolledBack")
    assert world.status.failed is not None
    assert world.status.failed.reason == "SignatureChanged"
    assert world.running == {"1.0.0": 2}


def test_a_rule_about_a_feature_that_the_model_does_not_have_is_told() -> None:
    rules = [
        {"when": f"features['{name}'] > 1 || request.inputs['x'] == 1", "to": "candidate"} for name in ("a", "gone")
    ]
    world = World(spec("1.0.0", routing={"rules": rules}))
    world.registry["1.0.0"] = version_ref("1.0.0", b"x").model_copy(update={"feature_names": ("a", "b")})
    world.served()

    def told() -> list[str]:
        return [one.message for one in world.status.events if one.reason == "UnknownFeature"]

    assert told() == ["rules read features that 1.0.0 does not have: gone"]
    changed = [{"when": "features['never'] > 1", "to": "candidate"}]
    world.apply(spec("1.0.0", routing={"rules": changed}))
    world.tick()
    assert told()[1:] == ["rules read features that 1.0.0 does not have: never"]


def test_other_feature_definitions_are_refused_once_declared() -> None:
    world = World(spec("1.0.0"))
    world.registry["1.0.0"] = version_ref("1.0.0", b"x").model_copy(update={"definitions": "a" * 64})
    world.served()
    world.registry["1.1.0"] = version_ref("1.1.0", b"y")
    world.apply(spec("1.1.0"))
    world.until("Progressing")
    world.registry["1.2.0"] = version_ref("1.2.0", b"z").model_copy(update={"definitions": "b" * 64})
    world.apply(spec("1.2.0"))
    world.until("RolledBack")
    assert world.status.failed is not None
    assert world.status.failed.reason == "DefinitionsChanged"


def test_a_tampered_artifact_is_refused_at_once() -> None:
    world = World(spec("1.0.0")).served()
    world.refusals["1.1.0"] = Refusal("DataLoss", "DATA_LOSS: other content", permanent=True)
    world.broken.add("1.1.0")
    world.apply(spec("1.1.0"))
    world.until("RolledBack", 10)
    assert "DataLoss" in reasons(world.status)
    first = World(spec("1.1.0"), refusals=world.refusals, broken={"1.1.0"})
    first.until("Degraded", 10)
    assert condition(first.status, "Ready") == ("False", "NoStableVersion")


def test_a_version_the_registry_does_not_have_waits_for_it() -> None:
    world = World(spec("1.0.0")).served()
    ref = world.registry["1.1.0"]
    world.registry["1.1.0"] = Refusal("VersionNotFound", "no version named 1.1.0", permanent=False)
    world.apply(spec("1.1.0"))
    for _ in range(100):
        assert world.tick().phase == "Preparing"
    assert reasons(world.status).count("VersionNotFound") == 1
    world.registry["1.1.0"] = ref
    world.until("Progressing")


def test_pause_resume_abort_and_promote() -> None:
    world = canary(verdict="pass")
    world.requests, world.status.paused = 1000, True
    for _ in range(10):
        assert (world.tick().phase, world.status.weight) == ("Paused", 5)
    world.status.paused = False
    world.tick()
    assert world.status.weight == 50
    world.status.aborted = True
    world.until("RolledBack")
    assert world.status.failed is not None
    assert world.status.failed.reason == "Aborted"
    world = canary()
    world.status.forced = True
    world.until("Promoted")
    assert world.status.stable is not None
    assert world.status.stable.ref.version == "1.1.0"


def test_a_paused_rollout_still_rolls_back() -> None:
    world = canary()
    world.status.paused, world.verdict = True, "fail"
    world.until("RolledBack")


def test_pauses_of_steps() -> None:
    rollout = "steps: [{weight: 5, pause: {duration: 10s}}, {weight: 50, pause: {}}]"
    world = World(spec("1.0.0")).served()
    world.verdict = "pass"
    world.apply(spec("1.1.0", rollout))
    world.until("Progressing")
    for _ in range(10):
        assert world.tick().weight == 5
    world.until("Paused", 5)
    for _ in range(30):
        assert world.tick().weight == 50
    world.status.resumed_step = 1
    world.until("Promoted")


def test_gates_that_are_required_only_for_promotion_or_never() -> None:
    world = World(spec("1.0.0")).served()
    rollout = ROLLOUT.replace("max: 0.05", "max: 0.05, required: Promotion")
    world.requests = 1000
    world.apply(spec("1.1.0", rollout))
    world.until("Progressing")
    world.verdict = "pass"
    world.tick()
    world.verdict = "undecided"
    for _ in range(10):
        assert world.tick().weight <= 50
    assert world.status.weight == 50
    world.verdict = "pass"
    world.until("Promoted")


def test_deleting_takes_the_route_then_the_servers() -> None:
    world = canary()
    world.deleting, world.acknowledges = True, False
    for _ in range(5):
        world.tick()
    assert world.published is None
    assert world.running == {"1.0.0": 2, "1.1.0": 2}
    world.acknowledges = True
    for _ in range(4):
        world.tick()
    assert world.running == {}
    assert world.gone


def test_times_of_conditions_change_with_their_status_only() -> None:
    world = World(spec("1.0.0")).served()
    world.tick()
    before = {c.type: c.last_transition_time for c in world.status.conditions}
    for _ in range(5):
        world.tick()
    assert {c.type: c.last_transition_time for c in world.status.conditions} == before
    world.broken.add("1.0.0")
    world.tick()
    changed = {c.type for c in world.status.conditions if c.last_transition_time != before[c.type]}
    assert changed == {"Ready", "Degraded"}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.integers(1, 8)),
        st.tuples(st.just("verdict"), st.sampled_from(["pass", "fail", "undecided", "nothing"])),
        st.tuples(st.just("requests"), st.sampled_from([0, 99, 100, 5000])),
        st.tuples(st.just("acknowledges"), st.booleans()),
        st.tuples(st.just("apply"), st.sampled_from(["1.0.0", "1.1.0", "1.2.0"])),
        st.tuples(st.just("broken"), st.sets(st.sampled_from(["1.0.0", "1.1.0", "1.2.0"]))),
        st.tuples(st.just("verb"), st.sampled_from(["paused", "forced", "aborted", "resume"])),
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
                world.apply(spec(value))
            case "verb":
                if value == "resume":
                    world.status.paused = False
                elif world.status.candidate is not None and (value != "forced" or world.status.weight > 0):
                    setattr(world.status, value, True)
            case "wait":
                world.tick(value)
            case _:
                setattr(world, kind, value)
        world.tick()
    return world


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_whatever_happens_the_promises_hold_and_it_ends_well(events: list[tuple[str, Any]]) -> None:
    world = live(World(spec("1.0.0")), events)
    world.broken, world.acknowledges, world.verdict, world.requests = set(), True, "pass", 5000
    world.status.paused = False
    world.apply(spec("1.2.0", ROLLOUT.replace("60", "61")))
    world.until("Promoted")
    for _ in range(20):
        world.tick()
    assert world.running == {"1.2.0": 2}
    assert world.in_force is not None
    assert world.in_force.weight("1.2.0") == 100


@settings(max_examples=30, deadline=None)
@given(EVENTS)
def test_a_restart_between_any_two_looks_changes_nothing(events: list[tuple[str, Any]]) -> None:
    without, with_restarts = World(spec("1.0.0"), restart=False), World(spec("1.0.0"), restart=True)
    assert live(without, events).status == live(with_restarts, events).status
    assert without.actions == with_restarts.actions


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_looking_twice_at_the_same_world_does_the_same(version: str) -> None:
    world = canary()
    world.apply(spec(version))
    for _ in range(12):
        world.tick()
    first = world.actions
    world.tick(0)
    assert world.actions == first
