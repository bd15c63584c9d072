"""The consistency check: what is sampled, how values are compared, and that a planted difference is found where it is."""

import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_feature import app
from millrace_feature.catalog import Catalog
from millrace_feature.compiler import compile_registry
from millrace_feature.consistency.comparison import compare, in_windows
from millrace_feature.consistency.log import ConsistencyLog, Rates
from millrace_feature.consistency.metrics import SAMPLES
from millrace_feature.consistency.samples import Sample, Sampler, is_sampled
from millrace_feature.settings import ConsistencySettings
from millrace_feature.store import Change
from millrace_feature.tile_fields import FieldChange, layout_of
from millrace_feature.tiles import reduce_rows
from millrace_kit.clock import FakeClock
from millrace_kit.sql import open_engine

BASE = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAN = float("nan")
USERS = [f"u{i}" for i in range(12)]


class Plan:
    name = "main"
    join_keys = ("user",)
    request_fields = (("limit", "double"),)


class Service:
    plan, digest = Plan(), "d"


def stamp(instant: datetime) -> Timestamp:
    out = Timestamp()
    out.FromDatetime(instant)
    return out


def test_the_sample_is_a_share_of_entities_and_the_same_everywhere() -> None:
    keys = [f"user-{i}" for i in range(20_000)]
    chosen = [key for key in keys if is_sampled(key, round(0.1 * 2**32))]
    assert 0.09 < len(chosen) / len(keys) < 0.11
    assert set(chosen) <= {key for key in keys if is_sampled(key, round(0.2 * 2**32))}
    assert not any(is_sampled(key, 0) for key in keys)
    assert all(is_sampled(key, 2**32) for key in keys)


def test_a_full_queue_drops_and_counts_and_never_waits() -> None:
    clock = FakeClock(BASE)
    sampler = Sampler(sample_rate=1.0, max_queue=3, clock=clock)
    rows = [{"user": f"u{i}", "limit": 1.0} for i in range(5)]
    before = SAMPLES.labels("dropped")._value.get()
    at_us = round(BASE.timestamp() * 1e6)
    sampler.observe(Service(), rows, at_us, lambda i: [float(i)])  # type: ignore[arg-type]
    assert SAMPLES.labels("dropped")._value.get() - before == 2
    assert sampler.waiting(10) == [Sample("d", "main", (f"u{i}", 1.0), at_us, at_us, (float(i),)) for i in range(3)]
    sampler.forget(2)
    assert [sample.entity[0] for sample in sampler.waiting(10)] == ["u2"]
    ahead = SAMPLES.labels("future")._value.get()
    sampler.observe(Service(), rows[:1], at_us + 3_600_000_000, lambda i: [float(i)])  # type: ignore[arg-type]
    assert SAMPLES.labels("future")._value.get() - ahead == 1
    assert len(sampler.waiting(10)) == 1


def test_comparison() -> None:
    served = np.array([1.0, 1.0, NAN, 2.0, 0.0, NAN, 100.0, np.inf, 1e-12, -1.0])
    expected = np.array([1.0, 1.0005, 3.0, NAN, 0.0, NAN, 50.0, np.inf, 0.0, 1.0])
    tally = compare(served, expected, tolerance=0.001)
    assert (tally.compared, tally.mismatched, tally.missing, tally.extra, tally.pairs) == (10, 2, 1, 1, 7)
    assert tally.places == {"mismatch": [9, 6], "missing": [2], "extra": [3]}
    # 2|s-e|/(|s|+|e|): 0.0005/1.00025, 100/150, 2 (of 1e-12 and 0), 2 (of -1 and 1) and three zeros.
    assert tally.error == pytest.approx(2 * 0.0005 / 2.0005 + 2 * 50 / 150 + 2 + 2)
    assert tally.smape == pytest.approx(tally.error / 7)
    assert compare(np.zeros(0), np.zeros(0), tolerance=0.001).smape == 0.0
    assert compare(np.array([np.inf]), np.array([-np.inf]), tolerance=0.001).mismatched == 1
    assert compare(np.array([np.inf]), np.array([1.0]), tolerance=0.5).mismatched == 1
    assert [(start, places.tolist()) for start, places in in_windows([25, 3, 9, 20], 10)] == [(0, [1, 2]), (20, [0, 3])]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def kept(request: pytest.FixtureRequest, tmp_path):
    url = f"sqlite:///{tmp_path / 'f.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    catalog = Catalog(open_engine(url))
    yield ConsistencyLog(catalog._engine)
    catalog.close()


def test_each_sample_is_checked_once_and_rates_add_up(kept: ConsistencyLog) -> None:
    samples = [Sample("d", "main", (f"u{i}", None, BASE), 5, 100 + i, (1.5, NAN)) for i in range(6)]
    assert kept.add(samples[:4], max_waiting=5) == 4
    assert kept.add(samples[4:], max_waiting=5) == 1
    mine = kept.claim(before_us=103, now_us=1000, lease_us=50, limit=2)
    others = kept.claim(before_us=103, now_us=1000, lease_us=50, limit=10)
    assert [one.sample.entity[0] for one in mine] == ["u0", "u1"]
    assert [one.sample.entity[0] for one in others] == ["u2", "u3"]
    assert mine[0].sample.entity == ("u0", None, BASE)
    assert mine[0].sample.values[0] == 1.5
    assert math.isnan(mine[0].sample.values[1])
    # Whoever held them is gone: another one takes them over, and the first comes too late.
    again = kept.claim(before_us=101, now_us=1051, lease_us=50, limit=10)
    assert [one.id for one in again] == [one.id for one in mine]
    tally = compare(np.array([1.0, 2.0]), np.array([1.0, 4.0]), tolerance=0.001)
    rates = [Rates(0, 60, "d", "main", "v__f", tally)]
    assert kept.finish([one.id for one in again], rates, (), max_findings=1)
    assert not kept.finish([one.id for one in mine], rates, (), max_findings=1)
    assert kept.finish([one.id for one in others], rates, (), max_findings=1)
    (found,) = kept.rates("main", None, None)
    assert (found.tally.compared, found.tally.mismatched, found.tally.pairs) == (4, 2, 4)
    assert found.tally.error == pytest.approx(2 * 2 * 2 / 6)
    assert kept.rates("main", 1, None) == kept.rates("", None, 0) == []
    assert kept.waiting() == (1, 104)
    kept.forget(1)
    assert kept.rates("", None, None) == []


