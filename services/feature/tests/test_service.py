"""The service over gRPC: definitions, stream, reads, training sets, restarts."""

import math
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit.call_lines import CallLines, Peer, to_port
from millrace_kit.content import ContentStore
from millrace_kit.errors import MillraceError
from parts.server import free_port

# Files of one machine; Redis, PostgreSQL and S3.
pytestmark = pytest.mark.parametrize(
    "place",
    ["machine", pytest.param("cluster", marks=[pytest.mark.redis, pytest.mark.postgres, pytest.mark.s3])],
)

READ = b"/millrace_api.feature.v1.FeatureService/GetOnlineFeatures"
BASE = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
EVENTS = pa.schema(
    [("event_id", pa.string()), ("at", pa.timestamp("us", tz="UTC")), ("user", pa.string()), ("shop", pa.int64()),
     ("amount", pa.int64()), ("note", pa.string())]
)  # fmt: skip
ASKS = pa.schema(
    [("ask_id", pa.string()), ("asked_at", pa.timestamp("us", tz="UTC")), ("user", pa.string()), ("shop", pa.int64()),
     ("limit", pa.float64())]
)  # fmt: skip
ANSWERS = pa.schema([("ask_id", pa.string()), ("at", pa.timestamp("us", tz="UTC")), ("late", pa.bool_())])


def minutes(value: float) -> datetime:
    return BASE + timedelta(minutes=value)


def events(*rows: tuple[float, str | None, int | None, int | None, str | None]) -> pa.Table:
    names = EVENTS.names
    return pa.Table.from_pylist(
        [dict(zip(names, (f"e{i}", minutes(at), *rest), strict=True)) for i, (at, *rest) in enumerate(rows)], EVENTS
    )


def stamp(instant: datetime) -> Timestamp:
    out = Timestamp()
    out.FromDatetime(instant)
    return out


def row(user: str | None, shop: int | None = 1, limit: float = 100.0, at: float = 0.0) -> feature_pb2.EntityRow:
    values = {
        "limit": common_pb2.Value(double_value=limit),
        "asked_at": common_pb2.Value(timestamp_value=stamp(minutes(at))),
    }
    if user is not None:
        values["user"] = common_pb2.Value(string_value=user)
    if shop is not None:
        values["shop"] = common_pb2.Value(int64_value=shop)
    return feature_pb2.EntityRow(values=values)


async def read(stub, at: float, *rows: feature_pb2.EntityRow) -> list[dict[str, float]]:
    answer = await stub.GetOnlineFeatures(
        feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=rows, event_time=stamp(minutes(at)))
    )
    return [dict(zip(answer.feature_names, vector.values, strict=True)) for vector in answer.vectors]


async def apply(stub, registry: bytes) -> feature_pb2.ApplyDefinitionsResponse:
    return await stub.ApplyDefinitions(feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=registry))


async def failure(call) -> MillraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return MillraceError.from_rpc(caught.value)


FIRST = events((1, "ann", 1, 10, "x"), (3, "ann", 2, 30, "xyz"), (4, "bob", 1, 7, None), (11, "ann", 1, 2, "late"))


async def test_definitions_stream_and_reads(world, small_objects, make_registry, wait_for_records) -> None:
    registry = make_registry(small_objects())
    async with world.serve() as stub:
        applied = await apply(stub, registry)
        assert applied.changed
        again = await apply(stub, registry)
        assert (again.definitions_hash, again.changed) == (applied.definitions_hash, False)
        await world.publish(world.land("events", FIRST))
        await wait_for_records(stub, events=4)
        ann, bob, eve, nobody = await read(stub, 12, row("ann"), row("bob", at=59), row("eve"), row(None))
    # At 12:12 the last complete hop ends 12:10: the event at 12:11 does not count, for newest rows it does.
    assert ann["by_user__amount_count_10m"] == 2
    assert ann["by_user__amount_sum_60m"] == 40
    assert ann["by_user__amount_mean_10m"] == 20
    assert (ann["by_user__amount_min_10m"], ann["by_user__amount_max_10m"]) == (10, 30)
    assert ann["by_both__amount_sum_10m"] == 10
    assert ann["newest__amount"] == 2
    assert (ann["derived__room"], ann["derived__noted"], ann["derived__minute"]) == (60, 4, 0)
    assert bob["by_user__amount_count_10m"] == 1
    assert math.isnan(bob["derived__noted"])
    assert bob["derived__minute"] == 59
    assert eve["by_user__amount_count_10m"] == 0
    assert math.isnan(eve["by_user__amount_mean_10m"])
    assert math.isnan(nobody["by_user__amount_count_10m"])
    assert math.isnan(nobody["newest__amount"])


