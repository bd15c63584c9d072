"""Values of outcomes beside the label, by version and segment, joined in either order and counted once; what is no evidence."""

import grpc.aio
import numpy as np
import pyarrow as pa
import pytest
from millrace_api.drift.v1 import drift_pb2
from millrace_drift_monitor.records import Outcome
from millrace_drift_monitor.tracking import MAX_SEGMENTS, Tracked, value_of

on_both = pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
REVENUE = drift_pb2.TrackedValue(metric="business/revenue", lower=0, upper=100, segment="outcome/carrier")
BY_HOUR = drift_pb2.TrackedValue(metric="outcome/accuracy", segment="feature/hour")


async def track(stub, *values: drift_pb2.TrackedValue) -> None:
    await stub.SetTrackedValues(drift_pb2.SetTrackedValuesRequest(model="flight-delay", values=values))


async def sums(stub, place: int = 0) -> dict[tuple[str, str], tuple[float, ...]]:
    """(count, sum, sum of squares, clipped) of one tracked value by (version, segment)."""
    answer = await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))
    figures = answer.tracked[place].figures if len(answer.tracked) > place else ()
    return {(f.version, f.segment): (f.count, f.sum, f.square_sum, f.clipped) for f in figures}


async def until_counted(
    helpers, stub, version: str, count: int, place: int = 0
) -> dict[tuple[str, str], tuple[float, ...]]:
    async def question():
        found = await sums(stub, place)
        return found if found.get((version, ""), (0,))[0] == count else None

    return await helpers.until(question)


def records(rows: dict[str, tuple[bool, float | None, str | None]]) -> pa.Table:
    labels, revenue, carriers = zip(*rows.values(), strict=True)
    return pa.table({"flight_id": [*rows], "late": [*labels], "revenue": [*revenue], "carrier": [*carriers]})


async def known(helpers, world, stub) -> None:
    """Until the monitor has asked the registry, so that outcomes are read."""
    await world.predict(helpers.predictions(helpers.draw(np.random.default_rng(0), 1), helpers.july, prefix="first"))
    await world.land({"first-0": False})

    async def question():
        answer = await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))
        return [v for v in answer.versions if v.outcomes]

    await helpers.until(question)


@on_both
async def test_values_are_summed_by_version_and_segment_whatever_comes_first_and_once(world, stub, helpers) -> None:
    await known(helpers, world, stub)
    await track(stub, REVENUE, BY_HOUR)
    x = helpers.draw(np.random.default_rng(0), 6)
    x[:, 2] = [7, 7, 7, 9, 9, np.nan]
    made = helpers.predictions(x, helpers.july, prefix="a", scores=np.array([0.9, 0.1, 0.9, 0.9, 0.1, 0.9]))
    rows = {
        "a-0": (True, 10.0, "UA"), "a-1": (True, 500.0, "UA"), "a-2": (False, None, "UA"),
        "a-3": (False, float("nan"), "DL"), "a-4": (False, 3.0, None), "a-5": (True, -2.5, "DL"),
    }  # fmt: skip
    await world.predict(made[:3], offset=2)
    await world.land_table(records(rows), offset=2)
    await world.predict(made[3:], offset=3)
    await world.land_table(records(rows), offset=2)  # the same batch
    await world.land_table(records({"a-0": (True, 99.0, "DL")}), offset=3)  # a second outcome changes nothing
    await world.predict(made[:2], offset=4)
    found = await until_counted(helpers, stub, "1.0.0", 4)
    # 500 counts as 100 and -2.5 as 0; without a number there is no value, without a carrier an unknown one.
    assert found == {
        ("1.0.0", ""): (4, 113.0, 10109.0, 2),
        ("1.0.0", "UA"): (2, 110.0, 10100.0, 1),
        ("1.0.0", "DL"): (1, 0.0, 0.0, 1),
        ("1.0.0", "unknown"): (1, 3.0, 9.0, 0),
    }
    right = await until_counted(helpers, stub, "1.0.0", 6, place=1)
    assert {segment: found[:2] for (_, segment), found in right.items()} == {
        "": (6, 3.0), "7": (3, 1.0), "9": (2, 1.0), "unknown": (1, 1.0),
    }  # fmt: skip
    answer = await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="a-1.0.0-1"))
    assert dict(answer.outcome_values) == {"revenue": 500.0}
    # What stays keeps its sums, what goes loses them.
    await track(stub, BY_HOUR)
    assert (await sums(stub))["1.0.0", ""][:2] == (6, 3.0)
    await track(stub, REVENUE, BY_HOUR)
    assert (await sums(stub))["1.0.0", ""][:2] == (6, 3.0)
    assert await sums(stub, 1) == {}


async def test_segments_beyond_the_first_ones_are_others(world, stub, helpers) -> None:
    await known(helpers, world, stub)
    await track(stub, REVENUE)
    count = MAX_SEGMENTS + 4
    x = helpers.draw(np.random.default_rng(0), count)
    for version in ("1.0.0", "1.1.0"):
        await world.predict(helpers.predictions(x, helpers.july, prefix="s", version=version))
    for first in (0, 10):
        part = range(first, min(first + 10, count))
        await world.land_table(records({f"s-{i}": (True, 1.0, f"c{i:02}") for i in part}))
    found = await until_counted(helpers, stub, "1.1.0", count)
    for version in ("1.0.0", "1.1.0"):
        assert found[version, "other"][:2] == (4, 4.0)
        assert {s for v, s in found if v == version} == {"", "other", *(f"c{i:02}" for i in range(MAX_SEGMENTS))}


