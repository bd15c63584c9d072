"""Ensembles and cascades declared with a version: what is asked, what becomes of it, and what a part that fails does."""

import asyncio
import contextlib
from collections.abc import Sequence

import grpc
import grpc.aio
import models
import pytest
from gateway import CANDIDATE, Features, arm, gateway, on_the_bus, route
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.graphs import Cascade, Ensemble, Part, check_trail, graph_of
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from millrace_kit.predict_plan import check_plan

finite = st.floats(-1e6, 1e6)


def plan(**fields: object) -> rollout_pb2.PredictPlan:
    return json_format.ParseDict(fields, rollout_pb2.PredictPlan())


def graph(**fields: object) -> Ensemble | Cascade:
    made = plan(**fields)
    check_plan(made, "predict")
    found = graph_of(made)
    assert found is not None
    return found


def answers(**outputs: Sequence[float] | None):
    async def ask(part: Part) -> prediction_pb2.PredictResponse:
        found = outputs[part.model]
        if found is None:
            raise UnavailableError("AWAY", f"{part.model} is away", {})
        return prediction_pb2.PredictResponse(model=part.model, outputs=found)

    return ask


@given(
    st.lists(st.tuples(finite, finite), min_size=2, max_size=5), st.lists(st.floats(0.1, 10), min_size=5, max_size=5)
)
def test_outputs_become_one(rows: list[tuple[float, float]], weights: list[float]) -> None:
    names = [f"m{n}" for n in range(len(rows) - 1)]
    members = [{"model": name, "weight": weight} for name, weight in zip(names, weights[1:], strict=False)]
    ask = answers(**dict(zip(names, rows[1:], strict=True)))

    def combined(kind: str) -> list[float]:
        made = graph(ensemble={"members": members, "combination": f"COMBINATION_{kind}", "ownWeight": weights[0]})
        found = asyncio.run(made.joined(rows[0], ask))
        assert [each.model for each in found.parts] == names
        return list(found.outputs)

    used = weights[: len(rows)]
    mean = [sum(w * row[i] for w, row in zip(used, rows, strict=True)) / sum(used) for i in (0, 1)]
    assert combined("MEAN") == pytest.approx(mean, rel=1e-9, abs=1e-6)
    assert combined("MAX") == [max(row[i] for row in rows) for i in (0, 1)]
    assert combined("MIN") == [min(row[i] for row in rows) for i in (0, 1)]
    assert combined("CONCATENATION") == [value for row in rows for value in row]
    middle = sorted(row[0] for row in rows)
    assert middle[0] <= combined("MEDIAN")[0] <= middle[-1]


async def test_members_that_are_not_needed_may_be_missing_and_others_may_not() -> None:
    made = graph(ensemble={"members": [{"model": "a", "optional": True}, {"model": "b", "weight": 3}]})
    found = await made.joined([1.0], answers(a=None, b=[5.0]))
    assert (found.outputs, found.left_out) == ([4.0], ["a"])
    with pytest.raises(UnavailableError.__mro__[1], match="'b', asked for its part: b is away") as caught:
        await made.joined([1.0], answers(a=[1.0], b=None))
    assert caught.value.metadata["part"] == "b"
    with pytest.raises(FailedPreconditionError, match="'b' gives 2 outputs, 1 are needed"):
        await made.joined([1.0], answers(a=[1.0], b=[1.0, 2.0]))


