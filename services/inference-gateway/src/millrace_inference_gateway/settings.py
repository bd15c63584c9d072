"""Settings of the gateway; the Envoy process and the Python process read the same file."""

from pathlib import Path
from typing import Self

from millrace_kit.settings import ServiceSettings, Settings
from pydantic import Field, model_validator

# A Unix socket's path has 108 bytes in Linux, one of them the final zero.
MAX_SOCKET_PATH_BYTES = 107


class EnvoySettings(Settings):
    """How Envoy carries traffic."""

    workers: int = Field(default=0, ge=0, le=256)
    """Worker threads; 0 takes one a core."""
    max_connections: int = Field(default=1024, ge=1, le=1_000_000)
    """Connections to one version's servers; more requests share what is there."""
    max_pending_requests: int = Field(default=1024, ge=1, le=1_000_000)
    """Requests of one version waiting for a connection; the next gets UNAVAILABLE."""
    max_requests: int = Field(default=4096, ge=1, le=1_000_000)
    """Requests of one version at once; the next gets UNAVAILABLE."""
    max_retries: int = Field(default=2, ge=0, le=5)
    """Further tries of one request on another server."""
    retry_budget_percent: float = Field(default=20.0, ge=0, le=100)
    """Retries at once, as a share of the requests at once; at least 10 are always allowed."""
    retry_lost_calls: bool = True
    """Also try a call again when its server went away in the middle of it. Right for models without state, where an answer
    changes nothing; turn it off for sequence models."""
    health_interval_s: float = Field(default=1.0, ge=0.05, le=60)
    """Time between two health checks of a model server (gRPC health protocol)."""
    health_timeout_s: float = Field(default=1.0, ge=0.05, le=60)
    """Longest wait for a health check's answer."""
    unhealthy_after: int = Field(default=2, ge=1, le=10)
    """Failed checks in a row that take a server out of the rotation; one good check brings it back."""
    ejection_s: float = Field(default=5.0, gt=0, le=600)
    """First time-out of a server that refuses or loses three calls in a row; grows with each repetition."""
    stream_idle_s: float = Field(default=300.0, ge=1, le=86_400)
    """A stream on which nothing moves for so long is ended."""
    grace_s: float = Field(default=10.0, ge=0, le=600)
    """Time a version's servers stay known after no route names them, so that running calls end in peace."""
    log_level: str = Field(default="warning", pattern="^(trace|debug|info|warning|error|critical|off)$")
    """Least severe line of Envoy's own log (standard error)."""


class PredictionLogSettings(Settings):
    """What is kept of answered predictions, and how much of it."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of V2 requests whose payload is logged; their other fields are always logged."""
    samples_per_s: int = Field(default=500, ge=0, le=1_000_000)
    """Most V2 payloads a second and Envoy worker; what is above is logged without payload."""
    sample_max_bytes: int = Field(default=16_384, ge=0, le=262_144)
    """Largest V2 request or response body that is logged."""
    sample_max_rows: int = Field(default=64, ge=1, le=1024)
    """Most rows of one V2 request that become predictions of their own; larger batches are logged without payload."""
    flush_interval_s: float = Field(default=0.1, ge=0.01, le=10)
    """How often Envoy hands over its access log."""
    segment_bytes: int = Field(default=8 << 20, ge=4096, le=1 << 30)
    """Size at which the journal starts a new file."""
    max_segments: int = Field(default=32, ge=2, le=10_000)
    """Files of the journal; when all are full of unpublished entries, new ones are dropped and counted."""
    batch_entries: int = Field(default=512, ge=1, le=10_000)
    """Most predictions in one message on the bus."""
    publish_interval_s: float = Field(default=0.2, gt=0, le=60)
    """Longest time an entry waits for others to share its message."""

    @property
    def samples_payloads(self) -> bool:
        """Whether any payload is logged."""
        return self.sample_ratio > 0 and self.samples_per_s > 0 and self.sample_max_bytes > 0


class GatewaySettings(ServiceSettings):
    """The gateway."""

    gateway_id: str = Field(default="gateway-0", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Stable name of this replica; names its journal on the bus."""
    public_listen: str = "127.0.0.1:7400"
    """Where Envoy takes clients' calls."""
    envoy_admin_listen: str = "127.0.0.1:7409"
    """Where Envoy answers questions about itself; never expose it."""
    feature_address: str = "127.0.0.1:7402"
    """The feature service."""
    rollout_address: str = "127.0.0.1:7407"
    """The rollout controller."""
    predict_timeout_s: float = Field(default=5.0, gt=0, le=300)
    """Deadline of a Predict whose caller set none."""
    feature_time_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of what is left of the deadline that the feature look-up may use."""
    predict_channels: int = Field(default=4, ge=1, le=64)
    """Connections from Predict to Envoy."""
    max_inputs: int = Field(default=256, ge=1, le=10_000)
    """Inputs of one Predict."""
    apply_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for Envoy to have new routes in force before it is tried again."""
    reconnect_s: float = Field(default=0.5, gt=0, le=60)
    """Wait before calling the rollout controller again; doubles up to ten times itself."""
    envoy: EnvoySettings = EnvoySettings()
    prediction_log: PredictionLogSettings = PredictionLogSettings()

    @property
    def folder(self) -> Path:
        """Where this gateway keeps what survives a restart; absolute."""
        return Path(self.state_dir).absolute()

    @property
    def ledger(self) -> Path:
        """Envoy's own counts of answered calls, one file a start."""
        return self.folder / "ledger"

    @property
    def socket(self) -> Path:
        """Envoy's inner listener, for Predict's model calls only."""
        return self.folder / "envoy.sock"

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        for name in ("public_listen", "envoy_admin_listen", "feature_address", "rollout_address"):
            split_address(str(getattr(self, name)), name)
        if len(str(self.socket).encode()) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"state_dir: {self.socket} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
        return self


def split_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of `host:port` (`[::1]:80` for IPv6).

    Raises:
        ValueError: it is none; the message starts with `name`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError(f"{name}: {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
