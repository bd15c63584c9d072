"""The API server as the controller uses it: plain objects in and out, every call with a deadline, every write fenced and paced.

`kubernetes.aio` gives configuration, credentials and the connection; its generated classes are not used, because server-side apply is
about exactly the fields that are sent, and a generated class knows only the fields of its own release.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import load_incluster_config, load_kube_config
from kubernetes.aio.config.kube_config import list_kube_config_contexts

from millrace_rollout_controller.kubernetes.settings import KubernetesSettings

log = logging.getLogger(__name__)
Object = dict[str, Any]
MANAGER = "millrace-rollout-controller"
"""Field manager of what this controller owns."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_SILENCE_S = 150.0
"""A watch without a byte for this long is dead: bookmarks come about every minute."""


class ApiError(Exception):
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str, causes: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.causes = causes
        """Field and problem, where the API server names them."""


class NotLeaderError(Exception):
    """A write was held back because another replica may lead."""


class Pace:
    """A token bucket: `burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at = time.monotonic()

    async def take(self) -> None:
        """Wait for the next turn."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


class Cluster:
    """One connection to the API server.

    Args:
        client: the connection.
        namespace: where everything is.
        settings: deadlines and limits.
    """

    def __init__(self, client: ApiClient, namespace: str, settings: KubernetesSettings) -> None:
        self._client = client
        self.namespace = namespace
        self._timeout_s = settings.request_timeout_s
        self._watch_s = settings.watch_s
        self._pace = Pace(settings.writes_per_s, settings.write_burst)
        self.may_write: Callable[[], bool] = lambda: True
        """Asked right before each write that is fenced."""

    @classmethod
    async def connect(cls, settings: KubernetesSettings) -> "Cluster":
        """Read the credentials; nothing is asked of the API server yet."""
        configuration = Configuration()
        namespace = settings.namespace
        if settings.kubeconfig:
            await load_kube_config(settings.kubeconfig, client_configuration=configuration)
            _contexts, active = list_kube_config_contexts(settings.kubeconfig)
            namespace = namespace or active["context"].get("namespace", "default")
        else:
            load_incluster_config(client_configuration=configuration)
            namespace = namespace or (SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
        return cls(ApiClient(configuration), namespace, settings)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Object:
        """One object or a list."""
        return await self._send("GET", path, query or {}, None, "application/json")

    async def create(self, path: str, body: Object, *, manager: str = MANAGER, fenced: bool = True) -> Object:
        """POST."""
        return await self._write("POST", path, {"fieldManager": manager}, body, "application/json", fenced=fenced)

    async def replace(self, path: str, body: Object, *, fenced: bool = True) -> Object:
        """PUT; a `resourceVersion` in the body is a precondition."""
        return await self._write("PUT", path, {"fieldManager": MANAGER}, body, "application/json", fenced=fenced)

    async def merge(self, path: str, body: Object, *, fenced: bool = True) -> Object:
        """JSON merge patch."""
        return await self._write("PATCH", path, {"fieldManager": MANAGER}, body, _MERGE, fenced=fenced)

    async def apply(self, path: str, body: Object, *, manager: str = MANAGER) -> Object:
        """Server-side apply of exactly these fields, with force."""
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        return await self._write("PATCH", path, query, body, _APPLY, fenced=True)

    async def delete(self, path: str, *, uid: str = "", resource_version: str = "") -> None:
        """Delete; what is gone already is fine."""
        given = {"uid": uid, "resourceVersion": resource_version}
        body: Object = {"propagationPolicy": "Background"}
        if preconditions := {key: value for key, value in given.items() if value}:
            body["preconditions"] = preconditions
        try:
            await self._write("DELETE", path, {}, body, "application/json", fenced=True)
        except ApiError as error:
            if error.status != 404:
                raise

    async def watch(self, path: str, query: Mapping[str, str], since: str) -> AsyncIterator[Object]:
        """Events after the resource version `since`, until the API server ends the watch.

        Raises:
            ApiError: 410 when `since` is too old; then list again.
        """
        parameters = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": since,
            "timeoutSeconds": str(self._watch_s),
        }
        timeout = aiohttp.ClientTimeout(total=self._watch_s + 60, sock_connect=self._timeout_s, sock_read=_SILENCE_S)
        response = await self._open("GET", path, parameters, None, timeout=timeout)
        try:
            rest = b""
            async for part in response.content.iter_any():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _event(json.loads(line))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, "WatchEnded", str(error) or type(error).__name__) from error
        finally:
            response.close()

    async def _write(
        self, method: str, path: str, query: Mapping[str, str], body: Object, content_type: str, *, fenced: bool
    ) -> Object:
        if fenced:
            await self._pace.take()
            if not self.may_write():
                raise NotLeaderError("this replica does not lead")
        return await self._send(method, path, query, body, content_type)

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Object | None, content_type: str
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        response = await self._open(method, path, query, body, content_type=content_type, timeout=timeout)
        try:
            answer: Object = json.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, "Unreachable", str(error) or type(error).__name__) from error
        return answer

    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        *,
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            method, url, headers, _none, _params = await self._client.param_serialize(
                method, path, query_params=list(query.items()), header_params=headers, auth_settings=["BearerToken"]
            )
            answer = await self._client.call_api(method, url, headers, body, _request_timeout=timeout)
            response: aiohttp.ClientResponse = answer.response
            if response.status >= 400:
                raise _refusal(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", str(error) or type(error).__name__) from error
        return response


def _event(event: Object) -> Object:
    if event["type"] == "ERROR":
        status = event["object"]
        raise ApiError(int(status.get("code", 0)), status.get("reason", ""), status.get("message", ""))
    return event


def _refusal(status: int, body: bytes) -> ApiError:
    try:
        said = json.loads(body)
    except ValueError:
        return ApiError(status, "", body[:500].decode("utf-8", "replace"))
    causes = (said.get("details") or {}).get("causes") or []
    pairs = tuple((cause.get("field", ""), cause.get("message", "")) for cause in causes)
    return ApiError(status, said.get("reason", ""), said.get("message", ""), pairs)
