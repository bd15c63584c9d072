"""The objects of one model version, or of all versions that share their servers: Deployment, headless Service, PodDisruptionBudget,
HorizontalPodAutoscaler, and a ConfigMap with what shared servers should hold. Pure.

Exactly the fields that this controller owns, as server-side apply wants them; everything else is left to the API server and to people.
"""

from typing import Any

from millrace_rollout_controller import capacity, repository
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import containers, names, order
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.containers import extended_resources
from millrace_rollout_controller.kubernetes.order import Orders
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings, ModelServerSettings
from millrace_rollout_controller.server_block import Server

__all__ = ["build", "extended_resources", "scaled", "starting_replicas"]
QUEUE_METRIC = "millrace_queue_time_us"
"""Mean time a request waited in a pod's queue, in microseconds; a metrics adapter serves it (docs in the chart)."""


def build(want: Wanted, owner: Object, settings: KubernetesSettings, orders: Orders | None = None) -> list[Object]:
    """Everything a version needs, in the order in which it is applied.

    Args:
        want: the version, its manifest's server block and how many servers it should have.
        owner: the ModelDeployment (`metadata.name` and `metadata.uid` are read).
        settings: defaults and images.
        orders: of servers that hold several versions; the one in `want` is named `names.SHARED` then.
    """
    objects = [_service(want), _workload(want, settings), _budget(want, settings.servers)]
    if scaled(want.server):
        objects.append(_autoscaler(want))
    if orders is not None:
        objects.insert(0, _orders(orders))
    name = names.object_name(want.deployment, want.ref.version)
    for item in objects:
        item["metadata"] = {
            "name": name,
            "labels": names.labels(want.deployment, want.ref.model, want.ref.version),
            "annotations": {names.VERSION_ANNOTATION: want.ref.version},
            "ownerReferences": [
                {
                    "apiVersion": names.API_VERSION,
                    "kind": "ModelDeployment",
                    "name": owner["metadata"]["name"],
                    "uid": owner["metadata"]["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        }
    return objects


def scaled(server: Server) -> bool:
    """Whether an autoscaler decides how many servers a version has while it is awake."""
    return server.autoscaling is not None and server.autoscaling.max_replicas is not None


def starting_replicas(want: Wanted) -> int | None:
    """Servers to begin with, where an autoscaler decides afterwards; None where this controller sets the number, 0 of a version asleep."""
    return max(want.replicas, capacity.least(want.server)) if scaled(want.server) and want.replicas else None


def _service(want: Wanted) -> Object:
    ports = (("grpc", names.GRPC), ("http", names.HTTP), ("metrics", names.METRICS))
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "spec": {
            "clusterIP": "None",
            "selector": names.selector(want.deployment, want.ref.version),
            "ports": [
                {"name": name, "port": port, "targetPort": name, "protocol": "TCP"}
                | ({"appProtocol": "kubernetes.io/h2c"} if name == "grpc" else {})
                for name, port in ports
            ],
        },
    }


def _orders(orders: Orders) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "data": {order.ORDERS_FILE: orders.model_dump_json()}}


def _budget(want: Wanted, servers: ModelServerSettings) -> Object:
    bound = {"minAvailable": servers.min_available} if servers.min_available else {"maxUnavailable": 1}
    labels = names.selector(want.deployment, want.ref.version)
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        # A pod that is not ready protects nobody: it may always be evicted.
        "spec": {"selector": {"matchLabels": labels}, "unhealthyPodEvictionPolicy": "AlwaysAllow", **bound},
    }


def _autoscaler(want: Wanted) -> Object:
    scaling = want.server.autoscaling
    if scaling is None or scaling.max_replicas is None:
        raise ValueError("the manifest asks for no autoscaling")
    if scaling.metric == "cpu":
        target: Object = {"type": "Utilization", "averageUtilization": scaling.percent}
        metric: Object = {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    else:
        target = {"type": "AverageValue", "averageValue": str(scaling.microseconds)}
        metric = {"type": "Pods", "pods": {"metric": {"name": QUEUE_METRIC}, "target": target}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": names.object_name(want.deployment, want.ref.version),
            },
            # A version on trial has servers before it has the load that would bring them.
            # It lets a Deployment of 0 replicas alone, as Kubernetes has it, so a version that is asleep keeps it.
            "minReplicas": min(max(want.replicas, capacity.least(want.server)), scaling.max_replicas),
            "maxReplicas": scaling.max_replicas,
            "metrics": [metric],
        },
    }


