"""What a Job and its pods say: whether they wait, run or have ended, and why. Values only, no calls.

Which pod's end counts? The first one. When one worker of a distributed stage goes, the others fail for want of it moments later and the
Job's controller ends the rest, so that the true reason is the earliest: each pod says when its command ended.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from millrace_training_coordinator.executor import Ending, Exit
from millrace_training_coordinator.jobs import CONTAINER
from millrace_training_coordinator.results import EXIT_PERMANENT, EXIT_TEMPORARY

# Why a kubelet ended or refused a pod although its program did nothing wrong.
LOST_REASONS = frozenset(
    {
        "Evicted",
        "NodeLost",
        "NodeShutdown",
        "Shutdown",
        "Terminated",
        "Preempting",
        "NodeAffinity",
        "UnexpectedAdmissionError",
    }
)
# Waiting that no patience helps.
HOPELESS_REASONS = frozenset({"InvalidImageName", "ErrImageNeverPull"})
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
MAX_DETAIL_CHARS = 500


@dataclass(frozen=True, slots=True)
class PodEnd:
    """How one pod ended."""

    index: int
    at: float
    """Unix time."""
    exit: Exit


def pod_index(pod: Mapping[str, Any]) -> int:
    """Which pod of its attempt this is."""
    meta = pod["metadata"]
    text = meta.get("annotations", {}).get(INDEX_LABEL) or meta.get("labels", {}).get(INDEX_LABEL) or "0"
    return int(text)


def container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """Status of the stage's container; empty until there is one."""
    statuses: Sequence[Mapping[str, Any]] = pod.get("status", {}).get("containerStatuses") or ()
    return next((status for status in statuses if status["name"] == CONTAINER), {})


def has_started(pod: Mapping[str, Any]) -> bool:
    """Whether the command's container runs or ran, so that there may be a log."""
    state = container(pod).get("state") or {}
    return "running" in state or "terminated" in state


def is_over(pod: Mapping[str, Any]) -> bool:
    """Whether nothing of the pod runs any more."""
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def job_result(job: Mapping[str, Any]) -> tuple[str, str, str]:
    """(`Complete`, `Failed` or empty, the reason, the message)."""
    for condition in job.get("status", {}).get("conditions") or ():
        if condition["type"] in {"Complete", "Failed"} and condition["status"] == "True":
            return condition["type"], condition.get("reason", ""), condition.get("message", "")
    return "", "", ""


def waiting(pods: Sequence[Mapping[str, Any]], wanted: int) -> tuple[str, bool]:
    """Why not all pods of an attempt have started, in words, and whether it is hopeless; empty when all have."""
    if len(pods) < wanted:
        return (
            f"the cluster made {len(pods)} of {wanted} pods so far (a quota or an admission rule may refuse them)",
            False,
        )
    for pod in pods:
        if has_started(pod) or is_over(pod):
            continue
        name = pod["metadata"]["name"]
        for condition in pod.get("status", {}).get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return _short(f"{name}: {condition.get('reason', '')}: {condition.get('message', '')}"), False
        held = (container(pod).get("state") or {}).get("waiting") or {}
        reason = held.get("reason", "")
        if reason and reason not in {"ContainerCreating", "PodInitializing"}:
            return _short(f"{name}: {reason}: {held.get('message', '')}"), reason in HOPELESS_REASONS
        return f"{name}: its container is being made", False
    return "", False


