"""Every service runs on the settings the chart renders, as far as that goes without Kubernetes: mutual TLS everywhere, Kafka, one
PostgreSQL database each, Redis, S3, secrets from files, the probes' port; and `helm test`'s own program passes against all of them.

The certificates are made by the chart's own issuer, into folders instead of Secrets.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import grpc
import psycopg
import pytest
import yaml
from millrace.client import Client
from millrace.endpoints import Endpoints
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_bootstrap.issuer import Issuer
from millrace_bootstrap.secret_store import Secret
from millrace_bootstrap.settings import CertificateSettings
from millrace_kit.client import open_sync_channel
from millrace_kit.settings import TlsSettings
from parts.server import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.kafka,
    pytest.mark.postgres,
    pytest.mark.redis,
    pytest.mark.s3,
]

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 120.0
REFUSE_TIMEOUT_S = 60.0
"""A refusal comes as soon as the program is loaded; one that starts instead is killed then."""
GRPC = {
    "ingestion": "ingestion", "feature": "feature", "registry": "registry", "training-coordinator": "training",
    "drift-monitor": "drift", "rollout-controller": "rollout", "inference-gateway": "gateway_admin",
}  # fmt: skip
ON_THE_BUS = sorted(GRPC.keys() - {"rollout-controller"})  # it neither publishes nor subscribes
NAMES = (*GRPC, "console", "bootstrap", "stage", "client")


class FolderSecrets:
    """Secrets as the kubelet mounts them: a folder each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> Secret | None:
        folder = self._folder / name
        return (
            Secret(name, {f.name: f.read_bytes() for f in folder.iterdir()}, version="1") if folder.exists() else None
        )

    def write(self, secret: Secret) -> None:
        (self._folder / secret.name).mkdir(exist_ok=True)
        for name, content in secret.data.items():
            (self._folder / secret.name / name).write_bytes(content)


