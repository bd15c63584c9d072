"""Gateway, rollout and drift."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import grpc
from millrace_api.drift.v1 import drift_pb2 as drift
from millrace_api.drift.v1.drift_pb2_grpc import DriftServiceStub
from millrace_api.prediction.v1 import prediction_pb2 as prediction
from millrace_api.prediction.v1.prediction_pb2_grpc import GatewayServiceStub, PredictionServiceStub
from millrace_api.rollout.v1 import rollout_pb2 as rollout
from millrace_api.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from millrace_kit.errors import MillraceError

from millrace.transport import LONG_TIMEOUT_S, call, stream
from millrace.values import Scalar, to_timestamp, to_values

PREDICT_TIMEOUT_S = 5.0


def predict_request(
    model: str, inputs: Mapping[str, Scalar | None], *, subject: str, event_time: datetime | None, sticky_key: str
) -> prediction.PredictRequest:
    """The request both clients send, the blocking and the asynchronous one."""
    return prediction.PredictRequest(
        model=model,
        inputs=to_values(inputs),
        subject=subject,
        event_time=to_timestamp(event_time) if event_time else None,
        sticky_key=sticky_key,
    )


Answer = prediction.PredictResponse | MillraceError
"""Of one of several predictions: what was predicted, or why nothing was."""


def batch_request(
    model: str, rows: Sequence[Mapping[str, Scalar | None]], subjects: Sequence[str]
) -> prediction.PredictBatchRequest:
    """The request for many rows; `subjects` is empty or has one a row.

    Raises:
        ValueError: there are as many subjects as neither.
    """
    if subjects and len(subjects) != len(rows):
        raise ValueError(f"{len(subjects)} subjects for {len(rows)} rows")
    return prediction.PredictBatchRequest(
        model=model,
        rows=[
            prediction.PredictRow(inputs=to_values(row), subject=subjects[index] if subjects else "")
            for index, row in enumerate(rows)
        ],
    )


def stream_requests(
    model: str, rows: Iterable[Mapping[str, Scalar | None]]
) -> Iterator[prediction.PredictStreamRequest]:
    """The requests of a stream; a row's call id is its position."""
    for index, row in enumerate(rows):
        request = prediction.PredictRequest(model=model, inputs=to_values(row))
        yield prediction.PredictStreamRequest(call_id=str(index), request=request)


def answer_of(result: prediction.PredictResult) -> Answer:
    """The answer, or the error it failed with."""
    if result.HasField("response"):
        return result.response
    failure = result.failure
    code = next((code for code in grpc.StatusCode if code.value[0] == failure.code), grpc.StatusCode.UNKNOWN)
    return MillraceError(code, failure.reason, failure.message, dict(failure.metadata))


