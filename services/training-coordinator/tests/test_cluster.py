"""Stages as Jobs of a real control plane: API server, scheduler and Job controller are real, the node is a stand-in."""

import json
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.settings import BusSettings
from millrace_training_coordinator.cluster_settings import KubernetesSettings, TolerationSettings
from millrace_training_coordinator.kubeapi import KubeApi, KubernetesError, from_kubeconfig
from millrace_training_coordinator.settings import TrainingSettings

from .conftest import Client, coordinator, manifest, stage, stages, until
from .standin_kubelet import StandinKubelet

RBAC = Path(__file__).parents[3] / "charts/millrace/templates/training-coordinator/rbac.yaml"

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


def rules_of_the_chart() -> list[dict]:
    """The coordinator's rules, which stand in the chart without any template."""
    text = RBAC.read_text().partition("rules:")[2].partition("---")[0]
    return yaml.safe_load("rules:" + text)["rules"]


async def coordinator_kubeconfig(api: KubeApi, namespace: str, admin: Path, target: Path) -> None:
    """A kubeconfig that may do what the chart lets the coordinator do in this namespace, and nothing else."""
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    await api.call("POST", accounts, body={"metadata": {"name": "coordinator"}})
    role = {"metadata": {"name": "coordinator"}, "rules": rules_of_the_chart()}
    await api.call("POST", f"{rbac}/namespaces/{namespace}/roles", body=role)
    binding = {
        "metadata": {"name": "coordinator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "coordinator"},
        "subjects": [{"kind": "ServiceAccount", "name": "coordinator", "namespace": namespace}],
    }
    await api.call("POST", f"{rbac}/namespaces/{namespace}/rolebindings", body=binding)
    issued = await api.call("POST", f"{accounts}/coordinator/token", body={"spec": {"expirationSeconds": 3600}})
    config = yaml.safe_load(admin.read_text())
    config["users"][0]["user"] = {"token": issued["status"]["token"]}
    target.write_text(yaml.safe_dump(config))


@pytest.fixture
async def cluster(control_plane: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    api = KubeApi(from_kubeconfig(str(control_plane)), 10.0)
    namespace = f"train-{uuid4().hex[:8]}"
    await api.call("POST", "/api/v1/namespaces", body={"metadata": {"name": namespace}})
    await coordinator_kubeconfig(api, namespace, control_plane, tmp_path / "kubeconfig")

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
            kubeconfig=str(tmp_path / "kubeconfig"),
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


@pytest.mark.parametrize(
    ("code", "retries", "attempts", "failure"),
    [
        ("raise SystemExit(3)", 1, 2, "exit code 3"),
        ("raise SystemExit(78)", 3, 1, "exit code 78 (permanent failure)"),
        ("raise SystemExit(75)", 1, 2, "exit code 75 (temporary failure)"),
        ("import os; os.kill(os.getpid(), 11)", 0, 1, "killed by SIGSEGV"),
        ("import time; time.sleep(100)", 0, 1, "timeout: ran longer than 1.5 s"),
    ],
)
async def test_reasons_of_failure(cluster: Cluster, code: str, retries: int, attempts: int, failure: str) -> None:
    slow = {"timeout_s": 1.5} if "sleep" in code else {}
    text = manifest(
        stages=[stage("bad_one", code, retries=retries, **slow), stage("after", "1", depends_on=["bad_one"])]
    )
    async with coordinator(cluster.settings) as client:
        run = await client.run(text)
    assert (stages(run)["bad_one"].attempts, stages(run)["bad_one"].failure) == (attempts, failure)
    assert stages(run)["after"].state == pb.STAGE_STATE_SKIPPED
    assert len(await cluster.jobs()) == attempts


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", "declared output 'model.bin' is missing"),
        ("import os; os.symlink('/etc/passwd', os.environ['MILLRACE_OUTPUT_DIR'] + '/model.bin')", "no regular file"),
        ("import os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/result.json', 'w').write('[1')", "is not JSON"),
        (
            (
                "import json, os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/result.json', 'w').write(json.dumps("
                "{'gate': {'passed': False, 'reason': 'auc 0.6 < 0.8'}})); raise SystemExit(78)"
            ),
            "exit code 78 (permanent failure): the gate refused: auc 0.6 < 0.8",
        ),
    ],
)
async def test_what_a_stage_leaves_must_be_usable(cluster: Cluster, code: str, failure: str) -> None:
    async with coordinator(cluster.settings) as client:
        run = await client.run(manifest(stages=[stage("bad", code, retries=3, outputs=["model.bin"])]))
    assert stages(run)["bad"].attempts == 1
    assert failure in stages(run)["bad"].failure