@dataclass
class Release:
    """The services of one release as processes of this machine."""

    folder: Path
    parts: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    probes: dict[str, int] = field(default_factory=dict)
    public: int = field(default_factory=free_port)
    reads: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ports = {name: free_port() for name in (*GRPC, "console")}
        self.probes = {name: free_port() for name in (*GRPC, "console")}

    def tls(self, name: str) -> dict[str, str]:
        mount = self.folder / "tls" / name
        return {
            "cert_file": str(mount / "tls.crt"), "key_file": str(mount / "tls.key"), "ca_file": str(mount / "ca.crt"),
        }  # fmt: skip

    def address(self, name: str) -> str:
        return f"localhost:{self.ports[name]}"

    def endpoints(self) -> Endpoints:
        return Endpoints(
            **{area: self.address(name) for name, area in GRPC.items()}, gateway=f"localhost:{self.public}"
        )

    def settings(self, name: str) -> dict[str, object]:
        """As `millrace.settings` of the chart."""
        addresses = {
            f"{area}_address": self.address(service) for service, area in GRPC.items() if area != "gateway_admin"
        }
        telemetry = {"metrics_listen": f"0.0.0.0:{self.probes[name]}", "sample_ratio": 0.05, "log_level": "INFO"}
        common: dict[str, object] = {
            "listen": f"0.0.0.0:{self.ports[name]}", "state_dir": str(self.folder / "state" / name), "drain_s": 10,
            "shutdown_delay_s": 1, "max_connection_age_s": 5, "tls": self.tls(name), "telemetry": telemetry,
            "bus": {
                "kind": "kafka", "bootstrap_servers": [self.parts["kafka"]], "partitions": 2, "replication_factor": 1,
                "topic_configs": {"retention.ms": "3600000"},
            },
        }  # fmt: skip
        secrets = self.folder / "secrets" / name
        database = {"database_url": f"${{file:{secrets}/database-url}}"}
        s3 = self.parts["s3"]
        match name:
            case "ingestion":
                return {**common, **database, "lake_url": f"{s3}/lake"}
            case "feature":
                online = {
                    "kind": "redis",
                    "redis": {"url": f"${{file:{secrets}/redis-url}}", "prefix": f"{uuid4().hex}:"},
                }
                lake = {"lake_url": f"{s3}/lake", "training_sets_url": f"{s3}/training-sets", "online_store": online}
                return {**common, **database, **lake, "reads_listen": f"0.0.0.0:{self.reads}"}
            case "registry":
                return {**common, **database, "artifacts_url": f"{s3}/artifacts"}
            case "drift-monitor":
                return {**common, **database, "registry_address": self.address("registry")}
            case "training-coordinator":
                own = {k: v for k, v in addresses.items() if k != "rollout_address"}
                return {**common, **database, **own, "work_dir": str(self.folder / "work")}
            case "rollout-controller":
                own = {k: addresses[k] for k in ("registry_address", "drift_address")}
                gateways = {"gateway_addresses": [self.address("inference-gateway")]}
                callers = {"allowed_clients": ["inference-gateway", "console", "bootstrap", "client"]}
                return {**common, **database, **own, **gateways, **callers}
            case "inference-gateway":
                own = {k: addresses[k] for k in ("feature_address", "rollout_address")}
                own["feature_reads_address"] = f"localhost:{self.reads}"
                listens = {"public_listen": f"0.0.0.0:{self.public}", "envoy_admin_listen": f"127.0.0.1:{free_port()}"}
                public = {"public_tls": {"mode": "mutual", **self.tls(name)}}
                # A Unix socket's path has a limit, and pytest's folders are deep.
                state = {"state_dir": self.parts["short"], "gateway_id": "${env:POD_NAME}"}
                return {**common, **own, **listens, **public, **state}
        assert name == "console"
        mine = {**addresses, "gateway_address": self.address("inference-gateway")}
        return {"tls": self.tls(name), "telemetry": telemetry, "http_listen": f"0.0.0.0:{self.ports[name]}", **mine}

    def start(self, name: str, command: list[str] | None = None) -> None:
        base = name.removesuffix("-envoy")
        config = self.folder / f"{base}.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump(self.settings(base)), encoding="utf-8")
        arguments = [*(command or [str(BIN / f"millrace-{name}")]), "--config", str(config)]
        environment = {**os.environ, "POD_NAME": "millrace-gateway-0"}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, cwd=self.folder)

    def probe(self, name: str, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.probes[name]}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def until(self, what: str, ask: Callable[[], bool], name: str, timeout_s: float = START_TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while not ask():
            tail = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
            assert self.processes[name].poll() is None, f"{name} ended:\n{tail}"
            assert time.monotonic() < end, f"{what}: not within {timeout_s:.0f} s:\n{tail}"
            time.sleep(0.1)

    def stop(self) -> dict[str, int]:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(STOP_TIMEOUT_S) for name, process in self.processes.items()}


def issue(folder: Path) -> None:
    """What `millrace-bootstrap certificates` does, into folders."""
    settings = CertificateSettings(
        namespace="ns", authority_secret="authority", secrets={name: (name, "localhost") for name in NAMES}
    )
    Issuer(settings, FolderSecrets(folder), datetime.now(UTC)).run()


