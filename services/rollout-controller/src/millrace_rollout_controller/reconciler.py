"""The reconciler: from what is wanted, what was known and what is seen, to what is known now and what to do. Pure.

Level-based: each call looks at everything anew and may be the first one after a crash. Actions say what should be, not what to change, so
doing them twice is doing them once. Order that keeps every request answered: servers ready and warmed, then in the route with weight 0,
then with weight; on the way out weight 0, in force everywhere, drained, out of the route, in force everywhere, and only then stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from millrace_rollout_controller import gates
from millrace_rollout_controller.conditions import conditions
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.manifest import Gate, Spec
from millrace_rollout_controller.routing import wanted_route
from millrace_rollout_controller.state import Arm, Failed, GateView, Retiring, Route, Status, VersionRef


@dataclass(frozen=True, slots=True)
class Item:
    """One deployment as applied."""

    name: str
    spec: Spec
    generation: int
    deleting: bool = False


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


@dataclass(frozen=True, slots=True)
class Observed:
    """The world outside."""

    versions: Mapping[str, VersionRef | Refusal] = field(default_factory=dict)
    """The registry's answer by version; absent while unknown."""
    arms: Mapping[str, ArmSeen] = field(default_factory=dict)
    settled: bool = True
    """The last wanted route is in force at every live gateway."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that do not come from the manifest."""

    drain_s: float = 5.0
    """How long a version stays up after its weight of 0 is in force."""


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
class Forget:
    """Nothing is left of this deployment."""

    name: str


Action = RunServers | StopServers | SetRoute | Forget


@dataclass
class _Draft:
    item: Item
    status: Status
    seen: Observed
    evidence: Evidence
    now: datetime
    limits: Limits

    @property
    def spec(self) -> Spec:
        return self.item.spec

    def servers(self, version: str) -> ArmSeen:
        return self.seen.arms.get(version, ArmSeen())

    def in_force(self, version: str, weight: float) -> bool:
        """Whether every live gateway gives `version` exactly that weight (0 also when it is not in the route)."""
        route = self.status.route
        return self.seen.settled and (route.weight(version) if route else 0.0) == weight

    def gone(self, version: str) -> bool:
        """Whether no live gateway's route has the version."""
        route = self.status.route
        return self.seen.settled and (route is None or all(arm.version != version for arm in route.arms))


def reconcile(
    item: Item, status: Status, observed: Observed, evidence: Evidence, now: datetime, *, limits: Limits
) -> tuple[Status, tuple[Action, ...]]:
    """One look; the arguments are left as they are."""
    draft = _Draft(item, status.model_copy(deep=True), observed, evidence, now, limits)
    if item.deleting:
        return _delete(draft)
    _accept_spec(draft)
    _refresh_endpoints(draft)
    _choose_candidate(draft)
    _look_at_candidate(draft)
    _retire(draft)
    if draft.status.candidate is None:
        _rest(draft)
    return _finish(draft)


def _accept_spec(d: _Draft) -> None:
    s = d.status
    if d.item.generation == s.observed_generation:
        return
    key = d.spec.version + d.spec.rollout.model_dump_json()
    s.failed, s.aborted, s.forced = None, False, False
    if key != s.rollout_key:
        s.paused, s.resumed_step = False, -1
        if s.candidate is not None and s.candidate.ref.version == d.spec.version:
            _start_trial(d)
            s.event(d.now, "Normal", "RolloutChanged", f"steps of {d.spec.version} start over: the rollout was changed")
    s.rollout_key = key
    s.observed_generation = d.item.generation
    s.event(d.now, "Normal", "SpecAccepted", f"generation {d.item.generation} wants version {d.spec.version}")


def _start_trial(d: _Draft) -> None:
    s = d.status
    s.trial += 1
    s.step, s.weight, s.step_since, s.unready_since, s.gates = 0, 0.0, None, None, []
    s.candidate_since, s.forced, s.resumed_step = d.now, False, -1


