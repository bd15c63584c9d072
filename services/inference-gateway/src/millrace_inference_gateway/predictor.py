"""Predict as a whole: features, defaults, model, steps, log, answer. Every door to it is a thin edge over this."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.clock import Clock, IdSource
from millrace_kit.errors import InvalidArgumentError, MillraceError
from millrace_kit.telemetry import current_trace_id

from millrace_inference_gateway.answers import Answers
from millrace_inference_gateway.client_refusals import INVALID, count_client
from millrace_inference_gateway.convert import failure_of
from millrace_inference_gateway.feature_reads import FeatureReads
from millrace_inference_gateway.graphs import Joined, Part, check_trail
from millrace_inference_gateway.predict import from_inputs, request_bytes, request_head, response_rows
from millrace_inference_gateway.predict_requests import check_row, route_of
from millrace_inference_gateway.predict_rows import Caller, Row, messages
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.result_cache import Kept, ResultCache, only_arm
from millrace_inference_gateway.routes import Route, RouteTable
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.upstream import ModelAnswer, ModelCaller
from millrace_inference_gateway.value_checks import Findings

_MIN_CALL_S = 0.001
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Table = Callable[[], RouteTable]
_Answer = prediction_pb2.PredictResponse | MillraceError


class Predictor:
    """Entity keys in, prediction out."""

    def __init__(
        self,
        *,
        settings: GatewaySettings,
        table: Table,
        features: FeatureReads,
        models: ModelCaller,
        cache: ResultCache,
        log: PredictionLog,
        answers: Answers,
        clock: Clock,
        new_id: IdSource,
    ) -> None:
        self._settings = settings
        self._table = table
        self._features = features
        self._models = models
        self._cache = cache
        self._log = log
        self._answers = answers
        self._clock = clock
        self._new_id = new_id
        self._heads: dict[str, tuple[Route, bytes]] = {}

    async def predict(self, request: prediction_pb2.PredictRequest, caller: Caller) -> prediction_pb2.PredictResponse:
        """One prediction.

        Raises:
            MillraceError: what is wrong with the request, or which of the two calls failed.
        """
        try:
            return await self._predicted(request, caller)
        except MillraceError as error:
            _count(caller, error)
            raise

    async def _predicted(
        self, request: prediction_pb2.PredictRequest, caller: Caller
    ) -> prediction_pb2.PredictResponse:
        check_trail(caller.trail, request.model)
        route = route_of(request.model, self._table())
        findings = check_row(request, self._settings.max_inputs, route.asked(caller.version).checks)
        if (known := self._known(route, request, caller)) is not None:
            return known
        until = self._until(route, caller)
        row = await self._looked_up(route, request, caller, until, findings)
        (response,) = await self._answered(route, [row], until)
        if isinstance(response, MillraceError):
            raise response
        return response

    async def predict_batch(
        self, request: prediction_pb2.PredictBatchRequest, caller: Caller
    ) -> prediction_pb2.PredictBatchResponse:
        """An answer or a failure for each row.

        Raises:
            MillraceError: what is wrong with the request as a whole.
        """
        route = route_of(request.model, self._table())
        if not 1 <= len(request.rows) <= self._settings.max_batch_rows:
            raise InvalidArgumentError("rows", f"needs 1 to {self._settings.max_batch_rows} rows")
        until = self._until(route, caller)
        results: dict[int, prediction_pb2.PredictResult] = {}

        async def look_up(index: int, message: prediction_pb2.PredictRow) -> Row | None:
            one = _single(request.model, message)
            try:
                findings = check_row(one, self._settings.max_inputs, route.asked(caller.version).checks)
                if (known := self._known(route, one, caller)) is not None:
                    results[index] = prediction_pb2.PredictResult(response=known)
                    return None
                return await self._looked_up(route, one, caller, until, findings)
            except MillraceError as error:
                _count(caller, error)
                results[index] = failure_of(error, row=index)
                return None

        rows = await asyncio.gather(*(look_up(index, message) for index, message in enumerate(request.rows)))
        found = {index: row for index, row in enumerate(rows) if row is not None}

        async def ask(indices: Sequence[int]) -> None:
            try:
                answers = await self._answered(route, [found[i] for i in indices], until)
            except MillraceError as error:
                if len(indices) > 1 and error.code.name in {"INVALID_ARGUMENT", "INTERNAL", "UNKNOWN"}:
                    # One row that the model does not take, or more rows than it takes: each by itself.
                    await asyncio.gather(*(ask([index]) for index in indices))
                    return
                results.update(dict.fromkeys(indices, failure_of(error)))
                return
            for index, answer in zip(indices, answers, strict=True):
                if isinstance(answer, MillraceError):
                    results[index] = failure_of(answer, row=index)
                else:
                    results[index] = prediction_pb2.PredictResult(response=answer)

        await asyncio.gather(*(ask(part) for part in self._parts(route, found)))
        return prediction_pb2.PredictBatchResponse(results=[results[i] for i in range(len(request.rows))])

    def _parts(self, route: Route, rows: Mapping[int, Row]) -> Iterable[Sequence[int]]:
        """Rows that may share a model call: those that one version answers for sure."""
        groups: dict[object, list[int]] = {}
        together = only_arm(route) is not None
        for index, row in rows.items():
            # Rules may send rows of one caller to different versions.
            apart = row.sticky or index, route.attributes.outcomes(row.request.inputs, row.vector.values)
            groups.setdefault(None if together else apart, []).append(index)
        size = self._settings.batch_rows_together
        for indices in groups.values():
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def _until(self, route: Route, caller: Caller) -> float:
        budget_s = caller.remaining_s
        if budget_s is None:
            budget_s = self._settings.predict_timeout_s + self._wake_s(route, caller)
        return self._clock.monotonic() + budget_s

    def _wake_s(self, route: Route, caller: Caller) -> float:
        """How long the model call may be held, because the version it is for is asleep."""
        asleep = any(arm.asleep for arm in route.arms) if caller.pinned or route.rules else route.asleep
        return self._settings.wake.max_wait_s if asleep else 0.0

    async def _looked_up(
        self, route: Route, request: prediction_pb2.PredictRequest, caller: Caller, until: float, findings: Findings
    ) -> Row:
        started = self._clock.monotonic()
        arm = route.asked(caller.version)
        checks = arm.checks
        if route.feature_service:
            event_time: Timestamp | None = request.event_time if request.HasField("event_time") else None
            timeout_s = max(_MIN_CALL_S, (until - started) * self._settings.feature_time_share)
            definitions = arm.plan.definitions
            vector = await self._features.vector(route, request.inputs, event_time, timeout_s, definitions)
            if not definitions:
                self._cache.saw_definitions(route.feature_service, vector.definitions_hash)
        else:
            vector = from_inputs(route, request.inputs, checks)
        values, defaulted = route.plan.filled(route.feature_names, vector.values)
        values, more = checks.features(values)
        return Row(request, caller, started, vector, values, defaulted, [*findings, *more])

    async def _answered(self, route: Route, rows: Sequence[Row], until: float) -> list[_Answer]:
        """An answer for each row, or why other models' parts of it are missing.

        Raises:
            MillraceError: the model's call failed.
        """
        longest_s = route.timeout_ms / 1000 + self._wake_s(route, rows[0].caller)
        left_s = max(_MIN_CALL_S, min(until - self._clock.monotonic(), longest_s))
        prediction_id = self._new_id()
        body = request_bytes(self._head(route, len(rows)), [row.values for row in rows], route)
        first = rows[0]
        headers = route.attributes.with_outcomes(first.caller.headers, first.request.inputs, first.vector.values)
        answer = await self._models.infer(route, body, prediction_id, first.sticky, headers=headers, timeout_s=left_s)
        self._answers.predicted(prediction_id, route.model, answer.version, body, answer.body)
        outputs = response_rows(answer.body, route.output_tensor, len(rows))
        ids = [f"{prediction_id}.{index}" if index else prediction_id for index in range(len(rows))]
        graph = route.plan_of(answer.version).graph
        if graph is None:
            return [
                self._finished(route, row, answer, output, prediction_id=each)
                for row, output, each in zip(rows, outputs, ids, strict=True)
            ]

        async def one(row: Row, output: list[float], each: str) -> _Answer:
            try:
                joined = await graph.joined(output, lambda part: self._part(route, row, part, each, until))
            except MillraceError as error:
                return error
            return self._finished(route, row, answer, output, prediction_id=each, joined=joined)

        return await asyncio.gather(*map(one, rows, outputs, ids))

    async def _part(
        self, route: Route, row: Row, part: Part, prediction_id: str, until: float
    ) -> prediction_pb2.PredictResponse:
        """Another model's prediction for the same row.

        Raises:
            MillraceError: as for any prediction.
        """
        remaining_s = max(_MIN_CALL_S, until - self._clock.monotonic())
        if part.timeout_ms:
            remaining_s = min(remaining_s, part.timeout_ms / 1000)
        asked = prediction_pb2.PredictRequest(
            model=part.model, inputs=row.request.inputs, subject=row.request.subject, sticky_key=row.sticky
        )
        if row.request.HasField("event_time"):
            asked.event_time.CopyFrom(row.request.event_time)
        return await self._predicted(asked, row.caller.for_part(route.model, prediction_id, remaining_s))

    def _finished(
        self,
        route: Route,
        row: Row,
        answer: ModelAnswer,
        outputs: list[float],
        *,
        prediction_id: str,
        joined: Joined | None = None,
    ) -> prediction_pb2.PredictResponse:
        latency_ms = (self._clock.monotonic() - row.started) * 1000
        prediction, response = messages(
            route, row, answer, outputs, joined=joined, prediction_id=prediction_id, latency_ms=latency_ms
        )
        self._written(prediction, row.request)
        if row.caller.may_share(route) and (key := self._cache.key(route, row.request)) is not None:
            self._cache.keep(key, Kept(prediction, response, self._clock.monotonic()))
        return response

    def _known(
        self, route: Route, request: prediction_pb2.PredictRequest, caller: Caller
    ) -> prediction_pb2.PredictResponse | None:
        """The answer given before, as one of its own: with its own id, in the log, marked in both."""
        key, rule = self._cache.key(route, request), route.plan.cache
        if key is None or rule is None or not caller.may_share(route):
            return None
        started = self._clock.monotonic()
        kept = self._cache.find(key, rule, started)
        if kept is None:
            return None
        prediction, response = events_pb2.Prediction(), prediction_pb2.PredictResponse()
        prediction.CopyFrom(kept.prediction)
        response.CopyFrom(kept.response)
        prediction.prediction_id = response.prediction_id = self._new_id()
        prediction.client, prediction.parent_id = caller.client, caller.parent
        prediction.subject, prediction.trace_id = request.subject, current_trace_id()
        prediction.cached = response.cached = True
        # Whoever asked first may have wanted them, or not.
        del response.feature_ages[:]
        if request.with_feature_ages:
            response.feature_ages.extend(prediction.feature_ages)
        response.cache_age_ms = round((started - kept.at_s) * 1000)
        prediction.latency_ms = (self._clock.monotonic() - started) * 1000
        self._written(prediction, request)
        return response

    def _written(self, prediction: events_pb2.Prediction, request: prediction_pb2.PredictRequest) -> None:
        """Into the log, before the answer goes out: an answered prediction is there whatever happens next."""
        since = self._clock.now() - _EPOCH
        at = Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)
        prediction.predicted_at.CopyFrom(at)
        prediction.event_time.CopyFrom(request.event_time if request.HasField("event_time") else at)
        self._log.write(prediction)

    def _head(self, route: Route, rows: int) -> bytes:
        if rows != 1:
            return request_head(route, rows)
        known = self._heads.get(route.model)
        if known is None or known[0] is not route:
            routes = self._table().routes
            self._heads = {model: kept for model, kept in self._heads.items() if routes.get(model) is kept[0]}
            known = self._heads[route.model] = route, request_head(route, 1)
        return known[1]


def _single(model: str, row: prediction_pb2.PredictRow) -> prediction_pb2.PredictRequest:
    request = prediction_pb2.PredictRequest(
        model=model,
        inputs=row.inputs,
        subject=row.subject,
        sticky_key=row.sticky_key,
        with_feature_ages=row.with_feature_ages,
    )
    if row.HasField("event_time"):
        request.event_time.CopyFrom(row.event_time)
    return request


def _count(caller: Caller, error: MillraceError) -> None:
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        count_client(caller.client, INVALID)
