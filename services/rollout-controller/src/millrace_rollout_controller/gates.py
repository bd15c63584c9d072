"""Gates: evidence in, one of pass, fail and undecided out.

A gate fails when its e-process refutes "the candidate is good enough" at 1 - confidence; for a comparison that is "not worse than stable",
and the estimated loss must also exceed the margin, so a difference too small to matter never rolls back. It passes when another e-process
refutes "the candidate is too bad" ("worse than stable by more than the margin"), or for a comparison with `maxSamples` when a group-sequential
look does. Everything else is undecided, and no data is undecided.

A latency comparison counts requests slower than stable's percentile T, learned from stable's first requests and then kept. It fails when the
candidate's share above T is larger than stable's, and passes when its share above T (1 + margin) is smaller than stable's above T: then its
percentile is at most 1 + margin times stable's.

Values of any unit (`business/…`, `outcome/mae`) with a declared range are moved to [0, 1] and tested like the rest; without one they are tested
in the limit (`value_gates.py`). With a `segment` every group has tests of its own (`segment_gates.py`).
"""

import math

import numpy as np
from millrace_kit.power import BURN_IN, MEMORY
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Array, Sample, log_mean, one_arm, two_arms
from pydantic import BaseModel

from millrace_rollout_controller import drift_gates, looks, measures, segment_gates, shadow_gates, value_gates
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.drift_gates import DriftState
from millrace_rollout_controller.looks import Look
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.measures import QUANTILES, measure
from millrace_rollout_controller.shadow_gates import ShadowState, is_shadow
from millrace_rollout_controller.state import GateView, Verdict
from millrace_rollout_controller.value_gates import Limit

STEP_SAMPLES = 30
"""Candidate values in a step from which on that step's own estimate can hold a pass back."""
MAX_STARTS = 21
THROUGHPUT_WINDOW_S = 10.0
"""Length of what one value of a throughput stands for."""


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
    pending_passing: Sums = Sums()
    """A batch that still lacks one arm; the candidate's as the passing side sees it, too."""
    threshold: float | None = None
    """Of a latency comparison: stable's percentile in ms, once it is known."""
    learning: dict[str, int] = {}
    """Stable's latencies until then."""
    gap_ratio: float = 0.0
    """Sum over batches of the candidate's count squared by stable's."""
    looks: list[Look] = []
    """Of a comparison with `maxSamples`."""
    drift: DriftState | None = None
    shadow: ShadowState | None = None
    window_s: float = 0.0
    window_answers: int = 0
    """Of a throughput: the window that is being filled."""
    memory: Sums = Sums()
    answer: float | None = None
    """Of a query: the last answer in this step; None for none that is a number."""
    answers: int = 0
    beyond: int = 0
    """Of a query: answers beyond the bound in a row."""
    limit: Limit | None = None
    """Of values without a range."""
    segments: dict[str, "GateState"] = {}
    """Of a gate with a segment: the groups, by their names."""


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
    update["segments"] = {name: begin_step(state) for name, state in gate_state.segments.items()}
    return gate_state.model_copy(update=update)


def absorb(gate: Gate, state: GateState, candidate: Counts, stable: Counts) -> GateState:
    """Bet on what arrived since the look before; queries and throughput know nothing of counts."""
    if gate.is_reading:
        return state
    if gate.metric == "drift/prediction":
        drift = drift_gates.absorb(state.drift or DriftState(), candidate.scores, stable.scores, gate.max or 0.0)
        return state.model_copy(update={"drift": drift})
    if gate.metric in QUANTILES and gate.compare is not None and state.threshold is None:
        return _learn(gate, state, stable)
    if is_shadow(gate):
        return state.model_copy(
            update={"shadow": shadow_gates.absorb(gate, state.shadow or ShadowState(), candidate.shadow)}
        )
    if gate.segment is not None:
        segments = dict(state.segments)
        for name, mine, theirs in segment_gates.groups(gate, candidate, stable):
            if name in segments or len(segments) < segment_gates.GROUPS:
                before = segments.get(name) or begin_step(GateState())
                segments[name] = _absorb(gate, before, mine, theirs)
        state = state.model_copy(update={"segments": segments})
    return _absorb(gate, state, candidate, stable)


def _absorb(gate: Gate, state: GateState, candidate: Counts, stable: Counts) -> GateState:
    measured = measure(gate, candidate, stable, state.threshold)
    if gate.compare is None:
        return _absorb_one(gate, state, measured.failing, measured.passing, measured.stable)
    return _absorb_two(gate, state, measured)


