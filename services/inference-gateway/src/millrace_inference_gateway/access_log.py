"""Envoy's access log as values: what happened to each inference call, for the figures and the prediction log."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from envoy.data.accesslog.v3 import accesslog_pb2
from google.protobuf.duration_pb2 import Duration

from millrace_inference_gateway.payload import HttpForm, HttpForms
from millrace_inference_gateway.routes import cluster_arm

UNKNOWN, UNAVAILABLE, OK = 2, 14, 0
CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 1, 3, 4
NAMESPACE = "millrace"
MODEL_HEADER = "x-millrace-model"
VERSION_HEADER = "x-millrace-version"
# What Triton means by its statuses, as gRPC says it; what is not here is UNKNOWN.
HTTP_STATUSES = {
    200: OK, 400: 3, 401: 16, 403: 7, 404: 5, 413: 3, 415: 3, 429: 8, 499: CANCELLED, 500: 13, 501: 12, 0: UNAVAILABLE, 502: UNAVAILABLE,
    503: UNAVAILABLE, 504: 4,
}  # fmt: skip
# Bytes of JSON at the head of a body of V2 over HTTP; tensors follow.
JSON_BYTES_HEADER = "inference-header-content-length"
MAX_DIGITS = 10
MAX_CLIENT = 256
# A batch names one subject a row.
MAX_SUBJECT = 16_384
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class InferenceCall:
    """One finished call to a model, answered by a server or by none because its version had none."""

    prediction_id: str
    model: str
    version: str
    digest: str
    status: int
    """gRPC status."""
    latency_ms: float
    """From the first byte sent to the model server to the last byte it answered; without an answer, the whole call."""
    finished_ns: int
    """Unix time."""
    subject: str
    event_time_ns: int
    """Unix time; when the caller gave none, that of the answer."""
    trace_id: str
    request: bytes
    """Body, when it was sampled, else empty."""
    response: bytes
    server: tuple[str, str, int] | None = None
    """Cluster of the version, host and gRPC port of the server that answered."""
    client: str = ""
    """Who called, where the gateway asks."""
    pinned: bool = False
    """Whether the caller chose the version."""
    segment: str = ""
    """Of a copy: value of the route's segment header."""
    sampled: bool = False
    """Of a copy: its answer was to be kept."""
    unary: bool = True
    """Whether it had one answer, so that its latency says how fast the version is."""
    http: HttpForms | None = None
    """Of a call by HTTP, how to read its bodies; None for gRPC."""


def read_entry(entry: accesslog_pb2.HTTPAccessLogEntry) -> InferenceCall | None:
    """The call behind an entry; None when no version was meant to answer it."""
    common = entry.common_properties
    arm = _arm(entry)
    if arm is None:
        return None
    headers = entry.request.request_headers
    trace = _TRACE.fullmatch(headers.get("traceparent", ""))
    start, took = common.start_time, common.duration
    finished_ns = (start.seconds + took.seconds) * 1_000_000_000 + start.nanos + took.nanos
    return InferenceCall(
        prediction_id=entry.request.request_id,
        model=arm[0],
        version=arm[1],
        digest=entry.response.response_headers.get("x-millrace-digest", ""),
        status=_status(entry),
        latency_ms=_latency_ms(common),
        finished_ns=finished_ns,
        subject=headers.get("x-millrace-subject", "")[:MAX_SUBJECT],
        event_time_ns=_time_ns(headers.get("x-millrace-event-time", ""), finished_ns),
        trace_id=trace[1] if trace else "",
        request=_payload(common, "request"),
        response=_payload(common, "response"),
        segment=_text(common, "segment"),
        sampled=bool(_text(common, "sampled")),
        server=_server(common, arm),
        client=headers.get("x-millrace-client", "")[:MAX_CLIENT],
        pinned=common.route_name.partition("/")[2].startswith("pinned/"),
        unary=not common.route_name.endswith("stream"),
        http=HttpForms(_form(headers), _form(entry.response.response_headers)) if is_http(entry) else None,
    )


def _arm(entry: accesslog_pb2.HTTPAccessLogEntry) -> tuple[str, str] | None:
    """Model and version. Envoy names a cluster only with a server; a version without a healthy one fails its calls all the same.

    Only that failure is told by headers: a refused caller's answer has the version's headers too, and is not the version's fault.
    """
    common = entry.common_properties
    if common.upstream_cluster or not common.response_flags.no_healthy_upstream:
        return cluster_arm(common.upstream_cluster)
    model = entry.request.request_headers.get(MODEL_HEADER, "")
    version = entry.response.response_headers.get(VERSION_HEADER, "")
    # Routes of copies have the name of their only cluster.
    return cluster_arm(common.route_name) or ((model, version) if model and version else None)


def _server(common: accesslog_pb2.AccessLogCommon, arm: tuple[str, str]) -> tuple[str, str, int] | None:
    place = common.upstream_remote_address.socket_address
    if not place.address:
        return None
    by_http = common.upstream_cluster.startswith("http/")
    return f"arm/{arm[0]}/{arm[1]}", place.address, place.port_value + by_http


def _status(entry: accesslog_pb2.HTTPAccessLogEntry) -> int:
    text = entry.response.response_trailers.get("grpc-status") or entry.response.response_headers.get("grpc-status", "")
    if text.isascii() and text.isdigit() and len(text) <= 2:
        return int(text)
    flags = entry.common_properties.response_flags
    if flags.downstream_connection_termination or flags.downstream_remote_reset:
        return CANCELLED
    code = entry.response.response_code.value
    if is_http(entry):
        return HTTP_STATUSES.get(code, UNKNOWN)
    return UNAVAILABLE if code in {0, 502, 503, 504} else UNKNOWN


def is_http(entry: accesslog_pb2.HTTPAccessLogEntry) -> bool:
    """Whether the call came by V2 over HTTP."""
    return str(entry.request.path).startswith("/v2/")


def _latency_ms(common: accesslog_pb2.AccessLogCommon) -> float:
    if common.HasField("time_to_last_upstream_rx_byte") and common.HasField("time_to_first_upstream_tx_byte"):
        return _ms(common.time_to_last_upstream_rx_byte) - _ms(common.time_to_first_upstream_tx_byte)
    return _ms(common.duration)


def _ms(value: Duration) -> float:
    return value.seconds * 1e3 + value.nanos / 1e6


def _time_ns(text: str, otherwise: int) -> int:
    if not text:
        return otherwise
    try:
        found = datetime.fromisoformat(text)
        aware = found if found.tzinfo else found.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1000) * 1_000_000
    except (ValueError, OverflowError):
        return otherwise


def _form(headers: Mapping[str, str]) -> HttpForm:
    size = headers.get(JSON_BYTES_HEADER, "")
    json_bytes = int(size) if size.isascii() and size.isdigit() and len(size) < MAX_DIGITS else 0
    return HttpForm(json_bytes, headers.get("content-encoding", ""))


def _text(common: accesslog_pb2.AccessLogCommon, key: str) -> str:
    if NAMESPACE not in common.metadata.filter_metadata:
        return ""
    fields = common.metadata.filter_metadata[NAMESPACE].fields
    return fields[key].string_value if key in fields else ""


def _payload(common: accesslog_pb2.AccessLogCommon, key: str) -> bytes:
    try:
        return base64.b64decode(_text(common, key), validate=True)
    except (binascii.Error, ValueError):
        return b""
