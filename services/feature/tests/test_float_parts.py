"""Answers written from arrays say what answers written from lists say."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.feature.v1 import feature_pb2
from millrace_feature.convert import Aged, to_answer
from millrace_feature.feast_wire.json_answers import to_json
from millrace_feature.feast_wire.message_answers import to_message
from millrace_feature.feast_wire.requests import Given
from millrace_feature.feast_wire.selection import Selections, Wanted
from millrace_feature.float_parts import FloatPart
from millrace_feature.packed_rows import NO_ROW, FloatRows, pack_row
from millrace_feature.plan import Definitions, LatestView, ServicePlan, ViewUse
from millrace_feature.serving import CompiledService
from millrace_feature.store import Followed, LatestAsk

NOW_US = 1_700_000_000_123_456
NAMES = ("a", "b", "c")
VALUE = st.one_of(st.none(), st.floats(allow_nan=False))
ROW = st.tuples(
    st.one_of(st.integers(NOW_US - 10_000_000, NOW_US), st.sampled_from([0, -5, NOW_US - 5_000_000])),
    st.tuples(*(VALUE for _ in NAMES)),
)
TABLE = st.lists(st.one_of(ROW, ROW, ROW, st.none()), min_size=4, max_size=12)


class Known:
    """A store's answers: as arrays, or as lists only."""

    def __init__(self, rows: Sequence[Any], *, arrays: bool) -> None:
        self.followed: dict[str, Followed] = {}
        self._rows = rows
        self._arrays = arrays

    def windows(self, ask: Any) -> Any:
        raise AssertionError

    def latest(self, _ask: LatestAsk) -> list[Any]:
        return list(self._rows)

    def floats(self, ask: LatestAsk) -> Any:
        packed = [None if row is None else pack_row(*row) for row in self._rows]
        return FloatRows(ask.width).read(packed) if self._arrays else None


def definitions(ttl_us: int, features: tuple[str, ...]) -> Definitions:
    view = LatestView("v", "contract", "at", ("user",), ttl_us, NAMES)
    service = ServicePlan("s", features, (ViewUse("v", "v", ("user",)),), (), ())
    types = (("v", tuple((name, "DOUBLE") for name in NAMES)), ("", (("user", "STRING"),)))
    return Definitions("p", "0" * 64, (), (("user", "string"),), (view,), (service,), feast_types=types)


CHOSEN = st.sampled_from([("v__a", "v__b", "v__c"), ("v__c", "v__a"), ("v__b",)])


@settings(max_examples=40, deadline=None)
@given(TABLE, st.sampled_from([0, 4_000_000]), CHOSEN)
def test_native_answers_are_the_same(rows: list[Any], ttl_us: int, features: tuple[str, ...]) -> None:
    known = definitions(ttl_us, features)
    service = CompiledService(known.services[0], known)
    entities = [{"user": f"u{i}"} for i in range(len(rows))]
    found = []
    for arrays in (True, False):
        asks = service.asks(entities, NOW_US)
        known_rows = Known(rows, arrays=arrays)
        vectors = service.vectors(asks, known_rows, entities, NOW_US)
        assert isinstance(vectors, list) is not arrays
        found.append(feature_pb2.GetOnlineFeaturesResponse.FromString(to_answer(features, vectors, "d", 0)))
        vectors, ages_ms = service.aged_vectors(asks, known_rows, entities, NOW_US, by_view=True)
        aged = feature_pb2.GetOnlineFeaturesResponse.FromString(
            to_answer(features, vectors, "d", 0, Aged(service.view_names, ages_ms))
        )
        assert list(aged.view_names) == ["v"]
        for vector, row in zip(aged.vectors, rows, strict=True):
            age_us = -1 if row is None else NOW_US - row[0]
            late = ttl_us and age_us > ttl_us
            assert list(vector.view_ages_ms) == [-1 if row is None or late else age_us // 1000]
            vector.ClearField("view_ages_ms")
        aged.ClearField("view_names")
        assert aged.SerializeToString(deterministic=True) == found[-1].SerializeToString(deterministic=True)
    for one, other in zip(found[0].vectors, found[1].vectors, strict=True):
        assert np.array_equal(one.values, other.values, equal_nan=True)
        assert (one.statuses, one.max_age_ms) == (other.statuses, other.max_age_ms)


def test_a_service_that_reads_no_view_has_no_ages() -> None:
    known = definitions(0, ("v__a",))
    service = CompiledService(ServicePlan("s", (), (), (), ()), known)
    assert service.ages_ms([], 2, NOW_US) == [(), ()]


@settings(max_examples=40, deadline=None)
@given(TABLE, st.sampled_from([0, 4_000_000]), CHOSEN)
def test_feast_answers_are_the_same(rows: list[Any], ttl_us: int, features: tuple[str, ...]) -> None:
    known = definitions(ttl_us, features)
    selection = Selections(known).find(Wanted(service="s"))
    keys = [f"u{i}" for i in range(len(rows))]
    entities = [{"user": key} for key in keys]
    messages, texts = [], []
    for arrays in (True, False):
        asks = selection.service.asks(entities, NOW_US)
        parts = selection.service.parts(asks, Known(rows, arrays=arrays), entities, NOW_US)
        answer: Any = SimpleNamespace(
            selection=selection, given=Given(entities, [("user", "STRING", keys)]), parts=parts, with_versions=False
        )
        messages.append(GetOnlineFeaturesResponse.FromString(to_message(answer)))
        texts.append(msgspec.json.decode(to_json(answer)))
    assert messages[0] == messages[1]
    assert texts[0] == texts[1]


def test_what_is_too_old_is_no_value() -> None:
    times = np.array([NOW_US, NOW_US - 10, NO_ROW])
    part = FloatPart(times, np.array([[1.0], [2.0], [np.nan]]), ttl_us=5, at_us=NOW_US)
    assert part.values == [[1.0], None, None]
    assert (part.expired, part.ages_us, part.times_us) == ({1}, [0], [NOW_US, NOW_US - 10, None])
