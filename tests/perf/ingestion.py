"""Ingestion (checks, duplicates, bus, exactly once) beside the same Arrow batches written straight to Delta. A request is a record.

The service is its real process with its defaults; batches go through one `WriteStream`. All contestants run in turn, several rounds,
on growing tables. Processor time is that of the service's process, or of the writing process for the direct writes; latency is that
of a batch from its sending to its answer, with up to a window of them under way.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import msgspec
import numpy as np
import pyarrow as pa
import yaml
from deltalake import DeltaTable, write_deltalake
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub

from tests.perf.foreign_topic import measure_topic
from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report

ROUNDS = 5
LARGE, SMALL = (10_000, 40), (100, 200)
"""(records a batch, batches a round)"""
CARRIERS = ("AA", "B6", "DL", "EV", "MQ", "UA", "US", "WN")
# Goals: records for one second of one core, and how much of a bare append's rate is left with checks, duplicates, bus and answers.
RECORDS_PER_CORE_S, JSON_PER_CORE_S, SHARE_OF_DIRECT, SMALL_SHARE = 200_000, 100_000, 0.25, 1.0


@dataclass
class Case:
    """A contestant while it is measured."""

    name: str
    run: Callable[[Sequence[pa.Table]], list[float]]
    """Writes prepared batches; returns each one's latency in ms."""
    prepare: Callable[[pa.Table], object]
    shape: tuple[int, int]
    pid: int
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def round(self, number: int) -> None:
        """One round with records nobody has seen."""
        rows, batches = self.shape
        prepared = [self.prepare(flights(rows, f"{self.name}-{number}-{index}")) for index in range(batches)]
        cpu, started = cpu_seconds([self.pid]), time.perf_counter()
        latencies = self.run(prepared)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        self.cpu_ms.append((cpu_seconds([self.pid]) - cpu) * 1000 / (rows * batches))
        self.rates.append(rows * batches / seconds)
        self.latencies.extend(latencies)

    def result(self) -> Contestant:
        """The figures: medians over rounds, latencies over all batches."""
        ordered = sorted(self.latencies)
        return Contestant(
            self.name, median(self.rates), median(self.cpu_ms), quantile(ordered, 0.5), quantile(ordered, 0.99)
        )


def contract() -> pb.DataContract:
    """Eight columns with a check each, like the flights sample's outcomes."""
    columns = [
        pb.Column(name="flight_id", type=pb.COLUMN_TYPE_STRING),
        pb.Column(name="landed_at", type=pb.COLUMN_TYPE_TIMESTAMP),
        pb.Column(name="origin", type=pb.COLUMN_TYPE_STRING, allowed=["EWR", "JFK", "LGA"]),
        pb.Column(name="carrier", type=pb.COLUMN_TYPE_STRING, pattern="[A-Z0-9]{2}"),
        pb.Column(name="tailnum", type=pb.COLUMN_TYPE_STRING, nullable=True),
        pb.Column(name="dep_delay", type=pb.COLUMN_TYPE_DOUBLE, nullable=True, min=-120, max=3000),
        pb.Column(name="distance", type=pb.COLUMN_TYPE_INT64, min=1),
        pb.Column(name="late", type=pb.COLUMN_TYPE_BOOL),
    ]
    return pb.DataContract(
        name="outcomes",
        columns=columns,
        event_id_column="flight_id",
        event_time_column="landed_at",
        key_columns=["carrier"],
    )


def flights(rows: int, prefix: str) -> pa.Table:
    """Made-up outcomes with ids of their own."""
    chance = np.random.default_rng(abs(hash(prefix)) % 2**32)
    places = np.arange(rows)
    return pa.table(
        {
            "flight_id": [f"{prefix}-{place}" for place in places],
            "landed_at": pa.array(1_357_000_000_000_000 + places * 1_000_000, pa.timestamp("us", "UTC")),
            "origin": np.array(["EWR", "JFK", "LGA"], object)[chance.integers(0, 3, rows)],
            "carrier": np.array(CARRIERS, object)[chance.integers(0, len(CARRIERS), rows)],
            "tailnum": [f"N{number}" for number in chance.integers(100, 4000, rows)],
            "dep_delay": chance.integers(-20, 200, rows).astype(float),
            "distance": chance.integers(100, 2500, rows),
            "late": chance.random(rows) < 0.24,
        }
    )


