"""The page's data, from the services' answers: a pure function, tested without a server."""

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.drift.v1.drift_pb2 import DriftKind
from millrace_api.feature.v1.feature_pb2 import GetConsistencyResponse
from millrace_api.prediction.v1.prediction_pb2 import VersionFigures
from millrace_api.registry.v1.registry_pb2 import Stage
from millrace_api.rollout.v1.rollout_pb2 import ArmRole, Deployment, Verdict
from millrace_api.training.v1.training_pb2 import RunState, StageState

from millrace_console.sources import SERVICES, Answers

QUANTILE = 0.99
MAX_FEATURES = 50
MAX_ROLLOUTS = 3
"""Newest rollouts of a version on the page."""


def word(name: Callable[[Any], str], number: int, prefix: str) -> str:
    """An enum value's `name` in lower case without `prefix`; the number where a newer service sent one not known here."""
    try:
        return name(number).removeprefix(prefix).lower()
    except ValueError:
        return str(number)


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def instant(value: Timestamp) -> str:
    """RFC 3339; empty for one outside years 1 to 9999."""
    try:
        return value.ToJsonString()
    except ValueError:
        return ""


def page(answers: Answers) -> dict[str, Any]:
    """Everything the page shows, as plain JSON data."""
    return {
        "services": {
            name: {"up": name not in answers.problems, "problem": answers.problems.get(name, "")} for name in SERVICES
        },
        "facts": _facts(answers),
        "deployments": [_deployment(d) for d in (answers.deployments.deployments if answers.deployments else ())],
        "versions": [_version(answers, index) for index in range(len(answers.versions or ()))],
        "figures": [_figures(answers, f) for f in (answers.figures.versions if answers.figures else ())],
        "findings": _findings(answers),
        "runs": _runs(answers),
        "streams": [
            {
                "contract": c.contract,
                "records": c.records,
                "watermark": instant(c.watermark) if c.HasField("watermark") else "",
                "behind": max(0, c.end_offset - c.next_offset),
            }
            for c in (answers.progress.contracts if answers.progress else ())
        ],
        "consistency": consistency(answers.consistency) if answers.consistency else [],
        "dead_letters": [
            {"contract": c.contract, "reason": c.reason, "count": c.count, "replayed": c.replayed}
            for c in (answers.dead_letters.counts if answers.dead_letters else ())
        ],
    }


def _facts(answers: Answers) -> dict[str, dict[str, int]]:
    """Counts on the picture: node -> name -> number."""
    facts: dict[str, dict[str, int]] = {name: {} for name in SERVICES}
    if answers.contracts is not None:
        facts["ingestion"] = {
            "records": sum(table.rows for table in answers.tables),
            "contracts": len(answers.contracts.contracts),
        }
    if answers.dead_letters is not None:
        facts["ingestion"]["dead letters"] = sum(c.count - c.replayed for c in answers.dead_letters.counts)
    if answers.progress is not None:
        behind = sum(max(0, c.end_offset - c.next_offset) for c in answers.progress.contracts)
        facts["feature"] = {"entities": answers.progress.entities, "messages behind": behind}
    if answers.runs is not None:
        running = sum(
            run.state in {RunState.RUN_STATE_PENDING, RunState.RUN_STATE_RUNNING} for run in answers.runs.runs
        )
        facts["training"] = {"runs": len(answers.runs.runs), "running": running}
    if answers.versions is not None:
        facts["registry"] = {"versions": len(answers.versions), "models": len({v.model for v in answers.versions})}
    if answers.deployments is not None:
        moving = sum(bool(d.candidate_version) for d in answers.deployments.deployments)
        facts["rollout"] = {"deployments": len(answers.deployments.deployments), "moving": moving}
    if answers.figures is not None:
        versions = answers.figures.versions
        facts["gateway"] = {"predictions": sum(v.requests for v in versions), "errors": sum(v.errors for v in versions)}
    if answers.findings is not None:
        facts["drift"] = {
            "findings": len(answers.findings.findings),
            "outcomes": sum(o.outcomes for o in answers.outcomes),
        }
    return facts


def _deployment(deployment: Deployment) -> dict[str, Any]:
    return {
        "name": deployment.name,
        "phase": deployment.phase,
        "ready": deployment.ready,
        "stable": deployment.stable_version,
        "candidate": deployment.candidate_version,
        "weight": finite(deployment.candidate_weight),
        "step": deployment.step + 1 if deployment.candidate_version else 0,
        "steps": deployment.steps,
        "strategy": deployment.strategy,
        "waiting": deployment.waiting,
        "previous": deployment.previous_version,
        "arms": [
            {
                "version": arm.version,
                "role": word(ArmRole.Name, arm.role, "ARM_ROLE_"),
                "weight": finite(arm.weight),
                "copies": finite(arm.mirror_percent),
                "servers": len(arm.endpoints),
            }
            for arm in deployment.arms
        ],
        "gates": [
            {
                "gate": gate.gate,
                "verdict": word(Verdict.Name, gate.verdict, "VERDICT_"),
                "evidence": gate.evidence,
            }
            for gate in deployment.gates
        ],
        "comparisons": [
            {
                "metric": c.metric,
                "segment": c.segment,
                "candidate": finite(c.candidate),
                "stable": finite(c.stable),
                "lower": finite(c.lower),
                "upper": finite(c.upper),
                "better": c.better,
                "evidence": c.evidence,
            }
            for c in deployment.comparisons
        ],
        "conditions": [
            {"type": c.type, "status": c.status, "reason": c.reason, "message": c.message}
            for c in deployment.conditions
        ],
        "events": [
            {"at": e.at, "type": e.type, "reason": e.reason, "message": e.message} for e in reversed(deployment.events)
        ],
    }


