"""Settings of the feature service."""

from typing import Literal, Self

from millrace_kit.settings import ServiceSettings, Settings
from pydantic import Field, model_validator

DAY_S = 86_400


class RedisSettings(Settings):
    """A Redis database (one primary, 6.2 or newer; not Redis Cluster) that the replicas share."""

    url: str = "redis://127.0.0.1:6379/0"
    """`redis://host:port/database`, or `rediss://…` for TLS."""
    username: str = ""
    """Empty for Redis's default user."""
    password: str = ""
    """Written as `${file:/path}` or `${env:NAME}`; empty for none."""
    ca_file: str = ""
    """Authority that signed Redis's certificate, PEM; empty takes the system's. For `rediss://` only."""
    prefix: str = "millrace:feature:"
    """What the names of all keys begin with; installations that share a database need different ones."""
    read_timeout_s: float = Field(default=2.0, gt=0, le=30)
    """Longest wait of an online read for Redis, a connection included; then the caller gets UNAVAILABLE."""
    write_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for one answer while records are applied or groups are filled."""
    max_connections: int = Field(default=64, ge=2, le=10_000)
    """Connections of one replica's worker. Its reads share one connection: their commands go together, in the order they come."""
    max_waiting_reads: int = Field(default=10_000, ge=1, le=1_000_000)
    """Reads of one process that may wait for Redis; the next one gets UNAVAILABLE at once."""


class OnlineStoreSettings(Settings):
    """Where online values are kept."""

    kind: Literal["embedded", "redis"] = "embedded"
    """`embedded` is a file and memory of the one process; `redis` is shared by any number of replicas."""
    redis: RedisSettings = RedisSettings()
    """For `kind: redis`."""


class ConsistencySettings(Settings):
    """The continuous comparison of served values with what the lake says about the same instants."""

    sample_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of the entities whose answers are checked, chosen by a hash of their join keys; 0 checks nothing."""
    settle_s: float = Field(default=600.0, ge=0, le=30 * DAY_S)
    """How long after an answer it is checked: at least as long as records may be late, or what was late counts as a difference."""
    check_every_s: float = Field(default=60.0, gt=0, le=DAY_S)
    """Time between two checks of what has settled."""
    window_s: int = Field(default=3600, ge=1, le=30 * DAY_S)
    """Width of the windows of time that rates are kept for."""
    tolerance: float = Field(default=0.001, ge=0, le=1)
    """Relative difference up to which two numbers are equal."""
    max_queue: int = Field(default=10_000, ge=1, le=1_000_000)
    """Sampled answers of this process that wait to be logged; more are dropped and counted, reads never wait."""
    max_waiting: int = Field(default=200_000, ge=1, le=10_000_000)
    """Logged answers that wait for their check; more are dropped and counted."""
    max_check_rows: int = Field(default=20_000, ge=1, le=30_000)
    """Most answers of one check; they and their features are held in memory once."""
    max_findings: int = Field(default=5, ge=0, le=1000)
    """Examples kept per feature, kind and window."""
    keep_s: int = Field(default=30 * DAY_S, ge=60, le=3650 * DAY_S)
    """How long windows and examples are kept."""


class OnlineCacheSettings(Settings):
    """Answers of the online store kept by each process, so that reads of the same entities cost no round trip."""

    max_staleness_ms: int = Field(default=0, ge=0, le=3_600_000)
    """How far behind the store an answer may be; 0 keeps nothing. Reads with an `event_time` are never kept."""
    max_entries: int = Field(default=100_000, ge=1, le=100_000_000)
    """Most (view, entity) pairs kept, the least recently read ones dropped; one takes about a kilobyte for ten features."""
    views: tuple[str, ...] = ()
    """Views that may be kept; a service is when all its views are. Empty is every view."""


class FeastSettings(Settings):
    """Feast's own wire formats beside our gRPC service."""

    http_listen: str = ""
    """Address of Feast's HTTP API (`/get-online-features`, `/health`), `host:port`; empty serves none. Its TLS, deadline, limits and
    allowed clients are those of gRPC."""
    grpc: bool = True
    """Whether the gRPC server answers Feast's `feast.serving.ServingService` and `GrpcFeatureServer` too."""


class VectorSearchSettings(Settings):
    """Search among the embeddings of views that have a `vector_index`; each process keeps their vectors in memory."""

    max_memory_mib: int = Field(default=1024, ge=1, le=1_048_576)
    """Memory of all indexes of one process: 4 bytes a number (8 for Array(Float64)) and about 270 a vector. A view whose vectors do not
    fit is not searched, and searches of it say so."""
    max_concurrent: int = Field(default=2, ge=1, le=64)
    """Searches computed at once; each may take one core and, while it runs, 40 bytes a vector."""
    max_waiting: int = Field(default=64, ge=0, le=10_000)
    """Searches that wait for their turn; the next one gets RESOURCE_EXHAUSTED."""
    poll_s: float = Field(default=0.2, gt=0, le=10)
    """Longest wait of one poll of the bus for changes; also how soon other definitions are noticed."""
    rebuild_every_s: int = Field(default=21_600, ge=60, le=30 * DAY_S)
    """How often an index is read from the online store again, so that what left the store leaves it too."""


