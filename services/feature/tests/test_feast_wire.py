"""An unmodified Feast client reads from this service, and gets what Feast's own server says of the same definitions and rows."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
import requests
import uvicorn
from google.protobuf.descriptor import Descriptor
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feast_pb2, feature_pb2
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_feature.app import build
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import ConsistencySettings, FeastSettings, OnlineCacheSettings
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.settings import TlsSettings
from parts.certificates import Authority, write
from parts.server import free_port
from requests.adapters import HTTPAdapter
from urllib3 import Retry

NOW = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
USERS = pa.schema(
    [
        ("user", pa.string()), ("at", pa.timestamp("us", tz="UTC")), ("score", pa.float64()), ("ratio", pa.float64()),
        ("visits", pa.int64()), ("level", pa.int64()), ("paying", pa.bool_()), ("town", pa.string()),
        ("joined", pa.timestamp("us", tz="UTC")),
    ]
)  # fmt: skip
PAIRS = pa.schema(
    [("user", pa.string()), ("shop", pa.int64()), ("at", pa.timestamp("us", tz="UTC")), ("spent", pa.float64())]
)


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


USER_ROWS = pa.Table.from_pylist(
    [
        dict(zip(USERS.names, row, strict=True))
        for row in [
            ("ann", ago(5), 1.5, 0.1, 7, 3, True, 'Lu"lu,a', ago(9000)),
            ("bob", ago(7), None, 1e30, -(2**60), -1, False, "", ago(1)),
            ("cat", ago(2.5), float("inf"), 0.25, 2**53 + 1, None, None, None, None),
            ("old", ago(600), 4.0, 4.0, 4, 4, True, "x", ago(600)),
        ]
    ],
    USERS,
)
PAIR_ROWS = pa.Table.from_pylist(
    [
        {"user": "ann", "shop": 1, "at": ago(3), "spent": 10.25},
        {"user": "ann", "shop": 2, "at": ago(4), "spent": -0.5},
        {"user": "bob", "shop": 1, "at": ago(6), "spent": 3.0},
    ],
    PAIRS,
)


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    """Definitions that Feast serves too: newest rows of every type, a compound entity, an on-demand view."""
    import_feast()
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp

    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)
    kinds = [Float64, Float32, Int64, Int32, Bool, String, UnixTimestamp]
    fields = [Field(name=name, dtype=kind) for name, kind in zip(USERS.names[2:], kinds, strict=True)]
    about = FeatureView(
        name="about",
        entities=[user],
        ttl=timedelta(hours=1),
        schema=[Field(name="user", dtype=String), *fields],
        source=FileSource(name="users", path="millrace://users", timestamp_field="at"),
    )
    pair = FeatureView(
        name="pair",
        entities=[user, shop],
        ttl=timedelta(hours=1),
        schema=[Field(name="user", dtype=String), Field(name="shop", dtype=Int64), Field(name="spent", dtype=Float64)],
        source=FileSource(name="pairs", path="millrace://pairs", timestamp_field="at"),
    )
    request = RequestSource(name="ask", schema=[Field(name="limit", dtype=Float64)])

    @on_demand_feature_view(
        sources=[request, pair],
        mode="python",
        schema=[Field(name="room", dtype=Float64), Field(name="whole", dtype=Int64)],
    )
    def derived(inputs: dict[str, Any]) -> dict[str, Any]:
        rows = list(zip(inputs["limit"], inputs["spent"], strict=True))
        return {
            "room": [limit - spent if spent is not None else None for limit, spent in rows],
            "whole": [int(limit) for limit, _spent in rows],
        }

    numbers = about[["score", "ratio", "visits", "level", "paying"]]
    return [user, shop, about, pair, derived, FeatureService(name="main", features=[numbers, pair, derived])]


@pytest.fixture(scope="module")
def reference(objects: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
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
    store.write_to_online_store("about", USER_ROWS.to_pandas().astype({"level": "Int64"}))
    store.write_to_online_store("pair", PAIR_ROWS.to_pandas())
    yield store
    store.teardown()


async def ask(method: str, url: str, **content: Any) -> requests.Response:
    """One HTTP request."""
    return await asyncio.to_thread(requests.request, method, url, timeout=30, **content)


@pytest.fixture
async def served(world, objects, make_registry, wait_for_records) -> AsyncIterator[tuple[str, grpc.aio.Channel]]:
    """(URL, gRPC channel) of the service with the definitions and rows."""
    async with serving(world, make_registry(objects), wait_for_records) as found:
        yield found


@asynccontextmanager
async def serving(
    world, registry: bytes, wait_for_records, clock: FakeClock | None = None, **more: Any
) -> AsyncIterator[tuple[str, grpc.aio.Channel]]:
    world.land("users", USER_ROWS)
    world.land("pairs", PAIR_ROWS)
    listen = f"127.0.0.1:{free_port()}"
    settings = world.settings.model_copy(update={"feast": FeastSettings(http_listen=listen), **more})
    service = await build(settings, clock=clock or FakeClock(NOW))
    async with running(service, settings) as address, open_channel(address, timeout_s=60) as channel:
        stub = FeatureServiceStub(channel)
        await stub.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))
        await wait_for_records(stub, users=4, pairs=3)
        yield f"http://{listen}", channel


REFS = [f"about:{name}" for name in USERS.names[2:]] + ["pair:spent"]
ROWS = {"user": ["ann", "bob", "cat", "nobody", "ann"], "shop": [1, 1, 1, 5, 2]}
REQUESTS: dict[str, dict[str, Any]] = {
    "by service": {"feature_service": "main", "entities": {**ROWS, "limit": [100.0, 50.5, 0.0, -1.0, 7.0]}},
    "one row": {"feature_service": "main", "entities": {"user": ["ann"], "shop": [2], "limit": [1.0]}},
    "an unknown row": {"feature_service": "main", "entities": {"user": ["eve"], "shop": [2], "limit": [1.0]}},
    "by features": {"features": REFS, "entities": ROWS},
    "by features, one row": {"features": REFS, "entities": {"user": ["ann"], "shop": [1]}},
    "by features, infinite": {"features": REFS, "entities": {"user": ["cat"], "shop": [1]}},
    "full names": {"features": REFS, "entities": ROWS, "full_feature_names": True},
    "columns nobody knows": {"features": ["about:visits"], "entities": {"user": ["bob"], "hat": ["blue"]}},
    "numbers as texts": {"features": ["pair:spent"], "entities": {"shop": ["1"], "user": ["bob"]}},
    "views named": {"features": REFS, "entities": ROWS, "include_feature_view_version_metadata": True},
    "on demand alone": {"features": ["derived:room"], "entities": {"user": ["bob"], "shop": [1], "limit": [4.5]}},
}


@pytest.fixture(scope="module")
def feast_says(reference: Any) -> dict[str, Any]:
    """Answers of Feast's own HTTP server."""
    from feast.feature_server import get_app

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(get_app(reference), port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=Retry(total=None, connect=100, backoff_factor=0.01)))
    try:
        url = f"http://127.0.0.1:{port}/get-online-features"
        return {name: session.post(url, json=body, timeout=30).json() for name, body in REQUESTS.items()}
    finally:
        server.should_exit = True
        thread.join()


