"""Embeddings through the whole service: the same online, in training sets and for Feast's clients, and searched while they change."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2, offline_pb2, search_pb2
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.feature.v1.offline_pb2_grpc import OfflineServiceStub
from millrace_api.feature.v1.search_pb2_grpc import VectorServiceStub
from millrace_feature.app import build
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import (
    AccessSettings,
    ConsistencySettings,
    FeastSettings,
    RedisSettings,
    VectorSearchSettings,
)
from millrace_kit.bus import Outgoing, open_bus, records_topic
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.content import ContentStore
from millrace_kit.server import running
from millrace_kit.settings import BusSettings
from parts.server import free_port

NOW = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
LENGTH = 8
ITEMS = pa.schema(
    [
        ("item", pa.string()), ("shop", pa.int64()), ("at", pa.timestamp("us", tz="UTC")), ("title", pa.string()),
        ("price", pa.float64()), ("embedding", pa.list_(pa.float32())),
    ]
)  # fmt: skip
ASKS = pa.schema(
    [
        ("id", pa.string()), ("item", pa.string()), ("shop", pa.int64()), ("at", pa.timestamp("us", tz="UTC")),
        ("y", pa.int64()),
    ]
)  # fmt: skip


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


def items(rows: list[tuple[str, int, float, str | None, list[float] | None]]) -> pa.Table:
    """Records of (item, shop, minutes ago, title, embedding); the price is the shop's number."""
    names = ("item", "shop", "at", "title", "price", "embedding")
    return pa.Table.from_pylist(
        [dict(zip(names, (i, s, ago(m), t, float(s), e), strict=True)) for i, s, m, t, e in rows], ITEMS
    )


def some_items(count: int, seed: int = 1) -> pa.Table:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, LENGTH)).astype(np.float32)
    return items([(f"i{i}", i % 3, 30 + i / 100, f"title {i}", vectors[i].tolist()) for i in range(count)])


ROWS = pa.concat_tables(
    [
        some_items(200),
        items(
            [
                ("short", 1, 5, "too short", [1.0, 2.0]),
                ("empty", 1, 5, None, None),
                ("old", 1, 60 * 30, "older than the ttl", [9.0] * LENGTH),
                ("i7", 7 % 3, 3, "newer", [0.25] * LENGTH),
                ("i7", 7 % 3, 3, "newer", [0.5] * LENGTH),
            ]
        ),
    ]
)


def truth(table: pa.Table) -> dict[tuple[str, int], list[float]]:
    """The newest embedding of every entity that has one and is not too old; of equal times the one whose bytes sort last."""
    newest: dict[tuple[str, int], Any] = {}
    for row in table.to_pylist():
        vector = row["embedding"]
        content = np.array(vector, "<f4").tobytes() if vector is not None and len(vector) == LENGTH else b""
        key, order = (row["item"], row["shop"]), (row["at"], row["title"] or "", row["price"], content)
        if key not in newest or order > newest[key][0]:
            newest[key] = (order, row)
    found = {key: row for key, (_order, row) in newest.items() if row["at"] >= NOW - timedelta(days=1)}
    return {key: r["embedding"] for key, r in found.items() if r["embedding"] and len(r["embedding"]) == LENGTH}


def nearest(vectors: dict[tuple[str, int], list[float]], query: list[float], count: int) -> list[tuple[str, int]]:
    far = {key: float(np.linalg.norm(np.array(v) - np.array(query))) for key, v in vectors.items()}
    return sorted(far, key=far.__getitem__)[:count]


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    import_feast()
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Array, Float32, Float64, Int64, String

    item = Entity(name="item", join_keys=["item"], value_type=ValueType.STRING)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)
    docs = FeatureView(
        name="docs",
        entities=[item, shop],
        ttl=timedelta(days=1),
        schema=[
            Field(name="shop", dtype=Int64),  # another order than that of the entities
            Field(name="item", dtype=String),
            Field(name="title", dtype=String),
            Field(name="price", dtype=Float64),
            Field(
                name="embedding",
                dtype=Array(Float32),
                vector_index=True,
                vector_length=LENGTH,
                vector_search_metric="L2",
            ),
        ],
        source=FileSource(name="items", path="millrace://items", timestamp_field="at"),
    )
    asks = FileSource(name="asks", path="millrace://asks", timestamp_field="at")
    request = RequestSource(name="ask", schema=[Field(name="weight", dtype=Float64)])

    @on_demand_feature_view(
        sources=[request, docs],
        mode="python",
        schema=[Field(name="first", dtype=Float64), Field(name="letters", dtype=Int64)],
    )
    def derived(inputs: dict[str, Any]) -> dict[str, Any]:
        rows = zip(inputs["weight"], inputs["embedding"], strict=True)
        return {
            "first": [w * sum(vector) if vector is not None else None for w, vector in rows],
            "letters": [len(title) if title is not None else None for title in inputs["title"]],
        }

    service = FeatureService(name="main", features=[docs[["price", "embedding"]], derived])
    bare = FeatureService(name="bare", features=[docs[["embedding"]]])
    return [item, shop, docs, asks, derived, service, bare]


