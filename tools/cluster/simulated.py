"""Nodes that are only objects, for tests of placement: kept Ready by a renewer, and their pods are said to run.

Kubernetes documents both: a node's Lease is its heartbeat, and extended resources are put on a node by patching its status.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

PERIOD_S = 1.0
RENEW_EVERY = 5
LEASE_S = 40
CALL_TIMEOUT_S = 10.0
LABEL = "millrace.dev/simulated"


@dataclass(frozen=True)
class SimulatedNode:
    """One node that nobody runs."""

    name: str
    resources: Mapping[str, str]
    """Extended resources beside 64 CPUs and 512 GiB, for example `nvidia.com/gpu: "8"`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()


def api(kubeconfig: Path) -> client.ApiClient:
    """A client of the cluster."""
    return config.new_client_from_config(str(kubeconfig))


def give(kubeconfig: Path, node: str, resources: Mapping[str, str]) -> None:
    """Put extended resources on a node that exists; an amount of "0" takes them away."""
    patch = [
        {"op": "add", "path": f"/status/capacity/{name.replace('~', '~0').replace('/', '~1')}", "value": amount}
        for name, amount in resources.items()
    ]
    with api(kubeconfig) as connection:
        client.CoreV1Api(connection).patch_node_status(node, patch, _request_timeout=CALL_TIMEOUT_S)


@contextlib.contextmanager
def simulated(kubeconfig: Path, nodes: Sequence[SimulatedNode]) -> Iterator[None]:
    """The nodes are there and Ready while the context is open."""
    connection = api(kubeconfig)
    core, leases = client.CoreV1Api(connection), client.CoordinationV1Api(connection)
    stop = threading.Event()
    names = {node.name for node in nodes}
    for node in nodes:
        _create(core, leases, node)

    def keep() -> None:
        turn = 0
        while not stop.wait(PERIOD_S):
            turn += 1
            # The API server may be away in a test of just that; the next turn makes up for it.
            with contextlib.suppress(Exception):
                if turn % RENEW_EVERY == 0:
                    for name in names:
                        leases.patch_namespaced_lease(
                            name,
                            "kube-node-lease",
                            {"spec": {"renewTime": _now_micro()}},
                            _request_timeout=CALL_TIMEOUT_S,
                        )
                _play_kubelet(core, names)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for name in names:
            with contextlib.suppress(ApiException):
                core.delete_node(name)
            with contextlib.suppress(ApiException):
                leases.delete_namespaced_lease(name, "kube-node-lease")
        for pod in core.list_pod_for_all_namespaces(_request_timeout=CALL_TIMEOUT_S).items:
            if pod.spec.node_name in names:
                _forget(core, pod)
        connection.close()


def _create(core: client.CoreV1Api, leases: client.CoordinationV1Api, node: SimulatedNode) -> None:
    amounts = {"cpu": "64", "memory": "512Gi", "pods": "110", **node.resources}
    labels = {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux", LABEL: "true", **node.labels}
    body: dict[str, Any] = {
        "metadata": {"name": node.name, "labels": labels},
        "spec": {"taints": [dict(taint) for taint in node.taints]},
    }
    core.create_node(body)
    now = datetime.now(UTC).isoformat()
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Simulated",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    core.patch_node_status(node.name, {"status": {"capacity": amounts, "allocatable": amounts, "conditions": [ready]}})
    spec = {"holderIdentity": node.name, "leaseDurationSeconds": LEASE_S, "renewTime": _now_micro()}
    leases.create_namespaced_lease("kube-node-lease", {"metadata": {"name": node.name}, "spec": spec})
    # The node controller taints a new node until it has seen it Ready.
    taints = [dict(taint) for taint in node.taints]
    core.patch_node(node.name, {"spec": {"taints": taints}})


def _play_kubelet(core: client.CoreV1Api, names: set[str]) -> None:
    for pod in core.list_pod_for_all_namespaces(_request_timeout=CALL_TIMEOUT_S).items:
        if pod.spec.node_name not in names:
            continue
        if pod.metadata.deletion_timestamp is not None:
            _forget(core, pod)
        elif pod.status.phase == "Pending":
            now = datetime.now(UTC).isoformat()
            kinds = ("Initialized", "ContainersReady", "Ready", "PodScheduled")
            conditions = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds]
            status = {"phase": "Running", "conditions": conditions, "podIP": "198.51.100.254"}
            core.patch_namespaced_pod_status(
                pod.metadata.name, pod.metadata.namespace, {"status": status}, _request_timeout=CALL_TIMEOUT_S
            )


def _forget(core: client.CoreV1Api, pod: client.V1Pod) -> None:
    with contextlib.suppress(ApiException):
        core.delete_namespaced_pod(pod.metadata.name, pod.metadata.namespace, grace_period_seconds=0)


def _now_micro() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
