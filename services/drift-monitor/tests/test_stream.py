"""Predictions and outcomes through a real bus and a real gRPC server: joined in either order, counted once, lost never."""

from collections import Counter

import grpc
import grpc.aio
import numpy as np
import pyarrow as pa
import pytest
from millrace_api.drift.v1 import drift_pb2
from millrace_api.events.v1 import events_pb2
from millrace_drift_monitor.scores import bucket
from millrace_kit.bus import DRIFT, PREDICTIONS, Outgoing

on_both = pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


async def figures(stub, model="flight-delay", since=None) -> dict[str, tuple[int, int, int]]:
    request = drift_pb2.GetOutcomesRequest(model=model)
    if since is not None:
        request.predicted_since.FromMicroseconds(since)
    answer = await stub.GetOutcomes(request)
    return {v.version: (v.predictions, v.outcomes, v.correct) for v in answer.versions}


async def reaches(helpers, stub, expected, **kwargs) -> None:
    async def question():
        return await figures(stub, **kwargs) == expected

    try:
        await helpers.until(question)
    except TimeoutError:
        pytest.fail(f"{await figures(stub, **kwargs)} is not {expected}")


@on_both
async def test_outcomes_join_in_either_order_and_count_once(world, stub, helpers) -> None:
    x = helpers.draw(np.random.default_rng(0), 40)
    made = helpers.predictions(x, helpers.july, scores=np.linspace(0, 1, 40))
    labels = {f"p-{i}": i % 2 == 0 for i in range(40)}
    right = sum((score >= 0.5) == (i % 2 == 0) for i, score in enumerate(np.linspace(0, 1, 40)))
    await world.predict(made[:20], offset=1)
    await reaches(helpers, stub, {"1.0.0": (20, 0, 0)})
    await world.land(labels, offset=1)
    await world.predict(made[20:], offset=2)
    await world.predict(made[20:], offset=2)  # the same batch
    await world.predict(made[10:30], offset=3)  # the same predictions in another batch
    await world.land(labels, offset=1)
    await world.land({"p-0": False}, offset=2)  # a second outcome of a subject changes nothing
    await world.predict(helpers.predictions(x[:1], helpers.july, prefix="last"), offset=4)
    await reaches(helpers, stub, {"1.0.0": (41, 40, right)})
    answer = await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))
    errors = [(score - (i % 2 == 0)) ** 2 for i, score in enumerate(np.linspace(0, 1, 40))]
    assert answer.versions[0].brier_sum == pytest.approx(sum(errors))
    assert answer.versions[0].brier_square_sum == pytest.approx(sum(e * e for e in errors))
    scores = [p.outputs[0] for p in (*made, helpers.predictions(x[:1], helpers.july, prefix="last")[0])]
    expected = Counter(bucket(score) for score in scores)
    assert {one.bucket: one.count for one in answer.versions[0].scores} == expected


def test_buckets_rise_with_the_score_and_are_narrow() -> None:
    scores = [-1e30, -3.0, -0.51, -1e-20, 0.0, 1e-20, 1e-4, 0.1, 0.5, 0.55, 0.9, 0.99, 1.0, 7.0, 1e30]
    found = [bucket(score) for score in scores]
    assert found == sorted(found)
    assert bucket(0.0) == bucket(1e-20) == 0
    assert bucket(0.5) != bucket(0.5625) != bucket(0.625)
    assert bucket(0.5) == bucket(0.56)


@on_both
async def test_predicted_since_is_exact_inside_a_span(world, stub, helpers) -> None:
    # Predictions are 7 ms apart from a round minute, so 3000 of them cross two borders of ten seconds.
    x = helpers.draw(np.random.default_rng(0), 3000)
    await world.predict(helpers.predictions(x, helpers.july))
    await reaches(helpers, stub, {"1.0.0": (3000, 0, 0)})
    await world.land({f"p-{i}": i % 3 == 0 for i in range(3000)})
    await reaches(helpers, stub, {"1.0.0": (3000, 3000, 2000)})
    start = int(helpers.morning.timestamp()) * 1_000_000
    for first in (0, 1, 500, 1429, 2900, 2999):
        left = range(first, 3000)
        expected = (len(left), len(left), sum(i % 3 != 0 for i in left))
        assert await figures(stub, since=start + first * 7000) == {"1.0.0": expected}, first
    assert await figures(stub, since=start + 60_000_000) == {}


