"""What a gate's evidence says: pass, fail or undecided, with the figures in words. Pure."""

import math

import numpy as np
from millrace_kit.sequential import log_mean

from millrace_rollout_controller import comparisons, drift_gates, measures, segment_gates, shadow_gates, value_gates
from millrace_rollout_controller.drift_gates import DriftState
from millrace_rollout_controller.gate_state import GateState, log_fail
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.measures import QUANTILES, allowed_loss, bound
from millrace_rollout_controller.shadow_gates import ShadowState, is_shadow
from millrace_rollout_controller.state import GateView, Verdict

STEP_SAMPLES = 30
"""Candidate values in a step from which on that step's own estimate can hold a pass back."""


def is_close(gate: Gate, state: GateState, steps: int) -> bool:
    """Whether a test is half the way to failing, on the scale of the evidence's logarithm."""
    if gate.is_reading:
        return state.beyond > 0
    half = -math.log(1.0 - gate.level) / 2.0
    if gate.metric == "drift/prediction":
        return state.drift is not None and bool(state.drift.cuts) and drift_gates.log_fail(state.drift) >= half
    if is_shadow(gate):
        return state.shadow is not None and shadow_gates.log_fail(state.shadow) >= half
    groups = [log_fail(one, steps) - segment_gates.PRICE for one in state.segments.values()]
    return max([log_fail(state, steps), *groups]) >= half


def judge(gate: Gate, state: GateState, steps: int) -> GateView:
    """The verdict on what is known now, with the figures in words."""
    if gate.is_reading:
        return _judge_reading(gate, state)
    if gate.metric == "drift/prediction":
        return drift_gates.judge(gate, state.drift or DriftState())
    if is_shadow(gate):
        return shadow_gates.judge(gate, state.shadow or ShadowState())
    if gate.segment is None:
        return _judge(gate, state, steps)
    parts = {name: _judge(segment_gates.of_group(gate), one, steps) for name, one in state.segments.items()}
    bad = {
        name
        for name, one in state.segments.items()
        if (loss := _group_loss(gate, one)) is not None and loss > _estimate(gate, one)[1]
    }
    halved = _judge(segment_gates.of_whole(gate), state, steps)
    return segment_gates.together(_judge(gate, state, steps), halved, parts, bad)


def _group_loss(gate: Gate, state: GateState) -> float | None:
    """How bad a group looks over all steps; None while it has too few values."""
    return None if state.candidate.n < STEP_SAMPLES else _estimate(gate, state)[0]


def _judge(gate: Gate, state: GateState, steps: int) -> GateView:
    needed = -math.log(1.0 - gate.level)
    against = log_fail(state, steps)
    loss, limit, words = _estimate(gate, state)
    proved, proof = _proof(gate, state)
    step_loss = _step_loss(gate, state)
    verdict: Verdict = "undecided"
    if state.candidate.n < 1:
        reason = "no data of the candidate yet" if not gate.is_value else "no values of the candidate yet"
        if gate.metric in QUANTILES and gate.compare is not None and state.threshold is None:
            reason = "stable's percentile is not known yet"
    elif against >= needed and (gate.compare is None or loss > limit):
        verdict, reason = "fail", f"e-value against it {_power(against)} of {_power(needed)} needed"
    elif proved and step_loss is not None and step_loss > limit:
        reason = "proved so far, but this step's own figures are on the wrong side of the limit"
    elif proved:
        verdict, reason = "pass", proof
    else:
        reason = f"{proof}; e-value against it {_power(against)}, {_power(needed)} needed"
    return GateView(
        gate=gate.text,
        verdict=verdict,
        evidence=f"{words}; {reason}",
        candidate_samples=int(state.candidate.n),
        stable_samples=int(state.stable.n),
    )