def _refresh_endpoints(d: _Draft) -> None:
    for arm in (d.status.stable, d.status.candidate):
        ready = d.servers(arm.ref.version).ready if arm else ()
        if arm and ready:
            arm.endpoints = ready


def _choose_candidate(d: _Draft) -> None:
    s, target = d.status, d.spec.version
    if s.aborted:
        s.aborted = False
        if s.candidate is not None:
            _fail(d, "Aborted", "a person ended the rollout")
    if s.candidate is not None and s.candidate.ref.version != target:
        version = s.candidate.ref.version
        _send_away(d)
        s.event(d.now, "Normal", "Superseded", f"{version} gives way: the spec now wants {target}")
    if s.candidate is not None or (s.stable and s.stable.ref.version == target) or s.failed is not None:
        return
    match d.seen.versions.get(target):
        case None:
            s.phase, s.waiting = "Preparing", "waiting for the registry"
        case Refusal(reason=reason, message=message, permanent=permanent):
            s.phase, s.waiting = "Preparing", message
            s.event(d.now, "Warning", reason, message)
            if permanent:
                s.failed = Failed(version=target, reason=reason, message=message)
        case VersionRef() as ref:
            _admit(d, ref)


def _admit(d: _Draft, ref: VersionRef) -> None:
    s = d.status
    if s.stable is not None and s.stable.ref.signature != ref.signature:
        message = f"{ref.version} has another signature than {s.stable.ref.version}; callers would have to change"
        s.failed = Failed(version=ref.version, reason="SignatureChanged", message=message)
        s.event(d.now, "Warning", "SignatureChanged", message)
        return
    s.retiring = [gone for gone in s.retiring if gone.ref.version != ref.version]
    s.candidate = Arm(ref=ref, endpoints=d.servers(ref.version).ready)
    _start_trial(d)
    s.phase, s.waiting = "Preparing", "servers start"
    s.event(
        d.now, "Normal", "CandidateChosen", f"{ref.version} ({ref.digest[:12]}) gets {d.spec.server.replicas} servers"
    )


def _look_at_candidate(d: _Draft) -> None:
    s = d.status
    if s.candidate is None:
        return
    version = s.candidate.ref.version
    seen = d.servers(version)
    if seen.refusal is not None and seen.refusal.permanent:
        _fail(d, seen.refusal.reason, seen.refusal.message)
        return
    enough = len(seen.ready) >= (1 if s.weight > 0 else d.spec.server.replicas)
    if not enough:
        s.unready_since = s.unready_since or d.now
        s.waiting = f"{len(seen.ready)} of {d.spec.server.replicas} servers of {version} are ready"
        deadline = timedelta(seconds=d.spec.rollout.progress_deadline_seconds)
        if d.now - s.unready_since > deadline:
            why = f": {seen.refusal.message}" if seen.refusal else ""
            message = f"{s.waiting} after {d.spec.rollout.progress_deadline_seconds} s{why}"
            _fail(d, "ProgressDeadlineExceeded", message)
            return
    else:
        s.unready_since = None
    if s.weight > 0:
        _progress(d, enough)
    elif s.stable is None:
        _take_first(d, enough)
    else:
        s.phase = "Paused" if s.paused else "Preparing"
        if enough and not s.paused and _known_with_no_weight(d, version):
            _enter(d, 0)


def _known_with_no_weight(d: _Draft, version: str) -> bool:
    """Every live gateway has the candidate's servers, without traffic."""
    route = d.status.route
    return d.seen.settled and route is not None and any(a.version == version and a.endpoints for a in route.arms)


def _take_first(d: _Draft, enough: bool) -> None:
    s = d.status
    s.phase = "Preparing"
    if not enough or s.candidate is None:
        return
    s.stable, s.candidate, s.weight = s.candidate, None, 0.0
    s.stable.served = True
    s.event(
        d.now, "Normal", "FirstVersion", f"{s.stable.ref.version} takes all traffic: there was no version before it"
    )


