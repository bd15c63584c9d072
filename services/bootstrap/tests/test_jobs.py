"""Every job as the chart runs it, its own process, against the real thing: API server, Kafka, PostgreSQL, Redis, S3."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import yaml
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from parts.certificates import Authority, write
from parts.redis import start_redis
from parts.server import free_port

PROGRAM = Path(sys.executable).with_name("millrace-bootstrap")
PASSWORD = "p@ss/w:rd %20"


def run(
    command: str, settings: dict[str, object], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    config = folder / f"{command}.yaml"
    config.write_text(yaml.safe_dump({"deadline_s": 60, **settings}), encoding="utf-8")
    arguments = [str(PROGRAM), command, "--config", str(config)]
    return subprocess.run(
        arguments, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **(environment or {})}
    )


def messages(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(json.loads(line)["message"] for line in done.stderr.splitlines() if line.startswith("{"))


class Namespace:
    """A namespace of the real API server, and a service account that may do only what the chart's Role says."""

    def __init__(self, kubeconfig: Path, folder: Path, secrets: list[str]) -> None:
        self.name = f"bootstrap-{uuid4().hex[:8]}"
        self._admin = kubeconfig
        rules = [
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
            {
                "apiGroups": [""],
                "resources": ["secrets"],
                "verbs": ["get", "update", "patch"],
                "resourceNames": secrets,
            },
        ]
        role = {
            "kind": "Role",
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "metadata": {"name": "job"},
            "rules": rules,
        }
        self.kubectl("create", "namespace", self.name)
        self.kubectl("create", "serviceaccount", "job")
        self.kubectl("create", "-f", "-", stdin=json.dumps(role))
        self.kubectl("create", "rolebinding", "job", "--role=job", f"--serviceaccount={self.name}:job")
        token = self.kubectl("create", "token", "job").strip()
        limited = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        for user in limited["users"]:
            user["user"] = {"token": token}
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(limited), encoding="utf-8")

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        command = ["kubectl", "--kubeconfig", str(self._admin), "-n", self.name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin, timeout=60).stdout

    def secrets(self) -> dict[str, dict[str, object]]:
        items = json.loads(self.kubectl("get", "secrets", "-o", "json"))["items"]
        return {item["metadata"]["name"]: item for item in items}


@pytest.mark.kubernetes
def test_certificates(control_plane: Path, tmp_path: Path) -> None:
    names = ["millrace-ca", "millrace-registry-tls", "millrace-client-tls"]
    space = Namespace(control_plane, tmp_path, names)
    settings = {
        "namespace": space.name,
        "authority_secret": names[0],
        "secrets": {names[1]: ["millrace-registry", "localhost"], names[2]: ["client.millrace"]},
        "labels": {"app.kubernetes.io/part-of": "millrace"},
    }
    environment = {"KUBECONFIG": str(space.kubeconfig)}
    first = run("certificates", {"certificates": settings}, tmp_path, environment)
    assert first.returncode == 0, first.stderr
    made = space.secrets()
    assert set(made) == set(names)
    assert made[names[1]]["type"] == "kubernetes.io/tls"
    chain = base64.b64decode(made[names[1]]["data"]["tls.crt"])
    trusted = base64.b64decode(made[names[2]]["data"]["ca.crt"])
    (tmp_path / "chain").write_bytes(chain)
    (tmp_path / "trusted").write_bytes(trusted)
    verify = ["openssl", "verify", "-CAfile", str(tmp_path / "trusted"), "-verify_hostname", "localhost"]
    assert subprocess.run([*verify, str(tmp_path / "chain")], check=False, timeout=30).returncode == 0

    again = run("certificates", {"certificates": settings}, tmp_path, environment)
    assert again.returncode == 0, again.stderr
    versions = {name: item["metadata"]["resourceVersion"] for name, item in made.items()}
    assert {name: item["metadata"]["resourceVersion"] for name, item in space.secrets().items()} == versions
    assert "0 Secrets were written" in messages(again)

    space.kubectl("delete", "secret", names[2])
    settings["secrets"][names[1]].append("more.example")
    assert run("certificates", {"certificates": settings}, tmp_path, environment).returncode == 0
    after = space.secrets()
    assert after[names[0]]["metadata"]["resourceVersion"] == versions[names[0]]
    assert after[names[1]]["data"]["tls.crt"] != made[names[1]]["data"]["tls.crt"]

    foreign = {**settings, "secrets": {"not-mine": ["a"]}}
    denied = run("certificates", {"certificates": foreign, "deadline_s": 3}, tmp_path, environment)
    assert denied.returncode == 3
    assert "Secret not-mine: 403" in messages(denied)
    for done in (first, again, denied):
        assert "PRIVATE KEY" not in done.stderr + done.stdout


