"""What is learned from answered requests beside the log: requests to warm servers up with, and answers to compare with a shadow's."""

from collections.abc import Callable

from google.protobuf.message import Message

from millrace_inference_gateway.access_log import OK, InferenceCall
from millrace_inference_gateway.request_samples import RequestSamples
from millrace_inference_gateway.shadow_pairs import ShadowPairs
from millrace_inference_gateway.v2_bodies import request_message, response_message


class Answers:
    """Takes answered calls from the access log and from Predict."""

    def __init__(self, samples: RequestSamples, pairs: ShadowPairs, monotonic: Callable[[], float]) -> None:
        self._samples = samples
        self._pairs = pairs
        self._monotonic = monotonic

    def called(self, call: InferenceCall) -> None:
        """A client's V2 call was answered."""
        if call.status != OK or not call.request:
            return
        now_s = self._monotonic()
        if self._samples.wants(call.model, now_s):
            request = request_message(call.request, call.model, call.http.request if call.http else None)
            self._samples.add(call.model, _bytes(request), now_s)
        if self._pairs.wants(call.model):
            answer = response_message(call.response, call.http.response if call.http else None)
            self._pairs.answered(call.prediction_id, call.model, call.version, _bytes(answer))

    def copied(self, call: InferenceCall) -> None:
        """A copy was answered."""
        if call.status == OK and call.sampled:
            answer = response_message(call.response, call.http.response if call.http else None)
            self._pairs.copied(call.prediction_id, call.model, call.version, _bytes(answer), call.segment)

    def predicted(self, prediction_id: str, model: str, version: str, request: bytes, response: bytes) -> None:
        """A Predict was answered; the serialized request to the model and its answer."""
        self._samples.add(model, request, self._monotonic())
        self._pairs.answered(prediction_id, model, version, response)


def _bytes(message: Message | None) -> bytes:
    return b"" if message is None else message.SerializeToString()