NO_TIMESTAMP = -(2**63)
"""What Feast sends for a timestamp that is not there; its own SDK shows None. We send null."""


def by_name(answer: dict[str, Any]) -> dict[str, Any]:
    """Results by feature: Feast gives the features of a view in the order of a Python set."""
    names = answer["metadata"]["feature_names"]
    assert len(set(names)) == len(names)
    for result in answer["results"]:
        result["values"] = [None if value == NO_TIMESTAMP else value for value in result["values"]]
    return dict(zip(names, answer["results"], strict=True))


async def test_http_answers_are_those_of_feasts_server(served, feast_says) -> None:
    for name, body in REQUESTS.items():
        response = await ask("POST", f"{served[0]}/get-online-features", json=body)
        assert response.status_code == 200, (name, response.text)
        ours, theirs = response.json(), feast_says[name]
        assert by_name(ours) == by_name(theirs), name
        assert {**ours, "results": 0, "metadata": 0} == {**theirs, "results": 0, "metadata": 0}
        assert ours["metadata"].get("feature_view_metadata") == theirs["metadata"].get("feature_view_metadata")


async def test_grpc_answers_are_those_of_feast(served, reference: Any) -> None:
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest, GetOnlineFeaturesResponse
    from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
    from feast.type_map import python_values_to_proto_values

    def parts(answer: Any) -> dict[str, Any]:
        for result in answer.results:
            for value in result.values:
                if value.unix_timestamp_val == NO_TIMESTAMP:
                    value.ClearField("val")
        return dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))

    serving_service = ServingServiceStub(served[1])
    python_server = served[1].unary_unary(
        "/GrpcFeatureServer/GetOnlineFeatures",
        request_serializer=GetOnlineFeaturesRequest.SerializeToString,
        response_deserializer=GetOnlineFeaturesResponse.FromString,
    )
    for name, body in REQUESTS.items():
        full_names, versions = (
            body.get(key, False) for key in ("full_feature_names", "include_feature_view_version_metadata")
        )
        request = GetOnlineFeaturesRequest(
            full_feature_names=full_names, include_feature_view_version_metadata=versions
        )
        for column, values in body["entities"].items():
            request.entities[column].val.extend(python_values_to_proto_values(values))
        if "feature_service" in body:
            request.feature_service = body["feature_service"]
            features = reference.get_feature_service("main")
        else:
            request.features.val.extend(body["features"])
            features = body["features"]
        ours = await serving_service.GetOnlineFeatures(request)
        assert await python_server(request) == ours
        theirs = reference.get_online_features(features, body["entities"], full_names, versions).proto
        assert list(ours.metadata.feature_view_metadata) == list(theirs.metadata.feature_view_metadata), name
        assert parts(ours) == parts(theirs), name


