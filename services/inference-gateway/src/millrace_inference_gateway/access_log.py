"""Envoy's access log as values: what happened to each inference call, for the figures and the prediction log.

Envoy writes one line of JSON a call, `{"v": [...]}`, with the fields of `FORMAT` in that order; a field it does not know is null.
Operators of the format: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/observability/access_log/usage
"""

import base64
import binascii
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache

import msgspec

from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.envoy_actions import PINNED, PRIORITY_HEADER
from millrace_inference_gateway.envoy_mirrors import MODEL_HEADER
from millrace_inference_gateway.routes import cluster_arm
from millrace_inference_gateway.v2_bodies import HttpForm, HttpForms

UNKNOWN, UNAVAILABLE, OK = 2, 14, 0
CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 1, 3, 4
NAMESPACE = "millrace"
VERSION_HEADER = "x-millrace-version"
REFUSED_HEADER = "x-millrace-refused"
"""In which Envoy's scripts say why they turn a call away."""
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
NO_HEALTHY_SERVER, OVERFLOW, RATE_LIMITED, CONNECTION_FAILED = "UH", "UO", "RL", "UF"
# Downstream connection ended, downstream reset.
GIVEN_UP = frozenset({"DC", "DR"})
MAX_ARMS = 4096
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Line(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One line as Envoy wrote it."""

    listener: str = ""
    start_ns: str = ""
    """Unix time."""
    took_us: int | None = None
    """From the first byte of the request to the last of the answer; null where there was no answer."""
    duration_ms: int | None = None
    """The whole call, however it ended."""
    upstream_us: int | None = None
    """From the first byte sent to a server to the last one it answered."""
    request_id: str | None = None
    route: str | None = None
    cluster: str | None = None
    server: str | None = None
    """host:port."""
    flags: str | None = None
    """Short names with commas between, `-` for none."""
    code: int | None = None
    """HTTP status; 0 without an answer."""
    details: str | None = None
    header_status: str | None = None
    trailer_status: str | None = None
    version: str | None = None
    digest: str | None = None
    refused: str | None = None
    response_json_bytes: str | None = None
    response_encoding: str | None = None
    path: str | None = None
    subject: str | None = None
    event_time: str | None = None
    model: str | None = None
    client: str | None = None
    priority: str | None = None
    traceparent: str | None = None
    request_json_bytes: str | None = None
    request_encoding: str | None = None
    request: str | None = None
    """Base64 of a sampled body."""
    response: str | None = None
    segment: str | None = None
    sampled: str | None = None

    @property
    def has_flags(self) -> Sequence[str]:
        """The flags."""
        return () if self.flags in {None, "-"} else str(self.flags).split(",")

    @property
    def is_http(self) -> bool:
        """Whether the call came by V2 over HTTP."""
        return self.path is not None and self.path.startswith("/v2/")


def _request(name: str) -> str:
    return f"%REQ({name})%"


def _response(name: str) -> str:
    return f"%RESP({name})%"


def _kept(name: str) -> str:
    return f"%DYNAMIC_METADATA({NAMESPACE}:{name})%"


_OPERATORS = {
    "start_ns": "%START_TIME(%s%9f)%",
    "took_us": "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%",
    "duration_ms": "%DURATION%",
    "upstream_us": "%COMMON_DURATION(US_TX_BEG:US_RX_END:us)%",
    "request_id": _request("x-request-id"),
    "route": "%ROUTE_NAME%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "server": "%UPSTREAM_REMOTE_ADDRESS%",
    "flags": "%RESPONSE_FLAGS%",
    "code": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "header_status": _response("grpc-status"),
    "trailer_status": "%TRAILER(grpc-status)%",
    "version": _response(VERSION_HEADER),
    "digest": _response("x-millrace-digest"),
    "refused": _response(REFUSED_HEADER),
    "response_json_bytes": _response(JSON_BYTES_HEADER),
    "response_encoding": _response("content-encoding"),
    "path": _request(":path"),
    "subject": _request("x-millrace-subject"),
    "event_time": _request("x-millrace-event-time"),
    "model": _request(MODEL_HEADER),
    "client": _request(CLIENT_HEADER),
    "priority": _request(PRIORITY_HEADER),
    "traceparent": _request("traceparent"),
    "request_json_bytes": _request(JSON_BYTES_HEADER),
    "request_encoding": _request("content-encoding"),
    "request": _kept("request"),
    "response": _kept("response"),
    "segment": _kept("segment"),
    "sampled": _kept("sampled"),
}


def line_format(listener: str) -> dict[str, list[str]]:
    """Envoy's `json_format` for the calls of one listener; a plain text among the operators stands for itself."""
    return {"v": [listener if name == "listener" else _OPERATORS[name] for name in Line.__struct_fields__]}


class _Document(msgspec.Struct, gc=False, frozen=True):
    v: Line


_decode = msgspec.json.Decoder(_Document).decode


def read_line(text: bytes) -> Line:
    """One line of the log.

    Raises:
        ValueError: it is none.
    """
    return _decode(text).v


class InferenceCall(msgspec.Struct, frozen=True, gc=False):
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


def read_call(line: Line) -> InferenceCall | None:
    """The call behind a line; None when no version was meant to answer it.

    Raises:
        ValueError: a field is not what Envoy writes.
    """
    arm = _arm(line)
    if arm is None:
        return None
    trace = _TRACE.fullmatch(line.traceparent) if line.traceparent else None
    took_us = line.took_us if line.took_us is not None else (line.duration_ms or 0) * 1000
    finished_ns = int(line.start_ns) + took_us * 1000
    route = line.route or ""
    return InferenceCall(
        prediction_id=line.request_id or "",
        model=arm[0],
        version=arm[1],
        digest=line.digest or "",
        status=_status(line),
        latency_ms=(line.upstream_us if line.upstream_us is not None else took_us) / 1e3,
        finished_ns=finished_ns,
        subject=line.subject[:MAX_SUBJECT] if line.subject else "",
        event_time_ns=_time_ns(line.event_time, finished_ns) if line.event_time else finished_ns,
        trace_id=trace[1] if trace else "",
        request=_payload(line.request) if line.request else b"",
        response=_payload(line.response) if line.response else b"",
        segment=line.segment or "",
        sampled=bool(line.sampled),
        server=_server(line.cluster or "", line.server) if line.server else None,
        client=line.client[:MAX_CLIENT] if line.client else "",
        pinned=route.partition("/")[2].startswith(f"{PINNED}/"),
        unary=not route.endswith("stream"),
        http=_forms(line) if line.is_http else None,
    )


@lru_cache(MAX_ARMS)
def _cluster_arm(cluster: str) -> tuple[str, str] | None:
    return cluster_arm(cluster)


def _arm(line: Line) -> tuple[str, str] | None:
    """Model and version. Envoy names a cluster only with a server; a version without a healthy one fails its calls all the same.

    Only that failure is told by headers: a refused caller's answer has the version's headers too, and is not the version's fault.
    """
    if line.cluster or NO_HEALTHY_SERVER not in line.has_flags:
        return _cluster_arm(line.cluster or "")
    # Routes of copies have the name of their only cluster.
    named = (line.model, line.version) if line.model and line.version else None
    return _cluster_arm(line.route or "") or named


@lru_cache(MAX_ARMS)
def _server(cluster: str, address: str) -> tuple[str, str, int] | None:
    arm = cluster_arm(cluster)
    host, _, port = address.rpartition(":")
    if arm is None or not host or not port.isascii() or not port.isdigit():
        return None
    by_http = cluster.startswith("http/")
    return f"arm/{arm[0]}/{arm[1]}", host.removeprefix("[").removesuffix("]"), int(port) + by_http


def _status(line: Line) -> int:
    text = line.trailer_status or line.header_status or ""
    if text.isascii() and text.isdigit() and len(text) <= 2:
        return int(text)
    if GIVEN_UP.intersection(line.has_flags):
        return CANCELLED
    code = line.code or 0
    if line.is_http:
        return HTTP_STATUSES.get(code, UNKNOWN)
    return UNAVAILABLE if code in {0, 502, 503, 504} else UNKNOWN


def _time_ns(text: str, otherwise: int) -> int:
    try:
        found = datetime.fromisoformat(text)
        aware = found if found.tzinfo else found.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1000) * 1_000_000
    except (ValueError, OverflowError):
        return otherwise


def _forms(line: Line) -> HttpForms:
    return HttpForms(
        _form(line.request_json_bytes, line.request_encoding), _form(line.response_json_bytes, line.response_encoding)
    )


def _form(size: str | None, encoding: str | None) -> HttpForm:
    size = size or ""
    json_bytes = int(size) if size.isascii() and size.isdigit() and len(size) < MAX_DIGITS else 0
    return HttpForm(json_bytes, encoding or "")


def _payload(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
