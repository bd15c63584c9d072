"""Predict's second call: the answer of the model, through Envoy's inner listener; and the connections of the first.

Lean on purpose: raw bytes where nobody needs the message, several connections, the trace passed on by hand.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from millrace_kit.client import open_bare_channel, target_options
from millrace_kit.settings import TlsSettings
from millrace_kit.telemetry import trace_headers

from millrace_inference_gateway.attribute_rules import OUTCOMES_HEADER
from millrace_inference_gateway.caller_key import BAGGAGE, with_key
from millrace_inference_gateway.envoy_mirrors import SAMPLED_HEADER
from millrace_inference_gateway.model_lines import ModelLines
from millrace_inference_gateway.routes import Route

Headers = Mapping[bytes, bytes]

# What Envoy adds to a request by itself, and what this process sets.
_NOT_PASSED_ON = (
    b"x-envoy-",
    b"x-forwarded-",
    b"x-request-id",
    b"x-millrace-model",
    b"x-api-key",
    SAMPLED_HEADER.encode(),
    OUTCOMES_HEADER.encode(),
)
_MODEL_INFER = b"/inference.GRPCInferenceService/ModelInfer"


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


class ModelCaller:
    """The models, through Envoy."""

    def __init__(self, lines: ModelLines) -> None:
        self._lines = lines

    async def infer(
        self, route: Route, request: bytes, prediction_id: str, sticky: str, *, headers: Headers, timeout_s: float
    ) -> ModelAnswer:
        """Call the version that Envoy picks; `headers` are the caller's, for rules and rights.

        Raises:
            MillraceError: the model's or Envoy's error, as it came.
        """
        metadata = [
            *((key.encode(), value) for key, value in trace_headers().items() if key.encode() not in headers),
            (b"x-millrace-model", route.model.encode()),
            (b"x-request-id", prediction_id.encode()),
        ]
        if any(arm.mirror for arm in route.arms):
            metadata.append((SAMPLED_HEADER.encode(), b"1"))
        header = route.sticky_header.encode()
        given = dict(headers)
        if sticky and header:
            given[header] = sticky.encode()
        if sticky:
            given[BAGGAGE] = with_key(given.get(BAGGAGE, b""), sticky)
        body, found = await self._lines.call(_MODEL_INFER, [*metadata, *given.items()], request, timeout_s)
        return ModelAnswer(
            body, found.get(b"x-millrace-version", b"").decode(), found.get(b"x-millrace-digest", b"").decode()
        )


def passed_on(headers: Headers) -> Headers:
    """Of a caller's headers, those that rules may read and rights go by: they come with the model call too."""
    return {
        name: value
        for name, value in headers.items()
        if name == BAGGAGE or (name.startswith(b"x-") and not name.startswith(_NOT_PASSED_ON))
    }


def trace_metadata() -> list[tuple[str, str]]:
    """The trace under way as gRPC metadata."""
    return [(key, value.decode("ascii")) for key, value in trace_headers().items()]
