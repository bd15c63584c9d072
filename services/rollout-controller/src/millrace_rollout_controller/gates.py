"""Gates: evidence in, one of pass, fail and undecided out.

A gate fails when its e-process refutes "the candidate is good enough" at 1 - confidence; for a comparison that is "not worse than stable",
and the estimated loss must also exceed the margin, so a difference too small to matter never rolls back. It passes when another e-process
refutes "the candidate is too bad" ("worse than stable by more than the margin"). Everything else is undecided, and no data is undecided.
"""

import math

import numpy as np
from pydantic import BaseModel

from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.sequential import (
    ODDS_ABOVE,
    ODDS_BELOW,
    Array,
    Sample,
    log_mean,
    one_arm,
    two_arms,
)
from millrace_rollout_controller.state import GateView, Verdict

P99_SHARE = 0.01
"""Share of requests that may be slower than a 99th percentile."""
BUCKET_WIDTH = 1.1
"""Most that a latency bucket's upper edge is above its lower one; the gateways' are 5 % wide."""
BURN_IN = 30
"""Values of stable that only teach its mean, before the first bet of a comparison."""
MEMORY = 1000.0
"""Values of stable its mean is estimated from; older ones fade."""
STEP_SAMPLES = 30
"""Candidate values in a step from which on that step's own estimate can hold a pass back."""
MAX_STARTS = 21


class GateState(BaseModel):
    """What a gate has learned in this trial."""

    fail_logs: list[list[float]] = []
    """Logarithms of the failing e-process's products, one list for each step begun."""
    pass_logs: list[float] = [0.0] * len(ODDS_ABOVE)
    candidate: Sums = Sums()
    stable: Sums = Sums()
    step_candidate: Sums = Sums()
    gap_weight: float = 0.0
    gap_sum: float = 0.0
    """Sum over batches of the candidate's count times (candidate's mean - stable's mean): drift of both arms cancels."""
    step_gap_weight: float = 0.0
    step_gap_sum: float = 0.0
    pending_candidate: Sums = Sums()
    pending_stable: Sums = Sums()
    """A batch that still lacks one arm."""
    memory: Sums = Sums()
    answer: float | None = None
    """Of a query: the last answer in this step; None for none that is a number."""
    answers: int = 0
    beyond: int = 0
    """Of a query: answers beyond the bound in a row."""


def measure(gate: Gate, counts: Counts) -> tuple[Sums, Sums]:
    """The gate's values in `counts`, as its failing and as its passing side see them.

    They differ for latency only, which is known to the width of a histogram bucket (empty buckets are not sent, so lower edges are not known):
    a request whose bucket ends above the bound counts as slow where that makes passing harder, and one whose bucket ends more than a bucket's
    width above it where that makes failing easier.
    """
    match gate.metric:
        case "errorRate":
            sums = Sums(n=counts.requests, total=counts.errors, square=counts.errors)
            return sums, sums
        case "outcome/accuracy":
            sums = Sums(n=counts.outcomes, total=counts.correct, square=counts.correct)
            return sums, sums
        case "outcome/brier":
            sums = Sums(n=counts.outcomes, total=counts.brier_sum, square=counts.brier_square_sum)
            return sums, sums
    bound = gate.max or 0.0
    edges = [(float(edge), count) for edge, count in counts.latency.items()]
    n = float(sum(count for _, count in edges))
    sure = float(sum(count for upper, count in edges if upper > bound * BUCKET_WIDTH))
    maybe = float(sum(count for upper, count in edges if upper > bound))
    return Sums(n=n, total=sure, square=sure), Sums(n=n, total=maybe, square=maybe)


def begin_step(gate_state: GateState) -> GateState:
    """A new step: one more start of the failing process, so that what breaks only now is found quickly."""
    starts = [*gate_state.fail_logs, [0.0] * len(ODDS_ABOVE)]
    if len(starts) > MAX_STARTS:
        starts = [*starts[: MAX_STARTS - 1], starts[-1]]
    update: dict[str, object] = {
        "fail_logs": starts,
        "step_candidate": Sums(),
        "step_gap_weight": 0.0,
        "step_gap_sum": 0.0,
    }
    update["answer"] = None
    return gate_state.model_copy(update=update)


