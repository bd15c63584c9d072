"""The manifest's `spec.server`: how many model servers, how large, on which nodes."""

import re
from typing import Annotated, Any, Literal

from millrace_kit.errors import InvalidArgumentError
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_REPLICAS = 32
QUANTITY = r"^([0-9]{1,15})(\.[0-9]{1,9})?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
"""A Kubernetes quantity as manifests write it."""
LABEL_KEY = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"
DURATION = r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"
POOL_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
OBJECT_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
TARGET = r"^[1-9][0-9]{0,6}(us|ms|s|%)$"
_UNITS_US = {"us": 1, "ms": 1000, "s": 1_000_000}

Amount = Annotated[str, Field(pattern=QUANTITY, max_length=32)] | Annotated[int, Field(ge=0)]
"""A whole number, or a text like 500m or 2Gi."""


class Block(BaseModel):
    """Base of every part: frozen, strict types, camelCase keys, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        populate_by_name=False,
        use_attribute_docstrings=True,
    )


class Resources(Block):
    """Requests and limits in Kubernetes' own words; the executor refuses what it cannot give."""

    limits: dict[str, Amount] = Field(default={}, max_length=16)
    """For example cpu, memory, nvidia.com/gpu or nvidia.com/mig-1g.10gb."""
    requests: dict[str, Amount] = Field(default={}, max_length=16)
    """What the scheduler sets aside."""


class Autoscaling(Block):
    """More servers under load, by a HorizontalPodAutoscaler of each version; none without any (`minReplicas: 0`)."""

    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] | None = None
    """Never fewer; None is `replicas`, and it may not be less, but for 0: a version without requests for `idleAfter` then has none, and the
    next call waits until `replicas` are started."""
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = None
    """Never more; with `minReplicas: 0` it may be left out, and is `replicas` then."""
    idle_after: Annotated[str, Field(min_length=2, max_length=21, pattern=DURATION)] | None = None
    """Time without a request after which a version has no servers, like 15m; needed with `minReplicas: 0`. Not while it is part of a rollout."""
    metric: Literal["queueTime", "cpu"] = "cpu"
    """`cpu`: share of the CPU request in use. `queueTime`: mean time a request waits inside the server, which needs an adapter
    that serves the pods' metric `millrace_queue_time_us` (docs in the chart)."""
    target: Annotated[str, Field(pattern=TARGET, max_length=10)] = "80%"
    """Value to hold: a percentage with cpu, a time like 5ms with queueTime."""

    @property
    def percent(self) -> int:
        """The target of `cpu`."""
        return int(self.target.removesuffix("%"))

    @property
    def microseconds(self) -> int:
        """The target of `queueTime`."""
        match = re.fullmatch(r"(\d+)(us|ms|s)", self.target)
        return int(match[1]) * _UNITS_US[match[2]] if match else 0


class Toleration(Block):
    """A taint the pods may live with, as in a pod's spec."""

    key: Annotated[str, Field(pattern=LABEL_KEY, max_length=317)] | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)] | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=31_536_000)] | None = None


class Spread(Block):
    """How the version's own pods are spread, as in a pod's spec."""

    max_skew: int = Field(default=1, ge=1, le=1000)
    topology_key: Annotated[str, Field(pattern=LABEL_KEY, max_length=317)]
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "ScheduleAnyway"


class Batching(Block):
    """How single requests become batches inside a server: Triton's dynamic batcher, beside `maxBatchSize` and `queueDelayUs`."""

    preferred_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(), max_length=16)
    """Rows of a batch at which it need not wait any longer, rising; empty sends what there is."""
    priority_levels: int = Field(default=0, ge=0, le=10)
    """Queues of their own, 1 being served first; a request names its own by the V2 parameter `priority`. 0 has one queue for all."""
    default_priority: Annotated[int, Field(ge=1, le=10)] | None = None
    """Queue of a request that names none; needed with `priorityLevels`."""
    max_queue_size: int = Field(default=0, ge=0, le=1_000_000)
    """Requests that may wait in a queue; more are refused at once (UNAVAILABLE). 0 is no limit."""
    queue_timeout_us: int = Field(default=0, ge=0, le=600_000_000)
    """Longest wait in a queue, then the request is refused; 0 is no limit."""


