"""Feast 0.67 itself, its CLI and its SDK, with `millrace.feast_online` and `millrace.feast_engine` in `feature_store.yaml`, against the real service."""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from millrace.feast_repo import registry_from_repo
from millrace_api.events.v1.events_pb2 import RecordsLanded
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_feature.app import build
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import FeatureSettings
from millrace_kit.bus import Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.errors import InvalidArgumentError, MillraceError
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

pytestmark = pytest.mark.filterwarnings("ignore")
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(minutes=50)
SCHEMA = pa.schema(
    [("user", pa.string()), ("amount", pa.int64()), ("note", pa.string()), ("at", pa.timestamp("us", "UTC"))]
)
STORE = """\
project: p
provider: local
registry: registry.db
entity_key_serialization_version: 3
online_store: {{type: millrace.feast_online.MillraceOnlineStore, address: "{address}"}}
offline_store: {{type: millrace.feast_offline.MillraceOfflineStore, address: "{address}"}}
batch_engine: {{type: millrace.feast_engine.MillraceComputeEngine, address: "{address}", timeout_s: {timeout_s}, poll_s: 0.05}}
"""
FEATURES = """\
from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, StreamFeatureView, ValueType
from feast.aggregation import Aggregation
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

events = PushSource(name="events", batch_source=FileSource(name="events_lake", path="events", timestamp_field="at"))
user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
windows = StreamFeatureView(
    name="windows", entities=[user], source=events, timestamp_field="at",
    schema=[Field(name="user", dtype=String), Field(name="n", dtype=Int64), Field(name="top", dtype=Float64)],
    aggregations=[
        Aggregation(column="amount", function=f, name=name, time_window=timedelta(minutes=60), slide_interval=timedelta(minutes=5))
        for f, name in (("count", "n"), ("max", "top"))
    ],
)
newest = FeatureView(
    name="newest", entities=[user], source=events, ttl=timedelta(minutes=20),
    schema=[Field(name="user", dtype=String), Field(name="amount", dtype=Int64), Field(name="note", dtype=String)],
)


@on_demand_feature_view(
    sources=[RequestSource(name="asked", schema=[Field(name="limit", dtype=Float64)]), newest],
    mode="python", schema=[Field(name="room", dtype=Float64)],
)
def derived(inputs):
    pairs = zip(inputs["limit"], inputs["amount"])
    return {"room": [None if amount is None else limit - amount for limit, amount in pairs]}


main = FeatureService(name="main", features=[windows, newest[["amount"]], derived])
"""


def rows(*given: tuple[str, int, str, int]) -> pa.Table:
    found = [(user, amount, note, START + timedelta(minutes=minute)) for user, amount, note, minute in given]
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in found], SCHEMA)


