"""One look at every pool: from the deployments' statuses and what is seen of the servers to the plan, and from the plan to each deployment's
orders. Deciding is `pool_plan`'s; this only gathers and hands out.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from millrace_kit.clock import Clock

from millrace_rollout_controller import metrics
from millrace_rollout_controller.executor import PoolSeen
from millrace_rollout_controller.idleness import Quiet
from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.plans import ArmSeen
from millrace_rollout_controller.pool_plan import MIB, Member, Name, Plan, State, plan
from millrace_rollout_controller.pooling import PoolOrders, leaves, waits
from millrace_rollout_controller.state import Arm, Status

HURRY_S = 0.2
"""Time between two questions to the gateways while a model gives way, which ends with their word."""
_STATES: tuple[State, ...] = ("Resident", "Loading", "Leaving", "Waiting", "Asleep")


@dataclass(frozen=True, slots=True)
class Pooled:
    """One deployment in a pool."""

    name: str
    spec: Spec
    status: Status
    quiet: Quiet
    arms: Mapping[str, ArmSeen]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one deployment is in its pool, for people."""

    pool: str = ""
    versions: tuple[Member, ...] = ()
    waits: Mapping[Name, str] = field(default_factory=dict)
    """Why versions wait."""
    capacity_bytes: int = 0
    """As declared; 0 is what the machine has."""
    set_aside_bytes: int = 0
    resident: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Looked:
    """What one look found, by deployment."""

    orders: Mapping[str, PoolOrders] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    leaving: frozenset[str] = frozenset()
    """Models that give way just now; what their gateways say is waited for."""


def look(deployments: Sequence[Pooled], pools: Mapping[str, PoolSeen], now: datetime) -> Looked:
    """Plan every pool.

    Args:
        deployments: those that name one.
        pools: what is seen of their servers; nothing is planned for one that is absent.
        now: the time.
    """
    orders: dict[str, PoolOrders] = {}
    places: dict[str, Place] = {}
    leaving: set[str] = set()
    by_pool: dict[str, list[Pooled]] = {}
    for one in deployments:
        if one.spec.server.pool is not None:
            by_pool.setdefault(one.spec.server.pool.name, []).append(one)
    for pool, mine in by_pool.items():
        seen = pools.get(pool, PoolSeen())
        models = [member for one in mine for member in _members(one, seen, now)]
        capacity = _capacity(mine, models, seen)
        made = plan(models, capacity, now.timestamp()) if seen.fresh else Plan()
        total = _total(mine, models)
        for one in mine:
            orders[one.name] = PoolOrders(
                frozenset(version for name, version in made.place if name == one.name),
                frozenset(version for name, version in made.evict if name == one.name),
                {version: text for (name, version), text in made.waiting if name == one.name},
            )
            own = tuple(member for member in models if member.name[0] == one.name)
            places[one.name] = replace(total, pool=pool, versions=own, waits=dict(made.waiting))
        leaving |= {one.spec.model for one in mine for m in models if m.name[0] == one.name and m.state == "Leaving"}
        _show(pool, models, capacity, seen)
    return Looked(orders, places, frozenset(leaving))


def _members(one: Pooled, seen: PoolSeen, now: datetime) -> list[Member]:
    status = one.status
    found = [_member(one, arm, seen, now) for arm in (status.stable, status.candidate) if arm is not None]
    known = {member.name[1] for member in found}
    # On its way out for good, kept for undo, or not in the status any more and in the server still.
    kept = {each.ref.version for each in status.retiring if each.placed and each.kept_until is not None}
    gone = {each.ref.version for each in status.retiring if each.placed}
    gone |= {version for version, arm in one.arms.items() if arm.servers}
    return found + [
        Member((one.name, version), "Resident" if version in kept else "Leaving", _size(one, version, seen), fixed=True)
        for version in sorted(gone - known)
    ]


def _member(one: Pooled, arm: Arm, seen: PoolSeen, now: datetime) -> Member:
    pool, version, status = one.spec.server.pool, arm.ref.version, one.status
    if pool is None:
        raise ValueError(f"{one.name} is in no pool")
    awake = (arm.awake_since or status.candidate_since or now).timestamp()
    used = one.quiet.since.get(version)
    asked = arm.sleep.waking_since if arm.sleep is not None else status.candidate_since
    return Member(
        (one.name, version),
        _state(one, arm),
        _size(one, version, seen),
        used_at=max(awake, used.timestamp() if used is not None else awake),
        resident_until=awake + seconds(pool.min_residence, "spec.server.pool.minResidence"),
        asked_at=(asked or now).timestamp(),
        running=used is None or version in one.quiet.running,
        fixed=pool.pinned or status.candidate is not None,
    )