def _enter(d: _Draft, step: int) -> None:
    s = d.status
    s.step, s.weight, s.step_since = step, d.spec.steps[step].weight, None
    if s.candidate is not None:
        s.candidate.served = True
        version = s.candidate.ref.version
        s.event(d.now, "Normal", "StepStarted", f"step {step + 1}: {version} gets {s.weight:g} % of the traffic")
    s.phase = "Promoting" if s.weight == 100 else "Progressing"


def _progress(d: _Draft, ready: bool) -> None:
    s = d.status
    if s.candidate is None:
        return
    version, steps = s.candidate.ref.version, d.spec.steps
    s.step = min(s.step, len(steps) - 1)
    # Evidence belongs to the gates it was gathered for; of other gates nothing is known yet.
    mine = d.evidence.trial == s.trial and len(d.evidence.gates) == len(d.spec.rollout.gates)
    states = d.evidence.gates if mine else [gates.GateState() for _ in d.spec.rollout.gates]
    s.gates = [gates.judge(gate, state, len(steps)) for gate, state in zip(d.spec.rollout.gates, states, strict=True)]
    for view in s.gates:
        if view.verdict == "fail":
            _fail(d, "GateFailed", f"{view.gate}: {view.evidence}")
            return
    s.phase = "Paused" if s.paused else "Promoting" if s.weight == 100 else "Progressing"
    if not ready:
        return
    if s.step_since is None:
        s.waiting = "waiting for the gateways to take the weight"
        if not d.in_force(version, s.weight):
            return
        s.step_since = d.now
    if s.forced:
        _complete(d) if s.weight == 100 else _enter(d, len(steps) - 1)
        return
    s.waiting = _what_is_missing(d, s.gates, mine)
    if s.waiting:
        return
    if s.weight < 100:
        _enter(d, s.step + 1)
    elif d.in_force(version, 100.0):
        _complete(d)


def _what_is_missing(d: _Draft, views: list[GateView], mine: bool) -> str:
    """Why the step cannot be left, for people; empty when it can."""
    s, step = d.status, d.spec.steps[d.status.step]
    if s.paused:
        return "paused by a person"
    in_step = d.evidence.step_candidate.requests if mine and d.evidence.step == s.step else 0
    if in_step < step.min_requests:
        return f"{in_step} of {step.min_requests} candidate requests in step {s.step + 1}"
    if step.pause is not None and s.step_since is not None:
        seconds = step.pause.seconds
        if seconds is None and s.resumed_step != s.step:
            s.phase = "Paused"
            return "this step waits for resume"
        if seconds is not None and d.now - s.step_since < timedelta(seconds=seconds):
            return f"step {s.step + 1} lasts {seconds:g} s"
    if s.weight == 100:
        # Nothing to compare with any more: the gates that had to pass did so before this step.
        return ""
    last = d.spec.steps[s.step + 1].weight == 100
    for gate, view in zip(d.spec.rollout.gates, views, strict=True):
        if _must_pass(gate, last) and view.verdict != "pass":
            return f"{view.gate} is undecided: {view.evidence}"
    return ""


def _must_pass(gate: Gate, last: bool) -> bool:
    return gate.required == "EveryStep" or (gate.required == "Promotion" and last)


def _complete(d: _Draft) -> None:
    s = d.status
    if s.candidate is None or s.stable is None:
        return
    old, new = s.stable, s.candidate
    s.retiring = [*s.retiring, Retiring(ref=old.ref, endpoints=old.endpoints, served=old.served)]
    s.stable, s.candidate, s.weight, s.forced, s.waiting = new, None, 0.0, False, ""
    s.phase = "Promoted"
    s.event(d.now, "Normal", "Promoted", f"{new.ref.version} is stable; {old.ref.version} is drained")


