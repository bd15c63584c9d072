"""A drift monitor on loopback with a real bus and a registry that answers what a test tells it to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from millrace_api.common.v1 import common_pb2
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.events.v1 import events_pb2
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_drift_monitor.app import build
from millrace_drift_monitor.settings import DriftSettings, Retention
from millrace_kit.bus import PREDICTIONS, Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.content import ContentStore
from millrace_kit.errors import NotFoundError, UnavailableError
from millrace_kit.server import Service, running
from millrace_kit.settings import BusSettings, ServiceSettings

MODEL, VERSION = "flight-delay", "1.0.0"
DAY = timedelta(days=1)
JULY = datetime(2013, 7, 1, tzinfo=UTC)
# Predictions are made from here on: a round minute of the recent past, which retention keeps.
MORNING = (datetime.now(tz=UTC) - timedelta(hours=1)).replace(second=0, microsecond=0)
FEATURES = ("delay", "wind", "hour")


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Knows one model; `is_down` makes it fail as an absent registry does."""

    def __init__(self) -> None:
        self.is_down = False
        self.calls = 0
        self.outcome = registry_pb2.OutcomeSpec(
            contract="outcomes", subject_column="flight_id", label_column="late", threshold=0.5
        )

    async def GetModel(self, request, context):
        self.calls += 1
        if self.is_down:
            raise UnavailableError("DOWN", "down")
        if request.name != MODEL:
            raise NotFoundError("model", request.name)
        return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=MODEL, outcome=self.outcome))

    async def GetVersion(self, request, context):
        self.calls += 1
        if self.is_down:
            raise UnavailableError("DOWN", "down")
        if request.model != MODEL:
            raise NotFoundError("version", request.version)
        version = registry_pb2.ModelVersion(
            model=MODEL,
            version=request.version,
            digest="d" * 64,
            signature=registry_pb2.Signature(feature_names=FEATURES),
        )
        return registry_pb2.GetVersionResponse(version=version)


@dataclass
class World:
    """Everything a test talks to."""

    folder: Path
    registry: Registry
    registry_address: str
    settings: DriftSettings
    bus: object
    stack: AsyncExitStack
    offsets: dict[str, int] = field(default_factory=dict)

    @asynccontextmanager
    async def monitor(self, **changes) -> AsyncIterator[drift_pb2_grpc.DriftServiceStub]:
        settings = DriftSettings.model_validate({**self.settings.model_dump(), **changes}, strict=False)
        async with running(await build(settings), settings) as address, open_channel(address) as channel:
            yield drift_pb2_grpc.DriftServiceStub(channel)

    def next_offset(self, source: str) -> int:
        self.offsets[source] = self.offsets.get(source, 0) + 1
        return self.offsets[source]

    async def predict(self, predictions: Sequence[events_pb2.Prediction], offset: int | None = None) -> None:
        made = events_pb2.PredictionsMade(
            gateway_id="g", journal_offset=offset or self.next_offset("g"), predictions=predictions
        )
        await self.bus.publish([Outgoing(PREDICTIONS, MODEL, made.SerializeToString())])

    async def land(self, labels: dict[str, bool], offset: int | None = None, contract: str = "outcomes") -> None:
        table = pa.table({"flight_id": [*labels], "late": [*labels.values()]})
        await self.land_table(table, offset, contract)

    async def land_table(self, table: pa.Table, offset: int | None = None, contract: str = "outcomes") -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        landed = events_pb2.RecordsLanded(
            contract=contract,
            arrow_ipc=sink.getvalue().to_pybytes(),
            source="s",
            source_offset=offset or self.next_offset("s"),
        )
        await self.bus.publish([Outgoing(records_topic(contract), "k", landed.SerializeToString())])

    def training_set(self, rows: int = 20_000, days: int = 40, seed: int = 1) -> drift_pb2.SetReferenceRequest:
        rng = np.random.default_rng(seed)
        x = draw(rng, rows)
        times = [JULY - timedelta(days=days) + timedelta(seconds=86_400 * days * i / rows) for i in range(rows)]
        columns = {name: x[:, i] for i, name in enumerate(FEATURES)}
        label = rng.random(rows) < 0.25
        table = pa.table({"event_time": pa.array(times, pa.timestamp("us", tz="UTC")), **columns, "late": label})
        path = self.folder / f"set{seed}.parquet"
        pq.write_table(table, path)
        store = ContentStore((self.folder / "sets").as_uri())
        digest = store.put_file(path)
        return drift_pb2.SetReferenceRequest(
            model=MODEL,
            version=VERSION,
            training_set_digest="a" * 64,
            data=common_pb2.Artifact(path="training.parquet", sha256=digest, size_bytes=path.stat().st_size),
            store_url=store.url,
            feature_names=FEATURES,
            label_column="late",
            reference_predictions=rng.beta(2, 6, 4000),
            reference_correct=rng.random(4000) < 0.8,
            reference_accuracy=0.8,
        )


