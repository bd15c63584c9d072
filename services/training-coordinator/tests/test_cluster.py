"""Stages as Jobs of a real control plane: API server, scheduler and Job controller are real, the node is a stand-in."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.settings import BusSettings
from millrace_training_coordinator.cluster_settings import KubernetesSettings, TolerationSettings
from millrace_training_coordinator.kubeapi import KubeApi, KubernetesError, from_kubeconfig
from millrace_training_coordinator.settings import TrainingSettings

from .conftest import coordinator, manifest, stages, until
from .standin_kubelet import StandinKubelet

pytestmark = [pytest.mark.kubernetes, pytest.mark.slow]


class Cluster:
    """A namespace of its own with a stand-in node."""

    def __init__(self, api: KubeApi, namespace: str, kubelet: StandinKubelet, settings: TrainingSettings) -> None:
        self.api = api
        self.namespace = namespace
        self.kubelet = kubelet
        self.settings = settings

    async def items(self, kind: str, group: str = "/api/v1") -> list[dict]:
        return (await self.api.call("GET", f"{group}/namespaces/{self.namespace}/{kind}"))["items"]

    async def jobs(self) -> list[dict]:
        return await self.items("jobs", "/apis/batch/v1")

    async def pods(self) -> list[dict]:
        return await self.items("pods")

    async def delete_pod(self, name: str) -> None:
        await self.api.call("DELETE", f"/api/v1/namespaces/{self.namespace}/pods/{name}")

    def with_settings(self, **extra: object) -> TrainingSettings:
        kubernetes = self.settings.kubernetes.model_copy(update=extra)
        return self.settings.model_copy(update={"kubernetes": kubernetes})


@pytest.fixture
async def cluster(control_plane: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    connection = from_kubeconfig(str(control_plane))
    api = KubeApi(connection, 10.0)
    namespace = f"train-{uuid4().hex[:8]}"
    await api.call("POST", "/api/v1/namespaces", body={"metadata": {"name": namespace}})

    async def account() -> bool:
        try:
            await api.call("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
        except KubernetesError:
            return False
        return True

    await until(account, "the default service account")
    (tmp_path / "kubelet").mkdir()
    (tmp_path / "shared").mkdir()
    kubelet = StandinKubelet(api, namespace, tmp_path / "kubelet")
    settings = TrainingSettings(
        database_url=f"sqlite:///{tmp_path}/training.sqlite",
        work_dir=str(tmp_path / "work"),
        bus=BusSettings(path=str(tmp_path / "bus.sqlite")),
        retry_backoff_s=0.05,
        stop_grace_s=1.0,
        drain_s=5.0,
        kubernetes=KubernetesSettings(
            namespace=namespace,
            kubeconfig=str(control_plane),
            work_url=(tmp_path / "shared").as_uri(),
            image="millrace/trainer:test",
            node_selector={"standin": kubelet.node},
            tolerations=(TolerationSettings(key="standin", operator="Exists"),),
            poll_s=0.1,
            checkpoint_every_s=0.2,
            termination_grace_s=10,
        ),
    )
    try:
        async with kubelet.running():
            yield Cluster(api, namespace, kubelet, settings)
    finally:
        await api.call("DELETE", f"/api/v1/namespaces/{namespace}")
        await api.close()


async def test_outputs_of_one_job_are_inputs_of_the_next(cluster: Cluster) -> None:
    files = {
        "make.py": """
            import json, os, pathlib
            print("making", flush=True)
            out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
            (out / "undeclared").mkdir(); (out / "undeclared" / "rows.txt").write_text("rows")
            (out / "model.bin").write_bytes(b"model")
            (out / "result.json").write_text(json.dumps({"training_set_digest": "a" * 64}))
        """,
        "use.py": """
            import json, os, pathlib
            made = pathlib.Path(json.loads(os.environ["MILLRACE_INPUTS"])["make"])
            assert (made / "undeclared" / "rows.txt").read_text() == "rows"
            assert (made / "model.bin").read_bytes() == b"model"
            assert json.loads(os.environ["MILLRACE_PARAMETERS"]) == {"odd": "$(HOME) $$ {x}"}
            assert os.environ["MILLRACE_REGISTRY_ADDRESS"] == "127.0.0.1:7403"
            print("used " + os.environ["MILLRACE_ATTEMPT"])
        """,
    }
    text = manifest(
        parameters={"odd": "$(HOME) $$ {x}"},
        stages=[
            {"name": "make", "command": ["python", "make.py"], "outputs": ["model.bin"]},
            {"name": "use", "command": ["python", "use.py"], "depends_on": ["make"]},
        ],
    )
    async with coordinator(cluster.settings) as client:
        await client.register(text, files)
        events = await client.watch((await client.start()).id)
        run = events[-1].run
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)
    assert [(o.path, o.size_bytes) for o in run.record.outputs] == [("make/model.bin", 5)]
    assert run.record.training_set_digest == "a" * 64
    assert [e.log.text for e in events if e.HasField("log") and not e.log.text.startswith("[")] == ["making", "used 1"]
    made = {job["metadata"]["labels"]["millrace.dev/stage"]: job for job in await cluster.jobs()}
    assert set(made) == {"make", "use"}
    pod = made["use"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsUser"] == 65532
    assert made["use"]["metadata"]["labels"]["millrace.dev/run"] == run.id
