"""Rollouts of callers whom no gateway sees: the model servers' own statistics are the evidence."""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
from millrace_api.rollout.v1 import rollout_pb2 as pb
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import GatewayFigures, Poll
from millrace_rollout_controller.server_figures import ServerFigures, counted_by_servers, counts, sources
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .peers import Peers, gateway, serving
from .support import FEATURES, onnx_model, until
from .test_service import apply, background, controller, deployment, phase, settings
from .world import World, spec

ROLLOUT = {
    "countedBy": "Servers",
    "steps": [{"weight": 30, "minRequests": 30}, {"weight": 60, "minRequests": 60}],
    "gates": [{"metric": "errorRate", "max": 0.2}],
}


def breaking_model() -> bytes:
    """Answers rows of zeros and breaks at every other: what it takes for an index leads nowhere."""
    nodes = [
        helper.make_node("Cast", ["features"], ["indices"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "indices"], ["found"], axis=0),
        helper.make_node("ReduceMax", ["found"], ["probability"], axes=[1], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "breaking",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["b", FEATURES])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["b", 1])],
        [numpy_helper.from_array(np.array([0.5], np.float32), "table")],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )


async def around_the_gateways(peers: Peers, answered: Counter[str]) -> None:
    """Callers that follow the weights and ask the servers in force themselves."""
    chance = random.Random(7)
    request = service_pb2.ModelInferRequest(model_name="flight-delay")
    request.inputs.add(name="features", datatype="FP32", shape=[1, FEATURES])
    request.raw_input_contents.append(np.full((1, FEATURES), 7, np.float32).tobytes())
    channels: dict[str, grpc.aio.Channel] = {}

    async def one() -> None:
        while True:
            await asyncio.sleep(0.005)
            arms = [arm for route in peers.in_force.models for arm in route.arms if arm.weight]
            if not arms:
                continue
            arm = chance.choices(arms, [arm.weight for arm in arms])[0]
            channel = channels.setdefault(arm.endpoints[0], grpc.aio.insecure_channel(arm.endpoints[0]))
            with suppress(grpc.aio.AioRpcError):
                await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=5)
            answered[arm.version] += 1

    try:
        await asyncio.gather(*(one() for _ in range(4)))
    finally:
        for channel in channels.values():
            await channel.close()


async def test_servers_promote_and_roll_back_what_no_gateway_saw(tmp_path: Path, tiny: bytes) -> None:
    contents = {"1.0.0": tiny, "1.1.0": onnx_model(0.2), "1.2.0": breaking_model()}
    async with (
        serving(Peers(contents=contents)) as peers,
        controller(settings(tmp_path, peers)) as (stub, address),
        background(gateway(peers, address)),
    ):
        await apply(stub, "1.0.0", rollout=ROLLOUT)
        await phase(stub, "Promoted", "1.0.0")
        await apply(stub, "1.1.0", rollout=ROLLOUT)
        await until(lambda: peers.versions().get("1.1.0") == 30.0)

        async def waits() -> bool:
            return "0 of 30 candidate requests" in (await deployment(stub)).waiting

        # Nobody asks: warm-up requests are no evidence, and nothing is the same as no answer.
        await until(waits)
        held = await deployment(stub)
        assert [(gate.verdict, gate.candidate_samples) for gate in held.gates] == [(pb.VERDICT_UNDECIDED, 0)]

        answered: Counter[str] = Counter()
        async with background(around_the_gateways(peers, answered)):
            good = await phase(stub, "Promoted", "1.1.0", 120)
            assert 60 <= good.gates[0].candidate_samples <= answered["1.1.0"]
            await apply(stub, "1.2.0", rollout=ROLLOUT)
            back = await phase(stub, "RolledBack", "1.1.0", 120)
        assert [gate.verdict for gate in back.gates] == [pb.VERDICT_FAIL]
        assert back.gates[0].candidate_samples >= 10
        assert answered["1.2.0"] < 200
        assert not peers.requests, "no gateway saw any of it"


def test_a_call_counts_once_and_what_only_gateways_know_stays() -> None:
    seen = Counts(requests=10, errors=3, latency={"10.0": 10}, scores={"4": 9})
    poll = Poll({"gateway:1": GatewayFigures("x", {"2.0.0": seen})}, {"2.0.0": Counts(outcomes=4)})
    servers = {"server a:1": GatewayFigures("", {"2.0.0": Counts(requests=25, errors=5)})}
    merged = counted_by_servers(poll, servers)
    total = Counts()
    for figures in merged.gateways.values():
        total = total.plus(figures.versions["2.0.0"])
    assert (total.requests, total.errors, total.latency, total.scores) == (25, 5, {}, {"4": 9})
    assert merged.outcomes == poll.outcomes


async def test_servers_that_do_not_answer_or_hold_two_versions_say_nothing() -> None:
    shared = {"1.0.0": ("127.0.0.1:1", "127.0.0.1:2"), "2.0.0": ("127.0.0.1:2",)}
    assert sources(shared) == ["server 127.0.0.1:1"]
    asked = ServerFigures(timeout_s=0.2)
    assert await asked.poll({"m": shared}) == {"m": {}}
    await asked.close()


def test_callers_that_gave_up_are_no_errors_and_answers_that_are_errors_are() -> None:
    page = """
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="1"} 90
nv_inference_request_success{model="other",version="1"} 7
nv_inference_request_failure{model="m",reason="BACKEND",version="1"} 5
nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 1
nv_inference_request_failure{model="m",reason="CANCELED",version="1"} 4
millrace_failed_answers{model="m",version="1"} 3
nv_inference_request_duration_us{model="m",version="1"} 767692
"""
    found = counts(page, "m")
    assert found is not None
    assert (found.requests, found.errors) == (96, 9)
    assert counts(page, "unknown") is None


def test_a_gate_on_latency_holds_and_says_why() -> None:
    rollout = "{countedBy: Servers, steps: [{weight: 5}], gates: [{metric: latencyP99Ms, max: 50}]}"
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    world.until("Progressing")
    world.verdict, world.requests = "pass", 10_000
    for _ in range(10):
        status = world.tick()
    assert (status.weight, status.gates[0].verdict) == (5, "undecided")
    assert "no percentiles" in status.gates[0].evidence