@dataclass
class Served:
    """The service and what it was given."""

    world: Any
    channel: grpc.aio.Channel
    url: str

    @property
    def features(self) -> FeatureServiceStub:
        return FeatureServiceStub(self.channel)

    async def search(self, query: list[float], top_k: int = 10, **more: Any) -> search_pb2.SearchVectorsResponse:
        """Search once the index is there."""
        request = search_pb2.SearchVectorsRequest(view="docs", query=query, top_k=top_k, **more)
        async with asyncio.timeout(30):
            while True:
                try:
                    return await VectorServiceStub(self.channel).SearchVectors(request)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.02)


def keys_of(answer: search_pb2.SearchVectorsResponse) -> list[tuple[str, int]]:
    return [(hit.entity["item"].string_value, hit.entity["shop"].int64_value) for hit in answer.hits]


@asynccontextmanager
async def serving(
    world: Any, registry: bytes, wait_for_records: Callable[..., Any], **more: Any
) -> AsyncIterator[Served]:
    listen = f"127.0.0.1:{free_port()}"
    changes = {"feast": FeastSettings(http_listen=listen), "vector_search": VectorSearchSettings(poll_s=0.02), **more}
    settings = world.settings.model_copy(update=changes)
    service = await build(settings, clock=FakeClock(NOW))
    async with running(service, settings) as address, open_channel(address, timeout_s=60) as channel:
        stub = FeatureServiceStub(channel)
        await stub.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))
        await wait_for_records(stub, items=ROWS.num_rows)
        yield Served(world, channel, f"http://{listen}")


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.redis)])
async def served(
    request: pytest.FixtureRequest, world: Any, objects: list[Any], make_registry: Any, wait_for_records: Any
) -> AsyncIterator[Served]:
    if request.param == "redis":
        world.redis = RedisSettings(url=request.getfixturevalue("redis_url"), read_timeout_s=5)
    world.land("items", ROWS)
    async with serving(world, make_registry(objects), wait_for_records) as found:
        yield found


QUERY = [0.4] * LENGTH


async def test_search_is_that_of_all_vectors(served: Served) -> None:
    answer = await served.search(QUERY, 20, features=["title", "price"], with_vectors=True)
    vectors = truth(ROWS)
    assert keys_of(answer) == nearest(vectors, QUERY, 20)
    assert keys_of(answer)[0] == ("i7", 1)
    first = answer.hits[0]
    assert (first.values[0].string_value, first.values[1].double_value) == ("newer", 1.0)
    assert first.distance == pytest.approx(0.15 * np.sqrt(LENGTH), rel=1e-6)
    assert list(first.vector) == [0.25] * LENGTH  # of the two of one instant the one whose bytes sort last
    assert first.event_time.ToDatetime(UTC) == ago(3)
    assert (answer.index_rows, len(answer.definitions_hash)) == (
        len(vectors) + 1,
        64,
    )  # the one older than the ttl is in it
    everything = await served.search(QUERY, 1000)
    assert sorted(keys_of(everything)) == sorted(vectors)
    assert [hit.distance for hit in everything.hits] == sorted(hit.distance for hit in everything.hits)

    for metric in (search_pb2.DISTANCE_METRIC_COSINE, search_pb2.DISTANCE_METRIC_INNER_PRODUCT):
        found = await served.search(QUERY, 5, metric=metric)
        product = {k: float(np.dot(np.array(v, np.float64), QUERY)) for k, v in vectors.items()}
        if metric == search_pb2.DISTANCE_METRIC_COSINE:
            product = {k: p / np.linalg.norm(vectors[k]) / np.linalg.norm(QUERY) for k, p in product.items()}
        assert keys_of(found) == sorted(product, key=product.__getitem__, reverse=True)[:5]
        offset = 1 if metric == search_pb2.DISTANCE_METRIC_COSINE else 0
        assert found.hits[0].distance == pytest.approx(offset - product[keys_of(found)[0]], rel=1e-6, abs=1e-9)


