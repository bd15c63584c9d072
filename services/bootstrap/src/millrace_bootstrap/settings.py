"""Settings of the chart's jobs: one file, and each job reads its own block."""

from typing import Literal, Self

from millrace_kit.settings import BusSettings, Settings, TelemetrySettings, TlsSettings
from pydantic import Field, model_validator


class CertificateSettings(Settings):
    """The built-in issuer: one authority, and one certificate a Secret."""

    namespace: str = Field(min_length=1)
    """Namespace of every Secret."""
    authority_secret: str = Field(min_length=1)
    """Secret of the authority; only this job reads it."""
    secrets: dict[str, tuple[str, ...]]
    """Secret (`tls.crt`, `tls.key`, `ca.crt`) to the DNS names of its certificate, wildcards included."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels every Secret gets."""
    days: int = Field(default=90, ge=1, le=825)
    """How long a certificate is good."""
    renew_before_days: int = Field(default=30, ge=1, le=400)
    """What is left of it when it is renewed; a third of `days` by default."""
    authority_days: int = Field(default=3650, ge=30, le=36_500)
    """How long the authority is good."""
    trust_ahead_hours: float = Field(default=24.0, ge=0, le=720)
    """How long a new authority is only trusted before it signs: until then every process must have read it."""

    @model_validator(mode="after")
    def _periods(self) -> Self:
        if self.renew_before_days >= self.days:
            raise ValueError("renew_before_days: must be less than days")
        if self.authority_days < 3 * self.days:
            raise ValueError("authority_days: must be at least three times days, so that authorities overlap")
        if empty := [name for name, names in self.secrets.items() if not names]:
            raise ValueError(f"secrets: {', '.join(empty)} needs at least one DNS name")
        return self


class TopicSettings(Settings):
    """What a topic should be."""

    partitions: int = Field(default=1, ge=1, le=1024)
    """Partitions at least: more are added, none is ever taken away. A key's messages keep their order only within the partition it
    had, so add partitions while consumers have caught up."""
    retention_hours: float | None = Field(default=None, gt=0)
    """How long messages are kept; None leaves it to the brokers."""
    configs: dict[str, str] = Field(default_factory=dict)
    """Further options by Kafka's names."""


class DatabaseSettings(Settings):
    """One database and the role that owns it."""

    role: str = Field(min_length=1, max_length=63)
    """Name of the role."""
    password: str = Field(min_length=1, repr=False)
    """Its password, a reference such as `${file:/path}`."""


class DatabasesSettings(Settings):
    """Databases of one PostgreSQL server."""

    admin_url: str = Field(min_length=1, repr=False)
    """SQLAlchemy URL of a role that may create roles and databases."""
    databases: dict[str, DatabaseSettings]
    """Name of each database."""


class WaitSettings(Settings):
    """What must answer before a pod starts."""

    kafka: bool = False
    """The brokers of `bus`."""
    postgres: tuple[str, ...] = Field(default=(), repr=False)
    """SQLAlchemy URLs; each must let in."""
    redis: tuple[str, ...] = Field(default=(), repr=False)
    """URLs; each must answer PING."""
    redis_ca_file: str = ""
    """Authorities of their certificates (PEM), for `rediss://`; empty takes the system's."""
    buckets: tuple[str, ...] = ()
    """S3 URLs of buckets that must be there, credentials from the environment."""
    addresses: tuple[str, ...] = ()
    """`host:port` that must accept a connection."""


class SmokeSettings(Settings):
    """Where `helm test` calls; an empty address is left out."""

    tls: TlsSettings | None = None
    """Certificates for calls to the services; None calls in plain text."""
    ingestion_address: str = ""
    """Ingestion service."""
    feature_address: str = ""
    """Feature service."""
    registry_address: str = ""
    """Registry."""
    training_address: str = ""
    """Training coordinator."""
    drift_address: str = ""
    """Drift monitor."""
    rollout_address: str = ""
    """Rollout controller."""
    gateway_admin_address: str = ""
    """The gateway's own server."""
    gateway_address: str = ""
    """The gateway's public address."""
    gateway_tls: Literal["none", "server", "mutual"] = "none"
    """TLS of the public address, as in the chart's values."""
    console_url: str = ""
    """The console, `http://host:port`."""
    call_timeout_s: float = Field(default=20.0, gt=0, le=300)
    """Deadline of one call."""
    patience_s: float = Field(default=30.0, ge=0, le=300)
    """How long a call is repeated while its service is UNAVAILABLE."""
    name: str = Field(default="millrace_smoke", pattern=r"^[a-z][a-z0-9_]{0,40}$")
    """Name of the contract and the model that the test makes; they stay, and are used again by the next test."""


class BootstrapSettings(Settings):
    """The whole file; a job's block may be missing where the job is not run."""

    telemetry: TelemetrySettings = TelemetrySettings()
    deadline_s: float = Field(default=240.0, gt=0, le=3600)
    """Longest time of one job; then it ends with 3."""
    retry_s: float = Field(default=1.0, gt=0, le=60)
    """Wait before something that did not answer is tried again."""
    bus: BusSettings = BusSettings()
    certificates: CertificateSettings | None = None
    topics: dict[str, TopicSettings] = Field(default_factory=dict)
    """Topics to make, by name."""
    records: TopicSettings | None = None
    """What the records topics that exist should be; None leaves them."""
    databases: DatabasesSettings | None = None
    buckets: tuple[str, ...] = ()
    """S3 URLs (`s3://bucket`) of buckets to make; credentials from the environment."""
    wait: WaitSettings | None = None
    smoke: SmokeSettings | None = None
