"""The loop in small on one machine: records in, predictions out, a canary, drift's outcomes, the command line, the signals."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from millrace import MillraceError
from millrace.local.processes import METRICS_OFFSET
from millrace.values import to_timestamp

from tests.stack import MODEL, Stack, eventually, flights_module, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WINDOW = datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 1, 8, tzinfo=UTC)
GRPC_SERVICES = {
    "ingestion": 1, "feature": 2, "registry": 3, "training-coordinator": 4, "inference-gateway": 5, "drift-monitor": 6,
    "rollout-controller": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("run")) as running:
        running.load_definitions()
        data = flights_module()
        for contract in data.EVENT_TIMES:  # type: ignore[attr-defined]
            table = getattr(data, contract)(*WINDOW)
            assert running.ingest(contract, table, "history") == table.num_rows
        running.wait_features()
        running.register("1.0.0")
        running.deploy("1.0.0")
        running.wait_stable("1.0.0")
        yield running


def cli(stack: Stack, *arguments: str, code: int = 0) -> str:
    command = [
        str(Path(sys.executable).parent / "millrace"),
        "--port-base",
        str(stack.port_base),
        "--state-dir",
        str(stack.state),
    ]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, env={**os.environ}
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def some_flights(count: int, skip: int = 2000) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = flights_module().flights(*WINDOW).slice(skip, count).to_pylist()  # type: ignore[attr-defined]
    return rows


def test_predict_looks_features_up(stack: Stack) -> None:
    row = some_flights(1)[0]
    answer = stack.client.predictions.predict(MODEL, row, subject="one", event_time=row["sched_dep_at"])  # type: ignore[arg-type]
    assert answer.version == "1.0.0"
    assert 0.0 < answer.outputs[0] < 1.0
    assert answer.digest == stack.client.registry.version(MODEL, "1.0.0").digest
    assert len(answer.missing_features) < 40, "most features of a busy airport are known"


def test_an_unmodified_triton_client_gets_the_same_answer(stack: Stack) -> None:
    row = some_flights(1)[0]
    by_predict = stack.client.predictions.predict(MODEL, row, event_time=row["sched_dep_at"])  # type: ignore[arg-type]
    from millrace.values import to_values
    from millrace_api.feature.v1 import feature_pb2

    request = feature_pb2.GetOnlineFeaturesRequest(
        feature_service="flight_delay", rows=[feature_pb2.EntityRow(values=to_values(row))],  # type: ignore[arg-type]
        event_time=to_timestamp(row["sched_dep_at"]),  # type: ignore[arg-type]
    )  # fmt: skip
    vector = stack.client.features.online(request).vectors[0].values
    client = triton.InferenceServerClient(stack.endpoints.gateway)
    assert client.is_model_ready(MODEL)
    tensor = triton.InferInput("features", [1, len(vector)], "FP32")
    tensor.set_data_from_numpy(np.array([vector], np.float32))
    answer = client.infer(MODEL, [tensor]).as_numpy("probability")
    assert float(answer[0, 0]) == pytest.approx(by_predict.outputs[0], rel=1e-6)


def test_outcomes_join_predictions(stack: Stack) -> None:
    rows = some_flights(60)
    before = sum(f.outcomes for f in stack.client.drift.outcomes(MODEL))
    for row in rows:
        stack.client.predictions.predict(MODEL, row, subject=str(row["flight_id"]), event_time=row["sched_dep_at"])  # type: ignore[arg-type]
    joined = eventually(
        "outcomes are joined",
        lambda: ((n := sum(f.outcomes for f in stack.client.drift.outcomes(MODEL))) - before >= 50 and n) or None,
    )
    assert joined > before


def test_a_canary_gets_its_share_and_an_abort_takes_it_away(stack: Stack) -> None:
    stack.register("1.1.0", bias=0.5)
    stack.deploy("1.1.0", steps=[{"weight": 30, "minRequests": 100_000}, {"weight": 100}], gates=[])

    def moving() -> bool | None:
        return stack.client.rollout.get(MODEL).candidate_weight == 30 or None

    eventually("the canary has 30 %", moving, 90)
    versions = []
    for index, row in enumerate(some_flights(300)):
        versions.append(
            stack.client.predictions.predict(MODEL, row, subject=f"k{index}", event_time=row["sched_dep_at"]).version
        )  # type: ignore[arg-type]
    assert 0.15 < versions.count("1.1.0") / len(versions) < 0.45
    assert "30%" in cli(stack, "get", MODEL)
    cli(stack, "abort", MODEL)

    def back() -> bool | None:
        deployment = stack.client.rollout.get(MODEL)
        return (deployment.stable_version == "1.0.0" and not deployment.candidate_weight) or None

    eventually("stable has everything", back, 60)
    row = some_flights(1)[0]
    answers = {
        stack.client.predictions.predict(MODEL, row, subject=f"a{i}", event_time=row["sched_dep_at"]).version
        for i in range(40)  # type: ignore[arg-type]
    }
    assert answers == {"1.0.0"}


def test_command_line(stack: Stack) -> None:
    assert "flight-delay" in cli(stack, "models")
    assert MODEL in cli(stack, "get", "-o", "name")
    assert json.loads(cli(stack, "get", MODEL, "-o", "json"))[0]["stableVersion"] == "1.0.0"
    assert "condition" in cli(stack, "describe", MODEL)
    cli(stack, "get", "no-such-thing", code=1)
    cli(stack, "trace", "no-such-prediction", code=1)
    assert "ready" in cli(stack, "status")


def test_bad_manifest_names_the_field(stack: Stack) -> None:
    with pytest.raises(MillraceError, match="weight") as caught:
        stack.deploy("1.0.0", steps=[{"weight": 140}])
    assert caught.value.code.name == "INVALID_ARGUMENT"


@pytest.mark.parametrize("service", sorted(GRPC_SERVICES))
def test_every_service_has_metrics(stack: Stack, service: str) -> None:
    port = stack.port_base + METRICS_OFFSET + GRPC_SERVICES[service]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert "millrace_rpc_server_duration_seconds" in text
    assert "process_cpu_seconds_total" in text


def test_a_trace_crosses_grpc_and_the_bus(stack: Stack) -> None:
    """One prediction's trace has spans of the gateway, the feature service it called and, through the bus, the drift monitor."""
    row = some_flights(1)[0]
    answer = stack.client.predictions.predict(MODEL, row, subject="traced", event_time=row["sched_dep_at"])  # type: ignore[arg-type]
    found = eventually("the prediction is known", lambda: _prediction(stack, answer.prediction_id))
    trace_id = found.trace_id  # type: ignore[attr-defined]
    assert trace_id

    def services() -> set[str] | None:
        seen = set()
        for path in (stack.state / "traces").glob("*.jsonl"):
            seen |= {
                s["service"] for line in path.read_text().splitlines() if trace_id in line for s in [json.loads(line)]
            }
        return seen if {"inference-gateway", "feature"} <= seen else None

    eventually("the trace has its spans", services, 20)


def _prediction(stack: Stack, prediction_id: str) -> object | None:
    try:
        return stack.client.drift.prediction(prediction_id)
    except MillraceError:
        return None
