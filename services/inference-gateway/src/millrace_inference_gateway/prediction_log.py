"""The prediction log: every answered prediction into the journal, what could not be written counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace_api.events.v1 import events_pb2
from prometheus_client import Counter

from millrace_inference_gateway.access_log import InferenceCall
from millrace_inference_gateway.journal import Journal, JournalFullError, LogPosition
from millrace_inference_gateway.payload import PayloadRow, payload_rows

ENTRIES = Counter(
    "millrace_gateway_prediction_log_entries_total", "Predictions of the log, by what became of them.", ["outcome"]
)


@dataclass(slots=True)
class LogCounts:
    """Since this process's start."""

    logged: int = 0
    """Handed to the bus."""
    dropped: int = 0
    """Answered, and known to be missing."""


class PredictionLog:
    """Writes predictions; never waits, never fails the call."""

    def __init__(self, journal: Journal, max_rows: int) -> None:
        self._journal = journal
        self._max_rows = max_rows
        self.counts = LogCounts()

    def write(self, prediction: events_pb2.Prediction) -> None:
        """Log one answered Predict; call it before the answer goes out."""
        self._append([prediction.SerializeToString()], None)

    def write_calls(self, calls: Sequence[InferenceCall], position: LogPosition) -> None:
        """Log answered V2 calls; `position` is where the access log goes on after them."""
        payloads = [
            prediction.SerializeToString() for call in calls for prediction in call_predictions(call, self._max_rows)
        ]
        self._append(payloads, position)

    def missed(self, calls: int) -> None:
        """Count calls whose entry was lost."""
        self.counts.dropped += calls
        ENTRIES.labels("dropped").inc(calls)

    def published(self, entries: int) -> None:
        """Count entries the bus has acknowledged."""
        self.counts.logged += entries
        ENTRIES.labels("logged").inc(entries)

    def _append(self, payloads: list[bytes], position: LogPosition | None) -> None:
        try:
            self._journal.append(payloads, position)
        except JournalFullError:
            self.missed(len(payloads))


def call_predictions(call: InferenceCall, max_rows: int) -> list[events_pb2.Prediction]:
    """The predictions of one V2 call: one a row when its payload was sampled, else one without values.

    A batch's rows have the ids `<id>`, `<id>.1`, `<id>.2`, …; its subjects are the comma-separated ones of `x-millrace-subject`
    when there is one for each row.
    """
    rows = payload_rows(call.request, call.response, max_rows, call.http) if call.request else [PayloadRow()]
    subjects = call.subject.split(",")
    if len(subjects) != len(rows):
        subjects = [call.subject] if len(rows) == 1 else [""] * len(rows)
    found = []
    for index, (row, subject) in enumerate(zip(rows, subjects, strict=True)):
        prediction = events_pb2.Prediction(
            prediction_id=f"{call.prediction_id}.{index}" if index else call.prediction_id,
            model=call.model,
            version=call.version,
            digest=call.digest,
            subject=subject.strip(),
            features=row.features,
            outputs=row.outputs,
            latency_ms=call.latency_ms,
            trace_id=call.trace_id,
            path="v2",
            client=call.client,
            pinned=call.pinned,
        )
        prediction.predicted_at.seconds, prediction.predicted_at.nanos = divmod(call.finished_ns, 1_000_000_000)
        prediction.event_time.seconds, prediction.event_time.nanos = divmod(call.event_time_ns, 1_000_000_000)
        found.append(prediction)
    return found
