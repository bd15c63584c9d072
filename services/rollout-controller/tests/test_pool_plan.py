"""The plan of a pool: what it never does, whatever the pool looks like, and how it does with a stream of calls."""

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_rollout_controller.pool_plan import MIB, Member, Name, State, plan

NOW = 1000.0
HELD = {"Resident", "Loading", "Leaving"}
STATES: tuple[State, ...] = ("Resident", "Loading", "Leaving", "Waiting", "Asleep")


def member(name: str, state: State = "Resident", mib: int = 100, **fields: object) -> Member:
    return Member((name, "1.0.0"), state, mib * MIB, **fields)  # type: ignore[arg-type]


def names(found: Iterable[Name]) -> list[str]:
    return [name for name, _ in found]


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Member], int]:
    times = st.integers(0, 2000).map(float)
    members = [
        Member(
            (f"m{index}", "1.0.0"),
            draw(st.sampled_from(STATES)),
            draw(st.integers(1, 60)) * MIB,
            used_at=draw(times),
            resident_until=draw(times),
            asked_at=draw(times),
            running=draw(st.booleans()),
            fixed=draw(st.booleans()),
        )
        for index in range(draw(st.integers(0, 10)))
    ]
    return members, draw(st.integers(0, 300)) * MIB


@given(pools())
@settings(max_examples=400)
def test_what_a_plan_never_does(pool: tuple[list[Member], int]) -> None:
    members, capacity = pool
    found = plan(members, capacity, NOW)
    by_name = {m.name: m for m in members}
    held = [m for m in members if m.state in HELD]
    placed = [by_name[name] for name in found.place]
    evicted = [by_name[name] for name in found.evict]
    # Who gets a place waited for one, and nobody is told twice.
    waiting = [name for name, _ in found.waiting]
    assert sorted([*found.place, *waiting]) == sorted(m.name for m in members if m.state == "Waiting")
    assert len(set(found.evict)) == len(found.evict)
    # Memory: nothing is placed into what is not free now.
    if placed:
        assert sum(m.size_bytes for m in [*held, *placed]) <= capacity
    for gone in evicted:
        assert gone.state == "Resident"
        assert not gone.running
        assert not gone.fixed
        assert gone.resident_until <= NOW
    # Nobody is unloaded for nothing: without any one of them it would not be enough for those it was done for.
    coming = sum(m.size_bytes for m in held if m.state == "Leaving")
    free = capacity - sum(m.size_bytes for m in [*held, *placed])
    asked = [by_name[name].size_bytes for name in waiting]
    if evicted and len(asked) == 1 and free + coming >= 0:
        freed = sum(m.size_bytes for m in evicted)
        assert free + coming + freed >= asked[0]
        assert all(free + coming + freed - m.size_bytes < asked[0] for m in evicted)
    # The same pool gives the same plan, in whatever order it is told.
    assert plan(list(reversed(members)), capacity, NOW) == found
    # What was ordered is not ordered again while it is under way, and no one else with it.
    going = [replace(m, state="Leaving") if m.name in found.evict else m for m in members]
    going = [replace(m, state="Loading") if m.name in found.place else m for m in going]
    assert plan(going, capacity, NOW).evict == ()


@given(pools())
@settings(max_examples=200)
def test_who_is_unloaded_was_used_least_recently(pool: tuple[list[Member], int]) -> None:
    members, capacity = pool
    # Of equal size nobody is left out for being too small.
    same = [replace(m, size_bytes=20 * MIB) for m in members]
    found = plan(same, capacity, NOW)
    able = [m for m in same if m.state == "Resident" and not m.running and not m.fixed and m.resident_until <= NOW]
    able.sort(key=lambda m: (m.used_at, m.name))
    assert list(found.evict) == [m.name for m in able[: len(found.evict)]]


def test_no_more_are_unloaded_than_are_needed() -> None:
    pool = [member("old", mib=50, used_at=1), member("large", mib=300, used_at=2), member("new", mib=50, used_at=3)]
    found = plan([*pool, member("x", "Waiting", mib=200)], 400 * MIB, NOW)
    assert names(found.evict) == ["large"], (
        "the older one alone would not do, and beside the large one it is not needed"
    )


