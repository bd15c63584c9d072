"""Follows the EndpointSlices of one namespace: one list, then one watch that is taken up where it ended.

One watch for the whole namespace instead of one a Service: the servers of a new version are known before its route comes, and a
hundred models cost one connection. The API server may be away for any time; what was known last stays.

Plain HTTP by aiohttp instead of the `kubernetes` package: two calls of one resource do not need its 22 MiB of memory a gateway.
"""

import asyncio
import json
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from millrace_kit.clock import Clock
from prometheus_client import Counter, Gauge

from millrace_inference_gateway.endpoints import SliceEndpoints
from millrace_inference_gateway.settings import KubernetesSettings

log = logging.getLogger(__name__)

LIST_LIMIT = 500
# A slice has at most 1000 endpoints; each takes some hundred bytes of JSON.
MAX_EVENT_BYTES = 4 << 20
GONE = 410
CONNECTED = Gauge("millrace_gateway_endpoint_watch_connected", "Whether the watch of EndpointSlices is open: 1 or 0.")
HEARD = Gauge(
    "millrace_gateway_endpoint_watch_heard_timestamp_seconds", "When the API server was last heard of, in Unix seconds."
)
LISTS = Counter("millrace_gateway_endpoint_lists_total", "Times all EndpointSlices were listed.")
FAILURES = Counter("millrace_gateway_endpoint_watch_failures_total", "Times the API server failed or refused.")


class ApiServerError(Exception):
    """The API server does not answer, or not as it should; the message says how."""


class ExpiredError(Exception):
    """The API server no longer has the changes since our last one (410 Gone): list again."""


class SliceWatch:
    """Keeps `endpoints` at what the API server says."""

    def __init__(self, settings: KubernetesSettings, endpoints: SliceEndpoints, clock: Clock) -> None:
        self._settings = settings
        self._endpoints = endpoints
        self._clock = clock
        self._version = ""
        self._url = f"{api_server(settings)}/apis/discovery.k8s.io/v1/namespaces/{settings.namespace}/endpointslices"

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop`."""
        following = asyncio.ensure_future(self._follow())
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            CONNECTED.set(0)
            stopped.cancel()
            following.cancel()
            await asyncio.gather(following, stopped, return_exceptions=True)

    async def _follow(self) -> None:
        backoff = self._settings.backoff_s
        while True:
            before = self._version
            try:
                async with self._session() as session:
                    if not self._version:
                        await self._list(session)
                    while True:
                        await self._watch(session)
                        backoff = self._settings.backoff_s
                        # A server that ends every watch at once is not asked without a pause; nothing is missed meanwhile.
                        await asyncio.sleep(backoff)
            except ExpiredError:
                # What is known stays in force until the new list is whole.
                self._version = ""
            except (ApiServerError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                FAILURES.inc()
                log.warning("EndpointSlices cannot be followed now, what is known stays: %s", _text(error))
            finally:
                CONNECTED.set(0)
            if self._version != before and self._version:
                backoff = self._settings.backoff_s
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))
            backoff = min(backoff * 2, self._settings.backoff_max_s)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        settings = self._settings
        verify: ssl.SSLContext | bool = True
        if self._url.startswith("https:"):
            verify = await asyncio.to_thread(ssl.create_default_context, cafile=settings.ca_file or None)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.request_timeout_s, sock_read=settings.request_timeout_s
        )
        connector = aiohttp.TCPConnector(ssl=verify, limit=2)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            yield session

    async def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "millrace-inference-gateway"}
        if self._settings.token_file:
            token = await asyncio.to_thread(Path(self._settings.token_file).read_text, encoding="utf-8")
            headers["Authorization"] = f"Bearer {token.strip()}"
        return headers

    async def _list(self, session: aiohttp.ClientSession) -> None:
        items: list[dict[str, Any]] = []
        query = {"labelSelector": self._settings.label_selector, "limit": str(LIST_LIMIT)}
        async with asyncio.timeout(self._settings.request_timeout_s):
            while True:
                async with session.get(self._url, params=query, headers=await self._headers()) as answer:
                    await _check(answer)
                    page = json.loads(await answer.read())
                items += page.get("items") or ()
                if not (more := page["metadata"].get("continue")):
                    break
                query["continue"] = more
        self._endpoints.replace(items)
        self._version = page["metadata"]["resourceVersion"]
        self._heard()
        LISTS.inc()
        log.info("%d EndpointSlices of %s", len(items), self._settings.namespace)

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """One watch, until the API server ends it."""
        query = {
            "watch": "true",
            "labelSelector": self._settings.label_selector,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._settings.watch_s),
        }
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._settings.request_timeout_s, sock_read=self._settings.silence_s
        )
        opening = asyncio.timeout(self._settings.request_timeout_s)
        async with opening:
            answer = await session.get(self._url, params=query, headers=await self._headers(), timeout=timeout)
        async with answer:
            await _check(answer)
            CONNECTED.set(1)
            self._heard()
            async for line in _lines(answer):
                self._heard()
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        item = event["object"]
        match event["type"]:
            case "ADDED" | "MODIFIED":
                self._endpoints.put(item)
            case "DELETED":
                self._endpoints.remove(item)
            case "ERROR":
                if item.get("code") == GONE:
                    raise ExpiredError
                raise ApiServerError(str(item.get("message", item))[:500])
        self._version = item["metadata"]["resourceVersion"]

    def _heard(self) -> None:
        HEARD.set(self._clock.now().timestamp())


def api_server(settings: KubernetesSettings) -> str:
    """Address of the API server, as the settings or the pod's environment name it.

    Raises:
        ApiServerError: neither does.
    """
    if settings.api_server:
        return settings.api_server.rstrip("/")
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise ApiServerError("kubernetes.api_server is empty and this is no pod: KUBERNETES_SERVICE_HOST is not set")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status == GONE:
        raise ExpiredError
    if answer.status != HTTPStatus.OK:
        body = await answer.content.read(1000)
        raise ApiServerError(f"{answer.status} {answer.reason}: {body.decode('utf-8', 'replace')}")


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines; aiohttp's own reader refuses those over 128 KiB."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line
        if len(rest) > MAX_EVENT_BYTES:
            raise ApiServerError(f"an event is larger than {MAX_EVENT_BYTES} bytes")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