class AccessSettings(Settings):
    """Who is who for the Feast permissions that are applied with definitions; without permissions everybody may do everything."""

    administrators: tuple[str, ...] = ()
    """Names in client certificates that may do everything whatever the permissions say, so that nobody is locked out."""
    roles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Role -> names in client certificates that have it. A name in a certificate is a role by itself too."""
    audit_rows: int = Field(default=100_000, ge=1000, le=100_000_000)
    """Newest changes and refusals that are kept."""


class SetPinSettings(Settings):
    """Which table versions ingestion keeps from its vacuum: those that training sets were built from."""

    ingestion_address: str = ""
    """`host:port` of ingestion, which pins them before a build reads them. While it does not answer nothing is built (UNAVAILABLE), so
    every set can be rebuilt. Empty pins nothing: then sets can be rebuilt for as long as ingestion's retention keeps their versions."""
    timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Longest wait for one answer."""
    retry_s: float = Field(default=30.0, ge=0, le=3600)
    """How long ingestion is tried while it is away; waits double from 0.1 s to 5 s."""
    build_hours: int = Field(default=24, ge=1, le=720)
    """How long the pins of a build hold that never ends: longer than any build takes."""
    keep_days: int = Field(default=0, ge=0, le=36_500)
    """How long after a set was built its versions stay; 0 for ever, until somebody unpins them (the owner is in the set)."""


class FeatureSettings(ServiceSettings):
    """One feature service: definitions, online values and training sets."""

    state_dir: str = ".millrace/feature"
    """Folder for the embedded online store, the Feast registry file and, unless `database_url` says otherwise, the metadata."""
    lake_url: str = ".millrace/lake"
    """Folder or URL of the lake; a contract's Delta table is `<lake_url>/<contract>`."""
    training_sets_url: str = ".millrace/training-sets"
    """fsspec URL of the content-addressed store of training sets."""
    database_url: str = ""
    """SQLAlchemy URL of definitions and training-set records; empty takes SQLite in `state_dir`."""
    online_store: OnlineStoreSettings = OnlineStoreSettings()
    """Where online values are kept."""
    consistency: ConsistencySettings = ConsistencySettings()
    """Served values beside the lake's."""
    online_cache: OnlineCacheSettings = OnlineCacheSettings()
    """Answers kept for a bounded time; off by default."""
    reads_listen: str = ""
    """Address that takes online reads (`GetOnlineFeatures`) as gRPC's messages over plain HTTP/1.1, `host:port`, for inference gateways: a
    fraction of what a call by gRPC costs both sides. Its TLS, deadline, limits and allowed clients are those of gRPC. Empty serves none."""
    feast: FeastSettings = FeastSettings()
    """Reads by unmodified Feast clients."""
    vector_search: VectorSearchSettings = VectorSearchSettings()
    """Search among embeddings."""
    set_pins: SetPinSettings = SetPinSettings()
    """Table versions of training sets, kept by ingestion."""
    processes: int = Field(default=1, ge=1, le=256)
    """Processes that share the ports of gRPC and HTTP, one a core, each a replica with metrics and probes on `metrics_listen`'s port plus its
    number. For a machine of many cores without a cluster: Redis, Kafka and `database_url` are needed, as for replicas."""
    definitions_poll_s: float = Field(default=1.0, gt=0, le=60)
    """How often a replica looks whether another one has applied other definitions."""
    read_behind_s: int = Field(default=35 * DAY_S, ge=0, le=3650 * DAY_S)
    """How far behind a contract's watermark an online read may ask; older history is dropped from the online store."""
    head_behind_s: int = Field(default=3600, ge=0, le=3650 * DAY_S)
    """How far behind a contract's watermark an online read may ask views with a fresh head, whose single events are kept so long."""
    max_event_ahead_s: int = Field(default=DAY_S, ge=0, le=3650 * DAY_S)
    """Events later than the wall clock by more than this do not move the watermark, so one wrong date cannot drop history."""
    fetch_messages: int = Field(default=64, ge=1, le=10_000)
    """Most bus messages applied in one transaction."""
    fetch_wait_s: float = Field(default=0.2, gt=0, le=10)
    """Longest wait of one poll of the bus; also the longest delay before new definitions are noticed."""
    previous_kept_s: int = Field(default=3600, ge=0, le=365 * DAY_S)
    """How long definitions stay served beside those that replaced them, so that a rollback needs no filling; 0 drops them at once."""
    access: AccessSettings = AccessSettings()
    """Who is who for Feast's permissions."""
    apply_wait_s: float = Field(default=5.0, ge=0, le=300)
    """How long ApplyDefinitions waits for the backfill of new views before it answers all the same."""
    max_registry_mib: int = Field(default=8, ge=1, le=64)
    """Largest Feast registry accepted, in MiB."""
    max_training_rows: int = Field(default=5_000_000, ge=1, le=1_000_000_000)
    """Most rows of one training set."""
    build_rows: int = Field(default=1_048_576, ge=65_536, le=1_000_000_000)
    """Rows of a training set whose features are in memory at once: about 40 bytes a row and feature. More rows take another pass over the lake."""
    build_memory_mib: int = Field(default=1024, ge=256, le=1_048_576)
    """Memory DuckDB may use for one build or backfill; it spills to `state_dir` beyond."""
    build_threads: int = Field(default=2, ge=1, le=256)
    """Threads DuckDB may use."""
    max_builds: int = Field(default=1, ge=1, le=64)
    """Training sets built at once; `max_queued_builds` more wait, the next caller gets RESOURCE_EXHAUSTED."""
    max_queued_builds: int = Field(default=8, ge=0, le=1000)
    """Builds that may wait for their turn."""

    @model_validator(mode="after")
    def _processes_share(self) -> Self:
        if self.processes > 1:
            shared = self.online_store.kind == "redis" and self.bus.kind == "kafka" and self.database_url
            if not shared:
                raise ValueError(
                    "processes: more than one needs online_store.kind redis, bus.kind kafka and database_url"
                )
            if any(address.endswith(":0") for address in (self.listen, self.reads_listen, self.feast.http_listen)):
                raise ValueError(
                    "processes: more than one needs ports that are fixed (listen, reads_listen, feast.http_listen)"
                )
        return self
