"""A running service with a small contract, and ways to look at what it landed."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pyarrow as pa
from deltalake import DeltaTable
from millrace_api.events.v1.events_pb2 import RecordsLanded
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_ingestion.app import build
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.bus import Message, records_topic
from millrace_kit.bus.embedded import EmbeddedBus
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

PLACES: dict[Path, dict[str, str]] = {}
"""Settings of tests that keep their lake or database elsewhere than in their folder; see the fixture `place`."""

SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("at", pa.timestamp("us", "UTC")),
        ("carrier", pa.string()),
        ("delay", pa.float64()),
        ("seats", pa.int64()),
    ]
)


def contract(name: str = "flights", **changes: Any) -> pb.DataContract:
    """The tests' contract; `changes` replace columns by name (None removes, a dict changes fields)."""
    columns: dict[str, dict[str, Any]] = {
        "event_id": {"type": pb.COLUMN_TYPE_STRING},
        "at": {"type": pb.COLUMN_TYPE_TIMESTAMP},
        "carrier": {"type": pb.COLUMN_TYPE_STRING, "pattern": "[A-Z0-9]{2}"},
        "delay": {"type": pb.COLUMN_TYPE_DOUBLE, "nullable": True, "min": -100, "max": 3000},
        "seats": {"type": pb.COLUMN_TYPE_INT64, "nullable": True, "min": 1},
    }
    for column, change in changes.items():
        if change is None:
            columns.pop(column, None)
        else:
            columns[column] = {**columns.get(column, {}), **change}
    return pb.DataContract(
        name=name,
        columns=[pb.Column(name=column, **fields) for column, fields in columns.items()],
        event_id_column="event_id",
        event_time_column="at",
        key_columns=["carrier"],
    )


def records(first: int, count: int) -> pa.Table:
    """Good records with ids `e<first>` and on."""
    places = range(first, first + count)
    return pa.table(
        {
            "event_id": [f"e{i}" for i in places],
            "at": pa.array([i * 1_000_000 for i in places], pa.timestamp("us", "UTC")),
            "carrier": ["UA"] * count,
            "delay": [float(i % 50) for i in places],
            "seats": [i % 300 + 1 for i in places],
        },
        schema=SCHEMA,
    )


def ipc(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(payload: bytes) -> pa.Table:
    return pa.ipc.open_stream(payload).read_all()


def lines(*rows: dict[str, Any] | str) -> bytes:
    return b"\n".join(row.encode() if isinstance(row, str) else msgspec.json.encode(row) for row in rows)


def row(event_id: str, **values: Any) -> dict[str, Any]:
    return {"event_id": event_id, "at": "2013-01-01T00:00:00Z", "carrier": "UA", "delay": 1.5, "seats": 7, **values}


def batch(offset: int, payload: pa.Table | bytes, source: str = "s", name: str = "flights") -> pb.RecordBatch:
    given = {"json_lines": payload} if isinstance(payload, bytes) else {"arrow_ipc": ipc(payload)}
    return pb.RecordBatch(contract=name, source=source, offset=offset, **given)


@dataclass
class Client:
    """A connected test client and the folder of the service it talks to."""

    stub: IngestionServiceStub
    folder: Path
    settings: IngestionSettings
    address: str = ""
    closers: list[Callable[[], Any]] = field(default_factory=list)

    async def write(self, offset: int, payload: pa.Table | bytes, source: str = "s", name: str = "flights"):
        return await self.stub.Write(pb.WriteRequest(batch=batch(offset, payload, source, name)))

    async def register(self, message: pb.DataContract | None = None) -> pb.DataContract:
        request = pb.RegisterContractRequest(contract=message or contract())
        return (await self.stub.RegisterContract(request)).contract

    async def counts(self, name: str = "flights") -> dict[str, int]:
        answer = await self.stub.CountDeadLetters(pb.CountDeadLettersRequest(contract=name))
        return {count.reason: count.count for count in answer.counts}

    def lake(self, name: str = "flights") -> pa.Table:
        return lake(self.folder, name)

    async def messages(self, name: str = "flights") -> Sequence[Message]:
        return await bus_messages(self.folder, name)


def lake(folder: Path, name: str = "flights") -> pa.Table:
    return DeltaTable(f"{settings_for(folder).lake()}/{name}").to_pyarrow_table()


async def bus_messages(folder: Path, name: str = "flights") -> list[Message]:
    bus = await EmbeddedBus.open(BusSettings(path=str(folder / "bus.sqlite")))
    subscription = await bus.subscribe([records_topic(name)], group="test", at={})
    found: list[Message] = []
    while got := await subscription.fetch(timeout_s=0):
        found.extend(got)
    await subscription.close()
    await bus.close()
    return found


def landed(message: Message) -> RecordsLanded:
    return RecordsLanded.FromString(message.value)


def settings_for(folder: Path, **changes: Any) -> IngestionSettings:
    given: dict[str, Any] = {
        "state_dir": str(folder / "state"),
        "lake_url": str(folder / "lake"),
        "bus": BusSettings(path=str(folder / "bus.sqlite")),
        "drain_s": 2.0,
    }
    return IngestionSettings(**{**given, **PLACES.get(folder, {}), **changes})


@asynccontextmanager
async def serving(folder: Path, *, clock: Clock | None = None, **changes: Any) -> AsyncIterator[Client]:
    settings = settings_for(folder, **changes)
    async with (
        running(await build(settings, clock=clock), settings) as address,
        open_channel(address, timeout_s=30) as channel,
    ):
        yield Client(IngestionServiceStub(channel), folder, settings, address)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