def absorb(gate: Gate, state: GateState, candidate: Counts, stable: Counts) -> GateState:
    """Bet on what arrived since the look before; a query knows nothing of counts."""
    if gate.promql is not None:
        return state
    failing, passing = measure(gate, candidate)
    if gate.compare is None:
        return _absorb_one(gate, state, failing, passing, measure(gate, stable)[0])
    return _absorb_two(gate, state, failing, measure(gate, stable)[0])


def hear(gate: Gate, state: GateState, answer: float | None) -> GateState:
    """Take the answer to a gate's query; no answer, or one that is no number, is kept as None and never passes or fails."""
    if answer is None or not math.isfinite(answer):
        return state.model_copy(update={"answer": None})
    update = {
        "answer": answer,
        "answers": state.answers + 1,
        "beyond": state.beyond + 1 if _beyond(gate, answer) else 0,
    }
    return state.model_copy(update=update)


def _beyond(gate: Gate, answer: float) -> bool:
    return answer > gate.max if gate.max is not None else answer < (gate.min or 0.0)


def _absorb_one(gate: Gate, state: GateState, failing: Sums, passing: Sums, stable: Sums) -> GateState:
    update: dict[str, object] = {"stable": state.stable.plus(stable)}
    if failing.n > 0:
        bound = P99_SHARE if gate.metric == "latencyP99Ms" else (gate.max if gate.max is not None else gate.min) or 0.0
        worse = ODDS_BELOW if gate.min is not None else ODDS_ABOVE
        better = ODDS_ABOVE if gate.min is not None else ODDS_BELOW
        grew = one_arm(_sample(gate, failing), bound, worse)
        update |= {
            "fail_logs": [_add(start, grew) for start in state.fail_logs],
            "pass_logs": _add(state.pass_logs, one_arm(_sample(gate, passing), bound, better)),
            "candidate": state.candidate.plus(passing),
            "step_candidate": state.step_candidate.plus(passing),
        }
    return state.model_copy(update=update)


def _absorb_two(gate: Gate, state: GateState, candidate: Sums, stable: Sums) -> GateState:
    candidate = state.pending_candidate.plus(candidate)
    stable = state.pending_stable.plus(stable)
    if candidate.n < 1 or stable.n < 1:
        return state.model_copy(update={"pending_candidate": candidate, "pending_stable": stable})
    update: dict[str, object] = {
        "pending_candidate": Sums(),
        "pending_stable": Sums(),
        "candidate": state.candidate.plus(candidate),
        "stable": state.stable.plus(stable),
        "step_candidate": state.step_candidate.plus(candidate),
    }
    gap = candidate.n * (candidate.mean - stable.mean)
    for name, value in (("gap_weight", candidate.n), ("gap_sum", gap)):
        update[name] = getattr(state, name) + value
        update[f"step_{name}"] = getattr(state, f"step_{name}") + value
    if state.memory.n >= BURN_IN:
        higher_is_better = gate.metric == "outcome/accuracy"
        worse, better = (ODDS_BELOW, ODDS_ABOVE) if higher_is_better else (ODDS_ABOVE, ODDS_BELOW)
        shift = -(gate.margin or 0.0) if higher_is_better else (gate.margin or 0.0)
        mean = np.asarray((state.memory.total + 0.5) / (state.memory.n + 1.0))
        arms = _sample(gate, candidate), _sample(gate, stable)
        grew = two_arms(*arms, mean, 0.0, worse)
        update["fail_logs"] = [_add(start, grew) for start in state.fail_logs]
        update["pass_logs"] = _add(state.pass_logs, two_arms(*arms, mean, shift, better))
    memory = state.memory.plus(stable)
    fade = min(1.0, MEMORY / memory.n)
    update["memory"] = Sums(n=memory.n * fade, total=memory.total * fade, square=memory.square * fade)
    return state.model_copy(update=update)


