"""The decision: the best of the search and the manifest's present configuration in interleaved rounds, both servers up at once. Pure but for `decide`.

The search compares figures of different minutes, and picks the largest of many, so its gain is too large by what luck gave. The rounds are new
figures, of both sides in the same seconds. "Better" is only what answered more in every round: with five rounds two equal ones look so once in 32.
"""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from millrace_rollout_controller.tuning.configuration import Configuration
from millrace_rollout_controller.tuning.points import Point, Trial, Usage, summarize
from millrace_rollout_controller.tuning.search import Finalist, Search, closest, ranking
from millrace_rollout_controller.warm_gate import STEADY_SHARE, Window

ROUNDS = 5
MAX_FINALISTS = 3
"""Points tried in rounds: what held the bound by luck in the search breaks it there, and the next one follows."""
Verdict = Literal["better", "keep", "undecided"]
Side = tuple[Configuration, int]
"""A configuration, and calls at once."""
Play = Callable[[Sequence[Side]], Awaitable[list[list[Window]]]]
"""Measures each side once a round, in turn; gives the windows of each side."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """What the rounds said."""

    best: Finalist
    """The chosen configuration; its point is that of the rounds."""
    present: Point | None
    """The manifest's configuration in the same rounds, under the load that suits it better; None when its server does not start, or when it is
    the best itself."""
    ratios: tuple[float, ...]
    """Answers of the best for one of the present, by round."""
    noise: float
    """Spread of the present's throughput over the rounds (the best's where that is the same), as a share of its median."""

    @property
    def gain(self) -> float:
        """Median gain in throughput, as a share; 0 without a comparison."""
        return statistics.median(self.ratios) - 1.0 if self.ratios else 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the manifest."""

    verdict: Verdict
    message: str
    chosen: Finalist | None = None
    """Of better and keep; of undecided what came closest, which is not to be written."""
    rounds: Rounds | None = None


async def decide(search: Search, bound_ms: float, play: Play) -> Decision:
    """Search, then play the rounds, then say what to do."""
    await search.run()
    found = ranking(search.trials, bound_ms, MAX_FINALISTS)
    present = search.trials[0]
    if not found:
        return _undecided(search.trials, bound_ms)
    broke = ""
    for finalist in found:
        rounds = await compare(finalist, present, bound_ms, play)
        if not rounds.best.point.within(bound_ms):
            broke = f"{_said(rounds.best)} in the last rounds"
            continue
        return judge(rounds, present, bound_ms)
    message = f"what held a p99 of {bound_ms:g} ms in the search did not hold it again: {broke}"
    return Decision("undecided", message, rounds.best, rounds)


async def compare(finalist: Finalist, present: Trial, bound_ms: float, play: Play) -> Rounds:
    """Play the rounds of a finalist against the manifest's configuration, which plays under the load at which it did best and, where that is
    another one, under the finalist's too: the better of both counts, so that more load alone is no gain.
    """
    load = finalist.point.concurrency
    sides = [(finalist.configuration, load)]
    known = present.closest(bound_ms)
    if known is not None and finalist.configuration != present.configuration:
        sides += [(present.configuration, each) for each in dict.fromkeys((known.concurrency, load))]
    played = await play(sides)
    points = [_summary(side[1], windows) for side, windows in zip(sides, played, strict=True)]
    best = Finalist(finalist.configuration, points[0])
    # The manifest's better side; the finalist's own where it has none.
    other = min(range(min(1, len(sides) - 1), len(sides)), key=lambda index: _order(points[index], bound_ms))
    mine, theirs = ([window.per_s for window in played[index]] for index in (0, other))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True) if b > 0] if other else []
    middle = statistics.median(theirs)
    noise = (max(theirs) - min(theirs)) / middle if middle > 0 else 0.0
    return Rounds(best, points[other] if other else None, tuple(ratios), noise)


def _order(point: Point, bound_ms: float) -> tuple[bool, float]:
    """Less is better: within the bound by throughput, else by how little it misses."""
    within = point.within(bound_ms)
    return (not within, -point.per_s if within else point.p99_ms)


def judge(rounds: Rounds, present: Trial, bound_ms: float) -> Decision:
    """What rounds say in which the best held the bound."""
    best = rounds.best
    if best.configuration == present.configuration:
        return Decision("keep", f"the manifest is as good as anything tried: {_said(best)}", best, rounds)
    met = any(point.within(bound_ms) for point in present.points)
    if rounds.present is None or not rounds.ratios or not met:
        # Else it may have broken the bound for once, and has to be beaten in throughput.
        was = f"has a p99 of {rounds.present.p99_ms:.1f} ms" if rounds.present and rounds.ratios else "does not answer"
        return Decision("better", f"{_said(best)}; the manifest as it is {was}", best, rounds)
    words = f"{rounds.gain * 100:+.0f} % ({min(rounds.ratios) - 1:+.0%} to {max(rounds.ratios) - 1:+.0%} in {len(rounds.ratios)} rounds)"
    if min(rounds.ratios) > 1.0:
        return Decision("better", f"{_said(best)}; {words} against the manifest as it is", best, rounds)
    kept = Finalist(present.configuration, rounds.present)
    message = f"the manifest stays: {best.configuration.words} was not faster in every round, {words}"
    return Decision("keep", message, kept, rounds)


def _undecided(trials: list[Trial], bound_ms: float) -> Decision:
    near = closest(trials, bound_ms)
    if near is None:
        return Decision("undecided", f"no server answered: {trials[0].problem or 'no time was left'}")
    point = near.point
    if point.failures:
        why = f"{point.failures} requests failed ({point.problem})"
    elif not point.within(bound_ms):
        why = f"nothing meets a p99 of {bound_ms:g} ms"
    else:
        why = f"nothing within {bound_ms:g} ms was steady in {point.windows} windows; is the machine busy? Longer windows help (--window)"
    return Decision("undecided", f"{why}; closest: {_said(near)}", near)


def _said(one: Finalist) -> str:
    point = one.point
    return (
        f"{{{one.configuration.words}}} with {point.concurrency} calls at once answers {point.per_s:.0f} a second, p99 {point.p99_ms:.1f} ms"
    )  # fmt: skip


def _summary(concurrency: int, windows: Sequence[Window]) -> Point:
    """All rounds together."""
    whole = Window(
        tuple(ms for window in windows for ms in window.latencies_ms),
        sum(window.seconds for window in windows),
        sum(window.failures for window in windows),
        next((window.problem for window in windows if window.problem), ""),
    )
    return summarize(concurrency, [whole], share=STEADY_SHARE, usage=Usage())
