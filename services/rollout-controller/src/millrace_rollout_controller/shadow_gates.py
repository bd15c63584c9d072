"""Gates on answers compared row by row with stable's, before any caller gets the candidate's. Pure.

`shadow/labelFlipRate` is the share of rows with another label, `shadow/scoreShift` the mean absolute difference of the score (each row at most
1), `shadow/maxAbsDiff` a bound on the largest absolute difference of a row that at most 1 % of the rows may exceed. All three are means of
values in [0, 1], and each is tested by one e-process over all rows and one for each segment.

Failing: half of the bet is on all rows and half spread over the segments, seen or not, so a segment that goes wrong alone fails the gate, and
the chance of a wrong failure stays what it was. Passing: all rows together are proved, and no segment with enough rows looks wrong.
"""

import math

import numpy as np
from millrace_kit.sequential import ODDS_ABOVE, ODDS_BELOW, Sample, log_mean, one_arm
from pydantic import BaseModel

from millrace_rollout_controller.counts import Sums
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.shadow_pairs import WHOLE, Pairs
from millrace_rollout_controller.state import GateView, Verdict

PREFIX = "shadow/"
BEYOND_SHARE = 0.01
"""Share of rows that may differ by more than `maxAbsDiff`."""
BUCKET_WIDTH = 1.1
"""Most that a bucket's upper edge is above its lower one; the gateways' are 9 % wide."""
MAX_SEGMENTS = 17
"""What a gateway keeps apart, and the rest."""
SEGMENT_ROWS = 30
"""Rows of a segment from which on its own estimate can hold a pass back."""


class ShadowState(BaseModel):
    """What a gate has learned of the pairs of this trial, by segment."""

    fail_logs: dict[str, list[float]] = {}
    pass_log: list[float] = [0.0] * len(ODDS_BELOW)
    sums: dict[str, Sums] = {}
    """As the passing side sees them."""


def is_shadow(gate: Gate) -> bool:
    """Whether the gate is about pairs of answers."""
    return (gate.metric or "").startswith(PREFIX)


def bound(gate: Gate) -> float:
    """What the mean of the gate's values may be."""
    return BEYOND_SHARE if gate.metric == "shadow/maxAbsDiff" else gate.max or 0.0


def measure(gate: Gate, pairs: Pairs) -> tuple[Sums, Sums]:
    """The gate's values as its failing and as its passing side see them; they differ by the width of a bucket only."""
    n = float(pairs.pairs)
    if gate.metric == "shadow/labelFlipRate":
        sums = Sums(n=n, total=pairs.flips, square=pairs.flips)
        return sums, sums
    if gate.metric == "shadow/scoreShift":
        sums = Sums(n=n, total=pairs.shift_sum, square=pairs.shift_square_sum)
        return sums, sums
    buckets = pairs.differences.get(gate.tensor or WHOLE, {})
    n, limit = float(sum(buckets.values())), gate.max or 0.0
    sure, maybe = (
        float(sum(count for edge, count in buckets.items() if float(edge) > at)) for at in (limit * BUCKET_WIDTH, limit)
    )
    return Sums(n=n, total=sure, square=sure), Sums(n=n, total=maybe, square=maybe)


def absorb(gate: Gate, state: ShadowState, pairs: dict[str, Pairs]) -> ShadowState:
    """Bet on what was compared since the look before."""
    fail_logs, sums, pass_log = dict(state.fail_logs), dict(state.sums), state.pass_log
    for segment, more in pairs.items():
        failing, passing = measure(gate, more)
        if failing.n < 1 or (segment not in sums and len(sums) > MAX_SEGMENTS):
            continue
        grew = one_arm(_sample(gate, failing), bound(gate), ODDS_ABOVE)
        fail_logs[segment] = _add(fail_logs.get(segment, [0.0] * len(ODDS_ABOVE)), grew)
        sums[segment] = sums.get(segment, Sums()).plus(passing)
        if segment == WHOLE:
            pass_log = _add(pass_log, one_arm(_sample(gate, passing), bound(gate), ODDS_BELOW))
    return ShadowState(fail_logs=fail_logs, pass_log=pass_log, sums=sums)


def _sample(gate: Gate, sums: Sums) -> Sample:
    return Sample.of(sums.n, sums.total, sums.square if gate.metric == "shadow/scoreShift" else None)


def _add(logs: list[float], grew: object) -> list[float]:
    # The bound keeps the numbers finite, as in the other gates.
    found: list[float] = np.clip(np.array(logs) + grew, -600.0, 600.0).tolist()
    return found


def log_fail(state: ShadowState) -> float:
    """Logarithm of the failing e-process: half on all rows, half spread over the segments."""
    products = {segment: float(log_mean(np.array(logs))) for segment, logs in state.fail_logs.items()}
    parts = [products.pop(WHOLE, 0.0) + math.log(0.5)]
    parts += [log + math.log(0.5 / MAX_SEGMENTS) for log in products.values()]
    unseen = MAX_SEGMENTS - len(products)
    if unseen > 0:
        parts.append(math.log(0.5 * unseen / MAX_SEGMENTS))
    top = max(parts)
    return top + math.log(sum(math.exp(part - top) for part in parts))


def judge(gate: Gate, state: ShadowState) -> GateView:
    """The verdict on what is known now."""
    needed, allowed = -math.log(1.0 - gate.level), bound(gate)
    whole = state.sums.get(WHOLE, Sums())
    against, for_it = log_fail(state), float(log_mean(np.array(state.pass_log)))
    worst = max(
        ((sums.mean, segment) for segment, sums in state.sums.items() if segment and sums.n >= SEGMENT_ROWS),
        default=(0.0, ""),
    )
    verdict: Verdict = "undecided"
    if whole.n < 1:
        words = "no pair of answers yet"
    else:
        what = {"shadow/labelFlipRate": "label flips", "shadow/scoreShift": "mean shift"}.get(
            gate.metric or "", f"beyond {gate.max:g}"
        )
        words = f"{what} {whole.mean:.4f} of {int(whole.n)} rows, at most {allowed:g} wanted"
        if worst[1]:
            words += f"; {worst[0]:.4f} in segment {worst[1]!r}, the worst of {len(state.sums) - 1}"
        words += f"; e-values {_power(for_it)} for and {_power(against)} against, {_power(needed)} needed"
        if against >= needed:
            verdict = "fail"
        elif for_it >= needed and worst[0] <= allowed:
            verdict = "pass"
    return GateView(
        gate=gate.text,
        verdict=verdict,
        evidence=words,
        candidate_samples=int(whole.n),
        stable_samples=int(whole.n),
    )


def _power(log: float) -> str:
    return f"{math.exp(min(log, 690.0)):.3g}"
