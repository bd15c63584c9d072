"""The containers of a model server's pod: Triton, and what brings the versions' files: an init container, or a loader beside it. Pure."""

from millrace_rollout_controller import triton_options
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import names, order
from millrace_rollout_controller.kubernetes.api import Object
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings, ModelServerSettings
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.shared_server import ARGUMENTS

PROBE_S = 2
_FIELDS = {"POD_NAME": "name", "POD_NAMESPACE": "namespace"}
LOCKED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_CONFIG = {"name": "config", "mountPath": "/etc/millrace", "readOnly": True}
_MODELS = {"name": "models", "mountPath": order.MODELS}


def extended_resources(server: Server) -> set[str]:
    """Accelerators the manifest asks for."""
    asked = {**server.resources.requests, **server.resources.limits}
    return {name for name, amount in asked.items() if ("gpu" in name or "mig" in name) and str(amount) not in {"0", ""}}


def order_of(want: Wanted, servers: ModelServerSettings) -> order.Order:
    """What decides what a version's servers do."""
    server = want.server
    return order.Order(
        # Features and Predict are the gateway's business, and there may be thousands of names.
        ref=want.ref.model_copy(update={"feature_names": (), "feature_service": "", "predict": "", "rules": ""}),
        max_batch_size=server.max_batch_size,
        instances=server.instances,
        queue_delay_us=server.queue_delay_us,
        backend=servers.platform,
        threads=servers.onnx_threads,
        gpu=bool(extended_resources(server)) and servers.platform == "onnxruntime",
        warmup=servers.warmup_requests,
        options=server.model_dump_json(by_alias=True, include=order.OPTIONS, exclude_none=True, exclude_defaults=True),
        placement=server.placement,
        memory_mib=server.memory_mib,
    )


def fetch(want: Wanted, settings: KubernetesSettings) -> Object:
    """The init container of a server of one version."""
    told = order_of(want, settings.servers).model_dump_json()
    return _bringer("fetch", "millrace-model-fetch", settings) | {
        "env": [{"name": order.ENVIRONMENT, "value": told}, *_own_names()],
        "securityContext": LOCKED,
        "terminationMessagePath": order.TERMINATION_LOG,
        "volumeMounts": [_MODELS, {"name": "tmp", "mountPath": "/tmp"}, _CONFIG],  # noqa: S108 - a volume of the pod's own
    }


def loader(settings: KubernetesSettings) -> Object:
    """What stands beside a server of several versions; the pod is ready when it is."""
    limit = {"containerName": "triton", "resource": "limits.memory"}
    probe = {"periodSeconds": PROBE_S, "timeoutSeconds": PROBE_S}
    return _bringer("loader", "millrace-model-loader", settings) | {
        # Of the node, where the server has no limit.
        "env": [{"name": "MILLRACE_MEMORY_LIMIT", "valueFrom": {"resourceFieldRef": limit}}, *_own_names()],
        "ports": [
            {"name": "loader", "containerPort": names.LOADER, "protocol": "TCP"},
            {"name": "loader-probes", "containerPort": names.LOADER_PROBES, "protocol": "TCP"},
        ],
        "readinessProbe": probe | {"httpGet": {"path": "/readyz", "port": "loader-probes"}, "failureThreshold": 2},
        "livenessProbe": {
            "httpGet": {"path": "/livez", "port": "loader-probes"},
            "initialDelaySeconds": 10,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        # The containers see each other's processes, so that the server's memory can be measured: another user's
        # files, variables and keys are closed to what runs in the server.
        "securityContext": LOCKED | {"runAsUser": settings.servers.run_as_user + 1},
        "volumeMounts": [
            _MODELS,
            {"name": "loader-tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
            _CONFIG,
            {"name": "orders", "mountPath": order.ORDERS_FOLDER, "readOnly": True},
        ],
    }


def _bringer(name: str, command: str, settings: KubernetesSettings) -> Object:
    return {
        "name": name,
        "image": settings.fetch.image,
        "imagePullPolicy": settings.servers.image_pull_policy,
        "command": [command, "--config", "/etc/millrace/config.yaml"],
        "resources": settings.fetch.resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _own_names() -> list[Object]:
    return [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{field}"}}} for name, field in _FIELDS.items()
    ]


def triton(want: Wanted, servers: ModelServerSettings) -> Object:
    """The server."""
    shared = want.server.placement == "Shared"
    given = want.server.resources
    resources = (
        {kind: amounts for kind, amounts in (("requests", given.requests), ("limits", given.limits)) if amounts}
        if given.requests or given.limits
        else servers.resources
    )
    # A server of several versions starts empty: it is ready with the first that the loader brings, which is stable's.
    path = f"/v2/models/{want.ref.model}/ready" if shared else "/v2/health/ready"
    ready = {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": PROBE_S}
    live = {"httpGet": {"path": "/v2/health/live", "port": "http"}, "timeoutSeconds": 5}
    container: Object = {
        "name": "triton",
        "image": servers.image,
        "imagePullPolicy": servers.image_pull_policy,
        "command": list(servers.command),
        "args": [*servers.args, *(ARGUMENTS if shared else ()), *triton_options.arguments(want.server)],
        "env": [{"name": name, "value": value} for name, value in sorted(servers.env.items())],
        "ports": [
            {"name": "grpc", "containerPort": names.GRPC, "protocol": "TCP"},
            {"name": "http", "containerPort": names.HTTP, "protocol": "TCP"},
            {"name": "metrics", "containerPort": names.METRICS, "protocol": "TCP"},
        ],
        "resources": resources,
        # Ready means loaded and warm: the configuration has Triton answer requests to itself first.
        "startupProbe": (live if shared else ready) | {"periodSeconds": 1, "failureThreshold": servers.startup_s},
        "readinessProbe": ready | {"periodSeconds": PROBE_S, "failureThreshold": 2},
        "livenessProbe": live | {"periodSeconds": 10, "failureThreshold": 3},
        "securityContext": LOCKED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            _MODELS | {"readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - where the Python backend passes tensors
        ],
    }
    if servers.pre_stop_s:
        # Endpoints go while the server still answers: who had the old list loses nothing.
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": servers.pre_stop_s}}}
    return container
