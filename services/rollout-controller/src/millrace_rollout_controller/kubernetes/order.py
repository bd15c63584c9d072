"""What a model server's init container is told: which files of which version, and how the server will run them. One JSON text."""

import json

from millrace_rollout_controller.repository import Flavour
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import Frozen, VersionRef

ENVIRONMENT = "MILLRACE_FETCH_ORDER"
"""Variable that carries the order."""
MODELS = "/models"
"""Where the repository is in both containers."""
TERMINATION_LOG = "/dev/termination-log"

OPTIONS = {"batching", "rate_limit", "response_cache_mib", "model_warmup"}
"""Fields of the manifest's block that `Order.options` carries."""


class Order(Frozen):
    """Everything of a version that decides what its servers do; the digests come from here, the bytes from the registry."""

    ref: VersionRef
    max_batch_size: int
    instances: int
    queue_delay_us: int
    backend: str
    threads: int
    gpu: bool
    warmup: int
    options: str = "{}"
    """The rest of the manifest's block that the configuration needs, as JSON."""

    @property
    def server(self) -> Server:
        """The part of the manifest's block that the configuration needs."""
        values = {
            "maxBatchSize": self.max_batch_size,
            "instances": self.instances,
            "queueDelayUs": self.queue_delay_us,
        }
        return Server.model_validate_json(json.dumps(values | json.loads(self.options)))

    @property
    def flavour(self) -> Flavour:
        """How the graph runs."""
        backend = "onnxruntime" if self.backend == "onnxruntime" else "pythonOnnx"
        return Flavour(backend, self.threads, self.gpu, self.warmup)  # type: ignore[arg-type]


class Ending(Frozen):
    """Why the init container gave up: its termination message."""

    reason: str
    message: str
    permanent: bool
