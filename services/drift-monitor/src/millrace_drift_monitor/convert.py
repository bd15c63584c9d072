"""Messages to values and values to messages."""

import math
import re
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import TimeRange
from millrace_api.drift.v1 import drift_pb2
from millrace_api.events.v1 import events_pb2

from millrace_drift_monitor.records import MICROS, OutcomeBatch, OutcomeSpec, Prediction, PredictionBatch
from millrace_drift_monitor.verdicts import Kind

KINDS = {
    Kind.COVARIATE: drift_pb2.DRIFT_KIND_COVARIATE,
    Kind.PREDICTION: drift_pb2.DRIFT_KIND_PREDICTION,
    Kind.LABEL: drift_pb2.DRIFT_KIND_LABEL,
    Kind.PERFORMANCE: drift_pb2.DRIFT_KIND_PERFORMANCE,
    Kind.QUALITY: drift_pb2.DRIFT_KIND_QUALITY,
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN_SECONDS = -62_135_596_800  # 0001-01-01
_MAX_SECONDS = 253_402_300_800  # 10000-01-01
MAX_ID = 256
_MODEL = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")


class MalformedError(Exception):
    """A message of the bus that cannot be used; it is counted and left out."""


def micros(value: Timestamp) -> int:
    """Microseconds since 1970.

    Raises:
        MalformedError: outside years 1 to 9999.
    """
    if not _MIN_SECONDS <= value.seconds < _MAX_SECONDS:
        raise MalformedError("a timestamp outside years 1 to 9999")
    return value.seconds * MICROS + value.nanos // 1000


def from_micros(value_us: int) -> Timestamp:
    """A `Timestamp` from microseconds since 1970."""
    return Timestamp(seconds=value_us // MICROS, nanos=value_us % MICROS * 1000)


def now_micros(now: datetime) -> int:
    """Microseconds since 1970 of an aware datetime, exactly."""
    return (now - _EPOCH) // timedelta(microseconds=1)


def time_range(start_us: int, end_us: int) -> TimeRange:
    """A half-open range."""
    return TimeRange(start=from_micros(start_us), end=from_micros(end_us))


def decode_predictions(topic: str, value: bytes, now_us: int, max_ahead_us: int) -> tuple[PredictionBatch, int]:
    """The predictions of one message, and how many of them were malformed and left out.

    Raises:
        MalformedError: the message is no `PredictionsMade`.
    """
    message = events_pb2.PredictionsMade()
    try:
        message.ParseFromString(value)
    except DecodeError as error:
        raise MalformedError(f"no PredictionsMade: {error}") from error
    predictions, malformed = [], 0
    for prediction in message.predictions:
        if prediction.pinned:
            # Its caller chose the version, a tester for example: no evidence for or against it.
            continue
        try:
            predictions.append(_prediction(prediction, now_us, max_ahead_us))
        except MalformedError:
            malformed += 1
    return PredictionBatch(topic, _origin(message.gateway_id), message.journal_offset, predictions), malformed


def _origin(name: str) -> str:
    return name.replace("\0", "\\0")


def _prediction(p: events_pb2.Prediction, now_us: int, max_ahead_us: int) -> Prediction:
    if not p.prediction_id or not p.version or not _MODEL.fullmatch(p.model):
        raise MalformedError("no prediction id, model or version")
    for text in (p.prediction_id, p.version, p.subject, p.digest, p.definitions_hash, p.trace_id):
        if len(text) > MAX_ID or "\0" in text:  # PostgreSQL keeps no NUL in a text
            raise MalformedError("an identifier that is too long or holds NUL")
    predicted_us = micros(p.predicted_at) if p.HasField("predicted_at") else now_us
    event_us = micros(p.event_time) if p.HasField("event_time") else predicted_us
    if max(event_us, predicted_us) > now_us + max_ahead_us:
        raise MalformedError("a prediction from the future")
    outputs = array("d", p.outputs)
    score = outputs[0] if outputs and math.isfinite(outputs[0]) else None
    return Prediction(
        p.prediction_id,
        p.model,
        p.version,
        p.digest,
        p.subject,
        event_us,
        predicted_us,
        np.array(p.features, dtype="<f8").tobytes(),
        np.array(outputs, dtype="<f8").tobytes(),
        score,
        p.definitions_hash,
        p.trace_id,
    )


def decode_outcomes(topic: str, value: bytes, specs: Sequence[OutcomeSpec]) -> tuple[list[OutcomeBatch], int]:
    """The labels of one records message, once per distinct source among `specs`; rows without subject or label are left out.

    Returns:
        The batches, and how many sources found their column missing or of a type that is no label.

    Raises:
        MalformedError: no `RecordsLanded` with an Arrow stream.
    """
    message = events_pb2.RecordsLanded()
    try:
        message.ParseFromString(value)
        with pa.ipc.open_stream(message.arrow_ipc) as reader:
            table = reader.read_all()
    except (DecodeError, pa.ArrowException, OSError, ValueError) as error:
        raise MalformedError(f"no RecordsLanded with an Arrow stream: {error}") from error
    batches, malformed = [], 0
    for spec in {spec.source: spec for spec in specs}.values():
        try:
            subjects, labels = _labels(table, spec)
        except (pa.ArrowException, KeyError, ValueError):
            malformed += 1
            continue
        batches.append(
            OutcomeBatch(topic, _origin(message.source), message.source_offset, spec.source, subjects, labels)
        )
    return batches, malformed


def _labels(table: Any, spec: OutcomeSpec) -> tuple[list[str], list[bool]]:
    columns = table.select([spec.subject_column, spec.label_column])
    texts = pc.cast(columns.column(0), pa.string())
    columns = columns.set_column(0, spec.subject_column, texts)
    usable = pc.and_(pc.is_valid(texts), pc.invert(pc.match_substring(texts, "\0")))
    columns = columns.filter(pc.and_(usable, pc.is_valid(columns.column(1))))
    subjects = columns.column(0).to_pylist()
    label = columns.column(1)
    if not pa.types.is_boolean(label.type):
        label = pc.cast(label, pa.float64())
        label = pc.if_else(pc.is_in(label, value_set=pa.array([0.0, 1.0])), label, None)
        if label.null_count:
            raise ValueError(f"{spec.label_column} is neither bool nor 0 or 1")
        label = pc.equal(label, 1.0)
    return subjects, label.to_pylist()


def finding_message(row: Any) -> drift_pb2.Finding:
    """A row of the finding table as its message."""
    return drift_pb2.Finding(
        id=row.id,
        model=row.model,
        version=row.version,
        kind=KINDS[Kind(row.kind)],
        feature=row.feature,
        test=row.test,
        statistic=row.statistic,
        p_value=row.p_value,
        effect_size=row.effect,
        effect_threshold=row.threshold,
        reference_count=row.reference_count,
        window_count=row.window_count,
        window=time_range(row.start_us, row.end_us),
        found_at=from_micros(row.found_us),
        summary=row.summary,
    )


def window_message(window: Any, findings: Sequence[Any]) -> drift_pb2.WindowReport:
    """A closed window's row and its findings' rows as a report; accuracy is 0 when no outcome is known."""
    return drift_pb2.WindowReport(
        model=window.model,
        version=window.version,
        window=time_range(window.start_us, window.end_us),
        predictions=window.predictions,
        outcomes=window.outcomes,
        accuracy=window.correct / window.outcomes if window.outcomes else 0.0,
        tests=window.tests,
        findings=[finding_message(row) for row in findings],
    )


def prediction_message(row: Any, feature_names: Sequence[str], digest: str) -> drift_pb2.GetPredictionResponse:
    """A row of the prediction table as an answer; `digest` fills in when the gateway sent none."""
    return drift_pb2.GetPredictionResponse(
        prediction_id=row.prediction_id,
        model=row.model,
        version=row.version,
        digest=row.digest or digest,
        subject=row.subject,
        event_time=from_micros(row.event_us),
        predicted_at=from_micros(row.predicted_us),
        features=np.frombuffer(row.features, dtype="<f8").tolist(),
        feature_names=feature_names,
        outputs=np.frombuffer(row.outputs, dtype="<f8").tolist(),
        definitions_hash=row.definitions_hash,
        trace_id=row.trace_id,
        outcome=row.outcome,
    )
