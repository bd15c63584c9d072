"""What each strategy asks for, as stages: a weight, a share of copies, and what must have happened before the next stage. Pure.

One machine walks all strategies; they differ in this list only. The last stage always gives the candidate everything.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate

from millrace_rollout_controller.manifest import ABTest, BlueGreen, Pause, Shadow, Spec, Step
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.state import Status


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a rollout."""

    weight: float
    mirror: float = 0.0
    min_requests: int = 0
    min_pairs: int = 0
    """Rows compared with stable's answers."""
    copies_first: bool = False
    """Copies before the first weight of a canary."""
    lasts_s: float = 0.0
    """Shortest time in force."""
    until_resume: bool = False
    until_promote: bool = False
    """Left by a person's promote only."""
    goal: str | None = None
    """Left when this comparison says that the candidate is better."""
    of_trial: bool = False
    """`min_requests` counts the whole trial, and the weight goes back while a gate comes close to failing."""
    decided_by: int | None = None
    """Left only when every gate has a verdict; candidate requests in the stage by which they should."""
    rolls_back: bool = False
    """What `decided_by` does: send the candidate back, instead of waiting for a person."""
    guard: bool = False
    """The candidate has all it will get; the window in which late outcomes may take it back."""
    watched: bool = False
    """Gates go on here although nothing is left to do; promote does not cut it short on the way in."""


def stages(spec: Spec) -> tuple[Stage, ...]:
    """The stages of the spec's strategy and of its guard; at least one, the last of weight 100."""
    found = _of_strategy(spec)
    if (guard := spec.rollout.guard) is None:
        return found
    window_s = seconds(guard.window, "window")
    last = found[-1]
    if guard.hold_back_percent:
        held = Stage(100.0 - guard.hold_back_percent, lasts_s=window_s, guard=True, watched=True)
        return *found[:-1], held, last
    return *found[:-1], replace(last, lasts_s=max(last.lasts_s, window_s), guard=True, watched=True)


def _of_strategy(spec: Spec) -> tuple[Stage, ...]:
    rollout = spec.rollout
    match rollout.strategy:
        case "BlueGreen":
            return _blue_green(rollout.blue_green or BlueGreen())
        case "ABTest":
            return _ab_test(rollout.ab_test or ABTest())
        case "Shadow":
            return _shadow(rollout.shadow or Shadow())
    steps = rollout.steps or (Step(weight=100.0),)
    if steps[-1].weight != 100:
        steps = (*steps, Step(weight=100.0))
    first = (_copies_first(rollout.shadow),) if rollout.shadow is not None else ()
    found = (*first, *(_canary(step) for step in steps))
    return _on_evidence(found) if rollout.advance == "OnEvidence" else found


def _on_evidence(found: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Each stage asks for the requests of all stages up to it, whenever they came."""
    sums = accumulate(stage.min_requests for stage in found)
    return tuple(replace(stage, min_requests=total, of_trial=True) for stage, total in zip(found, sums, strict=True))


def guarded_until(spec: Spec, status: Status) -> datetime | None:
    """When the guard's window closes; None outside of one."""
    if not status.guarding or status.step_since is None:
        return None
    found = stages(spec)
    stage = found[min(status.step, len(found) - 1)]
    return status.step_since + timedelta(seconds=stage.lasts_s) if stage.guard else None


def split_in_force(spec: Spec, status: Status) -> float | None:
    """The candidate's share while an A/B test's requests have to arrive in that ratio: not where rules send callers, nor where the ratio moves."""
    held = status.held_weight is not None
    block = spec.rollout.ab_test
    if block is not None and block.allocation != "Fixed":
        return None
    if spec.rollout.strategy != "ABTest" or spec.routing.rules or held or status.step_since is None or status.step != 0:
        return None
    return status.weight / 100.0


def _copies_first(block: Shadow) -> Stage:
    return replace(_shadow(block)[0], until_promote=False, copies_first=True)


def _canary(step: Step) -> Stage:
    lasts_s, until_resume = _pause(step.pause)
    return Stage(
        step.weight,
        min_requests=step.min_requests,
        lasts_s=lasts_s,
        until_resume=until_resume,
        decided_by=step.max_requests,
        rolls_back=step.on_undecided == "Rollback",
    )


def _blue_green(block: BlueGreen) -> tuple[Stage, ...]:
    lasts_s, until_resume = _pause(block.pause)
    preview = Stage(
        0.0,
        mirror=block.mirror_percent,
        min_requests=block.min_requests,
        lasts_s=lasts_s,
        until_resume=until_resume,
        until_promote=not block.auto_promotion,
    )
    return preview, Stage(100.0, lasts_s=float(block.watch_seconds), watched=block.watch_seconds > 0)


def _ab_test(block: ABTest) -> tuple[Stage, ...]:
    lasts_s = seconds(block.duration, "duration") if block.duration else 0.0
    hold = block.on_success == "Hold"
    goal = None if hold else block.goal
    test = Stage(block.split, min_requests=block.min_requests, lasts_s=lasts_s, until_promote=hold, goal=goal)
    return test, Stage(100.0)


def _shadow(block: Shadow) -> tuple[Stage, ...]:
    lasts_s = seconds(block.duration, "duration") if block.duration else 0.0
    hold = block.on_success == "Hold"
    copies = Stage(
        0.0,
        mirror=block.mirror_percent,
        min_requests=block.min_requests,
        min_pairs=block.min_pairs,
        lasts_s=lasts_s,
        until_promote=hold,
    )
    return copies, Stage(100.0)


def _pause(pause: Pause | None) -> tuple[float, bool]:
    if pause is None:
        return 0.0, False
    return (0.0, True) if pause.seconds is None else (pause.seconds, False)
