"""The vectors of one embedding in memory, one a row, and the nearest of them.

Every vector is compared. One pass multiplies all of them with the query in the field's own precision, which is what memory allows; its
rounding is bounded for each row, and whatever it cannot tell from the nearest is computed again in float64, so the answer is that of a
search by the definition. One thread changes an index, others may search it meanwhile and see each row as it was or as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace_feature.plan import Metric, VectorField
from millrace_feature.search.distances import bounds, distances
from millrace_feature.store import NewestRow
from millrace_feature.tiles import Floats, Ints
from millrace_feature.vectors import Numbers, dtype

BLOCK_ROWS = 4_096
EXACT_ROWS = 4_096
"""Rows computed in float64 at once."""
ENTITY_BYTES = 250
"""An entity's key and place, about."""


class IndexFullError(Exception):
    """The memory that indexes may take is used up."""


class Memory:
    """What the indexes of a process take together.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Count `size` bytes.

        Raises:
            IndexFullError: they would be more than allowed.
        """
        if self.used + size > self._limit:
            raise IndexFullError
        self.used += size

    def give(self, size: int) -> None:
        """Count `size` bytes less."""
        self.used -= size


@dataclass(slots=True)
class _Block:
    """`BLOCK_ROWS` rows; arrays never move, so searches need no lock."""

    vectors: Numbers
    times: Ints
    """Event times in microseconds."""
    sizes: Floats
    """Euclidean lengths."""
    alive: NDArray[np.bool_]
    """Whether the entity's newest row has a vector."""


class VectorIndex:
    """Vectors by entity.

    Args:
        field: the embedding, of a fixed length.
        memory: shared by all indexes.
    """

    def __init__(self, field: VectorField, memory: Memory) -> None:
        self._type = dtype(field)
        self._length = field.length
        self._memory = memory
        self._taken = 0
        self._keys: list[str] = []
        self._places: dict[str, int] = {}
        self._blocks: list[_Block] = []
        self.rows = 0
        """Entities with a vector."""

    def put(self, keys: Sequence[str], rows: Sequence[NewestRow | None], column: int) -> None:
        """Replace what is known of some entities.

        Args:
            keys: the entities.
            rows: their newest rows; None where there is none.
            column: place of the embedding among a row's values.

        Raises:
            IndexFullError: there is no memory for another entity.
        """
        for key, row in zip(keys, rows, strict=True):
            content = row[1][column] if row is not None else None
            place = self._places.get(key)
            if not isinstance(content, bytes):
                if place is not None:
                    self._set_alive(place, is_alive=False)
                continue
            block, at = self._room(len(self._keys) if place is None else place)
            assert row is not None
            block.vectors[at] = vector = np.frombuffer(content, self._type)
            block.times[at] = row[0]
            block.sizes[at] = np.sqrt(np.square(vector.astype(np.float64)).sum())
            if place is None:
                place = self._places[key] = len(self._keys)
                self._keys.append(key)
            self._set_alive(place, is_alive=True)

    def keep(self, keys: set[str]) -> None:
        """Forget the vectors of all entities but these."""
        for key, place in self._places.items():
            if key not in keys:
                self._set_alive(place, is_alive=False)

    def release(self) -> None:
        """Give the memory back; the index is not used again."""
        self._memory.give(self._taken)
        self._taken = 0
        self._blocks = []
        self.rows = 0

    def nearest(self, query: Floats, metric: Metric, count: int, *, oldest_us: int | None) -> list[str]:
        """The `count` nearest entities, nearest first, of equal distances by key; fewer where there are no more.

        Args:
            query: shape [length].
            metric: of the distance.
            count: how many.
            oldest_us: rows of an earlier event time do not count; None for all.
        """
        blocks, keys = self._blocks, self._keys
        lower, upper = self._bounds(blocks, len(keys), query, metric, oldest_us)
        counts = ~np.isposinf(lower)
        if int(counts.sum()) > count:
            counts &= lower <= np.partition(upper, count - 1)[count - 1]
        places = np.flatnonzero(counts)
        exact = np.empty(len(places))
        for start in range(0, len(places), EXACT_ROWS):
            chosen = places[start : start + EXACT_ROWS]
            rows = np.stack([blocks[place // BLOCK_ROWS].vectors[place % BLOCK_ROWS] for place in chosen.tolist()])
            exact[start : start + len(chosen)] = distances(rows, query, metric)
        ranked = sorted(zip(exact.tolist(), [keys[place] for place in places.tolist()], strict=True))
        return [key for _distance, key in ranked[:count]]

    def _bounds(
        self, blocks: Sequence[_Block], count: int, query: Floats, metric: Metric, oldest_us: int | None
    ) -> tuple[Floats, Floats]:
        """Bounds of every row's distance; infinite for rows that do not count."""
        with np.errstate(over="ignore"):
            own = query.astype(self._type)
        unit = float(np.finfo(self._type).eps) / 2
        lower, upper = np.empty(count), np.empty(count)
        for start in range(0, count, BLOCK_ROWS):
            block, end = blocks[start // BLOCK_ROWS], min(BLOCK_ROWS, count - start)
            with np.errstate(over="ignore", invalid="ignore"):
                # One thread a search: a matrix product would wake all cores for each block, and searches run side by side anyway.
                products = np.vecdot(block.vectors[:end], own).astype(np.float64)
            low, high = bounds(products, block.sizes[:end], query, metric, unit)
            out = ~block.alive[:end]
            if oldest_us is not None:
                out |= block.times[:end] < oldest_us
            low[out] = high[out] = np.inf
            lower[start : start + end], upper[start : start + end] = low, high
        return lower, upper

    def _room(self, place: int) -> tuple[_Block, int]:
        if place == len(self._blocks) * BLOCK_ROWS:
            size = BLOCK_ROWS * (self._length * self._type.itemsize + 17 + ENTITY_BYTES)
            self._memory.take(size)
            self._taken += size
            self._blocks.append(
                _Block(
                    np.zeros((BLOCK_ROWS, self._length), self._type),
                    np.zeros(BLOCK_ROWS, np.int64),
                    np.zeros(BLOCK_ROWS),
                    np.zeros(BLOCK_ROWS, np.bool_),
                )
            )
        return self._blocks[place // BLOCK_ROWS], place % BLOCK_ROWS

    def _set_alive(self, place: int, *, is_alive: bool) -> None:
        block, at = self._blocks[place // BLOCK_ROWS], place % BLOCK_ROWS
        self.rows += int(is_alive) - int(block.alive[at])
        block.alive[at] = is_alive
