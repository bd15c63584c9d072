"""What a version shows before its first caller, with the real Envoy and Triton: warm by logged requests, and answers like stable's to copies.

And what a version does that nobody calls: it sleeps, and its next callers notice nothing but the time.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http
import yaml
from millrace_api.rollout.v1.rollout_pb2 import VERDICT_FAIL, VERDICT_PASS, Deployment
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.integration.test_strategies import apply, load, reach
from tests.stack import FLIGHTS, MODEL, Stack, eventually, feature_names, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROLLOUT: dict[str, Any] = {
    "strategy": "Canary",
    "steps": [{"weight": 50}],
    # Whether latency becomes steady is this machine's business: `test_warm_service.py` judges a server of known latency.
    "warmup": {
        "requests": 20,
        "windowSeconds": 0.2,
        "maxTrials": 5,
        "maxP99Ratio": 50,
        "timeoutSeconds": 100,
        "required": "Never",
    },
    "shadow": {"mirrorPercent": 100, "minPairs": 200, "segment": {"header": "x-user-id"}},
    "gates": [
        {"metric": "errorRate", "max": 0.05},
        {"metric": "shadow/labelFlipRate", "max": 0.05},
        {"metric": "shadow/scoreShift", "max": 0.1},
        {"metric": "shadow/maxAbsDiff", "max": 0.5},
    ],
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("run")) as running:
        running.load_definitions()
        # Scores of the load's row: 0.5, 0.51 and 0.27.
        for version, bias in (("1.0.0", 0.0), ("1.1.0", 0.05), ("1.2.0", -1.0)):
            running.register(version, bias)
        apply(running, "1.0.0", {"strategy": "BlueGreen"})
        running.wait_stable("1.0.0")
        yield running


def test_a_version_that_answers_like_stable_gets_its_traffic(stack: Stack) -> None:
    with load(stack) as callers:
        callers.more(100)
        apply(stack, "1.1.0", ROLLOUT)
        done = reach(stack, "1.1.0 is stable", stable_version="1.1.0", candidate_version="")
        gates = {gate.gate.split()[0]: gate for gate in done.gates}
        assert "logged requests" in gates.pop("warmup").evidence
        assert {gate.verdict for gate in gates.values()} == {VERDICT_PASS}, gates
        flips = gates["shadow/labelFlipRate"]
        assert flips.candidate_samples >= 200
        assert "label flips 0.0000" in flips.evidence
        assert "in segment" in flips.evidence
        assert "mean shift 0.0125" in gates["shadow/scoreShift"].evidence


def test_one_that_answers_otherwise_never_gets_a_caller(stack: Stack) -> None:
    before = stack.client.rollout.get(MODEL).stable_version
    with load(stack) as callers:
        callers.more(100)
        callers.reset()
        apply(stack, "1.2.0", ROLLOUT)
        back = reach(stack, "1.2.0 is sent away", phase="RolledBack", stable_version=before)
        failed = [gate for gate in back.gates if gate.verdict == VERDICT_FAIL and not gate.gate.startswith("warmup")]
        assert failed[0].gate.startswith("shadow/")
        assert set(callers.answered) == {before}


def test_a_version_nobody_calls_sleeps_and_the_next_calls_wake_it(stack: Stack) -> None:
    version = stack.client.rollout.get(MODEL).stable_version
    manifest = yaml.safe_load((FLIGHTS / "manifests" / "1.0.0.yaml").read_text())
    manifest["spec"] |= {"version": version, "rollout": {"strategy": "BlueGreen"}}
    manifest["spec"]["server"] |= {"replicas": 1, "autoscaling": {"minReplicas": 0, "idleAfter": "2s"}}
    manifest["spec"]["routing"].pop("rules")
    stack.client.rollout.apply(yaml.safe_dump(manifest))

    def asleep() -> Deployment | None:
        found = stack.client.rollout.get(MODEL)
        sleeps = any(c.type == "Asleep" and c.status == "True" for c in found.conditions)
        return found if sleeps and not _records(stack) else None

    found = eventually("asleep, without a server", asleep, 60)
    assert found.ready, "calls are held, so none fails"

    width = len(feature_names(stack.client))
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="features", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.zeros((1, width), "<f4").tobytes())
    with grpc.insecure_channel(stack.endpoints.gateway) as channel, ThreadPoolExecutor(20) as pool:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        # Nobody is there any more when it wakes; the next callers find it on its way.
        with pytest.raises(grpc.RpcError) as late:
            stub.ModelInfer(request, timeout=0.1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        answers = list(pool.map(lambda _: stub.ModelInfer(request, timeout=60), range(20)))
        assert all(answer.raw_output_contents for answer in answers)
        eventually("asleep again", asleep, 60)
        with tritonclient.http.InferenceServerClient(stack.endpoints.gateway, network_timeout=60) as client:
            row = tritonclient.http.InferInput("features", [1, width], "FP32")
            row.set_data_from_numpy(np.zeros((1, width), np.float32))
            assert client.infer(MODEL, [row]).as_numpy("probability") is not None
    events = [event.reason for event in stack.client.rollout.get(MODEL).events]
    assert events[-1] == "Awake"
    assert events.count("FellAsleep") == 2


def _records(stack: Stack) -> list[Path]:
    """Of model servers that run."""
    return list(stack.state.rglob("rollout/servers/*.json"))
