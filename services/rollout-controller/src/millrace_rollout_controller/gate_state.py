"""What a gate has learned in a trial, as plain values that outlive a restart. Pure."""

import math

import numpy as np
from millrace_kit.sequential import ODDS_ABOVE, log_mean
from pydantic import BaseModel

from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Sums
from millrace_rollout_controller.drift_gates import DriftState
from millrace_rollout_controller.looks import Look
from millrace_rollout_controller.shadow_gates import ShadowState
from millrace_rollout_controller.value_gates import Limit

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
    roots: Comparison | None = None
    """Of a comparison of root mean squares."""
    segments: dict[str, "GateState"] = {}
    """Of a gate with a segment: the groups, by their names."""

    @property
    def gap(self) -> float:
        """Mean by which the candidate's values are above stable's at the same time."""
        return self.gap_sum / self.gap_weight if self.gap_weight else 0.0


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
