"""From Kubernetes' objects to what the view shows: a `Deployment` like the one the controller's gRPC API gives, and pods. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from millrace_api.rollout.v1 import rollout_pb2 as rollout

from millrace.tree import Pod

_VERDICTS = {
    "pass": rollout.VERDICT_PASS,
    "fail": rollout.VERDICT_FAIL,
    "undecided": rollout.VERDICT_UNDECIDED,
}
_ROLES = {"stable": rollout.ARM_ROLE_STABLE, "candidate": rollout.ARM_ROLE_CANDIDATE}
_TROUBLES = ("CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError", "InvalidImageName")


def deployment(item: Mapping[str, Any]) -> rollout.Deployment:
    """A ModelDeployment object as the controller's API shows it."""
    metadata, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    step = int(status.get("step", 0))
    conditions = status.get("conditions", [])
    manifest = {key: item[key] for key in ("apiVersion", "kind") if key in item}
    manifest |= {"metadata": {"name": metadata["name"]}, "spec": spec}
    return rollout.Deployment(
        name=metadata["name"],
        manifest_yaml=yaml.safe_dump(manifest, sort_keys=False),
        generation=metadata.get("generation", 0),
        observed_generation=status.get("observedGeneration", 0),
        model=spec.get("model", ""),
        stable_version=status.get("stableVersion", ""),
        candidate_version=status.get("candidateVersion", ""),
        candidate_weight=status.get("weight", 0),
        step=max(0, step - 1),
        steps=status.get("steps", 0),
        phase=status.get("phase", ""),
        ready=any(one["type"] == "Ready" and one["status"] == "True" for one in conditions),
        conditions=[
            rollout.Condition(
                type=one["type"],
                status=one["status"],
                reason=one.get("reason", ""),
                message=one.get("message", ""),
                last_transition_time=one.get("lastTransitionTime", ""),
            )
            for one in conditions
        ],
        gates=[_gate(one) for one in status.get("gates", [])],
        events=[
            rollout.StatusEvent(at=one["at"], type=one["type"], reason=one["reason"], message=one["message"])
            for one in status.get("events", [])
        ],
        arms=[
            rollout.Arm(
                version=one["version"],
                digest=one.get("digest", ""),
                role=_ROLES.get(one.get("role", ""), rollout.ARM_ROLE_UNSPECIFIED),
                weight=one.get("weight", 0),
                endpoints=one.get("endpoints", []),
                mirror_percent=one.get("mirrorPercent", 0),
            )
            for one in status.get("arms", [])
        ],
        created_at=metadata.get("creationTimestamp", ""),
        previous_version=status.get("previousVersion", ""),
        waiting=status.get("waiting", ""),
        strategy=status.get("strategy") or (spec.get("rollout") or {}).get("strategy", "Canary"),
        comparisons=[_comparison(one) for one in status.get("comparisons", [])],
        requests_per_second=status.get("requestsPerSecond", 0),
        history=[
            rollout.Decision(
                at=one["at"],
                revision=one.get("revision", 0),
                version=one["version"],
                against=one.get("against", ""),
                decision=one["decision"],
                message=one.get("message", ""),
                weight=one.get("weight", 0),
                gates=[_gate(gate) for gate in one.get("gates", [])],
                comparisons=[_comparison(result) for result in one.get("comparisons", [])],
                bundle_sha256=one.get("bundleSha256", ""),
            )
            for one in status.get("history", [])
        ],
        guarded_until=status.get("guardedUntil", ""),
    )


def _comparison(one: Mapping[str, Any]) -> rollout.ComparisonResult:
    return rollout.ComparisonResult(
        metric=one["metric"],
        candidate=one.get("candidate", 0),
        stable=one.get("stable", 0),
        candidate_samples=one.get("candidateSamples", 0),
        stable_samples=one.get("stableSamples", 0),
        lower=one.get("lower", 0),
        upper=one.get("upper", 0),
        confidence=one.get("confidence", 0),
        better=one.get("better", ""),
        segment=one.get("segment", ""),
        evidence=one.get("evidence", ""),
    )


def _gate(one: Mapping[str, Any]) -> rollout.GateResult:
    return rollout.GateResult(
        gate=one["gate"],
        verdict=_VERDICTS.get(one.get("verdict", ""), rollout.VERDICT_UNSPECIFIED),
        evidence=one.get("evidence", ""),
        candidate_samples=one.get("candidateSamples", 0),
        stable_samples=one.get("stableSamples", 0),
    )


def pods(items: Sequence[Mapping[str, Any]]) -> list[Pod]:
    """Pods by name."""
    return sorted((_pod(item) for item in items), key=lambda pod: pod.name)


def _pod(item: Mapping[str, Any]) -> Pod:
    metadata, status = item["metadata"], item.get("status") or {}
    # The annotation holds any version; a label only those that fit into one.
    version = (metadata.get("annotations") or {}).get("millrace.dev/version")
    containers = status.get("containerStatuses", [])
    every = [*containers, *status.get("initContainerStatuses", [])]
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", []))
    state = status.get("phase", "Unknown")
    waiting = [((one.get("state") or {}).get("waiting") or {}).get("reason", "") for one in every]
    if trouble := next((reason for reason in waiting if reason in _TROUBLES), ""):
        state = trouble
    elif metadata.get("deletionTimestamp"):
        state = "Terminating"
    elif state == "Pending" and not containers and (reason := _unscheduled(status)):
        state = reason
    return Pod(
        name=metadata["name"],
        version=version or (metadata.get("labels") or {}).get("millrace.dev/version", ""),
        state=state,
        ready=ready,
        restarts=sum(one.get("restartCount", 0) for one in containers),
        created_at=metadata.get("creationTimestamp", ""),
        node=(item.get("spec") or {}).get("nodeName", ""),
    )


def _unscheduled(status: Mapping[str, Any]) -> str:
    """Why no node takes the pod, as the scheduler says it."""
    for one in status.get("conditions", []):
        if one["type"] == "PodScheduled" and one["status"] == "False":
            return f"Pending: {one.get('message') or one.get('reason', '')}"[:200]
    return ""
