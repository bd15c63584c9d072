"""Training sets over a lake that is compacted and vacuumed: real ingestion, real feature service, the same bytes again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.ingestion.v1 import ingestion_pb2 as records
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_feature.app import build as build_feature
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import FeatureSettings, SetPinSettings
from millrace_ingestion.app import build as build_ingestion
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.pins import PinStore
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.client import open_channel
from millrace_kit.clock import SystemClock
from millrace_kit.content import ContentStore
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_kit.settings import BusSettings
from millrace_kit.sql import open_engine
from parts.server import free_port

START = datetime(2026, 1, 1, tzinfo=UTC)


def contract(name: str, **columns: Any) -> records.DataContract:
    common = {"event_id": records.COLUMN_TYPE_STRING, "at": records.COLUMN_TYPE_TIMESTAMP}
    kinds = [records.Column(name=column, type=kind) for column, kind in {**common, **columns}.items()]
    return records.DataContract(
        name=name, columns=kinds, event_id_column="event_id", event_time_column="at", key_columns=["event_id"]
    )


CONTRACTS = (
    contract("events", user=records.COLUMN_TYPE_STRING, amount=records.COLUMN_TYPE_INT64),
    contract("labels", late=records.COLUMN_TYPE_DOUBLE),
)


def batch(name: str, offset: int) -> records.RecordBatch:
    """Ten records with ids of their own; the labels are of the events with the same ids."""
    ids = [f"e{offset * 10 + i}" for i in range(10)]
    at = pa.array([START + timedelta(minutes=offset * 10 + i) for i in range(10)], pa.timestamp("us", "UTC"))
    table = pa.table({"event_id": [f"l{i}" for i in ids] if name == "labels" else ids, "at": at})
    if name == "events":
        table = table.append_column("user", pa.array([f"u{i % 3}" for i in range(10)]))
        table = table.append_column("amount", pa.array([offset * i for i in range(10)]))
    else:
        table = pa.table({"event_id": ids, "at": at, "late": [float(i % 2) for i in range(10)]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return records.RecordBatch(contract=name, source="s", offset=offset, arrow_ipc=sink.getvalue().to_pybytes())


def registry() -> bytes:
    import_feast()
    from feast import Entity, FeatureService, Field, FileSource, PushSource, StreamFeatureView, ValueType
    from feast.aggregation import Aggregation
    from feast.protos.feast.core.Registry_pb2 import Registry
    from feast.types import Float64, String

    def source(name: str) -> Any:
        return PushSource(name=name, batch_source=FileSource(name=f"{name}_lake", path=name, timestamp_field="at"))

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    view = StreamFeatureView(
        name="by_user", entities=[user], source=source("events"), timestamp_field="at",
        schema=[Field(name="user", dtype=String), Field(name="total", dtype=Float64)],
        aggregations=[Aggregation(column="amount", function="sum", name="total", time_window=timedelta(hours=1), slide_interval=timedelta(minutes=5))],
    )  # fmt: skip
    found = Registry(entities=[user.to_proto()], stream_feature_views=[view.to_proto()])
    found.data_sources.extend([source(name).to_proto() for name in ("events", "labels", "others")])
    found.feature_services.append(FeatureService(name="main", features=[view]).to_proto())
    return found.SerializeToString()


WANTED = pb.BuildTrainingSetRequest(
    feature_service="main", entity_contract="events", label_contract="labels", join_column="event_id", label_column="late"
)  # fmt: skip


class Place:
    """Ingestion and the feature service over one lake, each at an address of its own."""

    def __init__(self, folder: Path) -> None:
        self.ingestion_address = f"127.0.0.1:{free_port()}"
        bus = BusSettings(path=str(folder / "bus.sqlite"))
        lake_url = str(folder / "lake")
        self.ingestion = IngestionSettings(
            listen=self.ingestion_address, state_dir=str(folder / "ingestion"), lake_url=lake_url, bus=bus, drain_s=0
        )
        self.feature = FeatureSettings(
            state_dir=str(folder / "feature"), lake_url=lake_url, training_sets_url=str(folder / "sets"), bus=bus,
            drain_s=0, apply_wait_s=60, default_deadline_s=120,
            set_pins=SetPinSettings(ingestion_address=self.ingestion_address, retry_s=0),
        )  # fmt: skip
        self.unpinned = self.feature.model_copy(update={"set_pins": SetPinSettings()})
        self.offset = 0

    @asynccontextmanager
    async def ingesting(self) -> AsyncIterator[IngestionServiceStub]:
        service = await build_ingestion(self.ingestion)
        async with running(service, self.ingestion) as address, open_channel(address, timeout_s=60) as channel:
            stub = IngestionServiceStub(channel)
            for item in CONTRACTS:
                await stub.RegisterContract(records.RegisterContractRequest(contract=item), wait_for_ready=True)
            yield stub

    @asynccontextmanager
    async def serving(self, settings: FeatureSettings | None = None) -> AsyncIterator[FeatureServiceStub]:
        settings = settings or self.feature
        service = await build_feature(settings)
        async with running(service, settings) as address, open_channel(address, timeout_s=120) as channel:
            yield FeatureServiceStub(channel)

    async def write(self, stub: IngestionServiceStub, batches: int) -> None:
        for _ in range(batches):
            self.offset += 1
            for item in CONTRACTS:
                await stub.Write(records.WriteRequest(batch=batch(item.name, self.offset)))

    def vacuum(self) -> int:
        """A round of maintenance over the lake that keeps nothing but the newest and the pinned; how many files it deleted."""
        engine = open_engine(self.ingestion.database())
        pins, deleted = PinStore(engine, SystemClock()), 0
        for item in CONTRACTS:
            table = LakeTable(f"{self.ingestion.lake()}/{item.name}", {}, compact_target_bytes=1 << 20)
            table.open(contract_from(item, "contract"))
            table.maintain()
            deleted += table.vacuum(0, sorted({pin.version for pin in pins.pins(item.name)}))
        engine.dispose()
        return deleted


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def owners(stub: IngestionServiceStub, name: str = "events") -> list[str]:
    listed = await stub.ListTableVersions(records.ListTableVersionsRequest(contract=name))
    return sorted(f"{pin.owner}@{pin.version}" for version in listed.versions for pin in version.pins)


async def made(stub: FeatureServiceStub, request: pb.BuildTrainingSetRequest = WANTED) -> pb.TrainingSet:
    return (
        await stub.BuildTrainingSet(pb.BuildTrainingSetRequest.FromString(request.SerializeToString()))
    ).training_set


async def test_a_set_is_built_again_byte_for_byte_after_compaction_and_vacuum(place: Place) -> None:
    async with place.ingesting() as ingestion:
        await place.write(ingestion, 3)
        async with place.serving() as feature:
            await feature.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=registry()))
            first = await made(feature)
            assert first.rows == 30
            versions = {item.table: item.version for item in first.table_versions}
            # One pin a table, under the set's name; those of the build itself are gone.
            assert await owners(ingestion) == [f"{first.pin_owner}@{versions['events']}"]
            assert await owners(ingestion, "labels") == [f"{first.pin_owner}@{versions['labels']}"]
            assert (await made(feature)).pin_owner == first.pin_owner
            assert await owners(ingestion) == [f"{first.pin_owner}@{versions['events']}"]
            await place.write(ingestion, 3)
        async with place.serving(place.unpinned) as feature:
            second = await made(feature)
            assert (second.rows, second.pin_owner) == (60, "")
        await place.write(ingestion, 3)
    content = ContentStore(first.store_url).read(first.data.sha256)
    assert await asyncio.to_thread(place.vacuum) > 0
    ContentStore(first.store_url).remove(first.data.sha256)
    async with place.ingesting(), place.serving() as feature:
        again = await made(feature, first.request)
        assert again == first
        assert ContentStore(again.store_url).read(again.data.sha256) == content
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await made(feature, second.request)
        lost = MillraceError.from_rpc(caught.value)
        assert (lost.code, lost.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TABLE_VERSION_LOST")


async def test_without_ingestion_nothing_is_built_and_earlier_sets_are_pinned_once_it_is_there(place: Place) -> None:
    async with place.ingesting() as ingestion:
        await place.write(ingestion, 2)
    async with place.serving(place.unpinned) as feature:
        await feature.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=registry()))
        early = await made(feature)
        assert not early.pin_owner
    async with place.serving() as feature:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await made(feature)
        assert MillraceError.from_rpc(caught.value).reason == "PINS_UNAVAILABLE"
        async with place.ingesting() as ingestion, asyncio.timeout(60):
            while True:
                kept = (await feature.GetTrainingSet(pb.GetTrainingSetRequest(digest=early.digest))).training_set
                if kept.pin_owner:
                    break
                await asyncio.sleep(0.05)
            assert (await owners(ingestion))[0].split("@")[0] == kept.pin_owner
            assert (await made(feature, early.request)).pin_owner == kept.pin_owner
            # A table that is not ingestion's needs no pin: nobody vacuums it.
            others = pa.table({"event_id": ["e10"], "at": pa.array([START], pa.timestamp("us", "UTC")), "late": [0.5]})
            await asyncio.to_thread(write_deltalake, f"{place.ingestion.lake()}/others", others)
            mixed = pb.BuildTrainingSetRequest()
            mixed.CopyFrom(WANTED)
            mixed.label_contract = "others"
            found = await made(feature, mixed)
            assert (found.rows, [i.table for i in found.table_versions]) == (1, ["events", "others"])
            assert any(owner.startswith(found.pin_owner) for owner in await owners(ingestion))
