"""kill -9 of every process in turn, under writes and predictions: nothing acknowledged is lost, nothing is doubled.

The client's side of the promise: no error but UNAVAILABLE, and that only from a call whose own server (or one it needs) was down.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import deltalake
import grpc
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from millrace import Client, MillraceError
from millrace.areas.data import arrow_ipc
from millrace_api.events.v1.events_pb2 import PredictionsMade
from millrace_api.ingestion.v1.ingestion_pb2 import RecordBatch
from millrace_kit.bus import PREDICTIONS
from millrace_kit.bus.embedded import EmbeddedBus
from millrace_kit.settings import BusSettings

from tests.stack import MODEL, Stack, eventually, flights_module, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BATCH_ROWS = 10
# Time between two batches: the rows must last for all kills, however long a process takes to come back.
PACE_S = 0.03
# Work that must be done between two kills, so that each kill meets a busy system.
BATCHES_BETWEEN = 4
PREDICTIONS_BETWEEN = 30
RETRY_S = 0.05
PREDICT_PATH = {"inference-gateway", "envoy", "feature"}


class Writer(threading.Thread):
    """Writes batches for ever; each is sent again until it is acknowledged."""

    def __init__(self, stack: Stack, table: pa.Table) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.acknowledged: list[str] = []
        self.batches = 0
        self.errors: Counter[str] = Counter()
        self._endpoints = stack.endpoints
        self._table = table

    def run(self) -> None:
        with Client(self._endpoints) as client:
            for start in range(0, self._table.num_rows, BATCH_ROWS):
                rows = self._table.slice(start, BATCH_ROWS)
                offset = start // BATCH_ROWS + 1
                batch = RecordBatch(contract="flights", source="chaos", offset=offset, arrow_ipc=arrow_ipc(rows))
                while not self.stop.is_set():
                    try:
                        client.ingestion.write(batch)
                    except MillraceError as error:
                        self.errors[error.code.name] += 1
                        self.stop.wait(RETRY_S)
                        continue
                    self.acknowledged.extend(rows["flight_id"].to_pylist())
                    self.batches += 1
                    self.stop.wait(PACE_S)
                    break
                if self.stop.is_set():
                    return


class Predictor(threading.Thread):
    """Asks for predictions for ever and notes every answer."""

    def __init__(self, stack: Stack, rows: list[dict[str, object]]) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.answered: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.down = ""
        self._endpoints = stack.endpoints
        self._rows = rows

    def run(self) -> None:
        with Client(self._endpoints) as client:
            index = 0
            while not self.stop.is_set():
                row = self._rows[index % len(self._rows)]
                index += 1
                try:
                    answer = client.predictions.predict(MODEL, row, subject=f"s{index}", event_time=row["sched_dep_at"])  # type: ignore[arg-type]
                except MillraceError as error:
                    self.errors.append((self.down, f"{error.code.name} {error.reason} {error.message}"))
                    self.stop.wait(RETRY_S)
                    continue
                self.answered.append(answer.prediction_id)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(tmp_path / "run") as running:
        yield running


def triton_pids(stack: Stack) -> list[int]:
    controller = stack.supervisor.pid("rollout-controller")
    marker = str(stack.state)
    found = [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "name", "cmdline"])
        if "tritonserver" in (process.info["name"] or "")
        and any(marker in part for part in process.info["cmdline"] or ())
    ]
    assert controller not in found
    return found


def test_kill_each_in_turn(stack: Stack) -> None:
    data = flights_module()
    window = datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 1, 20, tzinfo=UTC)
    stack.load_definitions()
    for contract in ("weather", "departures", "outcomes"):
        stack.ingest(contract, getattr(data, contract)(*window), "chaos-history")
    stack.wait_features()
    stack.register("1.0.0")
    stack.deploy("1.0.0")
    stack.wait_stable("1.0.0")
    table = data.flights(window[0], datetime(2013, 7, 1, tzinfo=UTC))  # type: ignore[attr-defined]
    writer = Writer(stack, table)
    predictor = Predictor(stack, table.slice(0, 500).to_pylist())
    writer.start()
    predictor.start()

    def progress(what: str) -> None:
        batches, answers = writer.batches + BATCHES_BETWEEN, len(predictor.answered) + PREDICTIONS_BETWEEN
        eventually(
            f"work goes on {what}",
            lambda: (
                (writer.batches >= batches and len(predictor.answered) >= answers)
                or not (writer.is_alive() and predictor.is_alive())
                or None
            ),
            90,
        )
        assert writer.is_alive(), "the writer ran out of rows"

    progress("before the first kill")
    for process in stack.supervisor._table:
        predictor.down = process.name
        old = stack.supervisor.kill(process.name)
        stack.supervisor.wait_restarted(process.name, old)
        progress(f"after {process.name} came back")
    predictor.down = "tritonserver"
    before = set(triton_pids(stack))
    assert len(before) == 2
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    progress("after a model server was killed")
    eventually("the model server is replaced", lambda: len(set(triton_pids(stack)) - {victim}) >= 2 or None, 60)

    for thread in (writer, predictor):
        thread.stop.set()
        thread.join(30)
    check_clients(writer, predictor)
    check_lake(stack, writer)
    check_prediction_log(stack, predictor)


def check_clients(writer: Writer, predictor: Predictor) -> None:
    assert set(writer.errors) <= {grpc.StatusCode.UNAVAILABLE.name}, writer.errors
    elsewhere = [error for error in predictor.errors if error[0] not in PREDICT_PATH]
    assert not elsewhere, f"a prediction failed although what it needs was up: {elsewhere[:5]}"
    other = [error for error in predictor.errors if not error[1].startswith("UNAVAILABLE")]
    assert not other, other[:5]


def check_lake(stack: Stack, writer: Writer) -> None:
    url = stack.client.ingestion.table("flights").url
    landed = deltalake.DeltaTable(url).to_pyarrow_table(columns=["flight_id"])["flight_id"]
    counts = pc.value_counts(landed)
    doubled = [row["values"].as_py() for row in counts if row["counts"].as_py() > 1]
    assert not doubled, f"{len(doubled)} records are in the lake twice"
    lost = set(writer.acknowledged) - set(landed.to_pylist())
    assert not lost, f"{len(lost)} acknowledged records are not in the lake"
    assert len(writer.acknowledged) >= 10 * BATCHES_BETWEEN * BATCH_ROWS


def check_prediction_log(stack: Stack, predictor: Predictor) -> None:
    answered = set(predictor.answered)
    assert len(answered) == len(predictor.answered)

    async def logged() -> set[str]:
        bus = await EmbeddedBus.open(BusSettings(path=str(stack.state / "bus.sqlite")))
        subscription = await bus.subscribe([PREDICTIONS], group="test", at={})
        found: set[str] = set()
        while messages := await subscription.fetch(timeout_s=0.2):
            for message in messages:
                found.update(p.prediction_id for p in PredictionsMade.FromString(message.value).predictions)
        await subscription.close()
        await bus.close()
        return found

    def complete() -> bool | None:
        import asyncio

        missing = answered - asyncio.run(logged())
        return len(missing) <= stack.client.gateway.figures().dropped or None

    eventually("every answered prediction is in the log or counted as dropped", complete, 30)
