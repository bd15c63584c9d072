"""Cells of sketches beside tiles or windows: what is merged by maximum (registers) or addition (buckets), as three integer columns."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from millrace_feature.functions import Schema
from millrace_feature.sketches import CELL_BITS, Ints

MAX_SKETCHES = 1 << (32 - CELL_BITS)


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells, sorted by (place, id) unless said otherwise."""

    places: Ints
    """Tile or window each belongs to."""
    ids: Ints
    """The sketch's number above `CELL_BITS` bits of cell."""
    weights: Ints

    @classmethod
    def none(cls) -> "Cells":
        """No cells."""
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty)

    @classmethod
    def of(cls, sketch: int, places: Ints, cells: Ints, weights: Ints) -> "Cells":
        """Cells of one sketch, in any order."""
        return cls(places, cells + (sketch << CELL_BITS), weights)

    @classmethod
    def joined(cls, parts: Iterable["Cells"]) -> "Cells":
        """All of them, in no order."""
        found = list(parts)
        if not found:
            return cls.none()
        return cls(*(np.concatenate([getattr(part, name) for part in found]) for name in ("places", "ids", "weights")))

    def __len__(self) -> int:
        return len(self.places)

    def and_(self, other: "Cells") -> "Cells":
        """Both, in no order."""
        return Cells.joined([self, other])

    def moved(self, by: int) -> "Cells":
        """With other numbers of places."""
        return Cells(self.places + by, self.ids, self.weights)

    def between(self, start: int, end: int) -> "Cells":
        """Those of the places [start, end)."""
        chosen = slice(*self.places.searchsorted([start, end]).tolist())
        return Cells(self.places[chosen], self.ids[chosen], self.weights[chosen])

    def of_sketch(self, number: int) -> tuple[Ints, Ints, Ints]:
        """(place, cell, weight) of one sketch."""
        chosen = (self.ids >> CELL_BITS) == number
        return self.places[chosen], self.ids[chosen] & ((1 << CELL_BITS) - 1), self.weights[chosen]

    def at(self, places: Ints, schema: Schema) -> "Cells":
        """At other places, merged there."""
        return Cells(places, self.ids, self.weights).reduced(schema)

    def reduced(self, schema: Schema) -> "Cells":
        """Sorted, with each (place, id) once."""
        if not len(self):
            return self
        keys = (self.places << 32) | self.ids
        order = np.argsort(keys, kind="stable")
        keys, weights = keys[order], self.weights[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        ids = keys[starts] & 0xFFFF_FFFF
        by_maximum = np.array([kind == "distinct" for _column, kind in schema.sketches])[ids >> CELL_BITS]
        highest, total = np.maximum.reduceat(weights, starts), np.add.reduceat(weights, starts)
        return Cells(keys[starts] >> 32, ids, np.where(by_maximum, highest, total))
