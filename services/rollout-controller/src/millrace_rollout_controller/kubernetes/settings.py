"""Settings of a controller in a cluster. Blocks named "raw" take Kubernetes' own structures, unchanged."""

import socket
from typing import Any, Literal, Self

from millrace_kit.settings import Settings
from pydantic import Field, model_validator

TRITON_ARGS = (
    "--model-repository=/models",
    "--disable-auto-complete-config",
    "--exit-timeout-secs=20",
    "--http-port=8000",
    "--grpc-port=8001",
    "--metrics-port=8002",
    "--log-info=false",
)


class LeaseSettings(Settings):
    """Which of several replicas works. The names and the rule are client-go's: renew_s < renew_deadline_s < duration_s."""

    name: str = "millrace-rollout-controller"
    """Name of the Lease object."""
    duration_s: int = Field(default=15, ge=3, le=600)
    """How long the others wait after the last renewal they saw, before one of them takes over."""
    renew_deadline_s: float = Field(default=10.0, ge=1, le=600)
    """A leader that could not renew for this long writes no more and ends its process."""
    renew_s: float = Field(default=2.0, ge=0.1, le=60)
    """Time between two attempts to renew or to take the lease."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.renew_s < self.renew_deadline_s < self.duration_s:
            raise ValueError("needs renew_s < renew_deadline_s < duration_s, or two replicas could write at once")
        return self


class GpuSettings(Settings):
    """Added to the pods of versions whose limits name an extended resource with "gpu" or "mig" in it."""

    runtime_class_name: str = ""
    """For example "nvidia"; empty sets none."""
    node_selector: dict[str, str] = Field(default={}, max_length=32)
    """Labels of the nodes, for example nvidia.com/gpu.product."""
    tolerations: tuple[dict[str, Any], ...] = Field(
        default=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},), max_length=16
    )
    """Raw."""
    priority_class_name: str = ""
    """Priority class of GPU pods; empty takes that of every server."""


class ModelServerSettings(Settings):
    """Pods of the model versions. What a manifest says in `spec.server` wins over these defaults."""

    image: str = "nvcr.io/nvidia/tritonserver:25.10-py3"
    """Triton; the full image has the onnxruntime backend, millrace/triton-cpu the Python backend alone."""
    command: tuple[str, ...] = ("tritonserver",)
    """Entry point."""
    args: tuple[str, ...] = TRITON_ARGS
    """Arguments. Ports 8000 (http), 8001 (grpc), 8002 (metrics) and /models are part of the contract with the pods' other fields."""
    env: dict[str, str] = Field(default={}, max_length=64)
    """More environment of the container."""
    platform: Literal["onnxruntime", "pythonOnnx"] = "onnxruntime"
    """Backend for ONNX versions: Triton's own, or ours on its Python backend (CPU only)."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Of both containers."""
    image_pull_secrets: tuple[str, ...] = Field(default=(), max_length=16)
    """Names of Secrets."""
    resources: dict[str, dict[str, str | int]] = Field(default={"requests": {"cpu": "250m", "memory": "512Mi"}})
    """Requests and limits of versions whose manifest names none. Raw."""
    gpu: GpuSettings = GpuSettings()
    node_selector: dict[str, str] = Field(default={}, max_length=32)
    """Labels of nodes for every server."""
    tolerations: tuple[dict[str, Any], ...] = Field(default=(), max_length=32)
    """Raw."""
    affinity: dict[str, Any] = Field(default={})
    """Raw."""
    topology_spread_constraints: tuple[dict[str, Any], ...] = Field(
        default=({"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"},),
        max_length=8,
    )
    """Raw, without labelSelector: the version's own pods are meant."""
    runtime_class_name: str = ""
    """Runtime class of pods without a GPU; empty sets none."""
    priority_class_name: str = ""
    """Priority class; empty sets none."""
    service_account_name: str = ""
    """Service account; empty is the namespace's default. Its token is never mounted."""
    pod_labels: dict[str, str] = Field(default={}, max_length=32)
    """More labels of the pods."""
    pod_annotations: dict[str, str] = Field(default={}, max_length=32)
    """More annotations of the pods."""
    run_as_user: int = Field(default=65532, ge=1)
    """User of the containers."""
    run_as_group: int = Field(default=65532, ge=1)
    """Group of the containers and of the model's files."""
    startup_s: int = Field(default=300, ge=10, le=7200)
    """Longest time from the container's start to ready, warm-up included; then it is restarted."""
    pre_stop_s: int = Field(default=10, ge=0, le=600)
    """Wait between "terminating" and SIGTERM: gateways have stopped sending by then."""
    grace_s: int = Field(default=60, ge=1, le=3600)
    """Longest time from "terminating" to SIGKILL; more than pre_stop_s."""
    shm_size: str = "256Mi"
    """Size of /dev/shm, which the Python backend passes tensors through."""
    model_volume_size: str = "8Gi"
    """Most that a model's files may take on the node."""
    warmup_requests: int = Field(default=50, ge=1, le=10_000)
    """Requests the server answers to itself before it calls itself ready."""
    onnx_threads: int = Field(default=1, ge=1, le=256)
    """Threads of one onnxruntime session."""
    min_available: int = Field(default=0, ge=0, le=1000)
    """PodDisruptionBudget: this many stay up; 0 says "all but one" instead."""

    @model_validator(mode="after")
    def _sleep_fits(self) -> Self:
        if self.pre_stop_s >= self.grace_s:
            raise ValueError("pre_stop_s must be less than grace_s: the kubelet kills at the end of the grace")
        return self


