"""One prediction on its way through Predict: who asks, what was looked up, and what is said of the answer, to the caller and in the log."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from millrace_api.events.v1 import events_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.telemetry import current_trace_id

from millrace_inference_gateway.caller_key import BAGGAGE, key_of
from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.graphs import Joined
from millrace_inference_gateway.predict import Vector
from millrace_inference_gateway.routes import ANYBODY, Route
from millrace_inference_gateway.upstream import ModelAnswer
from millrace_inference_gateway.value_checks import Findings

_CLIENT, _VERSION = CLIENT_HEADER.encode(), b"x-millrace-version"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what its deadline leaves (None without one), and its headers that rules and rights go by."""

    remaining_s: float | None
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    trail: tuple[str, ...] = ()
    """Where another model asks for its part: the models on the way here, first the one that the client asked."""
    parent: str = ""
    """The prediction this one is a part of."""

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

    @property
    def key(self) -> str:
        """What keeps it on its arm in every model that is called on its behalf; empty for nothing."""
        return key_of(self.headers[BAGGAGE]) if BAGGAGE in self.headers else ""

    def may_share(self, route: Route) -> bool:
        """Whether it may get an answer that was made for somebody else."""
        allowed = not route.callers or ANYBODY in route.callers or self.client in route.callers
        return allowed and not self.pinned

    def for_part(self, model: str, prediction_id: str, remaining_s: float) -> "Caller":
        """The same caller for another model; a version that it chose is of the model it asked."""
        headers = {name: value for name, value in self.headers.items() if name != _VERSION}
        return Caller(remaining_s, headers, (*self.trail, model), prediction_id)


@dataclass(slots=True)
class Row:
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
        return self.request.sticky_key or self.caller.key or self.request.subject


def messages(
    route: Route,
    row: Row,
    answer: ModelAnswer,
    outputs: Sequence[float],
    *,
    joined: Joined | None,
    prediction_id: str,
    latency_ms: float,
) -> tuple[events_pb2.Prediction, prediction_pb2.PredictResponse]:
    """What goes into the log, still without its times, and what the caller gets."""
    plan = route.plan_of(answer.version)
    if joined is not None and (other := joined.instead) is not None:
        answered, labels, places = list(other.outputs), list(other.labels), list(other.output_places)
    else:
        answered, labels, places = plan.finished(outputs if joined is None else joined.outputs)
    changed = bool(plan.steps or plan.graph)
    prediction = events_pb2.Prediction(
        prediction_id=prediction_id,
        model=route.model,
        version=answer.version,
        digest=answer.digest,
        subject=row.request.subject,
        features=row.values,
        outputs=outputs,
        answered=answered if changed else (),
        labels=labels,
        answered_places=places,
        definitions_hash=row.vector.definitions_hash,
        latency_ms=latency_ms,
        trace_id=current_trace_id(),
        path="predict",
        client=row.caller.client,
        pinned=row.caller.pinned,
        findings=row.findings,
        feature_ages=row.vector.ages,
        parent_id=row.caller.parent,
    )
    missing = row.vector.missing(route.feature_names)
    response = prediction_pb2.PredictResponse(
        prediction_id=prediction_id,
        model=route.model,
        version=answer.version,
        digest=answer.digest,
        outputs=answered,
        model_outputs=outputs if changed and not plan.hidden else (),
        labels=labels,
        output_places=places,
        missing_features=missing,
        defaulted_features=row.defaulted,
        expired_features=[name for name in missing if name in row.vector.expired],
        max_feature_age_ms=row.vector.max_age_ms,
        feature_ages=row.vector.ages if row.request.with_feature_ages else (),
        findings=row.findings,
        parts=_parts(joined) if joined is not None else (),
        left_out_models=_left_out(joined) if joined is not None else (),
    )
    return prediction, response


def _parts(joined: Joined) -> Iterable[prediction_pb2.PredictionPart]:
    """Each with those it has itself behind it."""
    for each in joined.parts:
        yield prediction_pb2.PredictionPart(
            model=each.model, version=each.version, prediction_id=each.prediction_id, outputs=each.outputs
        )
        yield from each.parts


def _left_out(joined: Joined) -> Iterable[str]:
    """Those that the parts left out too."""
    yield from joined.left_out
    for each in joined.parts:
        yield from each.left_out_models
