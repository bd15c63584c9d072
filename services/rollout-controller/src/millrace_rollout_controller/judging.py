"""What a stage has shown so far: verdicts of the gates, comparisons, and what is still missing. Pure; part of the reconciler."""

from datetime import timedelta

from millrace_rollout_controller import experiments, verdicts
from millrace_rollout_controller.gate_state import GateState
from millrace_rollout_controller.goals import compared, confidence
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.measures import QUANTILES
from millrace_rollout_controller.plans import Draft
from millrace_rollout_controller.ratio import mismatch
from millrace_rollout_controller.shadow_pairs import WHOLE, Pairs
from millrace_rollout_controller.stages import Stage
from millrace_rollout_controller.state import GateView


def judge_gates(d: Draft) -> GateView | None:
    """Write the verdicts and comparisons into the status; gives the first gate that sends the candidate back."""
    s, wanted = d.status, d.spec.rollout.gates
    states = d.evidence.gates if _mine(d) else [GateState() for _ in wanted]
    s.gates = [verdicts.judge(gate, state, len(d.stages)) for gate, state in zip(wanted, states, strict=True)]
    if d.spec.rollout.counted_by == "Servers":
        s.gates = [_without_latencies(gate, view) for gate, view in zip(wanted, s.gates, strict=True)]
    goals = compared(d.spec)
    if goals and d.evidence.trial == s.trial and d.stages[s.step].weight < 100:
        s.comparisons = experiments.results(
            d.evidence.comparisons, d.evidence.candidate, d.evidence.stable, goals, confidence(d.spec)
        )
    if not s.mismatch and d.evidence.trial == s.trial and (wrong := mismatch(d.evidence.ratio)):
        s.mismatch = wrong
        s.event(d.now, "Warning", "SampleRatioMismatch", wrong)
    for gate, view in zip(wanted, s.gates, strict=True):
        # Whoever goes back has decided the comparison already; bounds of the caller's own go on.
        if view.verdict == "fail" and not (s.undo and gate.compare):
            return view
    return None


def _without_latencies(gate: Gate, view: GateView) -> GateView:
    """Model servers tell sums of latencies, and gateways do not see every call: nobody knows a percentile."""
    if gate.metric not in QUANTILES:
        return view
    evidence = "not known: the servers count (countedBy: Servers), and they tell sums of latencies, no percentiles"
    return view.model_copy(update={"verdict": "undecided", "evidence": evidence})


def missing(d: Draft) -> str:
    """Why the stage cannot be left, for people; empty when it can."""
    s, stage = d.status, d.stages[d.status.step]
    if s.held_weight is not None:
        s.phase = "Paused"
        return f"held at {s.held_weight:g} % by a person until resume"
    if s.paused:
        return "paused by a person"
    if (close := going_back(d)) is not None:
        return f"back at {first_weight(d):g} % while {close.text} is half the way to failing"
    if reason := _missing_time(d, stage):
        return reason
    if stage.weight < 100:
        # At 100 there is nothing to compare with any more: the gates that had to pass did so before.
        if reason := _missing_verdict(d):
            return reason
        if reason := _missing_decision(d, stage):
            s.phase = "Paused"
            return reason
    return ""


def _missing_time(d: Draft, stage: Stage) -> str:
    s = d.status
    number = s.step + 1
    in_step = requests_in_stage(d)
    if stage.of_trial and _mine(d):
        in_step = d.evidence.candidate.requests
    if in_step < stage.min_requests:
        return f"{in_step} of {stage.min_requests} candidate requests in step {number}"
    compared = d.evidence.candidate.shadow.get(WHOLE, Pairs()).pairs if _mine(d) else 0
    if compared < stage.min_pairs:
        return f"{compared} of {stage.min_pairs} answers compared with stable's"
    if stage.until_resume and s.resumed_step != s.step:
        s.phase = "Paused"
        return "this step waits for resume"
    if s.step_since is not None and d.now - s.step_since < timedelta(seconds=stage.lasts_s):
        until = s.step_since + timedelta(seconds=stage.lasts_s)
        if stage.guard:
            return (
                f"guarded until {until:%Y-%m-%d %H:%M:%S} UTC: gates may still take the version back; promote ends it"
            )
        return f"step {number} lasts {stage.lasts_s:g} s"
    return ""