async def test_the_index_follows_records(served: Served, wait_for_records: Any) -> None:
    await served.search(QUERY)
    changes = items(
        [
            ("new", 9, 1, "new", [0.4] * LENGTH),
            ("i7", 1, 1, "moved away", [50.0] * LENGTH),
            ("i8", 2, 1, "gone", None),
            ("i9", 0, 1, "broken", [1.0]),
        ]
    )
    vectors = truth(pa.concat_tables([ROWS, changes]))
    expected = nearest(vectors, QUERY, 1000)
    assert expected[0] == ("new", 9)
    assert not {("i8", 2), ("i9", 0)} & set(expected)
    await served.world.publish(served.world.land("items", changes))
    async with asyncio.timeout(30):
        while True:
            if keys_of(await served.search(QUERY, 1000)) == expected:
                break
            await asyncio.sleep(0.02)


async def test_search_among_some_entities(served: Served) -> None:
    def row(item: str, shop: int) -> feature_pb2.EntityRow:
        return feature_pb2.EntityRow(values={"item": Value(string_value=item), "shop": Value(int64_value=shop)})

    some = [("i1", 1), ("i7", 1), ("i3", 0), ("nothing", 1), ("short", 1), ("old", 1), ("i1", 1)]
    answer = await served.search(QUERY, 10, among=[row(*key) for key in some])
    vectors = {key: vector for key, vector in truth(ROWS).items() if key in some}
    assert keys_of(answer) == nearest(vectors, QUERY, 10)
    assert len(answer.hits) == 3
    assert answer.index_rows == 0


@pytest.mark.kafka
@pytest.mark.redis
async def test_every_replica_finds_what_any_of_them_applied(
    world: Any, objects: list[Any], make_registry: Any, redis_url: str, kafka_address: str
) -> None:
    """Kafka splits the partitions between the replicas that apply records; the index of each follows all of them."""
    world.redis = RedisSettings(url=redis_url, read_timeout_s=5)
    world.database_url = f"sqlite:///{world.root / 'shared.sqlite'}"
    world.land("items", ROWS)
    bus_settings = BusSettings(kind="kafka", bootstrap_servers=(kafka_address,), partitions=3)
    changes = {"bus": bus_settings, "definitions_poll_s": 0.1, "vector_search": VectorSearchSettings(poll_s=0.1)}
    first = world.settings.model_copy(update=changes)
    second = first.model_copy(update={"state_dir": str(world.root / "other")})
    clock = FakeClock(NOW)
    bus = await open_bus(bus_settings)
    async with (
        running(await build(first, clock=clock), first) as one,
        running(await build(second, clock=clock), second) as other,
        open_channel(one, timeout_s=60) as one_channel,
        open_channel(other, timeout_s=60) as other_channel,
    ):
        apply = feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=make_registry(objects))
        await FeatureServiceStub(one_channel).ApplyDefinitions(apply)
        replicas = [Served(world, channel, "") for channel in (one_channel, other_channel)]
        vectors = truth(ROWS)
        for replica in replicas:
            assert keys_of(await replica.search(QUERY, 5)) == nearest(vectors, QUERY, 5)
        landed = [ROWS]
        for number in range(9):  # over all partitions
            landed.append(items([(f"n{number}", 1, 1, "new", [0.4 + number / 1000] * LENGTH)]))
            fact = world.land("items", landed[-1], source=f"s{number}")
            await bus.publish([Outgoing(records_topic("items"), str(number), fact.SerializeToString())])
        expected = nearest(truth(pa.concat_tables(landed)), QUERY, 9)
        assert {item for item, _shop in expected} == {f"n{number}" for number in range(9)}
        async with asyncio.timeout(60):
            for replica in replicas:
                while True:
                    if keys_of(await replica.search(QUERY, 9)) == expected:
                        break
                    await asyncio.sleep(0.05)
    await bus.close()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no view": ({"view": "gone"}, "gone"),
    "no embedding": ({"feature": "title"}, "has no embedding 'title'"),
    "a short query": ({"query": [1.0]}, "query: has 1 numbers; docs.embedding has 8"),
    "no number": ({"query": [float("nan")] * LENGTH}, "query: holds a number that is not finite"),
    "no direction": ({"query": [0.0] * LENGTH, "metric": search_pb2.DISTANCE_METRIC_COSINE}, "query: is all zeros"),
    "too many": ({"top_k": 1001}, "top_k: must be 1 to 1000"),
    "none": ({"top_k": 0}, "top_k: must be 1 to 1000"),
    "no feature": ({"features": ["gone"]}, "features[0]: 'docs' has no feature 'gone'"),
    "the vector": ({"features": ["embedding"]}, "with_vectors"),
    "no metric": ({"metric": 17}, "metric: 17"),
    "half a key": ({"among": [feature_pb2.EntityRow(values={"item": Value(string_value="a")})]}, "among[0]: needs join key 'shop'"),
    "a wrong key": (
        {"among": [feature_pb2.EntityRow(values={"item": Value(int64_value=1)})]}, 'among[0].values["item"]: must be string'
    ),
}  # fmt: skip


