"""Traces in a process that exports none: ids are made, followed and passed on as ever, and nothing is recorded for nobody."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as span_context
from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.util import types


class PassingTracers(trace.TracerProvider):
    """In the place of the SDK's provider.

    Args:
        sample_ratio: share of the traces begun here that others shall record; a caller's decision is kept.
    """

    def __init__(self, sample_ratio: float) -> None:
        self._tracer = _PassingTracer(sample_ratio)

    def get_tracer(self, *_given: Any, **_named: Any) -> trace.Tracer:
        """The same for everybody."""
        return self._tracer


class _PassingTracer(trace.Tracer):
    def __init__(self, sample_ratio: float) -> None:
        self._ids = RandomIdGenerator()
        self._sampler = TraceIdRatioBased(sample_ratio)

    def start_span(
        self, name: str, context: span_context.Context | None = None, *_given: Any, **_named: Any
    ) -> trace.Span:
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
        else:
            trace_id, state = self._ids.generate_trace_id(), trace.TraceState()
            sampled = self._sampler.should_sample(None, trace_id, name).decision is Decision.RECORD_AND_SAMPLE
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
        made = trace.SpanContext(
            trace_id, self._ids.generate_span_id(), is_remote=False, trace_flags=flags, trace_state=state
        )
        return trace.NonRecordingSpan(made)

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # a plain context manager is all that anybody uses here
        self,
        name: str,
        context: span_context.Context | None = None,
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
        attributes: types.Attributes = None,
        links: Sequence[trace.Link] | None = None,
        *_given: Any,
        **_named: Any,
    ) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(name, context, kind, attributes, links)) as span:
            yield span
