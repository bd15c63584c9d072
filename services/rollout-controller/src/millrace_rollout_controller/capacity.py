"""Servers before weight: how many of each version a weight needs. Pure; part of the reconciler.

The rule: before the candidate gets w % of the traffic it has ceil(w % of stable's servers) ready, at most as many as the manifest lets it have.
With an autoscaler stable's servers are what its load has made of them; while a candidate is on trial they are not taken away again,
however little of the traffic is left to them, so that going back needs no new server.
"""

import math

from millrace_rollout_controller import pooling
from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import VersionRef


def most(server: Server) -> int:
    """Servers that a version may have."""
    scaling = server.autoscaling
    return server.replicas if scaling is None or scaling.max_replicas is None else scaling.max_replicas


def least(server: Server) -> int:
    """Servers that a version has without any load, while it is awake."""
    scaling = server.autoscaling
    return server.replicas if scaling is None or not scaling.min_replicas else scaling.min_replicas


def needed(d: Draft, weight: float) -> int:
    """Servers the candidate needs for `weight` percent."""
    share = math.ceil(round(weight / 100 * d.status.stable_servers, 6))
    return min(max(share, 1), most(d.spec.server))


def note_stable(d: Draft) -> None:
    """Remember the most servers that stable has had during this trial; without a candidate there is nothing to keep."""
    s = d.status
    if s.stable is None or s.candidate is None:
        s.stable_servers = 0
    else:
        seen = len(d.servers(s.stable.ref.version).ready)
        s.stable_servers = min(max(s.stable_servers, seen), most(d.spec.server))


def replicas(d: Draft, ref: VersionRef) -> int:
    """Servers a version should have at least now; an autoscaler may add to them."""
    s, server = d.status, d.spec.server
    if server.pool is not None:
        return pooling.replicas(d, ref)
    for arm in (s.stable, s.candidate):
        sleep = arm.sleep if arm is not None and arm.ref.version == ref.version else None
        if sleep is not None and sleep.stopped and sleep.waking_since is None:
            return 0
    floor = server.replicas
    if s.candidate is None:
        return floor
    if ref.version == s.candidate.ref.version:
        return max(floor, needed(d, max(s.weight, s.capacity_weight)))
    if s.stable is not None and ref.version == s.stable.ref.version and s.entered:
        return max(floor, s.stable_servers)
    return floor


def short(d: Draft, weight: float) -> bool:
    """Whether servers are missing for the candidate's next weight; asks for them, and says so to people."""
    s = d.status
    if s.candidate is None or weight <= s.weight or s.undo == s.candidate.ref.version:
        # Whoever goes back from something broken is better served by few servers than by a wait.
        return False
    s.capacity_weight = weight
    if s.stable is not None and s.stable.sleep is not None:
        s.waiting = f"{s.stable.ref.version} has to wake first"
        return True
    version, wanted = s.candidate.ref.version, needed(d, weight)
    ready = len(d.servers(version).ready)
    if ready >= wanted:
        return False
    s.waiting = (
        f"{ready} of {wanted} servers of {version} that {weight:g} % need are ready (stable has {s.stable_servers})"
    )
    return True