async def test_a_missing_program_fails_for_good(cluster: Cluster) -> None:
    async with coordinator(cluster.settings) as client:
        run = await client.run(manifest(stages=[{"name": "bad", "command": ["no-such-program"], "retries": 2}]))
    assert stages(run)["bad"].failure == "cannot start 'no-such-program': No such file or directory"


def gated(folder: Path, text: str = "") -> str:
    """Appends a line per attempt, prints lines, then waits until the test lets it go on."""
    code = f"""
    import os, pathlib, time
    here = pathlib.Path({str(folder)!r})
    with open(here / "starts", "a") as file:
        file.write(os.environ["MILLRACE_ATTEMPT"] + chr(10))
    for number in range(200):
        print("line", number, flush=True)
    while not (here / "go").exists():
        time.sleep(0.02)
    print("the end", flush=True)
    """
    return textwrap.dedent(code) + textwrap.dedent(text)


def starts(folder: Path) -> list[str]:
    file = folder / "starts"
    return file.read_text().split() if file.exists() else []


async def test_a_restarted_coordinator_takes_up_its_job(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("long", gated(tmp_path))]))
        run_id = (await client.start()).id
        log = tmp_path / "work/runs" / run_id / "long/1/log"
        await until(lambda: log.exists() and b"line 199" in log.read_bytes(), "its log")
    # A line that was not yet written down as read when a coordinator is killed must not stand twice.
    with log.open("ab") as file:
        file.write(b"line 7\nhalf a li")
    async with coordinator(cluster.settings) as client:
        assert (await client.get(run_id)).state == pb.RUN_STATE_RUNNING
        (tmp_path / "go").touch()
        events = await client.watch(run_id)
    run = events[-1].run
    assert (run.state, stages(run)["long"].attempts, starts(tmp_path)) == (pb.RUN_STATE_SUCCEEDED, 1, ["1"])
    lines = [e.log.text for e in events if e.HasField("log") and not e.log.text.startswith("[kubernetes]")]
    assert lines == [*(f"line {number}" for number in range(200)), "the end"]


async def test_a_job_that_ended_without_a_coordinator_is_judged_later(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("long", gated(tmp_path))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path), "the stage")
    (tmp_path / "go").touch()

    async def over() -> bool:
        return bool((await cluster.jobs())[0]["status"].get("succeeded"))

    await until(over, "the Job's end")
    async with coordinator(cluster.settings) as client:
        run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].attempts) == (pb.RUN_STATE_SUCCEEDED, 1)


async def test_a_deleted_pod_costs_no_retry(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("long", gated(tmp_path))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path), "the stage")
        await cluster.delete_pod((await cluster.pods())[0]["metadata"]["name"])
        await until(lambda: starts(tmp_path) == ["1", "2"], "the second attempt")
        (tmp_path / "go").touch()
        run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].attempts) == (pb.RUN_STATE_SUCCEEDED, 2)
    assert stages(run)["long"].failure.startswith("lost: pod 0 was deleted")


async def test_a_deleted_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("long", gated(tmp_path))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path), "the stage")
        name = (await cluster.jobs())[0]["metadata"]["name"]
        path = f"/apis/batch/v1/namespaces/{cluster.namespace}/jobs/{name}"
        await cluster.api.call("DELETE", path, params={"propagationPolicy": "Background"})
        await until(lambda: starts(tmp_path) == ["1", "2"], "the second attempt")
        (tmp_path / "go").touch()
        run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].failure) == (pb.RUN_STATE_SUCCEEDED, "lost: its Job was deleted")


async def test_cancel_leaves_no_job_and_no_process(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("long", gated(tmp_path))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path), "the stage")
        await client.cancel(run_id)
        run = await client.ended(run_id)
        assert run.state == pb.RUN_STATE_CANCELLED
    assert await cluster.jobs() == []
    assert all(pod.process.poll() is not None for pod in cluster.kubelet.pods.values())