class RateLimit(Block):
    """Executions at once, over all instances of a server: Triton's rate limiter with one resource."""

    per_instance: int = Field(default=1, ge=1, le=1000)
    """Units of the resource that one running instance holds."""
    total: int = Field(ge=1, le=100_000)
    """Units that a server has; with several GPUs each has as many."""
    priority: int = Field(default=1, ge=1, le=1000)
    """Of instances that wait for units at the same time, those of 1 come first, those of 2 half as often."""


class ModelWarmup(Block):
    """Requests a server answers to itself, of zeros, before it says that it is ready."""

    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(1,), min_length=1, max_length=16)
    """Rows of the requests, one kind each; a graph may be compiled anew for every size."""
    count: int = Field(default=1, ge=1, le=1000)
    """Requests of each kind."""


class Pool(Block):
    """One server for the models of many deployments, with room for fewer than there are: they are loaded and unloaded by use."""

    name: Annotated[str, Field(pattern=POOL_NAME, max_length=40)]
    """Deployments that name the same pool share its server."""
    capacity_mib: Annotated[int, Field(ge=1, le=4_194_304)] | None = None
    """Memory that all models in the server may take together; of several deployments that name one the smallest counts. None takes what the
    machine has free."""
    pinned: bool = False
    """Once loaded it is never unloaded for another model."""
    min_residence: Annotated[str, Field(min_length=2, max_length=21, pattern=DURATION)] = "10s"
    """Shortest time from loaded to unloaded for another model: at least that long its callers have it to themselves, and no pool loads and
    unloads more often."""


class Server(Block):
    """The model servers of each version."""

    placement: Literal["Separate", "Shared"] = "Separate"
    """Separate: each version has servers of its own. Shared: a candidate is loaded into the servers that stable runs in, so that one GPU is
    enough; `replicas` is the number of these servers. Cannot be changed."""
    memory_mib: Annotated[int, Field(ge=1, le=4_194_304)] | None = None
    """Of Shared and pools only: memory that one version needs in a server. Loading waits until so much is free; None takes the size of its
    files, times a factor of the controller's settings."""
    pool: Pool | None = None
    """Instead of servers of its own: a place in a server shared with other deployments. Cannot be changed to another pool, or to none."""
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    """Ready servers a version needs before it gets traffic; with autoscaling the number to begin with."""
    resources: Resources = Resources()
    max_batch_size: int = Field(default=64, ge=1, le=4096)
    """Most rows of one batch."""
    timeout_ms: int = Field(default=1000, ge=1, le=600_000)
    """Deadline of one model call."""
    instances: int = Field(default=1, ge=1, le=16)
    """Copies of the model inside one server."""
    queue_delay_us: int = Field(default=0, ge=0, le=1_000_000)
    """How long a request may wait for others to fill a batch."""
    batching: Batching = Batching()
    rate_limit: RateLimit | None = None
    """None lets every instance run whenever it has requests."""
    response_cache_mib: int = Field(default=0, ge=0, le=65_536)
    """Memory of a server for answers to equal requests, which are then answered without the model; 0 keeps none. An answer from there is in
    the figures of its version like any other, and faster."""
    model_warmup: ModelWarmup | None = None
    """None leaves it at the controller's own, a few single rows."""
    autoscaling: Autoscaling | None = None
    node_selector: dict[str, Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)]] = Field(
        default={}, max_length=16
    )
    """Labels of the nodes, for example nvidia.com/gpu.product; added to the controller's own."""
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=16)
    """Added to the controller's own."""
    affinity: dict[str, Any] | None = None
    """As in a pod's spec; instead of the controller's own."""
    topology_spread_constraints: tuple[Spread, ...] = Field(default=(), max_length=4)
    """Instead of the controller's own, when there is any."""
    runtime_class_name: Annotated[str, Field(pattern=OBJECT_NAME, max_length=253)] | None = None
    """For example nvidia; instead of the controller's own."""
    priority_class_name: Annotated[str, Field(pattern=OBJECT_NAME, max_length=253)] | None = None
    """Instead of the controller's own."""

    @property
    def holds_several(self) -> bool:
        """Whether its servers hold more than one version, told apart by numbers."""
        return self.placement == "Shared" or self.pool is not None


