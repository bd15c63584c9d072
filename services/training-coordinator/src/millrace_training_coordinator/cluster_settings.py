"""Settings of stages that run as Kubernetes Jobs."""

from typing import Annotated, Literal

from millrace_kit.settings import Settings
from pydantic import Field, StringConstraints

ResourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=128)]


class TolerationSettings(Settings):
    """A taint that stage pods tolerate, as Kubernetes has it."""

    key: str = ""
    """Taint's key; empty with `Exists` tolerates everything."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """How `value` is compared."""
    value: str = ""
    """Taint's value."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Taint's effect; empty is every effect."""


class KubernetesSettings(Settings):
    """How stages become Jobs of the coordinator's own namespace, and what they may ask for."""

    namespace: str = ""
    """Namespace of Jobs and pods; empty is the coordinator pod's own."""
    kubeconfig: str = ""
    """Cluster to use from outside; empty is the pod's service account."""
    work_url: str = Field(min_length=1)
    """Work store as an fsspec URL, `s3://bucket/work` or `file:///shared` (see `work_claim`): code, outputs, checkpoints."""
    work_claim: str = ""
    """PersistentVolumeClaim that stage pods mount at the path of a `file://` work store."""
    image: str = Field(min_length=1)
    """Image of stages that name none; it holds `millrace-stage`."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes ask the registry for an image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets for private image registries."""
    service_account: str = "default"
    """Service account of stage pods; its token is never mounted."""
    tls_secret: str = ""
    """Secret (tls.crt, tls.key, ca.crt) mounted at /etc/millrace/tls, by which stages call the services; empty for plain calls."""
    env_from_secrets: tuple[str, ...] = ()
    """Secrets whose keys become environment variables of stages: credentials of the object storage."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further environment of stages, for example AWS_ENDPOINT_URL and AWS_REGION."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Further labels of Jobs, pods and Services, for example for NetworkPolicies."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Nodes that stages may run on; a stage's own selector is added."""
    gpu_node_selector: dict[str, str] = Field(default_factory=dict)
    """Added for stages that ask for GPUs."""
    tolerations: tuple[TolerationSettings, ...] = ()
    """Taints that every stage tolerates; a stage's own are added."""
    runtime_class: str = ""
    """RuntimeClass of stages that name none."""
    priority_class: str = ""
    """PriorityClass of stages that name none."""
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """Extended resource that `gpus` counts, unless the stage names another (a MIG slice)."""
    cpu_request_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a stage's CPUs that its pods request; their limit is the whole. Below 1 on small clusters only."""
    work_size_mib: int = Field(default=20_480, ge=64)
    """Largest working folder of a pod (code, inputs, outputs, checkpoints), in MiB."""
    shm_mib: int = Field(default=1024, ge=64)
    """Largest /dev/shm of a pod, in MiB; it counts as the stage's memory."""
    max_concurrent_stages: int = Field(default=32, ge=1, le=1000)
    """Stages that exist as Jobs at once; which of them run is the cluster scheduler's business."""
    max_cpus: float = Field(default=1024.0, gt=0)
    """CPUs one stage may ask for."""
    max_memory_mib: int = Field(default=16_777_216, ge=16)
    """Memory one stage may ask for, in MiB."""
    max_gpus: int = Field(default=64, ge=0)
    """GPUs one stage may ask for."""
    start_limit_s: float = Field(default=1800.0, gt=0)
    """How long an attempt may wait for a node and its image before it ends as failed (it is retried while retries last)."""
    transfer_limit_s: float = Field(default=1800.0, gt=0)
    """On top of a stage's own time limit: longest time for fetching code and inputs and storing outputs."""
    checkpoint_every_s: float = Field(default=30.0, gt=0)
    """How often a pod copies its checkpoint folder to the work store when it changed."""
    termination_grace_s: int = Field(default=60, ge=5, le=3600)
    """Time a pod has between SIGTERM and SIGKILL; a last checkpoint is stored in it."""
    ttl_s: int = Field(default=86_400, ge=60)
    """How long a finished Job stays; it is removed earlier when its run is forgotten."""
    poll_s: float = Field(default=1.0, gt=0, le=60)
    """How often Jobs and pods are looked at: two list calls, whatever the number of stages."""
    request_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Deadline of one call to the Kubernetes API."""
    patience_s: float = Field(default=120.0, ge=0)
    """How long a call that the API server does not answer is tried again before the attempt counts as failed."""
    max_log_followers: int = Field(default=64, ge=1, le=1024)
    """Pod logs read at once; those of further pods are read when one of these ends."""