def _state(one: Pooled, arm: Arm) -> State:
    if waits(arm) or arm.placed is None:
        # One that nobody has told of its pool yet waits from now on.
        return "Waiting"
    if not arm.placed:
        return "Asleep"
    if leaves(arm) or (arm.sleep is not None and arm.sleep.waking_since is None):
        return "Leaving"
    ready = one.arms.get(arm.ref.version, ArmSeen()).ready
    return "Resident" if ready and arm.sleep is None else "Loading"


def _size(one: Pooled, version: str, seen: PoolSeen) -> int:
    """Bytes; of a version that the server's keeper does not know, what was declared."""
    declared = (one.spec.server.memory_mib or 0) * MIB
    return max(declared, seen.sizes.get((one.name, version), 0))


def _declared(mine: Sequence[Pooled]) -> int | None:
    """Bytes; the smallest that a deployment names."""
    found = [
        pool.capacity_mib * MIB for one in mine if (pool := one.spec.server.pool) and pool.capacity_mib is not None
    ]
    return min(found, default=None)


def _capacity(mine: Sequence[Pooled], members: Sequence[Member], seen: PoolSeen) -> int:
    """What all models may take together: as declared, and no more than there really is.

    Where they take more than is set aside for them, what they take too much is no room for others.
    """
    loaded = sum(m.size_bytes for m in members if m.state in {"Resident", "Leaving"})
    excess = max(0, seen.used_bytes - _set_aside(members))
    real = max(loaded, seen.used_bytes) + seen.free_bytes
    declared = _declared(mine)
    return (real if declared is None else min(real, declared)) - excess


def _set_aside(members: Sequence[Member]) -> int:
    return sum(m.size_bytes for m in members if m.state in {"Resident", "Loading", "Leaving"})


def _total(mine: Sequence[Pooled], members: Sequence[Member]) -> Place:
    return Place(
        capacity_bytes=_declared(mine) or 0,
        set_aside_bytes=_set_aside(members),
        resident=sum(m.state == "Resident" for m in members),
        waiting=sum(m.state == "Waiting" for m in members),
    )


class PoolWatch:
    """The controller's looks at its pools."""

    def __init__(self) -> None:
        self.looked = Looked()
        self._hurry = asyncio.Event()

    def look(self, deployments: Sequence[Pooled], pools: Mapping[str, PoolSeen], now: datetime) -> None:
        """See `look`; the last one is kept."""
        self.looked = look(deployments, pools, now)
        if self.looked.leaving:
            self._hurry.set()
        else:
            self._hurry.clear()

    async def pause(self, stop: asyncio.Event, until: float, clock: Clock) -> list[str]:
        """Wait until a time of the monotonic clock, or `stop`, or, while models give way, for a moment only: then these are named, for their
        gateways to be asked again.
        """
        left = until - clock.monotonic()
        if self._hurry.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), min(HURRY_S, max(left, 0)))
        elif left > 0:
            waits_ = [asyncio.create_task(event.wait()) for event in (stop, self._hurry)]
            await asyncio.wait(waits_, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for each in waits_:
                each.cancel()
        return sorted(self.looked.leaving) if clock.monotonic() < until else []


def note(spec: Spec, before: Status, after: Status, now: datetime) -> None:
    """Count what a look changed."""
    if spec.server.pool is None:
        return
    pool = spec.server.pool.name
    was = {arm.ref.version: arm for arm in (before.stable, before.candidate) if arm is not None}
    for arm in (after.stable, after.candidate):
        old = was.get(arm.ref.version) if arm is not None else None
        if arm is None or old is None:
            continue
        if old.sleep is None and arm.sleep is not None and arm.sleep.evicted:
            metrics.POOL_EVICTIONS.labels(pool, spec.model).inc()
        asked = old.sleep.waking_since if old.sleep is not None else before.candidate_since
        if arm.placed and old.placed is False and asked is not None:
            metrics.POOL_WAIT_SECONDS.labels(pool).observe((now - asked).total_seconds())


def _show(pool: str, members: Sequence[Member], capacity: int, seen: PoolSeen) -> None:
    for state in _STATES:
        metrics.POOL_MODELS.labels(pool, state).set(sum(m.state == state for m in members))
    for kind, value in (("capacity", capacity), ("setAside", _set_aside(members)), ("used", seen.used_bytes)):
        metrics.POOL_BYTES.labels(pool, kind).set(max(0, value))