def _learn(gate: Gate, state: GateState, stable: Counts) -> GateState:
    """Stable's percentile, from requests that are not bet on."""
    learning = dict(state.learning)
    for edge, count in stable.latency.items():
        learning[edge] = learning.get(edge, 0) + count
    threshold = measures.percentile(gate, learning)
    return state.model_copy(update={"learning": {} if threshold else learning, "threshold": threshold})


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


def fill(gate: Gate, state: GateState, elapsed_s: float | None, answered: int) -> GateState:
    """A throughput's window grows by what was answered without an error; a whole window is one answer.

    Args:
        gate: a throughput.
        state: before.
        elapsed_s: time the figures stand for; None when a gateway did not answer, then the window starts over.
        answered: candidate requests answered without an error in that time.
    """
    if elapsed_s is None:
        return state.model_copy(update={"window_s": 0.0, "window_answers": 0, "answer": None})
    length, answers = state.window_s + elapsed_s, state.window_answers + answered
    if length < THROUGHPUT_WINDOW_S:
        return state.model_copy(update={"window_s": length, "window_answers": answers})
    # Without one answer nobody knows whether anything was asked.
    state = hear(gate, state, answers / length if answers else None)
    return state.model_copy(update={"window_s": 0.0, "window_answers": 0})


def _beyond(gate: Gate, answer: float) -> bool:
    return answer > gate.max if gate.max is not None else answer < (gate.min or 0.0)


def _absorb_one(gate: Gate, state: GateState, failing: Sums, passing: Sums, stable: Sums) -> GateState:
    update: dict[str, object] = {"stable": state.stable.plus(stable)}
    if failing.n > 0:
        bound = _bound(gate)
        worse = ODDS_BELOW if gate.min is not None else ODDS_ABOVE
        better = ODDS_ABOVE if gate.min is not None else ODDS_BELOW
        if not gate.is_asymptotic:
            grew = one_arm(_sample(gate, failing), bound, worse)
            update["fail_logs"] = [_add(start, grew) for start in state.fail_logs]
            update["pass_logs"] = _add(state.pass_logs, one_arm(_sample(gate, passing), bound, better))
        update |= {
            "candidate": state.candidate.plus(passing),
            "step_candidate": state.step_candidate.plus(passing),
        }
    return _in_the_limit(gate, state.model_copy(update=update))


def _in_the_limit(gate: Gate, state: GateState) -> GateState:
    """What the sums of values without a range say."""
    if not gate.is_asymptotic:
        return state
    n = state.candidate.n
    if gate.compare is None:
        excess = state.candidate.total - _bound(gate) * n
        loss, margin, ratio = (-excess if gate.min is not None else excess), 0.0, None
    else:
        loss, margin, ratio = _loss(gate, state) * n, _limit(gate) * n, state.gap_ratio
    found = value_gates.in_the_limit(state.limit, state.candidate, state.stable, ratio, loss=loss, margin=margin)
    return state.model_copy(update={"limit": found})


def _bound(gate: Gate) -> float:
    """What a bound's tests are about."""
    if gate.metric in QUANTILES:
        return measures.slow_share(gate)
    return value_gates.scaled_bound(gate, (gate.max if gate.max is not None else gate.min) or 0.0)


def _absorb_two(gate: Gate, state: GateState, measured: measures.Measured) -> GateState:
    failing = state.pending_candidate.plus(measured.failing)
    passing = state.pending_passing.plus(measured.passing)
    stable = state.pending_stable.plus(measured.stable)
    if failing.n < 1 or stable.n < 1:
        waiting = {"pending_candidate": failing, "pending_passing": passing, "pending_stable": stable}
        return state.model_copy(update=waiting)
    update: dict[str, object] = {
        "pending_candidate": Sums(),
        "pending_passing": Sums(),
        "pending_stable": Sums(),
        "candidate": state.candidate.plus(passing),
        "stable": state.stable.plus(stable),
        "step_candidate": state.step_candidate.plus(passing),
        "gap_ratio": state.gap_ratio + passing.n**2 / stable.n,
    }
    gap = passing.n * (passing.mean - stable.mean)
    for name, value in (("gap_weight", passing.n), ("gap_sum", gap)):
        update[name] = getattr(state, name) + value
        update[f"step_{name}"] = getattr(state, f"step_{name}") + value
    if state.memory.n >= BURN_IN and not gate.is_asymptotic:
        better, worse = (ODDS_ABOVE, ODDS_BELOW) if gate.higher_is_better else (ODDS_BELOW, ODDS_ABOVE)
        shift = -_limit(gate) if gate.higher_is_better else _limit(gate)
        mean = np.asarray((state.memory.total + 0.5) / (state.memory.n + 1.0))
        other = _sample(gate, stable)
        grew = two_arms(_sample(gate, failing), other, mean, 0.0, worse)
        update["fail_logs"] = [_add(start, grew) for start in state.fail_logs]
        update["pass_logs"] = _add(state.pass_logs, two_arms(_sample(gate, passing), other, mean, shift, better))
    memory = state.memory.plus(stable)
    fade = min(1.0, MEMORY / memory.n)
    update["memory"] = Sums(n=memory.n * fade, total=memory.total * fade, square=memory.square * fade)
    return _take_look(gate, _in_the_limit(gate, state.model_copy(update=update)))