@pytest.mark.kafka
def test_topics(kafka_address: str, tmp_path: Path) -> None:
    mark = uuid4().hex[:8]
    topic, records = f"millrace.test.{mark}", f"millrace.records.t{mark}"
    bus = {"kind": "kafka", "bootstrap_servers": [kafka_address]}

    def bring(partitions: int, hours: int, replicas: int = 1) -> subprocess.CompletedProcess[str]:
        wanted = {"partitions": partitions, "retention_hours": hours}
        settings = {
            "bus": {**bus, "replication_factor": replicas},
            "topics": {topic: {**wanted, "configs": {"cleanup.policy": "delete"}}},
            "records": wanted,
        }
        return run("topics", settings, tmp_path)

    admin = KafkaAdminClient(bootstrap_servers=kafka_address)
    admin.create_topics({records: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)

    def seen(name: str) -> tuple[int, str]:
        (found,) = admin.describe_topics([name])
        configs = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
        return len(found["partitions"]), next(iter(configs.values()))[name]["retention.ms"]["value"]

    def eventually(name: str, wanted: tuple[int, str]) -> None:
        end = time.monotonic() + 20
        while (found := seen(name)) != wanted:
            assert time.monotonic() < end, found
            time.sleep(0.1)

    done = bring(2, 24)
    assert done.returncode == 0, done.stderr
    eventually(topic, (2, "86400000"))
    eventually(records, (2, "86400000"))
    again = bring(2, 24)
    assert again.returncode == 0
    assert f"topic {topic}: " not in messages(again)
    assert bring(3, 48).returncode == 0
    eventually(topic, (3, "172800000"))
    less = bring(1, 48)
    assert less.returncode == 0
    assert f"topic {topic} has 3 partitions, not 1" in messages(less)
    eventually(topic, (3, "172800000"))
    assert "replicas" in messages(bring(3, 48, replicas=3))
    admin.close()


def test_topics_of_brokers_that_are_away(tmp_path: Path) -> None:
    bus = {"kind": "kafka", "bootstrap_servers": [f"127.0.0.1:{free_port()}"], "request_timeout_s": 1.0}
    done = run("topics", {"bus": bus, "topics": {"a": {}}, "deadline_s": 3}, tmp_path)
    assert done.returncode == 3
    assert "not done within 3 s" in messages(done)


@pytest.mark.postgres
def test_databases(postgres_url: str, tmp_path: Path) -> None:
    name, file = f"millrace_{uuid4().hex[:8]}", tmp_path / "password"
    file.write_text(f"{PASSWORD}\n", encoding="utf-8")
    databases = {
        f"{name}-a": {"role": f"{name}-a", "password": f"${{file:{file}}}"},
        f"{name}_b": {"role": name, "password": "b"},
    }
    settings = {"databases": {"admin_url": postgres_url, "databases": databases}}
    first = run("databases", settings, tmp_path)
    assert first.returncode == 0, first.stderr
    plain = postgres_url.replace("+psycopg", "")
    with psycopg.connect(plain, dbname=f"{name}-a", user=f"{name}-a", password=PASSWORD, autocommit=True) as own:
        own.execute("CREATE TABLE kept (n integer)")
    file.write_text("another", encoding="utf-8")
    second = run("databases", settings, tmp_path)
    assert second.returncode == 0, second.stderr
    with psycopg.connect(plain, dbname=f"{name}-a", user=f"{name}-a") as own:
        assert own.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    with psycopg.connect(plain, autocommit=True) as admin:
        public = admin.execute("SELECT has_database_privilege(%s, %s, 'CONNECT')", [name, f"{name}-a"]).fetchone()
        assert public == (False,)  # one service's role stays out of another's database
        for database, role in ((f"{name}-a", f"{name}-a"), (f"{name}_b", name)):
            admin.execute(f'DROP DATABASE "{database}" WITH (FORCE)')
            admin.execute(f'DROP ROLE "{role}"')
    assert PASSWORD not in first.stderr + second.stderr


@pytest.mark.s3
def test_buckets(s3_url: str, tmp_path: Path) -> None:
    bucket = f"s3://bucket-{uuid4().hex[:12]}"
    missing = run("wait", {"wait": {"buckets": [bucket]}, "deadline_s": 2}, tmp_path)
    assert missing.returncode == 3
    first = run("buckets", {"buckets": [bucket, s3_url.rpartition("/")[0]]}, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "made" in messages(first)
    assert "made" not in messages(run("buckets", {"buckets": [bucket]}, tmp_path))
    assert run("wait", {"wait": {"buckets": [bucket]}}, tmp_path).returncode == 0


@pytest.mark.kafka
@pytest.mark.postgres
@pytest.mark.redis
def test_waiting_ends_when_everything_answers(
    kafka_address: str, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = {
        "bus": {"kind": "kafka", "bootstrap_servers": [kafka_address]},
        "wait": {"kafka": True, "postgres": [postgres_url], "redis": [redis_url], "addresses": [kafka_address]},
    }
    done = run("wait", settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert messages(done).count("answers") == 4


@pytest.mark.redis
def test_waiting_for_redis_over_tls(tmp_path: Path) -> None:
    tls = write(tmp_path / "certificate", Authority.new(), "localhost")
    server = start_redis(tmp_path / "server", tls=tls, password="hunter2!")
    url = server.address.replace("rediss://", "rediss://:hunter2!@")
    try:
        known = run("wait", {"wait": {"redis": [url], "redis_ca_file": tls.ca_file}}, tmp_path)
        unknown = run("wait", {"wait": {"redis": [url]}, "deadline_s": 1}, tmp_path)
    finally:
        server.stop()
    assert known.returncode == 0, known.stderr
    assert unknown.returncode == 3
    assert "certificate" in messages(unknown).lower()
    assert "hunter2" not in unknown.stderr


def test_waiting_names_what_is_missing_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_TEST_PASSWORD", "hunter2!")
    away = f"127.0.0.1:{free_port()}"
    settings = {
        "wait": {
            "postgres": [f"postgresql+psycopg://me:${{url-env:MILLRACE_TEST_PASSWORD}}@{away}/db"],
            "redis": [f"redis://:${{env:MILLRACE_TEST_PASSWORD}}@{away}/0"],
            "addresses": [away],
        },
        "deadline_s": 2,
    }
    done = run("wait", settings, tmp_path)
    assert done.returncode == 3
    last = messages(done).splitlines()[-1]
    assert f"PostgreSQL 1 at {away}/db" in last
    assert f"Redis 1 at {away}/0" in last
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("command", ["certificates", "topics", "databases", "buckets", "wait", "smoke"])
def test_a_job_without_its_settings_is_refused(command: str, tmp_path: Path) -> None:
    assert run(command, {}, tmp_path).returncode == 2
    assert run(command, {"no_such_key": 1}, tmp_path).returncode == 2


def test_a_smoke_test_of_nothing_running_names_everything(tmp_path: Path) -> None:
    away = f"127.0.0.1:{free_port()}"
    smoke = {
        "call_timeout_s": 0.5,
        "patience_s": 0,
        "registry_address": away,
        "gateway_address": away,
        "console_url": f"http://{away}",
    }
    done = run("smoke", {"smoke": smoke}, tmp_path)
    assert done.returncode == 1
    rows = done.stdout.splitlines()
    assert len(rows) == 4
    assert all("FAILED" in row for row in rows[1:])
    assert "console /healthz" in messages(done)
