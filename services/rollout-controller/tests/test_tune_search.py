"""`millrace tune`: the search over a modelled server, the decision by rounds, and what holds it back. Nothing runs."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from millrace_kit.clock import FakeClock
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.tuning.configuration import Configuration, Space, milliseconds
from millrace_rollout_controller.tuning.decision import ROUNDS, Decision, Rounds, Side, compare, decide, judge
from millrace_rollout_controller.tuning.points import Point, Trial, Usage, enough, summarize
from millrace_rollout_controller.tuning.report import notes
from millrace_rollout_controller.tuning.search import Limits, Search, ServerFailedError, closest, ranking
from millrace_rollout_controller.warm_gate import Window

WINDOW_S = 1.0


class Modelled:
    """A server by Little's law: a batch costs a fixed time and a time by row, on so many cores; `noise` moves every window."""

    def __init__(
        self, *, cores: int = 4, fixed_ms: float = 4.0, row_ms: float = 0.25, noise: float = 0.0, seed: int = 7
    ) -> None:
        self.cores, self.fixed_ms, self.row_ms, self.noise = cores, fixed_ms, row_ms, noise
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.measured: list[tuple[Configuration, int]] = []
        self.broken: set[int] = set()
        """Numbers of instances with which it does not start."""
        self.slower = 1.0
        """Of everything, as on a machine that somebody else uses too."""

    def window(self, one: Configuration, concurrency: int) -> Window:
        share = max(1, concurrency // one.instances)
        size = min(one.max_batch_size, share)
        full = size in one.preferred_sizes or size == one.max_batch_size
        crowded = max(1.0, one.instances / self.cores)
        cycle_ms = (self.fixed_ms + self.row_ms * size) * crowded + (0.0 if full else one.queue_delay_us / 1000.0)
        per_s = min(concurrency, size * one.instances) / cycle_ms * 1000.0
        per_s *= (1.0 + self.noise * self.random.uniform(-1.0, 1.0)) / self.slower
        mean_ms = concurrency / per_s * 1000.0
        answers = max(100, int(per_s * WINDOW_S))
        slow = max(2, answers // 50)
        return Window((mean_ms,) * (answers - slow) + (mean_ms * 1.2,) * slow, answers / per_s)

    async def measure(self, one: Configuration, concurrency: int) -> Point:
        if one.instances in self.broken:
            raise ServerFailedError("no memory")
        self.measured.append((one, concurrency))
        windows: list[Window] = []
        while not windows or not enough(windows, 1e9, 0.10, 10):
            windows.append(self.window(one, concurrency))
            self.clock.advance(WINDOW_S)
        return summarize(concurrency, windows, share=0.10, usage=Usage())

    async def play(self, sides: Sequence[Side]) -> list[list[Window]]:
        return [[self.window(*side) for _ in range(ROUNDS)] for side in sides]


def search(
    model: Modelled, server: Server | None = None, *, p99_ms: float = 50.0, trials: int = 40, budget_s: float = 1e9
) -> Search:
    block = server or Server()
    space = Space(block, p99_ms, max_instances=8, min_batch_size=block.max_batch_size)
    return Search(space, Limits(64, trials, budget_s), model.measure, model.clock, lambda trial: None)


async def run(model: Modelled, server: Server | None = None, p99_ms: float = 50.0, trials: int = 40) -> Decision:
    return await decide(search(model, server, p99_ms=p99_ms, trials=trials), p99_ms, model.play)


def exhaustive(model: Modelled, server: Server, p99_ms: float) -> float:
    """The most answers within the bound of a full grid."""
    found = 0.0
    for instances in (1, 2, 4, 8):
        for size in (server.max_batch_size * 2**power for power in range(5)):
            for delay in (0, 200, 1000, 5000, 20_000):
                for preferred in ((), (4,), (8,), (16,)):
                    for concurrency in (1, 2, 4, 8, 16, 32, 64):
                        window = model.window(Configuration(instances, size, delay, preferred), concurrency)
                        if max(window.latencies_ms) <= p99_ms:
                            found = max(found, window.per_s)
    return found


@pytest.mark.parametrize("server", [{"maxBatchSize": 8}, {"maxBatchSize": 64}, {"instances": 8, "maxBatchSize": 4}])
@pytest.mark.parametrize(("fixed_ms", "row_ms"), [(4.0, 0.25), (0.5, 2.0), (10.0, 0.01)])
async def test_it_comes_close_to_the_best_of_the_whole_grid(
    server: dict[str, int], fixed_ms: float, row_ms: float
) -> None:
    model, block = Modelled(fixed_ms=fixed_ms, row_ms=row_ms), Server.model_validate(server)
    decision = await run(model, block)
    assert decision.chosen is not None
    best = exhaustive(model, block, 50.0)
    assert decision.chosen.point.per_s >= 0.9 * best
    assert len({one for one, _ in model.measured}) <= 14, "a full grid has 400"


async def test_a_bad_wait_is_found_first_and_beaten() -> None:
    bad = Server.model_validate({"queueDelayUs": 20_000})
    model = Modelled()
    decision = await run(model, bad)
    assert decision.verdict == "better"
    assert decision.chosen is not None
    assert decision.chosen.configuration.queue_delay_us < 20_000
    assert decision.rounds is not None
    assert min(decision.rounds.ratios) > 1.0


async def test_load_grows_until_the_bound_breaks_and_no_further() -> None:
    model = Modelled(cores=1, fixed_ms=1.0, row_ms=1.0)
    made = search(model, Server.model_validate({"maxBatchSize": 64}), p99_ms=12.0, trials=1)
    await made.run()
    assert [point.concurrency for point in made.trials[0].points] == [1, 2, 4, 8, 16]
    assert [point.within(12.0) for point in made.trials[0].points] == [True, True, True, True, False]
    (best, *_) = made.trials[0].usable(12.0)
    assert best.concurrency == 8


async def test_one_slow_moment_does_not_end_the_load_on_the_manifest() -> None:
    model = Modelled(cores=1, fixed_ms=10.0, row_ms=0.01)
    made = search(model, trials=1)
    calm = model.window

    def window(one: Configuration, concurrency: int) -> Window:
        model.slower = 3.0 if concurrency == 2 else 1.0
        return calm(one, concurrency)

    model.window = window  # type: ignore[method-assign]
    await made.run()
    (best, *_) = made.trials[0].usable(50.0)
    assert best.concurrency == 64


async def test_failures_under_much_load_are_answered_by_less() -> None:
    """A short queue refuses what is too much."""
    model = Modelled(cores=1, fixed_ms=4.0, row_ms=0.01)
    made = search(model, trials=3)
    calm = model.window

    def window(one: Configuration, concurrency: int) -> Window:
        found = calm(one, concurrency)
        return replace(found, failures=5) if one.instances > 1 and concurrency > 4 else found

    model.window = window  # type: ignore[method-assign]
    await made.run()
    assert made.trials[0].usable(50.0)[0].concurrency == 64
    assert [point.concurrency for point in made.trials[1].points] == [64, 32, 16, 8, 4]


async def test_what_is_as_good_is_chosen_by_its_size_and_the_manifest_before_all() -> None:
    point = Point(8, 1000.0, 5.0, 9.0, steady=True, windows=3)
    large, small = Configuration(4, 64, 0), Configuration(2, 64, 0)
    present = Trial(Configuration(8, 64, 0), [replace(point, per_s=500.0)])
    trials = [present, Trial(large, [replace(point, per_s=1030.0)]), Trial(small, [point])]
    assert ranking(trials, 10.0, 3)[0].configuration == small
    present.points[0] = replace(point, per_s=1000.0)
    assert ranking(trials, 10.0, 3)[0].configuration == present.configuration
    model = Modelled(cores=1, fixed_ms=0.01, row_ms=1.0)
    decision = await run(model)
    assert decision.verdict == "keep"
    assert "as good as anything tried" in decision.message


async def test_nothing_that_never_was_steady_is_chosen() -> None:
    decision = await run(Modelled(noise=0.5), p99_ms=500.0, trials=6)
    assert decision.verdict == "undecided"
    assert "was steady in 10 windows" in decision.message
    assert decision.chosen is not None, "what came closest is named"
    assert "instances:" in decision.message


async def test_a_bound_that_nothing_meets_names_what_came_closest() -> None:
    model = Modelled(fixed_ms=80.0)
    decision = await run(model, Server.model_validate({"queueDelayUs": 1000}), p99_ms=50.0)
    assert decision.verdict == "undecided"
    assert (
        "nothing meets a p99 of 50 ms; closest: {instances: 1, maxBatchSize: 64, queueDelayUs: 0}" in decision.message
    )
    assert "with 1 calls at once" in decision.message


async def test_what_held_the_bound_by_luck_gives_way_to_less_load() -> None:
    model = Modelled(cores=1, fixed_ms=1.0, row_ms=1.0)
    made = search(model, p99_ms=12.0)
    fast = model.play

    async def play(sides: Sequence[Side]) -> list[list[Window]]:
        model.slower = 1.5 if sides[0][1] >= 8 else 1.0
        return await fast(sides)

    decision = await decide(made, 12.0, play)
    assert decision.verdict == "keep"
    assert decision.chosen is not None
    assert decision.chosen.point.concurrency == 4


async def test_more_load_alone_is_no_gain() -> None:
    """In the search the manifest was steady under little load only; the rounds give it the finalist's load as well."""
    model = Modelled(cores=1, fixed_ms=4.0, row_ms=0.01)
    made = search(model, trials=2)
    await made.run()
    present, other = made.trials
    present.points[:] = present.points[:2]
    (best, *_) = ranking([other], 50.0, 1)
    assert best.point.per_s > 5 * present.points[-1].per_s
    sides: list[Side] = []

    async def play(wanted: Sequence[Side]) -> list[list[Window]]:
        sides.extend(wanted)
        return await model.play(wanted)

    rounds = await compare(best, present, 50.0, play)
    assert sides[1:] == [(present.configuration, 2), (present.configuration, best.point.concurrency)]
    assert rounds.present is not None
    assert rounds.present.concurrency == best.point.concurrency
    assert rounds.gain < 0.05
    assert judge(rounds, present, 50.0).verdict == "keep"


async def test_a_manifest_that_broke_the_bound_for_once_still_has_to_be_beaten() -> None:
    model = Modelled(cores=1, fixed_ms=1.0, row_ms=1.0)
    made = search(model, p99_ms=50.0, trials=2)
    await made.run()
    present, other = made.trials
    (best, *_) = ranking([other], 50.0, 1)
    point = replace(best.point, p99_ms=60.0)
    slower = Rounds(best, point, (0.9,) * ROUNDS, 0.0)
    assert judge(slower, present, 50.0).verdict == "keep"
    assert judge(replace(slower, ratios=(1.1,) * ROUNDS), present, 50.0).verdict == "better"
    never = Trial(present.configuration, [point])
    decision = judge(slower, never, 50.0)
    assert decision.verdict == "better"
    assert "the manifest as it is has a p99 of 60.0 ms" in decision.message


async def test_a_gain_that_is_not_there_in_every_round_is_none() -> None:
    model = Modelled()

    async def play(sides: Sequence[Side]) -> list[list[Window]]:
        played = await model.play(sides)
        # In one of the rounds the manifest's configuration was the faster one.
        played[0][2] = replace(played[0][2], seconds=played[0][2].seconds * 20)
        return played

    bad = Server.model_validate({"queueDelayUs": 20_000})
    decision = await decide(search(model, bad), 50.0, play)
    assert decision.verdict == "keep"
    assert "was not faster in every round" in decision.message
    assert decision.chosen is not None
    assert decision.chosen.configuration == Configuration.of(bad)


async def test_equal_configurations_are_rarely_called_better() -> None:
    """One in 32 is the promise of five rounds, whatever luck made of the figures of the search."""
    model = Modelled(cores=1, fixed_ms=0.0, row_ms=1.0)
    made = search(model, trials=2)
    await made.run()
    present, other = made.trials
    present.points[:] = [replace(present.points[0], per_s=500.0)]
    model.noise, called = 0.1, 0
    assert ranking(made.trials, 50.0, 1)[0].configuration == other.configuration
    for seed in range(400):
        model.random.seed(seed)
        rounds = await compare(ranking(made.trials, 50.0, 1)[0], present, 50.0, model.play)
        called += judge(rounds, present, 50.0).verdict == "better"
    assert 4 <= called <= 20


async def test_configurations_without_a_server_are_passed_over() -> None:
    model = Modelled()
    model.broken = {2}
    made = search(model)
    decision = await decide(made, 50.0, model.play)
    assert "no memory" in {trial.problem for trial in made.trials}
    assert decision.verdict in {"keep", "better"}
    model.broken = {1, 2, 4, 8}
    assert (await run(model)).message == "no server answered: no memory"


async def test_limits_end_it() -> None:
    made = search(Modelled(), trials=2)
    await made.run()
    assert len(made.trials) == 2
    assert "--max-trials" in made.cut_short
    model = Modelled()
    made = search(model, budget_s=20.0)
    await made.run()
    assert "--budget" in made.cut_short
    # Nothing is begun after the end: at most the ten windows of the point under way.
    assert model.clock.monotonic() <= 30.0


async def test_a_smaller_batch_than_callers_send_is_never_tried() -> None:
    model = Modelled(row_ms=5.0)
    await run(model, Server.model_validate({"maxBatchSize": 16}))
    assert min(one.max_batch_size for one, _ in model.measured) == 16


def test_rules_of_the_manifest_hold_for_what_is_tried() -> None:
    block = Server.model_validate_json('{"maxBatchSize": 16, "modelWarmup": {"batchSizes": [16]}}')
    space = Space(block, 10.0, max_instances=4)
    assert space.holds(Configuration(4, 16, 5000))
    assert not space.holds(Configuration(4, 8, 0)), "the warm-up's batches are larger"
    assert not space.holds(Configuration(8, 16, 0)), "more instances than allowed"
    assert not space.holds(Configuration(1, 16, 10_000)), "the wait alone breaks the bound"
    assert not space.holds(Configuration(1, 16, 0, (32,)))


def test_steady_needs_three_windows_and_a_failure_ends_a_point() -> None:
    good, off = Window((10.0,) * 100, 1.0), Window((10.0,) * 100, 1.2)
    assert not enough([good, good], 50.0, 0.10, 10)
    assert enough([good, good, good], 50.0, 0.10, 10)
    assert not enough([good, off, good], 50.0, 0.10, 10)
    assert enough([good, off, good], 50.0, 0.25, 10)
    assert enough([Window((101.0,), 1.0)], 50.0, 0.10, 10), "twice the bound says enough"
    failed = summarize(4, [replace(good, failures=1, problem="UNAVAILABLE gone")], share=0.1, usage=Usage())
    assert not failed.within(1e9)
    assert closest([Trial(Configuration(1, 64, 0), [failed])], 50.0) is not None


def test_the_reader_is_told_what_the_figures_cannot_say() -> None:
    point = Point(64, 100.0, 1.0, 2.0, steady=True, windows=3)
    trial = Trial(Configuration(1, 64, 0), [point])
    (best,) = ranking([trial], 10.0, 3)
    (said,) = notes([trial], Decision("keep", "", best), 10.0, 64)
    assert "--max-concurrency" in said
    larger = Trial(Configuration(1, 128, 0))
    assert "more than 64 rows are refused" in notes([larger, trial], Decision("better", "", best), 10.0, 128)[0]


@pytest.mark.parametrize(("text", "expected"), [("20ms", 20.0), ("1.5s", 1500.0), ("800us", 0.8)])
def test_short_times(text: str, expected: float) -> None:
    assert milliseconds(text, "--p99") == expected


@pytest.mark.parametrize("text", ["", "20", "0ms", "-1ms", "1h", "9999s", "nan ms"])
def test_what_is_no_short_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        milliseconds(text, "--p99")
    assert refused.value.field == "--p99"
