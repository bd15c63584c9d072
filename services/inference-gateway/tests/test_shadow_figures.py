"""Answers compared with a shadow's: decoding and sums, halves that never meet, and the whole way through the real Envoy."""

import math

import grpc.aio
import numpy as np
import pytest
from gateway import CANDIDATE, MODEL, STABLE, arm, eventually, gateway, route
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.request_samples import MAX_SAMPLES, SPACING_S, RequestSamples
from millrace_inference_gateway.routes import RouteTable, check_routes
from millrace_inference_gateway.shadow_figures import MAX_SEGMENTS, OTHERS, ShadowFigures, bucket, compare
from millrace_inference_gateway.shadow_pairs import MAX_WAIT_S, MAX_WAITING, ShadowPairs
from models import Model, serving
from tritonclient.grpc import service_pb2, service_pb2_grpc

TYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}


def answer(**tensors: tuple[str, object]) -> bytes:
    message = service_pb2.ModelInferResponse(model_name=MODEL)
    for name, (kind, values) in tensors.items():
        array = np.asarray(values, TYPES[kind])
        tensor = message.outputs.add(name=name, datatype=kind)
        tensor.shape.extend(array.shape)
        message.raw_output_contents.append(array.tobytes())
    return message.SerializeToString()


def score(*rows: float) -> bytes:
    return answer(probability=("FP32", [[row] for row in rows]))


def test_a_score_flips_its_label_at_one_half() -> None:
    found = compare(score(0.4, 0.6, 0.9), score(0.55, 0.7, 0.2), "probability")
    assert found is not None
    assert found.flips.tolist() == [True, False, True]
    np.testing.assert_allclose(found.shifts, [0.15, 0.1, 0.7], atol=1e-6)
    np.testing.assert_allclose(found.tensors[""], found.shifts)


def test_of_several_scores_the_largest_is_the_label() -> None:
    one = answer(p=("FP64", [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]))
    two = answer(p=("FP64", [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]))
    found = compare(one, two, "p")
    assert found is not None
    assert found.flips.tolist() == [False, True]
    # Of the label that the caller got: 0.7 to 0.5, and 0.5 to 0.1.
    np.testing.assert_allclose(found.shifts, [0.2, 0.4])
    np.testing.assert_allclose(found.tensors[""], [0.2, 0.4])


def test_whole_numbers_are_labels_and_each_tensor_has_its_own_differences() -> None:
    one = answer(label=("INT64", [[1], [2]]), p=("FP64", [[0.9], [0.2]]))
    two = answer(label=("INT64", [[1], [5]]), p=("FP64", [[0.4], [0.2]]))
    found = compare(one, two, "p")
    assert found is not None
    assert found.flips.tolist() == [False, True]
    np.testing.assert_allclose(found.shifts, [0.5, 0])
    assert {name: values.tolist() for name, values in found.tensors.items()} == {
        "label": [0, 3],
        "p": [0.5, 0],
        "": [0.5, 3],
    }


def test_nan_and_infinity() -> None:
    nan, inf = math.nan, math.inf
    found = compare(score(nan, nan, inf, inf), score(nan, 0.5, inf, -inf), "probability")
    assert found is not None
    assert found.tensors[""].tolist() == [0, inf, 0, inf]
    assert found.shifts.tolist() == [0, 1, 0, 1]
    assert bucket(inf) == inf
    assert bucket(0.0) == 0
    assert 0.5 <= bucket(0.5) <= 0.5 * 1.09


@pytest.mark.parametrize(
    "other",
    [b"", b"\xff\xff", score(0.1), answer(other=("FP32", [[0.1], [0.2]])), answer(probability=("FP32", [[1, 2]]))],
)
def test_what_is_not_the_same_rows_is_not_compared(other: bytes) -> None:
    assert compare(score(0.1, 0.2), other, "probability") is None


def table(mirror: float = 100.0) -> RouteTable:
    shadow = arm("1.1.0", "127.0.0.1:21", weight=0.0, role=CANDIDATE)
    shadow.mirror_percent = mirror
    return check_routes(rollout_pb2.Routes(models=[route(arm("1.0.0", "127.0.0.1:11", role=STABLE), shadow)]))


class Clock:
    now_s = 0.0


def pairs(mirror: float = 100.0) -> tuple[ShadowPairs, ShadowFigures, Clock]:
    figures, clock = ShadowFigures(), Clock()
    return ShadowPairs(lambda: table(mirror), figures, lambda: clock.now_s), figures, clock


def test_halves_meet_in_either_order() -> None:
    made, figures, _ = pairs()
    made.answered("a", MODEL, "1.0.0", score(0.4))
    made.copied("a", MODEL, "1.1.0", score(0.6), "new")
    made.copied("b", MODEL, "1.1.0", score(0.4), "old")
    made.answered("b", MODEL, "1.0.0", score(0.4))
    sums = figures.of(MODEL, "1.1.0")
    assert {segment: (one.pairs, one.flips) for segment, one in sums.items()} == {
        "": (2, 1),
        "new": (1, 1),
        "old": (1, 0),
    }
    assert sums[""].shift_sum == pytest.approx(0.2, abs=1e-6)
    assert sums[""].differences[""][0.0] == 1
    assert figures.unpaired == 0


def test_copies_without_their_other_half_are_counted_and_forgotten() -> None:
    made, figures, clock = pairs()
    made.copied("late", MODEL, "1.1.0", score(0.5), "")
    clock.now_s = MAX_WAIT_S + 1
    made.copied("unread", MODEL, "1.1.0", b"", "")
    # Requests that were not copied are no loss.
    for number in range(MAX_WAITING + 10):
        made.answered(f"{number}", MODEL, "1.0.0", score(0.5))
    assert figures.unpaired == 2
    made.answered("late", MODEL, "1.0.0", score(0.5))
    assert not figures.of(MODEL, "1.1.0")


