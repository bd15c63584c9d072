"""A lake, a bus and definitions to test the feature service with."""

import importlib.util
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from millrace_api.events.v1 import events_pb2
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_feature.app import build
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import FeatureSettings, OnlineStoreSettings, RedisSettings
from millrace_kit.bus import Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

KINDS = (
    "entities",
    "data_sources",
    "feature_views",
    "stream_feature_views",
    "on_demand_feature_views",
    "feature_services",
)
REPO = Path(__file__).parents[3] / "deploy/samples/flights/feature_repo/features.py"
START = datetime(2013, 1, 1, tzinfo=UTC)


def registry_of(objects: Iterable[Any]) -> bytes:
    """A serialized Feast registry of Feast objects."""
    from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView, StreamFeatureView
    from feast.data_source import DataSource
    from feast.protos.feast.core.Registry_pb2 import Registry

    registry = Registry()
    for item in objects:
        kind = next(
            name
            for cls, name in (
                (StreamFeatureView, "stream_feature_views"),
                (FeatureView, "feature_views"),
                (OnDemandFeatureView, "on_demand_feature_views"),
                (FeatureService, "feature_services"),
                (Entity, "entities"),
                (DataSource, "data_sources"),
            )
            if isinstance(item, cls)
        )
        getattr(registry, kind).append(item.to_proto())
    return registry.SerializeToString()


