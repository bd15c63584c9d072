"""Channels to other services: deadlines, traces, message sizes and TLS in one place."""

import json
from collections.abc import Callable, Sequence

import grpc
import grpc.aio
from opentelemetry.instrumentation.grpc import aio_client_interceptors

from millrace_kit.interceptors import StreamUnaryDeadline, UnaryDeadline
from millrace_kit.reloading import AioReloadingChannel, ReloadingChannel
from millrace_kit.settings import TlsSettings
from millrace_kit.tls import CertificateFiles

DEFAULT_TIMEOUT_S = 10.0
# A target of this scheme is a name with an address per replica (a headless Service): calls go to all of them in turn.
DNS_SCHEME = "dns:///"
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


def channel_options(max_message_mib: int = 64) -> list[tuple[str, int | str]]:
    """Options every channel and server shares: message limits, keepalive, quick reconnects."""
    limit = max_message_mib * 1024 * 1024
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A watch may be silent for hours; its pings are what tells that the peer's node is gone, so servers take them.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # A restarted peer is found again within a second instead of gRPC's growing two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def target_options(target: str, max_message_mib: int = 64) -> list[tuple[str, int | str]]:
    """Options of a client's channel to `target`: calls go round over all addresses of `dns:///name:port`, else to one."""
    options = channel_options(max_message_mib)
    if target.startswith(DNS_SCHEME):
        # Looked up again at most once a second, whenever a connection ends: new replicas are found within a server's
        # `max_connection_age_s`, lost ones at once.
        options += [("grpc.service_config", _ROUND_ROBIN), ("grpc.dns_min_time_between_resolutions_ms", 1_000)]
    return options


def open_channel(
    target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, tls: TlsSettings | None = None, max_message_mib: int = 64
) -> grpc.aio.Channel:
    """A channel to `target` (`host:port`, or `dns:///host:port` for every address of the name) whose calls carry the trace and have a
    deadline of `timeout_s` unless they set one.

    A peer that is away fails calls at once (UNAVAILABLE) and is tried again each second at the latest; what was not sent yet is sent
    again by gRPC itself. Anything else may have been done twice, so repeating is left to callers. Changed certificates are used by
    the next call.

    Raises:
        CertificateError: the files of `tls` cannot be used.
    """
    options = target_options(target, max_message_mib)

    def interceptors() -> list[grpc.aio.ClientInterceptor]:
        return [UnaryDeadline(timeout_s), StreamUnaryDeadline(timeout_s), *aio_client_interceptors()]  # type: ignore[no-untyped-call]

    return open_bare_channel(target, options, interceptors, tls=tls)


def open_bare_channel(
    target: str,
    options: Sequence[tuple[str, int | str]],
    interceptors: Callable[[], Sequence[grpc.aio.ClientInterceptor]] = tuple,
    *,
    tls: TlsSettings | None = None,
) -> grpc.aio.Channel:
    """A channel with exactly these options and interceptors, for hot paths that bring their own.

    Raises:
        CertificateError: the files of `tls` cannot be used.
    """
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors())
    return AioReloadingChannel(
        CertificateFiles(tls),
        lambda credentials: grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors()),
    )


def open_sync_channel(target: str, tls: TlsSettings | None = None, *, max_message_mib: int = 64) -> grpc.Channel:
    """A blocking channel to `target`, for programs without an event loop; its calls set their own deadlines.

    Raises:
        CertificateError: the files of `tls` cannot be used.
    """
    options = target_options(target, max_message_mib)
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return ReloadingChannel(
        CertificateFiles(tls), lambda credentials: grpc.secure_channel(target, credentials, options=options)
    )
