"""From one prediction id back to the rows and definitions that made the model: `millrace trace`."""

from dataclasses import dataclass, field

from millrace_api.drift.v1.drift_pb2 import GetPredictionResponse
from millrace_api.feature.v1.feature_pb2 import TrainingSet
from millrace_api.registry.v1.registry_pb2 import ModelVersion
from millrace_api.training.v1.training_pb2 import Run
from millrace_kit.errors import DataLossError, MillraceError

from millrace.client import Client

SIDE_BY_SIDE = frozenset({"table", "definitions"})


@dataclass
class Link:
    """One step back: what it is, its identity, and figures about it."""

    kind: str
    identity: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class Trace:
    """The chain from a prediction to its origins, in order."""

    prediction: GetPredictionResponse
    version: ModelVersion
    run: Run | None
    training_set: TrainingSet | None
    links: list[Link]
    gaps: list[str]
    """Steps that could not be taken, with the reason; empty when the chain is whole."""

    def depths(self) -> list[int]:
        """How far each link is from the prediction; tables and definitions stand side by side below the training set."""
        last = sum(link.kind not in SIDE_BY_SIDE for link in self.links)
        return [last if link.kind in SIDE_BY_SIDE else depth for depth, link in enumerate(self.links)]


def trace_prediction(client: Client, prediction_id: str) -> Trace:
    """Walk back from `prediction_id`: version, digest, run, training set, table versions, definitions.

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
    return Trace(prediction, version, run, training_set, _links(prediction, version, run, training_set), gaps)


def _links(
    prediction: GetPredictionResponse, version: ModelVersion, run: Run | None, training_set: TrainingSet | None
) -> list[Link]:
    lineage = version.lineage
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
    links = [made, Link("model version", f"{version.model} {version.version}", {"digest": version.digest})]
    for artifact in version.artifacts:
        links[-1].facts[artifact.path] = f"sha256 {artifact.sha256} ({artifact.size_bytes} bytes)"
    if lineage.parent_version:
        links[-1].facts["derived from"] = lineage.parent_version
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
