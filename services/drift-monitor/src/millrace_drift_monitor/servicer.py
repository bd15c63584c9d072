"""The edge: check the request, call, convert the answer."""

import asyncio
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_kit import check
from millrace_kit.clock import Clock
from millrace_kit.content import ContentStore
from millrace_kit.errors import InvalidArgumentError, UnavailableError
from millrace_kit.outbox import Relay

from millrace_drift_monitor.answers import Answers
from millrace_drift_monitor.closing import Closer
from millrace_drift_monitor.convert import (
    MAX_ID,
    finding_message,
    now_micros,
    prediction_message,
    tracked_in,
    tracked_message,
    window_message,
)
from millrace_drift_monitor.monitor import count_closed
from millrace_drift_monitor.profiles import Profile
from millrace_drift_monitor.references import ReferenceSpec, build_profile
from millrace_drift_monitor.settings import DriftSettings
from millrace_drift_monitor.store import Store
from millrace_drift_monitor.tracking import MAX_TRACKED

MAX_FEATURES = 10_000
MAX_URL = 2048
# References made at once; each reads a training set.
MAX_REFERENCES_AT_ONCE = 2


class DriftServicer(drift_pb2_grpc.DriftServiceServicer):
    """DriftService over the store."""

    def __init__(
        self, store: Store, answers: Answers, closer: Closer, *, relay: Relay, settings: DriftSettings, clock: Clock
    ) -> None:
        self._store = store
        self._answers = answers
        self._closer = closer
        self._relay = relay
        self._settings = settings
        self._clock = clock
        self._references = asyncio.Semaphore(MAX_REFERENCES_AT_ONCE)

    async def SetReference(
        self, request: drift_pb2.SetReferenceRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.SetReferenceResponse:
        model, version = check.name(request.model, "model"), check.semver(request.version, "version")
        # In a thread: millions of predictions take a moment to look at.
        spec = await asyncio.to_thread(self._reference_spec, request)
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        known = await asyncio.to_thread(self._store.find_reference, model, version, digest)
        if known is None:
            async with self._references:
                profile = await asyncio.to_thread(_read_profile, request.store_url, request.data, spec)
            await asyncio.to_thread(
                self._store.keep_reference,
                model,
                version,
                profile,
                training_set_digest=request.training_set_digest,
                request_sha256=digest,
                now_us=now_micros(self._clock.now()),
            )
            known = profile.rows, len(profile.feature_names)
        return drift_pb2.SetReferenceResponse(rows=known[0], features=known[1])

    def _reference_spec(self, request: drift_pb2.SetReferenceRequest) -> ReferenceSpec:
        check.sha256(request.training_set_digest, "training_set_digest")
        check.sha256(request.data.sha256, "data.sha256")
        if request.data.size_bytes < 0:
            raise InvalidArgumentError("data.size_bytes", "must not be negative")
        _store_url(request.store_url, self._settings.store_schemes)
        _names(request.feature_names)
        if request.label_column:
            check.text(request.label_column, "label_column")
        predictions = np.array(request.reference_predictions, dtype=np.float64)
        if not np.all(np.isfinite(predictions)):
            index = int(np.flatnonzero(~np.isfinite(predictions))[0])
            raise InvalidArgumentError(f"reference_predictions[{index}]", "must be a finite number")
        correct = np.array(request.reference_correct, dtype=np.float64)
        if len(correct) not in {0, len(predictions)}:
            problem = f"has {len(correct)} entries for {len(predictions)} predictions"
            raise InvalidArgumentError("reference_correct", problem)
        accuracy = request.reference_accuracy if request.HasField("reference_accuracy") else None
        if accuracy is not None and not 0 <= accuracy <= 1:
            raise InvalidArgumentError("reference_accuracy", "must be 0 to 1")
        return ReferenceSpec(
            feature_names=[*request.feature_names],
            label_column=request.label_column,
            predictions=predictions,
            correct=correct,
            accuracy=accuracy,
            window_s=self._settings.window_s,
            min_count=self._settings.min_count,
            min_windows=self._settings.thresholds.natural_min_windows,
            max_rows=self._settings.max_reference_rows,
        )

    async def ListFindings(
        self, request: drift_pb2.ListFindingsRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.ListFindingsResponse:
        model, limit = _page(request)
        rows = await asyncio.to_thread(self._answers.findings, model, limit)
        return drift_pb2.ListFindingsResponse(findings=[finding_message(row) for row in rows])

    async def ListWindows(
        self, request: drift_pb2.ListWindowsRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.ListWindowsResponse:
        model, limit = _page(request)
        found = await asyncio.to_thread(self._answers.windows, model, limit)
        return drift_pb2.ListWindowsResponse(windows=[window_message(row, findings) for row, findings in found])

    async def CloseWindows(
        self, request: drift_pb2.CloseWindowsRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.CloseWindowsResponse:
        model = check.name(request.model, "model")
        closed = await asyncio.to_thread(self._closer.close_all, model, now_micros(self._clock.now()))
        count_closed(closed)
        self._relay.wake()
        return drift_pb2.CloseWindowsResponse(closed=len(closed), findings=sum(len(w.findings) for w in closed))

    async def GetOutcomes(
        self, request: drift_pb2.GetOutcomesRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.GetOutcomesResponse:
        model = check.name(request.model, "model")
        since_us = None
        if request.HasField("predicted_since"):
            since_us = now_micros(check.timestamp(request.predicted_since, "predicted_since"))
        figures = await asyncio.to_thread(self._answers.figures, model, since_us)
        scores = await asyncio.to_thread(self._answers.scores, model) if since_us is None else {}
        tracked = await asyncio.to_thread(self._answers.tracked, model) if since_us is None else []
        return drift_pb2.GetOutcomesResponse(
            versions=[
                drift_pb2.OutcomeFigures(
                    model=model,
                    version=version,
                    predictions=f.predictions,
                    outcomes=f.outcomes,
                    correct=f.correct,
                    brier_sum=f.brier_sum,
                    brier_square_sum=f.brier_square_sum,
                    scores=[
                        drift_pb2.ScoreBucket(bucket=bucket, count=count)
                        for bucket, count in sorted(scores.get(version, {}).items())
                    ],
                )
                for version, f in sorted(figures.items())
            ],
            tracked=[tracked_message(value, sums) for value, sums in tracked],
        )

    async def SetTrackedValues(
        self, request: drift_pb2.SetTrackedValuesRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.SetTrackedValuesResponse:
        model = check.name(request.model, "model")
        if len(request.values) > MAX_TRACKED:
            raise InvalidArgumentError("values", f"may be at most {MAX_TRACKED}")
        values = [tracked_in(value, f"values[{index}]") for index, value in enumerate(request.values)]
        await asyncio.to_thread(self._store.track, model, values)
        return drift_pb2.SetTrackedValuesResponse()

    async def GetPrediction(
        self, request: drift_pb2.GetPredictionRequest, _context: grpc.aio.ServicerContext
    ) -> drift_pb2.GetPredictionResponse:
        prediction_id = check.text(request.prediction_id, "prediction_id", limit=MAX_ID)
        row, names, digest, numbers = await asyncio.to_thread(self._answers.prediction, prediction_id)
        return prediction_message(row, names, digest, numbers)


def _page(request: drift_pb2.ListFindingsRequest | drift_pb2.ListWindowsRequest) -> tuple[str, int]:
    model = check.name(request.model, "model") if request.model else ""
    return model, check.page_size(request.page_size, "page_size")


def _names(names: Sequence[str]) -> None:
    if not 0 < len(names) <= MAX_FEATURES:
        raise InvalidArgumentError("feature_names", f"needs 1 to {MAX_FEATURES} names")
    seen: set[str] = set()
    for index, name in enumerate(names):
        check.text(name, f"feature_names[{index}]")
        if name in seen:
            raise InvalidArgumentError(f"feature_names[{index}]", f"names {name!r} a second time")
        seen.add(name)


def _store_url(url: str, schemes: Sequence[str]) -> None:
    check.text(url, "store_url", limit=MAX_URL)
    scheme, separator, _rest = url.partition("://")
    if not separator and ":" not in url:
        scheme = "file"  # a plain path
    if scheme not in schemes or "::" in url:
        raise InvalidArgumentError("store_url", f"needs a path or a URL with one of the schemes {', '.join(schemes)}")


def _read_profile(store_url: str, data: Any, spec: ReferenceSpec) -> Profile:
    """Fetch the checked training set and profile it; blocking."""
    with tempfile.TemporaryDirectory(prefix="millrace-reference-") as folder:
        path = Path(folder) / "training.parquet"
        try:
            ContentStore(store_url).fetch(data.sha256, path)
        except (OSError, ImportError) as error:
            raise UnavailableError("STORE_UNAVAILABLE", f"the training-set store did not answer: {error}") from error
        except ValueError as error:
            raise InvalidArgumentError("store_url", f"is no URL of a store: {error}") from error
        if data.size_bytes and path.stat().st_size != data.size_bytes:
            raise InvalidArgumentError("data.size_bytes", f"the file has {path.stat().st_size} bytes")
        return build_profile(path, spec)
