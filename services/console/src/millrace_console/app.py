"""Wires the console: a web server over the services' gRPC APIs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from millrace_kit.entry import read_arguments
from millrace_kit.probes import DRAINING, Probes
from millrace_kit.server import PULSE_S
from millrace_kit.telemetry import start_telemetry, stop_telemetry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from millrace_console.settings import ConsoleSettings
from millrace_console.sources import Sources
from millrace_console.view import page

STATIC = Path(__file__).parent / "static"
# The page brings everything itself: nothing may be loaded from elsewhere, nothing may frame it.
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


async def _with_headers(request: Request, call: RequestResponseEndpoint) -> Response:
    response = await call(request)
    response.headers.update(HEADERS)
    return response


async def _pulse(probes: Probes) -> None:
    while True:
        probes.beat()
        await asyncio.sleep(PULSE_S)


def build(settings: ConsoleSettings, probes: Probes | None = None) -> Starlette:
    """The web application; `probes` (which outlive the call) are ready while it runs."""
    probes = probes or Probes()
    sources: list[Sources] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        sources.append(Sources(settings))
        pulse = asyncio.create_task(_pulse(probes))
        probes.ready()
        yield
        probes.not_ready(DRAINING)
        pulse.cancel()
        await sources[0].close()

    async def loop(_request: Request) -> Response:
        return JSONResponse(page(await sources[0].latest()))

    async def index(_request: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok")

    return Starlette(
        routes=[
            Route("/", index),
            Route("/healthz", health),
            Route("/api/loop", loop),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_with_headers)],
        lifespan=lifespan,
    )


class _Server(uvicorn.Server):
    """Stops being ready at the signal, before its last answers."""

    def __init__(self, config: uvicorn.Config, probes: Probes) -> None:
        super().__init__(config)
        self._probes = probes

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain."""
        self._probes.not_ready(DRAINING)
        super().handle_exit(sig, frame)


def main() -> None:
    """Run the console until it is told to stop."""
    settings = read_arguments("console", ConsoleSettings)
    probes = Probes()
    start_telemetry("console", settings.telemetry, probes)
    host, _, port = settings.http_listen.rpartition(":")
    config = uvicorn.Config(
        build(settings, probes),
        host=host,
        port=int(port),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    server = _Server(config, probes)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after an orderly stop
            server.run()
    finally:
        stop_telemetry()
    if not server.started:
        raise SystemExit(1)
