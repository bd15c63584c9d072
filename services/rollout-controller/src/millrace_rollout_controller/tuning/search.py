"""The search: hill climbing over configurations, each under ever more load until it breaks the bound.

The way of Model Analyzer's quick search: from the manifest's present configuration to the best neighbour, while there is one. A direction that
pays is followed on before another is tried; nothing is tried twice. Bounded by a number of configurations and by a time.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from millrace_kit.clock import Clock

from millrace_rollout_controller.tuning.configuration import Configuration, Space
from millrace_rollout_controller.tuning.points import Point, Trial

GAIN = 0.05
"""A configuration is better when it answers so much more; less is noise."""
GROWTH = 0.03
"""More load goes on while throughput grows by so much; then it only makes queues longer."""
FIRST_PATIENCE = 2
"""Doublings without growth that end the load on the first configuration, where all others begin; one of them may be noise. Else one ends it."""


class ServerFailedError(Exception):
    """A configuration's server did not start; the message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a search."""

    max_concurrency: int
    max_trials: int
    until: float
    """Monotonic time after which nothing new is begun."""


Measure = Callable[[Configuration, int], Awaitable[Point]]
"""Measures a configuration under so many calls at once; raises ServerFailedError when there is no server."""


class Search:
    """One search.

    Args:
        space: where it looks.
        limits: what bounds it.
        measure: the real servers, or a model of them.
        clock: for the time limit.
        said: gets every finished trial, for progress.
    """

    def __init__(
        self, space: Space, limits: Limits, measure: Measure, clock: Clock, said: Callable[[Trial], None]
    ) -> None:
        self._space = space
        self._limits = limits
        self._measure = measure
        self._clock = clock
        self._said = said
        self.trials: list[Trial] = []
        """In the order they were tried; the first is the manifest's."""
        self.cut_short = ""
        """What ended it before it was done."""

    async def run(self) -> None:
        """Fill `trials`."""
        best = await self._try(Configuration.of(self._space.server), 1)
        climbing = True
        while climbing:
            climbing = False
            for line in self._space.lines(self._concurrency(best)):
                for candidate in line(best.configuration):
                    if not self._space.holds(candidate) or self._tried(candidate):
                        break
                    if self._is_over():
                        return
                    trial = await self._try(candidate, self._concurrency(best))
                    if not self._better(trial, best):
                        break
                    best, climbing = trial, True

    def _tried(self, candidate: Configuration) -> bool:
        return any(trial.configuration == candidate for trial in self.trials)

    def _is_over(self) -> bool:
        if len(self.trials) >= self._limits.max_trials:
            self.cut_short = f"it had tried {self._limits.max_trials} configurations, which is the limit (--max-trials)"
        elif self._clock.monotonic() >= self._limits.until:
            self.cut_short = "its time was over (--budget)"
        return bool(self.cut_short)

    async def _try(self, configuration: Configuration, start: int) -> Trial:
        """Load up from `start`, or down where that is too much already."""
        trial = Trial(configuration)
        self.trials.append(trial)
        try:
            await self._sweep(trial, start)
        except ServerFailedError as error:
            trial.problem = str(error)
        self._said(trial)
        return trial

    async def _sweep(self, trial: Trial, start: int) -> None:
        bound_ms = self._space.p99_ms
        first = await self._point(trial, start)
        concurrency = start
        while not first.within(bound_ms) and concurrency > 1 and self._has_time():
            concurrency //= 2
            if (await self._point(trial, concurrency)).within(bound_ms):
                return
        best_per_s, concurrency, flat = first.per_s, start, 0
        patience = 1 if len(self.trials) > 1 else FIRST_PATIENCE
        while trial.points[-1].within(bound_ms) and concurrency < self._limits.max_concurrency and self._has_time():
            concurrency = min(concurrency * 2, self._limits.max_concurrency)
            point = await self._point(trial, concurrency)
            flat = flat + 1 if point.per_s < best_per_s * (1.0 + GROWTH) else 0
            if flat >= patience:
                return
            best_per_s = max(best_per_s, point.per_s)

    async def _point(self, trial: Trial, concurrency: int) -> Point:
        point = await self._measure(trial.configuration, concurrency)
        trial.points.append(point)
        return point

    def _has_time(self) -> bool:
        return self._clock.monotonic() < self._limits.until

    def _concurrency(self, best: Trial) -> int:
        point = best.closest(self._space.p99_ms)
        return point.concurrency if point is not None else 1

    def _better(self, trial: Trial, best: Trial) -> bool:
        """More answers, or as many by a smaller configuration: from there some other step may pay that did not before."""
        mine, theirs = trial.rank(self._space.p99_ms), best.rank(self._space.p99_ms)
        if mine[0] != theirs[0]:
            return mine[0] > theirs[0]
        is_smaller = trial.configuration.size < best.configuration.size
        return mine[1] > theirs[1] * (1.0 + GAIN) or (is_smaller and mine[1] * (1.0 + GAIN) >= theirs[1] > 0)


@dataclass(frozen=True, slots=True)
class Finalist:
    """A configuration under the load at which it did best."""

    configuration: Configuration
    point: Point


def ranking(trials: list[Trial], bound_ms: float, limit: int) -> list[Finalist]:
    """What could be chosen, best first: the most answers within the bound, and of those that are as good the smallest; after it the same
    configuration under less load, then the others.
    """
    all_points = [Finalist(t.configuration, point) for t in trials for point in t.usable(bound_ms)]
    if not all_points:
        return []
    top = max(one.point.per_s for one in all_points)
    as_good = [one for one in all_points if one.point.per_s * (1.0 + GAIN) >= top]
    present = trials[0].configuration
    best = min(
        as_good, key=lambda one: (one.configuration != present, one.configuration.size, one.point.concurrency)
    )  # fmt: skip
    rest = [one for one in all_points if one is not best and one.point.per_s <= best.point.per_s]
    rest.sort(key=lambda one: (one.configuration != best.configuration, -one.point.per_s))
    return [best, *rest][:limit]


def closest(trials: list[Trial], bound_ms: float) -> Finalist | None:
    """The configuration that missed by least, whatever it was that it missed; None when no server answered."""
    ranked = sorted(trials, key=lambda trial: trial.rank(bound_ms), reverse=True)
    point = ranked[0].closest(bound_ms) if ranked else None
    return Finalist(ranked[0].configuration, point) if point is not None else None
