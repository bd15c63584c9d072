"""How tiles lie in a store: per entity a few named fields, each a run of tiles as bytes. Both online stores keep these and nothing else.

Tiles come at up to three levels: single instants or micro-tiles behind the last complete hop (`f`, only for views with a fresh head), hops
(`h`), and coarse tiles of `COARSE_HOPS` hops (`c`, only where windows are wide). A change writes a tile into every level; a read takes
the middle of a window from coarse tiles and its ends from finer ones, so nothing is ever subtracted. A field is named by its level and
the number of its run: `h1234`. Sketches lie beside in `H1234`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from millrace_feature.cells import Cells
from millrace_feature.functions import Schema
from millrace_feature.plan import WindowView
from millrace_feature.tiles import Ints, Stats, Tiles, heights, merged_tiles, neutral_stats

HOPS_A_FIELD = 12
COARSE_HOPS = 12
"""Hops of one coarse tile: an hour of five-minute hops."""
COARSE_A_FIELD = 24
COARSE_FROM_HOPS = 48
"""Views whose widest window has fewer hops keep no coarse tiles: they would be written for nothing."""


@dataclass(frozen=True, slots=True)
class Level:
    """One width of tiles."""

    letter: str
    unit_us: int
    run: int
    """Tiles a field may hold."""

    @property
    def run_us(self) -> int:
        """Time a field covers."""
        return self.unit_us * self.run


@dataclass(frozen=True, slots=True)
class Layout:
    """What is kept of one group, finest level first."""

    schema: Schema
    levels: tuple[Level, ...]


@lru_cache(maxsize=1024)
def layout_of(view: WindowView) -> Layout:
    """The layout of a view's group."""
    levels = [Level("h", view.hop_us, HOPS_A_FIELD)]
    if view.head_us:
        levels.insert(0, Level("f", view.head_us, view.hop_us // view.head_us))
    if view.reach_us >= COARSE_FROM_HOPS * view.hop_us:
        levels.append(Level("c", view.hop_us * COARSE_HOPS, COARSE_A_FIELD))
    return Layout(view.schema, tuple(levels))


def pack_tiles(schema: Schema, hops: Ints, stats: Stats) -> tuple[bytes, int]:
    """(tiles one after the other, bytes of one): the hop as int64, then its numbers as float64, little-endian."""
    records = np.empty((len(hops), 1 + schema.numbers), "<f8")
    records.view("<i8")[:, 0] = hops
    records[:, 1:] = np.concatenate(stats).T
    return records.tobytes(), 8 * records.shape[1]


def unpack_tiles(schema: Schema, packed: bytes) -> tuple[Ints, Stats]:
    """What `pack_tiles` wrote."""
    records = np.frombuffer(packed, "<f8").reshape(-1, 1 + schema.numbers)
    hops = np.ascontiguousarray(records.view("<i8")[:, 0])
    numbers = np.ascontiguousarray(records[:, 1:].T)
    ends = np.cumsum(heights(schema)).tolist()
    return hops, Stats(*(numbers[start:end] for start, end in pairwise([0, *ends])))


@lru_cache(maxsize=1024)
def _cell_record(run: int) -> np.dtype[Any]:
    """A cell in a field: the tile's place in the run, the cell, its weight."""
    return np.dtype([("at", "<u1" if run <= 256 else "<i8"), ("id", "<u4"), ("weight", "<u4")])


def pack_cells(cells: Cells, run: int) -> bytes:
    """Cells whose places are the tiles' places in their field."""
    records = np.empty(len(cells), _cell_record(run))
    records["at"], records["id"], records["weight"] = cells.places, cells.ids, cells.weights
    return records.tobytes()


def unpack_cells(packed: bytes, run: int) -> Cells:
    """What `pack_cells` wrote."""
    records = np.frombuffer(packed, _cell_record(run))
    return Cells(*(records[name].astype(np.int64) for name in ("at", "id", "weight")))


def cell_bytes(run: int) -> int:
    """Bytes of one cell."""
    return _cell_record(run).itemsize


Fields = list[tuple[str, dict[str, bytes]]]
"""(entity, content by field)."""


class _LevelFields:
    """The fields of one level that some tiles go into."""

    def __init__(self, schema: Schema, level: Level, tiles: Tiles) -> None:
        self._schema = schema
        self._level = level
        runs = tiles.hops // level.run
        starts = np.flatnonzero(np.r_[True, (tiles.codes[1:] != tiles.codes[:-1]) | (runs[1:] != runs[:-1])])
        lengths = np.diff(np.r_[starts, len(tiles)])
        self.codes: list[int] = tiles.codes[starts].tolist()
        self.runs: list[int] = runs[starts].tolist()
        fields = np.repeat(np.arange(len(starts)), lengths)
        self._firsts = runs[starts] * level.run
        """First tile of each field."""
        places = tiles.hops - self._firsts[fields]
        self._tiles = Tiles(schema, tiles.unit_us, [""], fields, places, tiles.stats, tiles.cells)

    def merged(self, old: Sequence[bytes | None], old_cells: Sequence[bytes | None]) -> tuple[list[bytes], list[bytes]]:
        """Contents of the fields, from what they hold now."""
        tiles = self._tiles
        if any(old):
            tiles = merged_tiles(self._stored(old, old_cells), tiles)
        packed, width = pack_tiles(self._schema, tiles.hops + self._firsts[tiles.codes], tiles.stats)
        edges = tiles.codes.searchsorted(np.arange(len(self.codes) + 1)).tolist()
        content = [packed[start * width : end * width] for start, end in pairwise(edges)]
        if not self._schema.sketches:
            return content, []
        run = self._level.run
        cells = tiles.cells
        bounds = cells.places.searchsorted(edges).tolist()
        bare = Cells(tiles.hops[cells.places], cells.ids, cells.weights)
        packed, width = pack_cells(bare, run), cell_bytes(run)
        return content, [packed[start * width : end * width] for start, end in pairwise(bounds)]

    def _stored(self, old: Sequence[bytes | None], old_cells: Sequence[bytes | None]) -> Tiles:
        width = 8 * (1 + self._schema.numbers)
        hops, stats = unpack_tiles(self._schema, b"".join(part for part in old if part))
        fields = np.repeat(np.arange(len(old)), [len(part) // width if part else 0 for part in old])
        places = hops - self._firsts[fields]
        cells = Cells.none()
        if self._schema.sketches:
            size, run = cell_bytes(self._level.run), self._level.run
            found = unpack_cells(b"".join(part for part in old_cells if part), run)
            of = np.repeat(np.arange(len(old_cells)), [len(part) // size if part else 0 for part in old_cells])
            at = (fields * run + places).searchsorted(of * run + found.places)
            cells = Cells(at, found.ids, found.weights)
        return Tiles(self._schema, self._tiles.unit_us, self._tiles.keys, fields, places, stats, cells)


class FieldChange:
    """The fields that tiles of one group go into, entity by entity.

    Args:
        layout: of the group.
        parts: tiles of one or more of its levels, none covering what another one covers; each goes into its level and those above.
    """

    def __init__(self, layout: Layout, parts: Iterable[Tiles]) -> None:
        self._layout = layout
        self.entities: list[str] = []
        self.names: list[list[str]] = []
        """Names of the fields per entity."""
        self._levels: list[tuple[_LevelFields, list[int], list[int]]] = []
        found = {key: number for number, key in enumerate(dict.fromkeys(k for part in parts for k in _present(part)))}
        self.entities = list(found)
        self.names = [[] for _entity in found]
        for level in layout.levels:
            tiles: Tiles | None = None
            for part in parts:
                if part.unit_us <= level.unit_us and len(part):
                    coarser = part.coarser(level.unit_us)
                    tiles = coarser if tiles is None else merged_tiles(tiles, coarser)
            if tiles is None:
                continue
            fields = _LevelFields(layout.schema, level, tiles)
            entities = [found[tiles.keys[code]] for code in fields.codes]
            places = []
            for entity, run in zip(entities, fields.runs, strict=True):
                names = self.names[entity]
                places.append(len(names))
                names.append(f"{level.letter}{run}")
                if layout.schema.sketches:
                    names.append(f"{level.letter.upper()}{run}")
            self._levels.append((fields, entities, places))

    def content(self, old: Sequence[Sequence[bytes | None]] | None) -> Fields:
        """What the fields hold afterwards.

        Args:
            old: what they hold now, as `names`; None when none of them is there.
        """
        out: list[dict[str, bytes]] = [{} for _entity in self.entities]
        sketched = bool(self._layout.schema.sketches)
        for fields, entities, places in self._levels:
            where = list(zip(entities, places, strict=True))
            before = [old[entity][place] for entity, place in where] if old is not None else []
            before_cells = [old[entity][place + 1] for entity, place in where] if old is not None and sketched else []
            tiles, cells = fields.merged(before, before_cells)
            for number, (entity, place) in enumerate(where):
                names = self.names[entity]
                out[entity][names[place]] = tiles[number]
                if sketched:
                    out[entity][names[place + 1]] = cells[number]
        return list(zip(self.entities, out, strict=True))


def _present(tiles: Tiles) -> Iterable[str]:
    if not len(tiles):
        return []
    starts = np.flatnonzero(np.r_[True, tiles.codes[1:] != tiles.codes[:-1]])
    return [tiles.keys[code] for code in tiles.codes[starts].tolist()]


def is_outdated(name: str, layout: Layout, before_us: int, head_before_us: int) -> bool:
    """Whether a field covers nothing at or after the bound (the second one is the bound of the head)."""
    for level in layout.levels:
        if level.letter == name[0].lower():
            end_us = (int(name[1:]) + 1) * level.run_us
            return end_us <= (head_before_us if level.letter == "f" else before_us)
    return True


@dataclass(frozen=True, slots=True)
class StoredLevel:
    """Tiles of one level of some entities, sorted by (code, hop), followed by one neutral tile."""

    level: Level
    codes: Ints
    hops: Ints
    stats: Stats
    cells: Cells

    @classmethod
    def of_tiles(cls, level: Level, tiles: Tiles) -> "StoredLevel":
        """From tiles in memory."""
        return cls(level, tiles.codes, tiles.hops, _closed(tiles.schema, tiles.stats), tiles.cells)

    @classmethod
    def of_fields(
        cls,
        schema: Schema,
        level: Level,
        runs: Sequence[int],
        packed: Sequence[Sequence[bytes | None]],
        packed_cells: Sequence[Sequence[bytes | None]],
    ) -> "StoredLevel":
        """From fields.

        Args:
            schema: of the group.
            level: theirs.
            runs: numbers of the fields, rising.
            packed: per entity their contents.
            packed_cells: per entity the sketches, when there are any.
        """
        width = 8 * (1 + schema.numbers)
        lengths = [sum([len(part) for part in parts if part]) // width for parts in packed]
        hops, stats = unpack_tiles(schema, b"".join([part for parts in packed for part in parts if part]))
        codes = np.repeat(np.arange(len(packed)), lengths)
        cells = Cells.none()
        if schema.sketches and len(codes):
            size, firsts = cell_bytes(level.run), [run * level.run for run in runs]
            counts = [[len(part) // size if part else 0 for part in parts] for parts in packed_cells]
            found = unpack_cells(b"".join([part for parts in packed_cells for part in parts if part]), level.run)
            starts = np.repeat(np.array(firsts * len(packed), np.int64), [n for parts in counts for n in parts])
            of = np.repeat(np.arange(len(packed)), [sum(parts) for parts in counts])
            first, span = int(hops.min()), int(hops.max() - hops.min()) + 1
            at = (codes * span + (hops - first)).searchsorted(of * span + (found.places + starts - first))
            cells = Cells(at, found.ids, found.weights)
        return cls(level, codes, hops, _closed(schema, stats), cells)


def _closed(schema: Schema, stats: Stats) -> Stats:
    return Stats(*(np.concatenate(pair, axis=1) for pair in zip(stats, neutral_stats(schema, 1), strict=True)))
