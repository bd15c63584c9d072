"""Channels to other services: deadlines, traces, message sizes and TLS in one place."""

from pathlib import Path

import grpc
import grpc.aio
from opentelemetry.instrumentation.grpc import aio_client_interceptors

from millrace_kit.interceptors import StreamUnaryDeadline, UnaryDeadline
from millrace_kit.settings import TlsSettings

DEFAULT_TIMEOUT_S = 10.0


def channel_options(max_message_mib: int = 64) -> list[tuple[str, int]]:
    """Options every channel and server shares: message limits, keepalive, quick reconnects."""
    limit = max_message_mib * 1024 * 1024
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A restarted peer is found again within a second instead of gRPC's growing two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def open_channel(
    target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, tls: TlsSettings | None = None, max_message_mib: int = 64
) -> grpc.aio.Channel:
    """A channel to `target` (`host:port`) whose calls carry the trace and have a deadline of `timeout_s` unless they set one."""
    interceptors = [UnaryDeadline(timeout_s), StreamUnaryDeadline(timeout_s), *aio_client_interceptors()]  # type: ignore[no-untyped-call]
    options = channel_options(max_message_mib)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(
        Path(tls.ca_file).read_bytes(), Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()
    )
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)
