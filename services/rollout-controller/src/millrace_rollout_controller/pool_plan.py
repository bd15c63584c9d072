"""Which models of a pool are loaded and which are unloaded for them: the least recently used first. Pure.

A pool is one server with room for fewer models than name it. The plan never touches a model with calls under way, one that a rollout is
about or one that is pinned, none before its minimum residence is over, and no more models than are needed. Who waits is served in the order
of asking. Two rules keep that order from being a trap: who waits for nothing but residence times, which end by themselves, is not
overtaken; who waits for calls to end, which may take for ever, is, and so is who would not fit even alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Name = tuple[str, str]
"""Deployment and version."""
State = Literal["Resident", "Loading", "Leaving", "Waiting", "Asleep"]
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One version of one model of the pool."""

    name: Name
    state: State
    """Resident, Loading and Leaving ones have memory set aside; Waiting ones want it."""
    size_bytes: int
    used_at: float = 0.0
    """When it was last called, or loaded if that was later; seconds of any one clock."""
    resident_until: float = 0.0
    """When its minimum residence ends."""
    asked_at: float = 0.0
    """Of one that waits: since when."""
    running: bool = False
    """Calls are under way, or it is not known that none are."""
    fixed: bool = False
    """Never unloaded for another: it is pinned, or part of a rollout."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done now."""

    place: tuple[Name, ...] = ()
    """These have room; load them."""
    evict: tuple[Name, ...] = ()
    """These give way, the least recently used first."""
    waiting: tuple[tuple[Name, str], ...] = ()
    """Why the others wait, for people, in the order in which they are served."""


def plan(members: Sequence[Member], capacity_bytes: int, now: float) -> Plan:
    """One look.

    Args:
        members: every version of the pool.
        capacity_bytes: what all that have memory set aside may take together.
        now: the time, by the clock of the members' times.
    """
    room = _Room(members, capacity_bytes, now)
    # The capacity may have shrunk, or a model have turned out to be larger than it was taken to be.
    if room.free + room.coming < 0:
        room.make(0)
    place: list[Name] = []
    waiting: list[tuple[Name, str]] = []
    ordered = sorted((m for m in members if m.state == "Waiting"), key=lambda m: (m.asked_at, m.name))
    behind = ""
    for member in ordered:
        if behind:
            waiting.append((member.name, f"waits its turn behind {behind}"))
            continue
        if member.size_bytes <= room.free:
            room.free -= member.size_bytes
            place.append(member.name)
            continue
        found = room.make(member.size_bytes)
        waiting.append((member.name, _words(member, found, capacity_bytes)))
        if found == "residence":
            behind = " ".join(member.name)
    return Plan(tuple(place), tuple(room.evict), tuple(waiting))


_Found = Literal["coming", "residence", "running", "fixed"]


class _Room:
    """Memory of the pool while a plan is made."""

    def __init__(self, members: Sequence[Member], capacity_bytes: int, now: float) -> None:
        held = [m for m in members if m.state in {"Resident", "Loading", "Leaving"}]
        self.free = capacity_bytes - sum(m.size_bytes for m in held)
        self.coming = sum(m.size_bytes for m in held if m.state == "Leaving")
        """What will be free and is not promised to anybody yet."""
        self.evict: list[Name] = []
        self._now = now
        self._left = sorted(
            (m for m in held if m.state == "Resident" and not m.fixed), key=lambda m: (m.used_at, m.name)
        )

    def make(self, needed: int) -> _Found:
        """Promise `needed` bytes out of what is or gets free, with as few models unloaded as that takes; else say what stands in the way."""
        quiet = [m for m in self._left if not m.running]
        ripe = [m for m in quiet if m.resident_until <= self._now]
        if (chosen := self._choose(ripe, needed)) is not None:
            for member in chosen:
                self._left.remove(member)
                self.evict.append(member.name)
                self.coming += member.size_bytes
            self._promise(needed)
            return "coming"
        for others, why in ((quiet, "residence"), (self._left, "running")):
            if self._choose(others, needed) is not None:
                return "residence" if why == "residence" else "running"
        return "fixed"

    def _choose(self, members: Sequence[Member], needed: int) -> list[Member] | None:
        """The least recently used that are enough, none of them needlessly; None when all are not enough."""
        missing = needed - self.free - self.coming
        chosen: list[Member] = []
        for member in members:
            if missing <= 0:
                break
            chosen.append(member)
            missing -= member.size_bytes
        if missing > 0:
            return None
        for member in reversed(chosen[:]):
            if missing + member.size_bytes <= 0:
                chosen.remove(member)
                missing += member.size_bytes
        return chosen

    def _promise(self, needed: int) -> None:
        from_free = min(max(self.free, 0), needed)
        self.free -= from_free
        self.coming -= needed - from_free
        if self.free < 0:
            self.coming, self.free = self.coming + self.free, 0


def _words(member: Member, found: _Found, capacity_bytes: int) -> str:
    needs = f"needs {member.size_bytes // MIB} MiB"
    if member.size_bytes > capacity_bytes:
        return f"{needs}, and the whole pool has {capacity_bytes // MIB} MiB"
    return {
        "coming": f"{needs}; others are unloaded for it",
        "residence": f"{needs}; what could give way was loaded too short a time ago",
        "running": f"{needs}; what could give way has calls under way",
        "fixed": f"{needs}; the rest of the pool is pinned or part of a rollout",
    }[found]
