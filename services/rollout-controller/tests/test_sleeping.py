"""Versions without requests: to sleep in an order that loses no call, awake again at the first one. And what counts as idle."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.idleness import GatewayActivity, Quiet, Used, look, whole
from millrace_rollout_controller.sleeping import wake

from . import world as worlds
from .world import World, spec

SERVER = {"replicas": 2, "autoscaling": {"minReplicas": 0, "idleAfter": "15m"}}
BLUE_GREEN = "{strategy: BlueGreen, blueGreen: {autoPromotion: false}}"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Quietly(World):
    """With one gateway that says when it was last asked."""

    asked_at: datetime = worlds.START
    heard: bool = True

    @property
    def heard_all(self) -> bool:
        return self.heard

    def evidence(self) -> Evidence:
        found = super().evidence()
        since = dict.fromkeys(("1.0.0", "1.1.0"), self.asked_at)
        return found.model_copy(update={"quiet": Quiet(since=since)})

    def quiet_for(self, minutes: float) -> None:
        """Let so much time pass without a request, in one look."""
        self.tick(60 * minutes)

    def call(self, version: str = "1.0.0") -> None:
        """What the gateway does for a call of a version that is asleep."""
        self.status = wake(self.status, version, self.now) or self.status

    def condition(self, kind: str) -> tuple[str, str]:
        return next((c.status, c.reason) for c in self.status.conditions if c.type == kind)

    @property
    def asleep(self) -> bool:
        assert self.status.route is not None
        return self.status.route.arms[0].asleep


def served(**fields: Any) -> Quietly:
    world = Quietly(spec("1.0.0", "{}", server=SERVER), **fields)
    world.until("Promoted")
    world.asked_at = world.now
    return world


def slept() -> Quietly:
    world = served()
    world.quiet_for(15)
    for _ in range(12):
        world.tick()
    assert world.running == {"1.0.0": 0}
    return world


def test_servers_stop_when_calls_are_held_everywhere_and_nothing_runs_any_more() -> None:
    world = served(lag=3)
    world.quiet_for(14.9)
    assert not world.asleep
    world.tick(10)
    assert world.asleep
    assert world.status.route.arms[0].endpoints == ()
    assert world.condition("Ready") == ("True", "Asleep")
    for _ in range(3):
        world.tick()
        assert world.running == {"1.0.0": 2}, "not every gateway holds calls yet"
    # A call that was sent before, and runs still.
    for _ in range(10):
        world.asked_at = world.now + timedelta(seconds=1)
        world.tick()
        assert world.running == {"1.0.0": 2}
    for _ in range(8):
        world.tick()
    assert world.running == {"1.0.0": 0}
    assert world.condition("Asleep") == ("True", "Idle")
    assert world.condition("Degraded") == ("False", "AsWanted")
    assert world.status.phase == "Promoted"
    assert "the next call wakes it" in world.status.waiting


def test_a_call_wakes_and_the_route_says_so_only_with_a_server() -> None:
    world = slept()
    world.broken.add("1.0.0")
    world.call()
    world.call()
    world.tick()
    assert world.running == {"1.0.0": 2}
    assert world.asleep, "held until a server is ready"
    assert world.condition("Waking") == ("True", "ServersStart")
    world.tick(700)
    assert world.condition("Ready") == ("False", "NoReadyServers")
    assert world.condition("Degraded") == ("True", "ServersMissing")
    world.broken.clear()
    world.tick()
    assert not world.asleep
    assert world.status.route.arms[0].endpoints == ("1.0.0:0", "1.0.0:1")
    assert world.condition("Asleep") == ("False", "Awake")
    assert [e.reason for e in world.status.events][-2:] == ["Waking", "Awake"]
    # The one call left no trace: its caller had gone. It stays awake for as long as after any other.
    world.tick(60 * 14)
    assert not world.asleep
    world.tick(61)
    assert world.asleep


@pytest.mark.parametrize("looks", range(8))
def test_a_call_may_come_at_any_moment_of_falling_asleep(looks: int) -> None:
    world = served(lag=1)
    world.quiet_for(15)
    for _ in range(looks):
        world.tick()
    world.call()
    world.tick()
    world.tick()
    assert not world.asleep
    assert world.running == {"1.0.0": 2}


def test_not_every_gateway_heard_is_not_idle() -> None:
    world = served(heard=False)
    world.quiet_for(60)
    assert not world.asleep
    world.heard = True
    world.tick()
    assert world.asleep
    # Nor do servers stop on old news.
    world.heard = False
    for _ in range(20):
        world.tick()
    assert world.running == {"1.0.0": 2}


def test_a_rollout_wakes_stable_first_and_keeps_it_awake() -> None:
    world = slept()
    world.verdict = "pass"
    world.broken.add("1.0.0")
    world.apply(spec("1.1.0", "steps: [{weight: 50}, {weight: 100}]", server=SERVER))
    for _ in range(5):
        world.tick()
    assert world.status.waiting == "1.0.0 has to wake first"
    assert world.status.route.weight("1.1.0") == 0
    world.broken.clear()
    for _ in range(40):
        world.tick(60)
        assert all(not arm.asleep for arm in world.status.route.arms if arm.weight and world.status.candidate)
        if world.status.candidate is None:
            break
    assert world.status.stable.ref.version == "1.1.0"


def test_a_guard_window_keeps_both_awake() -> None:
    world = served()
    world.verdict = "pass"
    world.apply(spec("1.1.0", "{steps: [{weight: 100}], guard: {window: 2h}}", server=SERVER))
    for _ in range(100):
        world.tick(60)
        assert not any(arm.asleep for arm in world.status.route.arms)
    assert world.status.guarding


def test_a_preview_that_waits_for_approval_sleeps_and_is_promoted_all_the_same() -> None:
    world = served()
    world.apply(spec("1.1.0", BLUE_GREEN, server=SERVER))
    for _ in range(20):
        world.tick(60)
    assert world.running == {"1.0.0": 2, "1.1.0": 0}
    assert "promote wakes it" in world.status.waiting
    assert [(arm.version, arm.asleep) for arm in world.status.route.arms] == [("1.0.0", False), ("1.1.0", True)]
    assert world.act("promote") is None
    world.asked_at = world.now + timedelta(minutes=5)
    assert world.until("Promoted").stable.ref.version == "1.1.0"


def test_a_manifest_without_sleep_wakes() -> None:
    world = slept()
    world.apply(spec("1.0.0", "{}", server={"replicas": 2}))
    world.tick()
    world.tick()
    assert not world.asleep
    assert world.running == {"1.0.0": 2}


def test_deleting_starts_nothing() -> None:
    world = slept()
    world.deleting = True
    world.tick()
    assert not any(world.running.values())


def test_who_is_awake_is_not_woken() -> None:
    world = served()
    assert wake(world.status, "1.0.0", world.now) is None
    assert wake(world.status, "9.9.9", world.now) is None


# What counts as idle.


def said(started: int, running: int = 0, instance: str = "a") -> GatewayActivity:
    return GatewayActivity(instance, {"1.0.0": Used(started=started, running=running)})


def after(quiet: Quiet, minutes: float, *gateways: str, **answers: GatewayActivity) -> Quiet:
    return look(quiet, answers, gateways or sorted(answers), ["1.0.0"], NOW + timedelta(minutes=minutes))


def since(quiet: Quiet) -> float:
    """Minutes."""
    return (quiet.since["1.0.0"] - NOW).total_seconds() / 60


def test_time_counts_from_the_last_request_of_any_gateway() -> None:
    quiet = after(Quiet(), 1, g=said(5), h=said(7))
    assert since(quiet) == 1, "nobody knows what was before"
    assert since(quiet := after(quiet, 2, g=said(5), h=said(7))) == 1
    assert since(quiet := after(quiet, 3, g=said(5), h=said(8))) == 3
    assert since(quiet := after(quiet, 4, g=said(5, running=1), h=said(8))) == 4, "a long call is no quiet"
    assert since(after(quiet, 9, g=said(5), h=said(8))) == 4


def test_what_a_gateway_did_not_say_is_no_quiet() -> None:
    quiet = after(Quiet(), 1, g=said(5), h=said(7))
    # One answers late: what it counted meanwhile is still in its sums.
    quiet = after(quiet, 2, "g", "h", g=said(5))
    assert not whole({"g": said(5)}, ["g", "h"])
    assert since(after(quiet, 3, g=said(5), h=said(7))) == 1
    assert since(after(quiet, 3, g=said(5), h=said(8))) == 3
    # One that started anew, or is gone, may have had requests that nobody counts any more.
    assert since(after(quiet, 3, g=said(5), h=said(0, instance="b"))) == 3
    assert since(after(quiet, 3, "g", g=said(5))) == 3
    # Envoy alone began anew.
    assert since(after(quiet, 3, g=said(5), h=said(0))) == 3
    # A gateway of the release before says nothing of activity, or Envoy did not answer it.
    assert since(after(quiet, 3, g=said(5), h=GatewayActivity("a"))) == 3
    assert not whole({}, [])


def test_marks_outlive_a_restart() -> None:
    quiet = Quiet.model_validate_json(after(Quiet(), 1, g=said(5)).model_dump_json())
    assert since(after(quiet, 30, g=said(5))) == 1
    assert since(after(quiet, 30, g=said(6))) == 30


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"minReplicas": 0, "maxReplicas": 4}, "idleAfter"),
        ({"minReplicas": 2, "maxReplicas": 4, "idleAfter": "15m"}, "idleAfter"),
        ({"minReplicas": 0, "idleAfter": "0s"}, "idleAfter"),
        ({"minReplicas": 2}, "maxReplicas"),
        ({"minReplicas": 0, "idleAfter": "15m", "maxReplicas": 1}, "maxReplicas"),
    ],
)
def test_what_does_not_fit_is_refused(scaling: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        spec("1.0.0", "{}", server={"replicas": 2, "autoscaling": scaling})
    assert refused.value.metadata["field"] == f"spec.server.autoscaling.{field}"
