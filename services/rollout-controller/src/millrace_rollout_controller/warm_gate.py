"""The warm gate: before the first weight a candidate answers requests that stable has answered, until it does so steadily. Pure.

The rule for "steadily" is perf_analyzer's: in the last three windows the greatest mean latency and the greatest throughput are at most 10 %
above the least. A busy machine never lets that hold. So each request is replayed to a stable server too, right before or after, and
it is as good if the median latency is, three windows in a row, the same multiple of stable's within 10 %: what slows the machine slows both.
A candidate whose latency is neither is not called cold: the gate is undecided.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from millrace_rollout_controller import server_versions
from millrace_rollout_controller.candidates import fail
from millrace_rollout_controller.manifest import Warmup
from millrace_rollout_controller.plans import Draft, WarmServers
from millrace_rollout_controller.state import GateView, Verdict

STEADY_WINDOWS = 3
STEADY_SHARE = 0.10
NOISE_MS = 1.0
"""A 99th percentile that is above stable's by less than this is no difference: it is what a busy client adds."""


@dataclass(frozen=True, slots=True)
class Window:
    """Some requests to one server."""

    latencies_ms: tuple[float, ...]
    """Of the requests that were answered."""
    seconds: float
    failures: int = 0
    problem: str = ""
    """What the last failed one was told."""

    @property
    def requests(self) -> int:
        """Answered or failed."""
        return len(self.latencies_ms) + self.failures

    @property
    def median_ms(self) -> float:
        """Median latency; 0 without answers."""
        return statistics.median(self.latencies_ms) if self.latencies_ms else 0.0

    @property
    def mean_ms(self) -> float:
        """Mean latency; 0 without answers."""
        return sum(self.latencies_ms) / len(self.latencies_ms) if self.latencies_ms else 0.0

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds if self.seconds > 0 else 0.0


def steady(windows: Sequence[Window], share: float = STEADY_SHARE) -> bool:
    """Whether the last three windows had no failure and differ by at most `share` (10 %) in latency and in throughput."""
    last = windows[-STEADY_WINDOWS:]
    if len(last) < STEADY_WINDOWS or any(window.failures or not window.latencies_ms for window in last):
        return False
    return all(max(values) <= (1.0 + share) * min(values) for values in _figures(last))


def steady_beside(candidate: Sequence[Window], stable: Sequence[Window]) -> bool:
    """Whether in the last three windows the median latency is the same multiple of stable's, within 10 %."""
    pairs = list(zip(candidate[-STEADY_WINDOWS:], stable[-STEADY_WINDOWS:], strict=False))
    if len(pairs) < STEADY_WINDOWS or any(mine.failures or not theirs.median_ms for mine, theirs in pairs):
        return False
    ratios = [mine.median_ms / theirs.median_ms for mine, theirs in pairs]
    return max(ratios) <= (1.0 + STEADY_SHARE) * min(ratios)


def _figures(windows: Sequence[Window]) -> tuple[list[float], list[float]]:
    return [window.mean_ms for window in windows], [window.per_s for window in windows]


