"""The gateway's RPCs: check, call, convert."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc.aio
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_kit import check
from millrace_kit.call_door import DoorCall, Method
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from millrace_inference_gateway.activity import Activity
from millrace_inference_gateway.convert import figures_response
from millrace_inference_gateway.figures import Figures
from millrace_inference_gateway.predict_rows import Caller
from millrace_inference_gateway.predict_stream import predict_stream
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.predictor import Predictor
from millrace_inference_gateway.request_samples import RequestSamples
from millrace_inference_gateway.routes import RouteTable
from millrace_inference_gateway.shadow_figures import ShadowFigures
from millrace_inference_gateway.upstream import passed_on

MAX_ASKED = 256
"""Samples of requests in one answer."""
PREDICT = "/millrace_api.prediction.v1.PredictionService/Predict"
PREDICT_BATCH = "/millrace_api.prediction.v1.PredictionService/PredictBatch"


class PredictionServicer(prediction_pb2_grpc.PredictionServiceServicer):
    """Predict for whoever calls the gRPC server itself, and its stream for everybody."""

    def __init__(self, predictor: Predictor, max_stream_calls: int) -> None:
        self._predictor = predictor
        self._max_stream_calls = max_stream_calls

    async def Predict(
        self, request: prediction_pb2.PredictRequest, context: grpc.aio.ServicerContext
    ) -> prediction_pb2.PredictResponse:
        return await self._predictor.predict(request, _caller(context))

    async def PredictBatch(
        self, request: prediction_pb2.PredictBatchRequest, context: grpc.aio.ServicerContext
    ) -> prediction_pb2.PredictBatchResponse:
        return await self._predictor.predict_batch(request, _caller(context))

    async def PredictStream(
        self, requests: AsyncIterator[prediction_pb2.PredictStreamRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prediction_pb2.PredictStreamResponse]:
        # A stream may live long: each of its calls has the deadline of a call without one.
        caller = Caller(None, _caller(context).headers)
        async for answer in predict_stream(self._predictor, requests, caller, self._max_stream_calls):
            yield answer


def _caller(context: grpc.aio.ServicerContext) -> Caller:
    headers = {
        key.encode(): value.encode() if isinstance(value, str) else value
        for key, value in context.invocation_metadata() or ()
    }
    return Caller(context.time_remaining(), passed_on(headers))


def door_methods(predictor: Predictor) -> dict[str, Method]:
    """The calls that Envoy brings to the door."""

    async def predict(call: DoorCall) -> bytes:
        request = prediction_pb2.PredictRequest.FromString(call.message)
        answer = await predictor.predict(request, Caller(call.remaining_s, passed_on(call.metadata)))
        return answer.SerializeToString()

    async def predict_batch(call: DoorCall) -> bytes:
        request = prediction_pb2.PredictBatchRequest.FromString(call.message)
        answer = await predictor.predict_batch(request, Caller(call.remaining_s, passed_on(call.metadata)))
        return answer.SerializeToString()

    return {PREDICT: predict, PREDICT_BATCH: predict_batch}


class GatewayServicer(prediction_pb2_grpc.GatewayServiceServicer):
    """The gateway about itself."""

    def __init__(
        self,
        figures: Figures,
        log: PredictionLog,
        in_force: Callable[[], RouteTable | None],
        clock: Clock,
        instance: str,
        *,
        shadows: ShadowFigures,
        samples: RequestSamples,
        activity: Callable[[], Awaitable[Sequence[Activity]]],
    ) -> None:
        self._activity = activity
        self._shadows = shadows
        self._samples = samples
        self._figures = figures
        self._log = log
        self._in_force = in_force
        self._started_at = clock.now()
        self._instance = instance

    async def GetFigures(
        self, request: prediction_pb2.GetFiguresRequest, _context: grpc.aio.ServicerContext
    ) -> prediction_pb2.GetFiguresResponse:
        if request.model:
            check.name(request.model, "model")
        table = self._in_force()
        return figures_response(
            self._instance,
            self._started_at,
            self._figures.versions(request.model),
            self._log.counts,
            table.generation if table else 0,
            shadows=self._shadows,
            activity=await self._activity(),
        )

    async def GetRequestSamples(
        self, request: prediction_pb2.GetRequestSamplesRequest, _context: grpc.aio.ServicerContext
    ) -> prediction_pb2.GetRequestSamplesResponse:
        check.name(request.model, "model")
        if not 1 <= request.limit <= MAX_ASKED:
            raise InvalidArgumentError("limit", f"must be 1 to {MAX_ASKED}")
        found = self._samples.newest(request.model, request.limit)
        return prediction_pb2.GetRequestSamplesResponse(requests=found)


class ServerServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The part of the V2 protocol that is about the server as a whole; Envoy routes it here while this process lives."""

    def __init__(self, in_force: Callable[[], RouteTable | None], version: str) -> None:
        self._in_force = in_force
        self._version = version

    async def ServerLive(self, _request: object, _context: grpc.aio.ServicerContext) -> object:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: object, _context: grpc.aio.ServicerContext) -> object:
        return service_pb2.ServerReadyResponse(ready=self._in_force() is not None)

    async def ServerMetadata(self, _request: object, _context: grpc.aio.ServicerContext) -> object:
        return service_pb2.ServerMetadataResponse(
            name="millrace-inference-gateway", version=self._version, extensions=["model_configuration", "statistics"]
        )

    async def RepositoryIndex(self, _request: object, _context: grpc.aio.ServicerContext) -> object:
        table = self._in_force() or RouteTable()
        models = [
            service_pb2.RepositoryIndexResponse.ModelIndex(name=arm.model, version=arm.version, state="READY")
            for arm in table.arms.values()
        ]
        return service_pb2.RepositoryIndexResponse(models=models)
