"""Settings of the ingestion service; every queue, batch and wait has its limit here."""

from typing import Literal

from millrace_kit.settings import KafkaSecurity, ServiceSettings, Settings
from pydantic import Field


class SourceConnection(Settings):
    """Brokers of somebody else, with what they and their schema registry must be shown."""

    bootstrap_servers: tuple[str, ...] = Field(min_length=1)
    """Brokers, `host:port`."""
    security: KafkaSecurity = KafkaSecurity()
    """TLS and SASL of the brokers."""
    schema_registry_url: str = Field(default="", pattern=r"^(https?://.+)?$")
    """Base URL of a schema registry with Confluent's API; empty is none."""
    registry_username: str = ""
    """Name for the registry's basic authentication; empty shows none."""
    registry_password: str = Field(default="", repr=False)
    """Password of that name; a reference such as `${file:/path}`."""
    registry_ca_file: str = ""
    """Authorities of the registry's certificate (PEM); empty takes the system's."""


class IngestionSettings(ServiceSettings):
    """What `millrace-ingestion --config FILE` reads."""

    lake_url: str = ""
    """Folder of the lake (path or URL of an object store); one Delta table a contract. Empty takes `<state_dir>/lake`."""
    lake_options: dict[str, str] = Field(default_factory=dict)
    """Options of the object store (delta-rs names, for example `AWS_REGION`); empty for local disk."""
    database_url: str = ""
    """SQLAlchemy URL of contracts, batches and dead letters. Empty takes SQLite in `state_dir`."""
    max_contracts: int = Field(default=500, ge=1, le=10_000)
    """Contracts one service keeps; each has its own landing task."""
    max_batch_rows: int = Field(default=100_000, ge=1, le=1_000_000)
    """Records in one batch; more is RESOURCE_EXHAUSTED (`max_batch_rows`)."""
    max_batch_mib: int = Field(default=32, ge=1, le=60)
    """Size of one batch, as sent and as decoded, in MiB; a bus message (at most 64 MiB) has to hold it."""
    max_queued_batches: int = Field(default=1024, ge=1, le=100_000)
    """Batches accepted and not yet answered, over all contracts; unary writes then get RESOURCE_EXHAUSTED, streams wait."""
    max_queued_mib: int = Field(default=256, ge=1, le=65_536)
    """The same in MiB, of the payload or of the decoded records, whichever is larger."""
    stream_window: int = Field(default=32, ge=1, le=1024)
    """Batches of one stream that may be unanswered; the stream is read no further until one is answered."""
    max_commit_rows: int = Field(default=400_000, ge=1, le=5_000_000)
    """Records merged into one Delta commit at most (a single batch may be larger)."""
    max_commit_batches: int = Field(default=512, ge=1, le=10_000)
    """Batches merged into one Delta commit at most."""
    max_commit_mib: int = Field(default=128, ge=1, le=1024)
    """Decoded size of one Delta commit at most, in MiB (a single batch may be larger)."""
    linger_ms: float = Field(default=2.0, ge=0, le=1000)
    """Longest wait for more batches before a commit; while a commit runs, batches gather anyway."""
    publish_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest time the bus is tried for one commit; then its batches get UNAVAILABLE and the publish is made up for later."""
    maintain_every_commits: int = Field(default=64, ge=1, le=10_000)
    """Commits between two compactions of small files; a commit costs about 0.1 ms for each file in the table."""
    compact_target_mib: int = Field(default=32, ge=1, le=1024)
    """Files at least this large are left alone by compaction."""
    maintenance_every_s: float = Field(default=3_600.0, gt=0, le=604_800)
    """Between two rounds of scheduled maintenance of every table: compaction, and what the settings below switch on."""
    z_order: Literal["none", "key", "event_time", "key_and_event_time"] = "none"
    """Order in which a round rewrites a table that has grown: it costs reading and writing the whole table, with its batches waiting."""
    vacuum_retention_h: int = Field(default=0, ge=0, le=876_000)
    """Files that no version of these last hours has are deleted, unless a pin holds a version that has them; 0 deletes none. Set it
    where the feature service pins what training sets name (its `set_pins`), or where sets need not be built again."""
    log_retention_h: int = Field(default=0, ge=0, le=876_000)
    """Log entries older than this are deleted, and their versions with them, unless a pin holds an older version; 0 deletes none."""
    index_flush_ids: int = Field(default=262_144, ge=1, le=16_777_216)
    """Event ids kept in memory before the duplicate index writes a segment."""
    replay_rows: int = Field(default=5_000, ge=1, le=100_000)
    """Dead letters replayed in one batch."""
    max_dead_letters: int = Field(default=10_000_000, ge=1)
    """Dead letters kept; a batch that would add more is refused with RESOURCE_EXHAUSTED, nothing is dropped silently."""
    dead_letter_topics: bool = True
    """Whether dead letters are also published, to `millrace.dead-letters.<contract>`."""
    dead_letter_retention_days: float = Field(default=0, ge=0, le=36_500)
    """Dead letters older than this are removed; 0 keeps them."""
    dead_letter_retention_count: int = Field(default=0, ge=0)
    """The oldest dead letters beyond this number are removed; 0 keeps them, and `max_dead_letters` refuses more."""
    quality_bucket_s: float = Field(default=300.0, ge=1, le=86_400)
    """Time whose quality figures are kept as one bucket; changing it starts new buckets beside the old ones."""
    quality_retention_days: float = Field(default=30, gt=0, le=3_650)
    """Quality buckets older than this are removed."""
    quality_flush_s: float = Field(default=30.0, gt=0, le=3_600)
    """Between two writes of quality figures to the database; a killed process loses those since the last one."""
    max_quality_series: int = Field(default=2_000, ge=0, le=100_000)
    """Columns and rules of all contracts together that have quality metrics, first come first served; `GetQuality` has all."""
    housekeeping_every_s: float = Field(default=300.0, gt=0, le=86_400)
    """Between two looks for what is too old."""

    source_connections: dict[str, SourceConnection] = Field(default_factory=dict)
    """Brokers of others by the name that sources know them by; secrets are references (`${file:/path}`)."""
    source_inline_brokers: bool = True
    """Whether a source may name brokers and a schema registry itself, in plain text and without secrets."""
    source_locations: tuple[str, ...] = ()
    """Prefixes of paths and URLs below which sources may read files, for example `s3://bucket/drop/`; empty allows none."""
    max_sources: int = Field(default=100, ge=0, le=10_000)
    """Sources one service reads; a topic source costs a consumer and its buffer."""
    source_batch_records: int = Field(default=20_000, ge=1, le=1_000_000)
    """Messages or records of files in one batch of a source at most."""
    source_batch_mib: int = Field(default=8, ge=1, le=60)
    """Size of one batch of a source at most, in MiB; a larger message is a dead letter without its value."""
    source_linger_ms: float = Field(default=200.0, ge=1, le=60_000)
    """Longest wait for more messages before a batch of a topic lands."""
    source_window: int = Field(default=3, ge=1, le=64)
    """Batches of one source that may be unanswered; nothing is read while there are more."""
    source_buffer_mib: int = Field(default=64, ge=1, le=1024)
    """What librdkafka keeps for one source beside these, in MiB; fetching stops when it is full."""
    source_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for one answer of brokers or a schema registry of others."""
    source_retry_max_s: float = Field(default=30.0, gt=0, le=3600)
    """Longest wait between two attempts of a source that had trouble; the waits double up to it."""
    source_attempts: int = Field(default=5, ge=1, le=100)
    """Attempts of one look for files before it waits for its next tick."""
    source_poll_s: float = Field(default=2.0, gt=0, le=300)
    """Time between two looks at what is registered; other processes' changes are learnt by it."""
    source_lease_s: float = Field(default=15.0, gt=0, le=600)
    """Silence after which a process that read the sources is taken for dead, and another reads them; more than `source_poll_s`."""
    max_source_files: int = Field(default=100_000, ge=1, le=10_000_000)
    """Files that one source's globs may match; more is an error, none is left out silently."""
    join_step_records: int = Field(default=100_000, ge=1, le=1_000_000)
    """New records of an input that one step of a join takes in at most (a single commit may be larger), and records of the other side that
    are in memory beside them."""
    join_poll_s: float = Field(default=0.1, gt=0, le=60)
    """Time between two looks at whether this process landed something in an input of a join; it costs no look at the lake. Commits of other
    processes are learnt every `source_poll_s`."""
    max_schemas: int = Field(default=1_000, ge=1, le=100_000)
    """Schemas of a registry kept for one source."""

    def lake(self) -> str:
        """The lake's URL without a slash at the end."""
        return (self.lake_url or f"{self.state_dir}/lake").rstrip("/")

    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.state_dir}/ingestion.sqlite"