class Place:
    """A feature service with a lake and a bus, and a user's Feast repository that points at it."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "repo"
        self.repo.mkdir()
        (self.repo / "features.py").write_text(FEATURES)
        self.lake = folder / "lake/events"
        self.offset = 0
        self.settings = FeatureSettings(
            state_dir=str(folder / "state"), lake_url=str(folder / "lake"), training_sets_url=str(folder / "sets"),
            bus=BusSettings(path=str(folder / "bus.sqlite")), drain_s=0, apply_wait_s=0, fetch_wait_s=0.02,
        )  # fmt: skip

    @asynccontextmanager
    async def serve(self, timeout_s: float = 60) -> AsyncIterator[FeatureServiceStub]:
        service = await build(self.settings, clock=FakeClock(NOW))
        async with running(service, self.settings) as address, open_channel(address, timeout_s=60) as channel:
            (self.repo / "feature_store.yaml").write_text(STORE.format(address=address, timeout_s=timeout_s))
            yield FeatureServiceStub(channel)

    async def apply(self, stub: FeatureServiceStub) -> None:
        project, registry = await asyncio.to_thread(registry_from_repo, self.repo)
        await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project=project, feast_registry=registry))

    async def land(self, table: pa.Table) -> None:
        """Append to the lake and publish, as ingestion does."""
        self.offset += 1
        await asyncio.to_thread(write_deltalake, str(self.lake), table, mode="append", schema_mode="merge")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        fact = RecordsLanded(
            contract="events", contract_version=1, arrow_ipc=sink.getvalue().to_pybytes(), source="test",
            table_version=DeltaTable(str(self.lake)).version(), source_offset=self.offset, rows=table.num_rows,
        )  # fmt: skip
        bus = await open_bus(self.settings.bus)
        await bus.publish([Outgoing(records_topic("events"), "events", fact.SerializeToString())])
        await bus.close()

    async def feast(self, *arguments: str) -> tuple[int, str]:
        """The unmodified `feast` command in the repository, in this process: (exit status, what it said)."""
        import_feast()
        from click.testing import CliRunner
        from feast.cli.cli import cli

        found = await asyncio.to_thread(CliRunner().invoke, cli, ["-c", str(self.repo), *arguments])
        return found.exit_code, f"{found.output}{found.exception or ''}"

    def store(self) -> Any:
        import_feast()
        from feast import FeatureStore

        return FeatureStore(repo_path=str(self.repo))

    def applied_store(self) -> Any:
        """A store whose registry holds the repository, as after `feast apply`."""
        import_feast()
        from feast.repo_operations import apply_total

        store = self.store()
        apply_total(store.config, self.repo, skip_source_validation=True)
        return self.store()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(tmp_path)
    # Feast imports a repository's files by their bare names, and another test's `features` may be loaded already.
    monkeypatch.syspath_prepend(str(made.repo))
    sys.modules.pop("features", None)
    yield made
    sys.modules.pop("features", None)


async def test_feasts_command_applies_materializes_and_reads(place: Place) -> None:
    async with place.serve() as stub:
        await place.land(rows(("a", 1, "x", 1), ("b", 7, "z", 40)))
        status, said = await place.feast("apply")
        assert status == 0, said
        materialize = ("materialize", "2026-01-01T00:00:00", "2026-01-02T00:00:00")
        status, said = await place.feast(*materialize)
        assert status != 0, said
        assert "no definitions are applied yet" in said
        await place.apply(stub)
        await place.land(rows(("a", 5, "y", 45)))
        status, said = await place.feast(*materialize)
        assert status == 0, said
        status, said = await place.feast(
            "get-online-features", "-e", "user=a", "-e", "limit=10", "-f", "windows:n", "-f", "newest:note", "-f", "derived:room"
        )  # fmt: skip
        assert status == 0, said
        assert json.loads(said[said.index("{") :]) == {
            "user": ["a"],
            "n": [2],
            "note": ["y"],
            "room": [5.0],
        }
        status, said = await place.feast("materialize-incremental", "2026-01-02T00:00:00", "-v", "newest")
        assert status == 0, said
        status, said = await place.feast("teardown")
        assert status == 0, said


async def test_reads_by_service_and_by_name_blocking_and_not(place: Place) -> None:
    async with place.serve() as stub:
        await place.land(rows(("a", 1, "x", 1), ("a", 5, "y", 45), ("b", 7, "z", 10)))
        await place.apply(stub)
        store = await asyncio.to_thread(place.applied_store)
        await asyncio.to_thread(store.materialize, START, NOW)
        service = store.get_feature_service("main")
        entities = [{"user": "a", "limit": 10}, {"user": "b", "limit": 1.5}, {"user": "nobody", "limit": None}]
        wanted = {
            "user": ["a", "b", "nobody"], "n": [2, 1, 0], "top": [5.0, 7.0, None],
            "amount": [5, None, None], "room": [5.0, None, None],
        }  # fmt: skip
        found = await asyncio.to_thread(store.get_online_features, service, entities)
        assert found.to_dict() == wanted
        await asyncio.to_thread(store.materialize_incremental, NOW, ["newest"])
        assert (await store.get_online_features_async(service, entities)).to_dict() == wanted
        full = await store.get_online_features_async(["newest:amount"], {"user": ["a", None]}, full_feature_names=True)
        assert full.to_dict(include_event_timestamps=True) == {
            "user": ["a", None], "user__ts": [0, 0], "newest__amount": [5, None],
            "newest__amount__ts": [int((START + timedelta(minutes=45)).timestamp()), 0],
        }  # fmt: skip
        many = await asyncio.to_thread(store.get_online_features, ["windows:n"], {"user": ["a", "b", "c"] * 801})
        assert many.to_dict()["n"] == [2, 1, 0] * 801
        await store.close()
        await asyncio.to_thread(store.teardown)
        after = await asyncio.to_thread(place.applied_store)
        assert (await after.get_online_features_async(service, entities)).to_dict() == wanted
        await after.close()


async def test_what_is_wrong_is_named_and_nothing_is_written(place: Place) -> None:
    from millrace.feast_online import MillraceOnlineStore

    async with place.serve() as stub:
        await place.land(rows(("a", 1, "x", 45)))
        await place.apply(stub)
        store = await asyncio.to_thread(place.applied_store)
        await asyncio.to_thread(store.materialize, START, NOW)
        with pytest.raises(MillraceError, match="gone"):
            await asyncio.to_thread(store.get_online_features, ["newest:gone"], [{"user": "a"}])
        with pytest.raises(InvalidArgumentError, match=r"entity_rows.user\[0\]: list is neither"):
            await store.get_online_features_async(["newest:note"], [{"user": ["a"]}])
        with pytest.raises(InvalidArgumentError, match="same length"):
            await store.get_online_features_async(["newest:note"], {"user": ["a"], "limit": []})
        frame = pd.DataFrame({"user": ["a"], "amount": [1], "note": ["q"], "n": [1], "top": [1.0], "at": [NOW]})
        with pytest.raises(NotImplementedError, match="send records to ingestion"):
            await asyncio.to_thread(store.push, "events", frame)
        with pytest.raises(NotImplementedError, match="send records to ingestion"):
            await asyncio.to_thread(store.write_to_online_store, "newest", frame)
        # Feast reads single views through its provider too.
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        keys = [EntityKey(join_keys=["user"], entity_values=[Value(string_val=name)]) for name in ("a", "nobody")]
        view, provider = store.get_feature_view("newest"), store._get_provider()
        found = await asyncio.to_thread(provider.online_read, store.config, view, keys, ["amount"])
        assert found == [(START + timedelta(minutes=45), {"amount": Value(int64_val=1)}), (None, None)]
        assert await provider.online_read_async(store.config, view, keys, ["amount"]) == found
        assert isinstance(provider.online_store, MillraceOnlineStore)
        assert (provider.async_supported.online.read, provider.async_supported.online.write) == (True, False)
        await store.close()


async def test_materialize_waits_for_fill_and_records_until_its_deadline(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling, applying = asyncio.Event(), asyncio.Event()
    hold(monkeypatch, "_follow", filling)
    hold(monkeypatch, "_apply_once_filled", applying)
    async with place.serve(timeout_s=0.3) as stub:
        await place.land(rows(("a", 1, "x", 45)))
        store = await asyncio.to_thread(place.applied_store)
        with pytest.raises(MillraceError, match="no definitions are applied yet"):
            await asyncio.to_thread(store.materialize, START, NOW)
        await place.apply(stub)
        with pytest.raises(MillraceError, match=r"being filled after 0.3 s \(batch_engine.timeout_s\)") as caught:
            await asyncio.to_thread(store.materialize, START, NOW)
        assert caught.value.reason == "MATERIALIZE_TIMEOUT"
        filling.set()
        async with asyncio.timeout(30):
            while not (await stub.GetProgress(pb.GetProgressRequest())).definitions_hash:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await place.land(rows(("a", 5, "y", 46)))
        with pytest.raises(MillraceError, match=r"\d messages are not applied yet after 0.3 s"):
            await asyncio.to_thread(store.materialize, START, NOW)
        assert store.get_feature_view("newest").most_recent_end_time is None
        engine = store._get_provider().batch_engine
        engine._settings.timeout_s = 60
        looked = threading.Event()
        pause = engine._pause
        engine._pause = lambda wait_s: (looked.set(), pause(wait_s))
        waiting = asyncio.ensure_future(asyncio.to_thread(store.materialize, START, NOW, ["newest"]))
        assert await asyncio.to_thread(looked.wait, 30)
        assert not waiting.done()
        applying.set()
        await waiting
        found = await store.get_online_features_async(["newest:note"], [{"user": "a"}])
        assert found.to_dict()["note"] == ["y"]
        assert store.get_feature_view("newest").most_recent_end_time == NOW
        await store.close()


def hold(monkeypatch: pytest.MonkeyPatch, method: str, until: asyncio.Event) -> None:
    """Have the stream worker wait in front of `method`."""
    from millrace_feature.worker import StreamWorker

    real = getattr(StreamWorker, method)

    async def held(self: StreamWorker, *arguments: Any) -> Any:
        await until.wait()
        return await real(self, *arguments)

    monkeypatch.setattr(StreamWorker, method, held)


async def test_the_engine_computes_historical_features(place: Place) -> None:
    async with place.serve() as stub:
        await place.land(rows(("a", 1, "x", 1), ("a", 5, "y", 45)))
        await place.apply(stub)
        store = await asyncio.to_thread(place.applied_store)
        from feast.infra.common.retrieval_task import HistoricalRetrievalTask

        frame = pd.DataFrame({"user": ["a", "b"], "event_timestamp": [START + timedelta(minutes=10)] * 2})
        view = store.get_stream_feature_view("windows")
        task = HistoricalRetrievalTask("p", frame, view, full_feature_name=False, registry=store.registry)
        engine = store._get_provider().batch_engine
        job = await asyncio.to_thread(engine.get_historical_features, store.registry, task)
        table = await asyncio.to_thread(job.to_arrow)
        assert table.select(["user", "n", "top"]).to_pylist() == [
            {"user": "a", "n": 1, "top": 1.0}, {"user": "b", "n": 0, "top": None}
        ]  # fmt: skip
