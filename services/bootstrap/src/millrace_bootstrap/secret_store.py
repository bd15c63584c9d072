"""Secrets of one namespace, written only when nobody else wrote in between."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException

REQUEST_TIMEOUT_S = 10.0
CONFLICT = 409
NOT_FOUND = 404


class SecretConflictError(Exception):
    """Somebody else wrote the Secret; read it again."""


class SecretStoreError(Exception):
    """The API server refused, or did not answer; the message says which Secret and why."""


@dataclass(frozen=True)
class Secret:
    """A Secret as it was read, or as it shall be."""

    name: str
    data: Mapping[str, bytes]
    kind: str = "Opaque"
    labels: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    """Resource version that was read; empty for one that is not there yet."""


class SecretStore(Protocol):
    """Where Secrets are kept."""

    def read(self, name: str) -> Secret | None:
        """The Secret, or None when there is none.

        Raises:
            SecretStoreError: it could not be read.
        """
        ...

    def write(self, secret: Secret) -> None:
        """Create it, or replace the version that was read.

        Raises:
            SecretConflictError: another version is there.
            SecretStoreError: it could not be written.
        """
        ...


class KubernetesSecrets:
    """Secrets of a namespace, by the API server of this pod or of the kubeconfig."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        try:
            config.load_incluster_config()
        except ConfigException:
            config.load_kube_config()
        self._api = client.CoreV1Api()

    def read(self, name: str) -> Secret | None:
        """The Secret, or None."""
        try:
            found = self._api.read_namespaced_secret(name, self._namespace, _request_timeout=REQUEST_TIMEOUT_S)
        except ApiException as error:
            if error.status == NOT_FOUND:
                return None
            raise SecretStoreError(f"Secret {name}: {error.status} {error.reason}") from None
        except urllib3.exceptions.HTTPError as error:
            raise SecretStoreError(f"Secret {name}: {error}") from None
        data = {key: base64.b64decode(value) for key, value in (found.data or {}).items()}
        return Secret(name, data, found.type, found.metadata.labels or {}, found.metadata.resource_version)

    def write(self, secret: Secret) -> None:
        """Create or replace it."""
        body = client.V1Secret(
            metadata=client.V1ObjectMeta(
                name=secret.name,
                namespace=self._namespace,
                labels=dict(secret.labels),
                resource_version=secret.version or None,
            ),
            type=secret.kind,
            data={key: base64.b64encode(value).decode("ascii") for key, value in secret.data.items()},
        )
        try:
            if secret.version:
                self._api.replace_namespaced_secret(
                    secret.name, self._namespace, body, _request_timeout=REQUEST_TIMEOUT_S
                )
            else:
                self._api.create_namespaced_secret(self._namespace, body, _request_timeout=REQUEST_TIMEOUT_S)
        except ApiException as error:
            if error.status == CONFLICT:
                raise SecretConflictError(secret.name) from None
            raise SecretStoreError(f"Secret {secret.name}: {error.status} {error.reason}") from None
        except urllib3.exceptions.HTTPError as error:
            raise SecretStoreError(f"Secret {secret.name}: {error}") from None
