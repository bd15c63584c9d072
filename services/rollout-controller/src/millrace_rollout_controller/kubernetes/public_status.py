"""A ModelDeployment's `status`: what people and programs read, and `internal`, which only the controller reads. Pure."""

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.stages import guarded_until, stages
from millrace_rollout_controller.state import ComparisonView, Condition, Decision, Status

FORMAT = 1
"""Of `internal`; a controller that does not know a format keeps its hands off."""


class Internal(BaseModel):
    """What the controller needs to go on after a restart."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    state: str = ""
    """`Status`, as gzip in base64: nobody should build on it."""
    evidence: str = ""
    """`Evidence`, the same way."""
    manifest: str = ""
    """The last manifest that was good; it stays in force while a newer one is refused."""
    generation: int = 0
    """Of that manifest."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a manifest is refused."""

    field: str
    message: str
    reason: str = "InvalidManifest"

    @property
    def text(self) -> str:
        """Field and message."""
        return f"{self.field}: {self.message}"[:1000]


def pack(value: BaseModel) -> str:
    """A model as text."""
    # Without a time in its header the same value is the same text.
    return base64.b64encode(gzip.compress(value.model_dump_json().encode(), 6, mtime=0)).decode("ascii")


def unpack_state(internal: Internal) -> Status:
    """The stored status; a new one when there is none."""
    return Status.model_validate_json(_text(internal.state)) if internal.state else Status()


def unpack_evidence(internal: Internal) -> Evidence:
    """The stored evidence; a new one when there is none."""
    return Evidence.model_validate_json(_text(internal.evidence)) if internal.evidence else Evidence()


def _text(packed: str) -> bytes:
    return gzip.decompress(base64.b64decode(packed))


def public(
    spec: Spec,
    status: Status,
    *,
    generation: int,
    problem: Problem | None,
    last_action: Object | None,
    rate: float = 0.0,
) -> Object:
    """Everything but `internal`; what is unknown or empty is left out.

    Args:
        spec: the manifest in force.
        status: where the rollout stands.
        generation: the object's own.
        problem: why a newer manifest is not in force.
        last_action: what the last action came to.
        rate: requests a second of the model.
    """
    candidate = status.candidate.ref.version if status.candidate is not None else ""
    steps = len(stages(spec))
    conditions = [condition(c, generation) for c in status.conditions]
    if problem is not None:
        conditions = _with_problem(conditions, problem, generation)
    routed = {arm.version: arm for arm in status.route.arms} if status.route is not None else {}
    roles = [(status.stable, "stable"), (status.candidate, "candidate")]
    arms = [(arm.ref, arm.endpoints, role) for arm, role in roles if arm is not None]
    arms += [(gone.ref, gone.endpoints, "leaving") for gone in status.retiring]
    shown: Object = {
        "observedGeneration": generation if problem is not None else status.observed_generation,
        "phase": status.phase,
        "strategy": spec.rollout.strategy,
        "stableVersion": status.stable.ref.version if status.stable is not None else "",
        "candidateVersion": candidate,
        "previousVersion": status.previous_version,
        "weight": _number(status.weight) if candidate else 0,
        "step": status.step + 1 if candidate and status.entered else 0,
        "steps": steps,
        "progress": f"{status.step + 1}/{steps}" if candidate and status.entered else "",
        "waiting": problem.text if problem is not None else status.waiting,
        "paused": status.paused,
        "conditions": conditions,
        "arms": [
            {
                "version": ref.version,
                "digest": ref.digest,
                "role": role,
                "weight": _number(routed[ref.version].weight) if ref.version in routed else 0,
                "mirrorPercent": _number(routed[ref.version].mirror) if ref.version in routed else 0,
                "ready": len(endpoints),
                "endpoints": list(endpoints),
            }
            for ref, endpoints, role in arms
        ],
        "gates": [
            {
                "gate": gate.gate,
                "verdict": gate.verdict,
                "evidence": gate.evidence,
                "candidateSamples": gate.candidate_samples,
                "stableSamples": gate.stable_samples,
            }
            for gate in status.verdicts
        ],
        "comparisons": [_comparison(one) for one in status.comparisons],
        "events": [
            {"at": time(event.at), "type": event.type, "reason": event.reason, "message": event.message}
            for event in status.events[-SHOWN_EVENTS:]
        ],
    }
    if rate:
        shown["requestsPerSecond"] = float(f"{rate:.3g}")
    if status.history:
        shown["history"] = [_decision(one) for one in status.history[-SHOWN_DECISIONS:]]
    if (until := guarded_until(spec, status)) is not None:
        shown["guardedUntil"] = time(until)
    if status.failed is not None:
        shown["failed"] = status.failed.model_dump()
    if last_action is not None:
        shown["lastAction"] = last_action
    return shown


