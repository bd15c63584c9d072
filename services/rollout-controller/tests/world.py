"""A world for the reconciler: servers and gateways that follow its actions, as late as the test wants."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import yaml
from millrace_rollout_controller import manifest
from millrace_rollout_controller.actions import Refused, Verb, act
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.gate_state import GateState
from millrace_rollout_controller.plans import WarmSeen
from millrace_rollout_controller.reconciler import (
    Action,
    ArmSeen,
    Forget,
    Item,
    Limits,
    Observed,
    Refusal,
    RunServers,
    SetRoute,
    reconcile,
)
from millrace_rollout_controller.shadow_pairs import Pairs
from millrace_rollout_controller.state import Route, Status, VersionRef

from .support import version_ref

START = datetime(2026, 1, 1, tzinfo=UTC)
ROLLOUT = """
steps: [{weight: 5, minRequests: 100}, {weight: 50}, {weight: 100}]
gates: [{metric: errorRate, max: 0.05}]
progressDeadlineSeconds: 60
"""


def spec(version: str, rollout: str = ROLLOUT, **fields: object) -> manifest.Spec:
    document = {
        "apiVersion": "millrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "flights"},
        "spec": {
            "model": "flight-delay",
            "version": version,
            "server": {"replicas": 2},
            "routing": {"sticky": {"header": "x-user-id"}},
            "rollout": yaml.safe_load(rollout),
        }
        | fields,
    }
    return manifest.parse(yaml.safe_dump(document)).spec


def gate_state(verdict: str) -> GateState:
    """What a gate knows that gives this verdict."""
    logs = [9.0] * 7
    return GateState(
        fail_logs=[logs if verdict == "fail" else [0.0] * 7],
        pass_logs=logs if verdict == "pass" else [0.0] * 7,
        candidate=Sums(n=0 if verdict == "nothing" else 500),
    )


@dataclass
class World:
    """Everything around `reconcile`; `tick` is one look."""

    wanted: manifest.Spec
    generation: int = 1
    deleting: bool = False
    now: datetime = START
    status: Status = field(default_factory=Status)
    registry: dict[str, VersionRef | Refusal] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Versions whose servers never get ready."""
    refusals: dict[str, Refusal] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    published: Route | None = None
    in_force: Route | None = None
    acknowledges: bool = True
    lag: int = 0
    """Looks that pass before the gateways have a route."""
    on_the_way: list[Route | None] = field(default_factory=list)
    verdict: str = "undecided"
    requests: int = 0
    """Candidate requests in the present step."""
    actions: tuple[Action, ...] = ()
    gone: bool = False
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    acknowledged: set[float] = field(default_factory=set)
    """Candidate weights that were in force in this trial."""
    pairs: int = 0
    """Answers compared with stable's in this trial."""
    warm: WarmSeen | None = None
    scaled: dict[str, int] = field(default_factory=dict)
    """What an autoscaler makes of a version."""
    asked: dict[str, int] = field(default_factory=dict)
    """Servers last asked for."""
    slow: set[str] = field(default_factory=set)
    """Versions whose servers above the first two never get ready."""
    restart: bool = True
    """Send the status through JSON between looks, as a restart does."""

    def __post_init__(self) -> None:
        for version in ("1.0.0", "1.1.0", "1.2.0"):
            self.registry.setdefault(version, version_ref(version, version.encode()))

    def apply(self, wanted: manifest.Spec) -> None:
        self.wanted, self.generation = wanted, self.generation + 1

    def tick(self, seconds: float = 1.0) -> Status:
        self.now += timedelta(seconds=seconds)
        if self.restart:
            self.status = Status.model_validate_json(self.status.model_dump_json())
        before = self.status.model_copy(deep=True)
        self.status, self.actions = reconcile(
            Item("flights", self.wanted, self.generation, self.deleting), self.status, self.observed(), self.evidence(),
            self.now, limits=Limits(drain_s=5), heard_all=self.heard_all,
        )  # fmt: skip
        self.check(before)
        self.do()
        return self.status

    def observed(self) -> Observed:
        arms = {
            version: ArmSeen(
                ()
                if version in self.broken
                else tuple(f"{version}:{i}" for i in range(2 if version in self.slow else count)),
                count,
                self.refusals.get(version),
            )
            for version, count in self.running.items()
        }
        settled = self.in_force == self.published and self.published == self.status.route
        return Observed(self.registry, arms, settled, self.warm)

    @property
    def heard_all(self) -> bool:
        """Whether every gateway told its activity."""
        return False

    def evidence(self) -> Evidence:
        return Evidence(
            trial=self.status.trial,
            step=self.status.step,
            gates=[gate_state(self.verdict) for _ in self.wanted.rollout.gates],
            candidate=Counts(shadow={"": Pairs(pairs=self.pairs)}),
            step_candidate=Counts(requests=self.requests),
            comparisons=self.comparisons,
        )

    def do(self) -> None:
        wanted = {}
        for action in self.actions:
            match action:
                case SetRoute(route=route):
                    self.published = route
                case RunServers(ref=ref, replicas=replicas):
                    wanted[ref.version] = max(replicas, self.scaled.get(ref.version, 0))
                    self.asked[ref.version] = replicas
                case Forget():
                    self.gone = True
        # Nothing is stopped that a gateway may still send to.
        for version in self.running.keys() - wanted.keys():
            for route in (self.in_force, self.published):
                assert route is None or all(arm.version != version for arm in route.arms), f"{version} stopped in use"
        self.running = wanted
        self.on_the_way.append(self.published)
        if self.acknowledges and len(self.on_the_way) > self.lag:
            self.in_force = self.on_the_way[-1 - self.lag]
        del self.on_the_way[: -1 - self.lag]

    def check(self, before: Status) -> None:
        """What must hold after every look, whatever happened."""
        s = self.status
        if s.route is not None:
            assert abs(sum(arm.weight for arm in s.route.arms) - 100) < 1e-9
            versions = [arm.version for arm in s.route.arms]
            assert len(set(versions)) == len(versions)
            if s.failed is not None:
                assert s.route.weight(s.failed.version) == 0 or s.stable.ref.version == s.failed.version
        on_trial = before.candidate is not None and before.entered and s.trial == before.trial
        if on_trial and self.verdict == "fail" and self.wanted.rollout.gates and not self.deleting:
            assert s.candidate is None or s.trial != before.trial
            assert s.route is None or s.route.weight(before.candidate.ref.version) == 0
        promoted = before.stable and s.stable and before.stable.ref.version != s.stable.ref.version
        if promoted:
            assert before.weight == 100
            assert before.candidate is not None
            assert self.in_force is not None
            assert self.in_force.weight(s.stable.ref.version) == 100
        raised = before.candidate and s.candidate and s.weight > before.weight > 0 and s.trial == before.trial
        gated = bool(self.wanted.rollout.gates) and before.held_weight is None
        if raised and gated and not before.forced:
            assert self.verdict == "pass"
            assert not before.paused
        self.check_order(before)
        self.check_strategy()

    def check_order(self, before: Status) -> None:
        """A weight is in force everywhere before the next one, and the servers are known before the first."""
        s = self.status
        if s.trial != before.trial:
            self.acknowledged = set()
        if s.candidate is None or s.route is None or before.candidate is None or s.trial != before.trial:
            return
        version = s.candidate.ref.version
        if self.in_force is not None and self.in_force == before.route:
            self.acknowledged.add(self.in_force.weight(version))
        if s.weight != before.weight:
            assert before.weight in self.acknowledged, f"{before.weight} was never in force, now {s.weight}"
        if s.route.weight(version) > 0:
            known = self.in_force or self.published
            assert known is not None
            assert any(arm.version == version and arm.endpoints for arm in known.arms), f"{version} is not known"
            assert self.running.get(version), f"{version} has no servers"

    def check_strategy(self) -> None:
        """What a strategy never does."""
        s, strategy = self.status, self.wanted.rollout.strategy
        if s.route is None:
            return
        mirrored = [arm for arm in s.route.arms if arm.mirror]
        assert len(mirrored) <= 1
        assert all(arm.weight == 0 for arm in mirrored), "who gets copies answers nobody"
        assert all(arm.weight == 0 and not arm.mirror for arm in s.route.arms if arm.leaving)
        if strategy in {"BlueGreen", "Shadow"}:
            assert {arm.weight for arm in s.route.arms} <= {0.0, 100.0}
        if s.candidate is None:
            assert s.weight == 0
            assert s.route.weight(s.stable.ref.version) == 100
            assert not mirrored

    def act(self, verb: Verb, weight: float | None = None, to: str = "") -> Refused | None:
        """A person's verb, as the store does it."""
        found = act(self.wanted, self.status, verb, weight, self.now, to=to)
        if isinstance(found, Refused):
            return found
        self.status = found
        if verb == "undo" and self.wanted.version != found.undo:
            self.apply(self.wanted.model_copy(update={"version": found.undo}))
        return None

    def until(self, phase: str, ticks: int = 60) -> Status:
        for _ in range(ticks):
            if self.tick().phase == phase:
                return self.status
        raise AssertionError(f"phase {self.status.phase} ({self.status.waiting}), not {phase}")

    def served(self) -> "World":
        """With 1.0.0 stable."""
        self.until("Promoted")
        return self