class PredictionArea:
    """Predictions with feature look-up, through the gateway's public address."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = PredictionServiceStub(channel)

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Scalar | None],
        *,
        subject: str = "",
        event_time: datetime | None = None,
        sticky_key: str = "",
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> prediction.PredictResponse:
        """One prediction; `inputs` are the join keys and request-time fields of the model's feature service."""
        request = predict_request(model, inputs, subject=subject, event_time=event_time, sticky_key=sticky_key)
        answer: prediction.PredictResponse = call(self.stub.Predict, request, timeout_s)
        return answer

    def predict_batch(
        self,
        model: str,
        rows: Sequence[Mapping[str, Scalar | None]],
        *,
        subjects: Sequence[str] = (),
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> list[Answer]:
        """An answer, or the error it failed with, for each of `rows` in their order."""
        answer: prediction.PredictBatchResponse = call(
            self.stub.PredictBatch, batch_request(model, rows, subjects), timeout_s
        )
        return [answer_of(result) for result in answer.results]

    def stream(
        self, model: str, rows: Iterable[Mapping[str, Scalar | None]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Position and answer of each of `rows`, as they become ready; rows are taken as fast as the gateway answers."""
        for answer in stream(self.stub.PredictStream, stream_requests(model, rows), timeout_s):
            yield int(answer.call_id), answer_of(answer.result)


class GatewayArea:
    """Figures of the gateway."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = GatewayServiceStub(channel)

    def figures(self, model: str = "") -> prediction.GetFiguresResponse:
        """Requests, errors and latency per version since the gateway's start."""
        answer: prediction.GetFiguresResponse = call(self.stub.GetFigures, prediction.GetFiguresRequest(model=model))
        return answer


class RolloutArea:
    """ModelDeployments."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = RolloutServiceStub(channel)

    def apply(self, manifest_yaml: str) -> rollout.ApplyResponse:
        """Create or change a ModelDeployment."""
        answer: rollout.ApplyResponse = call(self.stub.Apply, rollout.ApplyRequest(manifest_yaml=manifest_yaml))
        return answer

    def get(self, name: str) -> rollout.Deployment:
        """A ModelDeployment with its status."""
        answer: rollout.GetDeploymentResponse = call(self.stub.GetDeployment, rollout.GetDeploymentRequest(name=name))
        return answer.deployment

    def list(self) -> Sequence[rollout.Deployment]:
        """Every ModelDeployment."""
        answer: rollout.ListDeploymentsResponse = call(self.stub.ListDeployments, rollout.ListDeploymentsRequest())
        return answer.deployments

    def history(self, name: str) -> Sequence[rollout.Decision]:
        """The newest decisions about a deployment's versions with their evidence, newest last."""
        request = rollout.GetHistoryRequest(name=name)
        answer: rollout.GetHistoryResponse = call(self.stub.GetHistory, request)
        return answer.decisions

    def watch(self, name: str) -> Iterator[rollout.Deployment]:
        """The ModelDeployment now and after every change."""
        for answer in stream(self.stub.WatchDeployment, rollout.WatchDeploymentRequest(name=name), LONG_TIMEOUT_S):
            yield answer.deployment

    def delete(self, name: str) -> None:
        """Delete a ModelDeployment and stop its servers."""
        call(self.stub.DeleteDeployment, rollout.DeleteDeploymentRequest(name=name))

    def act(self, name: str, verb: rollout.Verb.ValueType, weight: float = 0.0, to: str = "") -> rollout.Deployment:
        """Promote, pause, resume, abort, undo (`to` a version or revision), or hold the candidate at `weight` percent (VERB_SET_WEIGHT only)."""
        request = rollout.ActRequest(name=name, verb=verb, weight=weight, to=to)
        answer: rollout.ActResponse = call(self.stub.Act, request)
        return answer.deployment


class DriftArea:
    """References, findings, outcomes and single predictions."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = DriftServiceStub(channel)

    def set_reference(self, request: drift.SetReferenceRequest) -> drift.SetReferenceResponse:
        """Set what live data of a version is compared with."""
        answer: drift.SetReferenceResponse = call(self.stub.SetReference, request, LONG_TIMEOUT_S)
        return answer

    def findings(self, model: str = "", page_size: int = 0) -> Sequence[drift.Finding]:
        """Findings, newest first."""
        answer: drift.ListFindingsResponse = call(
            self.stub.ListFindings, drift.ListFindingsRequest(model=model, page_size=page_size)
        )
        return answer.findings

    def windows(self, model: str, page_size: int = 0) -> Sequence[drift.WindowReport]:
        """Closed windows, newest first."""
        answer: drift.ListWindowsResponse = call(
            self.stub.ListWindows, drift.ListWindowsRequest(model=model, page_size=page_size)
        )
        return answer.windows

    def outcomes(self, model: str, predicted_since: datetime | None = None) -> Sequence[drift.OutcomeFigures]:
        """Outcome sums per version."""
        request = drift.GetOutcomesRequest(
            model=model, predicted_since=to_timestamp(predicted_since) if predicted_since else None
        )
        answer: drift.GetOutcomesResponse = call(self.stub.GetOutcomes, request)
        return answer.versions

    def prediction(self, prediction_id: str) -> drift.GetPredictionResponse:
        """One prediction with what it was made from."""
        answer: drift.GetPredictionResponse = call(
            self.stub.GetPrediction, drift.GetPredictionRequest(prediction_id=prediction_id)
        )
        return answer