class FetchSettings(Settings):
    """What brings versions' files into the pods: an init container, or in a server of several versions (placement Shared) a loader beside it."""

    image: str = "millrace/rollout-controller:0.1.0"
    """Image with `millrace-model-fetch` and `millrace-model-loader`."""
    config_map: str = "millrace-rollout-controller"
    """ConfigMap whose key `config.yaml` is the controller's settings file; its registry_address and tls are used."""
    tls_secret: str = ""
    """Secret with tls.crt, tls.key and ca.crt, mounted at /etc/millrace/tls; empty mounts none."""
    resources: dict[str, dict[str, str | int]] = Field(
        default={"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}}
    )
    """Raw."""
    attempt_s: float = Field(default=120.0, gt=0, le=7200)
    """How long one container tries while the registry does not answer; then the kubelet starts it anew."""
    loader_tls_name: str = ""
    """Name expected in the certificate of `tls_secret`, by which loaders answer at the address of their pod; empty takes the address."""
    controller_tls_name: str = ""
    """Name in this controller's own certificate, whose holder alone may tell loaders anything; empty admits every client with a certificate."""
    loader_poll_s: float = Field(default=1.0, gt=0, le=60)
    """Time between two questions to a loader what its server holds; news are told at once."""
    loader_timeout_s: float = Field(default=2.0, gt=0, le=60)
    """Deadline of such a question."""


class KubernetesSettings(Settings):
    """A cluster instead of this machine: ModelDeployment objects instead of SQL, pods instead of processes."""

    namespace: str = ""
    """Where everything is; empty is the service account's, or that of the kubeconfig's context."""
    kubeconfig: str = ""
    """Path; empty takes the pod's service account."""
    pod_name: str = socket.gethostname()
    """Own pod, which gets the leader's label; also the holder's identity in the Lease."""
    label_own_pod: bool = True
    """Whether the leader labels its pod `millrace.dev/leader=true`; false outside of a pod."""
    routes_config_map: str = "millrace-routes"
    """ConfigMap that keeps the route table and the gateways heard of."""
    lease: LeaseSettings = LeaseSettings()
    servers: ModelServerSettings = ModelServerSettings()
    fetch: FetchSettings = FetchSettings()
    request_timeout_s: float = Field(default=10.0, gt=0, le=120)
    """Deadline of one request to the API server."""
    watch_s: int = Field(default=300, ge=5, le=3600)
    """Length of one watch; then it goes on from where it was."""
    resync_s: float = Field(default=600.0, ge=10, le=86_400)
    """Time after which everything owned is compared again, without any news."""
    writes_per_s: float = Field(default=50.0, ge=1, le=1000)
    """Most writes a second to the API server, all together."""
    write_burst: int = Field(default=100, ge=1, le=10_000)
    """Most writes at once before that rate counts."""
    parallel_writes: int = Field(default=8, ge=1, le=64)
    """Writes of workloads under way at once."""
    evidence_save_s: float = Field(default=5.0, ge=0, le=60)
    """How often marks and evidence alone are written while a candidate is on trial; a lost leader's rest is counted again."""
