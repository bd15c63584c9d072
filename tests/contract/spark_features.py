"""The same definition on Spark and in the feature service's build: equal features.

Not among the tests that run by themselves: pyspark is 450 MB. `make spark-test` fetches it and runs these.
"""

import math
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from millrace_feature.compiler import compile_registry
from millrace_feature.feast_import import import_feast
from millrace_feature.lake import Lake, Limits
from millrace_feature.offline.historical import historical_features

START = datetime(2024, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
FEATURES = ("n", "total", "mean", "low", "high", "spread", "hour")


def definitions(parquet: str) -> list[Any]:
    import_feast()
    from feast import Entity, FeatureView, Field, PushSource, StreamFeatureView, ValueType
    from feast.aggregation import Aggregation
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Float64, Int64, String

    batch = SparkSource(name="events_lake", path=parquet, file_format="parquet", timestamp_field="at")
    events = PushSource(name="events", batch_source=batch)
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    wanted = zip(
        FEATURES, ("count", "sum", "mean", "min", "max", "std", "sum"), (10, 10, 20, 30, 30, 60, 60), strict=True
    )
    windows = StreamFeatureView(
        name="windows", entities=[user], source=events, timestamp_field="at",
        schema=[Field(name="user", dtype=String), *[Field(name=name, dtype=Float64) for name in FEATURES]],
        aggregations=[
            Aggregation(column="amount", function=f, name=name, time_window=w * MINUTE, slide_interval=5 * MINUTE)
            for name, f, w in wanted
        ],
    )  # fmt: skip
    newest = FeatureView(
        name="newest", entities=[user], source=batch, ttl=timedelta(minutes=45),
        schema=[Field(name="user", dtype=String), Field(name="amount", dtype=Int64)],
    )  # fmt: skip
    return [user, events, windows, newest]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_spark_gives_what_the_service_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    chance = np.random.default_rng(5)
    rows, asks = 400, 120
    stamps = np.unique(chance.integers(0, 6 * 3600, rows))  # Feast leaves ties of time open
    at = pa.array([START + timedelta(seconds=int(s)) for s in stamps], pa.timestamp("us", "UTC"))
    amounts = [None if v == 0 else float(v) for v in chance.integers(0, 50, len(stamps))]
    users = [f"u{i}" for i in chance.integers(0, 5, len(stamps))]
    events = pa.table({"user": users, "at": at, "amount": pa.array(amounts, pa.float64())})
    frame = pd.DataFrame(
        {
            "user": [None if i % 17 == 0 else f"u{i % 7}" for i in range(asks)],
            "event_timestamp": [START + timedelta(seconds=int(s)) for s in chance.integers(0, 7 * 3600, asks)],
        }
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(events, folder / "events.parquet")
        write_deltalake(str(folder / "lake/events"), events)
        objects = definitions(str(folder / "events.parquet"))
        spark = on_spark(folder, objects, frame)
        ours = by_the_service(folder, objects, frame)
    assert spark["user"].where(spark["user"].notna(), None).tolist() == frame["user"].tolist()
    for feature in FEATURES:
        for found, expected in zip(
            spark[feature].tolist(), ours.column(f"windows__{feature}").to_pylist(), strict=True
        ):
            if expected is None or math.isnan(expected):
                assert found is None or math.isnan(found), feature
            else:
                assert math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-9), feature


def on_spark(folder: Path, objects: list[Any], frame: pd.DataFrame) -> pd.DataFrame:
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(
        project="p", provider="local", registry=str(folder / "registry.db"), entity_key_serialization_version=3,
        online_store={"type": "sqlite", "path": str(folder / "online.sqlite")},
        offline_store={
            "type": "millrace.feast_spark.MillraceSparkOfflineStore",
            "spark_conf": {
                "spark.master": "local[1]",
                "spark.ui.enabled": "false",
                "spark.sql.session.timeZone": "UTC",
                "spark.sql.shuffle.partitions": "2",
            },
        },
    )  # fmt: skip
    store = FeatureStore(config=config)
    store.apply(objects)
    refs = ["newest:amount", *(f"windows:{feature}" for feature in FEATURES)]
    return store.get_historical_features(entity_df=frame, features=refs).to_df()


def by_the_service(folder: Path, objects: list[Any], frame: pd.DataFrame) -> pa.Table:
    from feast.protos.feast.core.Registry_pb2 import Registry

    user, events, windows, _newest = [item.to_proto() for item in objects]
    registry = Registry(entities=[user], data_sources=[events], stream_feature_views=[windows])
    compiled = compile_registry("p", registry.SerializeToString())
    lake = Lake(str(folder / "lake"), Limits(256, 1, folder / "spill"))
    names = [f"windows__{feature}" for feature in FEATURES]
    rows = pa.Table.from_pandas(frame, preserve_index=False)
    made = historical_features(lake, compiled.definitions, names, rows, event_time="event_timestamp", pinned={})
    return made.features