def events() -> pa.Table:
    """Three whole amounts a user within the hour before `BASE`."""
    places = range(3 * len(USERS))
    return pa.table(
        {
            "at": pa.array([BASE - timedelta(minutes=2 + i % 50) for i in places], pa.timestamp("us", "UTC")),
            "user": [USERS[i % len(USERS)] for i in places],
            "shop": [i % 2 for i in places],
            "amount": [10 + i for i in places],
            "note": [f"n{i}" for i in places],
        }
    )


def request() -> pb.GetOnlineFeaturesRequest:
    fixed = {
        "shop": common_pb2.Value(int64_value=0),
        "limit": common_pb2.Value(double_value=100),
        "asked_at": common_pb2.Value(timestamp_value=stamp(BASE)),
    }
    rows = [pb.EntityRow(values={**fixed, "user": common_pb2.Value(string_value=user)}) for user in [*USERS, "nobody"]]
    return pb.GetOnlineFeaturesRequest(feature_service="main", rows=rows, event_time=stamp(BASE))


@pytest.fixture
def checked_world(world, monkeypatch: pytest.MonkeyPatch):
    """Every answer is sampled and checked as soon as the clock says so."""
    settings = world.settings.model_copy(
        update={"consistency": ConsistencySettings(sample_rate=1.0, settle_s=60, check_every_s=0.05, window_s=3600)}
    )
    monkeypatch.setattr(type(world), "settings", settings)
    return world


async def checked(stub, windows: int) -> pb.GetConsistencyResponse:
    """What is found once so many windows of time have been compared."""
    import asyncio

    async with asyncio.timeout(60):
        while True:
            found = await stub.GetConsistency(pb.GetConsistencyRequest(max_findings=1000))
            if not found.waiting and len({w.window.start.seconds for w in found.windows}) == windows:
                return found
            await asyncio.sleep(0.02)


def plant(store, registry: bytes) -> None:
    """Count u3's newest event twice in one view's tile, behind the service's back."""
    view = compile_registry("test", registry).definitions.view("by_user")
    newest = events().slice(3, 1)
    tiles = reduce_rows(
        newest, keys=view.join_keys, event_time=view.event_time, schema=view.schema, unit_us=view.step_us
    )
    store.apply(Change(tiles=[(view.group, FieldChange(layout_of(view), [tiles]))]))


async def test_a_planted_difference_is_found_where_it_is(
    checked_world, small_objects, make_registry, wait_for_records, monkeypatch
) -> None:
    opened = []
    original = app.open_store
    monkeypatch.setattr(app, "open_store", lambda *a: opened.append(original(*a)) or opened[-1])
    clock = FakeClock(BASE + timedelta(minutes=1))
    world, registry = checked_world, make_registry(small_objects())
    async with world.serve(clock) as stub:
        await world.publish(world.land("events", events()))
        await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="test", feast_registry=registry))
        await wait_for_records(stub, events=3 * len(USERS))
        answer = await stub.GetOnlineFeatures(request())
        clock.advance(61)
        found = await checked(stub, 1)
        assert {w.feature for w in found.windows} == set(answer.feature_names)
        assert [(w.feature, w.mismatched, w.missing, w.extra, w.smape) for w in found.windows if w.smape] == []
        assert not found.findings

        plant(opened[0], registry)
        clock.advance(3600)
        wrong = await stub.GetOnlineFeatures(request())
        clock.advance(61)
        found = await checked(stub, 2)
        newest = max(w.window.start.seconds for w in found.windows)
        differ = {w.feature: w for w in found.windows if w.mismatched + w.missing + w.extra}
        names = {f"by_user__amount_{f}" for f in ("count_10m", "sum_10m", "count_60m", "sum_60m", "mean_60m")}
        names.add("derived__room")
        assert set(differ) == names
        for window in differ.values():
            assert window.window.start.seconds == newest
            assert (window.compared, window.mismatched, window.missing, window.extra) == (len(USERS) + 1, 1, 0, 0)
        by_feature = {finding.feature: finding for finding in found.findings}
        assert set(by_feature) == names
        finding = by_feature["by_user__amount_sum_10m"]
        assert finding.entity["user"].string_value == "u3"
        assert finding.kind == pb.CONSISTENCY_KIND_MISMATCH
        assert finding.asked_for == stamp(BASE)
        place = list(wrong.feature_names).index(finding.feature)
        assert finding.served == wrong.vectors[3].values[place]
        assert finding.expected == answer.vectors[3].values[place] == finding.served / 2
        assert [(t.table, t.version) for t in finding.table_versions] == [("events", 0)]
