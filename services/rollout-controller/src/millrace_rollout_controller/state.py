"""What a deployment is in: everything the reconciler needs to go on after a restart, as plain JSON values."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

Phase = Literal[
    "Idle", "Preparing", "Progressing", "Paused", "Promoting", "RollingBack", "RolledBack", "Promoted", "Degraded"
]
Verdict = Literal["pass", "fail", "undecided"]
Better = Literal["candidate", "stable", "undecided"]
MAX_EVENTS = 50


class Frozen(BaseModel):
    """A value."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Mutable(BaseModel):
    """A draft; the reconciler works on its own deep copy."""

    model_config = ConfigDict(extra="ignore", validate_assignment=False)


class Tensor(Frozen):
    """One input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ArtifactRef(Frozen):
    """One file of a version."""

    path: str
    sha256: str
    size_bytes: int


class VersionRef(Frozen):
    """What the registry says about a version; it never changes there."""

    model: str
    version: str
    digest: str
    platform: str
    artifacts: tuple[ArtifactRef, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    feature_names: tuple[str, ...] = ()
    feature_service: str = ""
    predict: str = ""
    """What it declares for Predict: JSON, checked."""
    rules: str = ""
    """What values may be: JSON, checked."""
    definitions: str = ""
    """Hash of the feature definitions it declares for Predict; empty for those in force."""

    @property
    def signature(self) -> tuple[object, ...]:
        """What callers see; versions of one rollout must be equal in it."""
        return self.inputs, self.outputs, self.feature_names


class Sleep(Mutable):
    """A version without requests on its way to having no servers, there, or on its way back."""

    since: datetime
    """When the route was to say so."""
    in_force_at: datetime | None = None
    """When it was in force everywhere; calls are held from then on."""
    stopped: bool = False
    """Nothing is under way any more; servers may stop."""
    waking_since: datetime | None = None
    asked_at: datetime | None = None
    """In a pool: when callers last wished that it wakes."""
    evicted: bool = False
    """In a pool: it gives way to others."""


class Arm(Mutable):
    """A version with servers."""

    ref: VersionRef
    endpoints: tuple[str, ...] = ()
    """Ready servers, or the last known ones when none is."""
    service: str = ""
    """Headless Service of its servers in a cluster."""
    served: bool = False
    """Whether it ever had weight."""
    sleep: Sleep | None = None
    """None while it is awake."""
    awake_since: datetime | None = None
    """When it woke last; a time without requests counts from there at the earliest."""
    placed: bool | None = None
    """In a pool: whether memory is set aside for it there. None is no pool."""


class Retiring(Mutable):
    """A version on its way out: weight 0, then drained, then out of the route, then its servers go."""

    ref: VersionRef
    endpoints: tuple[str, ...]
    served: bool
    service: str = ""
    placed: bool | None = None
    """As `Arm.placed`."""
    kept_until: datetime | None = None
    """Stays ready with weight 0 until then, so that `undo` is one change of the route."""
    drained_at: datetime | None = None
    """When the weight of 0 was in force everywhere."""
    removed: bool = False
    """Out of the wanted route."""
    released: bool = False
    """Out of every gateway's route; servers may stop."""


class Failed(Frozen):
    """A version that is not tried again until the spec changes."""

    version: str
    reason: str
    message: str


class RouteArm(Frozen):
    """One version behind a route."""

    version: str
    digest: str
    candidate: bool
    weight: float
    endpoints: tuple[str, ...]
    service: str = ""
    mirror: float = 0.0
    """Percent of the requests that are copied to it."""
    leaving: bool = False
    """On its way out or kept for undo; no rule means it."""
    asleep: bool = False
    """Without servers: gateways hold its calls."""
    predict: str = ""
    """What the version declares for Predict: JSON, checked."""
    rules: str = ""
    """What values may be: JSON, checked."""
    server_version: str = ""
    """Its number in servers that hold several versions; empty where they hold one."""


class RouteRule(Frozen):
    """CEL and the arm's role."""

    when: str
    candidate: bool


class Route(Frozen):
    """One model's route."""

    model: str
    arms: tuple[RouteArm, ...]
    sticky_header: str
    rules: tuple[RouteRule, ...]
    balancing: str = "LeastRequest"
    timeout_ms: int
    feature_service: str
    feature_names: tuple[str, ...]
    input_tensor: str
    output_tensor: str
    input_datatype: str = ""
    input_shape: tuple[int, ...] = ()
    segment_header: str = ""
    hedge_after_ms: int = 0
    callers: tuple[str, ...] = ()
    testers: tuple[str, ...] = ()
    may_sleep: bool = False
    """Gateways report how much its versions are used."""

    def weight(self, version: str) -> float:
        """Percent of a version; 0 when it is not there."""
        return sum(arm.weight for arm in self.arms if arm.version == version)


