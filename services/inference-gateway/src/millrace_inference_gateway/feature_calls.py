"""The way to the feature service's online reads: HTTP/1.1 over kept connections where it listens for that, else gRPC.

A service that does not listen for HTTP/1.1 (yet, or any more: replicas are replaced one by one) is asked by gRPC, and again a moment later.
Both ways take and give serialized messages, and what fails is a `MillraceError`.
"""

import itertools
import time

import grpc
import grpc.aio
from millrace_kit.call_lines import CallLines, Peer, to_port
from millrace_kit.client import open_bare_channel, target_options
from millrace_kit.errors import MillraceError
from millrace_kit.settings import TlsSettings

from millrace_inference_gateway.settings import GatewaySettings

GRPC_CHANNELS = 2
RETRY_LINES_S = 1.0
"""How long gRPC is used after nobody listened for HTTP/1.1."""
_GET_ONLINE_FEATURES = "/millrace_api.feature.v1.FeatureService/GetOnlineFeatures"
_MIN_CALL_S = 0.001
_AWAY = "READS_UNAVAILABLE"
_PEER = Peer("the feature service", "the feature service", _AWAY, "READS_DEADLINE_EXCEEDED", repeats=True)

Trace = dict[str, bytes]
"""The headers of the trace under way."""


class FeatureCalls:
    """Calls of `GetOnlineFeatures`."""

    def __init__(self, lines: "_LineReads | None", grpc_: "_GrpcReads") -> None:
        self._lines = lines
        self._grpc = grpc_
        self._lines_from = 0.0

    async def read(self, request: bytes, timeout_s: float, trace: Trace) -> bytes:
        """The serialized answer.

        Raises:
            MillraceError: the status the call ended with.
        """
        until = time.monotonic() + timeout_s
        if self._lines is not None and self._lines_from <= until - timeout_s:
            try:
                return await self._lines.read(request, timeout_s, trace)
            except MillraceError as error:
                if error.reason != _AWAY or time.monotonic() >= until:
                    raise
                self._lines_from = time.monotonic() + RETRY_LINES_S
        return await self._grpc.read(request, max(_MIN_CALL_S, until - time.monotonic()), trace)

    async def close(self) -> None:
        """Disconnect."""
        if self._lines is not None:
            await self._lines.close()
        await self._grpc.close()


class _LineReads:
    """By HTTP/1.1: each of at most `count` calls at once on a connection of its own."""

    def __init__(self, target: str, count: int, max_message_mib: int, tls: TlsSettings | None) -> None:
        self._lines = CallLines(to_port(target, tls), _PEER, count, max_message_mib << 20)

    async def read(self, request: bytes, timeout_s: float, trace: Trace) -> bytes:
        metadata = [(key.encode(), value) for key, value in trace.items()]
        answer, _headers = await self._lines.call(_GET_ONLINE_FEATURES.encode(), metadata, request, timeout_s)
        return answer

    async def close(self) -> None:
        await self._lines.close()


class _GrpcReads:
    """By gRPC: some connections, used in turn."""

    def __init__(self, target: str, max_message_mib: int, tls: TlsSettings | None) -> None:
        # A pool of its own each, else gRPC would share one connection among them.
        options = [*target_options(target, max_message_mib), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [open_bare_channel(target, options, tls=tls) for _ in range(GRPC_CHANNELS)]
        self._calls = itertools.cycle([channel.unary_unary(_GET_ONLINE_FEATURES) for channel in self._channels])

    async def read(self, request: bytes, timeout_s: float, trace: Trace) -> bytes:
        metadata = [(key, value.decode("ascii")) for key, value in trace.items()]
        try:
            answer: bytes = await next(self._calls)(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return answer

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def open_feature_calls(settings: GatewaySettings) -> FeatureCalls:
    """The ways that the settings name; connections are made by the first call.

    Raises:
        CertificateError: the files of `settings.tls` cannot be used.
    """
    lines = None
    if settings.feature_reads_address:
        count = settings.feature_reads_at_once
        lines = _LineReads(settings.feature_reads_address, count, settings.max_message_mib, settings.tls)
    return FeatureCalls(lines, _GrpcReads(settings.feature_address, settings.max_message_mib, settings.tls))
