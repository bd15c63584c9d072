"""Each strategy on one machine with the real Envoy and Triton, under steady load: no request fails and nobody gets a shadow's answer."""

import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from millrace import MillraceError
from millrace_api.rollout.v1.rollout_pb2 import (
    VERB_ABORT,
    VERB_PROMOTE,
    VERB_RESUME,
    VERB_SET_WEIGHT,
    VERB_UNDO,
    Deployment,
)
from tritonclient.grpc import service_pb2

from tests.stack import FLIGHTS, MODEL, Stack, eventually, feature_names, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ERRORS = {"metric": "errorRate", "max": 0.05}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("run")) as running:
        running.load_definitions()
        for version, bias in (("1.0.0", 0.0), ("1.1.0", 0.1), ("1.2.0", 0.2), ("1.3.0", 0.3)):
            running.register(version, bias)
        apply(running, "1.0.0", {"strategy": "BlueGreen"})
        running.wait_stable("1.0.0")
        yield running


def apply(stack: Stack, version: str, rollout: dict[str, Any], server: dict[str, Any] | None = None) -> None:
    manifest = yaml.safe_load((FLIGHTS / "manifests" / "1.0.0.yaml").read_text())
    manifest["spec"] |= {"version": version, "rollout": rollout}
    manifest["spec"]["server"] |= server or {"replicas": 1}
    manifest["spec"]["routing"].pop("rules")
    stack.client.rollout.apply(yaml.safe_dump(manifest))


class Load:
    """Requests of many callers, each with its own key; what answered whom."""

    def __init__(self, stack: Stack) -> None:
        self.answered: Counter[str] = Counter()
        self.by_caller: dict[str, set[str]] = {}
        self.problems: list[str] = []
        self._stop = threading.Event()
        self._width = len(feature_names(stack.client))
        self._target = stack.endpoints.gateway

    def run(self, worker: int) -> None:
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="features", datatype="FP32", shape=[1, self._width])
        request.raw_input_contents.append(np.zeros((1, self._width), "<f4").tobytes())
        with grpc.insecure_channel(self._target) as channel:
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelInferResponse.FromString,
            )
            count = 0
            while not self._stop.is_set():
                count += 1
                caller = f"{worker}-{count % 50}"
                metadata = [("x-millrace-model", MODEL), ("x-user-id", caller)]
                try:
                    _, call = infer.with_call(request, timeout=10, metadata=metadata)
                except grpc.RpcError as error:
                    self.problems.append(str(error))
                    continue
                version = str(dict(call.initial_metadata())["x-millrace-version"])
                self.answered[version] += 1
                self.by_caller.setdefault(caller, set()).add(version)
                self._stop.wait(0.005)

    def reset(self) -> None:
        """Forget who answered whom."""
        self.answered, self.by_caller = Counter(), {}

    def more(self, count: int) -> None:
        """Wait for that many answers more."""
        wanted = self.answered.total() + count
        eventually(f"{count} answers", lambda: True if self.answered.total() >= wanted else None)