async def test_a_numeric_label_has_errors_and_a_side_of_the_threshold(world, helpers) -> None:
    world.registry.outcome.MergeFrom(type(world.registry.outcome)(label_column="minutes", threshold=15, numeric=True))
    async with world.monitor() as stub:
        await track(
            stub, *(drift_pb2.TrackedValue(metric=f"outcome/{name}", lower=0, upper=50) for name in ("mae", "mse"))
        )
        x = helpers.draw(np.random.default_rng(0), 3)
        await world.predict(helpers.predictions(x, helpers.july, scores=np.array([20.0, 10.0, 0.0])))
        await world.land_table(pa.table({"flight_id": ["p-0", "p-1", "p-2"], "minutes": [26.0, 8.0, 1.0]}))
        found = await until_counted(helpers, stub, "1.0.0", 3)
        assert found["1.0.0", ""] == (3, 6.0 + 2 + 1, 36.0 + 4 + 1, 0)
        assert (await sums(stub, 1))["1.0.0", ""] == (3, 36.0 + 4 + 1, 36.0**2 + 16 + 1, 0)
        await world.predict(helpers.predictions(x[:1], helpers.july, prefix="q", scores=np.array([90.0])))
        await world.land_table(pa.table({"flight_id": ["q-0"], "minutes": [0]}))
        assert (await until_counted(helpers, stub, "1.0.0", 4))["1.0.0", ""] == (4, 9.0 + 50, 41.0 + 2500, 1)
        [version] = (await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))).versions
        assert (version.outcomes, version.correct, version.brier_sum) == (4, 3, 1.0)
        answer = await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-0"))
        assert (answer.outcome, dict(answer.outcome_values)) == (True, {"minutes": 26.0})


@on_both
async def test_calls_of_testers_and_answers_given_again_are_found_and_count_for_nothing(world, helpers) -> None:
    rng = np.random.default_rng(1)
    async with world.monitor() as stub:
        await known(helpers, world, stub)
        await track(stub, REVENUE)
        made = helpers.predictions(helpers.draw(rng, 90), helpers.july, prefix="e", scores=rng.beta(2, 6, 90))
        for number, prediction in enumerate(made):
            prediction.client = "me"
            prediction.pinned, prediction.cached = number % 3 == 1, number % 3 == 2
            if number % 3:  # as unlike the rest as can be
                prediction.features[:] = [1e6, 1e6, 1e6]
                prediction.outputs[:] = [1.0]
        rows = {f"e-{i}": (i % 2 == 0, 100.0 if i % 3 else 1.0, "UA") for i in range(90)}
        await world.predict(made[:45])
        await world.land_table(records(rows))
        await world.predict(made[45:])
        assert (await until_counted(helpers, stub, "1.0.0", 30))["1.0.0", "UA"] == (30, 30.0, 30.0, 0)
        answer = await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))
        [version] = answer.versions
        assert (version.predictions, version.outcomes) == (31, 31)
        assert sum(one.count for one in version.scores) == 31
        since = drift_pb2.GetOutcomesRequest(model="flight-delay")
        since.predicted_since.FromDatetime(helpers.morning.replace(microsecond=1000))
        [exact] = (await stub.GetOutcomes(since)).versions
        assert exact.predictions == 29, "the two made in the first millisecond are left out"
        # A reference that comes after its predictions is compared with what is evidence only.
        await stub.SetReference(world.training_set())
        await stub.CloseWindows(drift_pb2.CloseWindowsRequest(model="flight-delay"))
        [report] = (await stub.ListWindows(drift_pb2.ListWindowsRequest())).windows
        assert (report.predictions, report.outcomes, len(report.findings)) == (31, 31, 0)
        for number, marks in ((0, (False, False)), (1, (True, False)), (2, (False, True)), (88, (True, False))):
            request = drift_pb2.GetPredictionRequest(prediction_id=f"e-1.0.0-{number}")
            shown = await stub.GetPrediction(request)
            assert ((shown.pinned, shown.cached), shown.client, shown.outcome) == (marks, "me", number % 2 == 0)


async def test_a_model_with_testers_alone_is_no_trouble(world, stub, helpers) -> None:
    made = helpers.predictions(helpers.draw(np.random.default_rng(0), 5), helpers.july)
    for prediction in made:
        prediction.pinned = True
    await world.predict(made)

    async def question():
        try:
            return await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-4"))
        except grpc.aio.AioRpcError:
            return None

    assert (await helpers.until(question)).pinned
    assert not (await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))).versions


def test_a_metric_without_a_value_is_none() -> None:
    class One:
        score, is_correct, error, outcome = None, False, 0.0, Outcome(True, 1.0, {"carrier": "UA"})

    metrics = [
        "outcome/accuracy",
        "outcome/brier",
        "outcome/mae",
        "outcome/mse",
        "business/carrier",
        "business/revenue",
    ]
    assert [value_of(metric, One) for metric in metrics] == [None] * 6
    assert Tracked("business/revenue", 0.0, 1.0, "outcome/carrier").columns == {"revenue", "carrier"}
