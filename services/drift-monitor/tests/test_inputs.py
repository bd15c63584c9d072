"""Bad input to every RPC is INVALID_ARGUMENT naming the field; what is stored is checked; random messages break nothing."""

import random
from pathlib import Path

import grpc
import grpc.aio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from millrace_api.drift.v1 import drift_pb2
from millrace_drift_monitor.app import build
from millrace_drift_monitor.store import MIGRATIONS
from millrace_drift_monitor.tables import METADATA
from millrace_kit.client import open_channel
from millrace_kit.content import ContentStore
from millrace_kit.errors import MillraceError
from millrace_kit.server import running
from millrace_kit.sql import migrate, open_engine


async def refusal(call) -> MillraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return MillraceError.from_rpc(caught.value)


REFERENCE_CHANGES = [
    ("model", lambda r: setattr(r, "model", "")),
    ("model", lambda r: setattr(r, "model", "../x")),
    ("version", lambda r: setattr(r, "version", "1")),
    ("training_set_digest", lambda r: setattr(r, "training_set_digest", "A" * 64)),
    ("data.sha256", lambda r: setattr(r.data, "sha256", "../../etc/passwd")),
    ("data.size_bytes", lambda r: setattr(r.data, "size_bytes", -1)),
    ("data.size_bytes", lambda r: setattr(r.data, "size_bytes", 7)),
    ("store_url", lambda r: setattr(r, "store_url", "")),
    ("store_url", lambda r: setattr(r, "store_url", "data:,x")),
    ("store_url", lambda r: setattr(r, "store_url", "http://127.0.0.1:1/x")),
    ("store_url", lambda r: setattr(r, "store_url", "simplecache::file:///tmp")),
    ("feature_names", lambda r: r.ClearField("feature_names")),
    ("feature_names[1]", lambda r: r.feature_names.__setitem__(1, "")),
    ("feature_names[1]", lambda r: r.feature_names.__setitem__(1, "delay")),
    ("feature_names[2]", lambda r: r.feature_names.__setitem__(2, "nothing")),
    ("feature_names[0]", lambda r: r.feature_names.__setitem__(0, "event_time")),
    ("label_column", lambda r: setattr(r, "label_column", "nothing")),
    ("label_column", lambda r: setattr(r, "label_column", "wind")),
    ("reference_predictions[1]", lambda r: r.reference_predictions.__setitem__(1, float("nan"))),
    ("reference_correct", lambda r: r.reference_correct.append(True)),
    ("reference_accuracy", lambda r: setattr(r, "reference_accuracy", 1.1)),
    ("reference_accuracy", lambda r: setattr(r, "reference_accuracy", float("nan"))),
]


async def test_set_reference_names_what_is_wrong_and_keeps_nothing(world, stub) -> None:
    for field, change in REFERENCE_CHANGES:
        request = world.training_set(rows=500)
        change(request)
        error = await refusal(stub.SetReference(request))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field), field
    # Nothing was kept: the right request is still the first one, here with the store as a plain path.
    request = world.training_set(rows=500)
    request.store_url = request.store_url.removeprefix("file://")
    answer = await stub.SetReference(request)
    assert (answer.rows, answer.features) == (500, 3)


async def test_set_reference_twice(world, stub) -> None:
    first = await stub.SetReference(world.training_set())
    assert await stub.SetReference(world.training_set()) == first
    error = await refusal(stub.SetReference(world.training_set(seed=2)))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REFERENCE_EXISTS")


async def test_a_tampered_training_set_is_refused(world, stub) -> None:
    request = world.training_set()
    path = Path(request.store_url.removeprefix("file://")) / "sha256" / request.data.sha256[:2] / request.data.sha256
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = await refusal(stub.SetReference(request))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH")


