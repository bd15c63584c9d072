"""Takes Envoy's access log (ALS) and feeds the figures and the prediction log."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Container

import grpc
import grpc.aio
from envoy.service.accesslog.v3 import als_pb2

from millrace_inference_gateway.access_log import DEADLINE_EXCEEDED, INVALID_ARGUMENT, OK, InferenceCall, read_entry
from millrace_inference_gateway.answers import Answers
from millrace_inference_gateway.client_refusals import INVALID, count_client
from millrace_inference_gateway.concurrency_limits import ConcurrencyLimits
from millrace_inference_gateway.envoy_bootstrap import PUBLIC
from millrace_inference_gateway.envoy_mirrors import MIRROR_LISTENER
from millrace_inference_gateway.figures import Figures
from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.ledger import instance_key
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.refusals import count_refusal, has_unknown_key, is_low, read_refusal

log = logging.getLogger(__name__)

SERVICE = "envoy.service.accesslog.v3.AccessLogService"


class AccessLogReceiver:
    """The `AccessLogService` Envoy calls."""

    def __init__(
        self,
        figures: Figures,
        log_: PredictionLog,
        answers: Answers,
        weights: LatencyWeights,
        *,
        limits: ConcurrencyLimits,
        models: Callable[[], Container[str]],
        unknown_key: Callable[[], None] = lambda: None,
    ) -> None:
        self._figures = figures
        self._log = log_
        self._answers = answers
        self._weights = weights
        self._limits = limits
        self._models = models
        self._unknown_key = unknown_key
        self._closing = asyncio.Event()

    async def watch_stop(self, stop: asyncio.Event) -> None:
        """End the streams at shutdown; Envoy never does by itself."""
        await stop.wait()
        self._closing.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The method, as a stream both ways: on the wire the same, and without a deadline of its own."""
        method = grpc.stream_stream_rpc_method_handler(
            self.stream,
            request_deserializer=als_pb2.StreamAccessLogsMessage.FromString,
            response_serializer=als_pb2.StreamAccessLogsResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": method})

    async def stream(
        self, messages: AsyncIterator[als_pb2.StreamAccessLogsMessage], _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[als_pb2.StreamAccessLogsResponse]:
        """Take one stream until Envoy or this process ends."""
        instance, path = 0, ""
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while True:
                message = asyncio.ensure_future(anext(messages, None))
                await asyncio.wait({message, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    break
                found = message.result()
                if found is None:
                    break
                # Only the first message of a stream says whose it is.
                if found.HasField("identifier"):
                    instance, path = instance_key(found.identifier.node.id), found.identifier.log_name
                self.take(found, instance, path)
        finally:
            closing.cancel()
        # An Envoy that went away takes no answer.
        if self._closing.is_set():
            yield als_pb2.StreamAccessLogsResponse()

    def take(self, message: als_pb2.StreamAccessLogsMessage, instance: int, path: str) -> None:
        """Count and log the calls of one message."""
        answered: list[InferenceCall] = []
        for entry in message.http_logs.log_entry:
            if (refusal := read_refusal(entry)) is not None:
                if path != MIRROR_LISTENER:
                    count_refusal(refusal, self._models)
                if has_unknown_key(entry):
                    self._unknown_key()
                continue
            try:
                call = read_entry(entry)
            except (ValueError, OverflowError) as error:
                log.warning("an access-log entry cannot be read: %s", error)
                call = None
            if call is None:
                continue
            if not call.pinned:
                # Who chose a version says nothing about it: testers call what is broken on purpose.
                self._figures.record(call.model, call.version, call.status, call.latency_ms)
            if path == PUBLIC and call.status == INVALID_ARGUMENT:
                count_client(call.client, INVALID)
            if call.server is not None and call.status == OK:
                self._weights.record(call.server, call.latency_ms)
            # What was given up or failed at once says nothing of how fast a version is.
            if call.server and call.unary and call.status in {OK, DEADLINE_EXCEEDED} and path != MIRROR_LISTENER:
                self._limits.record(call.model, call.version, call.latency_ms, low=is_low(entry))
            if path == MIRROR_LISTENER:
                self._answers.copied(call)
            elif call.status == OK and path == PUBLIC:
                self._answers.called(call)
                answered.append(call)
        if answered:
            self._log.write_calls(answered, instance)
