"""The reconciler: from what is wanted, what was known and what is seen, to what is known now and what to do. Pure.

Level-based: each call looks at everything anew and may be the first one after a crash. Actions say what should be, not what to change, so
doing them twice is doing them once. Order that keeps every request answered: servers ready and warmed, then in the route with weight 0,
then with weight; on the way out weight 0, in force everywhere, drained, out of the route, in force everywhere, and only then stopped.

Its parts: `candidates` chooses who is on trial, `trials` moves it through the strategy's `stages`, `judging` says what is missing,
`retirement` takes versions out, `sleeping` stops the servers of those nobody asks, `routing` makes the route.
"""

from datetime import datetime

from millrace_rollout_controller.candidates import accept_spec, choose_candidate
from millrace_rollout_controller.capacity import note_stable, replicas
from millrace_rollout_controller.conditions import conditions
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.plans import (
    Action,
    ArmSeen,
    Draft,
    Forget,
    Item,
    Limits,
    Observed,
    Refusal,
    RunServers,
    SetRoute,
    StopServers,
    WarmServers,
)
from millrace_rollout_controller.pooling import settle_places
from millrace_rollout_controller.retirement import retire
from millrace_rollout_controller.routing import wanted_route
from millrace_rollout_controller.sleeping import look_at_sleep
from millrace_rollout_controller.state import Status
from millrace_rollout_controller.trials import look_at_candidate
from millrace_rollout_controller.warm_gate import warming

__all__ = [
    "Action", "ArmSeen", "Forget", "Item", "Limits", "Observed", "Refusal", "RunServers", "SetRoute", "StopServers", "WarmServers",
    "reconcile",
]  # fmt: skip


def reconcile(
    item: Item,
    status: Status,
    observed: Observed,
    evidence: Evidence,
    now: datetime,
    *,
    limits: Limits,
    heard_all: bool = False,
) -> tuple[Status, tuple[Action, ...]]:
    """One look; the arguments are left as they are. With `heard_all` every gateway's activity is in `evidence`."""
    draft = Draft(item, status.model_copy(deep=True), observed, evidence, now, limits, heard_all)
    if item.deleting:
        return _delete(draft)
    accept_spec(draft)
    _refresh_endpoints(draft)
    choose_candidate(draft)
    settle_places(draft)
    note_stable(draft)
    look_at_candidate(draft)
    retire(draft)
    if draft.status.candidate is None:
        _rest(draft)
    look_at_sleep(draft)
    return _finish(draft)


def _refresh_endpoints(d: Draft) -> None:
    kept = [gone for gone in d.status.retiring if gone.kept_until is not None]
    for arm in (d.status.stable, d.status.candidate, *kept):
        seen = d.servers(arm.ref.version) if arm else ArmSeen()
        if arm and seen.ready:
            arm.endpoints = seen.ready
        if arm and seen.service:
            arm.service = seen.service


def _rest(d: Draft) -> None:
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


def _finish(d: Draft) -> tuple[Status, tuple[Action, ...]]:
    s = d.status
    candidate_ready = s.candidate is not None and bool(d.servers(s.candidate.ref.version).ready)
    route = wanted_route(d.spec, s, candidate_ready=candidate_ready)
    settled_before = d.seen.settled and route == s.route
    s.route = route
    running = [arm.ref for arm in (s.stable, s.candidate) if arm is not None]
    running += [gone.ref for gone in s.retiring if not gone.released]
    versions = {ref.version for ref in running}
    actions: list[Action] = [SetRoute(d.spec.model, route)]
    actions += [RunServers(ref, replicas(d, ref)) for ref in running]
    actions += [StopServers(version) for version in d.seen.arms if version not in versions]
    if (warm_up := warming(d)) is not None:
        actions.append(warm_up)
    ready = len(d.servers(s.stable.ref.version).ready) if s.stable else 0
    s.conditions = conditions(s, d.spec, ready=ready, settled=settled_before, now=d.now)
    return s, tuple(actions)


def _delete(d: Draft) -> tuple[Status, tuple[Action, ...]]:
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
        actions += [RunServers(ref, replicas(d, ref)) for ref in refs]
    s.waiting = "is being deleted"
    return s, tuple(actions)
