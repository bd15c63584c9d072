"""The online values of one process in memory: what a read touches. Kept in step with the durable store by `embedded.py`.

An entity's tiles are the same fields that Redis holds (`tile_fields.py`); its finished windows are kept until its tiles or the asked instant
change.
"""

import bisect
import threading
from collections.abc import Iterable, Sequence

from millrace_feature.rows import Row, Scalar, order_of
from millrace_feature.tile_fields import Fields, Layout, is_outdated
from millrace_feature.windows import WindowReader

CHUNK = 256
"""Entities or rows changed while readers wait."""


class _Entity:
    """One entity's fields and finished windows."""

    __slots__ = ("cached", "fields")

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self.cached: dict[str, tuple[int, list[float]]] = {}
        """View -> (end, features)."""


class FieldIndex:
    """The tiles of one group by entity."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._entities: dict[str, _Entity] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entities)

    def get(self, entities: Sequence[str], names: Sequence[Sequence[str]]) -> list[list[bytes | None]]:
        """Contents of the named fields per entity."""
        found = (self._entities.get(key) for key in entities)
        return [
            [entity.fields.get(name) for name in wanted] if entity is not None else [None] * len(wanted)
            for entity, wanted in zip(found, names, strict=True)
        ]

    def put(self, fields: Fields) -> None:
        """Keep the contents of some fields."""
        for start in range(0, len(fields), CHUNK):
            with self._lock:
                for key, content in fields[start : start + CHUNK]:
                    entity = self._entities.get(key)
                    if entity is None:
                        entity = self._entities[key] = _Entity()
                    entity.fields.update(content)
                    entity.cached = {}  # a new one: a read that began before must not put into it

    def prune(self, before_us: int, head_before_us: int) -> list[tuple[str, str]]:
        """Drop what covers nothing at or after the bounds; returns (entity, field)."""
        dropped = []
        with self._lock:
            for key, entity in list(self._entities.items()):
                old = [name for name in entity.fields if is_outdated(name, self.layout, before_us, head_before_us)]
                for name in old:
                    del entity.fields[name]
                    dropped.append((key, name))
                if not entity.fields:
                    del self._entities[key]
        return dropped

    def read(self, reader: WindowReader, keys: Sequence[str | None], end: int) -> list[list[float]]:
        """Features per key; a null key has none, an unknown one has empty windows. The lists are shared: do not change them."""
        out: list[list[float]] = [reader.missing] * len(keys)
        replies, places, caches = [], [], []
        names = reader.fields(end).names
        with self._lock:
            for place, key in enumerate(keys):
                if key is None:
                    continue
                entity = self._entities.get(key)
                if entity is None:
                    out[place] = reader.empty
                elif (cached := entity.cached.get(reader.name)) is not None and cached[0] == end:
                    out[place] = cached[1]
                else:
                    replies.append([entity.fields.get(name) for name in names])
                    places.append(place)
                    caches.append(entity.cached)
        if replies:
            for place, cache, features in zip(places, caches, reader.read(replies, end), strict=True):
                out[place] = features
                cache[reader.name] = (end, features)
        return out


class RowSeries:
    """One entity's rows in event-time order."""

    __slots__ = ("times", "values")

    def __init__(self) -> None:
        self.times: list[int] = []
        self.values: list[tuple[Scalar, ...]] = []

    def beats(self, row: Row) -> bool:
        """Whether no row with the same time wins against `row`."""
        at = bisect.bisect_left(self.times, row.time_us)
        if at == len(self.times) or self.times[at] != row.time_us:
            return True
        return order_of(row.values) > order_of(self.values[at])

    def add(self, row: Row) -> None:
        """Keep `row` in place of one with the same time."""
        at = bisect.bisect_left(self.times, row.time_us)
        if at < len(self.times) and self.times[at] == row.time_us:
            self.values[at] = row.values
            return
        self.times.insert(at, row.time_us)
        self.values.insert(at, row.values)

    def at(self, time_us: int) -> tuple[int, tuple[Scalar, ...]] | None:
        """(time, values) of the newest row at or before `time_us`."""
        place = bisect.bisect_right(self.times, time_us)
        return (self.times[place - 1], self.values[place - 1]) if place else None

    def prune(self, before_us: int, *, keep_newest: bool) -> None:
        """Drop rows before `before_us`, but for the newest of them when `keep_newest`."""
        first = bisect.bisect_left(self.times, before_us)
        if keep_newest and first:
            first -= 1
        del self.times[:first], self.values[:first]


class RowIndex:
    """The rows of one group by entity."""

    def __init__(self) -> None:
        self._series: dict[str, RowSeries] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._series)

    def keys(self) -> list[str]:
        """The entities that have rows."""
        with self._lock:
            return list(self._series)

    def winners(self, rows: Iterable[Row]) -> list[Row]:
        """Those of `rows` (at most one per key and time) that no kept row with the same time beats."""
        return [row for row in rows if (series := self._series.get(row.key)) is None or series.beats(row)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep `rows`, which must be winners."""
        for start in range(0, len(rows), CHUNK):
            with self._lock:
                for row in rows[start : start + CHUNK]:
                    series = self._series.get(row.key)
                    if series is None:
                        series = self._series[row.key] = RowSeries()
                    series.add(row)

    def prune(self, before_us: int, *, keep_newest: bool) -> None:
        """Drop rows before `before_us`."""
        with self._lock:
            for series in self._series.values():
                series.prune(before_us, keep_newest=keep_newest)
            self._series = {key: series for key, series in self._series.items() if series.times}

    def read(self, keys: Iterable[str | None], time_us: int) -> list[tuple[int, tuple[Scalar, ...]] | None]:
        """The newest row per key at `time_us`; None where there is none."""
        with self._lock:
            found = [self._series.get(key) if key is not None else None for key in keys]
            return [series.at(time_us) if series is not None else None for series in found]
