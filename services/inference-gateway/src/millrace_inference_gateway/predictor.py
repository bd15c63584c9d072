"""Predict as a whole: check, features, model, log, answer. Every door to it is a thin edge over this."""

import re
from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit import check
from millrace_kit.clock import Clock, IdSource
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from millrace_kit.telemetry import current_trace_id

from millrace_inference_gateway.answers import Answers
from millrace_inference_gateway.convert import prediction_of
from millrace_inference_gateway.feature_reads import FeatureReads
from millrace_inference_gateway.predict import (
    MAX_NAME,
    Vector,
    from_inputs,
    request_bytes,
    request_head,
    response_values,
)
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.routes import Route, RouteTable
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.upstream import ModelCaller

MAX_STICKY = 256
# What a metadata value may hold, printable ASCII.
_PRINTABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_MIN_CALL_S = 0.001

Table = Callable[[], RouteTable]


class Predictor:
    """Entity keys in, prediction out."""

    def __init__(
        self,
        *,
        settings: GatewaySettings,
        table: Table,
        features: FeatureReads,
        models: ModelCaller,
        log: PredictionLog,
        answers: Answers,
        clock: Clock,
        new_id: IdSource,
    ) -> None:
        self._settings = settings
        self._table = table
        self._features = features
        self._models = models
        self._log = log
        self._answers = answers
        self._clock = clock
        self._new_id = new_id
        self._heads: dict[Route, bytes] = {}

    async def predict(
        self, request: prediction_pb2.PredictRequest, remaining_s: float | None
    ) -> prediction_pb2.PredictResponse:
        """One prediction; `remaining_s` is what the caller's deadline leaves, None without one.

        Raises:
            MillraceError: what is wrong with the request, or which of the two calls failed.
        """
        route = self._route(request)
        started = self._clock.monotonic()
        budget_s = self._settings.predict_timeout_s if remaining_s is None else remaining_s
        vector = await self._vector(request, route, budget_s)
        left_s = max(_MIN_CALL_S, min(budget_s - (self._clock.monotonic() - started), route.timeout_ms / 1000))
        prediction_id = self._new_id()
        sticky = request.sticky_key or request.subject
        body = request_bytes(self._head(route), vector.values)
        answer = await self._models.infer(route, body, prediction_id, sticky, left_s)
        outputs = response_values(answer.body, route.output_tensor)
        now = self._clock.now()
        prediction = events_pb2.Prediction(
            prediction_id=prediction_id,
            model=route.model,
            version=answer.version,
            digest=answer.digest,
            subject=request.subject,
            features=vector.values,
            outputs=outputs,
            definitions_hash=vector.definitions_hash,
            latency_ms=(self._clock.monotonic() - started) * 1000,
            trace_id=current_trace_id(),
            path="predict",
        )
        prediction.predicted_at.FromDatetime(now)
        if request.HasField("event_time"):
            prediction.event_time.CopyFrom(request.event_time)
        else:
            prediction.event_time.FromDatetime(now)
        self._answers.predicted(prediction_id, route.model, answer.version, body, answer.body)
        # Before the answer goes out: an answered prediction is in the log whatever happens next.
        self._log.write(prediction)
        return prediction_of(prediction, vector.missing(route.feature_names), vector.max_age_ms)

    def _route(self, request: prediction_pb2.PredictRequest) -> Route:
        check.name(request.model, "model")
        if len(request.inputs) > self._settings.max_inputs:
            raise InvalidArgumentError("inputs", f"has more than {self._settings.max_inputs} entries")
        for name, value in request.inputs.items():
            if not name or len(name) > MAX_NAME:
                raise InvalidArgumentError("inputs", f"has a name that is empty or longer than {MAX_NAME} characters")
            if value.WhichOneof("kind") is None:
                raise InvalidArgumentError(f"inputs[{name!r}]", "has no value; leave the input out instead")
        for field in ("subject", "sticky_key"):
            text: str = getattr(request, field)
            if len(text) > MAX_STICKY or (text and not _PRINTABLE.fullmatch(text)):
                raise InvalidArgumentError(field, f"needs at most {MAX_STICKY} printable ASCII characters")
        if request.HasField("event_time"):
            check.timestamp(request.event_time, "event_time")
        route = self._table().routes.get(request.model)
        if route is None:
            raise NotFoundError("model", request.model)
        if not route.input_tensor or not route.feature_names:
            text = f"model {route.model!r} has no feature vector; call it by the V2 protocol"
            raise FailedPreconditionError("NO_FEATURE_VECTOR", text, {"model": route.model})
        return route

    async def _vector(self, request: prediction_pb2.PredictRequest, route: Route, budget_s: float) -> Vector:
        if not route.feature_service:
            return from_inputs(route, request.inputs)
        event_time: Timestamp | None = request.event_time if request.HasField("event_time") else None
        timeout_s = max(_MIN_CALL_S, budget_s * self._settings.feature_time_share)
        return await self._features.vector(route, request.inputs, event_time, timeout_s)

    def _head(self, route: Route) -> bytes:
        head = self._heads.get(route)
        if head is None:
            self._heads = {r: h for r, h in self._heads.items() if self._table().routes.get(r.model) is r}
            head = self._heads[route] = request_head(route)
        return head
