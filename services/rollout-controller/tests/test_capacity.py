"""Servers before weight: an autoscaled candidate, a stable version that keeps what it has, and the autoscaler's object."""

from typing import Any

from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import objects
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings
from millrace_rollout_controller.server_block import Server

from .support import version_ref
from .world import World, spec

ROLLOUT = """
steps: [{weight: 5}, {weight: 50}, {weight: 100}]
progressDeadlineSeconds: 60
"""
SERVER = {"replicas": 2, "autoscaling": {"maxReplicas": 10}}


def busy(stable: int = 8, **fields: Any) -> World:
    """1.0.0 has been scaled to `stable` servers and 1.1.0 is applied."""
    world = World(spec("1.0.0", ROLLOUT, server=SERVER), **fields).served()
    world.scaled["1.0.0"] = stable
    world.tick()
    world.apply(spec("1.1.0", ROLLOUT, server=SERVER))
    return world


def test_each_weight_waits_for_its_share_of_stables_servers() -> None:
    world = busy()
    ready_at: dict[float, int] = {}
    while world.status.phase != "Promoted" or world.status.stable.ref.version != "1.1.0":
        before = world.running.get("1.1.0", 0)
        world.tick()
        ready_at.setdefault(world.status.weight, before)
    # ceil(5 % of 8) is less than the two it begins with, ceil(50 %) is 4, and all of the traffic needs all 8.
    assert {weight: ready_at[weight] for weight in (5.0, 50.0, 100.0)} == {5.0: 2, 50.0: 4, 100.0: 8}


def test_a_weight_whose_servers_do_not_come_is_not_given() -> None:
    world = busy(slow={"1.1.0"})
    for _ in range(30):
        world.tick()
    assert world.status.weight == 5
    assert world.status.waiting == "2 of 4 servers of 1.1.0 that 50 % need are ready (stable has 8)"
    assert world.act("promote") is None
    for _ in range(5):
        world.tick()
    assert world.status.weight == 5, "a person's promote waits too: two servers are no eight"
    assert "2 of 8 servers" in world.status.waiting
    world.slow.clear()
    assert world.until("Promoted").stable.ref.version == "1.1.0"


def test_stable_keeps_its_servers_while_a_candidate_is_on_trial() -> None:
    world = busy(slow={"1.1.0"})
    world.until("Progressing")
    # The autoscaler would take them away: half of the traffic is gone.
    world.scaled["1.0.0"] = 0
    for _ in range(5):
        world.tick()
    assert world.asked["1.0.0"] == 8
    assert world.act("abort") is None
    world.until("RolledBack")
    assert world.published.weight("1.0.0") == 100
    world.tick()
    assert world.asked["1.0.0"] == 2, "without a candidate its load decides again"


def test_whoever_goes_back_does_not_wait_for_servers() -> None:
    world = busy(2)
    world.until("Promoted")
    for _ in range(10):
        world.tick()
    world.scaled["1.1.0"] = 8
    world.tick()
    world.slow = {"1.0.0"}
    assert world.act("undo") is None
    assert world.until("Promoted").stable.ref.version == "1.0.0"


def test_without_an_autoscaler_a_version_has_what_the_manifest_says() -> None:
    world = World(spec("1.0.0", ROLLOUT, server={"replicas": 4})).served()
    # Fewer servers and a new version in one change: more than the new number can never be needed.
    world.apply(spec("1.1.0", ROLLOUT, server={"replicas": 2}))
    assert world.until("Promoted").stable.ref.version == "1.1.0"


def test_the_autoscalers_floor_is_what_the_trial_needs() -> None:
    settings = KubernetesSettings.model_validate(
        {"namespace": "ml", "fetch": {"image": "fetch:1", "config_map": "c"}, "servers": {"image": "triton:1"}}
    )

    def floor(replicas: int) -> int:
        wanted = Wanted("flights", version_ref("1.1.0", b"x"), replicas, Server.model_validate(SERVER))
        made = objects.build(wanted, {"metadata": {"name": "flights", "uid": "u"}}, settings)
        return int(next(item for item in made if item["kind"] == "HorizontalPodAutoscaler")["spec"]["minReplicas"])

    assert [floor(2), floor(8), floor(12)] == [2, 8, 10]
