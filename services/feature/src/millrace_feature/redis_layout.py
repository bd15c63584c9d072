"""How the online store lies in Redis: names of keys, and entries as text (tiles: `tile_fields.py`, rows: `packed_rows.py`).

Below one prefix:
- `groups`, a hash: group -> `Group` as text; the ready ones are what reads and changes refer to;
- `followed`, a hash: contract -> progress;
- `pos:<topic>`, a hash: partition -> next offset to read;
- `seen:<contract>:<source>`, a sorted set of the newest batch offsets applied;
- `e:<id>`, a set: the entities of the group with this id;
- `t:<id>:<entity>`, a hash: the fields of `tile_fields.py`;
- `n:<entity>`, a hash: id of each newest-row view's group -> the entity's newest row, so that one command reads all views of an entity;
- `r:<id>:<entity>`, a sorted set by event time: the rows of a newest-row view, for reads of earlier instants;
- `trash`, a set of ids whose keys are being removed; `lock`, held by the replica that fills.
A group's id is new each time it is filled, so what a failed or outdated fill left can never be mistaken for values.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from millrace_feature.store import Followed

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

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: bytes) -> "Progress":
        """What `text` wrote; it is the same for many reads."""
        records, watermark_us, version, applied = json.loads(text)
        return Progress(Followed(records, watermark_us, version), applied)


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

    def newest(self, entity: str) -> str:
        """Newest rows of an entity, of all groups."""
        return f"{self._prefix}n:{entity}"


def parse_groups(found: Mapping[bytes, bytes]) -> dict[str, Group]:
    """The hash `groups`."""
    return {name.decode(): Group.parse(text) for name, text in found.items()}
