"""One test for both stores: SQL of one machine, objects of a cluster."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from millrace_kit.clock import SystemClock
from millrace_kit.errors import ConflictError
from millrace_rollout_controller import manifest
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.hub import GatewaySeen, Table
from millrace_rollout_controller.kubernetes.events import Events
from millrace_rollout_controller.kubernetes.mirror import Mirror
from millrace_rollout_controller.kubernetes.store import KubernetesStore
from millrace_rollout_controller.sql_store import SqlStore
from millrace_rollout_controller.state import Arm, Route, RouteArm, Status
from millrace_rollout_controller.store import Row, Store

from . import cluster
from .support import until, version_ref

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["sql", pytest.param("kubernetes", marks=pytest.mark.kubernetes)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "sql":
        sql = SqlStore.open(f"sqlite:///{tmp_path}/store.sqlite")
        yield sql
        sql.close()
        return
    async with cluster.world(request.getfixturevalue("control_plane")) as world:
        mirror = Mirror(world.cluster, world.path("modeldeployments"), changed=lambda _name: None)
        tasks: list[asyncio.Task[None]] = []
        await mirror.start(tasks, 10)
        events = Events(world.cluster, "test")
        stop = asyncio.Event()
        kept = KubernetesStore(
            world.cluster, mirror, events, check=lambda _spec: None, clock=SystemClock(), routes="routes", limit=100
        )
        tasks.append(asyncio.create_task(kept.run(stop)))
        yield kept
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def row(name: str, model: str = "", version: str = "1.0.0") -> Row:
    text = yaml.safe_dump(
        {
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": name},
            "spec": {"model": model or name, "version": version},
        }
    )
    return Row(name, model or name, text, 1, 1, False, Status(), Evidence(), NOW)


def changed(made: Row, **values: Any) -> Row:
    return dataclasses.replace(made, **values)


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


async def test_rows(store: Store) -> None:
    assert await call(store.rows) == []
    assert await call(store.get, "one") is None
    await call(store.create, row("two"))
    made = await call(store.create, row("one"))
    with pytest.raises(ConflictError):
        await call(store.create, row("one"))
    assert [found.name for found in await call(store.rows)] == ["one", "two"]

    status = Status(
        observed_generation=1, phase="Preparing", candidate=Arm(ref=version_ref("1.0.0", b"x")), weight=12.5
    )
    status.event(NOW, "Normal", "Tried", "a test")
    evidence = Evidence(trial=3, step=1)
    first = await call(store.update, changed(await call(store.get, "one"), status=status, evidence=evidence))
    found = await call(store.get, "one")
    assert (found.status, found.evidence, found.revision) == (status, evidence, first.revision)
    assert found.revision != made.revision
    # Who read before that comes too late.
    with pytest.raises(ConflictError):
        await call(store.update, changed(made, status=Status(phase="Paused")))
    assert (await call(store.get, "one")).status.phase == "Preparing"

    text = row("one", version="2.0.0").manifest
    await call(store.update, changed(found, manifest=text, generation=found.generation + 1))
    after = await call(store.get, "one")
    assert manifest.parse(after.manifest).spec.version == "2.0.0"
    assert (after.generation, after.status) == (found.generation + 1, status)

    assert not after.deleting
    await call(store.update, changed(after, deleting=True))

    async def deleting() -> bool:
        again = await call(store.get, "one")
        return bool(again and again.deleting)

    await until(deleting, 10)
    await call(store.delete, "one")

    async def gone() -> bool:
        return await call(store.get, "one") is None

    await until(gone, 10)
    assert [left.name for left in await call(store.rows)] == ["two"]


async def test_routes_and_gateways(store: Store) -> None:
    assert await call(store.load_routes) == Table()
    arm = RouteArm(version="1.0.0", digest="d", candidate=False, weight=100, endpoints=("a:1",), service="n/s:8001")
    route = Route(
        model="m", arms=(arm,), sticky_header="", rules=(), timeout_ms=5, feature_service="",
        feature_names=("f",), input_tensor="i", output_tensor="o",
    )  # fmt: skip
    for table in (Table(5, (route,)), Table(6, ())):
        await call(store.save_routes, table)
        assert await call(store.load_routes) == table
    assert await call(store.load_gateways) == {}
    await call(store.save_gateways, {"g": GatewaySeen(6, 1.5, 1)})

    async def saved() -> bool:
        return await call(store.load_gateways) == {"g": GatewaySeen(6, 1.5)}

    await until(saved, 10)
    assert (await call(store.load_routes)).generation == 6
