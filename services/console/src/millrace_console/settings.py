"""Settings of the console."""

from millrace_kit.settings import Settings, TelemetrySettings, TlsSettings
from pydantic import Field


class ConsoleSettings(Settings):
    """Where the console listens and whom it asks."""

    http_listen: str = "127.0.0.1:7480"
    """Address of the web server, `host:port`."""
    ingestion_address: str = "127.0.0.1:7401"
    """gRPC address of the ingestion service."""
    feature_address: str = "127.0.0.1:7402"
    """gRPC address of the feature service."""
    registry_address: str = "127.0.0.1:7403"
    """gRPC address of the registry."""
    training_address: str = "127.0.0.1:7404"
    """gRPC address of the training coordinator."""
    gateway_address: str = "127.0.0.1:7405"
    """gRPC address of the gateway's own server (figures)."""
    drift_address: str = "127.0.0.1:7406"
    """gRPC address of the drift monitor."""
    rollout_address: str = "127.0.0.1:7407"
    """gRPC address of the rollout controller."""
    tls: TlsSettings | None = None
    """Certificates for the connections to the services."""
    telemetry: TelemetrySettings = TelemetrySettings()
    refresh_s: float = Field(default=1.0, ge=0.2, le=60)
    """Shortest time between two rounds of questions to the services, however many pages are open."""
    call_timeout_s: float = Field(default=2.0, gt=0, le=30)
    """Deadline of one question; a service that misses it is shown as down."""
    rows: int = Field(default=50, ge=1, le=1000)
    """Most rows shown of any list."""