async def test_statuses_ttl_and_age(world, small_objects, make_registry, wait_for_records) -> None:
    async with world.serve() as stub:
        await apply(stub, make_registry(small_objects()))
        await world.publish(world.land("events", FIRST))
        await wait_for_records(stub, events=4)
        request = feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=[row("bob")])

        async def status(at: float, name: str) -> tuple[int, float, int]:
            request.event_time.CopyFrom(stamp(minutes(at)))
            answer = await stub.GetOnlineFeatures(request)
            place = list(answer.feature_names).index(name)
            vector = answer.vectors[0]
            return vector.statuses[place], vector.values[place], vector.max_age_ms

        async def ages(at: float, user: str) -> dict[str, int]:
            request = feature_pb2.GetOnlineFeaturesRequest(
                feature_service="main", rows=[row(user), row("ann")], event_time=stamp(minutes(at)), with_view_ages=True
            )
            answer = await stub.GetOnlineFeatures(request)
            return dict(zip(answer.view_names, answer.vectors[0].view_ages_ms, strict=True))

        assert (await ages(34, "bob"))["newest"] == 30 * 60_000
        assert (await ages(35, "bob"))["newest"] == -1
        assert (await ages(34, "nobody"))["newest"] == -1
        # Each row's own, not the oldest of all.
        assert (await ages(34, "ann"))["newest"] != 30 * 60_000
        assert (await ages(34, "bob"))["by_user"] >= 0

        assert await status(34, "newest__amount") == (feature_pb2.FEATURE_STATUS_PRESENT, 7, 30 * 60_000)
        found, value, _age = await status(35, "newest__amount")
        assert found == feature_pb2.FEATURE_STATUS_EXPIRED
        assert math.isnan(value)
        assert (await status(3, "newest__amount"))[
            0
        ] == feature_pb2.FEATURE_STATUS_MISSING  # its row comes a minute later
        assert (await status(300, "by_user__amount_max_60m"))[0] == feature_pb2.FEATURE_STATUS_MISSING
        assert (await status(300, "by_user__amount_count_60m"))[:2] == (feature_pb2.FEATURE_STATUS_PRESENT, 0)


async def test_reads_by_the_door_are_those_by_grpc(world, small_objects, make_registry, wait_for_records) -> None:
    listen = f"127.0.0.1:{free_port()}"
    lines = CallLines(to_port(listen), Peer("it", "it", "AWAY", "LATE"), 1, 1 << 20)
    async with world.serve(reads_listen=listen) as stub:
        await apply(stub, make_registry(small_objects()))
        await world.publish(world.land("events", FIRST))
        await wait_for_records(stub, events=4)
        request = feature_pb2.GetOnlineFeaturesRequest(
            feature_service="main", rows=[row("bob"), row("nobody")], event_time=stamp(minutes(34)), with_view_ages=True
        )
        answer, _headers = await lines.call(READ, [], request.SerializeToString(), 10.0)
        assert feature_pb2.GetOnlineFeaturesResponse.FromString(answer) == await stub.GetOnlineFeatures(request)

        request.feature_service = "nothing"
        with pytest.raises(MillraceError) as caught:
            await lines.call(READ, [], request.SerializeToString(), 10.0)
        assert caught.value.reason == (await failure(stub.GetOnlineFeatures(request))).reason
        with pytest.raises(MillraceError) as caught:
            await lines.call(READ, [], b"\xff\xff", 10.0)
        assert caught.value.metadata["field"] == "request"
    await lines.close()


async def test_repeats_late_events_and_restart_change_nothing_twice(
    world, small_objects, make_registry, wait_for_records
) -> None:
    registry = make_registry(small_objects())
    first = world.land("events", FIRST)
    async with world.serve() as stub:
        await apply(stub, registry)  # filled from the lake, which holds the batch
        await world.publish(first, first)
        await wait_for_records(stub, events=4)
        late = world.land("events", events((2, "ann", 1, 5, "y")))
        await world.publish(late, late)
        await wait_for_records(stub, events=5)
        before = await read(stub, 20, row("ann"), row("bob"))
        assert before[0]["by_user__amount_sum_60m"] == 47
    async with world.serve() as stub:
        await world.publish(late)
        progress = await wait_for_records(stub, events=5)
        assert [c.records for c in progress.contracts] == [5]
        assert progress.contracts[0].watermark == stamp(minutes(11))
        for found, expected in zip(await read(stub, 20, row("ann"), row("bob")), before, strict=True):
            assert found == pytest.approx(expected, nan_ok=True)