async def test_bad_searches_are_named(
    world: Any, objects: list[Any], make_registry: Any, wait_for_records: Any
) -> None:
    world.land("items", ROWS)
    small = VectorSearchSettings(poll_s=0.02, max_memory_mib=1)
    async with serving(world, make_registry(objects), wait_for_records, vector_search=small) as served:
        for name, (change, message) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.search(**{"query": QUERY, "top_k": 3, **change}) if "view" not in change else (
                    await VectorServiceStub(served.channel).SearchVectors(
                        search_pb2.SearchVectorsRequest(view="gone", query=QUERY, top_k=3)
                    )
                )
            assert message in (caught.value.details() or ""), name
            expected = grpc.StatusCode.NOT_FOUND if name == "no view" else grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.code() is expected, name
        # A block of this view takes more than a MiB: nothing is searched halfway.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.search(QUERY)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_memory_mib" in (caught.value.details() or "")


async def test_online_and_training_set_hold_the_same_numbers(served: Served) -> None:
    entities = [
        ("i7", 1, 10),
        ("i7", 1, 1),
        ("i5", 2, 1),
        ("short", 1, 1),
        ("empty", 1, 1),
        ("old", 1, 1),
        ("gone", 1, 1),
    ]
    rows = [
        {"id": f"a{n}", "item": item, "shop": shop, "at": ago(minutes), "y": n}
        for n, (item, shop, minutes) in enumerate(entities)
    ]
    served.world.land("asks", pa.Table.from_pylist(rows, ASKS))
    names = [f"docs__embedding__{i}" for i in range(LENGTH)]
    online = []
    for item, shop, minutes in entities:
        at = Timestamp()
        at.FromDatetime(ago(minutes))
        row = feature_pb2.EntityRow(values={"item": Value(string_value=item), "shop": Value(int64_value=shop)})
        request = feature_pb2.GetOnlineFeaturesRequest(feature_service="bare", rows=[row], event_time=at)
        answer = await served.features.GetOnlineFeatures(request)
        assert list(answer.feature_names) == names
        online.append(list(answer.vectors[0].values))
    many = feature_pb2.GetOnlineFeaturesRequest(
        feature_service="bare",
        rows=[
            feature_pb2.EntityRow(values={"item": Value(string_value=item), "shop": Value(int64_value=shop)})
            for item, shop, minutes in entities
            if minutes == 1
        ],
    )
    at_once = [list(vector.values) for vector in (await served.features.GetOnlineFeatures(many)).vectors]
    np.testing.assert_array_equal(at_once, [online[n] for n, (_i, _s, minutes) in enumerate(entities) if minutes == 1])

    build_set = feature_pb2.BuildTrainingSetRequest(
        feature_service="bare", entity_contract="asks", label_contract="asks", join_column="id", label_column="y"
    )
    made = (await served.features.BuildTrainingSet(build_set)).training_set
    assert list(made.feature_names) == names
    table = pq.read_table(pa.BufferReader(ContentStore(made.store_url).read(made.data.sha256))).sort_by("y")
    offline = np.stack([table.column(name).to_numpy() for name in names], axis=1)
    np.testing.assert_array_equal(offline, np.array(online))
    assert np.isnan(offline).all(axis=1).tolist() == [False, False, False, True, True, True, True]
    assert offline[1].tolist() == [0.25] * LENGTH
    assert offline[0].tolist() == ROWS.column("embedding")[7].as_py()

    # Named one by one they are lists, and so they are in historical features.
    build_set.feature_service = ""
    build_set.features.extend(["docs__embedding", "docs__title"])
    named = (await served.features.BuildTrainingSet(build_set)).training_set
    lists = pq.read_table(pa.BufferReader(ContentStore(named.store_url).read(named.data.sha256))).sort_by("y")
    expected = [None if np.isnan(row).any() else row.tolist() for row in offline]
    assert lists.column("docs__embedding").to_pylist() == expected
    given = pa.Table.from_pylist(rows, ASKS)
    request = offline_pb2.GetHistoricalFeaturesRequest(
        features=["docs__embedding", "derived__first"],
        rows=sink_with(given, weight=[2.0] * len(rows)),
        event_time_column="at",
    )
    answer = await OfflineServiceStub(served.channel).GetHistoricalFeatures(request)
    with pa.ipc.open_stream(answer.features) as stream:
        found = stream.read_all()
    assert found.schema.field("docs__embedding").type == pa.list_(pa.float32())
    assert found.column("docs__embedding").to_pylist() == expected
    assert found.column("derived__first").to_pylist()[1] == 2 * 0.25 * LENGTH


