"""Between the domain's values and protobuf messages."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import Artifact, TableVersion
from millrace_api.drift.v1 import drift_pb2
from millrace_api.events.v1.events_pb2 import RunChanged
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit import check
from millrace_kit.bus import TRAINING, Outgoing
from millrace_kit.errors import InvalidArgumentError

from millrace_training_coordinator.coordinator import Reproduction
from millrace_training_coordinator.record import Comparison
from millrace_training_coordinator.retrain import Finding
from millrace_training_coordinator.runs import RunRecord, RunRequest
from millrace_training_coordinator.watch import Line

MAX_ID = 128
MAX_PARAMETER = 4096
MAX_PARAMETERS = 128


def plain_text(value: str, field: str, *, limit: int) -> str:
    """A text without control characters, 1 to `limit` characters."""
    check.text(value, field, limit=limit)
    if not value.isprintable():
        raise InvalidArgumentError(field, "must not hold control characters")
    return value


def run_request(request: pb.StartRunRequest) -> RunRequest:
    """Check a StartRun request.

    Raises:
        InvalidArgumentError: naming the field.
    """
    check.name(request.pipeline, "pipeline")
    if len(request.parameters) > MAX_PARAMETERS:
        raise InvalidArgumentError("parameters", f"are more than {MAX_PARAMETERS}")
    for name, value in sorted(request.parameters.items()):
        plain_text(name, "parameters", limit=MAX_ID)
        if len(value) > MAX_PARAMETER or "\0" in value:
            problem = f"needs at most {MAX_PARAMETER} characters, none of them NUL"
            raise InvalidArgumentError(f"parameters[{name!r}]", problem)
    if request.request_id:
        plain_text(request.request_id, "request_id", limit=MAX_ID)
    if request.cause:
        plain_text(request.cause, "cause", limit=check.MAX_TEXT)
    seed = request.seed if request.HasField("seed") else None
    return RunRequest(request.pipeline, dict(request.parameters), seed, request.request_id, request.cause)


def to_timestamp(value: datetime | None) -> Timestamp | None:
    """A datetime as a message; None stays unset."""
    if value is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def to_run(run: RunRecord) -> pb.Run:
    """A run with its stages and its record."""
    record = run.record
    return pb.Run(
        id=run.id,
        pipeline=run.new.pipeline,
        pipeline_hash=run.new.pipeline_hash,
        state=pb.RunState.Value(f"RUN_STATE_{run.state.value}"),
        stages=[_to_stage(run, stage.name, stage.depends_on) for stage in run.new.plan],
        parameters=run.new.parameters,
        seed=run.new.seed,
        cause=run.new.cause,
        created_at=to_timestamp(run.new.created_at),
        finished_at=to_timestamp(run.status.finished_at),
        record=pb.ReproducibilityRecord(
            training_set_digest=record.training_set_digest,
            definitions_hash=record.definitions_hash,
            table_versions=[TableVersion(table=t, version=v) for t, v in record.table_versions.items()],
            code_hash=run.new.code_hash,
            lock_hash=run.new.lock_hash,
            seed=run.new.seed,
            parameters=run.new.parameters,
            outputs=[Artifact(path=o.path, sha256=o.sha256, size_bytes=o.size_bytes) for o in record.outputs],
            hardware=run.new.hardware,
        ),
        model=record.model,
        model_version=record.model_version,
    )


def _to_stage(run: RunRecord, name: str, depends_on: tuple[str, ...]) -> pb.StageRun:
    status = run.status.stages[name]
    result = run.results.get(name)
    return pb.StageRun(
        name=name,
        state=pb.StageState.Value(f"STAGE_STATE_{status.state.value}"),
        attempts=status.attempts,
        failure=status.failure,
        depends_on=depends_on,
        started_at=to_timestamp(status.started_at),
        finished_at=to_timestamp(status.finished_at),
        result_json=result.text if result else "",
    )


def to_watch_event(event: RunRecord | Line) -> pb.WatchRunResponse:
    """One message of a WatchRun stream."""
    if isinstance(event, Line):
        return pb.WatchRunResponse(log=pb.LogLine(stage=event.stage, attempt=event.attempt, text=event.text))
    return pb.WatchRunResponse(run=to_run(event))


def to_reproduction(reproduction: Reproduction) -> pb.ReproduceResponse:
    """The answer of Reproduce."""
    return pb.ReproduceResponse(
        reproduction_run_id=reproduction.run_id,
        bit_equal=reproduction.bit_equal,
        outputs=[_to_comparison(comparison) for comparison in reproduction.comparisons],
        environment_differences=dict(reproduction.environment_differences),
    )


def _to_comparison(comparison: Comparison) -> pb.OutputComparison:
    return pb.OutputComparison(
        path=comparison.path,
        sha256_original=comparison.original,
        sha256_reproduction=comparison.reproduction,
        equal=comparison.equal,
    )


def run_changed(run: RunRecord) -> Outgoing:
    """The message that tells of a run's change; keyed by pipeline, so that its changes stay in order."""
    event_id = f"{run.id}:{run.revision}".encode()
    value = RunChanged(run=to_run(run)).SerializeToString()
    return Outgoing(TRAINING, run.new.pipeline, value, {"event-id": event_id})


def to_finding(finding: drift_pb2.Finding, model: str) -> Finding:
    """A drift finding as far as retraining cares; a window outside years 1 to 9999 counts as none."""
    try:
        start = check.timestamp(finding.window.start, "start") if finding.window.HasField("start") else None
        end = check.timestamp(finding.window.end, "end") if finding.window.HasField("end") else None
    except InvalidArgumentError:
        start = end = None
    kinds = {number: name.removeprefix("DRIFT_KIND_") for name, number in drift_pb2.DriftKind.items()}
    return Finding(
        "".join(c for c in finding.id if c.isprintable())[:MAX_ID],
        finding.model or model,
        kinds.get(finding.kind, "UNSPECIFIED"),
        "".join(c for c in finding.summary if c.isprintable())[:1000],
        start,
        end,
    )