async def test_feasts_remote_client_reads(served, reference: Any, tmp_path: Path) -> None:
    from feast import FeatureStore
    from feast.errors import FeatureServiceNotFoundException, FeatureViewNotFoundException

    config = reference.config.model_copy(deep=True)
    remote = FeatureStore(
        config=type(config)(
            project="test",
            provider="local",
            registry=config.registry.path if hasattr(config.registry, "path") else config.registry,
            online_store={"type": "remote", "path": served[0]},
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )
    rows = [{"user": "ann", "shop": 1, "limit": 5.0}, {"user": "bob", "shop": 1, "limit": 6.0}]

    def read(store: Any, features: Any) -> dict[str, Any]:
        return store.get_online_features(features=features, entity_rows=rows).to_dict()

    service = reference.get_feature_service("main")
    assert await asyncio.to_thread(read, remote, service) == read(reference, service)
    refs = ["about:visits", "about:town", "pair:spent"]
    assert await asyncio.to_thread(read, remote, refs) == read(reference, refs)
    gone = type(service)(name="gone", features=[])
    with pytest.raises(FeatureServiceNotFoundException, match="Feature service gone does not exist in project test"):
        await asyncio.to_thread(read, remote, gone)
    with pytest.raises(FeatureViewNotFoundException, match="Feature view nothing does not exist"):
        await asyncio.to_thread(read, remote, ["nothing:here"])


async def test_values_older_than_the_ttl_are_outside_max_age(served) -> None:
    body = {"features": ["about:visits"], "entities": {"user": ["old", "ann"]}}
    answer = (await ask("POST", f"{served[0]}/get-online-features", json=body)).json()
    assert by_name(answer)["visits"] == {
        "values": [None, 7],
        "statuses": ["OUTSIDE_MAX_AGE", "PRESENT"],
        "event_timestamps": ["2013-05-01T02:00:00Z", "2013-05-01T11:55:00Z"],
    }


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no service": (
        {"feature_service": "gone", "entities": {"user": ["a"]}},
        404,
        "Feature service gone does not exist",
    ),
    "no view": ({"features": ["gone:x"], "entities": {"user": ["a"]}}, 404, "Feature view gone does not exist"),
    "no feature": ({"features": ["about:x"], "entities": {"user": ["a"]}}, 404, "Feature x does not exist"),
    "no features": ({"entities": {"user": ["a"]}}, 400, "features: names no feature"),
    "a bare name": (
        {"features": ["about"], "entities": {"user": ["a"]}},
        400,
        "features[0]: 'about' is not of the form",
    ),
    "a version": ({"features": ["about@v2:visits"], "entities": {"user": ["a"]}}, 400, "features[0]:"),
    "no join key": ({"features": ["pair:spent"], "entities": {"user": ["a"]}}, 400, "entities.shop: is needed"),
    "no rows": ({"features": ["about:visits"], "entities": {"user": []}}, 400, "entities: needs 1 to 1000 rows"),
    "uneven": ({"features": ["pair:spent"], "entities": {"user": ["a"], "shop": []}}, 400, "entities: all columns"),
    "a wrong key": ({"features": ["pair:spent"], "entities": {"user": ["a"], "shop": ["b"]}}, 400, "entities.shop[0]:"),
    "a list": ({"features": ["about:visits"], "entities": {"user": [["a"]]}}, 400, "entities.user[0]:"),
    "no request field": (
        {"features": ["derived:room"], "entities": {"user": ["a"], "shop": [1]}},
        400,
        "lack the request fields limit",
    ),
    "equal names": ({"features": ["pair:spent", "pair:spent"], "entities": {"user": ["a"]}}, 400, "same name"),
}


