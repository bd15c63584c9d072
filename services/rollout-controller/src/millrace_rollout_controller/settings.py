"""Settings of the rollout controller."""

from millrace_kit.settings import ServiceSettings, Settings
from pydantic import Field

from millrace_rollout_controller.kubernetes.settings import KubernetesSettings
from millrace_rollout_controller.prometheus import PrometheusSettings


class TritonSettings(Settings):
    """Model servers on this machine."""

    host: str = "127.0.0.1"
    """Address the servers listen on and gateways reach them at."""
    start_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """Longest time from start to ready; then the process is replaced."""
    warmup_requests: int = Field(default=200, ge=1, le=100_000)
    """Most requests a new server answers before it gets traffic; it stops earlier when latency is stable."""
    warmup_s: float = Field(default=5.0, gt=0, le=600)
    """Longest time spent on them."""
    probe_s: float = Field(default=1.0, gt=0, le=60)
    """Time between readiness questions to a running server, and each one's deadline."""
    probe_failures: int = Field(default=10, ge=2, le=1000)
    """Unanswered questions in a row after which a server is replaced; it leaves the route after the second."""
    backoff_s: float = Field(default=0.5, gt=0, le=60)
    """Wait before the first restart of a crashed server; doubles with each crash."""
    backoff_max_s: float = Field(default=15.0, gt=0, le=600)
    """Longest such wait."""
    stop_timeout_s: float = Field(default=10.0, gt=0, le=600)
    """How long a server may finish its requests after SIGTERM; then it is killed."""
    max_servers: int = Field(default=32, ge=1, le=1000)
    """Most server processes at once; a deployment that needs more waits."""
    max_artifact_mib: int = Field(default=2048, ge=1, le=1_000_000)
    """Largest artifact that is fetched."""
    onnx_threads: int = Field(default=1, ge=1, le=256)
    """Threads of one onnxruntime session."""
    memory_factor: float = Field(default=2.0, ge=1, le=100)
    """Memory of a version inside a shared server, as a multiple of its files; for versions that do not declare it."""
    memory_base_mib: int = Field(default=64, ge=0, le=1_000_000)
    """Memory that it needs besides: a process of the Python backend with its libraries."""


class RolloutSettings(ServiceSettings):
    """The whole file."""

    database_url: str = "sqlite:///.millrace/rollout/rollout.sqlite"
    """Manifests, statuses and routes."""
    registry_address: str = "127.0.0.1:7403"
    """Where versions and artifacts come from."""
    gateway_addresses: tuple[str, ...] = ("127.0.0.1:7405",)
    """Every gateway whose figures count."""
    gateway_tls_name: str = ""
    """Name expected in the certificates of gateways that say their own address, which is that of a pod; empty takes the address."""
    drift_address: str = "127.0.0.1:7406"
    """Where outcomes come from."""
    triton: TritonSettings = TritonSettings()
    """Servers of one machine; without meaning in a cluster."""
    kubernetes: KubernetesSettings | None = None
    """A cluster instead of this machine; `database_url` and `triton` have no meaning then."""
    prometheus: PrometheusSettings = PrometheusSettings()
    """Where gates with a PromQL query ask."""
    tick_s: float = Field(default=0.25, gt=0, le=60)
    """Time between two looks at everything."""
    poll_s: float = Field(default=1.0, gt=0, le=60)
    """Time between two questions for figures and outcomes."""
    poll_timeout_s: float = Field(default=1.0, gt=0, le=60)
    """Deadline of such a question; no answer is no evidence."""
    registry_timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Deadline of a question to the registry."""
    artifact_timeout_s: float = Field(default=300.0, gt=0, le=7200)
    """Deadline of fetching one artifact."""
    drain_s: float = Field(default=5.0, ge=0, le=600)
    """How long a version stays up after its weight of 0 is in force; at least the longest request."""
    gateway_forget_s: float = Field(default=30.0, gt=0, le=3600)
    """How long a gateway that is not connected is still believed to send traffic."""
    gateway_ack_s: float = Field(default=60.0, gt=0, le=3600)
    """How long a connected gateway may stay behind and still hold rollouts up."""
    max_deployments: int = Field(default=100, ge=1, le=1000)
    """Most deployments."""
    max_gateways: int = Field(default=256, ge=1, le=1000)
    """Most gateway streams at once."""
    stop_servers_on_exit: bool = True
    """Whether an orderly stop (SIGTERM) stops the model servers; after kill -9 they go on and are adopted by the next start."""
