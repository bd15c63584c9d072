"""The controller against a real API server with its controller manager: objects, status, routes, events, drift, leaders."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from . import cluster
from .cluster import World
from .peers import Peers, gateway, serving
from .support import onnx_model, until

pytestmark = pytest.mark.kubernetes


@pytest.fixture
async def peers(tiny: bytes) -> AsyncIterator[Peers]:
    contents = {"1.0.0": tiny, "1.1.0": onnx_model(0.2), "1.2.0": onnx_model(0.3)}
    async with serving(Peers(contents=contents)) as made:
        yield made


@pytest.fixture
async def world(control_plane: Path) -> AsyncIterator[World]:
    async with cluster.world(control_plane) as made:
        kubelet = asyncio.create_task(made.kubelet())
        yield made
        kubelet.cancel()
        with suppress(asyncio.CancelledError):
            await kubelet


@asynccontextmanager
async def following(peers: Peers, address: str) -> AsyncIterator[None]:
    task = asyncio.create_task(gateway(peers, address))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_version_gets_servers_a_route_and_goes_again(world: World, peers: Peers, tmp_path: Path) -> None:
    wanted = cluster.settings(world.kubeconfig, world.namespace, tmp_path, peers)
    async with cluster.controller(wanted) as address, following(peers, address):
        await world.apply("1.0.0", server={"replicas": 2})
        status = await world.phase("Promoted", "1.0.0")
        assert {c["type"]: c["status"] for c in status["conditions"]}["Degraded"] == "False"
        route = peers.in_force.models[0]
        assert route.arms[0].service == f"{world.namespace}/flight-delay-1-0-0:8001"
        assert len(route.arms[0].endpoints) == 2

        await world.apply("1.1.0", server={"replicas": 2})
        await world.phase("Promoted", "1.1.0")

        async def old_is_gone() -> bool:
            kinds = ("deployments", "services", "poddisruptionbudgets")
            return all([await world.get(kind, "flight-delay-1-0-0") is None for kind in kinds])

        await until(old_is_gone, what="objects of the old version")
        shown = await cluster.kubectl(world.kubeconfig, "-n", world.namespace, "get", "mdep")
        assert shown.split()[:6] == ["NAME", "READY", "STABLE", "CANDIDATE", "WEIGHT", "STEP"]
        assert "True" in shown

        await cluster.kubectl(
            world.kubeconfig, "-n", world.namespace, "delete", "mdep", "flight-delay", "--timeout=30s"
        )
        assert not peers.in_force.models

        async def nothing_is_left() -> bool:
            return not await world.list("deployments") and not await world.list("pods")

        await until(nothing_is_left, what="workloads of a deleted deployment")
        events = {event["reason"] for event in await world.list("events") if "flight" in event["metadata"]["name"]}
        assert {"SpecAccepted", "FirstVersion", "Promoted", "ServersStopped"} <= events
