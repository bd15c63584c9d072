"""Where model pods and versions are: GPUs asked for, found, spread, a clear condition when there is none; two versions in one pod."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.node import NODE
from cluster.simulated import SimulatedNode, give, simulated
from millrace import Client

from tests.cluster import models
from tests.cluster.load import Load
from tests.cluster.release import Release, eventually

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-1g.18gb"
TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
TEAM_TAINT = {"key": "team", "value": "research", "effect": "NoSchedule"}


def _node(name: str, product: str, resources: dict[str, str], *taints: dict[str, str]) -> SimulatedNode:
    return SimulatedNode(name, resources, {"nvidia.com/gpu.product": product}, [TAINT, *taints])


FLEET = [
    *(_node(f"h200-{n}", "NVIDIA-H200", {GPU: "8"}) for n in range(4)),
    *(_node(f"l4-{n}", "NVIDIA-L4", {GPU: "2"}) for n in range(4)),
    *(_node(f"mig-{n}", "NVIDIA-H200-MIG", {MIG: "7"}) for n in range(2)),
    *(_node(f"research-{n}", "NVIDIA-H200", {GPU: "8"}, TEAM_TAINT) for n in range(2)),
]


@pytest.fixture(scope="module")
def client(release: Release) -> Iterator[Client]:
    with release.client() as made:
        yield made


def _nodes(release: Release, name: str) -> list[str]:
    pods = release.pods(f"millrace.dev/deployment={name}")
    return [pod["spec"].get("nodeName", "") for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def _server(replicas: int, resource: str = GPU, **placement: object) -> dict[str, object]:
    return {"replicas": replicas, "resources": {"limits": {resource: 1}}, **placement}


def test_without_a_gpu_it_waits_and_says_why_and_runs_once_there_is_one(release: Release, client: Client) -> None:
    name = release.fresh("gpu-real")
    models.create(client, name, ("1.0.0",))
    release.apply(models.manifest(name, "1.0.0", server=_server(1), progressDeadlineSeconds=600))

    def said() -> str | None:
        status = release.deployment(name).get("status", {})
        text = " ".join(c.get("message", "") for c in status.get("conditions", []))
        return text if GPU in text else None

    message = eventually("the condition names the GPU", said, 120, lambda: release.describe(name))
    assert "0/1" in message or "Insufficient" in message, message
    assert _nodes(release, name) == [""]
    give(release.kubeconfig, NODE, {GPU: "1"})
    try:
        release.wait_stable(name, "1.0.0")
        assert _nodes(release, name) == [NODE]
        pod = release.pods(f"millrace.dev/deployment={name}")[0]
        container = next(c for c in pod["spec"]["containers"] if GPU in c.get("resources", {}).get("limits", {}))
        assert container["resources"]["limits"][GPU] == "1"
        with Load(release.address("gateway"), name, models.WIDTH) as load:
            assert set(load.wait_for(20)) == {"1.0.0"}
    finally:
        release.kubectl("delete", "modeldeployment", name, "--timeout=120s")
        give(release.kubeconfig, NODE, {GPU: "0"})


def test_replicas_spread_over_nodes_of_the_product_they_ask_for(release: Release, client: Client) -> None:
    wanted = {
        release.fresh("gpu-h200"): (_server(4, nodeSelector={"nvidia.com/gpu.product": "NVIDIA-H200"}), "h200-"),
        release.fresh("gpu-l4"): (_server(3, nodeSelector={"nvidia.com/gpu.product": "NVIDIA-L4"}), "l4-"),
        release.fresh("gpu-mig"): (_server(4, MIG), "mig-"),
    }
    with simulated(release.kubeconfig, FLEET):
        for name, (server, _) in wanted.items():
            models.create(client, name, ("1.0.0",))
            release.apply(models.manifest(name, "1.0.0", server=server))
        for name, (server, prefix) in wanted.items():

            def placed(name: str = name, replicas: object = server["replicas"]) -> list[str] | None:
                nodes = _nodes(release, name)
                return nodes if len(nodes) == replicas and all(nodes) else None

            nodes = eventually(f"{name} is placed", placed, 120, lambda name=name: release.describe(name))
            assert all(node.startswith(prefix) for node in nodes), (name, nodes)
            spread = Counter(nodes)
            assert max(spread.values()) - min(spread.values()) <= 1, spread
            assert len(spread) == min(len(nodes), sum(n.name.startswith(prefix) for n in FLEET)), spread
        for name in wanted:
            release.kubectl("delete", "modeldeployment", name, "--timeout=180s")


def test_a_canary_inside_the_pod_of_stable(release: Release, client: Client) -> None:
    name = release.fresh("shared")
    server = {"placement": "Shared", "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "1Gi"}}}
    models.create(client, name, ("1.0.0", "1.1.0"))
    release.apply(models.manifest(name, "1.0.0", server=server))
    release.wait_stable(name, "1.0.0")
    (pod,) = _pods(release, name)
    assert [container["name"] for container in pod["spec"]["containers"]] == ["triton", "loader"]
    with Load(release.address("gateway"), name, models.WIDTH) as load:
        load.wait_for(20)
        # More than the container's limit has room for: nothing is loaded, and stable serves on.
        steps = [{"weight": 50, "pause": {}}, {"weight": 100}]
        release.apply(models.manifest(name, "1.1.0", server=server | {"memoryMib": 2048}, steps=steps))
        condition = eventually("there is no room", lambda: _no_room(release, name), 60, lambda: release.describe(name))
        assert "needs 2048 MiB beside what the server holds" in condition
        release.apply(models.manifest(name, "1.1.0", server=server | {"memoryMib": 128}, steps=steps))
        eventually("both have calls", lambda: len(load.wait_for(50)) == 2 or None, 120, lambda: release.describe(name))
        assert [one["metadata"]["name"] for one in _pods(release, name)] == [pod["metadata"]["name"]]
        done = release.plugin("promote", name)
        assert done.returncode == 0, done.stderr
        release.wait_stable(name, "1.1.0")
        after = time.monotonic()
        load.wait_for(50)
        assert set(load.count(after)) == {"1.1.0"}
        assert load.errors == []
    # A pod that takes the place brings the version by itself.
    release.kubectl("delete", "pod", pod["metadata"]["name"], "--timeout=120s")
    eventually(
        "another pod is ready", lambda: _ready_but(release, name, pod) or None, 180, lambda: release.describe(name)
    )
    with Load(release.address("gateway"), name, models.WIDTH) as load:
        assert set(load.wait_for(20)) == {"1.1.0"}
    release.kubectl("delete", "modeldeployment", name, "--timeout=120s")


def _pods(release: Release, name: str) -> list[dict[str, Any]]:
    pods = release.pods(f"millrace.dev/deployment={name}")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def _no_room(release: Release, name: str) -> str | None:
    conditions = release.deployment(name).get("status", {}).get("conditions", [])
    return next((str(one["message"]) for one in conditions if one["reason"] == "InsufficientMemory"), None)


def _ready_but(release: Release, name: str, gone: dict[str, Any]) -> bool:
    others = [pod for pod in _pods(release, name) if pod["metadata"]["name"] != gone["metadata"]["name"]]
    conditions = [one for pod in others for one in pod["status"].get("conditions", [])]
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
