"""What the online store must do; `embedded.py` is the implementation of one machine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from millrace_kit.bus import TopicPartition

from millrace_feature.index import WindowReader
from millrace_feature.plan import LatestView, View
from millrace_feature.rows import Row, Scalar
from millrace_feature.tiles import Tiles


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

    tiles: Sequence[tuple[str, Tiles]] = ()
    """(group, tiles)."""
    rows: Sequence[tuple[str, Sequence[Row]]] = ()
    """(group, rows)."""
    seen: Sequence[tuple[str, str, int]] = ()
    """(contract, source, source offset) of every batch inside."""
    positions: Mapping[TopicPartition, int] = field(default_factory=dict)
    followed: Mapping[str, Followed] = field(default_factory=dict)


class OnlineStore(Protocol):
    """Tiles and rows per group and entity, durable, with reads from memory.

    One worker writes; reads may come from any thread at any time and see whole groups of changes.
    """

    def groups(self) -> Mapping[str, int]:
        """Group -> Delta version it was filled from."""
        ...

    def open(self, views: Iterable[View]) -> None:
        """Make the groups of `views` that are filled readable."""
        ...

    def fill(self, view: View, content: Tiles | Sequence[Row], *, version: int, followed: Followed | None) -> None:
        """Make the view's group from the lake at `version`, whole or not at all."""
        ...

    def keep(self, groups: Iterable[str]) -> None:
        """Drop every group that is not named."""
        ...

    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        ...

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next bus offset to read."""
        ...

    def is_seen(self, contract: str, source: str, source_offset: int) -> bool:
        """Whether that batch was applied."""
        ...

    def apply(self, change: Change) -> None:
        """Make `change` durable, then visible."""
        ...

    def prune(self, view: View, before_us: int) -> None:
        """Forget what no read at or after `before_us` needs."""
        ...

    def windows(self, group: str, reader: WindowReader, keys: Iterable[str | None], end_hop: int) -> list[list[float]]:
        """Window features per key."""
        ...

    def latest(
        self, group: str, keys: Iterable[str | None], time_us: int
    ) -> list[tuple[int, tuple[Scalar, ...]] | None]:
        """Newest row per key."""
        ...

    def entities(self) -> int:
        """Entities that hold at least one tile or row, over all groups."""
        ...

    def close(self) -> None:
        """Close files."""
        ...


def rows_bound_us(view: LatestView, before_us: int) -> int:
    """Rows before this instant are too old for any read at or after `before_us`."""
    return before_us - view.ttl_us if view.ttl_us else before_us