@pytest.mark.parametrize(
    ("when", "outputs", "unsure"),
    [
        ({"between": {"min": 0.4, "max": 0.6}}, [0.5], True),
        ({"between": {"min": 0.4, "max": 0.6}}, [0.6], True),
        ({"between": {"min": 0.4, "max": 0.6}}, [0.61], False),
        ({"between": {"min": 0.4, "max": 0.6}}, [float("nan")], True),
        ({"topBelow": 0.8}, [0.1, 0.79], True),
        ({"topBelow": 0.8}, [0.1, 0.8], False),
        ({"topBelow": 0.8}, [float("nan")], True),
        ({"marginBelow": 0.2}, [0.5, 0.4], True),
        ({"marginBelow": 0.2}, [0.1, 0.6, 0.3], False),
        ({"marginBelow": 0.2}, [0.9], True),
    ],
)
async def test_a_cascade_asks_where_the_model_is_not_sure(when: dict, outputs: list[float], unsure: bool) -> None:
    found = await graph(cascade={"model": "b", **when}).joined(outputs, answers(b=[7.0]))
    assert (found.instead is not None) == unsure
    optional = graph(cascade={"model": "b", "optional": True, **when})
    assert (await optional.joined(outputs, answers(b=None))).left_out == (["b"] if unsure else [])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cascade": {"model": "b"}}, "predict.cascade"),
        ({"cascade": {"model": "no name", "topBelow": 1}}, "predict.cascade.model"),
        ({"cascade": {"model": "b", "topBelow": "NaN"}}, "predict.cascade.top_below"),
        ({"cascade": {"model": "b", "between": {"min": 2, "max": 1}}}, "predict.cascade.between"),
        ({"cascade": {"model": "b", "topBelow": 1, "timeoutMs": -1}}, "predict.cascade.timeout_ms"),
        ({"ensemble": {}}, "predict.ensemble.members"),
        ({"ensemble": {"members": [{"model": "b"}] * 2}}, "predict.ensemble.members[1].model"),
        ({"ensemble": {"members": [{"model": "b", "weight": -1}]}}, "predict.ensemble.members[0].weight"),
        ({"ensemble": {"members": [{"model": f"b{n}"} for n in range(9)]}}, "predict.ensemble.members"),
        (
            {"ensemble": {"members": [{"model": "b", "optional": True}], "combination": "COMBINATION_CONCATENATION"}},
            "predict.ensemble.members[0].optional",
        ),
        ({"ensemble": {"members": [{"model": "b"}]}, "cache": {"maxAgeMs": 5}}, "predict.cache"),
    ],
)
def test_what_is_wrong_is_named(fields: dict, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_plan(plan(**fields), "predict")
    assert caught.value.field == field


def test_circles_and_long_ways_are_refused() -> None:
    check_trail(("a", "b", "c"), "d")
    with pytest.raises(FailedPreconditionError, match="a → b → a"):
        check_trail(("a", "b"), "a")
    with pytest.raises(FailedPreconditionError, match="more than 4"):
        check_trail(("a", "b", "c", "d"), "e")


async def test_parts_are_predictions_of_their_own_with_the_callers_side_kept() -> None:
    async with contextlib.AsyncExitStack() as stack:
        g, rollout = await stack.enter_async_context(gateway(features=Features()))

        async def served(model: str, version: str) -> tuple[models.Model, str]:
            made = models.Model(version, model)
            return made, await stack.enter_async_context(models.serving(made))

        _, small = await served("small", "1.0.0")
        large, large_one = await served("large", "1.0.0")
        _, large_two = await served("large", "1.1.0")
        expert, expert_at = await served("expert", "2.0.0")

        first = arm("1.0.0", small)
        first.predict.CopyFrom(plan(cascade={"model": "large", "between": {"min": 5, "max": 100}}))
        ensemble = {
            "members": [{"model": "expert", "optional": True, "timeoutMs": 2000}],
            "combination": "COMBINATION_MAX",
        }
        arms = [arm("1.0.0", large_one, weight=50), arm("1.1.0", large_two, weight=50, role=CANDIDATE)]
        for each in arms:
            each.predict.CopyFrom(plan(ensemble=ensemble, post=[{"clip": {"min": 0, "max": 8}}]))
        last = arm("2.0.0", expert_at)
        routes = [route(first, model="small"), route(*arms, model="large"), route(last, model="expert")]
        await rollout.in_force(rollout.set(*routes))

        async def predict(sticky: str, a: float) -> prediction_pb2.PredictResponse:
            asked = prediction_pb2.PredictRequest(model="small", subject="flight", sticky_key=sticky)
            asked.inputs["a"].double_value = a
            return await g.predictions.Predict(asked, timeout=10)

        sure = await predict("u0", 2.0)
        assert (list(sure.outputs), list(sure.parts), list(sure.model_outputs)) == ([2.0], [], [2.0])
        found = [await predict(f"u{n % 8}", 9.0) for n in range(16)]
        for answer in found:
            assert (list(answer.outputs), list(answer.model_outputs), answer.model) == ([8.0], [9.0], "small")
            assert [(part.model, list(part.outputs)) for part in answer.parts] == [("large", [8.0]), ("expert", [9.0])]
        # A caller is on one side of the other model's split, whenever it comes by the graph.
        sides = {f"u{n % 8}": answer.parts[0].version for n, answer in enumerate(found)}
        assert all(sides[f"u{n % 8}"] == answer.parts[0].version for n, answer in enumerate(found))
        assert set(sides.values()) == {"1.0.0", "1.1.0"}

        logged = {p.prediction_id: p for p in await on_the_bus(g, 49)}
        mine = logged[found[0].prediction_id]
        assert (list(mine.outputs), list(mine.answered), mine.parent_id) == ([9.0], [8.0], "")
        by_large = logged[found[0].parts[0].prediction_id]
        assert (by_large.model, by_large.parent_id, by_large.subject) == ("large", mine.prediction_id, "flight")
        assert logged[found[0].parts[1].prediction_id].parent_id == by_large.prediction_id

        # One that is not needed and fails is left out; one that is needed fails the call, row by row.
        expert.fail = grpc.StatusCode.INTERNAL
        missing = await predict("u1", 7.0)
        assert (list(missing.outputs), list(missing.left_out_models)) == ([7.0], ["expert"])
        assert [part.model for part in missing.parts] == ["large"]
        await rollout.in_force(rollout.set(*routes[::2]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await predict("u1", 7.0)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'large', asked for its part: no model named 'large'" in caught.value.details()
        batch = prediction_pb2.PredictBatchRequest(model="small")
        for value in (1.0, 7.0, 2.0):
            batch.rows.add().inputs["a"].double_value = value
        results = (await g.predictions.PredictBatch(batch, timeout=10)).results
        assert [each.WhichOneof("result") for each in results] == ["response", "failure", "response"]
        assert large.calls
