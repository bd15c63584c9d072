"""The API server as the plugin uses it: plain objects in and out, every call with a deadline.

`kubernetes` gives configuration, credentials and the connection. Its generated classes are not used: they take longer to import than most
commands take to run, and a ModelDeployment has none.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, load_incluster_config
from kubernetes.config.kube_config import list_kube_config_contexts, load_kube_config
from millrace_kit.errors import MillraceError

Object = dict[str, Any]
GROUP = "millrace.dev"
API_VERSION = f"{GROUP}/v1alpha1"
KIND = "ModelDeployment"
DEPLOYMENT_LABEL = f"{GROUP}/deployment"
MANAGER = "kubectl-millrace"
CALL_TIMEOUT_S = 15.0
WATCH_S = 240
"""Length of one watch; then the next one begins where it ended."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
}


class ClusterError(MillraceError):
    """The API server refused, or was not reached.

    Args:
        status: HTTP status; 0 when it was not reached.
        reason: Kubernetes' reason in its own spelling, for example NotFound.
        message: for people.
        causes: field and problem, where the API server names them.
    """

    def __init__(self, status: int, reason: str, message: str, causes: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(_CODES.get(status, grpc.StatusCode.UNAVAILABLE), reason, message)
        self.status = status
        self.causes = causes


class Cluster:
    """One connection to the API server.

    Args:
        client: the connection.
        namespace: where to look; empty looks in all.
    """

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    @classmethod
    def connect(cls, kubeconfig: str | None, context: str | None, namespace: str | None) -> "Cluster":
        """Read the credentials as kubectl does: a kubeconfig, else the service account of the pod this runs in.

        Raises:
            ClusterError: there are neither, or the context is not in the kubeconfig.
        """
        configuration = Configuration()
        found = "default"
        try:
            load_kube_config(kubeconfig, context=context, client_configuration=configuration)
            contexts, active = list_kube_config_contexts(kubeconfig)
            chosen = next((one for one in contexts if one["name"] == context), active)
            found = chosen["context"].get("namespace", found)
        except ConfigException as error:
            if kubeconfig or context or not SERVICE_ACCOUNT.exists():
                raise ClusterError(0, "NoKubeconfig", str(error)) from error
            load_incluster_config(client_configuration=configuration)
            found = (SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
        return cls(ApiClient(configuration), found if namespace is None else namespace)

    def deployment(self, name: str) -> Object:
        """One ModelDeployment."""
        return self._call("GET", f"{self._path()}/{name}")

    def deployments(self) -> Object:
        """All of them, as a list object."""
        return self._call("GET", self._path())

    def pods(self, name: str) -> list[Object]:
        """The model servers of one ModelDeployment."""
        query = {"labelSelector": f"{DEPLOYMENT_LABEL}={name}"}
        items: list[Object] = self._call("GET", f"/api/v1/namespaces/{self.namespace}/pods", query)["items"]
        return items

    def merge(self, name: str, body: Object) -> Object:
        """JSON merge patch of one ModelDeployment."""
        kind = "application/merge-patch+json"
        return self._call("PATCH", f"{self._path()}/{name}", {"fieldManager": MANAGER}, body, kind)

    def dry_run(self, body: Object) -> Object:
        """Ask the API server whether it would take a manifest; nothing is kept.

        Server-side apply is not used: it answers an unknown field with status 500.
        """
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "dryRun": "All"}
        try:
            return self._call("POST", self._path(), query, body)
        except ClusterError as error:
            if error.status != 409:
                raise
        name = body["metadata"]["name"]
        return self._call("PATCH", f"{self._path()}/{name}", query, body, "application/merge-patch+json")

    def watch(self, name: str, since: str) -> Iterator[Object]:
        """Events (`type`, `object`) of one ModelDeployment after the resource version `since`, until the API server ends the watch.

        Raises:
            ClusterError: 410 when `since` is too old; then ask for the deployment again.
        """
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": since,
            "timeoutSeconds": str(WATCH_S),
        }
        response = self._send("GET", self._path(), query, None, "application/json", read_timeout_s=WATCH_S + 30)
        rest = b""
        try:
            for part in response.stream(65536, decode_content=True):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _event(json.loads(line))
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(0, "WatchEnded", str(error)) from error
        finally:
            response.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.rest_client.pool_manager.clear()

    def _path(self) -> str:
        where = f"/namespaces/{self.namespace}" if self.namespace else ""
        return f"/apis/{API_VERSION}{where}/modeldeployments"

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        response = self._send(method, path, query or {}, body, content_type)
        try:
            answer: Object = json.loads(response.data)
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ClusterError(0, "Unreachable", str(error)) from error
        return answer

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        content_type: str,
        *,
        read_timeout_s: float = CALL_TIMEOUT_S,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            method, url, headers, _none, _params = self._client.param_serialize(
                method, path, query_params=list(query.items()), header_params=headers, auth_settings=["BearerToken"]
            )
            answer = self._client.call_api(
                method, url, headers, body, _request_timeout=(CALL_TIMEOUT_S, read_timeout_s)
            )
            response: urllib3.BaseHTTPResponse = answer.response
            if response.status >= 400:
                raise _refusal(response.status, response.data)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(0, "Unreachable", f"the API server does not answer: {error}") from error
        return response


def _event(event: Object) -> Object:
    if event["type"] == "ERROR":
        status = event["object"]
        raise ClusterError(int(status.get("code", 0)), status.get("reason", ""), status.get("message", ""))
    return event


def _refusal(status: int, body: bytes) -> ClusterError:
    try:
        said = json.loads(body)
    except ValueError:
        return ClusterError(status, "Refused", body[:500].decode("utf-8", "replace"))
    causes = (said.get("details") or {}).get("causes") or []
    pairs = tuple((cause.get("field", ""), cause.get("message", "")) for cause in causes)
    return ClusterError(status, said.get("reason") or "Refused", said.get("message", ""), pairs)