def _take_look(gate: Gate, state: GateState) -> GateState:
    if gate.max_samples is None or not looks.due(state.looks, state.candidate.n, gate.max_samples):
        return state
    found = looks.look(
        state.looks,
        state.candidate,
        state.stable,
        state.gap_ratio,
        room=_limit(gate) - _loss(gate, state),
        shift=-_limit(gate) if gate.higher_is_better else _limit(gate),
        most=gate.max_samples,
        alpha=1.0 - gate.level,
    )
    return state.model_copy(update={"looks": [*state.looks, found]})


def _limit(gate: Gate) -> float:
    """The loss that must not be; a latency comparison has its margin in the threshold."""
    return 0.0 if gate.metric in QUANTILES else (gate.margin or 0.0) / value_gates.width(gate)


def _loss(gate: Gate, state: GateState) -> float:
    """How much worse than stable the candidate seems to be."""
    gap = state.gap_sum / state.gap_weight if state.gap_weight else 0.0
    return -gap if gate.higher_is_better else gap


def _sample(gate: Gate, sums: Sums) -> Sample:
    return Sample.of(sums.n, sums.total, sums.square if gate.metric == "outcome/brier" or gate.is_value else None)


def _add(logs: list[float], grew: Array) -> list[float]:
    # The bound keeps the numbers finite; e^600 and e^-600 decide nothing that e^60 and e^-60 would not.
    return [float(np.clip(log + more, -600.0, 600.0)) for log, more in zip(logs, grew, strict=True)]


def log_fail(state: GateState, steps: int) -> float:
    """Logarithm of the failing e-process: half on the trial's start, half spread over the later steps, begun or not."""
    if state.limit is not None:
        return state.limit.against
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
    proved, proof = _proof(gate, state, needed)
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


def _proof(gate: Gate, state: GateState, needed: float) -> tuple[bool, str]:
    """Whether the passing side is proved, and the sentence about it."""
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
        loss, limit = _loss(gate, state), _limit(gate)
        if gate.metric in QUANTILES:
            slow = (state.threshold or 0.0) * (1.0 + (gate.margin or 0.0))
            words = (
                f"{mean:.2%} of {n} candidate requests above {slow:.4g} ms, "
                f"{state.stable.mean:.2%} of {int(state.stable.n)} stable ones above {state.threshold or 0.0:.4g} ms"
            )
            return loss, limit, words
        gap = state.gap_sum / state.gap_weight if state.gap_weight else 0.0
        wide = value_gates.width(gate)
        mine, theirs = value_gates.unscaled(gate, mean), value_gates.unscaled(gate, state.stable.mean)
        words = f"candidate {mine:.4f} over {n}, stable {theirs:.4f} over {int(state.stable.n)} at the same time"
        words += f", difference {gap * wide:+.4f} (margin {gate.margin:g}){value_gates.kind(gate, state.limit)}"
        return loss, limit, words
    if gate.metric in QUANTILES:
        allowed = measures.slow_share(gate)
        return mean, allowed, f"{mean:.2%} of {n} requests above {gate.max:g} ms (allowed {allowed:.0%})"
    words = f"candidate {value_gates.unscaled(gate, mean):.4f} over {n}"
    if gate.min is not None:
        words += f", at least {gate.min:g} wanted{value_gates.kind(gate, state.limit)}"
        return _bound(gate) - mean, 0.0, words
    return mean, _bound(gate), f"{words}, at most {gate.max:g} wanted{value_gates.kind(gate, state.limit)}"


def _step_loss(gate: Gate, state: GateState) -> float | None:
    """How bad this step alone looks; None while it has too few values."""
    if state.step_candidate.n < STEP_SAMPLES:
        return None
    if gate.compare is not None:
        gap = state.step_gap_sum / state.step_gap_weight
        return -gap if gate.higher_is_better else gap
    mean = state.step_candidate.mean
    return _bound(gate) - mean if gate.min is not None else mean


def _power(log: float) -> str:
    return f"{math.exp(min(log, 690.0)):.3g}"