@pytest.fixture
def release(tmp_path: Path, kafka_address: str, postgres_url: str, redis_url: str, s3_url: str) -> Iterator[Release]:
    """Every service of the chart, ready."""
    (tmp_path / "tls").mkdir()
    issue(tmp_path / "tls")
    plain = postgres_url.replace("+psycopg", "")
    mark = uuid4().hex[:8]
    databases = {name: f"{mark}-{name}" for name in GRPC if name != "inference-gateway"}
    with psycopg.connect(plain, autocommit=True) as connection:
        for name, database in databases.items():
            connection.execute(f'CREATE DATABASE "{database}"')
            secrets = tmp_path / "secrets" / name
            secrets.mkdir(parents=True)
            (secrets / "database-url").write_text(f"{postgres_url.rpartition('/')[0]}/{database}\n")
            (secrets / "redis-url").write_text(f"{redis_url}\n")
    with tempfile.TemporaryDirectory(prefix="mr-") as short:
        made = Release(tmp_path, {"kafka": kafka_address, "s3": s3_url, "short": short})
        try:
            for name in (*GRPC, "console"):
                made.start(name)
            envoy = [sys.executable, "-m", "millrace_inference_gateway.envoy_process"]
            made.start("inference-gateway-envoy", envoy)
            for name in (*GRPC, "console"):
                made.until(f"{name} is ready", lambda n=name: made.probe(n, "/readyz") == 200, name)
            yield made
        finally:
            for process in made.processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait(10)
            with psycopg.connect(plain, autocommit=True) as connection:
                for database in databases.values():
                    connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')


def smoke(release: Release) -> subprocess.CompletedProcess[str]:
    at = {f"{area}_address": release.address(name) for name, area in GRPC.items()}
    wanted = {
        **at, "tls": release.tls("bootstrap"), "gateway_address": f"localhost:{release.public}", "gateway_tls": "mutual",
        "console_url": f"http://{release.address('console')}",
    }  # fmt: skip
    config = release.folder / "smoke.yaml"
    config.write_text(yaml.safe_dump({"smoke": wanted}), encoding="utf-8")
    command = [str(BIN / "millrace-bootstrap"), "smoke", "--config", str(config)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def test_every_service_by_the_charts_settings(release: Release) -> None:
    first = smoke(release)
    assert first.returncode == 0, f"{first.stdout}\n{first.stderr[-2000:]}"
    assert len(first.stdout.splitlines()) == 12, first.stdout
    for name in (*GRPC, "console"):
        assert release.probe(name, "/livez") == 200, name
        assert release.probe(name, "/metrics") == 200, name

    # The SDK speaks to all of them with certificates of its own.
    client = TlsSettings(**release.tls("client"))
    with Client(release.endpoints(), client, client) as sdk:
        assert "millrace_smoke" in {model.name for model in sdk.registry.models()}
        assert sdk.ingestion.table("millrace_smoke").rows >= 3

    strangers_stay_out(release)

    # Every certificate is made anew, and nothing is started again for it.
    (release.folder / "tls" / "registry" / "tls.crt").write_bytes(b"")  # even a half-written one does no harm
    for name in NAMES:
        (release.folder / "tls" / name / "tls.key").write_bytes(b"")
    issue(release.folder / "tls")
    second = smoke(release)
    assert second.returncode == 0, f"{second.stdout}\n{second.stderr[-2000:]}"

    codes = release.stop()
    console = codes.pop("console")
    assert console in {0, -signal.SIGTERM}  # uvicorn ends by the signal it got, after an orderly stop
    assert set(codes.values()) == {0}, codes


def strangers_stay_out(release: Release) -> None:
    for name in GRPC:
        with grpc.insecure_channel(release.address(name)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/any.Service/Method")(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, name
    with open_sync_channel(release.address("rollout-controller"), TlsSettings(**release.tls("stage"))) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rollout_pb2_grpc.RolloutServiceStub(channel).ListDeployments(
                rollout_pb2.ListDeploymentsRequest(), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("name", ON_THE_BUS)
def test_no_service_takes_the_embedded_log_in_a_pod(name: str, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    listens = {"public_listen": f"127.0.0.1:{free_port()}"} if name == "inference-gateway" else {}
    config.write_text(yaml.safe_dump({"state_dir": str(tmp_path / "s"), **listens}), encoding="utf-8")
    environment = {**os.environ, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    command = [str(BIN / f"millrace-{name}"), "--config", str(config)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=REFUSE_TIMEOUT_S, env=environment, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "bus.kind is embedded and this is a pod" in done.stderr