def test_only_who_has_a_shadow_is_remembered() -> None:
    made, figures, _ = pairs(mirror=0.0)
    made.answered("a", MODEL, "1.0.0", score(0.4))
    made.copied("a", MODEL, "1.1.0", score(0.6), "")
    assert not figures.of(MODEL, "1.1.0")
    # An answer of the shadow itself, by a rule, has no copy.
    made, figures, _ = pairs()
    made.answered("a", MODEL, "1.1.0", score(0.4))
    made.copied("a", MODEL, "1.1.0", score(0.6), "")
    assert not figures.of(MODEL, "1.1.0")


def test_segments_are_limited() -> None:
    figures = ShadowFigures()
    found = compare(score(0.4), score(0.4), "probability")
    assert found is not None
    for number in range(MAX_SEGMENTS + 5):
        figures.add(MODEL, "1.1.0", f"s{number}", found)
    sums = figures.of(MODEL, "1.1.0")
    assert sums[""].pairs == MAX_SEGMENTS + 5
    assert sums[OTHERS].pairs == 5


def test_samples_are_the_newest_and_limited() -> None:
    samples = RequestSamples()
    for number in range(2 * MAX_SAMPLES):
        samples.add(MODEL, bytes([number]), number * 2 * SPACING_S)
        samples.add(MODEL, b"of the same burst", number * 2 * SPACING_S)
    assert samples.newest(MODEL, 3) == [bytes([number]) for number in (127, 126, 125)]
    assert len(samples.newest(MODEL, 1000)) == MAX_SAMPLES
    assert samples.newest("other", 3) == []


class Shifted(Model):
    """Adds to the score of rows whose first feature is at least 10."""

    async def ModelInfer(self, request, context):
        response = await super().ModelInfer(request, context)
        rows = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(request.inputs[0].shape)
        scores = np.frombuffer(response.raw_output_contents[0], "<f4") + np.where(rows[:, 0] >= 10, np.float32(0.25), 0)
        response.raw_output_contents[0] = scores.astype("<f4").tobytes()
        return response


async def call(channel: grpc.aio.Channel, rows: np.ndarray, *, named: bool = True, **metadata: str) -> None:
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="features", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.astype("<f4").tobytes())
    headers = [("x-millrace-model", MODEL)] if named else []
    headers += [(key.replace("_", "-"), value) for key, value in metadata.items()]
    await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=headers, timeout=5)


async def test_through_envoy_each_copy_meets_the_callers_answer() -> None:
    async with gateway() as (g, rollout), serving(Model("1.0.0")) as one, serving(Shifted("1.1.0")) as two:
        shadow = arm("1.1.0", two, weight=0.0, role=CANDIDATE)
        shadow.mirror_percent = 100.0
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow, segment_header="x-country")))
        for number in range(40):
            # Every fourth has a score of 10 + 0.3; the others of 0.3, which nobody changes.
            first = 10.0 if number % 4 == 0 else 0.0
            rows = np.array([[first, 0.3, 0.0], [0.0, 0.3, 0.0]], np.float32)
            await call(g.public_channel, rows, named=number % 2 == 0, x_country="DE" if number % 4 == 0 else "FR")
        await g.predict("flight-1", a=1.0, c=4.0)

        async def compared():
            found = next((v for v in (await g.figures()).versions if v.version == "1.1.0"), None)
            return found if found and found.shadow and found.shadow[0].pairs >= 81 else None

        found = await eventually(compared, f"81 pairs\n{g.logs()}")
        by_segment = {each.segment: each for each in found.shadow}
        assert {name: each.pairs for name, each in by_segment.items()} == {"": 81, "DE": 20, "FR": 60}
        assert by_segment[""].shift_sum == pytest.approx(10 * 0.25, abs=1e-4)
        assert by_segment["DE"].shift_sum == pytest.approx(10 * 0.25, abs=1e-4)
        assert by_segment["FR"].shift_sum == 0
        (differences,) = by_segment[""].differences
        assert sorted((round(b.le, 2), b.count) for b in differences.buckets) == [(0.0, 71), (0.26, 10)]
        assert (await g.figures()).shadow_unpaired == 0
        request = prediction_pb2.GetRequestSamplesRequest(model=MODEL, limit=10)
        samples = (await g.figures_stub.GetRequestSamples(request, timeout=5)).requests
        assert samples
        assert {service_pb2.ModelInferRequest.FromString(each).model_name for each in samples} == {MODEL}


async def test_without_samples_there_is_nothing_to_compare() -> None:
    log = {"sample_ratio": 0.0}
    async with (
        gateway(prediction_log=log) as (g, rollout),
        serving(Model("1.0.0")) as one,
        serving(Shifted("1.1.0")) as two,
    ):
        shadow = arm("1.1.0", two, weight=0.0, role=CANDIDATE)
        shadow.mirror_percent = 100.0
        await rollout.in_force(rollout.set(route(arm("1.0.0", one), shadow)))
        for _ in range(10):
            await call(g.public_channel, np.ones((1, 3)))

        async def counted():
            found = next((v for v in (await g.figures()).versions if v.version == "1.1.0"), None)
            return found if found and found.requests >= 10 else None

        found = await eventually(counted, "copies in the figures")
        assert not found.shadow
        assert (await g.figures()).shadow_unpaired == 0
