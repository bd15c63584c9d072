"""Three models in a pool with room for two, with the real registry, controller, Envoy and Triton: no call fails, whoever is called."""

import re
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from millrace import Client, Endpoints
from millrace.cli import main
from millrace.local.processes import METRICS_OFFSET, process_table
from millrace.local.supervisor import Supervisor
from millrace_api.registry.v1 import registry_pb2
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.stack import ROOT, eventually, free_port_base, logistic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NEEDED = ("registry", "rollout-controller", "inference-gateway", "envoy")
WIDTH = 4
BIASES = {"ant": -1.0, "bee": 0.0, "cat": 1.0}
RESIDENCE_S = 1
POOL = {"name": "small", "capacityMib": 700, "minResidence": f"{RESIDENCE_S}s"}


@dataclass
class Pool:
    """A running pool and ways to ask about it."""

    client: Client
    endpoints: Endpoints
    controller: str
    port_base: int

    def call(self, model: str) -> float:
        """One call; the seconds it took."""
        request = service_pb2.ModelInferRequest(model_name=model)
        request.inputs.add(name="features", datatype="FP32", shape=[1, WIDTH])
        request.raw_input_contents.append(np.zeros((1, WIDTH), np.float32).tobytes())
        began = time.perf_counter()
        with grpc.insecure_channel(self.endpoints.gateway) as channel:
            answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
        took = time.perf_counter() - began
        assert answer.model_name == model
        score = np.frombuffer(answer.raw_output_contents[0], np.float32)[0]
        assert score == pytest.approx(1 / (1 + np.exp(-BIASES[model])), abs=1e-5)
        return took

    def metrics(self) -> Counter[str]:
        """Sums of the pool's metrics by name, and those of models by "name model"."""
        with urllib.request.urlopen(f"http://{self.controller}/metrics", timeout=5) as page:
            text = page.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("millrace_rollout_pool_") and "le" not in sample.labels:
                    key = sample.labels.get("model") or sample.labels.get("state") or sample.labels.get("kind") or ""
                    found[f"{sample.name} {key}".strip()] += sample.value
                    if key:
                        found[sample.name] += sample.value
        return found

    def states(self) -> dict[str, str]:
        """What each model does in the pool."""
        listed = self.client.rollout.list()
        return {one.model: one.pool.versions[0].state if one.pool.versions else "" for one in listed}


def manifest(model: str, version: str = "1.0.0", **pool: object) -> str:
    document = {
        "apiVersion": "millrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": model},
        "spec": {"model": model, "version": version, "server": {"memoryMib": 300, "pool": POOL | pool}},
    }
    return yaml.safe_dump(document)


def register(client: Client, model: str, version: str = "1.0.0", bias: float | None = None) -> None:
    client.registry.create_model(registry_pb2.Model(name=model))
    tensor = registry_pb2.TensorSpec
    made = registry_pb2.ModelVersion(
        model=model,
        version=version,
        platform="onnxruntime_onnx",
        signature=registry_pb2.Signature(
            inputs=[tensor(name="features", datatype="FP32", shape=[WIDTH])],
            outputs=[tensor(name="probability", datatype="FP32", shape=[1])],
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(logistic(WIDTH, BIASES[model] if bias is None else bias))
        client.registry.register_version(made, {"model.onnx": path}, actor="test")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("run")
    port_base = free_port_base()
    table = [one for one in process_table(folder, port_base, ROOT / "requirements.lock") if one.name in NEEDED]
    supervisor = Supervisor(table, folder)
    supervisor.start()
    endpoints = Endpoints.local(port_base)
    port = int(endpoints.rollout.rpartition(":")[2]) + METRICS_OFFSET
    try:
        with Client(endpoints) as client:
            made = Pool(client, endpoints, f"127.0.0.1:{port}", port_base)
            for model in BIASES:
                register(client, model)
                client.rollout.apply(manifest(model))
            for model in BIASES:
                eventually(f"{model} serves", lambda model=model: client.rollout.get(model).ready or None)
            yield made
    finally:
        supervisor.stop()


def test_calls_in_turn_all_succeed_and_each_costs_one_load(pool: Pool) -> None:
    # Called in turn, the one that is needed next is always the one that was just unloaded: no order is worse for the pool.
    states = pool.states()
    assert sorted(states.values()) == ["Asleep", "Resident", "Resident"]
    first = next(model for model, state in states.items() if state == "Asleep")
    order = sorted(BIASES, key=lambda model: (model != first, model))[:2]
    before = pool.metrics()
    took = [pool.call(model) for model in order]
    moved = pool.metrics() - before
    loads, evictions = moved["millrace_rollout_pool_loads_total"], moved["millrace_rollout_pool_evictions_total"]
    assert 1 <= loads <= len(order)
    assert evictions == loads, "as many went as came"
    # Those that were there answered at once.
    assert sum(each > 0.5 for each in took) == loads
    load_s = moved["millrace_rollout_pool_load_seconds_sum"] / loads
    print(
        f"first call after an eviction {statistics.median(t for t in took if t > 0.5):.2f} s, the bare load {load_s:.2f} s"
    )
    assert pool.metrics()["millrace_rollout_pool_models Resident"] == 2


def test_callers_of_all_models_at_once_are_all_answered(pool: Pool) -> None:
    before, began = pool.metrics(), time.monotonic()
    with ThreadPoolExecutor(len(BIASES)) as threads:
        calls = list(threads.map(lambda model: [pool.call(model) for _ in range(4)], BIASES))
    assert sum(len(each) for each in calls) == 12
    moved, seconds = pool.metrics() - before, time.monotonic() - began
    # Room for two, each held for its residence: no more loads than that leaves time for, and one for each slot.
    assert moved["millrace_rollout_pool_loads_total"] <= 2 * (seconds / RESIDENCE_S + 1)
    assert moved["millrace_rollout_pool_loads_total"] >= 1
    said = CliRunner().invoke(main, ["--port-base", str(pool.port_base), "describe", "bee"])
    assert re.search(
        r"^pool       small +\d resident, \d waiting, \d00 of 700 MiB set aside$", said.output, re.MULTILINE
    )
    assert re.search(r"^pool       1\.0\.0 +(Resident|Asleep|Leaving), 300 MiB$", said.output, re.MULTILINE)
