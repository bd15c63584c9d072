"""The few calls to the Kubernetes API that running stages takes, over aiohttp: JSON in, JSON out, a deadline on each.

Plain JSON instead of a typed client: logs of many pods are followed at once without a thread each, and the service starts a second sooner.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_CONNECTIONS = 256
TOO_MANY_REQUESTS = 429
NOT_FOUND = 404
CONFLICT = 409


class KubernetesError(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason or status}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class KubernetesUnavailableError(Exception):
    """The API server did not answer, or asked to come back later; trying again may help."""


@dataclass(frozen=True)
class Connection:
    """Where the API server is and how to speak to it."""

    url: str
    namespace: str
    """The caller's own namespace."""
    tls: ssl.SSLContext | bool
    """False does not check the server's certificate, as a kubeconfig may ask."""
    token: Callable[[], str]
    """The bearer token now; empty for none."""


def in_cluster(environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> Connection:
    """The connection of a pod by its service account; the token is read again for every call, because it is rotated.

    Raises:
        OSError: this is no pod with a service account token.
    """
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise OSError("KUBERNETES_SERVICE_HOST is not set: this is no pod, give `kubernetes.kubeconfig`")
    namespace = (folder / "namespace").read_text(encoding="ascii").strip()
    tls = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    address = f"[{host}]" if ":" in host else host
    token = folder / "token"
    token.read_bytes()
    return Connection(f"https://{address}:{port}", namespace, tls, lambda: token.read_text(encoding="ascii").strip())


def from_kubeconfig(path: str) -> Connection:
    """The connection of a kubeconfig's current context.

    Raises:
        OSError: the file cannot be used.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        config.load_kube_config(config_file=path, client_configuration=settings)
        _contexts, active = config.list_kube_config_contexts(config_file=path)
    except config.ConfigException as error:
        raise OSError(f"{path}: {error}") from error
    tls: ssl.SSLContext | bool = False
    if settings.verify_ssl:
        tls = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    if settings.cert_file:
        if isinstance(tls, bool):
            tls = ssl._create_unverified_context()  # noqa: S323, SLF001 - the kubeconfig asks for it
        tls.load_cert_chain(settings.cert_file, settings.key_file)

    def token() -> str:
        value = settings.get_api_key_with_prefix("BearerToken", "authorization") or ""
        return str(value).removeprefix("Bearer ")

    return Connection(settings.host, active["context"].get("namespace", "default"), tls, token)


class KubeApi:
    """Calls to one API server."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """One call.

        Raises:
            KubernetesError: it was refused.
            KubernetesUnavailableError: no answer.
        """
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": content_type}
        async with self._request(method, path, params, timeout, data=data, headers=headers) as answer:
            try:
                value: dict[str, Any] = await answer.json()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise KubernetesUnavailableError(f"{method} {path}: {error!r}") from error
            return value

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], idle_s: float | None = None
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of a GET as it comes; `idle_s` is the longest silence.

        Raises:
            KubernetesError: it was refused.
            KubernetesUnavailableError: no answer.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=idle_s)
        async with self._request("GET", path, params, timeout) as answer:
            yield answer.content

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        timeout: aiohttp.ClientTimeout,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        token = self._connection.token()
        sent = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        url = f"{self._connection.url}{path}"
        try:
            answer = await self._session.request(
                method, url, params=params, data=data, headers=sent, ssl=self._connection.tls, timeout=timeout
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubernetesUnavailableError(f"{method} {path}: {error!r}") from error
        try:
            await _check(method, path, answer)
            yield answer
        finally:
            # A body that was not read to its end cannot be followed by another answer.
            answer.close()


async def _check(method: str, path: str, answer: aiohttp.ClientResponse) -> None:
    if answer.status < 400:
        return
    try:
        status = await answer.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError):
        status = {}
    reason = str(status.get("reason", "")) if isinstance(status, dict) else ""
    message = str(status.get("message", "")) if isinstance(status, dict) else ""
    if answer.status >= 500 or answer.status == TOO_MANY_REQUESTS:
        raise KubernetesUnavailableError(f"{method} {path}: {answer.status} {message}")
    raise KubernetesError(answer.status, reason, message or f"{method} {path} was refused")


async def patiently(
    call: Callable[[], Any], patience_s: float, *, first_pause_s: float = 0.2, longest_pause_s: float = 5.0
) -> Any:
    """Await `call()` until the API server answers, at most `patience_s`.

    Raises:
        KubernetesUnavailableError: it did not answer in that time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    pause = first_pause_s
    while True:
        try:
            return await call()
        except KubernetesUnavailableError:
            if loop.time() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(longest_pause_s, pause * 2)