async def test_a_new_view_is_filled_without_gap_or_double_count(
    world, small_objects, make_registry, wait_for_records
) -> None:
    async with world.serve() as stub:
        await apply(stub, make_registry(small_objects()))
        await world.publish(world.land("events", FIRST))
        await wait_for_records(stub, events=4)
        # Landed but not yet published when the new view is filled.
        pending = world.land("events", events((6, "bob", 1, 100, None)))
        applied = await apply(stub, make_registry(small_objects(more=True)))
        assert applied.changed
        await world.publish(pending)
        await wait_for_records(stub, events=5)
        (found,) = await read(stub, 15, row("bob"))
        assert found["by_shop__amount_sum_15m"] == 119
        assert found["by_user__amount_sum_60m"] == 107
        # Going back takes the definitions and their data together.
        back = await apply(stub, make_registry(small_objects()))
        assert back.changed
        assert "by_shop__amount_sum_15m" not in (await read(stub, 15, row("bob")))[0]
        definitions = await stub.GetDefinitions(
            feature_pb2.GetDefinitionsRequest(definitions_hash=applied.definitions_hash)
        )
        assert definitions.definitions_hash == applied.definitions_hash
        (info,) = definitions.feature_services
        assert list(info.join_keys) == ["shop", "user"]
        assert list(info.request_fields) == ["asked_at", "limit"]


def land_questions(world) -> None:
    asks = [
        {"ask_id": f"a{i}", "asked_at": minutes(at), "user": user, "shop": 1, "limit": 50.0}
        for i, (at, user) in enumerate([(12, "ann"), (12, "bob"), (20, None), (45, "bob"), (50, "eve"), (55, "ann")])
    ]
    world.land("asks", pa.Table.from_pylist(asks, ASKS))
    answers = [{"ask_id": f"a{i}", "at": minutes(60), "late": i % 2 == 0} for i in (4, 3, 2, 1, 0)]
    world.land("answers", pa.Table.from_pylist(answers, ANSWERS))


def build_request(**fields) -> feature_pb2.BuildTrainingSetRequest:
    return feature_pb2.BuildTrainingSetRequest(
        **{
            "feature_service": "main",
            "entity_contract": "asks",
            "label_contract": "answers",
            "join_column": "ask_id",
            "label_column": "late",
            **fields,
        }
    )


@pytest.fixture(scope="session")
def labelled_objects(small_objects):
    from feast import FileSource

    answers = FileSource(name="answers", path="millrace://answers", timestamp_field="at")
    return lambda: [*small_objects(), answers]


async def test_training_sets_are_what_reads_would_have_been(
    world, labelled_objects, make_registry, wait_for_records
) -> None:
    land_questions(world)
    landed = world.land("events", FIRST)
    store = ContentStore(world.settings.training_sets_url)
    async with world.serve() as stub:
        await apply(stub, make_registry(labelled_objects()))
        await world.publish(landed)
        await wait_for_records(stub, events=4)
        built = (await stub.BuildTrainingSet(build_request())).training_set
        assert (built.rows, built.rows_without_label) == (5, 1)
        path = world.root / "set.parquet"
        table = pq.read_table(store.fetch(built.data.sha256, path))
        assert table.column_names == ["event_time", "ask_id", *built.feature_names, "late"]
        for record in table.to_pylist():
            user = {"a0": "ann", "a1": "bob", "a2": None, "a3": "bob", "a4": "eve"}[record["ask_id"]]
            at = (record["event_time"] - BASE).total_seconds() / 60
            (online,) = await read(stub, at, row(user, limit=50, at=at))
            assert [record[name] for name in built.feature_names] == pytest.approx(
                list(online.values()), nan_ok=True, rel=0
            )
        # New data changes the newest set, and the old one can still be made, byte for byte.
        world.land("events", events((5, "ann", 1, 1000, "more")))
        other = (await stub.BuildTrainingSet(build_request())).training_set
        assert other.digest != built.digest
        rebuilt = (await stub.BuildTrainingSet(built.request)).training_set
        assert rebuilt == built
    async with world.serve() as stub:
        kept = await stub.GetTrainingSet(feature_pb2.GetTrainingSetRequest(digest=built.digest))
        assert kept.training_set == built
    assert store.read(built.digest)


async def test_known_at_hides_what_came_later(world, labelled_objects, make_registry) -> None:
    land_questions(world)
    world.land("events", FIRST)
    async with world.serve() as stub:
        await apply(stub, make_registry(labelled_objects()))
        early = (await stub.BuildTrainingSet(build_request(known_at=stamp(minutes(60))))).training_set
        assert (early.rows, early.rows_without_label) == (0, 6)
        bounded = common_pb2.TimeRange(start=stamp(minutes(12)), end=stamp(minutes(20)))
        some = (
            await stub.BuildTrainingSet(build_request(known_at=stamp(minutes(61)), time_range=bounded))
        ).training_set
        assert some.rows == 2


