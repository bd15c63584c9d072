"""What is told to who brings files into a model server's pod: which ones of which version, and how the server will run them. JSON texts.

A server of one version has an init container that gets one order. A server of several has a loader, which finds its orders in a file of the
deployment's ConfigMap, and is told of a newer one before the kubelet brings it.
"""

import json

from pydantic import Field

from millrace_rollout_controller.repository import Flavour
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import Frozen, VersionRef

ENVIRONMENT = "MILLRACE_FETCH_ORDER"
"""Variable that carries the order."""
MODELS = "/models"
"""Where the repository is in both containers."""
TERMINATION_LOG = "/dev/termination-log"
ORDERS_FOLDER, ORDERS_FILE = "/etc/millrace-orders", "orders.json"
"""Where a loader finds its orders; the second is the ConfigMap's key too."""

OPTIONS = {"batching", "rate_limit", "response_cache_mib", "model_warmup"}
"""Fields of the manifest's block that `Order.options` carries."""


MAX_VERSIONS = 16
"""Most versions in one server: stable, a candidate, and those on their way out."""


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
    placement: str = "Separate"
    memory_mib: int | None = None
    """Memory that the version needs beside others, where the manifest says it."""

    @property
    def server(self) -> Server:
        """The part of the manifest's block that the configuration needs."""
        values = {
            "maxBatchSize": self.max_batch_size,
            "instances": self.instances,
            "queueDelayUs": self.queue_delay_us,
            "placement": self.placement,
            "memoryMib": self.memory_mib,
        }
        return Server.model_validate_json(json.dumps(values | json.loads(self.options)))

    @property
    def flavour(self) -> Flavour:
        """How the graph runs."""
        backend = "onnxruntime" if self.backend == "onnxruntime" else "pythonOnnx"
        return Flavour(backend, self.threads, self.gpu, self.warmup)  # type: ignore[arg-type]


class Orders(Frozen):
    """What a server of several versions should hold."""

    revision: int
    """Rises with every change: of two documents the one with the higher one counts."""
    versions: tuple[Order, ...] = Field(min_length=1, max_length=MAX_VERSIONS)
    """The first one is stable's, without which the server takes no calls."""


class Ending(Frozen):
    """Why the init container gave up: its termination message."""

    reason: str
    message: str
    permanent: bool
