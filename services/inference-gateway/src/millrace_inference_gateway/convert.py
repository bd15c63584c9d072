"""Values to messages."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2

from millrace_inference_gateway.figures import VersionCounts
from millrace_inference_gateway.prediction_log import LogCounts


def prediction_of(
    prediction: events_pb2.Prediction, missing: Sequence[str], max_feature_age_ms: int
) -> prediction_pb2.PredictResponse:
    """The answer that belongs to a logged prediction."""
    return prediction_pb2.PredictResponse(
        prediction_id=prediction.prediction_id,
        model=prediction.model,
        version=prediction.version,
        digest=prediction.digest,
        outputs=prediction.outputs,
        missing_features=missing,
        max_feature_age_ms=max_feature_age_ms,
    )


def figures_response(
    instance: str,
    started_at: datetime,
    versions: Iterable[tuple[str, str, VersionCounts]],
    counts: LogCounts,
    generation: int,
) -> prediction_pb2.GetFiguresResponse:
    """Everything the gateway counts."""
    response = prediction_pb2.GetFiguresResponse(
        instance_id=instance, logged=counts.logged, dropped=counts.dropped, routes_generation=generation
    )
    response.started_at.FromDatetime(started_at)
    for model, version, found in versions:
        message = response.versions.add(model=model, version=version, requests=found.requests, errors=found.errors)
        for bound, count in found.latency():
            message.latency.add(le_ms=bound, count=count)
    return response