def pod_end(pod: Mapping[str, Any]) -> PodEnd | None:
    """How a pod ended; None while it has not."""
    if not is_over(pod):
        return None
    status = pod["status"]
    ended = (container(pod).get("state") or {}).get("terminated") or {}
    index, name = pod_index(pod), pod["metadata"]["name"]
    at = _instant(ended.get("finishedAt")) or _instant(pod["metadata"].get("deletionTimestamp")) or 0.0
    said = _message(ended.get("message", ""))
    reason, message = status.get("reason", ""), status.get("message", "")
    if reason == "DeadlineExceeded":
        return PodEnd(index, at, Exit(Ending.TIMEOUT, detail=f"pod {name} ran into its deadline"))
    if reason == "Evicted" and "exceeds" in message:
        # Its own fault: a working folder or memory volume beyond its limit.
        return PodEnd(index, at, Exit(Ending.EXITED, 1, _short(f"pod {name} was evicted: {message}")))
    if reason in LOST_REASONS or reason.startswith("OutOf") or _disrupted(status):
        return PodEnd(index, at, Exit(Ending.LOST, detail=_short(f"pod {name}: {_disruption(status)}")))
    if ended.get("reason") == "OOMKilled":
        return PodEnd(index, at, Exit(Ending.MEMORY, -9, f"pod {name} used more than its memory limit"))
    if said is not None:
        return PodEnd(index, said[0], said[1])
    if not ended:
        return PodEnd(
            index, at, Exit(Ending.LOST, detail=_short(f"pod {name} failed before it started: {reason} {message}"))
        )
    code = int(ended.get("exitCode", 1))
    if ended.get("reason") in {"StartError", "ContainerCannotRun"}:
        return PodEnd(index, at, Exit(Ending.NOT_STARTED, code, _short(f"cannot start: {ended.get('message', '')}")))
    return PodEnd(index, at, Exit(Ending.EXITED, 128 - code if code > 128 else code))


def record_end(index: int, raw: Mapping[str, Any]) -> PodEnd | None:
    """How a pod that is gone ended, by what it left in the work store."""
    said = _said(raw)
    return None if said is None else PodEnd(index, *said)


def _message(text: str) -> tuple[float, Exit] | None:
    try:
        raw = json.loads(text)
    except ValueError:
        return None
    return _said(raw) if isinstance(raw, dict) else None


def _said(raw: Mapping[str, Any]) -> tuple[float, Exit] | None:
    try:
        return float(raw["at"]), Exit(Ending(raw["ending"]), int(raw["code"]), str(raw["detail"])[:MAX_DETAIL_CHARS])
    except (KeyError, ValueError, TypeError):
        return None


def _disrupted(status: Mapping[str, Any]) -> bool:
    return any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in status.get("conditions") or ())


def _disruption(status: Mapping[str, Any]) -> str:
    for condition in status.get("conditions") or ():
        if condition["type"] == "DisruptionTarget":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return f"{status.get('reason', '')}: {status.get('message', '')}"


def attempt_end(job: Mapping[str, Any], ends: Sequence[PodEnd], pods: int) -> Exit:
    """How an attempt ended whose Job is over.

    Args:
        job: the Job.
        ends: of its pods, as far as they said anything.
        pods: how many there were to be.
    """
    result, reason, message = job_result(job)
    if result == "Complete":
        return Exit(Ending.EXITED, 0)
    told = [end for end in ends if not (end.exit.ending is Ending.EXITED and end.exit.code == 0)]
    # A worker that gives a code with a meaning says more than one that noticed its absence.
    meant = [e for e in told if e.exit.ending is Ending.EXITED and e.exit.code in {EXIT_PERMANENT, EXIT_TEMPORARY}]
    if meant:
        return min(meant, key=lambda end: end.at).exit
    silent = sorted(set(range(pods)) - {end.index for end in ends})
    first = min(told, key=lambda end: end.at) if told else None
    if first is not None and first.exit.ending is Ending.STOPPED:
        return Exit(Ending.LOST, detail=f"pod {first.index} was deleted")
    if first is not None and not (silent and first.exit.ending is Ending.EXITED):
        return first.exit
    if reason == "DeadlineExceeded":
        return Exit(Ending.TIMEOUT, detail="the Job ran into its deadline")
    if silent:
        return Exit(Ending.LOST, detail=f"pod {silent[0]} vanished without a word")
    return Exit(Ending.LOST, detail=_short(f"its Job failed: {reason}: {message}"))


def _instant(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAIL_CHARS]