def draw(rng: np.random.Generator, rows: int, *, shift: float = 0.0) -> np.ndarray:
    """Rows of the reference's own distribution; `shift` moves the first feature, in standard deviations."""
    x = np.column_stack([rng.normal(shift, 1, rows), rng.gamma(2, 2, rows), rng.integers(5, 24, rows).astype(float)])
    x[rng.random(rows) < 0.02, 1] = np.nan
    return x


def predictions(
    x: np.ndarray,
    start: datetime,
    *,
    version: str = VERSION,
    prefix: str = "p",
    scores: np.ndarray | None = None,
    span: timedelta = DAY,
) -> list[events_pb2.Prediction]:
    """One prediction a row, spread over `span` from `start`; subject `<prefix>-<i>`."""
    made = []
    for i, row in enumerate(x):
        p = events_pb2.Prediction(
            prediction_id=f"{prefix}-{version}-{i}",
            model=MODEL,
            version=version,
            digest="d" * 64,
            subject=f"{prefix}-{i}",
            features=row.tolist(),
            outputs=[0.2 if scores is None else float(scores[i])],
            definitions_hash="h" * 64,
            trace_id="t" * 32,
            path="predict",
        )
        p.event_time.FromDatetime(start + span * (i / len(x)))
        p.predicted_at.FromDatetime(MORNING + timedelta(milliseconds=7 * i))
        made.append(p)
    return made


async def until(question: Callable, deadline_s: float = 20.0):
    """The first true answer of the async `question`."""
    async with asyncio.timeout(deadline_s):
        while True:
            if answer := await question():
                return answer
            await asyncio.sleep(0.02)


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite, or PostgreSQL where a test asks for it by `on_both`."""
    if getattr(request, "param", "sqlite") == "postgres":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path / 'drift.sqlite'}"


@pytest.fixture
async def world(tmp_path: Path, database: str) -> AsyncIterator[World]:
    registry = Registry()
    service = Service(
        "registry", [lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)], []
    )
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(running(service, ServiceSettings(drain_s=0)))
        bus_settings = BusSettings(path=str(tmp_path / "bus.sqlite"))
        settings = DriftSettings(
            bus=bus_settings,
            database_url=database,
            registry_address=address,
            registry_retry_s=0.05,
            lateness_s=3600,
            drain_s=1,
            retention=Retention(interval_s=0.2),
        )
        bus = await open_bus(bus_settings)
        stack.push_async_callback(bus.close)
        yield World(tmp_path, registry, address, settings, bus, stack)


@pytest.fixture
def helpers():
    """The functions above, for test modules (which cannot import a conftest)."""

    class Helpers:
        draw = staticmethod(draw)
        predictions = staticmethod(predictions)
        until = staticmethod(until)
        model, version, july, day, features, morning = MODEL, VERSION, JULY, DAY, FEATURES, MORNING

    return Helpers


@pytest.fixture
async def stub(world: World) -> AsyncIterator[drift_pb2_grpc.DriftServiceStub]:
    async with world.monitor() as stub:
        yield stub
