"""Names and labels of what the controller makes."""

import hashlib
import re

GROUP = "millrace.dev"
API_VERSION = f"{GROUP}/v1alpha1"
PLURAL = "modeldeployments"
FINALIZER = f"{GROUP}/routes"
DEPLOYMENT_LABEL = f"{GROUP}/deployment"
MODEL_LABEL = f"{GROUP}/model"
VERSION_LABEL = f"{GROUP}/version"
VERSION_ANNOTATION = f"{GROUP}/version"
"""The version itself; a label cannot hold each one."""
ACTION_ANNOTATION = f"{GROUP}/action"
LEADER_LABEL = f"{GROUP}/leader"
SELECTOR = "app.kubernetes.io/name=triton,app.kubernetes.io/managed-by=millrace"
"""Label selector of every object of ours that belongs to a model version."""
HTTP, GRPC, METRICS = 8000, 8001, 8002
LOADER, LOADER_PROBES = 8003, 8004
"""Of the loader beside a server of several versions: what the controller tells it, and whether it is ready."""
SHARED = "shared"
"""In the place of a version, of objects whose pods hold several."""
CONFIGURATION_ANNOTATION = f"{GROUP}/configuration"
"""Of a pod that holds several versions: digest of what is common to them, so that another one makes other pods."""
MAX_NAME = 52
"""Room for what a ReplicaSet and a Pod add to a Deployment's name within 63 characters."""


def object_name(deployment: str, version: str) -> str:
    """Name of the Deployment, Service, autoscaler and budget of a version.

    Plain versions give `<deployment>-1-4-0`. Pre-releases, builds and long names get a part of a digest, so that no two pairs share a name.
    """
    plain = re.fullmatch(r"\d+\.\d+\.\d+", version) is not None
    name = f"{deployment}-{re.sub(r'[^a-z0-9]+', '-', version.lower()).strip('-')}"
    if plain and len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9].rstrip('-')}-{_short(f'{deployment}/{version}')}"


def label_value(text: str) -> str:
    """`text` where a label can hold it, else its head and a part of its digest."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", text):
        return text
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', text)[:54].rstrip('-_.')}-{_short(text)}"


def labels(deployment: str, model: str, version: str) -> dict[str, str]:
    """Labels of every object of a version."""
    return {
        "app.kubernetes.io/name": "triton",
        "app.kubernetes.io/instance": deployment,
        "app.kubernetes.io/version": label_value(version),
        "app.kubernetes.io/managed-by": "millrace",
        "app.kubernetes.io/part-of": "millrace",
        **selector(deployment, version),
        MODEL_LABEL: model,
    }


def selector(deployment: str, version: str) -> dict[str, str]:
    """Labels that name a version's pods, and nobody else's."""
    return {DEPLOYMENT_LABEL: deployment, VERSION_LABEL: label_value(version)}


def service(namespace: str, deployment: str, version: str) -> str:
    """A version's Service as routes name it."""
    return f"{namespace}/{object_name(deployment, version)}:{GRPC}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