def _workload(want: Wanted, settings: KubernetesSettings) -> Object:
    labels = names.labels(want.deployment, want.ref.model, want.ref.version)
    spec: Object = {
        "selector": {"matchLabels": names.selector(want.deployment, want.ref.version)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": settings.servers.startup_s + 300,
        "template": {
            "metadata": {
                "labels": {**settings.servers.pod_labels, **labels},
                "annotations": {
                    **settings.servers.pod_annotations,
                    names.VERSION_ANNOTATION: want.ref.version,
                    **_configuration_mark(want, settings),
                },
            },
            "spec": _pod(want, settings),
        },
    }
    if starting_replicas(want) is None:
        spec["replicas"] = want.replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec}


def _configuration_mark(want: Wanted, settings: KubernetesSettings) -> dict[str, str]:
    """A server of several versions reads its configuration once in its life, so that another one needs another pod."""
    if not _shared(want):
        return {}
    told = containers.order_of(want, settings.servers)
    return {names.CONFIGURATION_ANNOTATION: repository.key(told.ref, told.server, told.flavour)}


def _shared(want: Wanted) -> bool:
    return want.server.placement == "Shared"


def _pod(want: Wanted, settings: KubernetesSettings) -> Object:
    servers = settings.servers
    volumes: list[Object] = [
        {"name": "models", "emptyDir": {"sizeLimit": servers.model_volume_size}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": servers.shm_size}},
        {"name": "config", "projected": {"defaultMode": 0o440, "sources": _configuration(settings)}},
    ]
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": servers.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": servers.run_as_user,
            "runAsGroup": servers.run_as_group,
            "fsGroup": servers.run_as_group,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
    }
    if _shared(want):
        name = names.object_name(want.deployment, want.ref.version)
        volumes += [{"name": "loader-tmp", "emptyDir": {}}, {"name": "orders", "configMap": {"name": name}}]
        pod["shareProcessNamespace"] = True
        pod["containers"] = [containers.triton(want, servers), containers.loader(settings)]
    else:
        pod["initContainers"] = [containers.fetch(want, settings)]
        pod["containers"] = [containers.triton(want, servers)]
    placement = _placement(want, settings.servers)
    if servers.service_account_name:
        placement["serviceAccountName"] = servers.service_account_name
    if servers.image_pull_secrets:
        placement["imagePullSecrets"] = [{"name": name} for name in servers.image_pull_secrets]
    return pod | {key: value for key, value in placement.items() if value}


def _configuration(settings: KubernetesSettings) -> list[Object]:
    """One volume for both: nothing can be mounted inside a ConfigMap that is mounted read-only."""
    sources: list[Object] = [{"configMap": {"name": settings.fetch.config_map}}]
    if settings.fetch.tls_secret:
        items = [{"key": key, "path": f"tls/{key}"} for key in ("tls.crt", "tls.key", "ca.crt")]
        sources.append({"secret": {"name": settings.fetch.tls_secret, "items": items}})
    return sources


def _placement(want: Wanted, servers: ModelServerSettings) -> Object:
    """What is not empty goes into the pod; the manifest wins over the settings, and a GPU's settings over the general ones."""
    server, gpu = want.server, servers.gpu
    on_gpu = bool(extended_resources(server))
    own = [one.model_dump(by_alias=True, exclude_none=True) for one in server.tolerations]
    spread: list[Any] = [one.model_dump(by_alias=True) for one in server.topology_spread_constraints]
    match = {"labelSelector": {"matchLabels": names.selector(want.deployment, want.ref.version)}}
    return {
        "nodeSelector": {**servers.node_selector, **(gpu.node_selector if on_gpu else {}), **server.node_selector},
        "tolerations": [*servers.tolerations, *(gpu.tolerations if on_gpu else ()), *own],
        "affinity": server.affinity or servers.affinity,
        "topologySpreadConstraints": [one | match for one in spread or servers.topology_spread_constraints],
        "runtimeClassName": server.runtime_class_name
        or (gpu.runtime_class_name if on_gpu else servers.runtime_class_name),
        "priorityClassName": server.priority_class_name
        or (gpu.priority_class_name if on_gpu else "")
        or servers.priority_class_name,
    }