def p99_ms(windows: Sequence[Window]) -> float:
    """99th percentile (nearest rank) of the last three windows; 0 without answers."""
    values = sorted(ms for window in windows[-STEADY_WINDOWS:] for ms in window.latencies_ms)
    return values[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def judge(candidate: Sequence[Window], stable: Sequence[Window], block: Warmup) -> tuple[Verdict, str]:
    """What the windows of one server say so far.

    Args:
        candidate: windows of the server, oldest first.
        stable: as many windows of a server of stable; none when it has no server.
        block: the manifest's bounds.
    """
    trials = f"after {len(candidate)} of at most {block.max_trials} windows of at least {block.requests} requests"
    last = candidate[-1] if candidate else Window((), 0.0)
    out_of_trials = len(candidate) >= block.max_trials
    if last.failures:
        words = f"{last.failures} of {last.requests} replayed requests failed ({last.problem}) {trials}"
        return ("fail" if out_of_trials else "undecided"), words
    alone = steady(candidate)
    if not alone and not steady_beside(candidate, stable):
        means = ", ".join(f"{window.mean_ms:.2f}" for window in candidate[-STEADY_WINDOWS:])
        words = f"latency is not steady {trials}: mean {means} ms"
        if stable:
            words += f", stable's {', '.join(f'{window.mean_ms:.2f}' for window in stable[-STEADY_WINDOWS:])} ms"
        return "undecided", words
    mine = p99_ms(candidate)
    words = f"steady{'' if alone else ' beside stable'} {trials}, mean {last.mean_ms:.2f} ms, {last.per_s:.0f}/s, p99 {mine:.2f} ms"
    theirs = p99_ms(stable)
    if theirs <= 0:
        return "pass", f"{words}; stable has no server to compare with"
    words += f", stable's {theirs:.2f} ms (at most {block.max_p99_ratio:g} times)"
    if mine <= max(theirs * block.max_p99_ratio, theirs + NOISE_MS):
        return "pass", words
    return ("fail" if out_of_trials else "undecided"), words


def warm(d: Draft) -> bool:
    """Whether the candidate may have its first weight; writes the gate into the status, and ends the trial when it failed."""
    s, block = d.status, d.spec.rollout.warmup
    # Whoever goes back to a version goes back at once.
    if block is None or s.candidate is None or s.undo == s.candidate.ref.version:
        return True
    if s.warmup is not None and s.warmup.verdict == "pass":
        return True
    seen = d.seen.warmup
    if seen is None or seen.trial != s.trial:
        s.warmup = _view("undecided", "replaying begins", 0)
        s.waiting = f"{s.warmup.gate}: replaying begins"
        return False
    s.warmup, s.warmup_over = _view(seen.verdict, seen.evidence, seen.requests), seen.over
    version = s.candidate.ref.version
    if seen.verdict == "undecided" and seen.over:
        return _go_on_undecided(d, block, seen.evidence)
    if seen.verdict == "undecided":
        s.waiting = f"{s.warmup.gate}: {seen.evidence}"
        return False
    if seen.verdict == "pass":
        s.event(d.now, "Normal", "Warm", f"{version}: {seen.evidence}")
        return True
    if block.required == "Never":
        s.event(d.now, "Warning", "NotWarm", f"{version} goes on all the same: {seen.evidence}")
        return True
    fail(d, "WarmupFailed", seen.evidence)
    return False


def _go_on_undecided(d: Draft, block: Warmup, evidence: str) -> bool:
    """Nobody knows whether the candidate is warm: `required` says whether a person decides."""
    s = d.status
    version = s.candidate.ref.version if s.candidate is not None else ""
    if block.required == "Never" or s.warmup_waived:
        s.event(d.now, "Warning", "NotKnownWarm", f"{version} goes on all the same: {evidence}")
        return True
    s.phase = "Paused"
    s.waiting = f"warmup is undecided, resume goes on and abort goes back: {evidence}"
    s.event(d.now, "Warning", "NotKnownWarm", f"{version} waits for a person: {evidence}")
    return False


def _view(verdict: Verdict, evidence: str, requests: int) -> GateView:
    return GateView(gate="warmup", verdict=verdict, evidence=evidence, candidate_samples=requests, stable_samples=0)


def warming(d: Draft) -> WarmServers | None:
    """What is to be warmed now; None for nothing."""
    s, block = d.status, d.spec.rollout.warmup
    if block is None or s.candidate is None or s.stable is None or s.entered or s.warmup is None:
        return None
    if s.warmup.verdict != "undecided":
        return None
    ready = d.servers(s.candidate.ref.version).ready
    beside = d.servers(s.stable.ref.version).ready
    shared = d.spec.server.holds_several
    mine, theirs = (server_versions.naming(arm.ref.version) if shared else b"" for arm in (s.candidate, s.stable))
    return WarmServers(s.candidate.ref, s.trial, ready, beside, block, mine, theirs)
