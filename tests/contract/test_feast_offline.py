"""Feast's own `FeatureStore.get_historical_features` through `millrace.feast_offline`, against the real feature service."""

import asyncio
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_feature.app import build
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import FeatureSettings
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

START = datetime(2026, 1, 1, tzinfo=UTC)


def minute(number: int) -> datetime:
    return START + timedelta(minutes=number)


def definitions() -> list[Any]:
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
    from feast.types import Float64, Int64, String

    batch = FileSource(name="events_lake", path="events", timestamp_field="at")
    events = PushSource(name="events", batch_source=batch)
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    windows = StreamFeatureView(
        name="windows", entities=[user], source=events, timestamp_field="at",
        schema=[Field(name="user", dtype=String), Field(name="n", dtype=Int64), Field(name="top", dtype=Float64)],
        aggregations=[
            Aggregation(column="amount", function=f, name=name, time_window=timedelta(minutes=10), slide_interval=timedelta(minutes=5))
            for name, f in (("n", "count"), ("top", "max"))
        ],
    )  # fmt: skip
    newest = FeatureView(
        name="newest", entities=[user], source=events, ttl=timedelta(minutes=20),
        schema=[Field(name="user", dtype=String), Field(name="amount", dtype=Int64), Field(name="note", dtype=String)],
    )  # fmt: skip
    asked = RequestSource(name="asked", schema=[Field(name="limit", dtype=Float64)])

    @on_demand_feature_view(sources=[asked, newest], mode="python", schema=[Field(name="room", dtype=Float64)])
    def derived(inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = zip(inputs["limit"], inputs["amount"], strict=True)
        return {"room": [None if amount is None else limit - amount for limit, amount in pairs]}

    return [user, events, windows, newest, derived, FeatureService(name="main", features=[windows, newest[["amount"]]])]


def registry_of(objects: list[Any]) -> bytes:
    from feast.protos.feast.core.Registry_pb2 import Registry

    user, events, windows, newest, derived, service = [item.to_proto() for item in objects]
    return Registry(
        entities=[user], data_sources=[events], stream_feature_views=[windows], feature_views=[newest],
        on_demand_feature_views=[derived], feature_services=[service],
    ).SerializeToString()  # fmt: skip


def historical(folder: Path, address: str, rows: pd.DataFrame, features: Any, **options: Any) -> pd.DataFrame:
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(
        project="p", provider="local", registry=str(folder / "registry.db"), entity_key_serialization_version=3,
        online_store={"type": "sqlite", "path": str(folder / "online.sqlite")},
        offline_store={"type": "millrace.feast_offline.MillraceOfflineStore", "address": address},
    )  # fmt: skip
    store = FeatureStore(config=config)
    store.apply(definitions())
    return store.get_historical_features(entity_df=rows, features=features, **options).to_df()


@pytest.mark.filterwarnings("ignore")
async def test_every_row_comes_back_with_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace import feast_offline

    monkeypatch.setattr(feast_offline, "CHUNK_ROWS", 3)
    events = {"user": ["a", "a", "b"], "amount": [1, 5, 7], "note": ["x", "y", "z"]}
    at = pa.array([minute(1), minute(7), minute(40)], pa.timestamp("us", "UTC"))
    write_deltalake(str(tmp_path / "lake/events"), pa.table({**events, "at": at}))
    settings = FeatureSettings(
        state_dir=str(tmp_path / "state"), lake_url=str(tmp_path / "lake"), training_sets_url=str(tmp_path / "sets"),
        bus=BusSettings(path=str(tmp_path / "bus.sqlite")), drain_s=0, apply_wait_s=60,
    )  # fmt: skip
    rows = pd.DataFrame(
        {
            "user": ["a", "b", "a", "nobody", "a"],
            "event_timestamp": [minute(10), minute(10), minute(8), minute(10), minute(50)],
            "limit": [10.0] * 5,
        }
    )
    service = await build(settings, clock=FakeClock())
    async with running(service, settings) as address, open_channel(address, timeout_s=60) as channel:
        stub = FeatureServiceStub(channel)
        await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=registry_of(definitions())))
        refs = ["windows:n", "windows:top", "newest:amount", "newest:note", "derived:room"]
        found = await asyncio.to_thread(historical, tmp_path, address, rows, refs)
        assert found["user"].tolist() == rows["user"].tolist()
        assert found["n"].tolist() == [2, 0, 1, 0, 0]
        assert [None if math.isnan(v) else v for v in found["top"]] == [5.0, None, 1.0, None, None]
        assert [None if pd.isna(v) else v for v in found["amount"]] == [5, None, 5, None, None]
        assert [None if pd.isna(v) else v for v in found["note"]] == ["y", None, "y", None, None]
        assert [None if pd.isna(v) else v for v in found["room"]] == [5.0, None, 5.0, None, None]
        full = await asyncio.to_thread(historical, tmp_path, address, rows, refs[:2], full_feature_names=True)
        assert full["windows__n"].tolist() == [2, 0, 1, 0, 0]