SHOWN_EVENTS = 20
"""Events in the public status; Kubernetes Events carry each one."""


SHOWN_DECISIONS = 10
"""Decisions in the public status; GetHistory has them all."""


def _comparison(one: ComparisonView) -> Object:
    shown: Object = {
        "metric": one.metric,
        "candidate": one.candidate,
        "stable": one.stable,
        "candidateSamples": one.candidate_samples,
        "stableSamples": one.stable_samples,
        "lower": one.lower,
        "upper": one.upper,
        "confidence": one.confidence,
        "better": one.better,
    }
    more = {"segment": one.segment, "evidence": one.evidence}
    return shown | {key: value for key, value in more.items() if value}


def _decision(one: Decision) -> Object:
    shown: Object = {
        "at": time(one.at),
        "version": one.version,
        "decision": one.decision,
        "message": one.message,
        "weight": _number(one.weight),
        "gates": [{"gate": gate.gate, "verdict": gate.verdict, "evidence": gate.evidence} for gate in one.gates],
    }
    more = {
        "revision": one.revision,
        "against": one.against,
        "bundleSha256": one.bundle,
        "comparisons": [_comparison(result) for result in one.comparisons],
    }
    return shown | {key: value for key, value in more.items() if value}


def condition(c: Condition, generation: int) -> Object:
    """As meta/v1 has it."""
    return {
        "type": c.type,
        "status": c.status,
        "reason": c.reason or "Unknown",
        "message": c.message,
        "lastTransitionTime": time(c.last_transition_time, precise=False),
        "observedGeneration": generation,
    }


def _with_problem(conditions: list[Object], problem: Problem, generation: int) -> list[Object]:
    said = {"reason": problem.reason, "message": problem.text}
    return [
        one | said | {"status": "True", "observedGeneration": generation} if one["type"] == "Degraded" else one
        for one in conditions
    ]


def refused(problem: Problem, generation: int, before: Object, now: str) -> Object:
    """The status of an object that never had a good manifest."""
    message = problem.text
    old = {one["type"]: one for one in before.get("conditions", [])}
    conditions = []
    for kind, value in (("Ready", "False"), ("Progressing", "False"), ("Degraded", "True")):
        same = kind in old and old[kind]["status"] == value
        conditions.append(
            {
                "type": kind,
                "status": value,
                "reason": problem.reason,
                "message": message,
                "lastTransitionTime": old[kind]["lastTransitionTime"] if same else now,
                "observedGeneration": generation,
            }
        )
    return {"observedGeneration": generation, "phase": "Degraded", "waiting": message, "conditions": conditions}


def internal_of(item: Object) -> Internal:
    """The stored part of an object."""
    found: Any = (item.get("status") or {}).get("internal") or {}
    return Internal.model_validate(found)


def manifest_text(item: Object) -> str:
    """The manifest as the parser wants it: JSON, which is YAML."""
    wanted = {key: item[key] for key in ("apiVersion", "kind")}
    wanted |= {"metadata": {"name": item["metadata"]["name"]}, "spec": item.get("spec") or {}}
    return json.dumps(wanted, ensure_ascii=False, sort_keys=True)


def time(at: Any, *, precise: bool = True) -> str:
    """RFC 3339 in UTC; metav1.Time has whole seconds."""
    text = at.isoformat(timespec="milliseconds" if precise else "seconds")
    return str(text).replace("+00:00", "Z")


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 2)
