"""How many requests a version takes at once, found from what its answers take: the gradient rule of Envoy's adaptive concurrency.

Envoy's own filter has one limit for all versions behind a listener, no priorities, and forgets what it found whenever routes change. So the
rule stands here, fed by the access log, and what it finds goes to Envoy as the limits of the version's clusters, for calls of each
priority (docs/decisions/0050). Nothing waits for it: while this process is away the last limits stay.
"""

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from millrace_kit.clock import Clock

from millrace_inference_gateway.routes import Arm
from millrace_inference_gateway.settings import AdaptiveSettings, EnvoySettings

# A limit never falls below this share of itself in one step.
LEAST_GRADIENT = 0.5
# A limit grows only while so much of it is used: what nobody asks for says nothing.
USED_TO_GROW = 0.5
# While answers are late, a limit starts from so many times of what is under way.
ROOM = 2.0
# Of normal calls under way, before low ones may use what is left.
MARGIN = 1.1
# Steps with fewer requests in which latency is measured anew: in the first what waits goes, the second counts.
MEASURING_STEPS = 2
DRAINED = 0.75
# After so many steps without enough answers nobody is in the way of low ones. Were they all that is left, they would never be let in again.
RESTED_STEPS = 4
# Latencies kept for one step of one version.
MAX_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests of one version at once."""

    normal: int
    low: int
    """Of low priority; 0 while normal ones use all there is."""


@dataclass(slots=True)
class Window:
    """What was heard of a version since the last step."""

    started: float
    latencies_ms: list[float] = field(default_factory=list)
    normal_ms: float = 0.0
    low_ms: float = 0.0


@dataclass(slots=True)
class VersionLimit:
    """The rule for one version: a pure function of what it is told and of the time."""

    settings: AdaptiveSettings
    most: int
    """The limit where nothing was learned yet, and the largest."""
    low_share: float
    spread: float = 0.0
    """-1 to 1: how early or late this gateway measures anew, as a share of the jitter."""
    limit: float = 0.0
    baseline_ms: float = 0.0
    _measure_at: float = 0.0
    _drained: float = 0.0
    _measuring: int = 0
    """Steps left until what was measured counts; more than 0 while this goes on."""

    def step(self, window: Window, now: float) -> Limits:
        """The limits after a window with answers."""
        elapsed_s = max(now - window.started, 1e-3)
        normal, low = window.normal_ms / 1e3 / elapsed_s, window.low_ms / 1e3 / elapsed_s
        latency_ms = _percentile(window.latencies_ms, self.settings.percentile)
        self._learn(latency_ms, now)
        if not self._measuring:
            self.limit = self._next(latency_ms, normal + low)
        elif self._measuring == MEASURING_STEPS:
            # What its servers work on while nothing waits, and less: else those that wait would be measured too.
            self._drained = (normal + low) * self.baseline_ms / max(latency_ms, self.baseline_ms) * DRAINED
        shown = self.limit
        if self._measuring:
            shown = min(shown, max(self._drained, self.settings.min_requests))
        spare = shown - normal * MARGIN
        return Limits(round(shown), max(0, round(min(shown * self.low_share, spare))))

    def rested(self) -> Limits:
        """The limits when too few answers came to learn from: no crowd keeps low ones out now."""
        return Limits(round(self.limit), max(1, round(self.limit * self.low_share)))

    def _learn(self, latency_ms: float, now: float) -> None:
        if self.settings.baseline_ms:
            self.baseline_ms = self.settings.baseline_ms
            return
        if self._measuring > 1:
            self._measuring -= 1
            return
        if self._measuring or not self.baseline_ms:
            self._measuring = 0
            self.baseline_ms = latency_ms
            late = 1 + self.settings.jitter_percent / 100 * self.spread
            self._measure_at = now + self.settings.measure_s * late
            return
        self.baseline_ms = min(self.baseline_ms, latency_ms)
        if now >= self._measure_at:
            self._measuring = MEASURING_STEPS

    def _next(self, latency_ms: float, under_way: float) -> float:
        limit = self.limit or float(self.most)
        wanted_ms = self.baseline_ms * (1 + self.settings.tolerance_percent / 100)
        gradient = wanted_ms / latency_ms if latency_ms > 0 else 1.0
        if gradient < 1:
            limit = min(limit, max(under_way * ROOM, self.settings.min_requests))
        elif under_way < limit * USED_TO_GROW:
            return limit
        scaled = limit * max(LEAST_GRADIENT, min(1.0, gradient))
        return min(float(self.most), max(float(self.settings.min_requests), scaled + math.sqrt(scaled)))


class ConcurrencyLimits:
    """The rule for every version that is called, and Envoy told of what it finds."""

    def __init__(
        self,
        settings: EnvoySettings,
        clock: Clock,
        arms: Callable[[], Mapping[str, Arm]],
        tell: Callable[[Mapping[str, int]], None],
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`arms` are those in force by cluster; `tell` writes Envoy's runtime values, and may block."""
        self._settings = settings
        self._clock = clock
        self._arms = arms
        self._tell = tell
        self._uniform = uniform
        self._windows: dict[tuple[str, str], Window] = {}
        self._rules: dict[tuple[str, str], VersionLimit] = {}
        self._limits: dict[tuple[str, str], Limits] = {}
        self._stepped: dict[tuple[str, str], float] = {}

    @property
    def limits(self) -> Mapping[tuple[str, str], Limits]:
        """What is in force, by model and version."""
        return self._limits

    @property
    def baselines_ms(self) -> Mapping[tuple[str, str], float]:
        """Latency without waiting, by model and version."""
        return {version: rule.baseline_ms for version, rule in self._rules.items()}

    def record(self, model: str, version: str, latency_ms: float, *, low: bool) -> None:
        """Take one finished unary call that a model server had."""
        adaptive = self._settings.adaptive
        if adaptive is None or (adaptive.models and model not in adaptive.models):
            return
        window = self._windows.get((model, version))
        if window is None:
            window = self._windows[model, version] = Window(self._clock.monotonic())
        if len(window.latencies_ms) < MAX_SAMPLES:
            window.latencies_ms.append(latency_ms)
        if low:
            window.low_ms += latency_ms
        else:
            window.normal_ms += latency_ms

    async def run(self, stop: asyncio.Event) -> None:
        """Step until `stop`."""
        adaptive = self._settings.adaptive
        if adaptive is None:
            await asyncio.to_thread(self._tell, {})
            return
        told: Mapping[str, int] | None = None
        while not stop.is_set():
            values = self.step()
            if values != told:
                await asyncio.to_thread(self._tell, values)
                told = values
            try:
                await asyncio.wait_for(stop.wait(), adaptive.step_s)
            except TimeoutError:
                continue

    def step(self) -> Mapping[str, int]:
        """Move the limits of versions that were heard of enough; returns Envoy's runtime values of all."""
        adaptive = self._settings.adaptive
        assert adaptive is not None
        arms = {(arm.model, arm.version): arm for arm in self._arms().values()}
        now = self._clock.monotonic()
        for version, window in list(self._windows.items()):
            if version not in arms:
                del self._windows[version]
            elif len(window.latencies_ms) >= adaptive.min_samples:
                rule = self._rules.get(version)
                if rule is None:
                    share, most = self._settings.low_priority_percent / 100, self._settings.max_requests
                    rule = self._rules[version] = VersionLimit(adaptive, most, share, self._uniform(-1, 1))
                self._limits[version] = rule.step(window, now)
                self._stepped[version] = now
                del self._windows[version]
        for version, rule in self._rules.items():
            if now > self._stepped[version] + RESTED_STEPS * adaptive.step_s:
                self._limits[version] = rule.rested()
        for gone in self._rules.keys() - arms.keys():
            del self._rules[gone], self._limits[gone], self._stepped[gone]
        return _runtime_values([(arms[version], limits) for version, limits in self._limits.items()])


def _runtime_values(limits: Sequence[tuple[Arm, Limits]]) -> Mapping[str, int]:
    """What Envoy reads in the place of its clusters' limits; its high priority is the low one here."""
    found = {}
    for arm, each in limits:
        for cluster in (arm.cluster, arm.http_cluster):
            found[f"circuit_breakers.{cluster}.default.max_requests"] = each.normal
            found[f"circuit_breakers.{cluster}.high.max_requests"] = each.low
    return found


def _percentile(values: list[float], percent: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]
