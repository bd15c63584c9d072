"""Values to messages."""

from collections.abc import Iterable
from datetime import datetime

from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.errors import MillraceError

from millrace_inference_gateway.activity import Activity
from millrace_inference_gateway.figures import VersionCounts
from millrace_inference_gateway.prediction_log import LogCounts
from millrace_inference_gateway.shadow_figures import ShadowCounts, ShadowFigures


def figures_response(
    instance: str,
    started_at: datetime,
    versions: Iterable[tuple[str, str, VersionCounts]],
    counts: LogCounts,
    generation: int,
    *,
    shadows: ShadowFigures,
    activity: Iterable[Activity] = (),
) -> prediction_pb2.GetFiguresResponse:
    """Everything the gateway counts."""
    response = prediction_pb2.GetFiguresResponse(
        instance_id=instance, logged=counts.logged, dropped=counts.dropped, routes_generation=generation
    )
    response.shadow_unpaired = shadows.unpaired
    response.started_at.FromDatetime(started_at)
    for model, version, found in versions:
        message = response.versions.add(model=model, version=version, requests=found.requests, errors=found.errors)
        for bound, count in found.latency():
            message.latency.add(le_ms=bound, count=count)
        for segment, shadow in shadows.of(model, version).items():
            message.shadow.append(_shadow(segment, shadow))
    for one in activity:
        response.activity.add(
            model=one.model, version=one.version, started=one.started, running=one.running, held=one.held
        )
    return response


def _shadow(segment: str, counts: ShadowCounts) -> prediction_pb2.ShadowFigures:
    message = prediction_pb2.ShadowFigures(
        segment=segment,
        pairs=counts.pairs,
        label_flips=counts.flips,
        shift_sum=counts.shift_sum,
        shift_square_sum=counts.shift_square_sum,
    )
    for tensor, buckets in counts.differences.items():
        found = message.differences.add(tensor=tensor)
        for edge, count in sorted(buckets.items()):
            found.buckets.add(le=edge, count=count)
    return message


def failure_of(error: MillraceError, *, row: int | None = None) -> prediction_pb2.PredictResult:
    """Why one of several predictions has no answer; `row` is its place in a batch."""
    metadata = error.metadata if row is None else error.metadata | {"row": str(row)}
    return prediction_pb2.PredictResult(
        failure=prediction_pb2.PredictFailure(
            code=error.code.value[0], reason=error.reason, message=error.message, metadata=metadata
        )
    )
