"""Versions without requests go to sleep, and are woken by the next call. Pure; part of the reconciler.

Order that loses no request: the route says that the version is asleep, so gateways hold its calls; that is in force everywhere; what was
under way has ended; only then its servers stop. On the way back a server is ready before the route says that it is awake. A wake may
come at any point in between, and twice.
"""

from datetime import datetime, timedelta

from millrace_rollout_controller import pooling
from millrace_rollout_controller.candidates import fail
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.state import Arm, Sleep, Status

WISH_RENEWAL = timedelta(seconds=1)
"""Time between two notes of the same wish."""


def idle_after(spec: Spec) -> timedelta | None:
    """Time without a request after which a version goes to sleep; None never."""
    scaling = spec.server.autoscaling
    if scaling is None or scaling.min_replicas != 0 or scaling.idle_after is None:
        return None
    return timedelta(seconds=seconds(scaling.idle_after, "spec.server.autoscaling.idleAfter"))


def wake(status: Status, version: str, now: datetime) -> Status | None:
    """The status with the wish that the version wakes; None where that is no news, because it is awake, wakes, or is no version here."""
    after = status.model_copy(deep=True)
    for arm in (after.stable, after.candidate):
        if arm is None or arm.ref.version != version or arm.sleep is None:
            continue
        sleep, pooled = arm.sleep, arm.placed is not None
        if sleep.waking_since is None:
            _begin_to_wake(after, arm, sleep, now, "a call came")
            sleep.asked_at = now if pooled else None
            return after
        # In a pool a wish lasts only as long as somebody has it.
        if pooled and (sleep.asked_at is None or now - sleep.asked_at >= WISH_RENEWAL):
            sleep.asked_at = now
            return after
    return None


def look_at_sleep(d: Draft) -> None:
    """Move stable and the candidate one stage towards sleep, or towards being awake."""
    s = d.status
    for arm in (s.stable, s.candidate):
        if arm is None:
            continue
        if arm.sleep is None:
            _doze(d, arm)
        elif pooling.leaves(arm):
            if not pooling.give_up(d, arm):
                _fall_asleep(d, arm, arm.sleep)
        elif pooling.waits(arm):
            pooling.lapse(d, arm)
        elif arm.sleep.waking_since is not None:
            _wake_up(d, arm, arm.sleep)
        elif not _may_sleep(d, arm):
            _begin_to_wake(
                s, arm, arm.sleep, d.now, "a rollout needs it" if s.candidate else "it may not sleep any more"
            )
        else:
            _fall_asleep(d, arm, arm.sleep)
    if s.candidate is None and s.stable is not None and s.stable.sleep is not None:
        waking = s.stable.sleep.waking_since is not None
        idle = "it gave way in its pool" if s.stable.sleep.evicted else "it had no requests"
        s.waiting = "servers start, calls are held" if waking else f"asleep: {idle}; the next call wakes it"
        s.waiting = pooling.waiting_text(d, s.stable) or s.waiting


def candidate_sleeps(d: Draft) -> bool:
    """Whether nothing can be asked of the candidate, because it sleeps or wakes; has it wake where something is wanted of it."""
    s = d.status
    if s.candidate is None or s.candidate.sleep is None:
        return False
    sleep, version = s.candidate.sleep, s.candidate.ref.version
    if sleep.waking_since is None:
        s.waiting = f"{version} is asleep: it had no requests; promote wakes it"
        if s.forced or s.held_weight:
            _begin_to_wake(s, s.candidate, sleep, d.now, "it is to have traffic")
    elif d.now - sleep.waking_since > timedelta(seconds=d.spec.rollout.progress_deadline_seconds):
        # A wake may take as long as a start, and fails the candidate like one.
        why = d.servers(version).refusal
        text = f"{version} did not wake within {d.spec.rollout.progress_deadline_seconds} s"
        fail(d, "ProgressDeadlineExceeded", text + (f": {why.message}" if why is not None else ""))
    else:
        s.waiting = f"{version} wakes: its servers start"
    return True


def _may_sleep(d: Draft, arm: Arm) -> bool:
    """Stable while nothing is on trial; a candidate that gets nothing and waits for a person."""
    s, pool = d.status, d.spec.server.pool
    if idle_after(d.spec) is None and (pool is None or pool.pinned):
        return False
    if s.candidate is None:
        return True
    if pool is not None:
        return False
    stage = d.stages[min(s.step, len(d.stages) - 1)]
    waits = s.entered and s.step_since is not None and stage.until_promote and not s.forced and not s.held_weight
    return arm is s.candidate and waits and not s.weight and not s.mirror and not s.guarding


def _quiet(d: Draft, arm: Arm, at_least: timedelta, after: datetime | None) -> bool:
    """Whether nothing has been asked of the version for so long, by the word of every gateway in this very look."""
    since = d.evidence.quiet.since.get(arm.ref.version)
    if since is None or not d.heard_all:
        return False
    return d.now - (since if after is None else max(since, after)) >= at_least


def _drained(d: Draft, arm: Arm, after: datetime) -> bool:
    return _quiet(d, arm, timedelta(seconds=d.limits.drain_s), after)


def _calm(d: Draft, arm: Arm, after: datetime) -> bool:
    """Whether nothing has been with the version's server for long enough, by the word of every gateway; held calls do not count."""
    since = d.evidence.quiet.calm.get(arm.ref.version)
    if since is None or not d.heard_all:
        return False
    return d.now - max(since, after) >= timedelta(seconds=d.limits.evict_drain_s)


def _doze(d: Draft, arm: Arm) -> None:
    limit = idle_after(d.spec)
    if arm.ref.version in d.seen.pool.evict and arm.placed and _may_sleep(d, arm):
        pooling.give_way(d, arm)
        return
    if limit is None or not _may_sleep(d, arm) or not _quiet(d, arm, limit, arm.awake_since):
        return
    arm.sleep = Sleep(since=d.now)
    message = (
        f"{arm.ref.version} had no requests for {_text(limit)}: its calls are held from now on, and its servers stop"
    )
    d.status.event(d.now, "Normal", "FellAsleep", message)


def _fall_asleep(d: Draft, arm: Arm, sleep: Sleep) -> None:
    route, version = d.status.route, arm.ref.version
    if sleep.in_force_at is None:
        if d.seen.settled and route is not None and any(a.version == version and a.asleep for a in route.arms):
            sleep.in_force_at = d.now
    elif not sleep.stopped and (
        _calm(d, arm, sleep.in_force_at) if arm.placed else _drained(d, arm, sleep.in_force_at)
    ):
        sleep.stopped, arm.endpoints = True, ()


def _begin_to_wake(status: Status, arm: Arm, sleep: Sleep, now: datetime, why: str) -> None:
    sleep.waking_since = now
    status.event(now, "Normal", "Waking", f"{arm.ref.version} wakes: {why}")


def _wake_up(d: Draft, arm: Arm, sleep: Sleep) -> None:
    if not d.servers(arm.ref.version).ready or sleep.waking_since is None:
        return
    took = d.now - sleep.waking_since
    arm.sleep, arm.awake_since = None, d.now
    if arm is d.status.candidate:
        # Gateways have to know its servers before it gets any weight.
        d.status.step_since = None
    d.status.event(d.now, "Normal", "Awake", f"{arm.ref.version} takes calls again, after {took.total_seconds():.1f} s")


def _text(length: timedelta) -> str:
    minutes, rest = divmod(round(length.total_seconds()), 60)
    return f"{rest} s" if not minutes else f"{minutes} min" if not rest else f"{minutes} min {rest} s"