async def test_an_image_that_cannot_be_pulled_is_told_and_given_up(cluster: Cluster) -> None:
    text = manifest(stages=[stage("bad", "pass", pod={"image": "missing"})])
    async with coordinator(cluster.with_settings(start_limit_s=3.0)) as client:
        await client.register(text)
        events = await client.watch((await client.start()).id)
    failure = stages(events[-1].run)["bad"].failure
    assert failure.startswith("did not start: run-")
    assert 'ImagePullBackOff: Back-off pulling image "missing"' in failure
    assert any("waiting: " in e.log.text and "ImagePullBackOff" in e.log.text for e in events if e.HasField("log"))
    assert await cluster.jobs() == []


async def test_no_node_with_gpus(cluster: Cluster) -> None:
    text = manifest(stages=[stage("bad", "pass", resources={"gpus": 1, "gpu_resource": "nvidia.com/mig-1g.10gb"})])
    async with coordinator(cluster.with_settings(start_limit_s=3.0)) as client:
        run = await client.run(text)
    assert "Insufficient nvidia.com/mig-1g.10gb" in stages(run)["bad"].failure


async def test_a_job_the_cluster_refuses(cluster: Cluster) -> None:
    text = manifest(stages=[stage("bad", "pass", pod={"priority_class": "no-such-class"})])
    async with coordinator(cluster.with_settings(start_limit_s=2.0)) as client:
        run = await client.run(text)
    assert "the cluster made 0 of 1 pods so far" in stages(run)["bad"].failure


def resumed(folder: Path) -> str:
    """Goes on from its checkpoint; the first attempt writes another one only when the test lets it, and does not end by itself."""
    code = f"""
    import json, os, pathlib, time
    here = pathlib.Path({str(folder)!r})
    first = os.environ["MILLRACE_ATTEMPT"] == "1"
    folder = pathlib.Path(os.environ["MILLRACE_CHECKPOINT_DIR"])
    state = folder / "state.json"
    start = json.loads(state.read_text())["step"] if state.exists() else 0
    print("from step", start, flush=True)
    for step in range(start, 6):
        (folder / "state.tmp").write_text(json.dumps({{"step": step + 1}}))
        os.rename(folder / "state.tmp", state)
        while first and (step == 2 or not (here / "go").exists()):
            time.sleep(0.02)
    """
    return textwrap.dedent(code)


async def stored_step(tmp_path: Path, run_id: str, name: str) -> int:
    path = tmp_path / "shared/runs" / run_id / name / "1/checkpoint-0.json"
    if not path.exists():
        return 0
    digest = json.loads(path.read_text())["files"]["state.json"]["sha256"]
    content = path.parent / "checkpoint/0/sha256" / digest[:2] / digest
    return json.loads(content.read_text())["step"] if content.exists() else 0


async def test_a_killed_pod_goes_on_from_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=[stage("learn", resumed(tmp_path), retries=1)]))
        run_id = (await client.start()).id

        async def stored(step: int) -> bool:
            return await stored_step(tmp_path, run_id, "learn") == step

        await until(lambda: stored(1), "a checkpoint in the store")
        (tmp_path / "go").touch()
        await until(lambda: stored(3), "a newer checkpoint in the store")
        content = tmp_path / "shared/runs" / run_id / "learn/1/checkpoint/0"
        await until(lambda: len(list(content.rglob("sha256/*/*"))) == 1, "the replaced checkpoint to go")
        # SIGKILL to the pod's first process: no last word, no last checkpoint.
        next(iter(cluster.kubelet.pods.values())).kill()
        events = await client.watch(run_id)
    run = events[-1].run
    assert (run.state, stages(run)["learn"].attempts) == (pb.RUN_STATE_SUCCEEDED, 2), stages(run)
    assert not any("waiting" in e.log.text and "0 of 1" in e.log.text for e in events if e.HasField("log"))
    assert "from step 3" in [e.log.text for e in events if e.HasField("log")]
    # Its retry removes nothing of another attempt's: the next one may need it.
    assert await stored_step(tmp_path, run_id, "learn") == 3


