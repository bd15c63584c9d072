"""Feast's HTTP API as a bare ASGI application: what Feast's own Python server answers under `/get-online-features`, `/search` (in older
clients `/retrieve-online-documents`) and `/health`.

Its paths that write (`/push`, `/materialize`, …) are refused by name: records enter this platform through ingestion, which checks and
keeps them, and values are made from there.
"""

import asyncio
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import grpc
from millrace_kit.errors import MillraceError, ResourceExhaustedError
from millrace_kit.telemetry import RPC_SECONDS

from millrace_feature.feast_wire import errors
from millrace_feature.feast_wire.json_answers import to_json
from millrace_feature.feast_wire.reads import FeastReads
from millrace_feature.feast_wire.requests import BodyError, from_json
from millrace_feature.feast_wire.searches import FeastSearches
from millrace_feature.versioning.access import Caller

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_NAMES = "millrace.client_names"
"""Where the scope has the names of the client's certificate; absent without TLS."""
READ_PATH = "/get-online-features"
SEARCH_PATHS = ("/search", "/retrieve-online-documents")
_ANSWERED = (READ_PATH, *SEARCH_PATHS)
REFUSED = {
    "/push": "records enter through ingestion (IngestionService, or `millrace ingest`), which checks them and keeps them in the lake",
    "/write-to-online-store": "values are made from the records in the lake and on the bus; send the records to ingestion",
    "/materialize": "views are filled from the lake and follow the bus by themselves; there is nothing to materialize",
    "/materialize-incremental": "views are filled from the lake and follow the bus by themselves; there is nothing to materialize",
}
"""Paths of Feast's server that this one does not have, and what to do instead."""
_seconds = functools.cache(lambda path, status: RPC_SECONDS.labels(path, str(status)))
_JSON = (b"content-type", b"application/json")


class FeastHttp:
    """The ASGI application.

    Args:
        reads: answers.
        searches: finds the nearest vectors.
        max_concurrent: reads at once; the next one gets 429.
        max_body_bytes: largest body taken.
        deadline_s: longest time for one request, its body included.
    """

    def __init__(
        self,
        reads: FeastReads,
        searches: FeastSearches,
        *,
        max_concurrent: int,
        max_body_bytes: int,
        deadline_s: float,
    ) -> None:
        self._reads = reads
        self._searches = searches
        self._max_concurrent = max_concurrent
        self._max_body_bytes = max_body_bytes
        self._deadline_s = deadline_s
        self._running = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        path, method = scope["path"], scope["method"]
        if path in _ANSWERED and method == "POST":
            await self._read(path, Caller(scope.get(CLIENT_NAMES, ())), receive, send)
        elif path == "/health" and method in {"GET", "HEAD"}:
            await _send(send, 200 if self._reads.is_ready else 503, b"")
        elif path in REFUSED:
            message = f"{path} is not served here: {REFUSED[path]}"
            await _fail(send, MillraceError(grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", message))
        elif path in {*_ANSWERED, "/health"}:
            await _send(send, 405, b'{"detail":"Method Not Allowed"}')
        else:
            await _send(send, 404, b'{"detail":"Not Found"}')

    async def _read(self, path: str, caller: Caller, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status, content, age_ms = await self._answer(path, caller, receive)
        await _send(send, status, content, age_ms)
        _seconds(path, status).observe(time.perf_counter() - started)

    async def _answer(self, path: str, caller: Caller, receive: Receive) -> tuple[int, bytes, int]:
        """(status, body, age of the oldest kept part, or of the index) of one read or search."""
        if self._running >= self._max_concurrent:
            message = f"{self._max_concurrent} calls are running; retry later"
            error = ResourceExhaustedError("max_concurrent_rpcs", message)
            return errors.http_status(error), errors.http_body(error), 0
        self._running += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                body = await self._body(receive)
                if path in SEARCH_PATHS:
                    return 200, *await self._searches.answer(body, caller)
                return 200, *await self._reads.answer(from_json(body), to_json, caller)
        except BodyError as error:
            return 422, _unprocessable(str(error)), 0
        except MillraceError as error:
            return errors.http_status(error), errors.http_body(error), 0
        except TimeoutError:
            late = MillraceError(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the call took too long")
            return errors.http_status(late), errors.http_body(late), 0
        except Exception:
            log.exception("unexpected error in %s", path)
            return 500, errors.http_body(errors.unexpected()), 0
        finally:
            self._running -= 1

    async def _body(self, receive: Receive) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        while message.get("more_body"):
            if len(body) > self._max_body_bytes:
                break
            message = await receive()
            body += message.get("body", b"")
        if len(body) > self._max_body_bytes:
            raise ResourceExhaustedError("max_message_mib", f"the body is larger than {self._max_body_bytes} bytes")
        return body


async def forbid(_scope: MutableMapping[str, Any], _receive: Receive, send: Send) -> None:
    """The application for clients that `allowed_clients` does not name."""
    message = "this service is not for clients of that name; its allowed_clients says who may call it"
    await _fail(send, MillraceError(grpc.StatusCode.PERMISSION_DENIED, "CLIENT_NOT_ALLOWED", message))


def _unprocessable(problem: str) -> bytes:
    """As Feast's server says that a body does not fit."""
    return json.dumps({"detail": [{"loc": ["body"], "msg": problem, "type": "value_error"}]}).encode()


async def _fail(send: Send, error: MillraceError) -> None:
    await _send(send, errors.http_status(error), errors.http_body(error))


async def _send(send: Send, status: int, content: bytes, age_ms: int = 0) -> None:
    headers = [_JSON, (b"content-length", b"%d" % len(content))]
    if age_ms:
        headers.append((b"x-millrace-cache-age-ms", b"%d" % age_ms))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