async def test_errors_name_the_field(world, labelled_objects, make_registry) -> None:
    land_questions(world)
    world.land("events", FIRST)
    async with world.serve() as stub:
        asked = feature_pb2.GetOnlineFeaturesRequest(feature_service="main", rows=[row("ann")])
        assert (await failure(stub.GetOnlineFeatures(asked))).code is grpc.StatusCode.UNAVAILABLE
        await apply(stub, make_registry(labelled_objects()))
        cases = {
            "rows": feature_pb2.GetOnlineFeaturesRequest(feature_service="main"),
            "feature_service": feature_pb2.GetOnlineFeaturesRequest(rows=[row("ann")]),
            "event_time": feature_pb2.GetOnlineFeaturesRequest(
                feature_service="main", rows=[row("ann")], event_time=Timestamp(seconds=1 << 60)
            ),
            'rows[1].values["asked_at"]': feature_pb2.GetOnlineFeaturesRequest(
                feature_service="main", rows=[row("ann"), feature_pb2.EntityRow()]
            ),
            'rows[0].values["user"]': feature_pb2.GetOnlineFeaturesRequest(
                feature_service="main", rows=[feature_pb2.EntityRow(values={"user": common_pb2.Value(int64_value=3)})]
            ),
        }
        for field, request in cases.items():
            error = await failure(stub.GetOnlineFeatures(request))
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        unknown = feature_pb2.GetOnlineFeaturesRequest(feature_service="none", rows=[row("ann")])
        assert (await failure(stub.GetOnlineFeatures(unknown))).code is grpc.StatusCode.NOT_FOUND
        builds = {
            "entity_contract": build_request(entity_contract="Bad Name"),
            "label_column": build_request(label_column="by_user__amount_sum_60m"),
            "time_range": build_request(
                time_range=common_pb2.TimeRange(start=stamp(minutes(5)), end=stamp(minutes(5)))
            ),
            "table_versions[0].table": build_request(
                table_versions=[common_pb2.TableVersion(table="other", version=0)]
            ),
            "definitions_hash": build_request(definitions_hash="abc"),
        }
        for field, wrong in builds.items():
            error = await failure(stub.BuildTrainingSet(wrong))
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        gone = build_request(table_versions=[common_pb2.TableVersion(table="events", version=99)])
        assert (await failure(stub.BuildTrainingSet(gone))).code is grpc.StatusCode.NOT_FOUND
        missing = await failure(stub.BuildTrainingSet(build_request(label_column="none")))
        assert (missing.code, missing.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "COLUMN_MISSING")
        for content in (b"", b"\xff\xfe random"):
            error = await failure(apply(stub, content))
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "feast_registry")
        named = feature_pb2.ApplyDefinitionsRequest(project="Not A Name", feast_registry=b"x")
        assert (await failure(stub.ApplyDefinitions(named))).metadata["field"] == "project"
        digest = feature_pb2.GetTrainingSetRequest(digest="zz")
        assert (await failure(stub.GetTrainingSet(digest))).metadata["field"] == "digest"


async def test_reads_too_far_behind_are_refused(world, small_objects, make_registry, wait_for_records) -> None:
    async with world.serve() as stub:
        await apply(stub, make_registry(small_objects()))
        await world.publish(world.land("events", FIRST))
        await wait_for_records(stub, events=4)
        later = events((60 * 24 * 36, "ann", 1, 1, None))
        await world.publish(world.land("events", later))
        await wait_for_records(stub, events=5)
        error = await failure(read(stub, 12, row("ann")))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "EVENT_TIME_TOO_OLD")
        (found,) = await read(stub, 60 * 24 * 36 + 6, row("ann"))
        assert found["by_user__amount_sum_10m"] == 1


async def test_messages_that_cannot_be_read_are_passed_over(
    world, small_objects, make_registry, wait_for_records
) -> None:
    async with world.serve() as stub:
        await apply(stub, make_registry(small_objects()))
        good = world.land("events", FIRST)
        bad = type(good)()
        bad.CopyFrom(good)
        bad.arrow_ipc = b"no arrow"
        bad.source_offset = 77
        await world.publish(bad, good)
        await wait_for_records(stub, events=4)
        assert (await read(stub, 12, row("ann")))[0]["by_user__amount_sum_60m"] == 40
