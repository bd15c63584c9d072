"""What is learned from answered requests beside the log: requests to warm servers up with, and answers to compare with a shadow's."""

from collections.abc import Callable

from millrace_inference_gateway.access_log import OK, InferenceCall
from millrace_inference_gateway.payload import message_bytes
from millrace_inference_gateway.request_samples import RequestSamples
from millrace_inference_gateway.shadow_pairs import ShadowPairs


class Answers:
    """Takes answered calls from the access log and from Predict."""

    def __init__(self, samples: RequestSamples, pairs: ShadowPairs, monotonic: Callable[[], float]) -> None:
        self._samples = samples
        self._pairs = pairs
        self._monotonic = monotonic

    def called(self, call: InferenceCall) -> None:
        """A client's V2 call was answered."""
        # Of V2 over HTTP nothing is kept: samples are replayed and compared as gRPC messages.
        if call.status == OK and call.request and call.http is None:
            self._samples.add(call.model, message_bytes(call.request), self._monotonic())
            self._pairs.answered(call.prediction_id, call.model, call.version, message_bytes(call.response))

    def copied(self, call: InferenceCall) -> None:
        """A copy was answered."""
        if call.status == OK and call.sampled:
            answer = message_bytes(call.response) if call.http is None else b""
            self._pairs.copied(call.prediction_id, call.model, call.version, answer, call.segment)

    def predicted(self, prediction_id: str, model: str, version: str, request: bytes, response: bytes) -> None:
        """A Predict was answered; the serialized request to the model and its answer."""
        self._samples.add(model, request, self._monotonic())
        self._pairs.answered(prediction_id, model, version, response)