@on_both
async def test_outcomes_are_found_although_the_registry_was_down(world, helpers) -> None:
    world.registry.is_down = True
    async with world.monitor() as stub:
        made = helpers.predictions(helpers.draw(np.random.default_rng(0), 30), helpers.july)
        await world.land({f"p-{i}": False for i in range(15)})
        await world.predict(made)
        await reaches(helpers, stub, {"1.0.0": (30, 0, 0)})

        async def was_asked():
            return world.registry.calls > 2

        await helpers.until(was_asked)
        world.registry.is_down = False
        await reaches(helpers, stub, {"1.0.0": (30, 15, 15)})
        await world.land({f"p-{i}": True for i in range(15, 30)})
        await reaches(helpers, stub, {"1.0.0": (30, 30, 15)})
        # Everything is known now: nobody asks any more.
        calls = world.registry.calls
    async with world.monitor() as stub:
        await reaches(helpers, stub, {"1.0.0": (30, 30, 15)})
        assert world.registry.calls == calls


async def test_a_restart_takes_up_where_it_stopped(world, helpers) -> None:
    x = helpers.draw(np.random.default_rng(0), 100)
    async with world.monitor() as stub:
        await world.predict(helpers.predictions(x, helpers.july, prefix="a"))
        await reaches(helpers, stub, {"1.0.0": (100, 0, 0)})
    await world.predict(helpers.predictions(x, helpers.july, prefix="b"))
    await world.land({f"a-{i}": False for i in range(50)})
    async with world.monitor() as stub:
        await reaches(helpers, stub, {"1.0.0": (200, 50, 50)})


@on_both
async def test_rubbish_on_the_bus_stops_nothing(world, stub, helpers) -> None:
    x = helpers.draw(np.random.default_rng(0), 5)
    made = helpers.predictions(x, helpers.july)
    made[0].prediction_id = ""
    made[1].model = "Not A Name"
    made[2].event_time.seconds = 1 << 60
    made[3].outputs[:] = [float("nan")]
    made.append(events_pb2.Prediction(prediction_id="nul", model="flight-delay", version="1.0.0", subject="a\0b"))
    rubbish = [Outgoing(PREDICTIONS, "k", value) for value in (b"", b"\xff" * 50, b"\x0a\xff")]
    await world.bus.publish(rubbish)
    await world.predict(made)
    await world.bus.publish([Outgoing("millrace.records.outcomes", "k", b"\x01rubbish")])
    await world.land_table(pa.table({"other": [1]}))
    await world.land_table(pa.table({"flight_id": ["p-4"], "late": ["perhaps"]}))
    await world.land_table(pa.table({"flight_id": ["p-4", None, "p-3", "p\0"], "late": [0.0, 1.0, None, 1.0]}))
    await world.land({"p-3": True})
    await reaches(helpers, stub, {"1.0.0": (2, 1, 1)})


async def test_get_prediction(world, stub, helpers) -> None:
    x = helpers.draw(np.random.default_rng(0), 3)
    x[0, 1] = np.nan
    await world.predict(helpers.predictions(x, helpers.july))
    await world.land({"p-0": True})
    await reaches(helpers, stub, {"1.0.0": (3, 1, 0)})

    async def named():
        answer = await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-0"))
        return answer if answer.feature_names and answer.HasField("outcome") else None

    answer = await helpers.until(named)
    assert answer.outcome is True
    np.testing.assert_array_equal(np.array(answer.features), x[0])
    assert [*answer.feature_names] == [*helpers.features]
    assert (answer.model, answer.version, answer.subject, [*answer.outputs]) == ("flight-delay", "1.0.0", "p-0", [0.2])
    assert (answer.trace_id, answer.definitions_hash) == ("t" * 32, "h" * 64)
    assert answer.event_time.ToDatetime().isoformat() == "2013-07-01T00:00:00"
    other = await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-1"))
    assert not other.HasField("outcome")


async def close_after(world, helpers, day: int) -> None:
    """One prediction late enough to close the window of `day` and those before."""
    x = helpers.draw(np.random.default_rng(9), 1)
    await world.predict(helpers.predictions(x, helpers.july + helpers.day * (day + 1.1), prefix=f"end{day}"))


async def windows(stub) -> list[drift_pb2.WindowReport]:
    return [*(await stub.ListWindows(drift_pb2.ListWindowsRequest())).windows]


async def closed(helpers, stub, count: int) -> list[drift_pb2.WindowReport]:
    async def question():
        found = await windows(stub)
        return found if len(found) >= count else None

    return await helpers.until(question)