def _version(answers: Answers, index: int) -> dict[str, Any]:
    version = (answers.versions or [])[index]
    weight = 0.0
    for deployment in answers.deployments.deployments if answers.deployments else ():
        if deployment.model == version.model:
            weight += sum(arm.weight for arm in deployment.arms if arm.version == version.version)
    return {
        "model": version.model,
        "version": version.version,
        "stage": word(Stage.Name, version.stage, "STAGE_").capitalize(),
        "weight": finite(weight),
        "digest": version.digest,
        "metrics": {name: finite(value) for name, value in sorted(version.metrics.items())},
        "run": version.lineage.run_id,
        "rollouts": [
            {
                "deployment": one.deployment,
                "decision": one.decision,
                "against": one.against,
                "ended": one.ended_at.ToJsonString(),
                "evidence": one.evidence_sha256,
            }
            for one in version.rollouts[-MAX_ROLLOUTS:]
        ],
    }


def _figures(answers: Answers, figures: VersionFigures) -> dict[str, Any]:
    joined = next((o for o in answers.outcomes if o.model == figures.model and o.version == figures.version), None)
    return {
        "model": figures.model,
        "version": figures.version,
        "requests": figures.requests,
        "errors": figures.errors,
        "p99_ms": latency_quantile(figures, QUANTILE),
        "outcomes": joined.outcomes if joined else 0,
        "accuracy": joined.correct / joined.outcomes if joined and joined.outcomes else None,
    }


def latency_quantile(figures: VersionFigures, q: float) -> float | None:
    """Upper bound of the bucket that holds the quantile, in milliseconds; None without requests."""
    total = sum(bucket.count for bucket in figures.latency)
    seen = 0
    for bucket in figures.latency:
        seen += bucket.count
        if total and seen >= q * total:
            return finite(bucket.le_ms)
    return None


def _findings(answers: Answers) -> list[dict[str, Any]]:
    return [
        {
            "model": f.model,
            "version": f.version,
            "kind": word(DriftKind.Name, f.kind, "DRIFT_KIND_"),
            "feature": f.feature,
            "test": f.test,
            "effect": finite(f.effect_size),
            "threshold": finite(f.effect_threshold),
            "p": finite(f.p_value),
            "window": [instant(f.window.start), instant(f.window.end)],
            "summary": f.summary,
        }
        for f in (answers.findings.findings if answers.findings else ())
    ]


def consistency(answer: GetConsistencyResponse) -> list[dict[str, Any]]:
    """Features whose served values were compared with the lake's, over all windows, those that differ most first; with an example."""
    sums: dict[tuple[str, str], list[int]] = {}
    for window in answer.windows:
        entry = sums.setdefault((window.feature_service, window.feature), [0, 0, 0, 0])
        for i, count in enumerate((window.compared, window.mismatched, window.missing, window.extra)):
            entry[i] += count
    examples = {(f.feature_service, f.feature): f for f in reversed(answer.findings)}
    rows: list[dict[str, Any]] = []
    for (service, feature), (compared, mismatched, missing, extra) in sums.items():
        example = examples.get((service, feature))
        rows.append(
            {
                "service": service,
                "feature": feature,
                "compared": compared,
                "mismatched": mismatched,
                "missing": missing,
                "extra": extra,
                "share": (mismatched + missing + extra) / compared if compared else 0.0,
                "served": finite(example.served) if example else None,
                "expected": finite(example.expected) if example else None,
            }
        )
    return sorted(rows, key=lambda row: (-row["share"], row["service"], row["feature"]))[:MAX_FEATURES]


def _runs(answers: Answers) -> list[dict[str, Any]]:
    return [
        {
            "id": run.id,
            "pipeline": run.pipeline,
            "state": word(RunState.Name, run.state, "RUN_STATE_"),
            "cause": run.cause,
            "version": run.model_version,
            "created": instant(run.created_at),
            "stages": [
                {
                    "name": s.name,
                    "state": word(StageState.Name, s.state, "STAGE_STATE_"),
                    "attempts": s.attempts,
                }
                for s in run.stages
            ],
        }
        for run in (answers.runs.runs if answers.runs else ())
    ]
