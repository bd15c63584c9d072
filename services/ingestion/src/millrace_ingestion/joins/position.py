"""How far a join is, and what its next step takes in. Pure: from values to values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import msgspec

NEVER_US = -(1 << 62)
"""Before every event time."""


@dataclass(frozen=True)
class Position:
    """What is joined: the records of the inputs' tables up to a version each, and the left records whose time is over."""

    left_version: int
    right_version: int
    base_row: int | None
    """While the left records that were there at the registration (those of `left_version`) are taken in: how many were. None once they are."""
    left_high_us: int = NEVER_US
    """Largest event time that was taken in."""
    right_high_us: int = NEVER_US
    settled_us: int = NEVER_US
    """Left records up to this event time have found every partner they will ever have."""

    def encoded(self) -> str:
        """As it is stored."""
        return msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def decoded(cls, text: str) -> "Position":
        """A stored position."""
        return msgspec.json.decode(text, type=cls)


@dataclass(frozen=True)
class Added:
    """One version of an input's table that brought records or none, as the log tells."""

    version: int
    rows: int
    at_s: float
    """When it was committed, in seconds since the epoch."""
    files: tuple[str, ...]


def taken(commits: Sequence[Added], limit: int, until_s: float | None = None) -> Sequence[Added]:
    """The commits that one step takes in: the first, and more while they have at most `limit` rows together.

    Args:
        commits: those that are not joined, oldest first.
        limit: rows.
        until_s: take none that was committed later.
    """
    rows = 0
    for index, commit in enumerate(commits):
        rows += commit.rows
        too_young = until_s is not None and commit.at_s > until_s
        if too_young or (index and rows > limit):
            return commits[:index]
    return commits


def watermark(position: Position, *, now_us: int, idle_us: int, silent: tuple[bool, bool]) -> int:
    """The event time up to which both inputs are complete, as far as anybody can know.

    Args:
        position: what was taken in.
        now_us: the wall clock.
        idle_us: how far behind it an input is that has nothing to say.
        silent: which of left and right that holds for.
    """
    highs = (position.left_high_us, position.right_high_us)
    return min(max(high, now_us - idle_us) if quiet else high for high, quiet in zip(highs, silent, strict=True))


def after(position: Position, left: Sequence[Added], right: Sequence[Added]) -> Position:
    """The position behind these commits, without their event times."""
    return replace(
        position,
        left_version=left[-1].version if left else position.left_version,
        right_version=right[-1].version if right else position.right_version,
    )