class Condition(Frozen):
    """Kubernetes' condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: datetime


class Event(Frozen):
    """Something that happened."""

    at: datetime
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class GateView(Frozen):
    """A gate's verdict with the figures behind it."""

    gate: str
    verdict: Verdict
    evidence: str
    candidate_samples: int
    stable_samples: int


class ComparisonView(Frozen):
    """Candidate against stable in one metric."""

    metric: str
    candidate: float
    stable: float
    candidate_samples: int
    stable_samples: int
    lower: float
    upper: float
    """Bounds of candidate minus stable."""
    confidence: float
    """Of all bounds of the metric together."""
    better: Better
    segment: str = ""
    """Group of predictions; empty for all of them."""
    evidence: str = ""
    """How the bounds came about, for people."""


class Decision(Frozen):
    """One decision about a version, with the evidence behind it."""

    at: datetime
    revision: int = 0
    """Counts the versions that became stable; 0 for decisions of another kind."""
    version: str
    against: str = ""
    decision: str
    message: str
    weight: float = 0.0
    gates: tuple[GateView, ...] = ()
    comparisons: tuple[ComparisonView, ...] = ()
    bundle: str = ""
    """SHA-256 of the evidence bundle of a finished rollout."""


class Bundle(Frozen):
    """The evidence of a finished rollout."""

    sha256: str
    text: str


class Status(Mutable):
    """Where a deployment stands."""

    observed_generation: int = 0
    rollout_key: str = ""
    phase: Phase = "Idle"
    stable: Arm | None = None
    candidate: Arm | None = None
    candidate_since: datetime | None = None
    unready_since: datetime | None = None
    previous_version: str = ""
    """What was stable before; where undo goes."""
    undo: str = ""
    """Version a person has gone back to, which gets no steps."""
    trial: int = 0
    """Counts candidates; evidence belongs to one trial."""
    step: int = 0
    weight: float = 0.0
    """Wanted percent of the candidate."""
    capacity_weight: float = 0.0
    """Percent that the candidate's servers are to be enough for; ahead of `weight`."""
    stable_servers: int = 0
    """Most servers that stable has had ready during this trial."""
    entered: bool = False
    """The candidate's first stage has begun: its servers were ready and every gateway knew them."""
    mirror: float = 0.0
    """Wanted percent of copies to the candidate."""
    held_weight: float | None = None
    """Weight a person holds the candidate at until resume."""
    allocated_at: datetime | None = None
    """When an A/B test's result last moved its weight."""
    step_since: datetime | None = None
    """When the step's weight was in force everywhere."""
    paused: bool = False
    resumed_step: int = -1
    """Step whose open-ended pause a person has ended."""
    forced: bool = False
    """A person asked to skip the rest of the steps."""
    aborted: bool = False
    failed: Failed | None = None
    waiting: str = ""
    """Why nothing moves now, for people."""
    held_by: str = ""
    """Reason for which the candidate waits and may go on waiting, for the conditions; empty for none."""
    retiring: list[Retiring] = []
    route: Route | None = None
    warmup: GateView | None = None
    """The warm gate of this or the last candidate."""
    warmup_over: bool = False
    """It is undecided for good."""
    warmup_waived: bool = False
    """A person goes on without its verdict."""
    gates: list[GateView] = []
    comparisons: list[ComparisonView] = []
    """Result of the last A/B test or shadow run; so far, while it is under way."""
    conditions: list[Condition] = []
    events: list[Event] = []
    history: list[Decision] = []
    revision: int = 0
    """Of the stable version."""
    unsent: list[Bundle] = []
    """Evidence the registry does not have yet."""
    mismatch: str = ""
    """Why the result of an A/B test is invalid, for people."""
    guarding: bool = False
    """The candidate has all it will get, and a guard's window is open."""

    @property
    def verdicts(self) -> list[GateView]:
        """Every gate, the warm gate first."""
        return [*([self.warmup] if self.warmup is not None else []), *self.gates]

    def event(self, at: datetime, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Note something that happened; the newest 50 are kept, and a repetition of the last one is not noted."""
        if self.events and (self.events[-1].reason, self.events[-1].message) == (reason, message):
            return
        self.events = [*self.events, Event(at=at, type=kind, reason=reason, message=message)][-MAX_EVENTS:]
