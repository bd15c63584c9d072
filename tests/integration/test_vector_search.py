"""Embeddings by ingestion, from a contract and a Feast repository in files to the SDK's search: the contract's own definition of a vector holds."""

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from millrace import Client, Endpoints
from millrace.contracts import load_contract
from millrace.feast_repo import registry_from_repo
from millrace_api.feature.v1 import search_pb2
from millrace_feature.app import build as build_feature
from millrace_feature.settings import FeatureSettings
from millrace_ingestion.app import build as build_ingestion
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

from tests.stack import eventually

START = datetime(2026, 3, 1, tzinfo=UTC)
LENGTH = 16
CONTRACT = f"""
name: articles
columns:
  - {{name: id, type: string}}
  - {{name: article, type: string}}
  - {{name: at, type: timestamp}}
  - {{name: title, type: string}}
  - {{name: embedding, type: float_list, nullable: true, min_length: {LENGTH}, max_length: {LENGTH}}}
event_id_column: id
event_time_column: at
key_columns: [article]
"""
REPO = f"""
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32, String

article = Entity(name="article", join_keys=["article"], value_type=ValueType.STRING)
articles = FeatureView(
    name="articles", entities=[article], source=FileSource(name="articles", path="millrace://articles", timestamp_field="at"),
    schema=[
        Field(name="article", dtype=String), Field(name="title", dtype=String),
        Field(name="embedding", dtype=Array(Float32), vector_index=True, vector_length={LENGTH}, vector_search_metric="cosine"),
    ],
)
"""


def records(vectors: np.ndarray, first: int) -> pa.Table:
    """Articles from number `first` on."""
    numbers = range(first, first + len(vectors))
    return pa.table(
        {
            "id": [f"e{n}" for n in numbers],
            "article": [f"a{n}" for n in numbers],
            "at": pa.array([START + timedelta(seconds=n) for n in numbers], pa.timestamp("us", "UTC")),
            "title": [f"Title {n}" for n in numbers],
            "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
        }
    )


async def test_embeddings_enter_by_ingestion_and_are_found(tmp_path: Path) -> None:
    bus = BusSettings(path=str(tmp_path / "bus.sqlite"))
    places = {"lake_url": str(tmp_path / "lake"), "bus": bus, "drain_s": 0}
    ingestion = IngestionSettings(state_dir=str(tmp_path / "ingestion"), **places)
    feature = FeatureSettings(
        state_dir=str(tmp_path / "feature"), training_sets_url=str(tmp_path / "sets"), fetch_wait_s=0.02,
        default_deadline_s=120, **places,
    )  # fmt: skip
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/feature_store.yaml").write_text("project: shop\nprovider: local\nregistry: r.db\n")
    (tmp_path / "repo/features.py").write_text(REPO)
    (tmp_path / "articles.yaml").write_text(CONTRACT)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(await build_ingestion(ingestion), ingestion))
        second = await stack.enter_async_context(running(await build_feature(feature), feature))
        environment = {"MILLRACE_INGESTION_ADDRESS": first, "MILLRACE_FEATURE_ADDRESS": second}
        await asyncio.to_thread(follow, tmp_path, Endpoints.from_environment(environment))


def follow(folder: Path, endpoints: Endpoints) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(300, LENGTH)).astype(np.float32)
    query = rng.normal(size=LENGTH)
    with Client(endpoints) as client:
        client.ingestion.register_contract(load_contract(folder / "articles.yaml"))
        list(client.ingestion.write_table("articles", records(vectors[:200], 0), source="files"))
        client.features.apply(*registry_from_repo(folder / "repo"))
        # These come after the view was filled; one of them is no vector of the contract.
        later = records(vectors[200:], 200)
        short = pa.array([*vectors[200:299], vectors[299][:3]], pa.list_(pa.float32()))
        list(client.ingestion.write_table("articles", later.set_column(4, "embedding", short), source="later"))
        assert {count.reason: count.count for count in client.ingestion.count_dead_letters()} == {"WRONG_LENGTH": 1}
        cosines = vectors[:299] @ query / np.linalg.norm(vectors[:299], axis=1) / np.linalg.norm(query)
        expected = [f"a{n}" for n in np.argsort(-cosines)[:20]]

        def found() -> bool | None:
            try:
                answer = client.vectors.search("articles", query.tolist(), top_k=20, features=["title"])
            except MillraceError as error:
                if error.reason != "VECTOR_INDEX_NOT_READY":
                    raise
                return None
            assert all(hit.values[0].string_value == f"Title {_key(hit)[1:]}" for hit in answer.hits)
            return [_key(hit) for hit in answer.hits] == expected or None

        eventually("every article can be found", found)
        among = client.vectors.search("articles", query.tolist(), among=[{"article": "a1"}, {"article": "a299"}])
        assert [_key(hit) for hit in among.hits] == ["a1"]


def _key(hit: search_pb2.VectorHit) -> str:
    return hit.entity["article"].string_value