def _fail(d: _Draft, reason: str, message: str) -> None:
    s = d.status
    if s.candidate is None:
        return
    version = s.candidate.ref.version
    s.failed = Failed(version=version, reason=reason, message=message)
    s.event(d.now, "Warning", reason, f"{version}: {message}")
    _send_away(d)
    if s.stable is not None:
        s.phase = "RollingBack"
        s.event(d.now, "Warning", "RollingBack", f"all traffic goes back to {s.stable.ref.version}")


def _send_away(d: _Draft) -> None:
    s = d.status
    if s.candidate is None:
        return
    gone = s.candidate
    s.retiring = [*s.retiring, Retiring(ref=gone.ref, endpoints=gone.endpoints, served=gone.served)]
    s.candidate, s.weight, s.step_since, s.forced, s.unready_since = None, 0.0, None, False, None


def _retire(d: _Draft) -> None:
    """Move each version on its way out one stage further, when the stage before is in force."""
    s = d.status
    kept: list[Retiring] = []
    for gone in s.retiring:
        version = gone.ref.version
        if gone.drained_at is None and d.in_force(version, 0.0):
            gone.drained_at = d.now
        if gone.drained_at is not None and not gone.removed:
            wait = timedelta(seconds=d.limits.drain_s if gone.served else 0.0)
            gone.removed = d.now - gone.drained_at >= wait
        if gone.removed and not gone.released:
            gone.released = d.gone(version)
        if gone.released and d.servers(version).servers == 0:
            s.event(d.now, "Normal", "ServersStopped", f"{version} is drained and its servers are stopped")
            continue
        kept.append(gone)
    s.retiring = kept


def _rest(d: _Draft) -> None:
    """The phase while there is no candidate."""
    s = d.status
    if s.failed is not None:
        if s.stable is None:
            s.phase = "Degraded"
        elif all(gone.drained_at is not None for gone in s.retiring):
            s.phase = "RolledBack"
        else:
            s.phase = "RollingBack"
        s.waiting = ""
    elif s.stable is not None and s.stable.ref.version == d.spec.version:
        in_force = d.in_force(s.stable.ref.version, 100.0)
        s.phase = "Promoted" if in_force or s.phase == "Promoted" else "Promoting"
        s.waiting = "" if in_force else "waiting for the gateways to take the route"


def _finish(d: _Draft) -> tuple[Status, tuple[Action, ...]]:
    s = d.status
    candidate_ready = s.candidate is not None and bool(d.servers(s.candidate.ref.version).ready)
    route = wanted_route(d.spec, s, candidate_ready=candidate_ready)
    settled_before = d.seen.settled and route == s.route
    s.route = route
    running = [arm.ref for arm in (s.stable, s.candidate) if arm is not None]
    running += [gone.ref for gone in s.retiring if not gone.released]
    versions = {ref.version for ref in running}
    actions: list[Action] = [SetRoute(d.spec.model, route)]
    actions += [RunServers(ref, d.spec.server.replicas) for ref in running]
    actions += [StopServers(version) for version in d.seen.arms if version not in versions]
    ready = len(d.servers(s.stable.ref.version).ready) if s.stable else 0
    s.conditions = conditions(s, d.spec, ready=ready, settled=settled_before, now=d.now)
    return s, tuple(actions)


def _delete(d: _Draft) -> tuple[Status, tuple[Action, ...]]:
    """Out of the route first, then the servers, then nothing."""
    s = d.status
    was, s.route = s.route, None
    actions: list[Action] = [SetRoute(d.spec.model, None)]
    if was is None and d.seen.settled:
        actions += [StopServers(version) for version in d.seen.arms]
        if not any(arm.servers for arm in d.seen.arms.values()):
            actions.append(Forget(d.item.name))
    else:
        refs = [arm.ref for arm in (s.stable, s.candidate) if arm is not None] + [gone.ref for gone in s.retiring]
        actions += [RunServers(ref, d.spec.server.replicas) for ref in refs]
    s.waiting = "is being deleted"
    return s, tuple(actions)
