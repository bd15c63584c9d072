"""Schema of a ModelDeployment's status and the columns `kubectl get` prints."""

from typing import Any

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _whole(description: str) -> Schema:
    return {"type": "integer", "format": "int64", "description": description}


def _number(description: str) -> Schema:
    return {"type": "number", "description": description}


def _object(description: str, **properties: Schema) -> Schema:
    return {"type": "object", "description": description, "properties": properties}


def _list(description: str, item: Schema, **more: Any) -> Schema:
    return {"type": "array", "description": description, "items": item, **more}


_CONDITION: Schema = {
    **_object(
        "As meta/v1 has it.",
        type=_text("Ready, Progressing or Degraded.", maxLength=316),
        status={"type": "string", "enum": ["True", "False", "Unknown"]},
        reason=_text("One word.", maxLength=1024),
        message=_text("For people.", maxLength=32768),
        lastTransitionTime=_text("When the status changed.", format="date-time"),
        observedGeneration=_whole("Generation this is about."),
    ),
    "required": ["type", "status", "lastTransitionTime", "reason", "message"],
}
_ARM = _object(
    "One version with servers.",
    version=_text("Version."),
    digest=_text("Its digest in the registry."),
    role=_text("stable, candidate or leaving."),
    weight=_number("Percent of the traffic."),
    mirrorPercent=_number("Percent of the requests copied to it."),
    ready=_whole("Ready servers."),
    endpoints=_list("Ready servers, host:port of gRPC.", {"type": "string"}),
)
_GATE = _object(
    "One gate and its verdict.",
    gate=_text("As people write it."),
    verdict=_text("pass, fail or undecided."),
    evidence=_text("The figures behind it."),
    candidateSamples=_whole("Samples of the candidate."),
    stableSamples=_whole("Samples of stable."),
)
_COMPARISON = _object(
    "Candidate against stable in one metric.",
    metric=_text("Metric."),
    candidate=_number("Estimate of the candidate."),
    stable=_number("Estimate of stable."),
    candidateSamples=_whole("Samples of the candidate."),
    stableSamples=_whole("Samples of stable."),
    lower=_number("Lower bound of candidate minus stable."),
    upper=_number("Upper bound of candidate minus stable."),
    confidence=_number("Chance that the bounds hold at every look, those of all segments together."),
    better=_text("candidate, stable or undecided."),
    segment=_text("Group of predictions; absent for all of them."),
    evidence=_text("How the bounds came about."),
)
_EVENT = _object(
    "Something that happened.",
    at=_text("When."),
    type=_text("Normal or Warning."),
    reason=_text("One word."),
    message=_text("For people."),
)
_DECISION = _object(
    "One decision with the evidence behind it.",
    at=_text("When."),
    revision=_whole("Counts the versions that became stable; absent for decisions of another kind."),
    version=_text("Version it is about."),
    against=_text("Version it was compared with."),
    decision=_text("FirstVersion, StepPassed, Guarded, Promoted or the reason of a rollback."),
    message=_text("For people."),
    weight=_number("Percent of the candidate at that time."),
    gates=_list("Verdicts at that time.", _GATE),
    comparisons=_list("Results of an A/B test or a shadow run at that time.", _COMPARISON),
    bundleSha256=_text("Artifact of the registry with all evidence of the finished rollout."),
)
STATUS: Schema = _object(
    "Written by the controller.",
    observedGeneration=_whole("Generation the controller has looked at."),
    phase=_text("Idle, Preparing, Progressing, Paused, Promoting, RollingBack, RolledBack, Promoted or Degraded."),
    strategy=_text("Strategy in force."),
    stableVersion=_text("Version that answers."),
    candidateVersion=_text("Version on trial."),
    previousVersion=_text("Version that was stable before; undo goes there."),
    weight=_number("Percent of the candidate."),
    step=_whole("Step of the rollout, from 1; 0 outside of one."),
    steps=_whole("Number of steps."),
    progress=_text("Step and number of steps."),
    waiting=_text("Why nothing moves now."),
    paused={"type": "boolean", "description": "A person has paused the rollout."},
    conditions=_list(
        "Ready, Progressing and Degraded.",
        _CONDITION,
        **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
    arms=_list("Versions with servers.", _ARM, **{"x-kubernetes-list-type": "atomic"}),
    gates=_list("Gates of this or the last rollout.", _GATE, **{"x-kubernetes-list-type": "atomic"}),
    comparisons=_list("Results of an A/B test or a shadow run.", _COMPARISON, **{"x-kubernetes-list-type": "atomic"}),
    history=_list("The newest decisions.", _DECISION, **{"x-kubernetes-list-type": "atomic"}),
    requestsPerSecond=_number("Requests a second of the model when the status was last written."),
    guardedUntil=_text("Until when the previous version is kept warm and late outcomes may take the new one back."),
    events=_list("The newest events.", _EVENT, **{"x-kubernetes-list-type": "atomic"}),
    failed=_object(
        "The version that is not tried again until the spec changes.",
        version=_text("Version."),
        reason=_text("One word."),
        message=_text("For people."),
    ),
    lastAction=_object(
        "What the annotation millrace.dev/action came to.",
        id=_text("Its nonce."),
        verb=_text("What was asked."),
        weight=_number("Percent that was asked for."),
        result=_text("Done or Refused."),
        message=_text("Why it was refused."),
        at=_text("When."),
    ),
    internal={
        "type": "object",
        "description": "The controller's own; nothing should build on it.",
        "x-kubernetes-preserve-unknown-fields": True,
        "x-kubernetes-map-type": "atomic",
    },
)


def _column(name: str, path: str, kind: str = "string", priority: int = 0) -> Schema:
    return {"name": name, "type": kind, "jsonPath": path, "priority": priority}


COLUMNS = [
    _column("Ready", ".status.conditions[?(@.type=='Ready')].status"),
    _column("Stable", ".status.stableVersion"),
    _column("Candidate", ".status.candidateVersion"),
    _column("Weight", ".status.weight", "number"),
    _column("Step", ".status.progress"),
    _column("Age", ".metadata.creationTimestamp", "date"),
    _column("Phase", ".status.phase", priority=1),
    _column("Message", ".status.waiting", priority=1),
]
