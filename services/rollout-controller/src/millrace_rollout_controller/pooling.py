"""A deployment's versions in a pool: each has a place, which is memory set aside in the pool's server, or waits for one. Pure.

Part of the reconciler. Whose turn it is was decided before, over all deployments of the pool (`pool_plan`), and arrives as orders. An order
to give way starts the same sequence as falling asleep: calls are held, that is in force everywhere, what was under way has ended, and only
then the version is unloaded. Once ordered it goes on, whatever call comes meanwhile: that call's wake takes its turn like any other. Only
when calls do not end in time the version stays, so that nobody waits for the end of a stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from millrace_rollout_controller.state import Arm, Sleep, VersionRef

if TYPE_CHECKING:
    from millrace_rollout_controller.plans import Draft


@dataclass(frozen=True, slots=True)
class PoolOrders:
    """What one look at the whole pool wants of one deployment's versions."""

    place: frozenset[str] = frozenset()
    """These have room now."""
    evict: frozenset[str] = frozenset()
    """These give way to others."""
    waiting: Mapping[str, str] = field(default_factory=dict)
    """Why the others wait, for people."""


def settle_places(d: "Draft") -> None:
    """Note who got a place by the orders, and whose place is free again because its server has let it go."""
    pooled = d.spec.server.pool is not None
    for arm in (d.status.stable, d.status.candidate):
        if arm is None or not pooled:
            continue
        version, sleep = arm.ref.version, arm.sleep
        arm.placed = bool(arm.placed)
        if not arm.placed and version in d.seen.pool.place:
            arm.placed = True
            if sleep is not None:
                sleep.stopped, sleep.evicted = False, False
        elif arm.placed and sleep is not None and sleep.stopped and not d.servers(version).servers:
            arm.placed = False
        elif arm.placed and arm.awake_since is None and d.servers(version).ready:
            # Its residence begins.
            arm.awake_since = d.now


def leaves(arm: Arm) -> bool:
    """Whether the version is on its way out of the pool's server, for good until its next turn."""
    return bool(arm.placed) and arm.sleep is not None and (arm.sleep.evicted or arm.sleep.stopped)


def waits(arm: Arm) -> bool:
    """Whether the version wants a place and has none."""
    return arm.placed is False and (arm.sleep is None or arm.sleep.waking_since is not None)


def give_way(d: "Draft", arm: Arm) -> None:
    """Begin to unload a version because others need the room."""
    arm.sleep = Sleep(since=d.now, evicted=True)
    d.status.event(d.now, "Normal", "Evicted", f"{arm.ref.version} gives way in its pool; its calls are held")


def give_up(d: "Draft", arm: Arm) -> bool:
    """Let a version stay that was to give way, when its calls do not end; says whether it did."""
    sleep = arm.sleep
    if sleep is None or not sleep.evicted or sleep.stopped or d.now - sleep.since <= _limit(d.limits.evict_s):
        return False
    # Counts as loaded anew: others are chosen next.
    arm.sleep, arm.awake_since = None, d.now
    text = f"{arm.ref.version} stays in its pool: it still had calls after {d.limits.evict_s:g} s"
    d.status.event(d.now, "Normal", "EvictionGivenUp", text)
    return True


def lapse(d: "Draft", arm: Arm) -> None:
    """Forget the wish of callers who are not there any more: nobody is unloaded for them."""
    sleep = arm.sleep
    if sleep is None or sleep.waking_since is None or d.status.candidate is not None or d.spec.server.pool is None:
        return
    if d.spec.server.pool.pinned or d.now - (sleep.asked_at or sleep.waking_since) <= _limit(d.limits.wish_s):
        return
    sleep.waking_since = sleep.asked_at = None
    d.status.event(d.now, "Normal", "NobodyWaits", f"{arm.ref.version} keeps asleep: its callers are gone")


def replicas(d: "Draft", ref: VersionRef) -> int:
    """1 for a version that should be in the pool's server, else 0."""
    for arm in (d.status.stable, d.status.candidate):
        if arm is not None and arm.ref.version == ref.version:
            return int(bool(arm.placed) and not (arm.sleep is not None and arm.sleep.stopped))
    gone = next((gone for gone in d.status.retiring if gone.ref.version == ref.version), None)
    return int(gone is not None and bool(gone.placed))


def waiting_text(d: "Draft", arm: Arm) -> str:
    """Why a version waits for a place, for people; empty when it does not."""
    return d.seen.pool.waiting.get(arm.ref.version, "waits for room in its pool") if waits(arm) else ""


def _limit(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)
