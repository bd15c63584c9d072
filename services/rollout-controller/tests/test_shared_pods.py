"""Two versions in one pod, whole: a real API server, the controller, and for the pod a real Triton with the loader beside it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from millrace_api.rollout.v1 import rollout_pb2
from millrace_rollout_controller import server_versions, triton
from millrace_rollout_controller.kubernetes import names, sharing
from millrace_rollout_controller.kubernetes.order import ORDERS_FILE

from . import cluster, pods
from .cluster import Object, World
from .peers import Peers, serving
from .support import onnx_model, until
from .test_kubernetes import following

pytestmark = pytest.mark.kubernetes
PLACE = names.object_name("flight-delay", names.SHARED)


@dataclass
class Node:
    """Runs the pods of several versions."""

    world: World
    folder: Path
    parts: triton.Triton
    registry: str
    running: dict[str, pods.Pod] = field(default_factory=dict)
    """By name."""

    async def hand(self, pod: Object) -> bool:
        name = pod["metadata"]["name"]
        if name not in self.running:
            taken = {port for one in self.running.values() for port in (one.port, one.loader_port)}
            made = self.running[name] = pods.make(self.folder / name, self.parts, self.registry, taken)
            made.folder.mkdir(parents=True)
            # What the kubelet mounts when a pod starts; here it never brings anything newer.
            item = await self.world.get("configmaps", PLACE)
            assert item is not None, "orders are there before the pod needs them"
            made.order(item["data"][ORDERS_FILE])
            made.start_server()
            await made.start_loader()
        return await self.running[name].ready()

    def address_of(self, pod: Object) -> str:
        return f"127.0.0.1:{self.running[pod['metadata']['name']].loader_port}"

    @property
    def only(self) -> tuple[str, pods.Pod]:
        """The one pod that has a server now."""
        ((name, pod),) = [(n, p) for n, p in self.running.items() if p.server is not None and p.server.poll() is None]
        return name, pod

    async def end(self) -> None:
        for pod in self.running.values():
            await pod.end()


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    contents = {"1.0.0": onnx_model(0.1), "1.1.0": onnx_model(0.2), "1.2.0": onnx_model(0.3)}
    async with serving(Peers(contents=contents)) as made:
        yield made


@pytest.fixture
async def world(control_plane: Path) -> AsyncIterator[World]:
    async with cluster.world(control_plane) as made:
        yield made


@pytest.fixture
async def node(world: World, peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    parts = await asyncio.to_thread(triton.Triton.prepare, tmp_path / "triton")
    made = Node(world, tmp_path / "pods", parts, peers.address)
    # Pods have addresses of their own in a cluster, and ports of their own here.
    monkeypatch.setattr(sharing, "address_of", made.address_of)
    world.hand = made.hand
    kubelet = asyncio.create_task(world.kubelet())
    try:
        yield made
    finally:
        kubelet.cancel()
        with suppress(asyncio.CancelledError):
            await kubelet
        await made.end()


@asynccontextmanager
async def controlled(world: World, peers: Peers, folder: Path) -> AsyncIterator[None]:
    wanted = cluster.settings(world.kubeconfig, world.namespace, folder, peers)
    assert wanted.kubernetes is not None
    # The tests' Triton has the Python backend alone.
    servers = wanted.kubernetes.servers.model_copy(update={"platform": "pythonOnnx", "warmup_requests": 5})
    wanted = wanted.model_copy(update={"kubernetes": wanted.kubernetes.model_copy(update={"servers": servers})})
    async with cluster.controller(wanted) as address, following(peers, address):
        yield


def arms(peers: Peers) -> dict[str, rollout_pb2.Arm]:
    return {arm.version: arm for route in peers.in_force.models for arm in route.arms}


async def apply(world: World, version: str, memory_mib: int | None = None) -> None:
    server: dict[str, Any] = {"placement": "Shared"} | ({"memoryMib": memory_mib} if memory_mib else {})
    await world.apply(version, server=server, rollout={"steps": [{"weight": 20, "pause": {}}, {"weight": 100}]})


async def only_held(pod: pods.Pod, *versions: str) -> None:
    async def there() -> bool:
        return await pod.held() == dict.fromkeys(versions, (True, ""))

    await until(there, 60, f"{versions} in the server and nothing else")


async def test_a_canary_in_the_pod_of_stable(world: World, peers: Peers, node: Node, tmp_path: Path) -> None:
    peers.tampered.add("1.2.0")
    async with controlled(world, peers, tmp_path / "one"):
        await apply(world, "1.0.0")
        await world.phase("Promoted", "1.0.0", timeout_s=60)
        name, pod = node.only
        stable = arms(peers)["1.0.0"]
        assert stable.service == f"{world.namespace}/{PLACE}:8001"
        assert (len(stable.endpoints), stable.server_version) == (1, server_versions.number("1.0.0"))

        # Orders, load, status, route: the candidate is where stable is, under its own number.
        await apply(world, "1.1.0")
        await world.phase("Paused", "1.0.0", timeout_s=60)
        await until(lambda: peers.versions() == {"1.0.0": 80, "1.1.0": 20}, what="the weights")
        candidate = arms(peers)["1.1.0"]
        assert candidate.endpoints == stable.endpoints
        assert (candidate.service, candidate.server_version) == (stable.service, server_versions.number("1.1.0"))
        await only_held(pod, "1.0.0", "1.1.0")
        before = pod.stubs()

        # The loader restarts: nothing happens to the server or the rollout.
        await pod.kill_loader()
        await pod.start_loader()
        await only_held(pod, "1.0.0", "1.1.0")
        assert pod.stubs() == before

        # Back: its memory goes, and stable's process is the one it was.
        await world.annotate("abort n1")
        await world.phase("RolledBack", "1.0.0", timeout_s=60)
        await only_held(pod, "1.0.0")
        assert pod.stubs() < before

        # Other bytes than the registry's version: never loaded, and stable is alone.
        await apply(world, "1.2.0")
        failed = await world.phase("RolledBack", "1.0.0", timeout_s=60)
        assert any(event["reason"] == "DataLoss" or "DATA_LOSS" in event["message"] for event in failed["events"])
        await only_held(pod, "1.0.0")

        # No room: it waits and says so; with room it goes on.
        await apply(world, "1.1.0", memory_mib=4_000_000)

        async def held_back() -> bool:
            conditions = {one["type"]: one for one in (await world.status()).get("conditions", [])}
            return conditions.get("Progressing", {}).get("reason") == "InsufficientMemory"

        await until(held_back, 60, "the condition says that there is no room")
        assert peers.versions() == {"1.0.0": 100}
        await apply(world, "1.1.0")
        await world.phase("Paused", "1.0.0", timeout_s=60)
        await world.annotate("promote n2")
        await world.phase("Promoted", "1.1.0", timeout_s=60)
        await only_held(pod, "1.1.0")
        assert [one["metadata"]["name"] for one in await world.list("pods")] == [name], "one pod all the while"

    # The controller is away, and the pod's node goes: another one gets ready by what the ConfigMap says.
    await world.cluster.delete(world.path("pods", name))
    await pod.end()

    async def another() -> bool:
        slices = [each for one in await world.list("endpointslices") for each in one.get("endpoints") or ()]
        return [each["targetRef"]["name"] for each in slices if each["conditions"].get("ready")] not in ([], [name])

    await until(another, 60, "another pod is ready")
    _, replaced = node.only
    await only_held(replaced, "1.1.0")
    async with controlled(world, peers, tmp_path / "two"):
        old = stable.endpoints[0]
        await until(lambda: arms(peers)["1.1.0"].endpoints not in ([], [old]), 60, "the route has the new pod")
        await world.cluster.delete(world.path("modeldeployments", "flight-delay"))

        async def nothing_is_left() -> bool:
            kinds = ("deployments", "services", "poddisruptionbudgets", "configmaps")
            return not any([await world.get(kind, PLACE) for kind in kinds])

        await until(nothing_is_left, 60, "objects of a deleted deployment")