async def test_a_training_set_that_is_absent_or_no_parquet(world, stub, tmp_path: Path) -> None:
    request = world.training_set()
    request.data.sha256 = "0" * 64
    assert (await refusal(stub.SetReference(request))).code is grpc.StatusCode.NOT_FOUND
    store = ContentStore(request.store_url)
    for content in (b"no parquet", b""):
        request.data.sha256, request.data.size_bytes = store.put_bytes(content), 0
        error = await refusal(stub.SetReference(request))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "data")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.float64()) for name in ("delay", "wind", "hour", "late")}), empty)
    request.data.sha256 = store.put_file(empty)
    assert (await refusal(stub.SetReference(request))).metadata["field"] == "data"


async def test_bad_reads(stub) -> None:
    cases = [
        (stub.ListFindings, drift_pb2.ListFindingsRequest(model="No Name"), "model"),
        (stub.ListFindings, drift_pb2.ListFindingsRequest(page_size=1001), "page_size"),
        (stub.ListFindings, drift_pb2.ListFindingsRequest(page_size=-1), "page_size"),
        (stub.ListWindows, drift_pb2.ListWindowsRequest(model="No Name"), "model"),
        (stub.ListWindows, drift_pb2.ListWindowsRequest(page_size=1001), "page_size"),
        (stub.CloseWindows, drift_pb2.CloseWindowsRequest(), "model"),
        (stub.GetOutcomes, drift_pb2.GetOutcomesRequest(), "model"),
        (stub.GetPrediction, drift_pb2.GetPredictionRequest(), "prediction_id"),
        (stub.GetPrediction, drift_pb2.GetPredictionRequest(prediction_id="x" * 257), "prediction_id"),
        (stub.GetPrediction, drift_pb2.GetPredictionRequest(prediction_id="a\0"), "prediction_id"),
    ]
    value = drift_pb2.TrackedValue
    for wrong, field in [
        (value(), "values[0].metric"),
        (value(metric="outcome/auc"), "values[0].metric"),
        (value(metric="business/"), "values[0].metric"),
        (value(metric="business/revenue", segment="carrier"), "values[0].segment"),
        (value(metric="business/revenue", segment="outcome/"), "values[0].segment"),
        (value(metric="business/revenue", lower=0), "values[0].upper"),
        (value(metric="business/revenue", lower=1, upper=1), "values[0].upper"),
        (value(metric="business/revenue", lower=float("nan"), upper=1), "values[0].lower"),
    ]:
        cases.append((stub.SetTrackedValues, drift_pb2.SetTrackedValuesRequest(model="m", values=[wrong]), field))
    many = [value(metric=f"business/column{number}") for number in range(65)]
    cases.append((stub.SetTrackedValues, drift_pb2.SetTrackedValuesRequest(model="m", values=many), "values"))
    cases.append((stub.SetTrackedValues, drift_pb2.SetTrackedValuesRequest(), "model"))
    since = drift_pb2.GetOutcomesRequest(model="m")
    since.predicted_since.seconds = 1 << 60
    for call, request, field in [*cases, (stub.GetOutcomes, since, "predicted_since")]:
        error = await refusal(call(request))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    unknown = await refusal(stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="nobody")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "PREDICTION_NOT_FOUND")
    early = drift_pb2.GetOutcomesRequest(model="m")
    early.predicted_since.FromJsonString("0001-01-01T00:00:00Z")
    assert not (await stub.GetOutcomes(early)).versions


async def test_random_bytes_never_break_the_service(world) -> None:
    rng = random.Random(1)
    names = [
        "SetReference",
        "ListFindings",
        "ListWindows",
        "CloseWindows",
        "GetOutcomes",
        "GetPrediction",
        "SetTrackedValues",
    ]
    codes = set()
    async with running(await build(world.settings), world.settings) as address, open_channel(address) as channel:
        for name in names:
            method = channel.unary_unary(f"/millrace_api.drift.v1.DriftService/{name}")
            for _ in range(40):
                try:
                    await method(rng.randbytes(rng.randrange(60)))
                except grpc.aio.AioRpcError as error:
                    codes.add(error.code())
    assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def test_the_migrations_make_the_schema_the_code_uses(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'm.sqlite'}")
    migrate(engine, MIGRATIONS)
    migrate(engine, MIGRATIONS)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