def check_server(server: Server) -> None:
    """Rules of more than one field.

    Raises:
        InvalidArgumentError: names the first field that does not fit the others.
    """
    if bad := [key for key in server.node_selector if not re.fullmatch(LABEL_KEY, key)]:
        raise InvalidArgumentError("spec.server.nodeSelector", f"{bad[0][:80]!r} is no name of a label")
    for index, toleration in enumerate(server.tolerations):
        where = f"spec.server.tolerations[{index}]"
        if toleration.operator == "Exists" and toleration.value:
            raise InvalidArgumentError(f"{where}.value", "belongs to operator Equal")
        if toleration.operator == "Equal" and toleration.key is None:
            raise InvalidArgumentError(f"{where}.key", "is needed by operator Equal")
    if server.memory_mib is not None and not server.holds_several:
        raise InvalidArgumentError("spec.server.memoryMib", "belongs to placement Shared and to pool")
    _check_pool(server)
    _check_batches(server)
    scaling = server.autoscaling
    if scaling is None:
        return
    least = server.replicas if scaling.min_replicas is None else scaling.min_replicas
    where = "spec.server.autoscaling"
    if scaling.min_replicas and least < server.replicas:
        raise InvalidArgumentError(f"{where}.minReplicas", "must be at least spec.server.replicas, or 0")
    if (scaling.min_replicas == 0) != (scaling.idle_after is not None):
        raise InvalidArgumentError(f"{where}.idleAfter", "belongs to minReplicas: 0, and minReplicas: 0 needs it")
    if scaling.max_replicas is None and scaling.min_replicas != 0:
        raise InvalidArgumentError(f"{where}.maxReplicas", "is needed, but with minReplicas: 0")
    if scaling.max_replicas is not None and scaling.max_replicas < max(least, server.replicas):
        raise InvalidArgumentError(f"{where}.maxReplicas", "must be at least minReplicas and spec.server.replicas")
    if (scaling.metric == "cpu") != scaling.target.endswith("%"):
        raise InvalidArgumentError(f"{where}.target", "needs a percentage with cpu and a time like 5ms with queueTime")


def _check_pool(server: Server) -> None:
    if (pool := server.pool) is None:
        return
    beside = {
        "placement": server.placement == "Shared", "replicas": server.replicas != 1, "resources": server.resources != Resources(),
        "rateLimit": server.rate_limit is not None, "responseCacheMib": server.response_cache_mib > 0,
    }  # fmt: skip
    if field := next((name for name, given in beside.items() if given), ""):
        raise InvalidArgumentError(f"spec.server.{field}", "does not fit pool: the server is not this deployment's own")
    if pool.pinned and server.autoscaling is not None:
        raise InvalidArgumentError("spec.server.autoscaling", "does not fit pool.pinned, which never sleeps")
    if pool.capacity_mib is not None and server.memory_mib is not None and server.memory_mib > pool.capacity_mib:
        raise InvalidArgumentError("spec.server.memoryMib", "must be at most pool.capacityMib, or it is never loaded")


def _check_batches(server: Server) -> None:
    batching = server.batching
    where = "spec.server.batching"
    sizes = batching.preferred_sizes
    if list(sizes) != sorted(set(sizes)):
        raise InvalidArgumentError(f"{where}.preferredSizes", "must be rising")
    warmup = server.model_warmup.batch_sizes if server.model_warmup is not None else ()
    for field, given in ((f"{where}.preferredSizes", sizes), ("spec.server.modelWarmup.batchSizes", warmup)):
        if any(size > server.max_batch_size for size in given):
            raise InvalidArgumentError(field, "must be at most spec.server.maxBatchSize")
    if (batching.default_priority is not None) != (batching.priority_levels > 0):
        raise InvalidArgumentError(f"{where}.defaultPriority", "belongs to priorityLevels, and priorityLevels needs it")
    if batching.default_priority is not None and batching.default_priority > batching.priority_levels:
        raise InvalidArgumentError(f"{where}.defaultPriority", "must be at most priorityLevels")
    limit = server.rate_limit
    if limit is not None and limit.per_instance > limit.total:
        message = "must be at least perInstance, or no instance could ever run"
        raise InvalidArgumentError("spec.server.rateLimit.total", message)