def requests_in_stage(d: Draft) -> int:
    """Candidate requests answered in the present stage."""
    return d.evidence.step_candidate.requests if _mine(d) and d.evidence.step == d.status.step else 0


def first_weight(d: Draft) -> float:
    """The first weight that is more than none."""
    return next(stage.weight for stage in d.stages if stage.weight > 0)


def going_back(d: Draft) -> Gate | None:
    """The gate that is so close to failing that the weight goes back to the first stage's; None when none is."""
    stage = d.stages[d.status.step]
    if not stage.of_trial or stage.guard or stage.weight <= first_weight(d) or not _mine(d) or d.status.undo:
        return None
    pairs = zip(d.spec.rollout.gates, d.evidence.gates, strict=True)
    return next((gate for gate, state in pairs if verdicts.is_close(gate, state, len(d.stages))), None)


def undecided_at_last(d: Draft) -> str:
    """Why a stage that had to be decided by now sends the candidate back; empty when it does not."""
    stage = d.stages[d.status.step]
    if stage.decided_by is None or not stage.rolls_back or requests_in_stage(d) < stage.decided_by:
        return ""
    if d.status.held_weight is not None or d.status.paused or d.status.forced:
        return ""
    open_gate = _missing_verdict(d)
    return (
        f"not decided within {stage.decided_by} requests of step {d.status.step + 1}: {open_gate}" if open_gate else ""
    )


def _missing_verdict(d: Draft) -> str:
    s = d.status
    following = d.stages[s.step + 1] if s.step + 1 < len(d.stages) else d.stages[s.step]
    last = following.weight == 100 or following.guard
    decides = d.stages[s.step].decided_by is not None
    # Nobody acts on answers to copies, so a first stage of copies cannot wait for outcomes; later ones do.
    copies = d.stages[s.step].copies_first
    for gate, view in zip(d.spec.rollout.gates, s.gates, strict=True):
        if copies and (gate.metric or "").startswith("outcome/"):
            continue
        must_pass = _must_pass(gate, last) or (decides and gate.required != "Never")
        if must_pass and view.verdict != "pass":
            late = decides and requests_in_stage(d) >= (d.stages[s.step].decided_by or 0)
            over = "; the step's requests are over, promote or abort decides" if late else ""
            return f"{view.gate} is undecided: {view.evidence}{over}"
    return ""


def _missing_decision(d: Draft, stage: Stage) -> str:
    """What a person, or the comparison that decides, has not said yet."""
    strategy = d.spec.rollout.strategy
    if stage.goal is not None and d.status.mismatch:
        return f"the result is invalid, a person decides: {d.status.mismatch}"
    if stage.goal is not None:
        views = [view for view in d.status.comparisons if view.metric == stage.goal]
        view = next((view for view in views if not view.segment), None)
        if view is None or view.better == "undecided":
            return f"{stage.goal} does not tell the versions apart yet; promote or abort decides now"
        if view.better == "stable":
            return f"{stage.goal} says that stable is better; promote or abort decides"
        if worse := [repr(one.segment) for one in views if one.segment and one.better == "stable"]:
            return f"{stage.goal} says that stable is better for {', '.join(worse)}; promote or abort decides"
        return ""
    if stage.until_promote:
        return "the preview waits for promote" if strategy == "BlueGreen" else "the result waits for promote or abort"
    return ""


def _mine(d: Draft) -> bool:
    """Evidence belongs to the gates it was gathered for; of other gates nothing is known yet."""
    return d.evidence.trial == d.status.trial and len(d.evidence.gates) == len(d.spec.rollout.gates)


def _must_pass(gate: Gate, last: bool) -> bool:
    return gate.required == "EveryStep" or (gate.required == "Promotion" and last)