async def test_bad_requests_are_named(served) -> None:
    for name, (body, status, message) in BAD.items():
        response = await ask("POST", f"{served[0]}/get-online-features", json=body)
        assert response.status_code == status, name
        assert message in json.loads(response.json())["message"], name


async def test_edges_of_http(served) -> None:
    url = served[0]
    assert (await ask("GET", f"{url}/health")).status_code == 200
    malformed = await ask("POST", f"{url}/get-online-features", data=b"{")
    assert (malformed.status_code, "detail" in malformed.json()) == (422, True)
    pushed = await ask("POST", f"{url}/push", json={"push_source_name": "users", "df": {}})
    assert pushed.status_code == 501
    assert "ingestion" in json.loads(pushed.json())["message"]
    assert (await ask("GET", f"{url}/get-online-features")).status_code == 405
    assert (await ask("GET", f"{url}/docs")).status_code == 404


async def test_grpc_errors_and_info(served) -> None:
    from feast.protos.feast.serving import GrpcServer_pb2_grpc, ServingService_pb2_grpc
    from feast.protos.feast.serving.GrpcServer_pb2 import PushRequest
    from feast.protos.feast.serving.ServingService_pb2 import GetFeastServingInfoRequest, GetOnlineFeaturesRequest

    stub = ServingService_pb2_grpc.ServingServiceStub(served[1])
    assert (await stub.GetFeastServingInfo(GetFeastServingInfoRequest())).version.startswith("0.67")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetOnlineFeatures(GetOnlineFeaturesRequest(feature_service="gone"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await GrpcServer_pb2_grpc.GrpcFeatureServerStub(served[1]).Push(PushRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_kept_answers_say_how_old_they_are(world, objects, make_registry, wait_for_records) -> None:
    kept = OnlineCacheSettings(max_staleness_ms=60_000)
    clock = FakeClock(NOW)
    body = {"features": ["about:visits"], "entities": {"user": ["ann"]}}
    async with serving(world, make_registry(objects), wait_for_records, clock, online_cache=kept) as (url, channel):
        first = await ask("POST", f"{url}/get-online-features", json=body)
        clock.advance(0.25)
        again = await ask("POST", f"{url}/get-online-features", json=body)
        stub = FeatureServiceStub(channel)
        row = feature_pb2.EntityRow(
            values={"user": Value(string_value="ann"), "shop": Value(int64_value=1), "limit": Value(double_value=1)}
        )
        await stub.GetOnlineFeatures(feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=[row]))
        clock.advance(0.5)
        native = await stub.GetOnlineFeatures(feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=[row]))
    assert first.json() == again.json()
    assert ("x-millrace-cache-age-ms" in first.headers, again.headers["x-millrace-cache-age-ms"]) == (False, "250")
    assert native.max_cache_age_ms == 750
    assert dict(zip(native.feature_names, native.vectors[0].values, strict=True))["about__visits"] == 7


async def test_http_over_mutual_tls(world, objects, make_registry, wait_for_records, tmp_path: Path) -> None:
    authority = Authority.new()
    server = write(tmp_path / "server", authority, "localhost")
    client = write(tmp_path / "client", authority, "shop-page")
    stranger = write(tmp_path / "stranger", authority, "somebody")
    forged = write(tmp_path / "forged", Authority.new("another"), "shop-page")
    listen = f"localhost:{free_port()}"
    settings = world.settings.model_copy(
        update={"feast": FeastSettings(http_listen=listen), "tls": server, "allowed_clients": ("shop-page",)}
    )
    world.land("users", USER_ROWS)
    world.land("pairs", PAIR_ROWS)
    service = await build(settings, clock=FakeClock(NOW))
    url, body = f"https://{listen}/get-online-features", REQUESTS["one row"]

    def shown(files: TlsSettings) -> dict[str, Any]:
        return {"cert": (files.cert_file, files.key_file), "verify": server.ca_file}

    async with (
        running(service, settings) as address,
        open_channel(address.replace("127.0.0.1", "localhost"), timeout_s=60, tls=client) as channel,
    ):
        stub = FeatureServiceStub(channel)
        registry = make_registry(objects)
        await stub.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))
        await wait_for_records(stub, users=4, pairs=3)
        answer = await ask("POST", url, json=body, **shown(client))
        assert answer.status_code == 200
        assert answer.json()["metadata"]["feature_names"][:2] == ["user", "shop"]
        assert (await ask("POST", url, json=body, **shown(stranger))).status_code == 403
        for refused in (shown(forged), {"verify": server.ca_file}):
            with pytest.raises(requests.exceptions.ConnectionError):  # an SSLError is one
                await ask("POST", url, json=body, **refused)
        with pytest.raises(requests.exceptions.SSLError):
            await ask("POST", url, json=body, **{**shown(client), "verify": forged.ca_file})
        with pytest.raises(requests.exceptions.ConnectionError):
            await ask("POST", url.replace("https:", "http:"), json=body)


