"""Feeds the figures and the prediction log from Envoy's access log."""

import logging
from collections.abc import Callable, Container, Sequence

from millrace_inference_gateway.access_log import (
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    OK,
    InferenceCall,
    Line,
    read_call,
)
from millrace_inference_gateway.answers import Answers
from millrace_inference_gateway.client_refusals import INVALID, count_client
from millrace_inference_gateway.concurrency_limits import ConcurrencyLimits
from millrace_inference_gateway.envoy_bootstrap import PUBLIC
from millrace_inference_gateway.envoy_mirrors import MIRROR_LISTENER
from millrace_inference_gateway.figures import Figures
from millrace_inference_gateway.journal import LogPosition
from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.refusals import count_refusal, has_unknown_key, is_low, read_refusal

log = logging.getLogger(__name__)


class AccessLogReader:
    """What is made of the lines."""

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

    def take(self, lines: Sequence[Line], position: LogPosition) -> None:
        """Count and log calls; `position` is where the log goes on after them."""
        answered = [call for line in lines if (call := self._count(line)) is not None]
        if answered:
            self._log.write_calls(answered, position)

    def _count(self, line: Line) -> InferenceCall | None:
        """Count the call of one line; gives it when the prediction log has to have it."""
        path = line.listener
        if (refusal := read_refusal(line)) is not None:
            if path != MIRROR_LISTENER:
                count_refusal(refusal, self._models)
            if has_unknown_key(line):
                self._unknown_key()
            return None
        try:
            call = read_call(line)
        except (ValueError, OverflowError) as error:
            log.warning("a line of the access log cannot be read: %s", error)
            return None
        if call is None:
            return None
        if not call.pinned:
            # Who chose a version says nothing about it: testers call what is broken on purpose.
            self._figures.record(call.model, call.version, call.status, call.latency_ms)
        if path == PUBLIC and call.status == INVALID_ARGUMENT:
            count_client(call.client, INVALID)
        if call.server is not None and call.status == OK:
            self._weights.record(call.server, call.latency_ms)
        # What was given up or failed at once says nothing of how fast a version is.
        if call.server and call.unary and call.status in {OK, DEADLINE_EXCEEDED} and path != MIRROR_LISTENER:
            self._limits.record(call.model, call.version, call.latency_ms, low=is_low(line))
        if path == MIRROR_LISTENER:
            self._answers.copied(call)
        elif call.status == OK and path == PUBLIC:
            self._answers.called(call)
            return call
        return None
