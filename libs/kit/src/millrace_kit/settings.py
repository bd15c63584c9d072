"""Strict, frozen settings from one YAML file: an unknown key is an error, and a file can be checked offline."""

import json
from pathlib import Path
from typing import Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millrace_kit.references import Expansion, mask


class SettingsError(Exception):
    """A settings file that cannot be used; the message names the file and every wrong key."""


class Settings(BaseModel):
    """Base of every settings block."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )


class TlsSettings(Settings):
    """Certificates of one process, PEM files; with them every connection is mutual TLS. Changed files are read again."""

    cert_file: str
    """Own certificate chain."""
    key_file: str
    """Own private key."""
    ca_file: str
    """Authorities that may have signed the peers' certificates; more than one while an authority is replaced."""


class KafkaSecurity(Settings):
    """How this process connects to Kafka's brokers."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Kafka's own name of the listener's kind."""
    ca_file: str = ""
    """Authorities of the brokers' certificates (PEM), for SSL; empty takes the system's."""
    cert_file: str = ""
    """Own certificate chain (PEM), where brokers ask for one."""
    key_file: str = ""
    """Own private key (PEM)."""
    check_hostname: bool = True
    """Whether a broker's certificate must carry the name it is reached by."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    """How name and password are proven, for SASL."""
    username: str = ""
    """Name, for SASL."""
    password: str = Field(default="", repr=False)
    """Password, for SASL; a reference such as `${file:/path}` in a settings file."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.protocol.startswith("SASL") and not (self.username and self.password):
            raise ValueError(f"{self.protocol} needs username and password")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        return self


class BusSettings(Settings):
    """Where facts go."""

    kind: Literal["embedded", "kafka"] = "embedded"
    """`embedded` is one SQLite log shared by the processes of one machine; `kafka` is a cluster."""
    path: str = ".millrace/bus.sqlite"
    """File of the embedded log."""
    bootstrap_servers: tuple[str, ...] = ()
    """Kafka brokers, `host:port`."""
    partitions: int = Field(default=1, ge=1, le=1024)
    """Partitions of a topic this process has to make (Kafka)."""
    replication_factor: int = Field(default=1, ge=1, le=7)
    """Replicas of a topic this process has to make (Kafka)."""
    create_topics: bool = True
    """Whether this process makes topics that are not there (Kafka); without, a missing one is UNAVAILABLE and named."""
    topic_configs: dict[str, str] = Field(default_factory=dict)
    """Kafka's options of a topic this process has to make, for example `retention.ms`."""
    security: KafkaSecurity = KafkaSecurity()
    embedded_in_cluster: bool = False
    """Whether the embedded log may run in a pod. Pods share no disk: each would have a bus of its own, so this is for experiments."""
    request_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for one answer of the bus."""


class TelemetrySettings(Settings):
    """Where signals go."""

    metrics_listen: str = "127.0.0.1:0"
    """Address of the HTTP endpoint `/metrics`, `/livez` and `/readyz`; port 0 takes a free one."""
    otlp_endpoint: str = ""
    """OTLP/gRPC collector (`http://host:4317`); empty sends no spans there."""
    trace_file: str = ""
    """File that finished spans are appended to, one JSON object a line; empty writes none."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of new traces that are recorded; a caller's decision is kept."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe log line that is written."""


class ServiceSettings(Settings):
    """What every service has."""

    listen: str = "127.0.0.1:0"
    """Address of the gRPC server, `host:port`; port 0 takes a free one."""
    state_dir: str = ".millrace"
    """Folder for what this service keeps on one machine."""
    tls: TlsSettings | None = None
    """Certificates; without them connections are plain, which is for one machine only."""
    allowed_clients: tuple[str, ...] = ()
    """Names of which a client's certificate must carry one (DNS names as they stand there); others get PERMISSION_DENIED. Empty admits
    every client with a certificate of `tls.ca_file`. Health and reflection are for everybody with a certificate."""
    bus: BusSettings = BusSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    max_message_mib: int = Field(default=64, ge=4, le=1024)
    """Largest gRPC message accepted or sent, in MiB."""
    default_deadline_s: float = Field(default=30.0, gt=0, le=3600)
    """Deadline of a call whose client set none."""
    max_connection_age_s: float = Field(default=0.0, ge=0, le=86_400)
    """Age at which a connection takes no new calls, so that clients spread over new replicas; running calls end in peace. 0 is no age."""
    max_concurrent_rpcs: int = Field(default=512, ge=1, le=100_000)
    """Calls served at once; the next one gets RESOURCE_EXHAUSTED."""
    drain_s: float = Field(default=10.0, ge=0, le=600)
    """Longest wait for running calls at shutdown."""
    shutdown_delay_s: float = Field(default=0.0, ge=0, le=600)
    """How long calls are still taken after SIGTERM while health says no, so that peers and kube-proxy turn away first."""

    @model_validator(mode="after")
    def _clients_need_certificates(self) -> Self:
        if self.allowed_clients and self.tls is None:
            raise ValueError("allowed_clients: clients have names only with tls")
        return self


S = TypeVar("S", bound=Settings)
# A word that is a name to everything here: Kubernetes, hosts, files.
STAND_IN = "placeholder"


def load_settings(kind: type[S], path: str | Path, *, tolerant: bool = False) -> S:
    """Read `path` (YAML) as settings of `kind`, with the references in its strings replaced (see `references`).

    Args:
        kind: class of the settings.
        path: file.
        tolerant: leave references to files and variables that are not here as they stand: a check away from the cluster. Where a
            key's value must have a form, a harmless word stands in.

    Raises:
        SettingsError: the file is missing, is no YAML mapping, a reference leads nowhere, or a key is unknown or wrong; the message
            names each key and shows no value that a reference stands for.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {error}") from error
    expansion = Expansion(tolerant=tolerant)
    expanded = expansion.expand(raw if raw is not None else {})
    if expansion.problems:
        raise SettingsError(f"{path}: {'; '.join(expansion.problems)}")
    try:
        return parse_settings(kind, expanded, str(path))
    except SettingsError:
        if not expansion.unresolved:
            raise
    return parse_settings(kind, Expansion(tolerant=True, stand_in=STAND_IN).expand(raw), str(path))


def parse_settings(kind: type[S], raw: object, origin: str) -> S:
    """Validate plain data as settings of `kind`; `origin` is named in the error.

    Raises:
        SettingsError: a key is unknown or wrong; the message names each.
    """
    try:
        # Through JSON mode, so that YAML's lists are accepted for tuples while types stay strict.
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or '(top)'}: {e['msg']}" for e in error.errors())
    except TypeError as error:
        problems = str(error)
    # Outside the handlers: pydantic's own error knows the values, and must not come along as this one's context.
    raise SettingsError(mask(f"{origin}: {problems}"))
