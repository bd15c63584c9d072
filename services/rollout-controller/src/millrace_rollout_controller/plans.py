"""The values around the reconciler: what is wanted, what is seen, what is to be done, and the draft it works on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.manifest import Spec, Warmup
from millrace_rollout_controller.pooling import PoolOrders
from millrace_rollout_controller.stages import Stage, stages
from millrace_rollout_controller.state import Route, Status, Verdict, VersionRef


@dataclass(frozen=True, slots=True)
class Item:
    """One deployment as applied."""

    name: str
    spec: Spec
    generation: int
    deleting: bool = False


INSUFFICIENT_MEMORY = "InsufficientMemory"
"""Reason of a refusal: a server that is shared has no room for the version now. A rollout waits, for stable serves on."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something cannot be had."""

    reason: str
    message: str
    permanent: bool
    """Trying again would not help."""


@dataclass(frozen=True, slots=True)
class ArmSeen:
    """One version's servers."""

    ready: tuple[str, ...] = ()
    """Endpoints that are ready and warmed."""
    servers: int = 0
    """Processes that exist, in whatever state."""
    refusal: Refusal | None = None
    service: str = ""
    """Headless Service of the servers, "namespace/name:port"; empty outside a cluster."""


@dataclass(frozen=True, slots=True)
class WarmSeen:
    """How far the warm-up of a candidate is."""

    trial: int
    verdict: Verdict
    evidence: str
    requests: int
    """Sent so far."""
    over: bool = False
    """Undecided, and no more is sent."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The world outside."""

    versions: Mapping[str, VersionRef | Refusal] = field(default_factory=dict)
    """The registry's answer by version; absent while unknown."""
    arms: Mapping[str, ArmSeen] = field(default_factory=dict)
    settled: bool = True
    """The last wanted route is in force at every live gateway."""
    warmup: WarmSeen | None = None
    """Absent while none is under way."""
    pool: PoolOrders = field(default_factory=PoolOrders)
    """Without meaning outside of a pool."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that do not come from the manifest."""

    drain_s: float = 5.0
    """How long a version stays up after its weight of 0 is in force."""
    evict_drain_s: float = 0.5
    """How long nothing may have been with a pooled version's server before it is unloaded, by the word of every gateway."""
    evict_s: float = 15.0
    """How long the calls of a version that gives way may take to end; then it stays, and others are chosen."""
    wish_s: float = 10.0
    """How long a version waits for a place in its pool after the last question for it; gateways ask once a second while callers wait."""


@dataclass(frozen=True, slots=True)
class RunServers:
    """This version should have that many servers."""

    ref: VersionRef
    replicas: int


@dataclass(frozen=True, slots=True)
class StopServers:
    """This version should have none."""

    version: str


@dataclass(frozen=True, slots=True)
class SetRoute:
    """The model's route should be this; None for none."""

    model: str
    route: Route | None


@dataclass(frozen=True, slots=True)
class WarmServers:
    """These servers should be warmed; who already does so goes on."""

    ref: VersionRef
    trial: int
    endpoints: tuple[str, ...]
    stable_endpoints: tuple[str, ...]
    """Whom to compare with."""
    block: Warmup
    naming: bytes = b""
    """What names the version at the end of a request, where its servers hold others too."""
    stable_naming: bytes = b""


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left of this deployment."""

    name: str


Action = RunServers | StopServers | SetRoute | WarmServers | Forget


@dataclass
class Draft:
    """One look in the making: the status is a copy, the rest is only read."""

    item: Item
    status: Status
    seen: Observed
    evidence: Evidence
    now: datetime
    limits: Limits
    heard_all: bool = False
    """Every gateway has told its versions' activity for this look."""

    @property
    def spec(self) -> Spec:
        """What is wanted."""
        return self.item.spec

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The strategy's stages."""
        return stages(self.item.spec)

    def servers(self, version: str) -> ArmSeen:
        """What is seen of one version's servers."""
        return self.seen.arms.get(version, ArmSeen())

    def in_force(self, version: str, weight: float) -> bool:
        """Whether every live gateway gives `version` exactly that weight (0 also when it is not in the route)."""
        route = self.status.route
        return self.seen.settled and (route.weight(version) if route else 0.0) == weight

    def known_without_weight(self, version: str) -> bool:
        """Every live gateway has the version's servers, without traffic."""
        route = self.status.route
        return self.seen.settled and route is not None and any(a.version == version and a.endpoints for a in route.arms)

    def gone(self, version: str) -> bool:
        """Whether no live gateway's route has the version."""
        route = self.status.route
        return self.seen.settled and (route is None or all(arm.version != version for arm in route.arms))