def test_one_that_waits_for_residence_is_not_overtaken_and_one_that_waits_for_calls_is() -> None:
    big = member("big", "Waiting", mib=200, asked_at=1)
    small = member("small", "Waiting", mib=100, asked_at=2)
    young = [member("a", resident_until=NOW + 5), member("b", used_at=5)]
    found = plan([*young, big, small], 200 * MIB, NOW)
    assert (found.place, found.evict) == ((), ())
    assert dict(found.waiting)["big", "1.0.0"].endswith("what could give way was loaded too short a time ago")
    assert dict(found.waiting)["small", "1.0.0"] == "waits its turn behind big 1.0.0"
    busy = [member("a", running=True), member("b", used_at=5)]
    found = plan([*busy, big, small], 200 * MIB, NOW)
    assert names(found.evict) == ["b"]
    assert "has calls under way" in dict(found.waiting)["big", "1.0.0"]


def test_one_that_never_fits_blocks_nobody() -> None:
    found = plan([member("a"), member("huge", "Waiting", mib=900), member("b", "Waiting", asked_at=5)], 200 * MIB, NOW)
    assert names(found.place) == ["b"]
    assert dict(found.waiting) == {("huge", "1.0.0"): "needs 900 MiB, and the whole pool has 200 MiB"}
    pinned = plan([member("a", fixed=True), member("b", "Waiting")], 150 * MIB, NOW)
    assert "pinned or part of a rollout" in dict(pinned.waiting)["b", "1.0.0"]


def test_a_pool_that_shrank_is_brought_back() -> None:
    found = plan([member("a", used_at=2), member("b", used_at=1), member("c", used_at=3)], 250 * MIB, NOW)
    assert names(found.evict) == ["b"]


@dataclass
class Simulated:
    """A pool whose loads and unloads take no time, and calls that come one after the other."""

    room: int
    residence_s: float
    now: float = 0.0
    loaded: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Loaded at and used at, by model."""
    loads: int = 0
    evictions: list[tuple[float, str, float]] = field(default_factory=list)
    """When, who, and how long it was loaded."""
    waits: int = 0

    def call(self, model: str) -> None:
        while model not in self.loaded:
            members = [
                member(name, used_at=used, resident_until=at + self.residence_s)
                for name, (at, used) in self.loaded.items()
            ]
            found = plan([*members, member(model, "Waiting", asked_at=self.now)], self.room * 100 * MIB, self.now)
            for name in names(found.evict):
                self.evictions.append((self.now, name, self.now - self.loaded[name][0]))
                del self.loaded[name]
            if found.place:
                self.loaded[model] = self.now, self.now
                self.loads += 1
            elif not found.evict:
                # Until the first residence ends.
                self.waits += 1
                self.now = min(at for at, _ in self.loaded.values()) + self.residence_s
        self.loaded[model] = self.loaded[model][0], self.now


def zipf(models: int, calls: int, exponent: float, seed: int) -> list[str]:
    weights = [1 / rank**exponent for rank in range(1, models + 1)]
    return random.Random(seed).choices([f"m{rank}" for rank in range(models)], weights, k=calls)


@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_a_zipf_stream_is_served_as_by_a_cache_that_is_least_recently_used(exponent: float) -> None:
    stream = zipf(40, 4000, exponent, seed=7)
    pool = Simulated(room=10, residence_s=0)
    cache: OrderedDict[str, None] = OrderedDict()
    misses = 0
    for model in stream:
        pool.now += 0.1
        pool.call(model)
        if model in cache:
            cache.move_to_end(model)
        else:
            misses += 1
            if len(cache) == 10:
                cache.popitem(last=False)
            cache[model] = None
        assert pool.loaded.keys() == cache.keys()
    assert (pool.loads, len(pool.evictions)) == (misses, misses - 10)


def test_minimum_residence_bounds_how_often_a_pool_loads() -> None:
    free, held = Simulated(room=4, residence_s=0), Simulated(room=4, residence_s=10)
    for model in zipf(12, 3000, 0.6, seed=3):
        for pool in (free, held):
            pool.now += 0.1
            pool.call(model)
    assert all(stayed > 10 - 1e-6 for _, _, stayed in held.evictions)
    assert len(held.evictions) <= 4 * (held.now / 10 + 1)
    assert len(free.evictions) / free.now > 5 * len(held.evictions) / held.now
    assert held.waits