def test_our_copy_of_feasts_messages_has_its_fields() -> None:
    """Every field of ours is Feast's, and of the request none is left out."""
    import_feast()
    from feast.protos.feast.serving.ServingService_pb2 import FeatureList, GetOnlineFeaturesRequest
    from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value

    def fields(descriptor: Descriptor) -> dict[str, tuple[int, bool, int]]:
        same_on_the_wire = {14: 5}  # an enum is an int32
        return {f.name: (f.number, f.is_repeated, same_on_the_wire.get(f.type, f.type)) for f in descriptor.fields}

    request = feast_pb2.FeastOnlineRequest
    assert fields(request.DESCRIPTOR) == fields(GetOnlineFeaturesRequest.DESCRIPTOR)
    assert fields(feast_pb2.FeastFeatureList.DESCRIPTOR) == fields(FeatureList.DESCRIPTOR)
    assert fields(feast_pb2.FeastRepeatedValue.DESCRIPTOR) == fields(RepeatedValue.DESCRIPTOR)
    ours, theirs = fields(feast_pb2.FeastValue.DESCRIPTOR), fields(Value.DESCRIPTOR)
    assert ours.items() <= theirs.items()


async def test_answers_are_checked_against_the_lake(world, objects, make_registry, wait_for_records) -> None:
    from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub

    checks = ConsistencySettings(sample_rate=1.0, settle_s=0, check_every_s=0.05)
    async with serving(world, make_registry(objects), wait_for_records, consistency=checks) as (url, channel):
        for name in ("by features", "by service"):
            assert (await ask("POST", f"{url}/get-online-features", json=REQUESTS[name])).status_code == 200
        async with asyncio.timeout(30):
            while True:
                request = feature_pb2.GetConsistencyRequest(max_findings=10)
                found = await FeatureServiceStub(channel).GetConsistency(request)
                if found.windows:
                    break
                await asyncio.sleep(0.02)
    assert {(w.feature_service, w.compared, w.mismatched, w.missing, w.extra) for w in found.windows} == {
        ("main", 5, 0, 0, 0)
    }
    assert not found.findings
