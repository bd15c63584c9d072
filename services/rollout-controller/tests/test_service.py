"""The whole service with real Triton servers: rollouts under traffic, kill -9, bad input."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
import yaml
from millrace_api.rollout.v1 import rollout_pb2 as pb
from millrace_api.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_kit.settings import TelemetrySettings
from millrace_rollout_controller.app import build
from millrace_rollout_controller.settings import RolloutSettings, TritonSettings

from .peers import Peers, gateway, serving, traffic
from .support import onnx_model, until

ROLLOUT = {
    "steps": [{"weight": 20, "minRequests": 20}, {"weight": 50, "minRequests": 50}],
    "gates": [
        {"metric": "errorRate", "max": 0.2},
        {"metric": "latencyP99Ms", "max": 100, "required": "Promotion"},
        {"metric": "outcome/accuracy", "compare": "notWorseThanStable", "margin": 0.1, "required": "Promotion"},
    ],
}


def manifest(version: str, name: str = "flight-delay", model: str = "flight-delay", **spec: object) -> str:
    document = {
        "apiVersion": "millrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name},
        "spec": {"model": model, "version": version, "rollout": ROLLOUT} | spec,
    }
    return yaml.safe_dump(document)


def settings(folder: Path, peers: Peers, **more: object) -> RolloutSettings:
    return RolloutSettings.model_validate(
        {
            "state_dir": str(folder), "database_url": f"sqlite:///{folder}/rollout.sqlite", "registry_address": peers.address,
            "gateway_addresses": (peers.address,), "drift_address": peers.address, "drain_s": 0.5, "tick_s": 0.05, "poll_s": 0.2,
            "gateway_forget_s": 5.0, "triton": TritonSettings(backoff_s=0.05, warmup_s=1.0, stop_timeout_s=5.0),
        }
        | more
    )  # fmt: skip


@asynccontextmanager
async def controller(wanted: RolloutSettings) -> AsyncIterator[tuple[RolloutServiceStub, str]]:
    async with running(await build(wanted), wanted) as address, open_channel(address, timeout_s=10) as channel:
        yield RolloutServiceStub(channel), address


@asynccontextmanager
async def background(*works: object) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def deployment(stub: RolloutServiceStub, name: str = "flight-delay") -> pb.Deployment:
    return (await stub.GetDeployment(pb.GetDeploymentRequest(name=name))).deployment


async def phase(stub: RolloutServiceStub, wanted: str, version: str = "", timeout_s: float = 60) -> pb.Deployment:
    last = pb.Deployment()

    async def there() -> bool:
        nonlocal last
        last = await deployment(stub)
        return (
            last.phase == wanted
            and version in {"", last.stable_version}
            and last.observed_generation == last.generation
        )

    try:
        await until(there, timeout_s)
    except AssertionError:
        raise AssertionError(f"{wanted} not reached:\n{last}") from None
    return last


@pytest.fixture
async def peers(tiny: bytes) -> AsyncIterator[Peers]:
    contents = {"1.0.0": tiny, "1.1.0": onnx_model(0.2), "1.2.0": onnx_model(0.3), "1.3.0": onnx_model(0.4)}
    async with serving(Peers(contents=contents)) as made:
        yield made


async def apply(stub: RolloutServiceStub, version: str, **spec: object) -> pb.ApplyResponse:
    return await stub.Apply(pb.ApplyRequest(manifest_yaml=manifest(version, **spec)))


async def test_rollouts_under_traffic_lose_no_request(tmp_path: Path, peers: Peers) -> None:
    async with controller(settings(tmp_path, peers)) as (stub, address):
        async with background(gateway(peers, address), traffic(peers)):
            assert (await apply(stub, "1.0.0")).result == "created"
            assert (await apply(stub, "1.0.0")).result == "unchanged"
            first = await phase(stub, "Promoted", "1.0.0")
            assert await until(lambda: peers.versions() == {"1.0.0": 100.0})
            assert [c.type for c in first.conditions] == ["Ready", "Progressing", "Degraded"]

            peers.accuracy["1.1.0"] = 0.9
            assert (await apply(stub, "1.1.0")).result == "configured"
            promoted = await phase(stub, "Promoted", "1.1.0", 120)
            assert [g.verdict for g in promoted.gates] == [pb.VERDICT_PASS] * 3, promoted.gates
            assert "stable" in promoted.gates[2].evidence
            await until(lambda: peers.versions() == {"1.1.0": 100.0}, what="the old version leaves the route")

            for version, spoil, gate in (
                ("1.2.0", lambda: peers.accuracy.update({"1.2.0": 0.4}), "outcome/accuracy"),
                ("1.3.0", lambda: peers.slow.add("1.3.0"), "latencyP99Ms"),
            ):
                spoil()
                await apply(stub, version)
                back = await phase(stub, "RolledBack", "1.1.0", 120)
                failed = [g for g in back.gates if g.verdict == pb.VERDICT_FAIL]
                assert [g.gate.split()[0] for g in failed] == [gate]
                await until(lambda: peers.versions() == {"1.1.0": 100.0})
            assert peers.requests["1.3.0"] < 200
            assert peers.generations == sorted(set(peers.generations))
        assert peers.problems == []
        events = [e.reason for e in (await deployment(stub)).events]
        assert events.count("GateFailed") == 2
        servers = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
        assert servers
    assert [p for p in servers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


async def test_without_evidence_nothing_moves(tmp_path: Path, peers: Peers) -> None:
    wanted = settings(tmp_path, peers, gateway_addresses=("127.0.0.1:1",), drift_address="127.0.0.1:1")
    async with controller(wanted) as (stub, address), background(gateway(peers, address), traffic(peers)):
        await apply(stub, "1.0.0")
        await phase(stub, "Promoted")
        await apply(stub, "1.1.0")
        await until(lambda: peers.versions().get("1.1.0") == 20.0)
        sent = peers.requests["1.1.0"]
        await until(lambda: peers.requests["1.1.0"] > sent + 100)
        held = await deployment(stub)
        assert (held.phase, held.candidate_weight) == ("Progressing", 20.0)
        assert {g.verdict for g in held.gates} == {pb.VERDICT_UNDECIDED}
        await stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_PROMOTE))
        await phase(stub, "Promoted", "1.1.0")
    assert peers.problems == []


async def test_bad_versions_never_get_traffic(tmp_path: Path, peers: Peers) -> None:
    async with controller(settings(tmp_path, peers)) as (stub, address), background(gateway(peers, address)):
        await apply(stub, "1.0.0")
        await phase(stub, "Promoted")
        peers.tampered.add("1.1.0")
        await apply(stub, "1.1.0")
        back = await phase(stub, "RolledBack", "1.0.0")
        assert any(e.reason == "DataLoss" and "DATA_LOSS" in e.message for e in back.events)
        peers.features["1.2.0"] = 5
        await apply(stub, "1.2.0")
        back = await phase(stub, "RolledBack", "1.0.0")
        assert any(c.type == "Degraded" and c.reason == "SignatureChanged" for c in back.conditions)
        await apply(stub, "9.9.9")
        await until(lambda: _waits(stub), what="the registry does not know 9.9.9")
        assert peers.versions() == {"1.0.0": 100.0}


async def _waits(stub: RolloutServiceStub) -> bool:
    return any(e.reason == "VersionNotFound" for e in (await deployment(stub)).events)


async def test_verbs_watch_and_delete(tmp_path: Path, peers: Peers) -> None:
    async with controller(settings(tmp_path, peers)) as (stub, address), background(gateway(peers, address)):
        await apply(stub, "1.0.0")
        await phase(stub, "Promoted")
        await refused(
            stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_PAUSE)), grpc.StatusCode.FAILED_PRECONDITION
        )
        watch = stub.WatchDeployment(pb.WatchDeploymentRequest(name="flight-delay"))
        assert (await watch.read()).deployment.phase == "Promoted"
        await apply(stub, "1.1.0")
        await phase(stub, "Progressing")
        await stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_PAUSE))
        await phase(stub, "Paused")
        await stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_RESUME))
        await phase(stub, "Progressing")
        await stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_ABORT))
        await phase(stub, "RolledBack")
        seen = set()
        while "RolledBack" not in seen:
            seen.add((await asyncio.wait_for(watch.read(), 10)).deployment.phase)
        assert len((await stub.ListDeployments(pb.ListDeploymentsRequest())).deployments) == 1
        await stub.DeleteDeployment(pb.DeleteDeploymentRequest(name="flight-delay"))

        async def gone() -> bool:
            return not (await stub.ListDeployments(pb.ListDeploymentsRequest())).deployments

        await until(gone)
        await until(lambda: not peers.in_force.models)


async def test_blue_green_and_undo_by_the_api(tmp_path: Path, peers: Peers) -> None:
    rollout = {"strategy": "BlueGreen", "blueGreen": {"keepOldSeconds": 60}}
    async with (
        controller(settings(tmp_path, peers)) as (stub, address),
        background(gateway(peers, address), traffic(peers)),
    ):
        undo = pb.ActRequest(name="flight-delay", verb=pb.VERB_UNDO)
        await apply(stub, "1.0.0", rollout=rollout)
        await phase(stub, "Promoted", "1.0.0")
        await refused(stub.Act(undo), grpc.StatusCode.FAILED_PRECONDITION)
        await apply(stub, "1.1.0", rollout=rollout)
        promoted = await phase(stub, "Promoted", "1.1.0")
        assert (promoted.previous_version, promoted.strategy, promoted.steps) == ("1.0.0", "BlueGreen", 2)
        await until(lambda: peers.versions() == {"1.1.0": 100.0, "1.0.0": 0.0}, what="the old version is kept")
        undone = (await stub.Act(undo)).deployment
        assert (undone.generation, 'version: "1.0.0"' in undone.manifest_yaml) == (promoted.generation + 1, True)
        await phase(stub, "Promoted", "1.0.0")
        await until(lambda: peers.versions() == {"1.0.0": 100.0, "1.1.0": 0.0}, what="back")
        assert {weight for weights in peers.history for weight in weights.values()} == {0.0, 100.0}, "nothing between"
        bad = grpc.StatusCode.INVALID_ARGUMENT
        await apply(stub, "1.2.0")
        await phase(stub, "Progressing")
        weigh = pb.ActRequest(name="flight-delay", verb=pb.VERB_SET_WEIGHT, weight=33.333)
        await refused(stub.Act(weigh), bad, "weight")
        await refused(stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_PAUSE, weight=5)), bad, "weight")
        await stub.Act(pb.ActRequest(name="flight-delay", verb=pb.VERB_SET_WEIGHT, weight=12.5))
        await until(lambda: peers.versions().get("1.2.0") == 12.5, what="the weight a person asked for")
    assert peers.problems == []


def start(folder: Path, config: dict[str, object]) -> subprocess.Popen[bytes]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    script = "from millrace_rollout_controller.app import main; main()"
    with (folder / "controller.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", script, "--config", str(path)], stdout=log, stderr=log)


async def test_kill_9_in_the_middle_of_a_canary_changes_nothing(tmp_path: Path, peers: Peers) -> None:
    from millrace_rollout_controller.triton import free_port

    address = f"127.0.0.1:{free_port('127.0.0.1', frozenset())}"
    wanted = settings(tmp_path, peers, listen=address, telemetry=TelemetrySettings())
    process = start(tmp_path, wanted.model_dump(mode="json"))
    try:
        async with open_channel(address, timeout_s=10) as channel, background(gateway(peers, address), traffic(peers)):
            stub = RolloutServiceStub(channel)
            request = pb.ApplyRequest(manifest_yaml=manifest("1.0.0"))
            await stub.Apply(request, wait_for_ready=True, timeout=30)
            await phase(stub, "Promoted", "1.0.0")
            peers.accuracy["1.1.0"] = 0.9
            await apply(stub, "1.1.0")
            before = await phase(stub, "Progressing")
            process.send_signal(signal.SIGKILL)
            process.wait()
            sent = sum(peers.requests.values())
            await until(lambda: sum(peers.requests.values()) > sent + 200, what="traffic goes on without a controller")
            process = start(tmp_path, wanted.model_dump(mode="json"))
            await stub.GetDeployment(pb.GetDeploymentRequest(name="flight-delay"), wait_for_ready=True, timeout=30)
            after = await deployment(stub)
            endpoints = {e for arm in before.arms for e in arm.endpoints}
            assert {e for arm in after.arms for e in arm.endpoints} == endpoints
            assert any(e.reason == "CandidateChosen" and "1.1.0" in e.message for e in after.events)
            await phase(stub, "Promoted", "1.1.0", 120)
        assert peers.problems == []
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    assert process.returncode == 0
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if f"{tmp_path}/rollout" in " ".join(p.info["cmdline"] or ())
    ]


async def refused(call: object, code: grpc.StatusCode, field: str = "") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = MillraceError.from_rpc(caught.value)
    assert error.code is code, error
    if field:
        assert error.metadata["field"] == field


async def test_bad_input_names_the_field(tmp_path: Path, peers: Peers) -> None:
    bad = grpc.StatusCode.INVALID_ARGUMENT
    async with controller(settings(tmp_path, peers)) as (stub, _):
        await refused(stub.Apply(pb.ApplyRequest()), bad, "manifest_yaml")
        await refused(stub.Apply(pb.ApplyRequest(manifest_yaml=manifest("1"))), bad, "spec.version")
        await refused(stub.GetDeployment(pb.GetDeploymentRequest(name="A B")), bad, "name")
        await refused(stub.DeleteDeployment(pb.DeleteDeploymentRequest()), bad, "name")
        await refused(stub.Act(pb.ActRequest(name="a")), bad, "verb")
        await refused(stub.Act(pb.ActRequest(name="a", verb=77)), bad, "verb")
        await refused(stub.WatchDeployment(pb.WatchDeploymentRequest()).read(), bad, "name")
        for request, field in (
            (pb.WatchRoutesRequest(), "gateway_id"),
            (pb.WatchRoutesRequest(gateway_id="g" * 200), "gateway_id"),
            (pb.WatchRoutesRequest(gateway_id="g", applied_generation=-1), "applied_generation"),
            (pb.WatchRoutesRequest(gateway_id="g", applied_generation=1 << 62), "applied_generation"),
        ):
            await refused(stub.WatchRoutes(iter([request])).read(), bad, field)
        for call in (
            stub.GetDeployment(pb.GetDeploymentRequest(name="nobody")),
            stub.DeleteDeployment(pb.DeleteDeploymentRequest(name="nobody")),
            stub.Act(pb.ActRequest(name="nobody", verb=pb.VERB_PAUSE)),
            stub.WatchDeployment(pb.WatchDeploymentRequest(name="nobody")).read(),
        ):
            await refused(call, grpc.StatusCode.NOT_FOUND)


async def test_one_model_has_one_deployment(tmp_path: Path, peers: Peers) -> None:
    async with controller(settings(tmp_path, peers, max_deployments=2)) as (stub, _):
        await apply(stub, "1.0.0")
        again = pb.ApplyRequest(manifest_yaml=manifest("1.0.0", name="other"))
        await refused(stub.Apply(again), grpc.StatusCode.FAILED_PRECONDITION)
        moved = pb.ApplyRequest(manifest_yaml=manifest("1.0.0", model="another"))
        await refused(stub.Apply(moved), grpc.StatusCode.INVALID_ARGUMENT, "spec.model")
        await stub.Apply(pb.ApplyRequest(manifest_yaml=manifest("1.0.0", name="b", model="b")))
        full = pb.ApplyRequest(manifest_yaml=manifest("1.0.0", name="c", model="c"))
        await refused(stub.Apply(full), grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_process_group_survives(tmp_path: Path) -> None:
    """The servers' own session: a Ctrl-C in the controller's terminal does not reach them."""
    from millrace_rollout_controller.triton import Triton

    parts = Triton.prepare(tmp_path)
    child = parts.start("mrsession", tmp_path, "127.0.0.1", 1, tmp_path / "log")
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        child.kill()
        child.wait()
