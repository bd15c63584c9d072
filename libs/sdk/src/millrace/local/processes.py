"""The process table: name, command, settings and health check of every process of a local run.

The commands are the production entry points; only the settings differ from a cluster's.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from millrace.endpoints import Endpoints

METRICS_OFFSET = 100
VACUUM_RETENTION_H = 168
"""Hours that versions of tables stay without a pin: Delta's own custom."""
FEATURE_READS_OFFSET = 8
ENVOY_ADMIN_OFFSET = 9
CONSOLE_OFFSET = 80
LATEST_START_S = 60.0


@dataclass(frozen=True)
class Process:
    """One process of a local run."""

    name: str
    command: Sequence[str]
    settings: Mapping[str, object]
    """Written to `config/<config_name>.yaml`; `{config}` in the command is that file."""
    health: Literal["grpc", "http"]
    address: str
    """`host:port` the health check asks."""
    health_path: str = "/"
    config_name: str = ""
    start_timeout_s: float = LATEST_START_S
    ports: Sequence[int] = field(default=())
    """Every port the process will bind; checked before anything starts."""

    @property
    def config_file(self) -> str:
        """Name of the settings file."""
        return f"{self.config_name or self.name}.yaml"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def process_table(state_dir: Path, port_base: int, lock_file: Path) -> list[Process]:
    """Every process in the order of starting; stopping goes the other way.

    Args:
        state_dir: absolute folder for everything the run keeps.
        port_base: first of the ports (see `Endpoints.local`); metrics are 100 above.
        lock_file: the environment's lock file, hashed into every training run's record.
    """
    at = Endpoints.local(port_base)
    metrics = {name: f"127.0.0.1:{_port(getattr(at, name)) + METRICS_OFFSET}" for name in at.__dataclass_fields__}
    scripts = Path(sys.executable).parent

    def common(name: str, address: str, metrics_address: str) -> dict[str, object]:
        return {
            "listen": address,
            "state_dir": str(state_dir / name),
            "bus": {"kind": "embedded", "path": str(state_dir / "bus.sqlite")},
            "telemetry": {"metrics_listen": metrics_address, "trace_file": str(state_dir / "traces" / f"{name}.jsonl")},
        }

    def service(name: str, area: str, **settings: object) -> Process:
        address = getattr(at, area)
        merged = {**common(name, address, metrics[area]), **settings}
        command = [str(scripts / f"millrace-{name}"), "--config", "{config}"]
        ports = [
            _port(address),
            _port(metrics[area]),
            *(_port(str(also)) for also in [settings.get("reads_listen")] if also),
        ]
        return Process(name, command, merged, "grpc", address, ports=ports)

    def database(name: str) -> str:
        return f"sqlite:///{state_dir / name / f'{name}.sqlite'}"

    lake_url = (state_dir / "lake").as_uri()
    reads = f"127.0.0.1:{port_base + FEATURE_READS_OFFSET}"
    gateway = service(
        "inference-gateway",
        "gateway_admin",
        public_listen=at.gateway,
        envoy_admin_listen=f"127.0.0.1:{port_base + ENVOY_ADMIN_OFFSET}",
        feature_address=at.feature,
        feature_reads_address=reads,
        rollout_address=at.rollout,
        gateway_id="local",
    )
    console_address = f"127.0.0.1:{port_base + CONSOLE_OFFSET}"
    console_metrics = f"127.0.0.1:{port_base + CONSOLE_OFFSET + METRICS_OFFSET}"
    peers = {
        f"{area}_address": getattr(at, area)
        for area in ("ingestion", "feature", "registry", "training", "drift", "rollout")
    }
    return [
        service(
            "ingestion",
            "ingestion",
            lake_url=lake_url,
            database_url=database("ingestion"),
            # Everything here runs as the user who registers sources, and listens on loopback only.
            source_locations=["file:///", "s3://"],
            # What training sets were built from is pinned (see `set_pins` below), so the rest need not stay for ever.
            vacuum_retention_h=VACUUM_RETENTION_H,
        ),
        service(
            "feature",
            "feature",
            lake_url=lake_url,
            training_sets_url=(state_dir / "training-sets").as_uri(),
            reads_listen=reads,
            set_pins={"ingestion_address": at.ingestion},
        ),
        service(
            "registry", "registry", database_url=database("registry"), artifacts_url=(state_dir / "artifacts").as_uri()
        ),
        service("drift-monitor", "drift", database_url=database("drift-monitor"), registry_address=at.registry),
        service(
            "training-coordinator",
            "training",
            database_url=database("training-coordinator"),
            work_dir=str(state_dir / "training-coordinator" / "work"),
            lock_file=str(lock_file),
            ingestion_address=at.ingestion,
            feature_address=at.feature,
            registry_address=at.registry,
            drift_address=at.drift,
        ),
        service(
            "rollout-controller",
            "rollout",
            database_url=database("rollout-controller"),
            registry_address=at.registry,
            gateway_addresses=[at.gateway_admin],
            drift_address=at.drift,
        ),
        gateway,
        Process(
            "envoy",
            [sys.executable, "-m", "millrace_inference_gateway.envoy_process", "--config", "{config}"],
            gateway.settings,
            "grpc",
            at.gateway,
            config_name="inference-gateway",
            ports=(_port(at.gateway), port_base + ENVOY_ADMIN_OFFSET),
        ),
        Process(
            "console",
            [str(scripts / "millrace-console"), "--config", "{config}"],
            {
                "telemetry": common("console", "", console_metrics)["telemetry"],
                "http_listen": console_address,
                "gateway_address": at.gateway_admin,
                **peers,
            },
            "http",
            console_address,
            health_path="/healthz",
            ports=(_port(console_address), _port(console_metrics)),
        ),
    ]