@contextmanager
def load(stack: Stack, workers: int = 3) -> Iterator[Load]:
    made = Load(stack)
    threads = [threading.Thread(target=made.run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made._stop.set()
        for thread in threads:
            thread.join()
    assert made.problems == []


def reach(stack: Stack, what: str, **wanted: Any) -> Deployment:
    def there() -> Deployment | None:
        found = stack.client.rollout.get(MODEL)
        return found if all(getattr(found, name) == value for name, value in wanted.items()) else None

    try:
        return eventually(what, there, 90)
    except AssertionError:
        raise AssertionError(f"{what}:\n{stack.client.rollout.get(MODEL)}") from None


def test_a_shadow_is_judged_by_copies_and_promoted(stack: Stack) -> None:
    with load(stack) as callers:
        shadow = {"mirrorPercent": 50, "minRequests": 200, "onSuccess": "Hold"}
        apply(stack, "1.1.0", {"strategy": "Shadow", "shadow": shadow, "gates": [ERRORS]})
        callers.more(200)
        held = reach(stack, "the shadow run has ended", phase="Paused")
        assert held.strategy == "Shadow"
        assert "promote or abort" in held.waiting
        errors = next(c for c in held.comparisons if c.metric == "errorRate")
        assert errors.candidate_samples >= 200
        assert errors.lower <= 0 <= errors.upper
        assert "latencyP99Ms" in {c.metric for c in held.comparisons}
        assert set(callers.answered) == {"1.0.0"}, "nobody gets a shadow's answer"
        stack.client.rollout.act(MODEL, VERB_PROMOTE)
        reach(stack, "the shadow is stable", stable_version="1.1.0", candidate_version="", phase="Promoted")


def test_blue_green_switches_at_once_and_undo_switches_back(stack: Stack) -> None:
    before = stack.client.rollout.get(MODEL).stable_version
    with load(stack) as callers:
        blue_green = {"mirrorPercent": 50, "minRequests": 100, "keepOldSeconds": 300}
        apply(stack, "1.2.0", {"strategy": "BlueGreen", "blueGreen": blue_green, "gates": [ERRORS]})
        promoted = reach(stack, "green is stable", stable_version="1.2.0", candidate_version="")
        assert promoted.previous_version == before
        arms = {arm.version: arm for arm in promoted.arms}
        assert (arms["1.2.0"].weight, arms[before].weight) == (100, 0)
        assert arms[before].endpoints, "the old version stays ready"
        undone = stack.client.rollout.act(MODEL, VERB_UNDO)
        assert f'version: "{before}"' in undone.manifest_yaml or f"version: {before}" in undone.manifest_yaml
        reach(stack, "blue is stable again", stable_version=before, candidate_version="", previous_version="1.2.0")
        callers.reset()
        callers.more(100)
        assert set(callers.answered) <= {before, "1.2.0"}
        callers.reset()
        callers.more(100)
        assert set(callers.answered) == {before}


def test_an_ab_test_keeps_callers_on_their_version(stack: Stack) -> None:
    before = stack.client.rollout.get(MODEL).stable_version
    with load(stack) as callers:
        ab_test = {"split": 50, "minRequests": 300, "goal": "errorRate"}
        apply(stack, "1.3.0", {"strategy": "ABTest", "abTest": ab_test, "gates": [ERRORS]})
        reach(stack, "the split is in force", candidate_weight=50.0, step=0)
        held = reach(stack, "the test has ended", phase="Paused")
        assert held.candidate_weight == 50
        callers.reset()
        callers.more(600)
        assert all(len(versions) == 1 for versions in callers.by_caller.values()), "a caller stays where it is"
        # 150 callers, each on one side: within five deviations of the binomial.
        share = sum(versions == {"1.3.0"} for versions in callers.by_caller.values()) / len(callers.by_caller)
        assert 0.5 - 5 * 0.0408 < share < 0.5 + 5 * 0.0408
        errors = next(c for c in held.comparisons if c.metric == "errorRate")
        assert (errors.better, errors.confidence) == ("undecided", pytest.approx(0.95))
        with pytest.raises(MillraceError, match="weight"):
            stack.client.rollout.act(MODEL, VERB_SET_WEIGHT, 120)
        stack.client.rollout.act(MODEL, VERB_SET_WEIGHT, 0)
        reach(stack, "weight 0 is in force", candidate_weight=0.0)
        eventually("no traffic at weight 0", lambda: _nobody(callers, "1.3.0"))
        stack.client.rollout.act(MODEL, VERB_RESUME)
        reach(stack, "the split is back", candidate_weight=50.0)
        apply(stack, before, {"strategy": "Canary"})
        reach(stack, "the test is over", stable_version=before, candidate_version="", phase="Promoted")


def _nobody(callers: Load, version: str) -> bool | None:
    callers.reset()
    callers.more(60)
    return None if callers.answered[version] else True


def test_an_unmodified_triton_client_is_copied_too(stack: Stack) -> None:
    client = triton.InferenceServerClient(stack.endpoints.gateway)
    width = len(feature_names(stack.client))
    given = triton.InferInput("features", [1, width], "FP32")
    given.set_data_from_numpy(np.zeros((1, width), np.float32))
    shadow = {"mirrorPercent": 100, "minRequests": 1_000_000}
    apply(stack, "1.3.0", {"strategy": "Shadow", "shadow": shadow})
    found = reach(stack, "the shadow gets copies", candidate_version="1.3.0", phase="Progressing")
    assert [arm.mirror_percent for arm in found.arms if arm.version == "1.3.0"] == [100]

    def copied() -> bool | None:
        client.infer(MODEL, [given])
        compared = stack.client.rollout.get(MODEL).comparisons
        return True if any(c.candidate_samples >= 20 for c in compared) else None

    eventually("20 copies are counted", copied)


def test_two_versions_in_one_server_without_a_second_one(stack: Stack) -> None:
    stack.client.rollout.delete(MODEL)
    eventually("the servers of their own are gone", lambda: _gone(stack))
    shared = {"placement": "Shared", "replicas": 1}
    apply(stack, "1.0.0", {"strategy": "Canary"}, server=shared)
    stack.wait_stable("1.0.0")
    (before,) = stack.client.rollout.get(MODEL).arms
    paused = {"steps": [{"weight": 40, "minRequests": 100}, {"weight": 50, "pause": {}}], "gates": [ERRORS]}
    with load(stack) as callers:
        # Back, in the middle of it.
        apply(stack, "1.1.0", {"strategy": "Canary", **paused}, server=shared)
        reach(stack, "half of the traffic", candidate_weight=50.0, phase="Paused")
        arms = {arm.version: arm for arm in stack.client.rollout.get(MODEL).arms}
        assert arms["1.1.0"].endpoints == arms["1.0.0"].endpoints == before.endpoints
        assert (arms["1.0.0"].server_version, arms["1.1.0"].server_version) == ("1000000000000", "1000001000000")
        callers.reset()
        callers.more(300)
        assert callers.answered.keys() == {"1.0.0", "1.1.0"}
        assert _answers_by_http(stack) == {("1.0.0", "1000000000000"), ("1.1.0", "1000001000000")}
        stack.client.rollout.act(MODEL, VERB_ABORT)
        reach(stack, "stable alone again", candidate_version="", phase="RolledBack")
        eventually(
            "the candidate is out of the server", lambda: _held(before.endpoints[0]) == {"1000000000000"} or None
        )
        # Forward.
        apply(stack, "1.2.0", {"strategy": "Canary", "steps": [{"weight": 50, "minRequests": 60}]}, server=shared)
        reach(stack, "1.2.0 is stable", stable_version="1.2.0", candidate_version="", phase="Promoted")
        eventually("the old version is out of it", lambda: _held(before.endpoints[0]) == {"1000002000000"} or None)
        callers.reset()
        callers.more(100)
        assert set(callers.answered) == {"1.2.0"}
    with pytest.raises(MillraceError, match=r"spec\.server\.placement"):
        apply(stack, "1.2.0", {"strategy": "Canary"})


def _gone(stack: Stack) -> bool | None:
    try:
        stack.client.rollout.get(MODEL)
    except MillraceError:
        return True
    return None


def _answers_by_http(stack: Stack) -> set[tuple[str, str]]:
    """Who answered callers by HTTP, by the gateway's word and by the server's."""
    width = len(feature_names(stack.client))
    tensor = {"name": "features", "shape": [1, width], "datatype": "FP32", "data": [0.0] * width}
    found = set()
    for caller in range(40):
        request = urllib.request.Request(
            f"http://{stack.endpoints.gateway}/v2/models/{MODEL}/infer",
            data=json.dumps({"inputs": [tensor]}).encode(),
            headers={"x-user-id": str(caller)},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            body = json.load(response)
            assert body["model_name"] == MODEL
            found.add((response.headers["x-millrace-version"], body["model_version"]))
    return found


def _held(endpoint: str) -> set[str]:
    """Numbers of the versions inside a server."""
    index = triton.InferenceServerClient(endpoint).get_model_repository_index()
    return {model.version for model in index.models if model.state not in {"", "UNAVAILABLE"}}
