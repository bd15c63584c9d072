"""A candidate's way: admitted, prepared, through its stages, and promoted or sent away. Pure; part of the reconciler."""

from datetime import timedelta

from millrace_rollout_controller.allocation import allocated
from millrace_rollout_controller.candidates import fail
from millrace_rollout_controller.capacity import short
from millrace_rollout_controller.history import record
from millrace_rollout_controller.judging import first_weight, going_back, judge_gates, missing, undecided_at_last
from millrace_rollout_controller.plans import INSUFFICIENT_MEMORY, Draft
from millrace_rollout_controller.pooling import waiting_text, waits
from millrace_rollout_controller.sleeping import candidate_sleeps
from millrace_rollout_controller.state import Retiring
from millrace_rollout_controller.warm_gate import warm


def look_at_candidate(d: Draft) -> None:
    """Move the candidate on where nothing is missing, back where something failed."""
    s = d.status
    if s.candidate is None:
        return
    if candidate_sleeps(d):
        return
    version = s.candidate.ref.version
    seen = d.servers(version)
    if seen.refusal is not None and seen.refusal.permanent:
        fail(d, seen.refusal.reason, seen.refusal.message)
        return
    # Before it has traffic it needs all of its servers; afterwards one keeps it on trial.
    needed = 1 if s.entered and s.weight > 0 else d.spec.server.replicas
    enough = len(seen.ready) >= needed
    s.held_by = ""
    held_back = seen.refusal is not None and seen.refusal.reason == INSUFFICIENT_MEMORY
    if not enough and waits(s.candidate):
        s.unready_since, s.held_by, s.waiting = None, INSUFFICIENT_MEMORY, waiting_text(d, s.candidate)
    elif not enough and seen.refusal is not None and held_back and s.stable is not None:
        # Stable serves on, and room may come: it holds, and no deadline runs.
        s.unready_since, s.held_by, s.waiting = None, INSUFFICIENT_MEMORY, seen.refusal.message
    elif not enough:
        s.unready_since = s.unready_since or d.now
        count = f"{len(seen.ready)} of {d.spec.server.replicas} servers of {version} are ready"
        why = f": {seen.refusal.message}" if seen.refusal else ""
        s.waiting = f"{count}{why}"
        if d.now - s.unready_since > timedelta(seconds=d.spec.rollout.progress_deadline_seconds):
            message = f"{count} after {d.spec.rollout.progress_deadline_seconds} s{why}"
            fail(d, "ProgressDeadlineExceeded", message)
            return
    else:
        s.unready_since = None
    if s.entered:
        _progress(d, enough)
    elif s.stable is None:
        _take_first(d, enough)
    else:
        s.phase = "Paused" if s.paused else "Preparing"
        known = enough and not s.paused and d.known_without_weight(version)
        if known and s.stable.sleep is not None and s.undo != version:
            s.waiting = f"{s.stable.ref.version} has to wake first"
            return
        if known and warm(d) and not short(d, d.stages[0].weight):
            _begin(d)


def _take_first(d: Draft, enough: bool) -> None:
    s = d.status
    s.phase = "Preparing"
    if not enough or s.candidate is None:
        return
    record(d, "FirstVersion", "there was no version before it", stable=True)
    s.stable, s.candidate, s.weight = s.candidate, None, 0.0
    s.stable.served = True
    s.event(
        d.now, "Normal", "FirstVersion", f"{s.stable.ref.version} takes all traffic: there was no version before it"
    )


def _begin(d: Draft) -> None:
    """The first stage, or for a version somebody goes back to the last one."""
    s = d.status
    if s.candidate is not None and s.undo == s.candidate.ref.version:
        s.forced = True
        _enter(d, len(d.stages) - 1)
    else:
        _enter(d, 0)


def _enter(d: Draft, step: int) -> None:
    s, stage = d.status, d.stages[step]
    s.step, s.weight, s.mirror, s.step_since, s.entered = step, stage.weight, stage.mirror, None, True
    s.allocated_at = None
    s.guarding = (stage.guard or s.guarding) and not s.undo
    if s.candidate is not None:
        s.candidate.served = s.candidate.served or stage.weight > 0 or stage.mirror > 0
        version = s.candidate.ref.version
        copies = f" and copies of {stage.mirror:g} %" if stage.mirror else ""
        s.event(
            d.now, "Normal", "StepStarted", f"step {step + 1}: {version} gets {s.weight:g} % of the traffic{copies}"
        )
    s.phase = "Promoting" if s.weight == 100 else "Progressing"