@on_both
async def test_a_quiet_window_has_no_findings_and_a_shifted_one_is_found_and_published(world, stub, helpers) -> None:
    rng = np.random.default_rng(5)
    assert (await stub.SetReference(world.training_set())).rows == 20_000
    quiet = helpers.predictions(helpers.draw(rng, 900), helpers.july, prefix="a", scores=rng.beta(2, 6, 900))
    await world.predict(quiet)
    await close_after(world, helpers, 0)
    [report] = await closed(helpers, stub, 1)
    assert (report.predictions, len(report.findings)) == (900, 0)
    assert report.tests >= 8
    shifted = helpers.draw(rng, 900, shift=1.5)
    shifted[:300, 1] = np.nan
    wrong = helpers.predictions(
        shifted, helpers.july + helpers.day, prefix="b", scores=np.where(np.arange(900) % 2, 0.9, 0.1)
    )
    await world.predict(wrong)
    await world.land({f"b-{i}": i % 3 == 0 for i in range(900)})
    await reaches(helpers, stub, {"1.0.0": (1801, 900, 450)})
    await close_after(world, helpers, 1)
    reports = await closed(helpers, stub, 2)
    found = {(f.kind, f.feature, f.test) for f in reports[0].findings}
    kinds = drift_pb2
    assert found >= {
        (kinds.DRIFT_KIND_COVARIATE, "delay", "ks"),
        (kinds.DRIFT_KIND_QUALITY, "wind", "null_rate"),
        (kinds.DRIFT_KIND_PREDICTION, "", "ks"),
        (kinds.DRIFT_KIND_PERFORMANCE, "", "accuracy"),
    }
    assert not {f for f in found if f[1] == "hour"}
    assert reports[0].accuracy == pytest.approx(0.5)
    listed = (await stub.ListFindings(drift_pb2.ListFindingsRequest(model="flight-delay"))).findings
    assert {f.id for f in listed} == {f.id for f in reports[0].findings}
    for finding in listed:
        assert finding.effect_size >= finding.effect_threshold
        assert finding.p_value <= 0.01
        assert finding.summary.endswith(".")
        assert finding.window_count > 0
    subscription = await world.bus.subscribe([DRIFT], group="test")

    async def published():
        return await subscription.fetch(timeout_s=0.1)

    [message] = await helpers.until(published)
    event = events_pb2.DriftFound.FromString(message.value)
    assert [f.id for f in event.findings] == [f.id for f in reports[0].findings]
    await subscription.close()


async def test_windows_survive_restarts_and_a_reference_that_comes_late(world, helpers) -> None:
    """Counts taken before the reference, before and after a restart, give the sketch of an undisturbed run."""
    rng = np.random.default_rng(6)
    x = helpers.draw(rng, 900, shift=1.5)
    made = helpers.predictions(x, helpers.july, scores=rng.beta(2, 6, 900))
    async with world.monitor() as stub:
        await world.predict(made[:300])
        await reaches(helpers, stub, {"1.0.0": (300, 0, 0)})
    async with world.monitor() as stub:
        await stub.SetReference(world.training_set())
        await world.predict(made[300:600])
        await reaches(helpers, stub, {"1.0.0": (600, 0, 0)})
    async with world.monitor() as stub:
        await world.predict(made[600:])
        await close_after(world, helpers, 0)
        [report] = await closed(helpers, stub, 1)
    finding = next(f for f in report.findings if f.test == "ks" and f.feature == "delay")
    assert finding.window_count == 900
    assert report.predictions == 900


async def test_close_windows_on_request(world, stub, helpers) -> None:
    await stub.SetReference(world.training_set())
    x = helpers.draw(np.random.default_rng(7), 500, shift=2)
    await world.predict(helpers.predictions(x, helpers.july))
    await reaches(helpers, stub, {"1.0.0": (500, 0, 0)})
    answer = await stub.CloseWindows(drift_pb2.CloseWindowsRequest(model="flight-delay"))
    assert answer.closed == 1
    assert answer.findings >= 2
    again = await stub.CloseWindows(drift_pb2.CloseWindowsRequest(model="flight-delay"))
    assert (again.closed, again.findings) == (0, 0)


async def test_a_small_window_is_reported_without_tests(world, stub, helpers) -> None:
    await stub.SetReference(world.training_set())
    x = helpers.draw(np.random.default_rng(7), 50, shift=9)
    await world.predict(helpers.predictions(x, helpers.july))
    await close_after(world, helpers, 0)
    [report] = await closed(helpers, stub, 1)
    assert (report.predictions, report.tests, len(report.findings)) == (50, 0, 0)


@on_both
async def test_retention_keeps_the_sums(world, helpers) -> None:
    retention = {"max_predictions": 1000, "interval_s": 0.05}
    async with world.monitor(retention=retention) as stub:
        x = helpers.draw(np.random.default_rng(7), 3000)
        await world.predict(helpers.predictions(x, helpers.july))
        await reaches(helpers, stub, {"1.0.0": (3000, 0, 0)})

        async def is_gone():
            try:
                await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-0"))
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.NOT_FOUND
            return False

        await helpers.until(is_gone)
        await stub.GetPrediction(drift_pb2.GetPredictionRequest(prediction_id="p-1.0.0-2999"))
        assert await figures(stub) == {"1.0.0": (3000, 0, 0)}
