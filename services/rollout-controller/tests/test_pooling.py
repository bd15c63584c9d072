"""Several deployments around one pool: the looks, the orders, and a server with little room; no call is sent to a model that is not there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from millrace_kit.clock import SystemClock
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import pool_look
from millrace_rollout_controller.deployments import Deployments
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.executor import PoolSeen
from millrace_rollout_controller.idleness import Quiet
from millrace_rollout_controller.plans import INSUFFICIENT_MEMORY, Observed
from millrace_rollout_controller.pool_look import Pooled
from millrace_rollout_controller.pool_plan import MIB
from millrace_rollout_controller.pooling import PoolOrders
from millrace_rollout_controller.sleeping import wake
from millrace_rollout_controller.sql_store import SqlStore

from . import world as worlds
from .world import World, spec


def pooled_spec(version: str = "1.0.0", rollout: str = "{}", **pool: object) -> worlds.manifest.Spec:
    block = {"name": "small", "capacityMib": 250, "minResidence": "10s"} | pool
    return spec(version, rollout, server={"memoryMib": 100, "pool": block})


@dataclass
class Model(World):
    """One deployment of the pool."""

    orders: PoolOrders = field(default_factory=PoolOrders)
    called_at: datetime = worlds.START
    running_calls: bool = False
    held: bool = False
    """Callers wait for it."""

    @property
    def heard_all(self) -> bool:
        return True

    @property
    def quiet(self) -> Quiet:
        asked = self.now if self.running_calls or self.held else self.called_at
        served = self.now if self.running_calls else self.called_at
        return Quiet(
            since={"1.0.0": asked, "1.1.0": asked},
            calm={"1.0.0": served, "1.1.0": served},
            running=["1.0.0"] if self.running_calls else [],
        )

    def evidence(self) -> Evidence:
        return super().evidence().model_copy(update={"quiet": self.quiet})

    def observed(self) -> Observed:
        found = super().observed()
        return Observed(found.versions, found.arms, found.settled, found.warmup, self.orders)

    @property
    def sleeps(self) -> bool:
        return self.status.route is not None and self.status.route.arms[0].asleep


@dataclass
class Pool:
    """All of them, and the server: a model takes a look to be loaded and one to be unloaded."""

    models: dict[str, Model]
    loads: int = 0
    place: Mapping[str, pool_look.Place] = field(default_factory=dict)

    def tick(self, seconds: float = 1.0) -> None:
        now = next(iter(self.models.values())).now + timedelta(seconds=seconds)
        pooled = [
            Pooled(name, one.wanted, one.status, one.quiet, one.observed().arms) for name, one in self.models.items()
        ]
        sizes = {(one.name, v): 100 * MIB for one in pooled for v in ("1.0.0", "1.1.0")}
        looked = pool_look.look(pooled, {"small": PoolSeen(sizes, 0, 10**12, fresh=True)}, now)
        self.place = looked.places
        for name, one in self.models.items():
            before = dict(one.running)
            one.orders = looked.orders[name]
            if one.held:
                one.status = wake(one.status, "1.0.0", now) or one.status
            one.tick(seconds)
            one.held = one.held and one.sleeps
            self.loads += sum(one.running.get(v, 0) > before.get(v, 0) for v in one.running)
            self.check(one)
        held = sum(count for one in self.models.values() for count in one.running.values())
        assert held * 100 <= 250, "more is loaded than there is room for"

    def check(self, one: Model) -> None:
        # Whoever Envoy may send calls to is in the server.
        for route in (one.in_force, one.published):
            for arm in route.arms if route is not None else ():
                assert not arm.endpoints or one.running.get(arm.version), f"{arm.version} is gone and in the route"

    def call(self, name: str, ticks: int = 60) -> int:
        """A call that waits until it is answered; the looks that took."""
        one = self.models[name]
        one.held = one.sleeps
        for tick in range(ticks):
            if not one.held:
                one.called_at = one.now
                return tick
            self.tick()
        raise AssertionError(f"{name} is not awake: {one.status.waiting}")

    def states(self) -> dict[str, str]:
        self.tick()
        return {name: place.versions[0].state for name, place in self.place.items() if place.versions}


def pool(*names: str, **block: object) -> Pool:
    made = Pool({name: Model(pooled_spec(**block), restart=name == "a") for name in names})
    for _ in range(25):
        made.tick()
    assert all(one.status.stable is not None for one in made.models.values())
    return made


def test_three_models_in_room_for_two_are_all_served_in_turn() -> None:
    made = pool("a", "b", "c")
    before = made.loads
    for _ in range(5):
        for name in made.models:
            made.call(name)
    # In turn each call finds the model it needs just unloaded: one load a call, and no more.
    assert made.loads - before <= 15
    assert sorted(made.states().values()) == ["Asleep", "Resident", "Resident"]
    place = made.place["a"]
    assert (place.resident, place.waiting, place.set_aside_bytes // MIB, place.capacity_bytes // MIB) == (
        2,
        0,
        200,
        250,
    )


def test_the_least_recently_used_gives_way_and_says_so() -> None:
    made = pool("a", "b", "c")
    made.call("a")
    made.call("b")
    for _ in range(15):
        made.tick()
    made.call("a")
    made.call("c")
    assert {name for name, one in made.models.items() if one.sleeps} == {"b"}
    b = made.models["b"].status
    assert next((c.status, c.reason) for c in b.conditions if c.type == "Asleep") == ("True", "Evicted")
    assert next((c.status, c.reason) for c in b.conditions if c.type == "Ready") == ("True", "Asleep")
    assert "gave way in its pool" in b.waiting
    assert "Evicted" in [event.reason for event in b.events]


def test_calls_under_way_keep_a_model_and_the_next_one_gives_way() -> None:
    made = pool("a", "b", "c")
    made.call("a")
    made.call("b")
    made.models["a"].running_calls = True
    for _ in range(15):
        made.tick()
    made.call("c")
    assert not made.models["a"].sleeps
    # With calls in both, it waits, and is told what for.
    made.models["c"].running_calls = True
    for _ in range(15):
        made.tick()
    made.models["b"].held = True
    for _ in range(30):
        made.tick()
    b = made.models["b"].status
    assert next((c.status, c.reason) for c in b.conditions if c.type == "Waking") == ("True", "WaitsForRoom")
    assert b.waiting == "needs 100 MiB; what could give way has calls under way"
    made.models["a"].running_calls = False
    made.models["a"].called_at = made.models["a"].now
    made.call("b")


def test_a_call_that_comes_when_its_model_gives_way_takes_its_turn() -> None:
    made = pool("a", "b", "c")
    made.call("a")
    made.call("b")
    for _ in range(15):
        made.tick()
    made.models["c"].held = True
    made.tick()
    made.tick()
    assert made.models["a"].sleeps, "it gives way"
    made.models["a"].held = True
    for _ in range(20):
        made.tick()
        if not made.models["c"].sleeps:
            break
    assert not made.models["c"].sleeps, "its turn was first"
    made.call("a")


def test_calls_that_do_not_end_in_time_let_it_stay() -> None:
    made = pool("a", "b", "c")
    made.call("a")
    made.call("b")
    for _ in range(15):
        made.tick()
    made.models["c"].held = True
    made.tick()
    made.tick()
    assert made.models["a"].sleeps
    # A long call had begun in the very moment.
    made.models["a"].running_calls = True
    made.call("c")
    assert not made.models["a"].sleeps
    assert "EvictionGivenUp" in [event.reason for event in made.models["a"].status.events]
    assert made.models["b"].sleeps


def test_nobody_is_unloaded_for_callers_that_are_gone() -> None:
    made = pool("a", "b", "c")
    made.call("a")
    made.call("b")
    for name in ("a", "b"):
        made.models[name].running_calls = True
    made.models["c"].held = True
    made.tick()
    made.models["c"].held = False
    for _ in range(15):
        made.tick()
    assert "NobodyWaits" in [event.reason for event in made.models["c"].status.events]
    for name in ("a", "b"):
        made.models[name].running_calls = False
    for _ in range(15):
        made.tick()
    assert made.models["c"].sleeps


def test_a_pinned_model_stays_and_one_on_trial_too() -> None:
    made = Pool({"a": Model(pooled_spec(pinned=True)), "b": Model(pooled_spec()), "c": Model(pooled_spec())})
    for _ in range(25):
        made.tick()
    for _ in range(3):
        made.call("b")
        made.call("c")
    assert not made.models["a"].sleeps

    # A candidate needs a place beside stable; nobody else has room then, and after it they do.
    made = pool("a", "b", "c")
    made.call("a")
    a = made.models["a"]
    a.apply(pooled_spec("1.1.0", "{strategy: BlueGreen, blueGreen: {autoPromotion: false, keepOldSeconds: 0}}"))
    for _ in range(30):
        made.tick()
    assert a.running == {"1.0.0": 1, "1.1.0": 1}
    made.models["b"].held = True
    for _ in range(30):
        made.tick()
    assert made.models["b"].sleeps
    assert made.models["b"].status.waiting == "needs 100 MiB; the rest of the pool is pinned or part of a rollout"
    assert a.act("promote") is None
    made.call("b")
    assert a.status.stable.ref.version == "1.1.0"


def test_a_candidate_without_room_waits_and_no_deadline_runs() -> None:
    made = Pool({"a": Model(pooled_spec(pinned=True)), "b": Model(pooled_spec(pinned=True)), "c": Model(pooled_spec())})
    for _ in range(10):
        made.tick()
    for _ in range(10):
        made.tick(60)
    c = made.models["c"].status
    assert (c.phase, c.held_by, c.failed) == ("Preparing", INSUFFICIENT_MEMORY, None)
    assert c.waiting == "needs 100 MiB; the rest of the pool is pinned or part of a rollout"
    assert made.models["c"].running == {"1.0.0": 0}


@pytest.mark.parametrize(
    ("used_mib", "fresh", "placed", "evicted"),
    [(100, True, {"1.0.0"}, set()), (180, True, set(), {"1.0.0"}), (100, False, set(), set())],
)
def test_what_the_server_takes_beyond_what_is_set_aside_is_no_room(
    used_mib: int, fresh: bool, placed: set[str], evicted: set[str]
) -> None:
    made = pool("a")
    a = made.models["a"]
    new = Model(pooled_spec(), now=a.now)
    new.tick()
    new.tick()
    seen = PoolSeen({}, used_mib * MIB, 10**12, fresh=fresh)
    both = [
        Pooled(name, one.wanted, one.status, one.quiet, one.observed().arms) for name, one in (("a", a), ("b", new))
    ]
    found = pool_look.look(both, {"small": seen}, a.now).orders
    assert (found["b"].place, found["a"].evict) == (placed, evicted)


class Anything:
    """An executor that gives everything."""

    def check(self, wanted: worlds.manifest.Spec) -> None:
        """There is nothing to refuse."""


def test_a_deployment_stays_in_its_pool(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/rollout.sqlite")
    deployments = Deployments(store, Anything(), SystemClock(), max_deployments=5)  # type: ignore[arg-type]

    def applied(**server: object) -> str:
        document = {
            "apiVersion": "millrace.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "ant"},
            "spec": {"model": "ant", "version": "1.0.0", "server": server},
        }  # fmt: skip
        return deployments.apply(yaml.safe_dump(document))[1]

    assert applied(pool={"name": "small"}) == "created"
    assert applied(pool={"name": "small", "pinned": True}) == "configured"
    for server in ({"pool": {"name": "large"}}, {}):
        with pytest.raises(InvalidArgumentError) as refused:
            applied(**server)
        assert refused.value.metadata["field"] == "spec.server.pool"
    store.close()


@pytest.mark.parametrize(
    ("server", "named"),
    [
        ({"replicas": 2}, "replicas"),
        ({"placement": "Shared"}, "placement"),
        ({"resources": {"limits": {"memory": "1Gi"}}}, "resources"),
        ({"responseCacheMib": 8}, "responseCacheMib"),
        ({"rateLimit": {"total": 2}}, "rateLimit"),
        ({"memoryMib": 300}, "memoryMib"),
        ({"pool": {"name": "small", "minResidence": "0s"}}, "pool.minResidence"),
        (
            {"pool": {"name": "small", "pinned": True}, "autoscaling": {"minReplicas": 0, "idleAfter": "1m"}},
            "autoscaling",
        ),
    ],
)
def test_what_does_not_fit_is_refused(server: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        spec("1.0.0", "{}", server={"pool": {"name": "small", "capacityMib": 200}} | server)
    assert refused.value.metadata["field"] == f"spec.server.{named}"
