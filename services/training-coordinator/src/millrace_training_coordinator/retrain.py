"""When a drift finding starts a pipeline anew: a pure decision, with the reason either way."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from millrace_training_coordinator.manifest import Retrain


@dataclass(frozen=True, slots=True)
class Finding:
    """A drift finding; its window is event time."""

    id: str
    model: str
    kind: str
    """Name of the drift kind without its prefix, for example "PERFORMANCE"."""
    summary: str
    window_start: datetime | None
    window_end: datetime | None


@dataclass(frozen=True, slots=True)
class History:
    """What retraining a pipeline did before."""

    last_window_end: datetime | None = None
    """Newest window whose finding started a run."""
    last_started_at: datetime | None = None
    """When that run was started, wall clock."""
    active_run_id: str = ""
    """A retraining run that is not finished."""


class Verdict(StrEnum):
    """What becomes of a finding."""

    STARTED = "started"
    OTHER_KIND = "other_kind"
    NO_WINDOW = "no_window"
    COOLDOWN = "cooldown"
    INTERVAL = "interval"
    ACTIVE = "active"
    QUEUE_FULL = "queue_full"
    UNUSABLE = "unusable"


def judge(
    policy: Retrain, finding: Finding, history: History, now: datetime, min_interval_s: float
) -> tuple[Verdict, str]:
    """Whether `finding` starts a run, and why (not), in words."""
    if finding.kind not in policy.kinds:
        return Verdict.OTHER_KIND, f"{finding.kind} is none of {', '.join(policy.kinds)}"
    if not finding.id or finding.window_start is None or finding.window_end is None:
        return Verdict.NO_WINDOW, "it has no id or no window"
    if history.active_run_id:
        return Verdict.ACTIVE, f"run {history.active_run_id} still retrains"
    if history.last_window_end is not None:
        passed = (finding.window_end - history.last_window_end).total_seconds()
        if passed < policy.cooldown_s:
            end = rfc3339(history.last_window_end)
            return Verdict.COOLDOWN, f"window ends {passed:g} s after {end}, the cooldown is {policy.cooldown_s:g} s"
    if history.last_started_at is not None and now - history.last_started_at < timedelta(seconds=min_interval_s):
        return Verdict.INTERVAL, f"the last retraining started less than {min_interval_s:g} s ago"
    return Verdict.STARTED, "the finding matches the retrain policy"


def parameters(policy: Retrain, finding: Finding) -> Mapping[str, str]:
    """The policy's parameters with the finding's window put in."""
    assert finding.window_start is not None
    assert finding.window_end is not None
    start, end = rfc3339(finding.window_start), rfc3339(finding.window_end)
    return {
        name: value.replace("{window_start}", start).replace("{window_end}", end)
        for name, value in policy.parameters.items()
    }


def rfc3339(instant: datetime) -> str:
    """`2013-08-01T00:00:00Z`."""
    return instant.isoformat().replace("+00:00", "Z")
