"""How the online store lies in Redis: names of keys, and tiles and rows as bytes.

Below one prefix:
- `groups`, a hash: group -> `Group` as text; the ready ones are what reads and changes refer to;
- `followed`, a hash: contract -> progress;
- `pos:<topic>`, a hash: partition -> next offset to read;
- `seen:<contract>:<source>`, a sorted set of the newest batch offsets applied;
- `e:<id>`, a set: the entities of the group with this id;
- `t:<id>:<entity>`, a hash: number of a run of `CHUNK_HOPS` hops -> its tiles, packed;
- `r:<id>:<entity>`, a sorted set by event time: rows of a newest-row view;
- `trash`, a set of ids whose keys are being removed; `lock`, held by the replica that fills.
A group's id is new each time it is filled, so what a failed or outdated fill left can never be mistaken for values.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from millrace_feature.rows import Scalar, from_text, to_text
from millrace_feature.store import Followed
from millrace_feature.tiles import Ints, Stats, neutral_stats

CHUNK_HOPS = 64
"""Hops in one hash field. A change rewrites whole fields; a read fetches those its widest window touches."""

State = Literal["filling", "ready", "retired"]


@dataclass(frozen=True, slots=True)
class Group:
    """One group's entry."""

    id: str
    contract: str
    version: int
    """Delta version it is filled from."""
    columns: int
    """Aggregated columns; 0 for a newest-row view."""
    state: State
    since_ms: int
    """When it came into this state."""

    def text(self) -> bytes:
        """As Redis keeps it; the id comes first, so that a read need not parse the rest."""
        rest = asdict(self)
        del rest["id"]
        return f"{self.id} {json.dumps(rest)}".encode()

    @classmethod
    def parse(cls, text: bytes) -> "Group":
        """What `text` wrote."""
        found, _space, rest = text.partition(b" ")
        return cls(id=found.decode(), **json.loads(rest))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a contract is, with the newest table version among the batches applied."""

    followed: Followed
    applied: int = -1

    def text(self) -> str:
        """As Redis keeps it."""
        return json.dumps([self.followed.records, self.followed.watermark_us, self.followed.version, self.applied])

    @classmethod
    def parse(cls, text: bytes) -> "Progress":
        """What `text` wrote."""
        records, watermark_us, version, applied = json.loads(text)
        return cls(Followed(records, watermark_us, version), applied)


class Keys:
    """Names of keys below a prefix."""

    def __init__(self, prefix: str) -> None:
        self.groups = f"{prefix}groups"
        self.followed = f"{prefix}followed"
        self.trash = f"{prefix}trash"
        self.lock = f"{prefix}lock"
        self.format = f"{prefix}format"
        self._prefix = prefix

    def positions(self, topic: str) -> str:
        """Next offsets of a topic."""
        return f"{self._prefix}pos:{topic}"

    def topics(self) -> str:
        """Topics that have positions."""
        return f"{self._prefix}topics"

    def seen(self, contract: str, source: str) -> str:
        """Batches of one source."""
        return f"{self._prefix}seen:{contract}:{source}"

    def entities(self, group_id: str) -> str:
        """Entities of a group."""
        return f"{self._prefix}e:{group_id}"

    def tiles(self, group_id: str, entity: str) -> str:
        """Tiles of an entity."""
        return f"{self._prefix}t:{group_id}:{entity}"

    def rows(self, group_id: str, entity: str) -> str:
        """Rows of an entity."""
        return f"{self._prefix}r:{group_id}:{entity}"


@dataclass(frozen=True, slots=True)
class Run:
    """Some tiles of one entity in hop order."""

    hops: Ints
    stats: Stats

    def pack(self) -> bytes:
        """Hops as int64, then counts, sums, lows and highs as float64, all little-endian."""
        return b"".join([self.hops.astype("<i8").tobytes(), *(array.astype("<f8").tobytes() for array in self.stats)])

    @classmethod
    def unpack(cls, packed: bytes, columns: int) -> "Run":
        """What `pack` wrote."""
        size = len(packed) // (8 + 32 * columns)
        hops = np.frombuffer(packed, "<i8", size)
        values = np.frombuffer(packed, "<f8", offset=8 * size).reshape(4, columns, size)
        return cls(hops, Stats(*values))

    def merged(self, other: "Run") -> "Run":
        """Both together; tiles of one hop become one, as `TileSeries.add` makes them."""
        hops = np.union1d(self.hops, other.hops)
        if len(hops) == len(self.hops) + len(other.hops):
            stats = neutral_stats(len(self.stats.counts), len(hops))
            for target, mine, theirs in zip(stats, self.stats, other.stats, strict=True):
                target[:, hops.searchsorted(self.hops)] = mine
                target[:, hops.searchsorted(other.hops)] = theirs
            return Run(hops, stats)
        stats = neutral_stats(len(self.stats.counts), len(hops))
        for target, mine in zip(stats, self.stats, strict=True):
            target[:, hops.searchsorted(self.hops)] = mine
        places = hops.searchsorted(other.hops)
        stats.counts[:, places] += other.stats.counts
        stats.sums[:, places] += other.stats.sums
        stats.lows[:, places] = np.minimum(stats.lows[:, places], other.stats.lows)
        stats.highs[:, places] = np.maximum(stats.highs[:, places], other.stats.highs)
        return Run(hops, stats)


def joined_runs(runs: list[Run], columns: int) -> Run:
    """Runs that follow each other as one."""
    if not runs:
        return Run(np.zeros(0, np.int64), neutral_stats(columns, 0))
    stats = Stats(*(np.concatenate(arrays, axis=1) for arrays in zip(*(run.stats for run in runs), strict=True)))
    return Run(np.concatenate([run.hops for run in runs]), stats)


def pack_row(time_us: int, values: tuple[Scalar, ...]) -> bytes:
    """A row as a member of its entity's sorted set."""
    return f"{time_us} {to_text(values)}".encode()


def unpack_row(packed: bytes) -> tuple[int, tuple[Scalar, ...]]:
    """(event time, values) of what `pack_row` wrote."""
    time_us, _space, text = packed.partition(b" ")
    return int(time_us), from_text(text)


def parse_groups(found: Mapping[bytes, bytes]) -> dict[str, Group]:
    """The hash `groups`."""
    return {name.decode(): Group.parse(text) for name, text in found.items()}