TORCHRUN = """
import json, os, pathlib, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2
folder = pathlib.Path(os.environ["MILLRACE_CHECKPOINT_DIR"])
state = folder / "state.json"
start = json.loads(state.read_text())["step"] if state.exists() else 0
print("rank", rank, "from step", start, flush=True)
for step in range(start, 6):
    total = torch.ones(1) * (rank + 1)
    dist.all_reduce(total)
    assert total.item() == 3.0
    if rank == 0:
        (folder / "state.tmp").write_text(json.dumps({"step": step + 1}))
        os.rename(folder / "state.tmp", state)
    while step == 2 and rank == 1 and os.environ["MILLRACE_ATTEMPT"] == "1":
        time.sleep(0.02)
out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
(out / f"rank-{rank}.txt").write_text(str(rank))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["kill", "delete"])
async def test_a_killed_worker_of_two_is_retried_from_the_checkpoint(
    cluster: Cluster, tmp_path: Path, how: str
) -> None:
    stages_ = [
        {
            "name": "learn", "command": ["python", "learn.py"], "retries": 1, "distributed": {"workers": 2},
            "outputs": ["rank-0.txt", "rank-1.txt"],
        },
    ]  # fmt: skip
    async with coordinator(cluster.settings) as client:
        await client.register(manifest(stages=stages_), {"learn.py": TORCHRUN})
        run_id = (await client.start()).id

        async def stored() -> bool:
            return await stored_step(tmp_path, run_id, "learn") == 3

        await until(stored, "a checkpoint in the store")
        [second] = [name for name in cluster.kubelet.pods if "-learn-1-1-" in name]
        if how == "kill":
            cluster.kubelet.pods[second].kill()
        else:
            await cluster.delete_pod(second)
        events = await client.watch(run_id)
    run = events[-1].run
    lines = [e.log.text for e in events if e.HasField("log")]
    assert (run.state, stages(run)["learn"].attempts) == (pb.RUN_STATE_SUCCEEDED, 2), (stages(run), lines)
    assert {"[default0]:rank 0 from step 3", "[default1]:rank 1 from step 3"} <= set(lines), lines
    assert [o.path for o in run.record.outputs] == ["learn/rank-0.txt", "learn/rank-1.txt"]
    if how == "delete":
        assert stages(run)["learn"].failure == "lost: pod 1 was deleted"
    made = await cluster.jobs()
    assert [job["spec"]["completionMode"] for job in made] == ["Indexed", "Indexed"]


async def test_exit_codes_survive_torchrun(cluster: Cluster) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(78)\ntime.sleep(100)\n"
    one = {"name": "bad", "command": ["python", "bad.py"], "retries": 3, "distributed": {"workers": 2}}
    async with coordinator(cluster.settings) as client:
        run = await client.run(manifest(stages=[one]), {"bad.py": code})
    assert (stages(run)["bad"].attempts, stages(run)["bad"].failure) == (1, "exit code 78 (permanent failure)")


async def test_a_forgotten_run_leaves_only_its_outputs(cluster: Cluster, tmp_path: Path) -> None:
    code = "import os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/m', 'w').write(os.environ['MILLRACE_RUN_ID'])"
    settings = cluster.settings.model_copy(update={"keep_finished_runs": 1})
    async with coordinator(settings) as client:
        first = await client.run(manifest(stages=[stage("make", code, outputs=["m"])]))
        second = await client.run(manifest(stages=[stage("make", code, outputs=["m"])]))

        async def gone() -> bool:
            return [job["metadata"]["labels"]["millrace.dev/run"] for job in await cluster.jobs()] == [second.id]

        await until(gone, "the first run's Job to go")
    assert [path.name for path in (tmp_path / "shared/runs").iterdir()] == [second.id]
    for run in (first, second):
        [output] = run.record.outputs
        kept = tmp_path / "shared/content/sha256" / output.sha256[:2] / output.sha256
        assert kept.read_text() == run.id


async def test_logs_outlive_the_coordinators_folder(cluster: Cluster, tmp_path: Path) -> None:
    async with coordinator(cluster.settings) as client:
        run = await client.run(manifest(stages=[stage("say", "print('something')")]))
    moved = cluster.settings.model_copy(update={"work_dir": str(tmp_path / "elsewhere")})
    async with coordinator(moved) as client:
        events = await client.watch(run.id)
    assert "something" in [e.log.text for e in events if e.HasField("log")]


async def test_never_more_jobs_than_allowed(cluster: Cluster, tmp_path: Path) -> None:
    both = [stage(name, gated(tmp_path)) for name in ("a", "b")]
    async with coordinator(cluster.with_settings(max_concurrent_stages=1)) as client:
        await client.register(manifest(stages=both))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path), "one stage")
        assert len(await cluster.jobs()) == 1
        assert stages(await client.get(run_id))["b"].state == pb.STAGE_STATE_WAITING
        (tmp_path / "go").touch()
        run = await client.ended(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert isinstance(client, Client)
