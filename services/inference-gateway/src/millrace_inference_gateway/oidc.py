"""An OpenID Connect issuer's keys: found by its discovery document, fetched again and again, and kept for when it is away.

Envoy checks tokens by itself; it gets the keys as any other file (`envoy_auth`). So no call waits for the issuer, a key that comes or goes is in
force about a second after it was fetched, and a gateway that starts while the issuer is away has the keys of its last run.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
from millrace_kit.clock import Clock
from prometheus_client import Counter, Gauge

from millrace_inference_gateway.envoy_files import EnvoyFiles, write_atomically
from millrace_inference_gateway.issuer_file import kept_path
from millrace_inference_gateway.settings import JwtSettings, OidcSettings

log = logging.getLogger(__name__)

DISCOVERY = "/.well-known/openid-configuration"
MAX_DOCUMENT_BYTES = 1 << 20
MAX_KEYS = 100
# Kinds that prove something with a public part only.
KINDS = frozenset({"RSA", "EC", "OKP"})
FETCHED = Gauge(
    "millrace_gateway_issuer_keys_timestamp_seconds", "When the issuer's keys were last fetched, Unix time."
)
FAILURES = Counter("millrace_gateway_issuer_failures_total", "Times the issuer's keys could not be fetched.")


class IssuerError(Exception):
    """The issuer does not answer, or not as it should; the message says how."""


class IssuerKeys:
    """Keeps the file of keys at what the issuer says."""

    def __init__(self, jwt: JwtSettings, files: EnvoyFiles, clock: Clock) -> None:
        assert jwt.oidc is not None
        self._issuer = jwt.issuer
        self._settings: OidcSettings = jwt.oidc
        self._files = files
        self._clock = clock
        self._unknown = asyncio.Event()

    def unknown_key(self) -> None:
        """A token came with a key that is not known: perhaps the issuer has a new one."""
        self._unknown.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Fetch until `stop`."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                fetched = await self._try()
                self._unknown.clear()
                # Tokens with made-up keys do not make the gateway ask more often than this.
                await asyncio.wait({stopped}, timeout=self._settings.retry_s)
                if fetched:
                    unknown = asyncio.ensure_future(self._unknown.wait())
                    await asyncio.wait(
                        {stopped, unknown},
                        timeout=max(0.0, self._settings.refresh_s - self._settings.retry_s),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    unknown.cancel()
        finally:
            stopped.cancel()

    async def _try(self) -> bool:
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._session() as session:
                keys = await self._fetch(session)
        except (IssuerError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            FAILURES.inc()
            log.error("issuer %s: %s; its keys stay as they were", self._issuer, str(error) or type(error).__name__)  # noqa: TRY400 - the message says all
            return False
        now_s = self._clock.now().timestamp()
        kept = {"issuer": self._issuer, "fetched_s": now_s, "jwks": {"keys": keys}}
        await asyncio.to_thread(write_atomically, kept_path(self._files), json.dumps(kept).encode())
        FETCHED.set(now_s)
        return True

    async def _fetch(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        document = await _get(session, self._issuer.rstrip("/") + DISCOVERY)
        if document.get("issuer") != self._issuer:
            raise IssuerError(f"its discovery document is of {document.get('issuer')!r}")
        place = document.get("jwks_uri")
        if not isinstance(place, str) or not place.startswith(("https://", self._issuer.rstrip("/") + "/")):
            raise IssuerError(f"jwks_uri {place!r} is no https address")
        found = (await _get(session, place)).get("keys")
        if not isinstance(found, list):
            raise IssuerError("its key set has no keys")
        keys = [key for key in found if isinstance(key, dict) and key.get("kty") in KINDS and key.get("use") != "enc"]
        if not keys or len(keys) > MAX_KEYS:
            raise IssuerError(f"its key set has {len(keys)} keys that can sign, not 1 to {MAX_KEYS}")
        return keys

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        verify: ssl.SSLContext | bool = True
        if self._settings.ca_file:
            verify = await asyncio.to_thread(ssl.create_default_context, cafile=self._settings.ca_file)
        connector = aiohttp.TCPConnector(ssl=verify, limit=1)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            yield session


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as answer:
        if answer.status != HTTPStatus.OK:
            raise IssuerError(f"{url} answered {answer.status}")
        body = await answer.content.read(MAX_DOCUMENT_BYTES + 1)
        while len(body) <= MAX_DOCUMENT_BYTES and (more := await answer.content.read(MAX_DOCUMENT_BYTES)):
            body += more
    if len(body) > MAX_DOCUMENT_BYTES:
        raise IssuerError(f"{url} has more than {MAX_DOCUMENT_BYTES} bytes")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise IssuerError(f"{url} is no JSON object")
    return found
