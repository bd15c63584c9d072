"""Answers of the online store kept for a bounded time, per process: reads of the same entities again cost no round trip.

Only views that the settings name are kept, and only reads of this instant use them: a read at an `event_time` of its own asks the store.
What is served is at most `max_staleness_ms` behind the store, and each answer says how old the oldest kept part of it is. TTLs and ages are
judged at every read, kept or not; windows are kept under their end, so a new hop is asked for at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from millrace_feature.metrics import CACHE_ENTRIES, CACHE_READS
from millrace_feature.store import Answers, Ask, Followed, LatestAsk, NewestRow, OnlineStore, WindowAsk

Key = tuple[str, str, int, str]
"""(group, window reader's name, end of the windows, entity)."""
_HITS, _MISSES = CACHE_READS.labels("hit"), CACHE_READS.labels("miss")


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """What is kept, and how long."""

    max_staleness_s: float
    max_entries: int
    views: frozenset[str]
    """Names of the views; empty is every view."""


@dataclass(slots=True)
class KeptAnswers:
    """`Answers` of one request, from what was kept and what was fetched for it."""

    followed: Mapping[str, Followed]
    found: dict[Key, Any]
    fetched_at: float
    """When the oldest part was fetched, by the cache's clock."""

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        """Window features per key."""
        return [self.found[_key(ask, key)] if key is not None else ask.reader.missing for key in ask.keys]

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        """Newest row per key."""
        return [self.found[_key(ask, key)] if key is not None else None for key in ask.keys]

    def floats(self, ask: LatestAsk) -> None:
        """Rows are kept as values."""


class OnlineCache:
    """Reads through to a store.

    Args:
        store: what is asked for everything that is not kept.
        limits: what is kept.
        monotonic: seconds that only rise.
    """

    def __init__(self, store: OnlineStore, limits: CacheLimits, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._limits = limits
        self._monotonic = monotonic
        self._kept: OrderedDict[Key, tuple[float, Any]] = OrderedDict()
        self._followed: dict[str, tuple[float, Followed | None]] = {}

    def clear(self) -> None:
        """Forget everything: other definitions are in force."""
        self._kept.clear()
        self._followed.clear()

    def covers(self, views: Sequence[str]) -> bool:
        """Whether reads of these views may be kept."""
        return not self._limits.views or self._limits.views.issuperset(views)

    async def fetch(self, asks: Sequence[Ask], contracts: Sequence[str]) -> tuple[Answers, int]:
        """(what `asks` need, age of its oldest kept part in milliseconds).

        Raises:
            UnavailableError: the store does not answer.
        """
        oldest = self._monotonic() - self._limits.max_staleness_s
        found: dict[Key, Any] = {}
        fetched_at = [self._monotonic()]
        missing = [ask for ask in (self._missing(ask, found, fetched_at, oldest) for ask in asks) if ask.keys]
        progress = [self._followed.get(contract) for contract in contracts]
        stale = any(entry is None or entry[0] < oldest for entry in progress)
        if not missing and not stale:
            _HITS.inc()
            fetched_at += [entry[0] for entry in progress if entry is not None]
            known = {c: e[1] for c, e in zip(contracts, progress, strict=True) if e is not None and e[1] is not None}
            return KeptAnswers(known, found, min(fetched_at)), self._age_ms(min(fetched_at))
        _MISSES.inc()
        began = self._monotonic()
        fetched = await self._store.fetch(missing, contracts)
        for contract in contracts:
            self._followed[contract] = began, fetched.followed.get(contract)
        for ask in missing:
            values: Sequence[Any] = fetched.windows(ask) if isinstance(ask, WindowAsk) else fetched.latest(ask)
            for key, value in zip(ask.keys, values, strict=True):
                assert key is not None
                found[_key(ask, key)] = value
                self._keep(_key(ask, key), began, value)
        CACHE_ENTRIES.set(len(self._kept))
        return KeptAnswers(fetched.followed, found, min(fetched_at)), self._age_ms(min(fetched_at))

    def _missing(self, ask: Ask, found: dict[Key, Any], fetched_at: list[float], oldest: float) -> Ask:
        """The ask for those keys that are not kept; what is kept goes into `found`."""
        keys: dict[str, None] = {}
        for key in ask.keys:
            if key is None:
                continue
            place = _key(ask, key)
            entry = self._kept.get(place)
            if entry is None or entry[0] < oldest:
                keys[key] = None
                continue
            self._kept.move_to_end(place)
            fetched_at.append(entry[0])
            found[place] = entry[1]
        return replace(ask, keys=tuple(keys))

    def _keep(self, place: Key, began: float, value: Any) -> None:
        self._kept[place] = began, value
        self._kept.move_to_end(place)
        if len(self._kept) > self._limits.max_entries:
            self._kept.popitem(last=False)

    def _age_ms(self, fetched_at: float) -> int:
        return int((self._monotonic() - fetched_at) * 1000)


def _key(ask: Ask, key: str) -> Key:
    if isinstance(ask, WindowAsk):
        return ask.group, ask.reader.name, ask.end_hop, key
    return ask.group, "", 0, key
