"""A whole local run for tests: every service as its own process on free ports, with a small real model in front."""

import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pyarrow as pa
import yaml
from millrace import Client, Endpoints
from millrace.contracts import load_contract
from millrace.feast_repo import registry_from_repo
from millrace.local.processes import process_table
from millrace.local.supervisor import Supervisor
from millrace_api.registry.v1 import registry_pb2
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
FLIGHTS = ROOT / "deploy" / "samples" / "flights"
MODEL = "flight-delay"
FEATURE_SERVICE = "flight_delay"
PORT_SPAN = 200
START = datetime(2013, 1, 1, tzinfo=UTC)

T = TypeVar("T")


def eventually(what: str, ask: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """Ask until there is an answer; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (answer := ask()) is None:
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.05)
    return answer


def free_port_base() -> int:
    """A base whose ports (`base` to `base + 199`) are free now."""
    for base in range(21000, 60000, PORT_SPAN):
        offsets = [*range(10), 80, *range(100, 110), 180]
        try:
            for offset in offsets:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


@dataclass
class Stack:
    """A running local Millrace."""

    supervisor: Supervisor
    client: Client
    endpoints: Endpoints
    state: Path
    port_base: int

    def flights(self) -> "object":
        """The sample's data module."""
        return flights_module()

    def load_definitions(self) -> None:
        """Contracts and feature definitions of the flights sample."""
        for path in sorted((FLIGHTS / "contracts").glob("*.yaml")):
            self.client.ingestion.register_contract(load_contract(path))
        project, registry = registry_from_repo(FLIGHTS / "feature_repo")
        self.client.features.apply(project, registry)

    def ingest(self, contract: str, table: pa.Table, source: str, batch_rows: int = 2000) -> int:
        """Write a table; returns how many records landed."""
        answers = self.client.ingestion.write_table(contract, table, source=source, batch_rows=batch_rows)
        return sum(answer.accepted for answer in answers)

    def wait_features(self) -> None:
        """Wait until the online store has followed every record on the bus."""

        def caught_up() -> bool | None:
            contracts = self.client.features.progress().contracts
            followed = {c.contract for c in contracts if c.next_offset >= c.end_offset}
            return followed >= set(flights_module().EVENT_TIMES) or None  # type: ignore[attr-defined]

        eventually("feature worker catches up", caught_up)

    def register(self, version: str, bias: float = 0.0) -> registry_pb2.ModelVersion:
        """Register a small real logistic model over the sample's features."""
        names = feature_names(self.client)
        model = registry_pb2.Model(
            name=MODEL,
            feature_service=FEATURE_SERVICE,
            outcome=registry_pb2.OutcomeSpec(
                contract="outcomes", subject_column="flight_id", label_column="late", threshold=0.5
            ),
        )
        self.client.registry.create_model(model)
        made = registry_pb2.ModelVersion(
            model=MODEL, version=version, platform="onnxruntime_onnx", signature=signature(names)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(logistic(len(names), bias))
            return self.client.registry.register_version(made, {"model.onnx": path}, actor="test")

    def deploy(self, version: str, **rollout: object) -> None:
        """Apply the sample's manifest for `version`, with parts of its rollout replaced."""
        manifest = yaml.safe_load((FLIGHTS / "manifests" / "1.0.0.yaml").read_text())
        manifest["spec"]["version"] = version
        manifest["spec"]["rollout"].update(rollout)
        self.client.rollout.apply(yaml.safe_dump(manifest))

    def wait_stable(self, version: str, timeout_s: float = 90.0) -> None:
        """Wait until `version` has all traffic."""

        def stable() -> bool | None:
            deployment = self.client.rollout.get(MODEL)
            resting = deployment.stable_version == version and not deployment.candidate_version and deployment.ready
            return resting or None

        eventually(f"{version} is stable", stable, timeout_s)


def flights_module() -> object:
    """`deploy/samples/flights/flights.py`, imported by its path."""
    if str(FLIGHTS) not in sys.path:
        sys.path.insert(0, str(FLIGHTS))
    import flights

    return flights


def feature_names(client: Client) -> list[str]:
    """Features of the sample's service in vector order."""
    services = client.features.definitions().feature_services
    return list(next(service for service in services if service.name == FEATURE_SERVICE).features)


def signature(names: list[str]) -> registry_pb2.Signature:
    """One FP32 row of features in, one probability out."""
    return registry_pb2.Signature(
        inputs=[registry_pb2.TensorSpec(name="features", datatype="FP32", shape=[len(names)])],
        outputs=[registry_pb2.TensorSpec(name="probability", datatype="FP32", shape=[1])],
        feature_names=names,
    )


def logistic(width: int, bias: float) -> bytes:
    """An ONNX model: sigmoid of the mean of the known features over 1000, plus `bias`."""
    weights = numpy_helper.from_array(np.full((width, 1), 1e-3 / width, np.float32), "w")
    offset = numpy_helper.from_array(np.array([bias], np.float32), "b")
    zero = numpy_helper.from_array(np.zeros((1,), np.float32), "zero")
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "features"], ["known"]),
        helper.make_node("MatMul", ["known", "w"], ["score"]),
        helper.make_node("Add", ["score", "b"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "logistic",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [weights, offset, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """Start everything below `folder`; stopped when the context closes."""
    port_base = free_port_base()
    table = process_table(folder, port_base, ROOT / "requirements.lock")
    supervisor = Supervisor(table, folder)
    supervisor.start()
    endpoints = Endpoints.local(port_base)
    try:
        with Client(endpoints) as client:
            yield Stack(supervisor, client, endpoints, folder, port_base)
    finally:
        supervisor.stop()
