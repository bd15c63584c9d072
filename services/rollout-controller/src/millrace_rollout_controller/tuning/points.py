"""What was measured: one configuration under one load, and all loads of one configuration. Pure.

Steady is perf_analyzer's rule, as for the warm gate: three windows in a row within a share of each other in mean latency and throughput.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from millrace_rollout_controller.tuning.configuration import Configuration
from millrace_rollout_controller.warm_gate import STEADY_WINDOWS, Window, p99_ms, steady

OVER = 2.0
"""Windows whose median is this many times the bound say enough after the first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the servers' processes took."""

    cpu: float = 0.0
    """Cores in use, mean."""
    generator_cpu: float = 0.0
    """Cores in use by the one who sent the load: one process of one thread, so near 1 it is the limit."""
    memory_mib: float = 0.0
    """Resident memory of the server and its model processes at the end."""


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration under so many calls at once."""

    concurrency: int
    per_s: float
    """Answers a second over the last three windows."""
    p50_ms: float
    p99_ms: float
    steady: bool
    windows: int
    failures: int = 0
    problem: str = ""
    usage: Usage = Usage()

    def within(self, bound_ms: float) -> bool:
        """Whether it answered everything, and 99 of 100 in time."""
        return not self.failures and self.per_s > 0 and self.p99_ms <= bound_ms


@dataclass(slots=True)
class Trial:
    """One configuration under ever more load."""

    configuration: Configuration
    points: list[Point] = field(default_factory=list)
    problem: str = ""
    """Why it has no points: its server did not start."""

    def usable(self, bound_ms: float) -> list[Point]:
        """Steady and within the bound, the most answers first."""
        good = [point for point in self.points if point.steady and point.within(bound_ms)]
        return sorted(good, key=lambda point: (-point.per_s, point.concurrency))

    def closest(self, bound_ms: float) -> Point | None:
        """Its best point, else the one that misses by least; None when it has none."""
        if usable := self.usable(bound_ms):
            return usable[0]
        answered = [point for point in self.points if point.per_s > 0]
        return min(answered, key=lambda p: (p.failures > 0, max(p.p99_ms, bound_ms), -p.per_s), default=None)

    def rank(self, bound_ms: float) -> tuple[int, float]:
        """Higher is better: within the bound by answers a second, else by how little it misses."""
        point = self.closest(bound_ms)
        if point is None:
            return (-1, 0.0)
        if point.steady and point.within(bound_ms):
            return (1, point.per_s)
        if point.failures:
            return (0, 0.0)
        return (0, 1.0 / max(point.p99_ms, bound_ms))


def summarize(concurrency: int, windows: Sequence[Window], *, share: float, usage: Usage) -> Point:
    """The point that these windows are."""
    last = windows[-STEADY_WINDOWS:]
    values = sorted(ms for window in last for ms in window.latencies_ms)
    seconds = sum(window.seconds for window in last)
    failed = [window for window in windows if window.failures]
    return Point(
        concurrency,
        len(values) / seconds if seconds > 0 else 0.0,
        values[len(values) // 2] if values else 0.0,
        p99_ms(windows),
        steady=steady(windows, share),
        windows=len(windows),
        failures=sum(window.failures for window in windows),
        problem=failed[-1].problem if failed else "",
        usage=usage,
    )


def enough(windows: Sequence[Window], bound_ms: float, share: float, limit: int) -> bool:
    """Whether no further window of this load can tell more: steady, far too slow, failing, or the last allowed."""
    last = windows[-1]
    hopeless = last.failures > 0 or last.median_ms > OVER * bound_ms
    return hopeless or steady(windows, share) or len(windows) >= limit
