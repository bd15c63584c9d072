"""Predict's two calls: features from the feature service, the answer from the model through Envoy's inner listener.

Both are lean on purpose: raw bytes where nobody needs the message, several connections, the trace passed on by hand.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit.client import open_bare_channel, target_options
from millrace_kit.errors import InvalidArgumentError, MillraceError, UnavailableError
from millrace_kit.settings import TlsSettings
from millrace_kit.telemetry import trace_headers

from millrace_inference_gateway.predict import Vector, ordered
from millrace_inference_gateway.routes import Route

_GET_ONLINE_FEATURES = "/millrace_api.feature.v1.FeatureService/GetOnlineFeatures"
_MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_ROW = "rows[0].values"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a model server answered."""

    body: bytes
    version: str
    digest: str


class Channels:
    """Some connections to one place, used in turn."""

    def __init__(self, target: str, count: int, max_message_mib: int, tls: TlsSettings | None = None) -> None:
        # A pool of its own each, else gRPC would share one connection among them.
        options = [*target_options(target, max_message_mib), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [open_bare_channel(target, options, tls=tls) for _ in range(count)]

    def method(self, path: str, serialize: object = None, deserialize: object = None) -> "itertools.cycle[object]":
        """The method's callables, one a connection, in turn forever."""
        calls = [
            c.unary_unary(path, request_serializer=serialize, response_deserializer=deserialize) for c in self._channels
        ]
        return itertools.cycle(calls)

    async def close(self) -> None:
        """Disconnect."""
        for channel in self._channels:
            await channel.close()


class FeatureSource:
    """The feature service."""

    def __init__(self, channels: Channels) -> None:
        self._calls = channels.method(
            _GET_ONLINE_FEATURES,
            feature_pb2.GetOnlineFeaturesRequest.SerializeToString,
            feature_pb2.GetOnlineFeaturesResponse.FromString,
        )

    async def vector(
        self, route: Route, inputs: Mapping[str, common_pb2.Value], event_time: Timestamp | None, timeout_s: float
    ) -> Vector:
        """The model's features for `inputs` at `event_time`.

        Raises:
            InvalidArgumentError: an input is missing or wrong; names it as `inputs[…]`.
            UnavailableError: the feature service does not answer in time.
            MillraceError: any other answer of the feature service.
        """
        request = feature_pb2.GetOnlineFeaturesRequest(feature_service=route.feature_service)
        row = request.rows.add()
        for name, value in inputs.items():
            row.values[name].CopyFrom(value)
        if event_time is not None:
            request.event_time.CopyFrom(event_time)
        try:
            response = await next(self._calls)(request, timeout=timeout_s, metadata=_metadata())  # type: ignore[operator]
        except grpc.aio.AioRpcError as error:
            raise _feature_error(error, timeout_s) from None
        if len(response.vectors) != 1 or len(response.vectors[0].values) != len(response.feature_names):
            raise MillraceError(
                grpc.StatusCode.INTERNAL, "BAD_FEATURE_ANSWER", "the feature service did not answer one whole vector"
            )
        vector = response.vectors[0]
        values = ordered(route, response.feature_names, vector.values)
        return Vector(values, vector.max_age_ms, response.definitions_hash)


def _feature_error(error: grpc.aio.AioRpcError, timeout_s: float) -> MillraceError:
    found = MillraceError.from_rpc(error)
    if found.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        text = f"the feature service does not answer within {timeout_s * 1000:.0f} ms: {found.message}"
        return UnavailableError("FEATURE_SERVICE_UNAVAILABLE", text)
    if found.code is grpc.StatusCode.INVALID_ARGUMENT:
        # The caller wrote `inputs`; that is where the field is for it.
        field = found.metadata.get("field", _ROW)
        problem = found.message.removeprefix(f"{field}: ")
        return InvalidArgumentError(field.replace(_ROW, "inputs", 1), problem, found.reason)
    return found


class ModelCaller:
    """The models, through Envoy."""

    def __init__(self, channels: Channels) -> None:
        self._calls = channels.method(_MODEL_INFER)

    async def infer(
        self, route: Route, request: bytes, prediction_id: str, sticky: str, timeout_s: float
    ) -> ModelAnswer:
        """Call the version that Envoy picks.

        Raises:
            MillraceError: the model's or Envoy's error, as it came.
        """
        metadata = [*_metadata(), ("x-millrace-model", route.model), ("x-request-id", prediction_id)]
        if sticky and route.sticky_header:
            metadata.append((route.sticky_header, sticky))
        call = next(self._calls)(request, timeout=timeout_s, metadata=metadata)  # type: ignore[operator]
        try:
            body = await call
            headers = {key: value for key, value in await call.initial_metadata() if isinstance(value, str)}
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return ModelAnswer(body, headers.get("x-millrace-version", ""), headers.get("x-millrace-digest", ""))


def _metadata() -> list[tuple[str, str]]:
    return [(key, value.decode("ascii")) for key, value in trace_headers().items()]
