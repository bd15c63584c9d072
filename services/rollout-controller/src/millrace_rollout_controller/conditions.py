"""Conditions by the Kubernetes API conventions: Ready, Progressing, Degraded. Pure."""

from datetime import datetime, timedelta
from typing import Literal

from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.sleeping import idle_after
from millrace_rollout_controller.state import Condition, Sleep, Status

_MOVING = {"Preparing", "Progressing", "Promoting", "RollingBack"}


def conditions(status: Status, spec: Spec, *, ready: int, settled: bool, now: datetime) -> list[Condition]:
    """The conditions, whether a version that may sleep does, and for an A/B test whether its result is valid; a time changes only where a condition's status does.

    Args:
        status: the status so far, with the conditions of the look before.
        spec: what is wanted.
        ready: ready servers of the stable version.
        settled: the wanted route is in force everywhere.
        now: the time of this look.
    """
    before = {condition.type: condition for condition in status.conditions}

    def condition(kind: str, holds: bool, reason: str, message: str) -> Condition:
        value: Literal["True", "False"] = "True" if holds else "False"
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == value else now
        return Condition(type=kind, status=value, reason=reason, message=message[:1000], last_transition_time=since)

    sleeps = idle_after(spec) is not None or spec.server.pool is not None or _sleep(status) is not None
    sleep = [condition("Asleep", *_asleep(status)), condition("Waking", *_waking(status))] if sleeps else []
    experiment = [condition("ExperimentValid", *_valid(status))] if spec.rollout.strategy == "ABTest" else []
    return [
        condition("Ready", *_ready(status, spec, ready, settled, now)),
        condition("Progressing", *_progressing(status)),
        condition("Degraded", *_degraded(status, spec, ready, now)),
        *sleep,
        *experiment,
    ]


def _valid(status: Status) -> tuple[bool, str, str]:
    if status.mismatch:
        return False, "SampleRatioMismatch", status.mismatch
    return True, "AsSplit", "requests arrive in the ratio that was given, as far as is known"


def is_ready(status: Status) -> bool:
    """Whether the Ready condition holds."""
    return any(c.type == "Ready" and c.status == "True" for c in status.conditions)


def _sleep(status: Status) -> Sleep | None:
    return status.stable.sleep if status.stable is not None else None


def _asleep(status: Status) -> tuple[bool, str, str]:
    sleep = _sleep(status)
    if sleep is None:
        return False, "Awake", "it has servers"
    if sleep.waking_since is not None:
        return False, "Waking", "a call came; its servers start"
    if sleep.evicted:
        text = (
            f"it gave way in its pool; calls are held since {sleep.since:%Y-%m-%dT%H:%M:%SZ}, and the next one wakes it"
        )
        return True, "Evicted", text
    return (
        True,
        "Idle",
        f"no requests; calls are held since {sleep.since:%Y-%m-%dT%H:%M:%SZ}, and the next one wakes it",
    )


def _waking(status: Status) -> tuple[bool, str, str]:
    sleep = _sleep(status)
    if sleep is None or sleep.waking_since is None:
        return False, "Asleep" if sleep is not None else "Awake", "nothing wakes"
    if status.stable is not None and status.stable.placed is False:
        return True, "WaitsForRoom", status.waiting
    return True, "ServersStart", f"calls are held while servers start, since {sleep.waking_since:%Y-%m-%dT%H:%M:%SZ}"


def _at_peace(status: Status, spec: Spec, now: datetime) -> bool:
    """Whether the stable version has no servers for a good reason: it is asleep, or not waking for too long yet."""
    sleep = _sleep(status)
    if sleep is None:
        return False
    limit = timedelta(seconds=spec.rollout.progress_deadline_seconds)
    return sleep.waking_since is None or now - sleep.waking_since <= limit


def _ready(status: Status, spec: Spec, ready: int, settled: bool, now: datetime) -> tuple[bool, str, str]:
    if status.stable is None:
        return False, "NoStableVersion", "no version serves yet"
    version = status.stable.ref.version
    if _at_peace(status, spec, now):
        return True, "Asleep", f"{version} has no servers while nobody asks; calls are held until it has"
    if not ready:
        return False, "NoReadyServers", f"no server of {version} is ready"
    was = is_ready(status)
    if not settled and not was:
        return False, "RouteNotInForce", "the gateways have not taken the route yet"
    return True, "Serving", f"{version} serves with {ready} ready servers"


def _progressing(status: Status) -> tuple[bool, str, str]:
    if status.held_by and status.candidate is not None:
        return False, status.held_by, status.waiting
    if status.phase in _MOVING:
        return True, status.phase, status.waiting or f"phase {status.phase}"
    if status.phase == "Paused":
        return False, "Paused", status.waiting or "paused"
    if status.failed is not None:
        return False, status.failed.reason, status.failed.message
    return False, status.phase, status.waiting or f"phase {status.phase}"


def _degraded(status: Status, spec: Spec, ready: int, now: datetime) -> tuple[bool, str, str]:
    if status.failed is not None:
        return True, status.failed.reason, f"{status.failed.version}: {status.failed.message}"
    if status.stable is not None and ready < spec.server.replicas and not _at_peace(status, spec, now):
        return True, "ServersMissing", f"{ready} of {spec.server.replicas} stable servers are ready"
    return False, "AsWanted", "everything is as the spec wants it"
