"""What the cluster says about the servers of each version, from watched objects. Pure.

Reasons are the cluster's own words: what `kubectl describe pod` would show is what the condition says.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from millrace_rollout_controller.kubernetes import names
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.order import Ending
from millrace_rollout_controller.plans import ArmSeen, Refusal

_PULL = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
Name = tuple[str, str]
Pods = Mapping[str, str]
"""Names of pods by `host:port`."""


def arms(
    namespace: str, workloads: Mapping[str, Object], pods: Mapping[str, Object], slices: Mapping[str, Object]
) -> dict[Name, ArmSeen]:
    """Ready endpoints, number of servers and trouble, by deployment and version.

    Args:
        namespace: where they are, for the Services' names.
        workloads: Deployments by name.
        pods: Pods by name.
        slices: EndpointSlices by name.
    """
    found: dict[Name, list[Object]] = {}
    for item in workloads.values():
        if (name := name_of(item)) is not None:
            found.setdefault(name, [])
    for pod in pods.values():
        name = name_of(pod)
        if name is not None and pod.get("status", {}).get("phase") not in {"Succeeded", "Failed"}:
            found.setdefault(name, []).append(pod)
    ready = ready_pods(workloads, pods, slices)
    by_name = {name_of(item): item for item in workloads.values()}
    result = {}
    for name, own in found.items():
        endpoints = tuple(sorted(ready.get(names.object_name(*name), ())))
        workload = by_name.get(name)
        # A Deployment that is there may make a pod at any moment.
        servers = max(len(own), 1 if workload is not None else 0)
        result[name] = ArmSeen(endpoints, servers, _refusal(own, workload), names.service(namespace, *name))
    return result


def name_of(item: Object) -> Name | None:
    """Deployment and version of an object of ours."""
    metadata = item["metadata"]
    deployment = metadata.get("labels", {}).get(names.DEPLOYMENT_LABEL)
    version = metadata.get("annotations", {}).get(names.VERSION_ANNOTATION)
    return (deployment, version) if deployment and version else None


def _leaving(workloads: Mapping[str, Object], pods: Mapping[str, Object]) -> set[str]:
    """Names of pods that are on their way out, whatever their slices say: slices follow a moment later.

    A version that comes again finds the pods of its Deployment before, which was deleted, still ready for some seconds.
    """
    began = {
        name: item["metadata"].get("creationTimestamp", "")
        for item in workloads.values()
        if not item["metadata"].get("deletionTimestamp") and (name := name_of(item)) is not None
    }
    leaving = set()
    for pod in pods.values():
        metadata = pod["metadata"]
        since = began.get(name_of(pod) or ("", ""))
        if metadata.get("deletionTimestamp") or since is None or metadata.get("creationTimestamp", since) < since:
            leaving.add(metadata["name"])
    return leaving


def ready_pods(
    workloads: Mapping[str, Object], pods: Mapping[str, Object], slices: Mapping[str, Object]
) -> dict[str, dict[str, str]]:
    """Names of ready pods by Service and endpoint; a slice without a condition is ready, says the API."""
    leaving = _leaving(workloads, pods)
    found: dict[str, dict[str, str]] = {}
    for item in slices.values():
        service = item["metadata"].get("labels", {}).get("kubernetes.io/service-name", "")
        port = next((p["port"] for p in item.get("ports") or () if p.get("name") == "grpc"), names.GRPC)
        for endpoint in item.get("endpoints") or ():
            conditions = endpoint.get("conditions") or {}
            pod = (endpoint.get("targetRef") or {}).get("name", "")
            if pod in leaving:
                continue
            if conditions.get("ready", True) and not conditions.get("terminating", False):
                found.setdefault(service, {}).update({f"{host(one)}:{port}": pod for one in endpoint["addresses"]})
    return found


def host(address: str) -> str:
    """An address in front of a port."""
    return f"[{address}]" if ":" in address else address


def _refusal(pods: list[Object], workload: Object | None) -> Refusal | None:
    """The worst trouble of a version: what cannot be mended first, then the newest pods'."""
    found = [trouble for pod in pods if (trouble := _trouble(pod)) is not None]
    permanent = next((trouble for trouble in found if trouble.permanent), None)
    if permanent is not None or found:
        return permanent or found[0]
    conditions = (workload or {}).get("status", {}).get("conditions") or ()
    for condition in conditions:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Refusal(condition.get("reason", "ReplicaFailure"), condition.get("message", ""), permanent=False)
    return None


def _trouble(pod: Object) -> Refusal | None:
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp"):
        return None
    for container in status.get("initContainerStatuses") or ():
        if (refusal := _container(container, pod)) is not None:
            return refusal
    for container in status.get("containerStatuses") or ():
        if (refusal := _container(container, pod)) is not None:
            return refusal
    # Last: a scheduler's late word must not hide what a node says, which has the pod already.
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return Refusal(condition.get("reason", "Unschedulable"), condition.get("message", ""), permanent=False)
    return None


def _container(container: Object, pod: Object) -> Refusal | None:
    waiting: dict[str, Any] = container.get("state", {}).get("waiting") or {}
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
    reason, name = waiting.get("reason", ""), container["name"]
    if reason in _PULL:
        return Refusal(reason, f"container {name}: {waiting.get('message', reason)}", permanent=False)
    if container.get("ready") or not ended or ended.get("exitCode") == 0:
        return None
    said = _ending(ended.get("message", ""))
    if said is not None:
        return Refusal(said.reason, said.message, permanent=said.permanent)
    last = " ".join(ended.get("message", "").split())[-800:]
    why = f"{ended.get('reason', 'Error')}, exit code {ended.get('exitCode')}" + (f": {last}" if last else "")
    restarts = container.get("restartCount", 0)
    message = f"container {name} of pod {pod['metadata']['name']} ended ({why}); {restarts} restarts"
    return Refusal(reason or "ServerFailed", message, permanent=False)


def _ending(message: str) -> Ending | None:
    try:
        return Ending.model_validate(json.loads(message))
    except (ValueError, ValidationError):
        return None