def _progress(d: Draft, ready: bool) -> None:
    s = d.status
    if s.candidate is None:
        return
    version = s.candidate.ref.version
    last = len(d.stages) - 1
    s.step = min(s.step, last)
    failing = judge_gates(d)
    if failing is not None:
        fail(d, "GateFailed", f"{failing.gate}: {failing.evidence}")
        return
    if undecided := undecided_at_last(d):
        fail(d, "Undecided", undecided)
        return
    s.phase = "Paused" if s.paused else "Promoting" if s.weight == 100 else "Progressing"
    if not ready:
        return
    if s.step_since is None:
        s.waiting = "waiting for the gateways to take the weight"
        if not d.in_force(version, s.weight):
            return
        s.step_since = d.now
    if s.forced:
        _force(d, last)
        return
    if _reweigh(d):
        return
    s.waiting = missing(d)
    if s.waiting:
        return
    if s.step < last:
        if not short(d, d.stages[s.step + 1].weight):
            passed = "Guarded" if d.stages[s.step + 1].guard else "StepPassed"
            record(d, passed, f"step {s.step + 1} of {last + 1} has what it asks for")
            _enter(d, s.step + 1)
    elif d.in_force(version, 100.0):
        _complete(d)


def _force(d: Draft, last: int) -> None:
    """A person's promote, or an undo: the rest of the stages is skipped."""
    s = d.status
    s.held_weight = None
    guarded, undo = s.guarding, s.undo != ""
    guard = next((number for number, stage in enumerate(d.stages) if stage.guard), None)
    if guard is not None and not guarded and not undo and s.step < guard:
        # Whoever promotes skips the steps; the window remains, and a second promote ends it.
        if not short(d, d.stages[guard].weight):
            _enter(d, guard)
            s.forced = False
        return
    if s.weight != 100:
        if short(d, 100.0):
            return
        _enter(d, last)
        s.forced = not d.stages[last].watched or undo or guarded
    else:
        _complete(d)


def _reweigh(d: Draft) -> bool:
    """Bring the weight to the one a person holds, or back to the stage's; True when it had to move."""
    s = d.status
    stage = d.stages[s.step]
    wanted = stage.weight if s.held_weight is None else s.held_weight
    if s.held_weight is None and going_back(d) is not None:
        wanted = first_weight(d)
    if s.held_weight is None and (moved := allocated(d)) is not None:
        return _allocate(d, moved)
    if s.weight == wanted or s.candidate is None:
        return False
    if short(d, wanted):
        return True
    s.weight, s.step_since = wanted, None
    s.candidate.served = True
    s.phase = "Progressing" if s.held_weight is None else "Paused"
    s.event(d.now, "Normal", "WeightSet", f"{s.candidate.ref.version} gets {wanted:g} % of the traffic")
    return True


def _allocate(d: Draft, weight: float) -> bool:
    """Move the weight to where the result wants it; True while the gateways take it. The stage's time goes on."""
    s = d.status
    if s.candidate is None:
        return False
    version = s.candidate.ref.version
    if not d.in_force(version, s.weight):
        s.waiting = "waiting for the gateways to take the weight"
        return True
    if weight == s.weight:
        return False
    if short(d, weight):
        return True
    s.weight, s.allocated_at = weight, d.now
    s.event(d.now, "Normal", "WeightAllocated", f"{version} gets {weight:g} % of the traffic, by the result so far")
    return True


def _complete(d: Draft) -> None:
    s = d.status
    if s.candidate is None or s.stable is None:
        return
    why = "a person asked for it" if s.forced else "every step has what it asks for"
    record(d, "Promoted", why, stable=True, finished=True)
    old, new = s.stable, s.candidate
    # One old version is enough to go back to.
    s.retiring = [gone.model_copy(update={"kept_until": None}) for gone in s.retiring]
    leaving = Retiring(ref=old.ref, endpoints=old.endpoints, served=old.served, service=old.service, placed=old.placed)
    block = d.spec.rollout.blue_green
    fate = "is drained"
    if d.spec.rollout.strategy == "BlueGreen":
        keep_s = block.keep_old_seconds if block is not None else 600
        if keep_s:
            leaving.kept_until = d.now + timedelta(seconds=keep_s)
            fate = f"is kept for {keep_s} s"
    s.retiring = [*s.retiring, leaving]
    s.stable, s.candidate, s.weight, s.mirror, s.forced, s.waiting = new, None, 0.0, 0.0, False, ""
    s.entered, s.held_weight, s.undo, s.step_since, s.guarding = False, None, "", None, False
    s.previous_version = old.ref.version
    s.phase = "Promoted"
    s.event(d.now, "Normal", "Promoted", f"{new.ref.version} is stable; {old.ref.version} {fate}")
