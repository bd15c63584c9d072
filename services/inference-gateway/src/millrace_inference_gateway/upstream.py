"""Predict's second call: the answer of the model, through Envoy's inner listener.

Lean on purpose: raw bytes where nobody needs the message, the trace passed on by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace_kit.call_lines import CallLines, Peer
from millrace_kit.telemetry import trace_headers

from millrace_inference_gateway.attribute_rules import OUTCOMES_HEADER
from millrace_inference_gateway.caller_key import BAGGAGE, with_key
from millrace_inference_gateway.envoy_mirrors import SAMPLED_HEADER
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
ENVOY = Peer("Envoy", "the model", "ENVOY_UNAVAILABLE", "MODEL_DEADLINE_EXCEEDED")
_MODEL_INFER = b"/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a model server answered."""

    body: bytes
    version: str
    digest: str


class ModelCaller:
    """The models, through Envoy."""

    def __init__(self, lines: CallLines) -> None:
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
