"""Wires the console: a web server over the services' gRPC APIs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from millrace_kit.entry import read_arguments
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


def build(settings: ConsoleSettings) -> Starlette:
    """The web application."""
    sources: list[Sources] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        sources.append(Sources(settings))
        yield
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


def main() -> None:
    """Run the console until it is told to stop."""
    settings = read_arguments("console", ConsoleSettings)
    start_telemetry("console", settings.telemetry)
    host, _, port = settings.http_listen.rpartition(":")
    try:
        uvicorn.run(
            build(settings), host=host, port=int(port), log_config=None, access_log=False, timeout_graceful_shutdown=3
        )
    finally:
        stop_telemetry()
