"""Gates: evidence for and against "the candidate is good enough". Pure.

A gate fails when its e-process refutes "the candidate is good enough" at 1 - confidence; for a comparison that is "not worse than stable",
and the estimated loss must also exceed the margin, so a difference too small to matter never rolls back. It passes when another e-process
refutes "the candidate is too bad" ("worse than stable by more than the margin"), or for a comparison with `maxSamples` when a group-sequential
look does. Everything else is undecided, and no data is undecided.

A latency comparison counts requests slower than stable's percentile T, learned from stable's first requests and then kept. It fails when the
candidate's share above T is larger than stable's, and passes when its share above T (1 + margin) is smaller than stable's above T: then its
percentile is at most 1 + margin times stable's.

Values of any unit (`business/…`, `outcome/mae`) with a declared range are moved to [0, 1] and tested like the rest; without one they are tested
in the limit (`value_gates.py`). With a `segment` every group has tests of its own (`segment_gates.py`). Root mean squares fail by the test of mean
squares, whose order is the same, and pass by bounds of the roots (`comparisons.py`).

Here evidence is taken in; what it says is in `verdicts.py`.
"""

import math

import numpy as np
from millrace_kit.power import BURN_IN, MEMORY
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Array, Sample, one_arm, two_arms

from millrace_rollout_controller import (
    comparisons,
    drift_gates,
    looks,
    measures,
    segment_gates,
    shadow_gates,
    value_gates,
)
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.drift_gates import DriftState
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.measures import QUANTILES, allowed_loss, measure
from millrace_rollout_controller.shadow_gates import ShadowState, is_shadow

THROUGHPUT_WINDOW_S = 10.0
"""Length of what one value of a throughput stands for."""


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
        bound = measures.bound(gate)
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
        excess = state.candidate.total - measures.bound(gate) * n
        loss, margin, ratio = (-excess if gate.min is not None else excess), 0.0, None
    else:
        # Roots are in the order of the mean squares, so these tell which is worse; what passes is another test.
        gap = -state.gap_sum if gate.higher_is_better else state.gap_sum
        loss, margin, ratio = gap, allowed_loss(gate) * n, state.gap_ratio
    found = value_gates.in_the_limit(state.limit, state.candidate, state.stable, ratio, loss=loss, margin=margin)
    return state.model_copy(update={"limit": found})


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
    if value_gates.is_root(gate):
        arms = passing, stable
        update["roots"] = comparisons.add(state.roots or Comparison(), *arms, asymptotic=gate.is_asymptotic)
    if state.memory.n >= BURN_IN and not gate.is_asymptotic:
        better, worse = (ODDS_ABOVE, ODDS_BELOW) if gate.higher_is_better else (ODDS_BELOW, ODDS_ABOVE)
        shift = -allowed_loss(gate) if gate.higher_is_better else allowed_loss(gate)
        mean = np.asarray((state.memory.total + 0.5) / (state.memory.n + 1.0))
        other = _sample(gate, stable)
        grew = two_arms(_sample(gate, failing), other, mean, 0.0, worse)
        update["fail_logs"] = [_add(start, grew) for start in state.fail_logs]
        if not value_gates.is_root(gate):
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
        room=allowed_loss(gate) - measures.loss(gate, state.candidate.mean, state.gap),
        shift=-allowed_loss(gate) if gate.higher_is_better else allowed_loss(gate),
        most=gate.max_samples,
        alpha=1.0 - gate.level,
    )
    return state.model_copy(update={"looks": [*state.looks, found]})


def _sample(gate: Gate, sums: Sums) -> Sample:
    return Sample.of(sums.n, sums.total, sums.square if gate.metric == "outcome/brier" or gate.is_value else None)


def _add(logs: list[float], grew: Array) -> list[float]:
    # The bound keeps the numbers finite; e^600 and e^-600 decide nothing that e^60 and e^-60 would not.
    return [float(np.clip(log + more, -600.0, 600.0)) for log, more in zip(logs, grew, strict=True)]
