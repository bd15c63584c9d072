"""Versions on their way out: weight 0, in force everywhere, drained, out of the route, in force everywhere, and only then stopped. Pure."""

from datetime import timedelta

from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.state import Retiring


def retire(d: Draft) -> None:
    """Move each version on its way out one stage further, when the stage before is in force."""
    s = d.status
    kept: list[Retiring] = []
    for gone in s.retiring:
        version = gone.ref.version
        if gone.drained_at is None and d.in_force(version, 0.0):
            gone.drained_at = d.now
        if gone.kept_until is not None:
            if d.now < gone.kept_until:
                kept.append(gone)
                continue
            gone.kept_until = None
            s.event(d.now, "Normal", "NoLongerKept", f"{version} is no longer kept for undo")
        if gone.drained_at is not None and not gone.removed:
            wait = timedelta(seconds=d.limits.drain_s if gone.served else 0.0)
            gone.removed = d.now - gone.drained_at >= wait
        if gone.removed and not gone.released:
            gone.released = d.gone(version)
        if gone.released and d.servers(version).servers == 0:
            s.event(d.now, "Normal", "ServersStopped", f"{version} is drained and its servers are stopped")
            continue
        kept.append(gone)
    s.retiring = kept