def sink_with(table: pa.Table, **columns: Any) -> bytes:
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def reference(objects: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Feast's own store with the same rows in its SQLite online store."""
    from feast import FeatureStore, RepoConfig

    root: Path = tmp_path_factory.mktemp("feast")
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(root / "registry.db"),
        online_store={"type": "sqlite", "path": str(root / "online.db")},
        offline_store={"type": "file"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    store.apply(objects)
    frame = items(
        [(i, s, 30, f"title {i}", [float(s), *[0.1] * (LENGTH - 1)]) for i, s in [("i1", 1), ("i2", 2), ("i3", 0)]]
    ).to_pandas()
    store.write_to_online_store("docs", frame)
    return store


async def test_feasts_remote_client_reads_and_searches(served: Served, reference: Any) -> None:
    from feast import FeatureStore
    from feast.errors import FeatureViewNotFoundException

    config = reference.config
    remote = FeatureStore(
        config=type(config)(
            project="test",
            provider="local",
            registry=config.registry.path if hasattr(config.registry, "path") else config.registry,
            online_store={"type": "remote", "path": served.url},
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )
    rows = [{"item": "i1", "shop": 1}, {"item": "short", "shop": 1}, {"item": "nobody", "shop": 1}]

    def read() -> dict[str, Any]:
        return remote.get_online_features(["docs:embedding", "docs:title", "docs:price"], rows).to_dict()

    found = await asyncio.to_thread(read)
    assert found["embedding"] == [ROWS.column("embedding")[1].as_py(), None, None]
    assert found["title"] == ["title 1", "too short", None]
    whole = {"feature_service": "bare", "entities": {"item": ["i1"], "shop": [1]}}
    body = (await asyncio.to_thread(requests.post, f"{served.url}/get-online-features", json=whole, timeout=30)).json()
    assert body["metadata"]["feature_names"] == ["item", "shop", "embedding"]
    assert body["results"][2]["values"] == [found["embedding"][0]]

    await served.search(QUERY)  # the index is there

    def search(**more: Any) -> dict[str, Any]:
        features = ["docs:title", "docs:embedding", "docs:item"]
        return remote.retrieve_online_documents_v2(
            **{"features": features, "query": QUERY, "top_k": 4, **more}
        ).to_dict()

    answer = await asyncio.to_thread(search)
    vectors = truth(ROWS)
    expected = nearest(vectors, QUERY, 4)
    columns = (answer[name] for name in ("distance", "item", "shop", "embedding", "title"))
    rows_found = sorted(zip(*columns, strict=True))
    assert [(item, shop) for _distance, item, shop, _vector, _title in rows_found] == expected
    for distance, item, shop, vector, title in rows_found:
        assert vector == pytest.approx(vectors[item, shop])
        assert distance == pytest.approx(float(np.linalg.norm(np.array(vector) - np.array(QUERY))), rel=1e-6)
        assert title == ("newer" if item == "i7" else f"title {item[1:]}")
    first = await asyncio.to_thread(
        lambda: remote.retrieve_online_documents(query=QUERY, top_k=4, features=["docs:embedding"]).to_dict()
    )
    assert [
        vector == pytest.approx(vectors[key]) for vector, key in zip(first["embedding"], expected, strict=True)
    ] == [True] * 4
    with pytest.raises(Exception, match="query_string: searches of texts are not served"):
        await asyncio.to_thread(lambda: search(query_string="shoes"))
    gone = {"features": ["gone:embedding"], "query": QUERY, "top_k": 1}
    with pytest.raises(FeatureViewNotFoundException):
        await asyncio.to_thread(remote_search, remote, gone)


def remote_search(remote: Any, body: dict[str, Any]) -> Any:
    from feast.infra.online_stores.remote import get_remote_online_documents

    return get_remote_online_documents(config=remote.config, req_body=body)


async def test_feasts_grpc_answers_hold_lists(served: Served) -> None:
    from feast.protos.feast.serving.ServingService_pb2 import FeatureList, GetOnlineFeaturesRequest
    from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
    from feast.type_map import python_values_to_proto_values

    request = GetOnlineFeaturesRequest(features=FeatureList(val=["docs:embedding", "docs:title"]))
    request.entities["item"].val.extend(python_values_to_proto_values(["i1", "empty", "nobody"]))
    request.entities["shop"].val.extend(python_values_to_proto_values([1, 1, 1]))
    answer = await ServingServiceStub(served.channel).GetOnlineFeatures(request)
    results = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
    values = results["embedding"].values
    assert list(values[0].float_list_val.val) == ROWS.column("embedding")[1].as_py()
    assert [value.WhichOneof("val") for value in values] == ["float_list_val", None, None]
    assert results["title"].values[0].string_val == "title 1"


async def test_permissions_are_obeyed(
    world: Any, objects: list[Any], make_registry: Any, wait_for_records: Any
) -> None:
    from feast import FeatureView
    from feast.permissions.action import AuthzedAction
    from feast.permissions.permission import Permission
    from feast.permissions.policy import RoleBasedPolicy
    from feast.protos.feast.core.Registry_pb2 import Registry

    rule = Permission(
        name="readers",
        types=[FeatureView],
        policy=RoleBasedPolicy(roles=["reader"]),
        actions=[AuthzedAction.READ_ONLINE],
    )
    registry = Registry.FromString(make_registry(objects))
    registry.permissions.append(rule.to_proto())
    world.land("items", ROWS)
    access = AccessSettings(administrators=("root",))
    async with serving(world, registry.SerializeToString(), wait_for_records, access=access) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.search(QUERY)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        body = {"features": ["docs:title"], "query": QUERY, "top_k": 1}
        answer = await asyncio.to_thread(requests.post, f"{served.url}/search", json=body, timeout=30)
        assert (answer.status_code, "docs" in json.loads(answer.json())["message"]) == (403, True)


async def test_served_numbers_are_checked_against_the_lake(
    world: Any, objects: list[Any], make_registry: Any, wait_for_records: Any
) -> None:
    world.land("items", ROWS)
    checks = ConsistencySettings(sample_rate=1.0, settle_s=0, check_every_s=0.05)
    async with serving(world, make_registry(objects), wait_for_records, consistency=checks) as served:
        keys = [("i1", 1), ("i7", 1), ("short", 1), ("old", 1)]
        rows = [
            feature_pb2.EntityRow(values={"item": Value(string_value=i), "shop": Value(int64_value=s), "weight": Value(double_value=2)})
            for i, s in keys
        ]  # fmt: skip
        request = feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=rows)
        answer = await served.features.GetOnlineFeatures(request)
        assert list(answer.feature_names) == [
            "docs__price", *[f"docs__embedding__{i}" for i in range(LENGTH)], "derived__first", "derived__letters",
        ]  # fmt: skip
        assert answer.vectors[1].values[-2] == 2 * 0.25 * LENGTH
        async with asyncio.timeout(30):
            while True:
                found = await served.features.GetConsistency(feature_pb2.GetConsistencyRequest(max_findings=10))
                if found.windows:
                    break
                await asyncio.sleep(0.02)
    compared = {"docs__price": 4, "docs__embedding": 4 * LENGTH, "derived__first": 4, "derived__letters": 4}
    assert {w.feature: w.compared for w in found.windows} == compared  # an embedding's numbers together
    assert not any(w.mismatched or w.missing or w.extra for w in found.windows)
    assert not found.findings