def _proof(gate: Gate, state: GateState) -> tuple[bool, str]:
    """Whether the passing side is proved, and the sentence about it."""
    needed = -math.log(1.0 - gate.level)
    if value_gates.is_root(gate) and gate.compare is not None:
        arms, alpha = state.roots, 1.0 - gate.level
        evidence, needed = comparisons.log_for_root(arms, allowed_loss(gate), alpha, asymptotic=gate.is_asymptotic)
        for_it = float(evidence)
        return for_it >= needed, f"e-value for it {_power(for_it)} of {_power(needed)} needed"
    if gate.max_samples is None:
        for_it = float(log_mean(np.array(state.pass_logs))) if state.limit is None else state.limit.for_it
        return for_it >= needed, f"e-value for it {_power(for_it)} of {_power(needed)} needed"
    if not state.looks:
        return False, f"no look yet, the last one is at {gate.max_samples} values"
    found = next((one for one in state.looks if one.proved), state.looks[-1])
    words = f"look at {found.fraction:.0%} of {gate.max_samples} values: z {found.z:.2f} of {found.boundary:.2f} needed"
    if not found.proved and found.fraction >= 1.0:
        words += "; that was the last look, a person decides"
    return found.proved, words


def _judge_reading(gate: Gate, state: GateState) -> GateView:
    verdict: Verdict = "undecided"
    if state.beyond >= gate.failures:
        verdict, words = "fail", f"beyond the bound {state.beyond} times in a row"
    elif state.answer is None:
        words = "no answer that is a number in this step"
    elif state.beyond:
        words = f"beyond the bound {state.beyond} times in a row, {gate.failures} fail"
    else:
        verdict, words = "pass", "within the bound"
    value = "" if state.answer is None else f"value {state.answer:g}; "
    return GateView(
        gate=gate.text,
        verdict=verdict,
        evidence=f"{value}{words}",
        candidate_samples=state.answers,
        stable_samples=0,
    )


def _estimate(gate: Gate, state: GateState) -> tuple[float, float, str]:
    """How bad it looks, what is allowed, and the sentence about it."""
    n, mean = int(state.candidate.n), state.candidate.mean
    if gate.compare is not None:
        loss, limit = measures.loss(gate, mean, state.gap), allowed_loss(gate)
        if gate.metric in QUANTILES:
            slow = (state.threshold or 0.0) * (1.0 + (gate.margin or 0.0))
            words = (
                f"{mean:.2%} of {n} candidate requests above {slow:.4g} ms, "
                f"{state.stable.mean:.2%} of {int(state.stable.n)} stable ones above {state.threshold or 0.0:.4g} ms"
            )
            return loss, limit, words
        apart = (-loss if gate.higher_is_better else loss) * value_gates.width(gate)
        mine, theirs = value_gates.unscaled(gate, mean), value_gates.unscaled(gate, state.stable.mean)
        words = f"candidate {mine:.4f} over {n}, stable {theirs:.4f} over {int(state.stable.n)} at the same time"
        words += f", difference {apart:+.4f} (margin {gate.margin:g}){value_gates.kind(state.limit, asymptotic=gate.is_asymptotic)}"
        return loss, limit, words
    if gate.metric in QUANTILES:
        allowed = measures.slow_share(gate)
        return mean, allowed, f"{mean:.2%} of {n} requests above {gate.max:g} ms (allowed {allowed:.0%})"
    words = f"candidate {value_gates.unscaled(gate, mean):.4f} over {n}"
    if gate.min is not None:
        words += f", at least {gate.min:g} wanted{value_gates.kind(state.limit, asymptotic=gate.is_asymptotic)}"
        return bound(gate) - mean, 0.0, words
    return (
        mean,
        bound(gate),
        f"{words}, at most {gate.max:g} wanted{value_gates.kind(state.limit, asymptotic=gate.is_asymptotic)}",
    )


def _step_loss(gate: Gate, state: GateState) -> float | None:
    """How bad this step alone looks; None while it has too few values."""
    if state.step_candidate.n < STEP_SAMPLES:
        return None
    if gate.compare is not None:
        return measures.loss(gate, state.step_candidate.mean, state.step_gap_sum / state.step_gap_weight)
    mean = state.step_candidate.mean
    return bound(gate) - mean if gate.min is not None else mean


def _power(log: float) -> str:
    return f"{math.exp(min(log, 690.0)):.3g}"
