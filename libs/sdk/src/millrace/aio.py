"""The asynchronous twin of `Client` for the paths that carry load: predictions, online features, writes.

Everything else is reachable through the typed stubs of each area.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from millrace_api.drift.v1.drift_pb2_grpc import DriftServiceStub
from millrace_api.feature.v1 import feature_pb2 as feature
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.feature.v1.search_pb2_grpc import VectorServiceStub
from millrace_api.ingestion.v1 import ingestion_pb2 as ingestion
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_api.prediction.v1 import prediction_pb2 as prediction
from millrace_api.prediction.v1.prediction_pb2_grpc import GatewayServiceStub, PredictionServiceStub
from millrace_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from millrace_api.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from millrace_api.training.v1.training_pb2_grpc import TrainingServiceStub
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError
from millrace_kit.settings import TlsSettings

from millrace.areas.serving import (
    PREDICT_TIMEOUT_S,
    Answer,
    answer_of,
    batch_request,
    predict_request,
    stream_requests,
)
from millrace.endpoints import Endpoints
from millrace.values import Scalar


class Client:
    """An asyncio client; use it as an asynchronous context manager inside a running event loop."""

    def __init__(
        self,
        endpoints: Endpoints | None = None,
        tls: TlsSettings | None = None,
        gateway_tls: TlsSettings | None = None,
    ) -> None:
        self.endpoints = endpoints or Endpoints.from_environment()
        self._channels: list[grpc.aio.Channel] = []

        def channel(address: str) -> grpc.aio.Channel:
            self._channels.append(open_channel(address, tls=gateway_tls if address == self.endpoints.gateway else tls))
            return self._channels[-1]

        at = self.endpoints
        self.ingestion = IngestionServiceStub(channel(at.ingestion))
        self.features = FeatureServiceStub(channel(at.feature))
        self.vectors = VectorServiceStub(channel(at.feature))
        self.registry = RegistryServiceStub(channel(at.registry))
        self.training = TrainingServiceStub(channel(at.training))
        self.drift = DriftServiceStub(channel(at.drift))
        self.rollout = RolloutServiceStub(channel(at.rollout))
        self.predictions = PredictionServiceStub(channel(at.gateway))
        self.gateway = GatewayServiceStub(channel(at.gateway_admin))

    async def predict(
        self,
        model: str,
        inputs: Mapping[str, Scalar | None],
        *,
        subject: str = "",
        event_time: datetime | None = None,
        sticky_key: str = "",
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> prediction.PredictResponse:
        """One prediction; `inputs` are the join keys and request-time fields of the model's feature service.

        Raises:
            MillraceError: the gateway refused or did not answer within `timeout_s`.
        """
        request = predict_request(model, inputs, subject=subject, event_time=event_time, sticky_key=sticky_key)
        try:
            answer: prediction.PredictResponse = await self.predictions.Predict(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return answer

    async def predict_batch(
        self,
        model: str,
        rows: Sequence[Mapping[str, Scalar | None]],
        *,
        subjects: Sequence[str] = (),
        timeout_s: float = PREDICT_TIMEOUT_S,
    ) -> list[Answer]:
        """An answer, or the error it failed with, for each of `rows` in their order.

        Raises:
            MillraceError: the gateway refused them all or did not answer within `timeout_s`.
        """
        request = batch_request(model, rows, subjects)
        try:
            answer: prediction.PredictBatchResponse = await self.predictions.PredictBatch(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return [answer_of(result) for result in answer.results]

    async def predict_stream(
        self, model: str, rows: Iterable[Mapping[str, Scalar | None]], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, Answer]]:
        """Position and answer of each of `rows`, as they become ready; rows are taken as fast as the gateway answers.

        Raises:
            MillraceError: the stream broke off.
        """
        call = self.predictions.PredictStream(stream_requests(model, rows), timeout=timeout_s)
        try:
            async for answer in call:
                yield int(answer.call_id), answer_of(answer.result)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        finally:
            call.cancel()

    async def online(self, request: feature.GetOnlineFeaturesRequest) -> feature.GetOnlineFeaturesResponse:
        """Online values of 1 to 1000 entity rows.

        Raises:
            MillraceError: the feature service refused or did not answer.
        """
        try:
            answer: feature.GetOnlineFeaturesResponse = await self.features.GetOnlineFeatures(request)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return answer

    async def write(self, batch: ingestion.RecordBatch) -> ingestion.WriteResponse:
        """Write one batch; returns once it is durable.

        Raises:
            MillraceError: the batch was not acknowledged; send the same batch again.
        """
        try:
            answer: ingestion.WriteResponse = await self.ingestion.Write(ingestion.WriteRequest(batch=batch))
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return answer

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
