"""The objects of one model version: Deployment, headless Service, PodDisruptionBudget, HorizontalPodAutoscaler. Pure.

Exactly the fields that this controller owns, as server-side apply wants them; everything else is left to the API server and to people.
"""

from typing import Any

from millrace_rollout_controller import capacity, triton_options
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import names, order
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings, ModelServerSettings
from millrace_rollout_controller.server_block import Server

QUEUE_METRIC = "millrace_queue_time_us"
"""Mean time a request waited in a pod's queue, in microseconds; a metrics adapter serves it (docs in the chart)."""
PROBE_S = 2


def build(want: Wanted, owner: Object, settings: KubernetesSettings) -> list[Object]:
    """Everything a version needs, in the order in which it is applied.

    Args:
        want: the version, its manifest's server block and how many servers it should have.
        owner: the ModelDeployment (`metadata.name` and `metadata.uid` are read).
        settings: defaults and images.
    """
    objects = [_service(want), _workload(want, settings), _budget(want, settings.servers)]
    if scaled(want.server):
        objects.append(_autoscaler(want))
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


def extended_resources(server: Server) -> set[str]:
    """Accelerators the manifest asks for."""
    asked = {**server.resources.requests, **server.resources.limits}
    return {name for name, amount in asked.items() if ("gpu" in name or "mig" in name) and str(amount) not in {"0", ""}}


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
                "annotations": {**settings.servers.pod_annotations, names.VERSION_ANNOTATION: want.ref.version},
            },
            "spec": _pod(want, settings),
        },
    }
    if starting_replicas(want) is None:
        spec["replicas"] = want.replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec}


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
        "initContainers": [_fetch(want, settings)],
        "containers": [_triton(want, servers)],
        "volumes": volumes,
    }
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


def _fetch(want: Wanted, settings: KubernetesSettings) -> Object:
    server, servers = want.server, settings.servers
    told = order.Order(
        # Features and Predict are the gateway's business, and there may be thousands of names.
        ref=want.ref.model_copy(update={"feature_names": (), "feature_service": "", "predict": ""}),
        max_batch_size=server.max_batch_size,
        instances=server.instances,
        queue_delay_us=server.queue_delay_us,
        backend=servers.platform,
        threads=servers.onnx_threads,
        gpu=bool(extended_resources(server)) and servers.platform == "onnxruntime",
        warmup=servers.warmup_requests,
        options=server.model_dump_json(by_alias=True, include=order.OPTIONS, exclude_none=True, exclude_defaults=True),
    )
    mounts = [
        {"name": "models", "mountPath": order.MODELS},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
        {"name": "config", "mountPath": "/etc/millrace", "readOnly": True},
    ]
    own = {name: {"fieldRef": {"fieldPath": f"metadata.{field}"}} for name, field in _FIELDS.items()}
    return {
        "name": "fetch",
        "image": settings.fetch.image,
        "imagePullPolicy": servers.image_pull_policy,
        "command": ["millrace-model-fetch", "--config", "/etc/millrace/config.yaml"],
        "env": [
            {"name": order.ENVIRONMENT, "value": told.model_dump_json()},
            *({"name": name, "valueFrom": source} for name, source in own.items()),
        ],
        "resources": settings.fetch.resources,
        "securityContext": _LOCKED,
        "terminationMessagePath": order.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _triton(want: Wanted, servers: ModelServerSettings) -> Object:
    given = want.server.resources
    resources = (
        {kind: amounts for kind, amounts in (("requests", given.requests), ("limits", given.limits)) if amounts}
        if given.requests or given.limits
        else servers.resources
    )
    ready = {"httpGet": {"path": "/v2/health/ready", "port": "http"}, "timeoutSeconds": PROBE_S}
    live = {"httpGet": {"path": "/v2/health/live", "port": "http"}, "timeoutSeconds": 5}
    container: Object = {
        "name": "triton",
        "image": servers.image,
        "imagePullPolicy": servers.image_pull_policy,
        "command": list(servers.command),
        "args": [*servers.args, *triton_options.arguments(want.server)],
        "env": [{"name": name, "value": value} for name, value in sorted(servers.env.items())],
        "ports": [
            {"name": "grpc", "containerPort": names.GRPC, "protocol": "TCP"},
            {"name": "http", "containerPort": names.HTTP, "protocol": "TCP"},
            {"name": "metrics", "containerPort": names.METRICS, "protocol": "TCP"},
        ],
        "resources": resources,
        # Ready means loaded and warm: the configuration has Triton answer requests to itself first.
        "startupProbe": ready | {"periodSeconds": 1, "failureThreshold": servers.startup_s},
        "readinessProbe": ready | {"periodSeconds": PROBE_S, "failureThreshold": 2},
        "livenessProbe": live | {"periodSeconds": 10, "failureThreshold": 3},
        "securityContext": _LOCKED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "models", "mountPath": order.MODELS, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - where the Python backend passes tensors
        ],
    }
    if servers.pre_stop_s:
        # Endpoints go while the server still answers: who had the old list loses nothing.
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": servers.pre_stop_s}}}
    return container


_FIELDS = {"POD_NAME": "name", "POD_NAMESPACE": "namespace"}
_LOCKED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
