"""gRPC's unary calls over HTTP/1.1 as bytes: frames, time-outs, statuses.

A unary call can be one plain request with one plain answer: between Envoy, which translates between HTTP versions with gRPC's trailers
included, and a process, and between two processes of ours (`call_lines`, `call_door`). That costs a fifth of what a gRPC library in
Python takes for it.
"""

import base64
import struct
import zlib
from collections.abc import Mapping
from urllib.parse import quote, unquote

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from millrace_kit.errors import InvalidArgumentError, MillraceError, ResourceExhaustedError

_PREFIX = struct.Struct(">BI")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_TIMEOUT_DIGITS = 8
_CODES: Mapping[str, grpc.StatusCode] = {str(code.value[0]): code for code in grpc.StatusCode}
_OK_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
_OK_TAIL = b"\r\n0\r\ngrpc-status: 0\r\n\r\n"
# What a proxy's own HTTP status means for a call that has no gRPC status (gRPC's http-grpc-status-mapping).
_HTTP_CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INTERNAL, 401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED, 429: grpc.StatusCode.UNAVAILABLE, 502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.UNAVAILABLE,
}  # fmt: skip


def framed(message: bytes) -> bytes:
    """One message as the body of a call."""
    return _PREFIX.pack(0, len(message)) + message


def unframed(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """The one message of a body; `encoding` is the call's `grpc-encoding`.

    Raises:
        InvalidArgumentError: the body is not one whole message.
        ResourceExhaustedError: the message is larger than `max_bytes`.
        MillraceError: it is compressed in a way nobody here knows (UNIMPLEMENTED).
    """
    if len(body) < _PREFIX.size or _PREFIX.unpack_from(body)[1] != len(body) - _PREFIX.size or body[0] > 1:
        raise InvalidArgumentError("request", "is not one gRPC message")
    message = body[_PREFIX.size :]
    if body[0] == 0 or encoding == b"identity":
        return message
    if encoding not in {b"gzip", b"deflate"}:
        name = encoding.decode("ascii", "replace")
        text = f"no compression {name!r}; gzip, deflate and identity are taken"
        raise MillraceError(grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_COMPRESSION", text, {"encoding": name})
    unpacker = zlib.decompressobj(47)
    try:
        found = unpacker.decompress(message, max_bytes)
    except zlib.error as error:
        raise InvalidArgumentError("request", f"is not {encoding.decode()}: {error}") from None
    if not unpacker.eof and len(found) >= max_bytes:
        raise ResourceExhaustedError("max_message_mib", f"the message is larger than {max_bytes} bytes")
    if not unpacker.eof:
        raise InvalidArgumentError("request", f"is not whole {encoding.decode()}")
    return found


def timeout_s(header: bytes) -> float | None:
    """Seconds of a `grpc-timeout`; None for none.

    Raises:
        InvalidArgumentError: it is no time.
    """
    if not header:
        return None
    text = header.decode("ascii", "replace")
    digits, unit = text[:-1], text[-1]
    if unit not in _UNITS_S or not digits.isascii() or not digits.isdigit() or len(digits) > _MAX_TIMEOUT_DIGITS:
        raise InvalidArgumentError("grpc-timeout", f"{text[:20]!r} is no time")
    return int(digits) * _UNITS_S[unit]


def timeout_header(seconds: float) -> bytes:
    """`seconds` as a `grpc-timeout`, in whole milliseconds, at least one."""
    return b"%dm" % min(99_999_999, max(1, round(seconds * 1000)))


def ok_answer(message: bytes) -> bytes:
    """The HTTP answer of a call that went well: the message, and the status as a trailer."""
    return b"%b%x\r\n%b%b%b" % (
        _OK_HEAD,
        _PREFIX.size + len(message),
        _PREFIX.pack(0, len(message)),
        message,
        _OK_TAIL,
    )


def closing(answer: bytes) -> bytes:
    """`answer`, telling the caller that no other comes over its connection."""
    return answer.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)


def error_answer(error: MillraceError) -> bytes:
    """The HTTP answer of a call that failed: headers alone, which HTTP/2 turns into trailers."""
    details = base64.b64encode(error.to_status().SerializeToString()).rstrip(b"=")
    message = quote(error.message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode("ascii")
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ncontent-length: 0\r\ngrpc-status: %d\r\n"
        b"grpc-message: %b\r\ngrpc-status-details-bin: %b\r\n\r\n" % (error.code.value[0], message, details)
    )


def status_error(http_status: int, headers: Mapping[bytes, bytes]) -> MillraceError | None:
    """What an answer's headers and trailers say went wrong; None when nothing did."""
    number = headers.get(b"grpc-status", b"").decode("ascii", "replace")
    if number == "0":
        return None
    code = _CODES.get(number)
    if code is None:
        code = _HTTP_CODES.get(http_status, grpc.StatusCode.UNKNOWN)
    message = unquote(headers.get(b"grpc-message", b"").decode("ascii", "replace")) or code.name
    info = _info(headers.get(b"grpc-status-details-bin", b""))
    if info is None:
        return MillraceError(code, f"RPC_{code.name}", message)
    return MillraceError(code, info.reason, message, dict(info.metadata))


def _info(header: bytes) -> error_details_pb2.ErrorInfo | None:
    try:
        status = status_pb2.Status.FromString(base64.b64decode(header + b"=" * (-len(header) % 4)))
    except (ValueError, DecodeError):
        return None
    info = error_details_pb2.ErrorInfo()
    for packed in status.details:
        if packed.Is(info.DESCRIPTOR) and packed.Unpack(info):
            return info
    return None
