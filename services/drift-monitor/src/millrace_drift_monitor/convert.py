"""Messages to values and values to messages."""

import itertools
import math
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_drift_monitor import tracking
from millrace_drift_monitor.records import (
    MICROS,
    Columns,
    Outcome,
    OutcomeBatch,
    OutcomeSpec,
    Prediction,
    PredictionBatch,
)
from millrace_drift_monitor.tracking import MAX_SEGMENT_CHARACTERS, Tracked, ValueSums
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
    for text in (p.prediction_id, p.version, p.subject, p.digest, p.definitions_hash, p.trace_id, p.client):
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
        p.client,
        p.pinned,
        p.cached,
    )


def decode_outcomes(
    topic: str, value: bytes, specs: Sequence[OutcomeSpec], columns: Mapping[str, Collection[str]]
) -> tuple[list[OutcomeBatch], int]:
    """The outcomes of one records message, once per distinct source among `specs`; rows without subject or label are left out.

    Args:
        topic: of the message.
        value: the message.
        specs: whose outcomes it has.
        columns: by source, further columns that are wanted; what is not there, or neither number, bool nor text, is left out.

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
            subjects, outcomes = _outcomes(table, spec, columns.get(spec.source, ()))
        except (pa.ArrowException, KeyError, ValueError):
            malformed += 1
            continue
        batches.append(
            OutcomeBatch(topic, _origin(message.source), message.source_offset, spec.source, subjects, outcomes)
        )
    return batches, malformed


def _outcomes(table: Any, spec: OutcomeSpec, wanted: Collection[str]) -> tuple[list[str], list[Outcome]]:
    texts = pc.cast(table.column(spec.subject_column), pa.string())
    usable = pc.and_(pc.is_valid(texts), pc.invert(pc.match_substring(texts, "\0")))
    usable = pc.and_(usable, pc.is_valid(table.column(spec.label_column)))
    subjects = texts.filter(usable).to_pylist()
    label = table.column(spec.label_column).filter(usable)
    rows: Iterable[Columns] = _columns(table.filter(usable), wanted) or itertools.repeat({})
    if spec.numeric:
        numbers = pc.cast(label, pa.float64()).to_pylist()
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{spec.label_column} is not always a finite number")
        found = zip(numbers, rows, strict=False)
        return subjects, [Outcome(number >= spec.threshold, number, columns) for number, columns in found]
    if not pa.types.is_boolean(label.type):
        label = pc.cast(label, pa.float64())
        label = pc.if_else(pc.is_in(label, value_set=pa.array([0.0, 1.0])), label, None)
        if label.null_count:
            raise ValueError(f"{spec.label_column} is neither bool nor 0 or 1")
        label = pc.equal(label, 1.0)
    found = zip(label.to_pylist(), rows, strict=False)
    return subjects, [Outcome(truth, float(truth), columns) for truth, columns in found]


def _columns(table: Any, wanted: Collection[str]) -> list[dict[str, float | str]]:
    """The wanted columns row by row; empty where the table has none of them."""
    read: dict[str, list[float | str | None]] = {}
    for name in sorted(wanted):
        if name not in table.column_names:
            continue
        column = table.column(name)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            texts = column.to_pylist()
            read[name] = [None if text is None else text.replace("\0", "")[:MAX_SEGMENT_CHARACTERS] for text in texts]
        elif pa.types.is_boolean(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            numbers = pc.cast(column, pa.float64(), safe=False).to_pylist()
            read[name] = [number if number is not None and math.isfinite(number) else None for number in numbers]
    rows: list[dict[str, float | str]] = [{} for _ in range(len(table))] if read else []
    for name, values in read.items():
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                row[name] = value
    return rows


def tracked_in(message: drift_pb2.TrackedValue, where: str) -> Tracked:
    """A value to track.

    Raises:
        InvalidArgumentError: names the field that is wrong.
    """
    metric, segment = message.metric, message.segment
    if metric.startswith(tracking.BUSINESS):
        check.text(metric.removeprefix(tracking.BUSINESS), f"{where}.metric", limit=MAX_ID)
    elif metric not in tracking.METRICS:
        known = f"{tracking.BUSINESS}<column>, {', '.join(tracking.METRICS)}"
        raise InvalidArgumentError(f"{where}.metric", f"needs one of {known}")
    for prefix in (tracking.FEATURE, tracking.COLUMN):
        if segment.startswith(prefix):
            check.text(segment.removeprefix(prefix), f"{where}.segment", limit=MAX_ID)
            break
    else:
        if segment not in {"", tracking.CLIENT}:
            raise InvalidArgumentError(f"{where}.segment", "needs feature/<name>, outcome/<column> or client")
    if message.HasField("lower") != message.HasField("upper"):
        raise InvalidArgumentError(f"{where}.upper", "and lower are set both or not at all")
    if not message.HasField("lower"):
        return Tracked(metric, None, None, segment)
    lower, upper = check.finite(message.lower, f"{where}.lower"), check.finite(message.upper, f"{where}.upper")
    if lower >= upper:
        raise InvalidArgumentError(f"{where}.upper", "must be more than lower")
    return Tracked(metric, lower, upper, segment)


def tracked_message(value: Tracked, sums: Sequence[tuple[str, str, ValueSums]]) -> drift_pb2.TrackedFigures:
    """A tracked value with its sums by version and segment."""
    message = drift_pb2.TrackedValue(metric=value.metric, lower=value.lower, upper=value.upper, segment=value.segment)
    figures = [
        drift_pb2.ValueFigures(
            version=version,
            segment=segment,
            count=found.n,
            sum=found.total,
            square_sum=found.square,
            clipped=found.clipped,
        )
        for version, segment, found in sums
    ]
    return drift_pb2.TrackedFigures(value=message, figures=figures)


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


def prediction_message(
    row: Any, feature_names: Sequence[str], digest: str, numbers: Mapping[str, float]
) -> drift_pb2.GetPredictionResponse:
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
        client=row.client,
        pinned=row.pinned,
        cached=row.cached,
        outcome_values=numbers,
    )
