"""What a kubelet and Prometheus ask this process over plain HTTP: `/livez`, `/readyz` and `/metrics`.

Plain HTTP, because the kubelet's own gRPC probe cannot do TLS. The answers say nothing a stranger could use.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app

# An event loop that did not turn for this long is stuck: `/livez` fails, so that the kubelet starts the process anew.
STUCK_AFTER_S = 60.0
# Longest wait for the rest of a request, so that a silent connection does not keep a thread.
REQUEST_TIMEOUT_S = 10.0

STARTING = "starting"
DRAINING = "draining"


class Probes:
    """Whether this process takes work and whether its event loop turns.

    The server tells, the HTTP endpoint asks from threads of its own. A process that never tells is alive and not ready.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._why_not = STARTING
        self._beat_at: float | None = None

    @property
    def why_not_ready(self) -> str:
        """Why it takes no work now; empty when it does."""
        return self._why_not

    @property
    def stuck_s(self) -> float:
        """Seconds since the event loop last turned; 0 before its first turn, because start-up may take its time."""
        return 0.0 if self._beat_at is None else self._monotonic() - self._beat_at

    def ready(self) -> None:
        """From now on it takes work."""
        self._why_not = ""

    def not_ready(self, why: str) -> None:
        """From now on it takes none; `why` is one or two words for people."""
        self._why_not = why

    def beat(self) -> None:
        """The event loop turns."""
        self._beat_at = self._monotonic()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Probes come every few seconds; they are not worth a line each."""


def serve_probes(listen: str, probes: Probes) -> str:
    """Answer on `listen` (`host:port`, port 0 takes a free one) from a daemon thread; returns the bound `host:port`."""
    metrics: WSGIApplication = make_wsgi_app()

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/livez":
                stuck_s = probes.stuck_s
                return _say(start, "" if stuck_s < STUCK_AFTER_S else f"stuck for {stuck_s:.0f} s")
            case "/readyz":
                return _say(start, probes.why_not_ready)
            case "/metrics" | "/":
                return metrics(environ, start)
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"only /livez, /readyz and /metrics\n"]

    host, _, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    family = socket.getaddrinfo(bare, int(port), type=socket.SOCK_STREAM)[0][0]
    kind = type("_FamilyServer", (_Server,), {"address_family": family})
    server: WSGIServer = make_server(bare, int(port), answer, kind, _Handler)
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()
    return f"{host}:{server.server_port}"


def _say(start: StartResponse, problem: str) -> Iterable[bytes]:
    start("503 Service Unavailable" if problem else "200 OK", [("Content-Type", "text/plain")])
    return [f"{problem or 'ok'}\n".encode()]