def ipc(table: pa.Table) -> bytes:
    """The table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def json_lines(table: pa.Table) -> bytes:
    """The table as JSON lines."""
    return b"\n".join(msgspec.json.encode(row) for row in table.to_pylist())


class Stream:
    """Writes batches through one `WriteStream` a round."""

    def __init__(self, stub: IngestionServiceStub, source: str, payload: str) -> None:
        self._stub, self._source, self._payload = stub, source, payload
        self._offset = 0

    def __call__(self, prepared: Sequence[bytes]) -> list[float]:
        """Send all, wait for all."""
        sent: list[float] = []

        def requests() -> Iterator[pb.WriteStreamRequest]:
            for payload in prepared:
                self._offset += 1
                batch = pb.RecordBatch(contract="outcomes", source=self._source, offset=self._offset)
                setattr(batch, self._payload, payload)
                sent.append(time.perf_counter())
                yield pb.WriteStreamRequest(batch=batch)

        latencies = []
        for answer in self._stub.WriteStream(requests(), timeout=120):
            if answer.result.rejected or answer.result.duplicates:
                raise RuntimeError(f"{self._source}: records were refused: {answer.result}")
            latencies.append((time.perf_counter() - sent[len(latencies)]) * 1000)
        return latencies


class Direct:
    """Appends each batch to a Delta table as one commit; `merged` appends all of a round as one."""

    def __init__(self, folder: Path, *, merged: bool = False) -> None:
        self._folder, self._merged = folder, merged
        self._table: DeltaTable | None = None

    def __call__(self, prepared: Sequence[pa.Table]) -> list[float]:
        """Append all."""
        if self._table is None:
            self._table = DeltaTable.create(str(self._folder), schema=prepared[0].schema)
        latencies = []
        for table in [pa.concat_tables(prepared)] if self._merged else prepared:
            started = time.perf_counter()
            write_deltalake(self._table, table, mode="append")
            latencies.append((time.perf_counter() - started) * 1000)
        return latencies


def free_address() -> str:
    """A loopback address that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder, address = Path(name), free_address()
        config = folder / "ingestion.yaml"
        settings = {
            "listen": address,
            "state_dir": str(folder / "state"),
            "lake_url": str(folder / "lake"),
            "bus": {"path": str(folder / "bus.sqlite")},
            "telemetry": {"log_level": "WARNING"},
        }
        config.write_text(yaml.safe_dump(settings))
        command = [str(Path(sys.executable).parent / "millrace-ingestion"), "--config", str(config)]
        with subprocess.Popen(command) as server:
            try:
                measure(folder, address, server.pid)
            finally:
                server.terminate()


def measure(folder: Path, address: str, pid: int) -> None:
    """Run the rounds against the service at `address`."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(60)
        stub = IngestionServiceStub(channel)
        stub.RegisterContract(pb.RegisterContractRequest(contract=contract()), timeout=60)
        cases = [
            Case("Delta, 10k-record appends", Direct(folder / "large"), lambda t: t, LARGE, os.getpid()),
            Case("ingestion, 10k-record Arrow", Stream(stub, "arrow", "arrow_ipc"), ipc, LARGE, pid),
            Case("ingestion, 10k-record JSON", Stream(stub, "json", "json_lines"), json_lines, LARGE, pid),
            Case("Delta, 100-record appends", Direct(folder / "small"), lambda t: t, SMALL, os.getpid()),
            Case("ingestion, 100-record Arrow", Stream(stub, "small", "arrow_ipc"), ipc, SMALL, pid),
        ]
        for number in range(-1, ROUNDS):
            for case in cases:
                print(f"round {number + 1} of {ROUNDS}: {case.name}", file=sys.stderr)
                case.round(number)
                if number < 0:  # a warm-up
                    case.rates.clear(), case.cpu_ms.clear(), case.latencies.clear()
        print("single messages of a topic", file=sys.stderr)
        topic, topic_ratios = measure_topic(folder, channel, pid, flights)
    direct, arrow, json, small_direct, small = (case.result() for case in cases)
    ratios = [
        Ratio.at_least("Arrow records for a second of one core", 1000 / arrow.cpu_ms_per_request, RECORDS_PER_CORE_S),
        Ratio.at_least("JSON records for a second of one core", 1000 / json.cpu_ms_per_request, JSON_PER_CORE_S),
        Ratio.at_least(
            "Arrow records/s over direct appends", arrow.requests_per_s / direct.requests_per_s, SHARE_OF_DIRECT
        ),
        Ratio.at_least(
            "small batches: records/s over direct", small.requests_per_s / small_direct.requests_per_s, SMALL_SHARE
        ),
        *topic_ratios,
    ]
    report("ingestion", [*(case.result() for case in cases), *topic], ratios)


if __name__ == "__main__":
    main()