def load_repo(path: Path = REPO) -> tuple[ModuleType, bytes]:
    """The module of a one-file Feast repository and its registry."""
    import_feast()
    from feast import Entity, FeatureService
    from feast.base_feature_view import BaseFeatureView
    from feast.data_source import DataSource, RequestSource

    spec = importlib.util.spec_from_file_location("features_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = (Entity, FeatureService, BaseFeatureView, DataSource)
    objects = [o for o in vars(module).values() if isinstance(o, kinds) and not isinstance(o, RequestSource)]
    return module, registry_of(objects)


@pytest.fixture(scope="session")
def flights_registry() -> bytes:
    return load_repo()[1]


@pytest.fixture(scope="session")
def small_objects() -> Callable[..., list[Any]]:
    """A small set of Feast objects: windows and a newest row of contract `events`, and a transform."""
    import_feast()
    from feast import (
        Entity,
        FeatureService,
        FeatureView,
        Field,
        FileSource,
        PushSource,
        RequestSource,
        StreamFeatureView,
        ValueType,
    )
    from feast.aggregation import Aggregation
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int64, String, UnixTimestamp

    def make(windows: tuple[int, ...] = (10, 60), *, more: bool = False) -> list[Any]:
        events = PushSource(
            name="events", batch_source=FileSource(name="events_lake", path="millrace://events", timestamp_field="at")
        )
        asks = FileSource(name="asks", path="millrace://asks", timestamp_field="asked_at")
        user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
        shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)
        functions = ("count", "sum", "mean", "min", "max")

        def windowed(name: str, entities: list[Any], minutes: tuple[int, ...]) -> Any:
            chosen = [(f, w) for w in minutes for f in functions]
            keys = [Field(name=e.join_key, dtype=String if e.name == "user" else Int64) for e in entities]
            return StreamFeatureView(
                name=name,
                entities=entities,
                schema=[*keys, *[Field(name=f"amount_{f}_{w}m", dtype=Float64) for f, w in chosen]],
                source=events,
                timestamp_field="at",
                aggregations=[
                    Aggregation(
                        column="amount", function=f, time_window=timedelta(minutes=w),
                        slide_interval=timedelta(minutes=5), name=f"amount_{f}_{w}m",
                    )
                    for f, w in chosen
                ],
            )  # fmt: skip

        by_user = windowed("by_user", [user], windows)
        by_both = windowed("by_both", [user, shop], (10,))
        newest = FeatureView(
            name="newest",
            entities=[user],
            ttl=timedelta(minutes=30),
            schema=[
                Field(name="user", dtype=String),
                Field(name="amount", dtype=Int64),
                Field(name="note", dtype=String),
            ],
            source=events,
        )
        request = RequestSource(
            name="ask_fields", schema=[Field(name="limit", dtype=Float64), Field(name="asked_at", dtype=UnixTimestamp)]
        )

        @on_demand_feature_view(
            sources=[request, newest, by_user],
            mode="python",
            schema=[
                Field(name="room", dtype=Float64),
                Field(name="noted", dtype=Int64),
                Field(name="minute", dtype=Int64),
            ],
        )
        def derived(inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = zip(inputs["limit"], inputs["by_user__amount_sum_60m"], strict=True)
            return {
                "room": [a - b if a is not None and b is not None else None for a, b in rows],
                "noted": [len(note) if note is not None else None for note in inputs["newest__note"]],
                "minute": [t.minute if t is not None else None for t in inputs["asked_at"]],
            }

        views = [by_user, by_both, newest]
        features = [by_user, newest[["amount"]], by_both, derived]
        if more:
            extra = windowed("by_shop", [shop], (15,))
            views.append(extra)
            features.append(extra)
        return [events, asks, user, shop, *views, derived, FeatureService(name="main", features=features)]

    return make


@dataclass
class World:
    """The service's surroundings in one folder, and a stand-in for ingestion that lands and publishes records."""

    root: Path
    redis: RedisSettings | None = None
    files_url: str = ""
    """Where lake and training sets are; empty is `root`."""
    database_url: str = ""
    offsets: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> FeatureSettings:
        return FeatureSettings(
            state_dir=str(self.root / "state"),
            lake_url=f"{self.files_url or self.root}/lake",
            training_sets_url=f"{self.files_url or self.root}/sets",
            database_url=self.database_url,
            bus=BusSettings(path=str(self.root / "bus.sqlite")),
            online_store=OnlineStoreSettings(kind="redis", redis=self.redis) if self.redis else OnlineStoreSettings(),
            fetch_wait_s=0.02,
            drain_s=0,
            default_deadline_s=120,
            apply_wait_s=60,
        )

    def land(self, contract: str, table: pa.Table, source: str = "test") -> events_pb2.RecordsLanded:
        """Append to the lake, as ingestion does; returns the fact to publish."""
        offset = self.offsets[contract] = self.offsets.get(contract, 0) + 1
        marked = table.append_column("_source", pa.array([source] * table.num_rows, pa.string()))
        marked = marked.append_column("_offset", pa.array([offset] * table.num_rows, pa.int64()))
        write_deltalake(f"{self.settings.lake_url}/{contract}", marked, mode="append")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        from deltalake import DeltaTable

        return events_pb2.RecordsLanded(
            contract=contract,
            contract_version=1,
            arrow_ipc=sink.getvalue().to_pybytes(),
            table_version=DeltaTable(f"{self.settings.lake_url}/{contract}").version(),
            source=source,
            source_offset=offset,
            rows=table.num_rows,
        )

    async def publish(self, *facts: events_pb2.RecordsLanded) -> None:
        bus = await open_bus(self.settings.bus)
        await bus.publish([Outgoing(records_topic(f.contract), f.contract, f.SerializeToString()) for f in facts])
        await bus.close()

    @asynccontextmanager
    async def serve(
        self, clock: FakeClock | None = None, **changes: object
    ) -> AsyncIterator[feature_pb2_grpc.FeatureServiceStub]:
        """The real service on a free port, with some settings changed."""
        settings = self.settings.model_copy(update=changes)
        service = await build(settings, clock=clock or FakeClock())
        async with running(service, settings) as address, open_channel(address, timeout_s=120) as channel:
            yield feature_pb2_grpc.FeatureServiceStub(channel)


@pytest.fixture
def place() -> str:
    """What `world` keeps its state in; a module parametrizes it."""
    return "machine"


@pytest.fixture
def world(tmp_path: Path, place: str, request: pytest.FixtureRequest) -> World:
    if place == "cluster":
        redis = RedisSettings(url=request.getfixturevalue("redis_url"), read_timeout_s=5)
        return World(tmp_path, redis, request.getfixturevalue("s3_url"), request.getfixturevalue("postgres_url"))
    return World(tmp_path)


async def caught_up(stub: Any, **records: int) -> feature_pb2.GetProgressResponse:
    """Wait until every topic is read to its end and the named contracts hold that many records."""
    import asyncio

    async with asyncio.timeout(60):
        while True:
            progress = await stub.GetProgress(feature_pb2.GetProgressRequest())
            found = {c.contract: c.records for c in progress.contracts}
            behind = any(c.next_offset < c.end_offset for c in progress.contracts)
            if progress.contracts and not behind and all(found.get(k, 0) >= v for k, v in records.items()):
                return progress
            await asyncio.sleep(0.02)


@pytest.fixture
def wait_for_records() -> Callable[..., Any]:
    return caught_up


@pytest.fixture(scope="session")
def make_registry() -> Callable[[Iterable[Any]], bytes]:
    return registry_of


Serve = Callable[[], AbstractAsyncContextManager[Any]]
