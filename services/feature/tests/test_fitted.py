"""Transformers and selections through the service: fitted on a training set, named by a tag, equal online and offline to the bit."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf import json_format, struct_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import (
    feature_pb2,
    feature_pb2_grpc,
    transformers_pb2,
    transformers_pb2_grpc,
    versions_pb2,
    versions_pb2_grpc,
)
from millrace_feature.app import build
from millrace_feature.compiler import compile_registry
from millrace_feature.plan import Transform
from millrace_feature.transforms import TransformRunner
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.content import ContentStore
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, MillraceError
from millrace_kit.server import running

BASE = datetime(2013, 5, 1, 12, 0, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")
EVENTS = pa.schema(
    [("event_id", pa.string()), ("at", TIME), ("user", pa.string()), ("amount", pa.int64()), ("note", pa.string())]
)
ASKS = pa.schema([("ask_id", pa.string()), ("asked_at", TIME), ("user", pa.string()), ("limit", pa.float64())])
ANSWERS = pa.schema([("ask_id", pa.string()), ("at", TIME), ("late", pa.bool_())])
NOTES = ["late gate", "crew", None, "fuel and crew", "storm, late storm"]
RAW = ["newest__note", "newest__amount", "by_user__amount_sum_60m", "derived__room"]


def objects(**services: dict[str, str]) -> list[Any]:
    """Definitions with one feature service a keyword: its tags."""
    from feast import (
        Entity,
        FeatureService,
        FeatureView,
        Field,
        FileSource,
        RequestSource,
        StreamFeatureView,
        ValueType,
    )
    from feast.aggregation import Aggregation
    from feast.data_source import PushSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int64, String

    lake = FileSource(name="events_lake", path="millrace://events", timestamp_field="at")
    events = PushSource(name="events", batch_source=lake)
    others = [
        FileSource(name=name, path=f"millrace://{name}", timestamp_field=at)
        for name, at in (("asks", "asked_at"), ("answers", "at"))
    ]
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    by_user = StreamFeatureView(
        name="by_user", entities=[user], source=events, timestamp_field="at",
        schema=[Field(name="user", dtype=String), Field(name="amount_sum_60m", dtype=Float64)],
        aggregations=[
            Aggregation(column="amount", function="sum", time_window=timedelta(hours=1),
                        slide_interval=timedelta(minutes=5), name="amount_sum_60m")
        ],
    )  # fmt: skip
    newest = FeatureView(
        name="newest", entities=[user], ttl=timedelta(minutes=90), source=events,
        schema=[Field(name="user", dtype=String), Field(name="amount", dtype=Int64), Field(name="note", dtype=String)],
    )  # fmt: skip
    request = RequestSource(name="ask_fields", schema=[Field(name="limit", dtype=Float64)])

    @on_demand_feature_view(sources=[request, newest], mode="python", schema=[Field(name="room", dtype=Float64)])
    def derived(inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = zip(inputs["limit"], inputs["newest__amount"], strict=True)
        return {"room": [a - b if a is not None and b is not None else None for a, b in rows]}

    made = [
        FeatureService(
            name=name, tags=tags,
            features=[newest if "millrace.transformers" in tags else newest[["amount"]], by_user, derived],
        )
        for name, tags in services.items()
    ]  # fmt: skip
    return [events, *others, user, by_user, newest, derived, *made]


def stamp(instant: datetime) -> Timestamp:
    out = Timestamp()
    out.FromDatetime(instant)
    return out


def step(kind: str, *inputs: str, output: str = "", **parameters: Any) -> transformers_pb2.TransformerStep:
    return transformers_pb2.TransformerStep(
        kind=kind, inputs=inputs, output=output, parameters=json_format.ParseDict(parameters, struct_pb2.Struct())
    )


STEPS = [
    step("onehot", "newest__note", unknown="other"),
    step("tfidf", "newest__note", output="words", buckets=16),
    step("impute", "newest__amount", output="amount", strategy="median"),
    step("standard", "amount"),
    step("bin", "by_user__amount_sum_60m", output="sum_bin", bins=3, encode="onehot"),
    step("robust", "derived__room"),
]


async def failure(call) -> MillraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return MillraceError.from_rpc(caught.value)


class Calls:
    """Both services of one process."""

    def __init__(self, channel: grpc.aio.Channel, registry: Any) -> None:
        self.features = feature_pb2_grpc.FeatureServiceStub(channel)
        self.versions = versions_pb2_grpc.DefinitionsServiceStub(channel)
        self.fitted = transformers_pb2_grpc.TransformerServiceStub(channel)
        self._registry = registry

    async def apply(self, **services: dict[str, str]) -> feature_pb2.ApplyDefinitionsResponse:
        content = self._registry(objects(**services))
        request = feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=content)
        return await self.features.ApplyDefinitions(request)

    async def training_set(self, service: str = "", features: list[str] | None = None) -> feature_pb2.TrainingSet:
        request = feature_pb2.BuildTrainingSetRequest(
            feature_service=service, features=features or [], entity_contract="asks", label_contract="answers",
            join_column="ask_id", label_column="late",
        )  # fmt: skip
        return (await self.features.BuildTrainingSet(request)).training_set

    async def fit(self, *steps: transformers_pb2.TransformerStep, training_set: str) -> transformers_pb2.Transformer:
        request = transformers_pb2.FitTransformerRequest(name="encoding", training_set=training_set, steps=steps)
        return (await self.fitted.FitTransformer(request)).transformer

    async def online(self, service: str, row: dict[str, Any], definitions: str = "") -> dict[str, float]:
        values = {
            "user": common_pb2.Value(string_value=row["user"]),
            "limit": common_pb2.Value() if row["limit"] is None else common_pb2.Value(double_value=row["limit"]),
        }
        request = feature_pb2.GetOnlineFeaturesRequest(
            feature_service=service,
            rows=[feature_pb2.EntityRow(values=values)],
            event_time=stamp(row["asked_at"]),
            definitions_hash=definitions,
        )
        answer = await self.features.GetOnlineFeatures(request)
        return dict(zip(answer.feature_names, answer.vectors[0].values, strict=True))


@asynccontextmanager
async def serving(world, make_registry) -> AsyncIterator[Calls]:
    service = await build(world.settings, clock=FakeClock())
    async with running(service, world.settings) as address, open_channel(address, timeout_s=120) as channel:
        yield Calls(channel, make_registry)


def land(world, rows: int = 120) -> tuple[list[Any], list[dict[str, Any]]]:
    """Random rows in the lake; returns the facts to publish and the asks."""
    draw = random.Random(5)
    events = [
        {"event_id": f"e{i}", "at": BASE + timedelta(minutes=draw.uniform(0, 400)), "user": f"u{draw.randrange(6)}",
         "amount": draw.choice([None, *range(-5, 50)]), "note": draw.choice(NOTES)}
        for i in range(rows)
    ]  # fmt: skip
    asks = [
        {"ask_id": f"a{i}", "asked_at": BASE + timedelta(minutes=draw.uniform(0, 400)), "user": f"u{draw.randrange(7)}",
         "limit": draw.choice([None, 10.0, 99.5])}
        for i in range(rows)
    ]  # fmt: skip
    answers = [
        {"ask_id": a["ask_id"], "at": a["asked_at"] + timedelta(minutes=3), "late": draw.random() < 0.4} for a in asks
    ]
    facts = [world.land("events", pa.Table.from_pylist(events, EVENTS))]
    world.land("asks", pa.Table.from_pylist(asks, ASKS))
    world.land("answers", pa.Table.from_pylist(answers, ANSWERS))
    return facts, asks


def rows_of(training_set: feature_pb2.TrainingSet) -> pa.Table:
    content = ContentStore(training_set.store_url).read(training_set.data.sha256)
    return pq.read_table(pa.BufferReader(content))


async def test_a_tag_makes_the_same_vector_online_and_in_training_sets(world, make_registry, wait_for_records) -> None:
    facts, asks = land(world)
    async with serving(world, make_registry) as calls:
        plain = await calls.apply(plain={})
        raw = await calls.training_set(features=RAW)
        table = rows_of(raw)
        assert table.column("newest__note").type == pa.string()
        assert list(raw.feature_names) == RAW
        assert (await calls.features.BuildTrainingSet(raw.request)).training_set.digest == raw.digest
        made = await calls.fit(*STEPS, training_set=raw.digest)
        assert (made.version, list(made.inputs), made.rows) == (1, RAW, 120)
        assert made == await calls.fit(*STEPS, training_set=raw.digest)
        tagged = await calls.apply(plain={}, tagged={"millrace.transformers": "encoding@1"})
        assert tagged.definitions_hash != plain.definitions_hash
        await world.publish(*facts)
        await wait_for_records(calls.features, events=120)
        built = await calls.training_set("tagged")
        expected = [f"encoding__{name}" for name in made.outputs]
        assert list(built.feature_names) == expected
        assert "encoding__newest__note=crew" in expected
        offline = {row["ask_id"]: row for row in rows_of(built).to_pylist()}
        seen = set()
        for ask in asks:
            online = await calls.online("tagged", ask)
            found = np.array([offline[ask["ask_id"]][name] for name in expected])
            assert np.array([online[name] for name in expected]).tobytes() == found.tobytes()
            seen.add(found.tobytes())
        assert len(seen) > 50
        # A model reads with the definitions it was trained with, whatever a newer transformer makes of the same rows.
        trained = tagged.definitions_hash
        pin = versions_pb2.PinDefinitionsRequest(definitions_hash=trained, name="model m 1")
        await calls.versions.PinDefinitions(pin)
        other = [step("onehot", "newest__note", unknown="other"), step("minmax", "by_user__amount_sum_60m")]
        assert (await calls.fit(*other, training_set=raw.digest)).version == 2
        await calls.apply(plain={}, tagged={"millrace.transformers": "encoding@2"})
        await wait_for_records(calls.features, events=120)
        for ask in asks[:30]:
            assert [*(await calls.online("tagged", ask))] != expected
            online = await calls.online("tagged", ask, trained)
            found = np.array([offline[ask["ask_id"]][name] for name in expected])
            assert np.array([online[name] for name in expected]).tobytes() == found.tobytes()
        await calls.apply(plain={}, tagged={"millrace.transformers": "encoding@1"})
    async with serving(world, make_registry) as calls:  # the plan in the database holds the transformer
        await wait_for_records(calls.features, events=120)
        again = await calls.online("tagged", asks[0])
        assert [*again] == expected


async def test_target_encoding_leaves_out_a_rows_own_fold_in_training_sets_alone(
    world, make_registry, wait_for_records
) -> None:
    facts, asks = land(world)
    async with serving(world, make_registry) as calls:
        await calls.apply(plain={})
        raw = await calls.training_set(features=["newest__note"])
        await calls.fit(step("target", "newest__note", output="late", folds=3), training_set=raw.digest)
        await calls.apply(tagged={"millrace.transformers": "encoding@1"})
        await world.publish(*facts)
        await wait_for_records(calls.features, events=120)
        built = rows_of(await calls.training_set("tagged")).to_pylist()
        notes = {row["ask_id"]: row["newest__note"] for row in rows_of(raw).to_pylist()}
        by_ask = {ask["ask_id"]: ask for ask in asks}
        online: dict[Any, set[float]] = {}
        offline: dict[Any, set[float]] = {}
        for row in built:
            note = notes[row["ask_id"]]
            vector = await calls.online("tagged", by_ask[row["ask_id"]])
            online.setdefault(note, set()).add(vector["encoding__late"])
            offline.setdefault(note, set()).add(row["encoding__late"])
    assert {len(values) for values in online.values()} == {1}
    assert {len(values) for values in offline.values()} == {3}


async def test_references_and_inputs_are_checked_when_definitions_are_applied(world, make_registry) -> None:
    land(world)
    async with serving(world, make_registry) as calls:
        await calls.apply(plain={})
        raw = await calls.training_set(features=RAW)
        made = await calls.fit(step("onehot", "newest__note"), training_set=raw.digest)
        tag = "millrace.transformers"
        for value, problem in (
            ("encoding@2", "encoding@2"), ("encoding", "name@version"), ("other@1", "other@1"),
            ("encoding@1,encoding@1", "twice"),
        ):  # fmt: skip
            assert problem in (await failure(calls.apply(tagged={tag: value}))).message
        await calls.apply(tagged={tag: f"encoding@{made.digest}"})
        texts = await calls.features.GetDefinitions(feature_pb2.GetDefinitionsRequest())
        assert "newest__note" not in texts.feature_services[0].features
        error = await failure(calls.fit(step("standard", "newest__note"), training_set=raw.digest))
        assert (error.reason, "needs numbers" in error.message) == ("INVALID_FIELD", True)
        assert (await failure(calls.fit(step("keep", "x"), training_set="0" * 64))).code is grpc.StatusCode.NOT_FOUND
        assert "no view__feature" in (await failure(calls.training_set(features=["nothing__there"]))).message


async def test_a_selection_is_kept_and_narrows_a_vector(world, make_registry) -> None:
    land(world)
    async with serving(world, make_registry) as calls:
        await calls.apply(plain={})
        built = await calls.training_set("plain")
        scores = [
            transformers_pb2.FeatureScore(feature="newest__amount", selected=True, scores={"mutual_information": 0.2}),
            transformers_pb2.FeatureScore(feature="derived__room", reason="constant"),
        ]
        asked = transformers_pb2.Selection(name="best", training_set=built.digest, features=scores)
        kept = (await calls.fitted.RecordSelection(transformers_pb2.RecordSelectionRequest(selection=asked))).selection
        assert (kept.version, len(kept.digest)) == (1, 64)
        again = await calls.fitted.RecordSelection(transformers_pb2.RecordSelectionRequest(selection=asked))
        assert again.selection == kept
        listed = (await calls.fitted.ListSelections(transformers_pb2.ListSelectionsRequest())).selections
        assert list(listed) == [kept]
        await calls.apply(plain={}, narrow={"millrace.selection": "best@1"})
        assert list((await calls.training_set("narrow")).feature_names) == ["newest__amount"]
        scores[0].feature = "nobody__knows"
        unknown = transformers_pb2.Selection(name="best", training_set=built.digest, features=scores)
        await calls.fitted.RecordSelection(transformers_pb2.RecordSelectionRequest(selection=unknown))
        assert "nobody__knows" in (await failure(calls.apply(narrow={"millrace.selection": "best@2"}))).message


def test_a_function_that_exits_is_an_error_of_its_view() -> None:
    import dill

    def leaves(_inputs: dict) -> dict:
        raise SystemExit(3)

    body = dill.dumps(leaves, recurse=True)
    runner = TransformRunner(Transform("view", (), ("a",), ("out",), singleton=False, body=body))
    with pytest.raises(FailedPreconditionError, match="'view' failed: SystemExit"):
        runner.run({}, {"a": [1.0]}, 1)


def test_a_short_name_of_two_views_is_no_input() -> None:
    import dill

    body = dill.dumps(lambda inputs: {"out": inputs["x"]}, recurse=True)
    pairs = (("first", "x"), ("second", "x"))
    runner = TransformRunner(Transform("view", pairs, (), ("out",), singleton=False, body=body))
    with pytest.raises(FailedPreconditionError, match="KeyError: 'x'"):
        runner.run({("first", "x"): [1.0], ("second", "x"): [2.0]}, {}, 1)


@pytest.mark.parametrize(
    ("mode", "output", "problem"), [("pandas", "room", "not pandas"), ("python", "limit", "'limit', which is")]
)
def test_functions_that_feast_would_skip_or_run_in_pandas_are_refused(make_registry, mode, output, problem) -> None:
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64

    request = RequestSource(name="asked", schema=[Field(name="limit", dtype=Float64)])

    @on_demand_feature_view(sources=[request], mode=mode, schema=[Field(name=output, dtype=Float64)])
    def twice(inputs):
        return {"room": inputs["limit"], "limit": inputs["limit"]}

    from feast import FeatureService

    registry = make_registry([twice, FeatureService(name="s", features=[twice])])
    with pytest.raises(InvalidArgumentError, match=f"'twice'.*{problem}"):
        compile_registry("test", registry)


async def test_what_was_learned_is_for_those_who_may_read_what_it_was_learned_from(world, make_registry) -> None:
    from feast import Entity
    from feast.permissions.action import AuthzedAction
    from feast.permissions.permission import Permission
    from feast.permissions.policy import RoleBasedPolicy
    from feast.protos.feast.core.Registry_pb2 import Registry

    land(world)
    async with serving(world, make_registry) as calls:
        await calls.apply(plain={})
        raw = await calls.training_set(features=RAW)
        await calls.fit(step("onehot", "newest__note"), training_set=raw.digest)
        score = transformers_pb2.FeatureScore(feature="newest__amount", selected=True)
        asked = transformers_pb2.Selection(name="best", training_set=raw.digest, features=[score])
        await calls.fitted.RecordSelection(transformers_pb2.RecordSelectionRequest(selection=asked))
        rules = Registry.FromString(make_registry(objects(plain={})))
        policy = RoleBasedPolicy(roles=["somebody"])
        rule = Permission(name="entities", types=Entity, actions=[AuthzedAction.DESCRIBE], policy=policy)
        rules.permissions.append(rule.to_proto())
        request = feature_pb2.ApplyDefinitionsRequest(project="test", feast_registry=rules.SerializeToString())
        await calls.features.ApplyDefinitions(request)
        pb = transformers_pb2
        for call in (
            calls.fit(step("onehot", "newest__note"), training_set=raw.digest),
            calls.fitted.GetTransformer(pb.GetTransformerRequest(name="encoding")),
            calls.fitted.RecordSelection(pb.RecordSelectionRequest(selection=asked)),
            calls.fitted.GetSelection(pb.GetSelectionRequest(name="best")),
        ):
            assert (await failure(call)).reason == "FEATURE_ACCESS_DENIED"
        assert not (await calls.fitted.ListTransformers(pb.ListTransformersRequest())).transformers
        assert not (await calls.fitted.ListSelections(pb.ListSelectionsRequest())).selections
