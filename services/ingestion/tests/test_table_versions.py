"""Versions of the lake's tables: reading and pinning them, what maintenance leaves, and readers of old versions after the schema grew."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.app import MIGRATIONS
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.contracts import OFFSET_COLUMN, SOURCE_COLUMN
from millrace_ingestion.lake import LakeTable
from millrace_ingestion.maintenance import Upkeep
from millrace_ingestion.models import Pin
from millrace_ingestion.pins import PinStore
from millrace_kit.clock import FakeClock
from millrace_kit.errors import NotFoundError
from millrace_kit.sql import migrate, open_engine

from .harness import Client, code_of, contract, records, serving
from .test_contracts import error_of

CONTRACT = contract_from(contract(), "contract")


def filled(folder: Path, commits: int) -> LakeTable:
    """A table with a commit of ten records each."""
    table = LakeTable(str(folder / "flights"), {}, compact_target_bytes=1 << 20)
    table.open(CONTRACT)
    for offset in range(1, commits + 1):
        rows = records(offset * 10, 10).append_column(SOURCE_COLUMN, pa.array(["s"] * 10))
        table.append(rows.append_column(OFFSET_COLUMN, pa.array([offset] * 10)), f"g{offset}", {"s": offset})
    return table


def read(folder: Path, version: int | None = None) -> list[str]:
    return sorted(DeltaTable(str(folder / "flights"), version=version).to_pyarrow_table()["event_id"].to_pylist())


def test_a_vacuum_leaves_what_is_pinned_and_says_what_is_gone(tmp_path: Path) -> None:
    table = filled(tmp_path, 5)
    before = read(tmp_path)
    old = {version: read(tmp_path, version) for version in (2, 4)}
    table.maintain()
    assert [entry.operation for version in range(7) if (entry := table.entry(version))][-1] == "OPTIMIZE"
    assert table.vacuum(24, []) == 0
    assert table.vacuum(0, [2]) == 3
    assert read(tmp_path) == before
    assert read(tmp_path, 2) == old[2]
    assert (table.at(version=2).lost, table.at(version=4).lost) == (False, True)
    assert table.at(version=2).rows == 20
    version = table.version
    assert (table.vacuum(0, [2]), table.version) == (0, version)
    assert table.vacuum(0, []) == 2
    assert table.at(version=2).lost
    assert table.landed_offset("s") == 5
    assert table.append(table.rows_of("s", 1).slice(0, 0), "empty", {}) == table.version


def test_z_order_keeps_the_records_and_brings_none(tmp_path: Path) -> None:
    table = filled(tmp_path, 4)
    before, version = read(tmp_path), table.version
    table.z_order(["carrier", "at"])
    assert read(tmp_path) == before
    assert [commit.files for commit in table.commits(version)] == [()]
    assert len(table.files()) == 1


def test_a_shortened_log_still_opens_and_its_old_versions_are_not_found(tmp_path: Path) -> None:
    table = filled(tmp_path, 4)
    before = read(tmp_path)
    table.clean_log(0)
    again = LakeTable(str(tmp_path / "flights"), {}, compact_target_bytes=1 << 20)
    again.open(CONTRACT)
    again.fence()
    assert read(tmp_path) == before
    assert (again.entry(1), again.landed_offset("s")) == (None, 4)
    with pytest.raises(NotFoundError):
        again.at(version=1)


def test_the_order_of_a_table() -> None:
    assert Upkeep().columns(CONTRACT) == ()
    assert Upkeep("key").columns(CONTRACT) == ("carrier",)
    assert Upkeep("event_time").columns(CONTRACT) == ("at",)
    assert Upkeep("key_and_event_time").columns(CONTRACT) == ("carrier", "at")


def test_pins_expire_and_are_replaced(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/state.sqlite")
    migrate(engine, MIGRATIONS)
    clock = FakeClock()
    pins = PinStore(engine, clock)
    soon, later = clock.now() + timedelta(seconds=10), clock.now() + timedelta(seconds=20)
    pins.put(Pin("flights", 3, "me", soon))
    pins.put(Pin("flights", 3, "me", later))
    pins.put(Pin("flights", 2, "you", soon))
    pins.put(Pin("flights", 1, "set", None))
    assert [(pin.version, pin.owner, pin.expires_at) for pin in pins.pins("flights")] == [
        (1, "set", None), (2, "you", soon), (3, "me", later)
    ]  # fmt: skip
    clock.advance(10)
    assert [pin.version for pin in pins.pins("flights")] == [1, 3]
    assert pins.remove("flights", None, "set") == 1
    assert pins.remove("flights", 9, "me") == 0
    assert [pin.version for pin in pins.pins("flights")] == [3]
    engine.dispose()


async def versions(client: Client, **request) -> pb.ListTableVersionsResponse:
    return await client.stub.ListTableVersions(pb.ListTableVersionsRequest(contract="flights", **request))


async def test_tables_by_version_and_by_instant(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        first = (await client.write(1, records(0, 10))).table_version
        await client.register(contract(gate={"type": pb.COLUMN_TYPE_STRING, "nullable": True}))
        second = (await client.write(2, records(10, 5))).table_version
        listed = (await versions(client)).versions
        assert [(v.version, v.added_rows) for v in listed if v.added_rows] == [(second, 5), (first, 10)]
        assert [v.version for v in listed] == list(range(listed[0].version, -1, -1))
        page = await versions(client, page_size=2)
        following = await versions(client, page_size=2, page_token=page.next_page_token)
        assert [v.version for v in (*page.versions, *following.versions)] == [v.version for v in listed[:4]]
        state = await client.stub.GetTable(pb.GetTableRequest(contract="flights", version=first))
        assert (state.table.version, state.rows) == (first, 10)
        at = next(v.committed_at for v in listed if v.version == first)
        state = await client.stub.GetTable(pb.GetTableRequest(contract="flights", instant=at))
        assert (state.table.version, state.rows) == (first, 10)
        old = DeltaTable(state.url, version=first).to_pyarrow_table()
        assert ("gate" in old.column_names, old.num_rows) == (False, 10)
        assert client.lake()["gate"].null_count == 15
        for request in ({"version": 999}, {"version": 2**62}, {"instant": Timestamp(seconds=1)}):
            missing = client.stub.GetTable(pb.GetTableRequest(contract="flights", **request))
            assert await code_of(missing) is grpc.StatusCode.NOT_FOUND
        later = Timestamp(seconds=int(datetime.now(UTC).timestamp()) + 60)
        state = await client.stub.GetTable(pb.GetTableRequest(contract="flights", instant=later))
        assert state.rows == 15


async def test_pins_by_the_api(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        version = (await client.write(1, records(0, 10))).table_version
        pinned = await client.stub.PinTableVersion(pb.PinTableVersionRequest(contract="flights", owner="set-1"))
        assert (pinned.pin.version, pinned.pin.HasField("expires_at")) == (version, False)
        assert [(p.owner, p.version) for v in (await versions(client)).versions for p in v.pins] == [("set-1", version)]
        gone = pb.PinTableVersionRequest(contract="flights", owner="set-1", version=999)
        assert (await error_of(client.stub.PinTableVersion(gone))).code is grpc.StatusCode.NOT_FOUND
        unpin = pb.UnpinTableVersionRequest(contract="flights", owner="set-1", version=version)
        assert (await client.stub.UnpinTableVersion(unpin)).removed == 1
        assert (await client.stub.UnpinTableVersion(unpin)).removed == 0
        for method, request, field in (
            ("PinTableVersion", pb.PinTableVersionRequest(contract="flights"), "owner"),
            ("GetTable", pb.GetTableRequest(contract="flights", version=-1), "version"),
            ("GetQuality", pb.GetQualityRequest(contract="flights", table_version=-1), "table_version"),
            ("ReplayDeadLetters", pb.ReplayDeadLettersRequest(contract="flights", limit=-1), "limit"),
            ("DiscardQuarantine", pb.DiscardQuarantineRequest(contract="flights"), "ids"),
        ):
            assert (await error_of(getattr(client.stub, method)(request))).metadata["field"] == field


async def test_scheduled_maintenance_compacts_orders_and_lets_batches_land(tmp_path: Path) -> None:
    settings = {"maintenance_every_s": 0.1, "z_order": "event_time", "vacuum_retention_h": 1, "log_retention_h": 1}
    async with serving(tmp_path, **settings) as client:
        await client.register()
        offset = 0
        async with asyncio.timeout(60):
            while "OPTIMIZE" not in {v.operation for v in (await versions(client)).versions}:
                offset += 1
                assert (await client.write(offset, records(offset * 10, 10))).accepted == 10
        assert (await client.write(offset + 1, records(offset * 10 + 5, 10))).duplicates == 5
        assert client.lake().num_rows == offset * 10 + 5