def _sample(gate: Gate, sums: Sums) -> Sample:
    return Sample.of(sums.n, sums.total, sums.square if gate.metric == "outcome/brier" else None)


def _add(logs: list[float], grew: Array) -> list[float]:
    # The bound keeps the numbers finite; e^600 and e^-600 decide nothing that e^60 and e^-60 would not.
    return [float(np.clip(log + more, -600.0, 600.0)) for log, more in zip(logs, grew, strict=True)]


def log_fail(state: GateState, steps: int) -> float:
    """Logarithm of the failing e-process: half on the trial's start, half spread over the later steps, begun or not."""
    if not state.fail_logs:
        return 0.0
    later = max(steps - 1, len(state.fail_logs) - 1)
    first = log_mean(np.array(state.fail_logs[0]))
    if later == 0:
        return float(first)
    parts = [float(first) + math.log(0.5)]
    parts += [float(log_mean(np.array(start))) + math.log(0.5 / later) for start in state.fail_logs[1:]]
    waiting = later - (len(state.fail_logs) - 1)
    if waiting:
        parts.append(math.log(0.5 * waiting / later))
    top = max(parts)
    return top + math.log(sum(math.exp(part - top) for part in parts))


def judge(gate: Gate, state: GateState, steps: int) -> GateView:
    """The verdict on what is known now, with the figures in words."""
    if gate.promql is not None:
        return _judge_query(gate, state)
    needed = -math.log(1.0 - gate.level)
    against, for_it = log_fail(state, steps), float(log_mean(np.array(state.pass_logs)))
    loss, limit, words = _estimate(gate, state)
    step_loss = _step_loss(gate, state)
    verdict: Verdict = "undecided"
    if state.candidate.n < 1:
        reason = "no data of the candidate yet"
    elif against >= needed and (gate.compare is None or loss > limit):
        verdict, reason = "fail", f"e-value against it {_power(against)} of {_power(needed)} needed"
    elif for_it >= needed and step_loss is not None and step_loss > limit:
        reason = "proved so far, but this step's own figures are on the wrong side of the limit"
    elif for_it >= needed:
        verdict, reason = "pass", f"e-value for it {_power(for_it)} of {_power(needed)} needed"
    else:
        reason = f"e-values {_power(for_it)} for and {_power(against)} against, {_power(needed)} needed"
    return GateView(
        gate=gate.text,
        verdict=verdict,
        evidence=f"{words}; {reason}",
        candidate_samples=int(state.candidate.n),
        stable_samples=int(state.stable.n),
    )


def _judge_query(gate: Gate, state: GateState) -> GateView:
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
        gap = state.gap_sum / state.gap_weight if state.gap_weight else 0.0
        loss = -gap if gate.metric == "outcome/accuracy" else gap
        words = (
            f"candidate {mean:.4f} over {n}, stable {state.stable.mean:.4f} over {int(state.stable.n)} at the same time"
        )
        return loss, gate.margin or 0.0, f"{words}, difference {gap:+.4f} (margin {gate.margin:g})"
    if gate.metric == "latencyP99Ms":
        share = f"{mean:.2%} of {n} requests above {gate.max:g} ms (allowed {P99_SHARE:.0%})"
        return mean, P99_SHARE, share
    if gate.min is not None:
        return gate.min - mean, 0.0, f"candidate {mean:.4f} over {n}, at least {gate.min:g} wanted"
    return mean, gate.max or 0.0, f"candidate {mean:.4f} over {n}, at most {gate.max:g} wanted"


def _step_loss(gate: Gate, state: GateState) -> float | None:
    """How bad this step alone looks; None while it has too few values."""
    if state.step_candidate.n < STEP_SAMPLES:
        return None
    if gate.compare is not None:
        gap = state.step_gap_sum / state.step_gap_weight
        return -gap if gate.metric == "outcome/accuracy" else gap
    mean = state.step_candidate.mean
    return gate.min - mean if gate.min is not None else mean


def _power(log: float) -> str:
    return f"{math.exp(min(log, 690.0)):.3g}"
