"""From a prediction id or a model version back to the rows and definitions that made the model, and to the decisions that gave it traffic:
`millrace trace`, `millrace lineage`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from millrace_api.drift.v1.drift_pb2 import GetPredictionResponse
from millrace_api.feature.v1.feature_pb2 import TrainingSet
from millrace_api.registry.v1.registry_pb2 import ModelVersion, RolloutRecord
from millrace_api.training.v1.training_pb2 import Run
from millrace_kit.errors import DataLossError, MillraceError

from millrace.client import Client

SIDE_BY_SIDE = frozenset({"table", "definitions"})
ROLLOUT = "rollout"
EVIDENCE_FORMAT = "millrace.rollout-evidence/1"
MAX_ROLLOUTS = 10
"""Newest rollouts of a version whose decisions are fetched."""


@dataclass
class Link:
    """One step back: what it is, its identity, and figures about it."""

    kind: str
    identity: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class Trace:
    """The chain from a prediction, or a version, to its origins, in order."""

    prediction: GetPredictionResponse | None
    version: ModelVersion
    run: Run | None
    training_set: TrainingSet | None
    links: list[Link]
    gaps: list[str]
    """Steps that could not be taken, with the reason; empty when the chain is whole."""

    def depths(self) -> list[int]:
        """How far each link is from the start; tables and definitions stand side by side below the training set, rollouts below the version."""
        chain = [link.kind for link in self.links if link.kind not in SIDE_BY_SIDE and link.kind != ROLLOUT]
        depths = {kind: depth for depth, kind in enumerate(chain)}
        depths |= {ROLLOUT: depths["model version"] + 1} | dict.fromkeys(SIDE_BY_SIDE, len(chain))
        return [depths[link.kind] for link in self.links]


def trace_prediction(client: Client, prediction_id: str) -> Trace:
    """Walk back from `prediction_id`: version, digest, rollouts, run, training set, table versions, definitions.

    Raises:
        MillraceError: NOT_FOUND for an unknown id; DATA_LOSS when the version's digest is not the one that answered.
    """
    prediction = client.drift.prediction(prediction_id)
    version = client.registry.version(prediction.model, prediction.version)
    if prediction.digest and prediction.digest != version.digest:
        message = (
            f"{prediction.model} {prediction.version} has digest {version.digest}, but {prediction.digest} answered"
        )
        raise DataLossError("DIGEST_MISMATCH", message, {"prediction_id": prediction_id})
    return _trace(client, prediction, version)


def trace_version(client: Client, model: str, version: str = "") -> Trace:
    """Walk back from a version; empty takes the one in Production.

    Raises:
        MillraceError: NOT_FOUND for an unknown model or version.
    """
    return _trace(client, None, client.registry.version(model, version))


def _trace(client: Client, prediction: GetPredictionResponse | None, version: ModelVersion) -> Trace:
    lineage = version.lineage
    gaps: list[str] = []
    run: Run | None = None
    training_set: TrainingSet | None = None
    try:
        run = client.training.run(lineage.run_id) if lineage.run_id else None
    except MillraceError as error:
        gaps.append(f"run {lineage.run_id}: {error}")
    try:
        if lineage.training_set_digest:
            training_set = client.features.training_set(lineage.training_set_digest)
    except MillraceError as error:
        gaps.append(f"training set {lineage.training_set_digest}: {error}")
    links = [] if prediction is None else [_prediction_link(prediction)]
    links.append(_version_link(version))
    links += [_rollout_link(client, record, gaps) for record in version.rollouts[-MAX_ROLLOUTS:]]
    links += _origins(version, run, training_set)
    return Trace(prediction, version, run, training_set, links, gaps)


def _rollout_link(client: Client, record: RolloutRecord, gaps: list[str]) -> Link:
    """One rollout with every decision, from its evidence bundle."""
    link = Link(ROLLOUT, f"{record.deployment}: {record.decision}", {"ended": record.ended_at.ToJsonString()})
    link.facts |= {"against": record.against, "evidence": f"sha256 {record.evidence_sha256}"}
    try:
        said = json.loads(client.registry.read_artifact(record.evidence_sha256))
        link.facts |= _decisions(said["decisions"] if said.get("format") == EVIDENCE_FORMAT else [])
    except (MillraceError, ValueError) as error:
        gaps.append(f"evidence {record.evidence_sha256}: {error}")
    return link


def _decisions(made: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Every decision in a line, with the verdicts behind it and what comparisons could tell."""
    lines: dict[str, str] = {}
    for number, one in enumerate(made, 1):
        said = [f"{gate['gate']}: {gate['verdict']}" for gate in one["gates"]]
        said += [_better(result) for result in one.get("comparisons", []) if result["better"] != "undecided"]
        verdicts = "; ".join(said)
        told = f"{one['at']} {one['decision']} at {one['weight']:g} %: {one['message']}"
        lines[f"decision {number}"] = f"{told} ({verdicts})" if verdicts else told
    return lines


def _better(result: dict[str, Any]) -> str:
    group = f" of {result['segment']!r}" if result.get("segment") else ""
    return f"{result['metric']}{group}: {result['better']} is better ({result['lower']:+.4g} to {result['upper']:+.4g})"


def _prediction_link(prediction: GetPredictionResponse) -> Link:
    made = Link(
        "prediction",
        prediction.prediction_id,
        {
            "at": prediction.predicted_at.ToJsonString(),
            "event time": prediction.event_time.ToJsonString(),
            "subject": prediction.subject,
            "output": ", ".join(f"{value:.4f}" for value in prediction.outputs),
        },
    )
    if prediction.HasField("outcome"):
        made.facts["outcome"] = str(prediction.outcome).lower()
    return made


def _version_link(version: ModelVersion) -> Link:
    link = Link("model version", f"{version.model} {version.version}", {"digest": version.digest})
    for artifact in version.artifacts:
        link.facts[artifact.path] = f"sha256 {artifact.sha256} ({artifact.size_bytes} bytes)"
    if version.lineage.parent_version:
        link.facts["derived from"] = version.lineage.parent_version
    return link


def _origins(version: ModelVersion, run: Run | None, training_set: TrainingSet | None) -> list[Link]:
    lineage, links = version.lineage, list[Link]()
    if lineage.run_id:
        link = Link("run", lineage.run_id, {"code": lineage.code_hash, "environment": lineage.lock_hash})
        link.facts["seed"] = str(lineage.seed)
        if run is not None:
            link.facts["cause"] = run.cause
            link.facts["finished"] = run.finished_at.ToJsonString()
        links.append(link)
    if lineage.training_set_digest:
        link = Link("training set", lineage.training_set_digest)
        if training_set is not None:
            start, end = training_set.time_range.start.ToJsonString(), training_set.time_range.end.ToJsonString()
            link.facts["rows"] = f"{training_set.rows} ({start} to {end})"
            link.facts["content"] = f"sha256 {training_set.data.sha256}"
        links.append(link)
    tables = training_set.table_versions if training_set is not None else lineage.table_versions
    links.extend(Link("table", f"{table.table} @ version {table.version}") for table in tables)
    if lineage.definitions_hash:
        links.append(Link("definitions", lineage.definitions_hash))
    return links
