"""Answers that are kept: never older than allowed, never more than allowed, and the same as the store's."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace_feature.cache import CacheLimits, OnlineCache
from millrace_feature.store import Ask, Followed, LatestAsk, NewestRow
from millrace_kit.clock import FakeClock


@dataclass
class Known:
    rows: Mapping[str, NewestRow]
    followed: Mapping[str, Followed] = field(default_factory=lambda: {"c": Followed(1, 5, 0)})

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        return [self.rows.get(key) if key is not None else None for key in ask.keys]


@dataclass
class Store:
    """Knows rows, and remembers what it was asked."""

    rows: dict[str, NewestRow]
    asked: list[list[str | None]] = field(default_factory=list)

    async def fetch(self, asks: Sequence[Ask], _contracts: Sequence[str]) -> Known:
        self.asked.append([key for ask in asks for key in ask.keys])
        return Known(dict(self.rows))


def cached(store: Store, entries: int = 10, *views: str) -> tuple[OnlineCache, FakeClock]:
    clock = FakeClock()
    return OnlineCache(store, CacheLimits(0.5, entries, frozenset(views)), clock.monotonic), clock  # type: ignore[arg-type]


def read(cache: OnlineCache, *keys: str | None) -> tuple[list[NewestRow | None], int]:
    ask = LatestAsk("g", list(keys), 100, 1)
    known, age_ms = asyncio.run(cache.fetch([ask], ["c"]))
    return known.latest(ask), age_ms


def test_answers_are_kept_for_as_long_as_allowed() -> None:
    store = Store({"a": (1, (1.0,))})
    cache, clock = cached(store)
    assert read(cache, "a", "b", None) == ([(1, (1.0,)), None, None], 0)
    store.rows["a"] = (2, (2.0,))
    clock.advance(0.4)
    assert read(cache, "a", "b") == ([(1, (1.0,)), None], 400)
    clock.advance(0.2)
    assert read(cache, "a") == ([(2, (2.0,))], 0)
    assert store.asked == [["a", "b"], ["a"]]


def test_only_what_is_not_kept_is_asked_for() -> None:
    store = Store({"a": (1, (1.0,)), "b": (2, (2.0,))})
    cache, clock = cached(store)
    read(cache, "a")
    clock.advance(0.1)
    assert read(cache, "b", "a", "b") == ([(2, (2.0,)), (1, (1.0,)), (2, (2.0,))], 100)
    assert store.asked == [["a"], ["b"]]


def test_entries_are_bounded_and_the_least_recently_read_go() -> None:
    store = Store(dict.fromkeys("abc", (1, (1.0,))))
    cache, _clock = cached(store, 2)
    for key in "abac":
        read(cache, key)
    store.asked.clear()
    read(cache, "a")
    read(cache, "c")
    assert store.asked == []
    read(cache, "b")
    assert store.asked == [["b"]]


def test_other_definitions_and_other_views() -> None:
    store = Store({"a": (1, (1.0,))})
    cache, _clock = cached(store, 10, "v", "w")
    assert (cache.covers(["v"]), cache.covers(["v", "x"])) == (True, False)
    read(cache, "a")
    cache.clear()
    read(cache, "a")
    assert store.asked == [["a"], ["a"]]
