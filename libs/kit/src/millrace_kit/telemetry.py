"""Logs, traces and metrics, set up once per process.

Traces follow a request across gRPC (W3C `traceparent` metadata, by OpenTelemetry's own instrumentation) and across the bus
(the same header on messages). Metrics are Prometheus metrics on the HTTP endpoint of `probes`.
"""

import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import grpc
from opentelemetry import baggage, propagate, trace
from opentelemetry import context as span_context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from prometheus_client import Counter, Histogram

from millrace_kit.passing_traces import PassingTracers
from millrace_kit.probes import Probes, serve_probes
from millrace_kit.references import mask
from millrace_kit.settings import TelemetrySettings

RPC_SECONDS = Histogram(
    "millrace_rpc_server_duration_seconds",
    "Time to answer a call.",
    ["method", "code"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
# Finds the provider that `start_telemetry` sets at its first use.
_SERVER_TRACER = trace.get_tracer("millrace.server")
# Statuses that are the server's failure, by OpenTelemetry's conventions for gRPC.
_SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS,
    }
)  # fmt: skip
_BESIDE_PARENT = (("tracestate", b"tracestate"), ("baggage", b"baggage"))
_BESIDE = frozenset(header for _name, header in _BESIDE_PARENT)
# Of W3C's version 00; other versions are the propagators' affair.
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_ODD = frozenset(bytes((digit,)) for digit in b"13579bdf")
BUS_PUBLISHED = Counter("millrace_bus_messages_published_total", "Messages the bus acknowledged.", ["topic"])
BUS_CONSUMED = Counter("millrace_bus_messages_consumed_total", "Messages handed to a consumer.", ["topic"])
WORKER_FAILURES = Counter("millrace_worker_failures_total", "Times a background worker failed.", ["worker"])
WORKER_RETRIES = Counter(
    "millrace_worker_retries_total", "Times a worker started again because something did not answer.", ["worker"]
)


class JsonLinesExporter(SpanExporter):
    """Appends finished spans to a file, one JSON object a line: the single machine's trace store."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._lock = Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write `spans`; a full disk is reported, never raised into the service."""
        lines = [json.dumps(_span_fields(span)) for span in spans]
        try:
            with self._lock:
                self._file.write("\n".join(lines) + "\n")
                self._file.flush()
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        self._file.close()


def _span_fields(span: ReadableSpan) -> dict[str, object]:
    context = span.get_span_context()
    return {
        "service": span.resource.attributes.get("service.name"),
        "name": span.name,
        "kind": span.kind.name,
        "trace_id": trace.format_trace_id(context.trace_id) if context else "",
        "span_id": trace.format_span_id(context.span_id) if context else "",
        "parent_id": trace.format_span_id(span.parent.span_id) if span.parent else "",
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name,
        "attributes": {k: str(v) for k, v in (span.attributes or {}).items()},
    }


class _JsonLog(logging.Formatter):
    """One JSON object a line: time, level, logger, message, trace id, error; secrets of the settings are masked."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            fields["trace_id"] = trace.format_trace_id(context.trace_id)
        if record.exc_info:
            fields["error"] = mask(self.formatException(record.exc_info))
        return json.dumps(fields)


def start_telemetry(service: str, settings: TelemetrySettings, probes: Probes | None = None) -> str:
    """Set up logging to stderr, tracing and the HTTP endpoint for metrics and probes of this process.

    Args:
        service: name in logs and traces.
        settings: where signals go.
        probes: what `/livez` and `/readyz` answer; without them the process is never ready.

    Returns:
        The `host:port` of the endpoint.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLog(service))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.getLogger("kafka").setLevel(logging.WARNING)
    if not (settings.otlp_endpoint or settings.trace_file):
        trace.set_tracer_provider(PassingTracers(settings.sample_ratio))
        return serve_probes(settings.metrics_listen, probes or Probes())
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}), sampler=ParentBasedTraceIdRatio(settings.sample_ratio)
    )
    if settings.otlp_endpoint:
        # A fifth of a second of every start without it.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint, timeout=5)))
    if settings.trace_file:
        exporter = JsonLinesExporter(Path(settings.trace_file))
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=8192, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    return serve_probes(settings.metrics_listen, probes or Probes())


def stop_telemetry() -> None:
    """Send what is still buffered."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def trace_headers() -> dict[str, bytes]:
    """W3C trace context of the running span as message headers."""
    context = span_context.get_current()
    found = trace.get_current_span(context).get_span_context()
    if found.is_valid and not found.trace_state and not baggage.get_all(context):
        # Nearly every call; the propagators take ten times as long for the same text.
        return {"traceparent": b"00-%032x-%016x-%02x" % (found.trace_id, found.span_id, found.trace_flags)}
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {key: value.encode("ascii") for key, value in carrier.items()}


@contextmanager
def consumer_span(name: str, headers: dict[str, bytes]) -> Iterator[None]:
    """A span that continues the trace a message's headers carry."""
    carrier = {
        key: value.decode("ascii", "replace") for key, value in headers.items() if key in {"traceparent", "tracestate"}
    }
    tracer = trace.get_tracer("millrace.bus")
    with tracer.start_as_current_span(name, context=propagate.extract(carrier), kind=trace.SpanKind.CONSUMER):
        yield


def current_trace_id() -> str:
    """Hex trace id of the running span; empty outside one."""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""


def is_recorded(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a call's `headers` carry a trace that is recorded: the last field of W3C's traceparent holds flags, the lowest bit of which
    says so.
    """
    return headers.get(b"traceparent", b"")[-1:] in _ODD


def _parent(traceparent: bytes) -> span_context.Context | None:
    """What the propagators make of this header where it comes alone, in a fraction of their time; None where it is no trace."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    ids = int(found[1], 16), int(found[2], 16)
    flags = trace.TraceFlags(int(found[3], 16))
    parent = trace.SpanContext(*ids, is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(parent)) if parent.is_valid else None


@functools.lru_cache(maxsize=1024)
def _rpc_attributes(method: str) -> Mapping[str, str]:
    service, _, name = method[1:].partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


@contextmanager
def server_span(method: str, headers: Mapping[bytes, bytes]) -> Iterator[Callable[[grpc.StatusCode], None]]:
    """A span of one call this process answers, in the trace that `headers` carry; call what it gives with the status at the end.

    The same span as OpenTelemetry's own interceptor makes, for edges that are no gRPC server of the library.
    """
    parent = None
    traceparent = headers.get(b"traceparent")
    if traceparent is not None and traceparent.startswith(b"00-") and _BESIDE.isdisjoint(headers):
        parent = _parent(traceparent)
    elif traceparent is not None:
        carrier = {"traceparent": traceparent.decode("ascii", "replace")}
        for name, header in _BESIDE_PARENT:
            if (value := headers.get(header)) is not None:
                carrier[name] = value.decode("ascii", "replace")
        parent = propagate.extract(carrier)
    span = _SERVER_TRACER.start_span(
        method, context=parent, kind=trace.SpanKind.SERVER, attributes=_rpc_attributes(method)
    )
    token = span_context.attach(trace.set_span_in_context(span, parent))

    def ended(code: grpc.StatusCode) -> None:
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code in _SERVER_ERRORS:
            span.set_status(trace.StatusCode.ERROR, code.name)

    try:
        yield ended
    finally:
        span_context.detach(token)
        span.end()
