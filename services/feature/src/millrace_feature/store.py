"""What the online store must do: `embedded.py` is the one of one machine, `redis_store.py` the one that replicas share."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from millrace_kit.bus import TopicPartition

from millrace_feature.plan import LatestView, View
from millrace_feature.rows import Row, Scalar
from millrace_feature.tile_fields import FieldChange
from millrace_feature.tiles import Floats, Ints, Tiles
from millrace_feature.windows import WindowReader


class StoreMovedError(Exception):
    """Another replica has changed groups or positions this one relies on; nothing was changed. Follow the definitions again."""


class StoreFillingError(Exception):
    """A group of the contract is being filled; nothing was changed. Apply the same again in a moment."""


Mark = tuple[str, str, int]
"""(contract, source, source offset) of a batch."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How far one contract's records are in the store."""

    records: int = 0
    """Records applied since the store was made."""
    watermark_us: int | None = None
    """Newest event time applied."""
    version: int = -1
    """Delta version the contract was first filled from; records up to it are counted."""


@dataclass(frozen=True, slots=True)
class Change:
    """Effects of some messages, applied in one transaction with the positions after them."""

    tiles: Sequence[tuple[str, FieldChange]] = ()
    """(group, fields that its tiles go into)."""
    rows: Sequence[tuple[str, Sequence[Row]]] = ()
    """(group, rows)."""
    seen: Sequence[Mark] = ()
    """Every batch inside."""
    positions: Mapping[TopicPartition, int] = field(default_factory=dict)
    starts: Mapping[TopicPartition, int] = field(default_factory=dict)
    """Positions the messages were read from; a shared store refuses the change when they are no longer its own."""
    followed: Mapping[str, Followed] = field(default_factory=dict)
    base: Mapping[str, Followed] = field(default_factory=dict)
    """Progress that `followed` was computed from."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Per contract of the messages the groups they were computed for."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Newest table version per contract of the messages."""


@dataclass(frozen=True, slots=True)
class WindowAsk:
    """Windows of some entities that end before `end_hop`, in units of `reader.hop_us`."""

    group: str
    reader: WindowReader
    keys: Sequence[str | None]
    end_hop: int


@dataclass(frozen=True, slots=True)
class LatestAsk:
    """Newest rows of some entities at `time_us`."""

    group: str
    keys: Sequence[str | None]
    time_us: int
    width: int
    """Features of the view."""


Ask = WindowAsk | LatestAsk
Content = Sequence[Tiles] | Sequence[Row]
"""What a group is filled with: tiles of one or more levels, none covering what another one covers, or rows."""
NewestRow = tuple[int, tuple[Scalar, ...]]
"""(event time, values)."""


class Answers(Protocol):
    """What a store knows about some asks; answering them takes no more waiting."""

    @property
    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        ...

    def windows(self, ask: WindowAsk) -> list[list[float]]:
        """Window features per key."""
        ...

    def latest(self, ask: LatestAsk) -> list[NewestRow | None]:
        """Newest row per key."""
        ...

    def floats(self, ask: LatestAsk) -> tuple[Ints, Floats] | None:
        """Newest rows as arrays: (event times with `NO_ROW` where there is none, values: [keys, features] with NaN where missing).

        None where a value is no float, or where the store has no such rows at hand: then `latest` has the answer.
        """
        ...


class OnlineStore(Protocol):
    """Tiles and rows per group and entity, durable.

    One worker of a process writes; reads may come at any time and see whole groups of changes of one entity.
    """

    @property
    def is_shared(self) -> bool:
        """Whether replicas share it: then they share the work of keeping it up too."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Held while groups are made and dropped; one replica at a time.

        Raises:
            UnavailableError: another one holds it, or the store does not answer.
        """
        ...

    def groups(self) -> Mapping[str, int]:
        """Filled group -> Delta version it was filled from."""
        ...

    def open(self, views: Iterable[View]) -> None:
        """Make the groups of `views` that are filled readable."""
        ...

    def reserve(self, view: View, version: int) -> bool:
        """Announce that the view's group will be filled from `version`; false when newer batches are applied already."""
        ...

    def fill(self, view: View, content: Content, *, version: int, followed: Followed | None) -> None:
        """Make the view's group, which was reserved, from the lake at `version`, whole or not at all."""
        ...

    def keep(self, groups: Iterable[str]) -> None:
        """Drop every group that is not named."""
        ...

    def tidy(self) -> None:
        """Remove what was dropped a while ago."""
        ...

    def is_intact(self) -> bool:
        """Whether every group that was opened is still there."""
        ...

    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        ...

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next bus offset to read."""
        ...

    def seen(self, marks: Sequence[Mark]) -> Collection[Mark]:
        """Those of some batches that were applied."""
        ...

    def apply(self, change: Change) -> None:
        """Make `change` durable, then visible.

        Raises:
            StoreMovedError, StoreFillingError: another replica came between.
            UnavailableError: the store does not answer; the change may have been applied, `positions` tells.
        """
        ...

    def prune(self, view: View, before_us: int, head_before_us: int) -> None:
        """Forget what no read at or after `before_us` needs, and of fresh heads what none at or after `head_before_us` does."""
        ...

    async def fetch(self, asks: Sequence[Ask], contracts: Sequence[str]) -> Answers:
        """Get what `asks` and the progress of `contracts` need, in one round trip.

        Raises:
            UnavailableError: the store does not answer in time, or its groups are being made anew.
        """
        ...

    def keys(self, group: str) -> Sequence[str]:
        """The entities of a newest-row view's group that were there all the while, perhaps with some that were not.

        Raises:
            UnavailableError: the store does not answer, or the group is not there.
        """
        ...

    def entities(self) -> int:
        """Entities that hold at least one tile or row, over all groups."""
        ...

    async def close(self) -> None:
        """Close files and connections."""
        ...


def rows_bound_us(view: LatestView, before_us: int) -> int:
    """Rows before this instant are too old for any read at or after `before_us`."""
    return before_us - view.ttl_us if view.ttl_us else before_us


def tiles_of(content: Content) -> list[Tiles]:
    """The content of a windowed view's group."""
    return [part for part in content if isinstance(part, Tiles)]


def rows_of(content: Content) -> list[Row]:
    """The content of a newest-row view's group."""
    return [part for part in content if isinstance(part, Row)]
