"""Things die in the middle of a rollout, under load: clients see nothing, nothing acknowledged is lost, the rollout goes on."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from cluster import __main__ as throwaway
from cluster.controlplane import healthy
from millrace import Client, MillraceError
from millrace.areas.data import arrow_ipc
from millrace_api.ingestion.v1 import ingestion_pb2

from tests.cluster import models
from tests.cluster.load import Load
from tests.cluster.release import RELEASE, Release, eventually

BATCH_ROWS = 20
PACE_S = 0.05
RETRY_S = 0.2
API_SERVER_AWAY_S = 30
BETWEEN = 80
OUTLIVE = ("ingestion", "feature", "registry", "training-coordinator", "drift-monitor", "console")


class Writer(threading.Thread):
    """Writes batches; each is sent again until it is acknowledged."""

    def __init__(self, release: Release, contract: str) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.acknowledged = 0
        self._release = release
        self._contract = contract

    def run(self) -> None:
        """The thread."""
        with self._release.client() as client:
            offset = 0
            while not self.stop.is_set():
                offset += 1
                ids = [f"r{offset}-{row}" for row in range(BATCH_ROWS)]
                at = pa.array([offset * 1_000_000] * BATCH_ROWS, pa.timestamp("us", "UTC"))
                table = pa.table({"id": ids, "at": at, "value": [float(offset)] * BATCH_ROWS})
                batch = ingestion_pb2.RecordBatch(
                    contract=self._contract, source="faults", offset=offset, arrow_ipc=arrow_ipc(table)
                )
                while True:
                    try:
                        client.ingestion.write(batch)
                    except MillraceError:
                        self.stop.wait(RETRY_S)
                        continue
                    self.acknowledged += BATCH_ROWS
                    break
                self.stop.wait(PACE_S)


@pytest.fixture(scope="module")
def client(release: Release) -> Iterator[Client]:
    with release.client() as made:
        yield made


def _ready_again(release: Release, selector: str, old: set[str], count: int) -> bool | None:
    pods = [pod for pod in release.pods(selector) if "deletionTimestamp" not in pod["metadata"]]
    ready = [
        pod
        for pod in pods
        if pod["metadata"]["uid"] not in old
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
    ]
    return len(ready) >= count or None


def _kill(release: Release, selector: str, load: Load, *, force: bool) -> None:
    pod = release.pods(selector)[0]
    how = ["--grace-period=0", "--force"] if force else []
    release.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", *how)
    load.wait_for(BETWEEN)
    eventually(
        f"{selector} is back",
        lambda: _ready_again(release, selector, {pod["metadata"]["uid"]}, 1),
        240,
        lambda: release.call("kubectl", "-n", release.namespace, "get", "pods").stdout,
    )


def _component(name: str) -> str:
    return f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={name}"


def _restarts(release: Release) -> dict[str, int]:
    """Restarts of the containers of every pod that nobody killed."""
    return {
        pod["metadata"]["name"]: sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))
        for service in OUTLIVE
        for pod in release.pods(_component(service))
    }


def _stop_api_server(load: Load, rate: float) -> None:
    folder = Path(throwaway.FOLDER)
    hold = folder / "kube-apiserver.hold"
    hold.touch()
    os.kill(int((folder / "kube-apiserver.pid").read_text(encoding="ascii")), signal.SIGKILL)
    try:
        load.wait_for(int(rate * API_SERVER_AWAY_S))
    finally:
        hold.unlink()
    url = f"{throwaway.PRODUCT.url}/readyz"
    eventually("the API server is back", lambda: healthy(url) or None, 60)


def test_what_dies_comes_back_and_clients_see_nothing(release: Release, client: Client) -> None:
    name, rate = release.fresh("faults"), 30.0
    table = name.replace("-", "_")
    contract = ingestion_pb2.DataContract(
        name=table,
        columns=[
            ingestion_pb2.Column(name="id", type=ingestion_pb2.COLUMN_TYPE_STRING),
            ingestion_pb2.Column(name="at", type=ingestion_pb2.COLUMN_TYPE_TIMESTAMP),
            ingestion_pb2.Column(name="value", type=ingestion_pb2.COLUMN_TYPE_DOUBLE),
        ],
        event_id_column="id",
        event_time_column="at",
    )
    client.ingestion.register_contract(contract)
    models.create(client, name, ("1.0.0", "1.1.0"))
    release.apply(models.manifest(name, "1.0.0", server={"replicas": 2}))
    release.wait_stable(name, "1.0.0")
    writer = Writer(release, table)
    with Load(release.address("gateway"), name, models.WIDTH, rate=rate) as load:
        writer.start()
        load.wait_for(20)
        steps = [{"weight": 30, "pause": {}}, {"weight": 100}]
        release.apply(models.manifest(name, "1.1.0", server={"replicas": 2}, steps=steps))

        def held() -> bool | None:
            status = release.deployment(name)["status"]
            return (status.get("weight") == 30 and status.get("phase") == "Paused") or None

        eventually("30 %", held, 240, lambda: release.describe(name))
        _kill(release, f"millrace.dev/deployment={name},millrace.dev/version=1.0.0", load, force=True)
        _kill(release, f"millrace.dev/deployment={name},millrace.dev/version=1.1.0", load, force=True)
        _kill(release, _component("inference-gateway"), load, force=False)
        restarts = _restarts(release)
        for part in ("kafka", "postgres", "redis"):
            _kill(release, _component(part), load, force=True)
        assert _restarts(release) == restarts, "services outlive what they need"
        _kill(release, "millrace.dev/leader=true", load, force=True)
        _stop_api_server(load, rate)
        eventually("still at 30 %", held, 120, lambda: release.describe(name))
        done = release.plugin("resume", name)
        assert done.returncode == 0, done.stderr
        release.wait_stable(name, "1.1.0")
        # Stable is what every gateway does, not what the controller says to itself.
        assert set(load.wait_for(60)) == {"1.1.0"}
        writer.stop.set()
        writer.join(120)
    assert not writer.is_alive()
    assert writer.acknowledged > 0
    eventually("every pod is Ready", lambda: not release.unready() or None, 180, release.unready)
    rows = eventually("every acknowledged record", lambda: client.ingestion.table(table).rows or None, 60)
    assert rows == writer.acknowledged
    assert load.errors == []
