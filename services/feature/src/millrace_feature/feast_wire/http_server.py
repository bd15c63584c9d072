"""The HTTP server: uvicorn on httptools, run as a worker of the service in its event loop.

TLS is that of the gRPC server: only clients with a certificate of `tls.ca_file` get in, and only those that `allowed_clients` names.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from millrace_kit.settings import ServiceSettings
from millrace_kit.sockets import bound_socket
from millrace_kit.tls import CertificateFiles
from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from millrace_feature.feast_wire.http_edge import CLIENT_NAMES, forbid

KEEP_ALIVE_S = 330
"""How long a silent connection is kept: longer than Feast's client keeps it (300 s), so that the client ends it and never writes into
one that is being closed."""


class _Server(Server):
    """uvicorn's server, which leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's."""
        yield


class _OneWrite:
    """A transport that sends what is written in one turn of the event loop together.

    The server writes head and body one by one, and a system call costs as much as making the answer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._unsent: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not self._unsent:
            self._call_soon(self._flush)
        self._unsent.append(data)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def close(self) -> None:
        """Send what is left, then close."""
        self._flush()
        self._transport.close()


def _protocol(allowed_clients: frozenset[str]) -> type[HttpToolsProtocol]:
    """The server's protocol, with one write an answer, and clients looked at when they connect."""

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_OneWrite(transport))  # type: ignore[arg-type]
            names = tuple(_client_names(transport))
            if allowed_clients and allowed_clients.isdisjoint(names):
                self.app = forbid
            elif names:
                self.app = _named(self.app, names)

    return Protocol


def _named(app: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """The application, told who the client is."""

    async def told(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope[CLIENT_NAMES] = names
        await app(scope, receive, send)

    return told


def _client_names(transport: asyncio.Transport) -> list[str]:
    certificate = transport.get_extra_info("peercert") or {}
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]


class HttpServer:
    """Serves an ASGI application on `listen` until it is told to stop.

    Args:
        app: the application.
        listen: `host:port`.
        settings: certificates, allowed clients, drain time.
        share_port: whether other processes listen on the same port.
    """

    def __init__(
        self, app: Callable[..., Any], listen: str, settings: ServiceSettings, *, share_port: bool = False
    ) -> None:
        self._app = app
        self._listen = listen
        self._settings = settings
        self._share_port = share_port
        self._certificates = CertificateFiles(settings.tls) if settings.tls is not None else None

    def _config(self) -> Config:
        certificates = self._certificates
        factory: Callable[..., ssl.SSLContext] | None = None
        if certificates is not None:

            def factory(*_default: object) -> ssl.SSLContext:
                return certificates.server_context()

        return Config(
            self._app,
            http=_protocol(frozenset(self._settings.allowed_clients)),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(self._settings.drain_s)),
            ssl_context_factory=factory,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then let running requests end."""
        server = _Server(self._config())
        serving = asyncio.create_task(server.serve([bound_socket(self._listen, share_port=self._share_port)]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            server.should_exit = True
        await serving
