"""The controller against a real API server with its controller manager: objects, status, routes, events, drift, leaders."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from millrace_api.rollout.v1 import rollout_pb2
from millrace_api.rollout.v1.rollout_pb2_grpc import RolloutServiceStub

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

        async def told() -> bool:
            events = {event["reason"] for event in await world.list("events") if "flight" in event["metadata"]["name"]}
            return {"SpecAccepted", "FirstVersion", "Promoted", "ServersStopped"} <= events

        # Before the deletion, which ends what is told of this deployment: the old pods go later than their Deployment.
        await until(told, what="events of the whole way")
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


@asynccontextmanager
async def serving_one(world: World, peers: Peers, folder: Path, **spec: Any) -> AsyncIterator[str]:
    """1.0.0 is stable."""
    wanted = cluster.settings(world.kubeconfig, world.namespace, folder, peers)
    async with cluster.controller(wanted) as address, following(peers, address):
        await world.apply("1.0.0", **spec)
        await world.phase("Promoted", "1.0.0")
        yield address


async def test_what_somebody_changed_is_put_back(world: World, peers: Peers, tmp_path: Path) -> None:
    async with serving_one(world, peers, tmp_path):
        workload, service = (
            world.path("deployments", "flight-delay-1-0-0"),
            world.path("services", "flight-delay-1-0-0"),
        )
        patch = {"spec": {"replicas": 3, "template": {"spec": {"terminationGracePeriodSeconds": 45}}}}
        await world.cluster.merge(workload, patch)
        await world.cluster.delete(service)

        async def restored() -> bool:
            found = await world.cluster.get(workload)
            spec = found["spec"]
            grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
            return (
                spec["replicas"] == 1 and grace == 60 and await world.get("services", "flight-delay-1-0-0") is not None
            )

        await until(restored, 10, "drift is corrected")
        # What we do not own is not ours to undo.
        await world.cluster.merge(workload, {"metadata": {"labels": {"team": "red"}}})
        patch = {"metadata": {"labels": {"app.kubernetes.io/part-of": "other"}}}
        await world.cluster.merge(workload, patch)

        async def label_restored() -> bool:
            found = (await world.cluster.get(workload))["metadata"]["labels"]
            return found["app.kubernetes.io/part-of"] == "millrace" and found["team"] == "red"

        await until(label_restored, 10, "our label is back, theirs stays")


async def test_actions_by_annotation_are_done_once(world: World, peers: Peers, tmp_path: Path) -> None:
    steps = {"rollout": {"steps": [{"weight": 20, "pause": {}}, {"weight": 100}]}}
    async with serving_one(world, peers, tmp_path, **steps):
        await world.annotate("promote n1")
        refused = await world.answered("n1")
        assert (refused["result"], refused["verb"]) == ("Refused", "promote")
        assert "no rollout is under way" in refused["message"]
        await world.apply("1.1.0", **steps)
        paused = await world.phase("Paused", "1.0.0")
        assert (paused["weight"], paused["progress"], paused["candidateVersion"]) == (20, "1/2", "1.1.0")
        await world.annotate("set-weight 35 n2")
        assert (await world.answered("n2"))["result"] == "Done"

        async def held() -> bool:
            return peers.versions() == {"1.0.0": 65, "1.1.0": 35}

        await until(held, what="the held weight")
        await world.annotate("dance n3")
        assert "the verb must be one of" in (await world.answered("n3"))["message"]
        await world.annotate("promote n4")
        promoted = await world.phase("Promoted", "1.1.0")
        assert promoted["previousVersion"] == "1.0.0"
        body = {"metadata": {"annotations": {"millrace.dev/action": "undo n5"}}, "spec": {"version": "1.0.0"}}
        await world.cluster.merge(world.path("modeldeployments", "flight-delay"), body)
        # No pause holds an undo up.
        back = await world.phase("Promoted", "1.0.0")
        assert back["lastAction"]["id"] == "n5"
        asked = [e["message"] for e in back["events"] if e["reason"] == "PersonActed"]
        assert asked == ["a person asked: set-weight 35", "a person asked: promote", "a person asked: undo to 1.0.0"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ],
            },
            "Insufficient nvidia.com/gpu",
        ),
        (
            {
                "initContainerStatuses": [
                    {
                        "name": "fetch",
                        "image": "i",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 1,
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {
                            "terminated": {
                                "exitCode": 3,
                                "message": '{"reason":"DataLoss","message":"DATA_LOSS: model.onnx: digest","permanent":true}',
                            }
                        },
                    }
                ]
            },
            "DATA_LOSS: model.onnx: digest",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "triton",
                        "image": "i",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 0,
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
                    }
                ]
            },
            "no such image",
        ),
    ],
)
async def test_the_conditions_say_why_servers_do_not_start(
    world: World, peers: Peers, tmp_path: Path, status: dict[str, Any], words: str
) -> None:
    world.failing["1.1.0"] = status
    async with serving_one(world, peers, tmp_path):
        await world.apply("1.1.0", rollout={"progressDeadlineSeconds": 8})
        found = await world.phase("RolledBack", "1.0.0", timeout_s=40)
        degraded = next(c for c in found["conditions"] if c["type"] == "Degraded")
        assert degraded["status"] == "True"
        assert words in degraded["message"]
        assert peers.versions() == {"1.0.0": 100}


async def test_a_second_replica_takes_over_where_the_first_was(world: World, peers: Peers, tmp_path: Path) -> None:
    steps = {"rollout": {"steps": [{"weight": 20, "pause": {}}, {"weight": 100}]}}
    first = cluster.settings(world.kubeconfig, world.namespace, tmp_path / "1", peers, "one")
    second = cluster.settings(world.kubeconfig, world.namespace, tmp_path / "2", peers, "two")

    async def holder() -> str:
        found = await world.get("leases", "millrace-rollout-controller")
        return str(found["spec"]["holderIdentity"]) if found else ""

    async with AsyncExitStack() as standing:
        async with cluster.controller(first) as leader:
            await until(holder, what="the first leads")
            standby = await standing.enter_async_context(cluster.controller(second))
            async with grpc.aio.insecure_channel(standby) as channel:
                call = RolloutServiceStub(channel).WatchRoutes()
                await call.write(rollout_pb2.WatchRoutesRequest(gateway_id="g"))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            async with following(peers, leader):
                await world.apply("1.0.0", **steps)
                await world.phase("Promoted", "1.0.0")
                await world.apply("1.1.0", **steps)
                await world.phase("Paused", "1.0.0")
                assert await holder() == "one"
        generation = peers.in_force.generation
        async with following(peers, standby):

            async def second_leads() -> bool:
                return await holder() == "two"

            await until(second_leads, 10, "the lease was given back, not waited for")
            await world.annotate("resume n1")
            await world.phase("Promoted", "1.1.0")
            await until(lambda: peers.versions() == {"1.1.0": 100}, what="the old version leaves the route")
            assert peers.in_force.generation > generation


async def test_manifests_that_cannot_be_in_force_say_so(world: World, peers: Peers, tmp_path: Path) -> None:
    wrong = {"rules": [{"when": "request.headers[", "to": "candidate"}]}
    async with serving_one(world, peers, tmp_path):
        await world.apply("1.0.0", routing=wrong)

        async def said() -> bool:
            found = await world.status()
            return "spec.routing.rules[0].when" in found.get("waiting", "") and found["stableVersion"] == "1.0.0"

        await until(said, what="the old manifest stays in force, and the status says why")
        await world.apply("1.0.0", name="second", model="flight-delay")

        async def taken() -> bool:
            conditions = (await world.status("second")).get("conditions", [])
            return any(c["reason"] == "ModelTaken" and c["type"] == "Degraded" for c in conditions)

        await until(taken, what="one deployment per model")
        assert peers.versions() == {"1.0.0": 100}
        await cluster.kubectl(world.kubeconfig, "-n", world.namespace, "delete", "mdep", "second", "--timeout=10s")


async def test_apply_and_act_by_grpc_change_the_same_objects(world: World, peers: Peers, tmp_path: Path) -> None:
    async with serving_one(world, peers, tmp_path) as address, grpc.aio.insecure_channel(address) as channel:
        stub = RolloutServiceStub(channel)
        document = {
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": "flight-delay"},
            "spec": {"model": "flight-delay", "version": "1.1.0"},
        }
        answer = await stub.Apply(rollout_pb2.ApplyRequest(manifest_yaml=yaml.safe_dump(document)))
        assert answer.result == "configured"
        await world.phase("Promoted", "1.1.0")
        found = await world.get("modeldeployments", "flight-delay")
        assert found is not None
        assert found["spec"]["version"] == "1.1.0"
        undone = await stub.Act(rollout_pb2.ActRequest(name="flight-delay", verb=rollout_pb2.VERB_UNDO))
        # As it was when the verb was done, or after the switch back already.
        assert undone.deployment.previous_version in {"1.0.0", "1.1.0"}
        await world.phase("Promoted", "1.0.0")
        await stub.DeleteDeployment(rollout_pb2.DeleteDeploymentRequest(name="flight-delay"))

        async def gone() -> bool:
            return await world.get("modeldeployments", "flight-delay") is None

        await until(gone, what="the object")


async def test_autoscaling_leaves_the_number_to_the_autoscaler(world: World, peers: Peers, tmp_path: Path) -> None:
    scaling = {"replicas": 2, "autoscaling": {"maxReplicas": 4, "target": "70%"}}
    async with serving_one(world, peers, tmp_path, server=scaling):
        path = world.path("deployments", "flight-delay-1-0-0")
        found = await world.get("horizontalpodautoscalers", "flight-delay-1-0-0")
        assert found is not None
        assert (found["spec"]["minReplicas"], found["spec"]["maxReplicas"]) == (2, 4)
        assert (await world.cluster.get(path))["spec"]["replicas"] == 2
        await world.cluster.merge(f"{path}/scale", {"spec": {"replicas": 3}})

        async def three() -> bool:
            return len(peers.in_force.models[0].arms[0].endpoints) == 3

        await until(three, what="the third server is in the route")
        await world.apply("1.0.0", server=scaling | {"maxBatchSize": 32})

        async def changed() -> bool:
            item = await world.cluster.get(path)
            order = item["spec"]["template"]["spec"]["initContainers"][0]["env"][0]["value"]
            return '"max_batch_size":32' in order and item["spec"]["replicas"] == 3

        await until(changed, what="a new template, and the autoscaler's number")


async def test_a_version_without_requests_has_no_pods_until_the_next_call(
    world: World, peers: Peers, tmp_path: Path
) -> None:
    scaling = {"replicas": 2, "autoscaling": {"minReplicas": 0, "maxReplicas": 4, "idleAfter": "1s"}}
    name = "flight-delay-1-0-0"

    async def pods() -> int:
        return len([pod for pod in await world.list("pods") if not pod["metadata"].get("deletionTimestamp")])

    async def asleep() -> bool:
        return peers.in_force.models[0].arms[0].asleep and await pods() == 0

    async def awake() -> bool:
        arm = peers.in_force.models[0].arms[0]
        return not arm.asleep and len(arm.endpoints) == 2

    async with serving_one(world, peers, tmp_path, server=scaling) as address:
        await until(asleep, what="asleep")
        assert (await world.cluster.get(world.path("deployments", name)))["spec"]["replicas"] == 0
        # It lets a Deployment of 0 replicas alone, so it may stay.
        scaler = await world.get("horizontalpodautoscalers", name)
        assert scaler is not None
        assert scaler["spec"]["minReplicas"] == 2
        status = await world.status()
        conditions = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
        assert conditions["Asleep"] == ("True", "Idle")
        assert conditions["Ready"] == ("True", "Asleep")
        async with grpc.aio.insecure_channel(address) as channel:
            request = rollout_pb2.WakeVersionRequest(model="flight-delay", version="1.0.0")
            # Two gateways at once.
            stub = RolloutServiceStub(channel)
            for answer in await asyncio.gather(stub.WakeVersion(request), stub.WakeVersion(request)):
                assert answer.asleep
            # Requests keep it awake.
            busy = asyncio.create_task(_count_up(peers))
            await until(awake, what="awake")
            # From here on the number is the autoscaler's again.
            await world.cluster.merge(f"{world.path('deployments', name)}/scale", {"spec": {"replicas": 3}})

            async def three() -> bool:
                return len(peers.in_force.models[0].arms[0].endpoints) == 3

            await until(three, what="the autoscaler's third server")
            assert not (await stub.WakeVersion(request)).asleep
            busy.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.WakeVersion(rollout_pb2.WakeVersionRequest(model="nobody", version="1.0.0"))
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def _count_up(peers: Peers) -> None:
    while True:
        peers.requests["1.0.0"] += 1
        await asyncio.sleep(0.1)


async def test_pods_of_a_deployment_before_are_no_servers_of_the_next(
    world: World, peers: Peers, tmp_path: Path
) -> None:
    """A version that comes again at once finds its old pods still ready for a moment."""
    async with serving_one(world, peers, tmp_path):
        await world.apply("1.1.0")
        await world.phase("Promoted", "1.1.0")
        for _ in range(3):
            await world.apply("1.0.0")
            await world.phase("Promoted", "1.0.0")
            pods = {pod["status"].get("podIP"): pod["metadata"] for pod in await world.list("pods")}
            used = [endpoint.rpartition(":")[0] for endpoint in peers.in_force.models[0].arms[0].endpoints]
            assert used
            for address in used:
                assert address in pods, "a route to a pod that is gone"
                assert not pods[address].get("deletionTimestamp")
            await world.apply("1.1.0")
            await world.phase("Promoted", "1.1.0")
