"""Predict as a whole: features, defaults, model, steps, log, answer. Every door to it is a thin edge over this."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.feature_reads import FeatureReads
from millrace_inference_gateway.predict import Vector, from_inputs, request_bytes, request_head, response_rows
from millrace_inference_gateway.predict_requests import check_row, route_of
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.result_cache import Kept, ResultCache, only_arm
from millrace_inference_gateway.routes import ANYBODY, Route, RouteTable
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.upstream import ModelAnswer, ModelCaller
from millrace_inference_gateway.value_checks import Findings

_MIN_CALL_S = 0.001
_CLIENT, _VERSION = CLIENT_HEADER.encode(), b"x-millrace-version"

Table = Callable[[], RouteTable]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what its deadline leaves (None without one), and its headers that rules and rights go by."""

    remaining_s: float | None
    headers: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def client(self) -> str:
        """Its name, as the gateway's authentication gave it."""
        return self.headers.get(_CLIENT, b"").decode("utf-8", "replace")

    @property
    def pinned(self) -> bool:
        """Whether it chooses the version itself."""
        return _VERSION in self.headers

    @property
    def version(self) -> str:
        """The version it chooses; empty for none."""
        return self.headers.get(_VERSION, b"").decode("ascii", "replace")

    def may_share(self, route: Route) -> bool:
        """Whether it may get an answer that was made for somebody else."""
        allowed = not route.callers or ANYBODY in route.callers or self.client in route.callers
        return allowed and not self.pinned


@dataclass(slots=True)
class _Row:
    """One prediction on its way."""

    request: prediction_pb2.PredictRequest
    caller: Caller
    started: float
    vector: Vector
    values: tuple[float, ...]
    defaulted: Sequence[str]
    findings: Findings

    @property
    def sticky(self) -> str:
        """What keeps the caller on one version."""
        return self.request.sticky_key or self.request.subject


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
        self._heads: dict[Route, bytes] = {}

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
        route = route_of(request.model, self._table())
        findings = check_row(request, self._settings.max_inputs, route.asked(caller.version).checks)
        if (known := self._known(route, request, caller)) is not None:
            return known
        until = self._until(route, caller)
        row = await self._looked_up(route, request, caller, until, findings)
        (response,) = await self._answered(route, [row], until)
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

        async def look_up(index: int, message: prediction_pb2.PredictRow) -> _Row | None:
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
            results.update({i: prediction_pb2.PredictResult(response=a) for i, a in zip(indices, answers, strict=True)})

        await asyncio.gather(*(ask(part) for part in self._parts(route, found)))
        return prediction_pb2.PredictBatchResponse(results=[results[i] for i in range(len(request.rows))])

    def _parts(self, route: Route, rows: Mapping[int, _Row]) -> Iterable[Sequence[int]]:
        """Rows that may share a model call: those that one version answers for sure."""
        groups: dict[str, list[int]] = {}
        together = only_arm(route) is not None
        for index, row in rows.items():
            groups.setdefault("" if together else row.sticky or f"\n{index}", []).append(index)
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
    ) -> _Row:
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
        return _Row(request, caller, started, vector, values, defaulted, [*findings, *more])

    async def _answered(self, route: Route, rows: Sequence[_Row], until: float) -> list[prediction_pb2.PredictResponse]:
        longest_s = route.timeout_ms / 1000 + self._wake_s(route, rows[0].caller)
        left_s = max(_MIN_CALL_S, min(until - self._clock.monotonic(), longest_s))
        prediction_id = self._new_id()
        body = request_bytes(self._head(route, len(rows)), [row.values for row in rows], route)
        answer = await self._models.infer(
            route, body, prediction_id, rows[0].sticky, headers=rows[0].caller.headers, timeout_s=left_s
        )
        self._answers.predicted(prediction_id, route.model, answer.version, body, answer.body)
        outputs = response_rows(answer.body, route.output_tensor, len(rows))
        return [
            self._finished(route, row, answer, output, f"{prediction_id}.{index}" if index else prediction_id)
            for index, (row, output) in enumerate(zip(rows, outputs, strict=True))
        ]

    def _finished(
        self, route: Route, row: _Row, answer: ModelAnswer, outputs: list[float], prediction_id: str
    ) -> prediction_pb2.PredictResponse:
        plan = route.plan_of(answer.version)
        answered, labels, places = plan.finished(outputs)
        prediction = events_pb2.Prediction(
            prediction_id=prediction_id,
            model=route.model,
            version=answer.version,
            digest=answer.digest,
            subject=row.request.subject,
            features=row.values,
            outputs=outputs,
            answered=answered if plan.steps else (),
            labels=labels,
            answered_places=places,
            definitions_hash=row.vector.definitions_hash,
            latency_ms=(self._clock.monotonic() - row.started) * 1000,
            trace_id=current_trace_id(),
            path="predict",
            client=row.caller.client,
            pinned=row.caller.pinned,
            findings=row.findings,
            feature_ages=row.vector.ages,
        )
        self._written(prediction, row.request)
        missing = row.vector.missing(route.feature_names)
        response = prediction_pb2.PredictResponse(
            prediction_id=prediction_id,
            model=route.model,
            version=answer.version,
            digest=answer.digest,
            outputs=answered,
            model_outputs=outputs if plan.steps and not plan.hidden else (),
            labels=labels,
            output_places=places,
            missing_features=missing,
            defaulted_features=row.defaulted,
            expired_features=[name for name in missing if name in row.vector.expired],
            max_feature_age_ms=row.vector.max_age_ms,
            feature_ages=row.vector.ages if row.request.with_feature_ages else (),
            findings=row.findings,
        )
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
        prediction.client = caller.client
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
        now = self._clock.now()
        prediction.predicted_at.FromDatetime(now)
        if request.HasField("event_time"):
            prediction.event_time.CopyFrom(request.event_time)
        else:
            prediction.event_time.FromDatetime(now)
        self._log.write(prediction)

    def _head(self, route: Route, rows: int) -> bytes:
        if rows != 1:
            return request_head(route, rows)
        head = self._heads.get(route)
        if head is None:
            self._heads = {r: h for r, h in self._heads.items() if self._table().routes.get(r.model) is r}
            head = self._heads[route] = request_head(route, 1)
        return head


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
