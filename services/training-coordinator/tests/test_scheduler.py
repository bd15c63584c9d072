"""The state machine alone: no processes, no store, no clock."""

import random
from datetime import UTC, datetime, timedelta

from millrace_training_coordinator.scheduler import (
    MAX_INTERRUPTIONS,
    Backoff,
    CancelRequested,
    Claim,
    Ended,
    Outcome,
    PlannedStage,
    RunState,
    RunStatus,
    StageState,
    StageStatus,
    Started,
    admit,
    apply,
    decide,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BACKOFF = Backoff(1.0, 3.0)
DIAMOND = (
    PlannedStage("top"),
    PlannedStage("left", ("top",), retries=2),
    PlannedStage("right", ("top",)),
    PlannedStage("end", ("left", "right")),
)


class Run:
    def __init__(self, plan=DIAMOND) -> None:
        self.plan = plan
        self.status = RunStatus({stage.name: StageStatus() for stage in plan})
        self.now = NOW

    def on(self, event) -> "Run":
        self.status = apply(self.plan, self.status, event, self.now, BACKOFF)
        return self

    def start(self, *names) -> "Run":
        for name in names:
            self.on(Started(name))
        return self

    def end(self, name, outcome=Outcome.SUCCEEDED, reason="") -> "Run":
        return self.on(Ended(name, self.status.stages[name].attempts, outcome, reason))

    @property
    def ready(self):
        return decide(self.plan, self.status, self.now).start

    def state(self, name):
        return self.status.stages[name].state


def test_the_order_of_a_diamond() -> None:
    run = Run()
    assert run.ready == ("top",)
    run.start("top")
    assert (run.ready, run.status.state) == ((), RunState.RUNNING)
    assert run.end("top").ready == ("left", "right")
    run.start("left", "right").end("left")
    assert run.ready == ()
    assert run.end("right").ready == ("end",)
    run.start("end").end("end")
    assert (run.status.state, run.status.finished_at) == (RunState.SUCCEEDED, NOW)


def test_retries_wait_longer_each_time_and_end() -> None:
    run = Run().start("top").end("top").start("left")
    for wait in (1.0, 2.0):
        run.end("left", Outcome.RETRYABLE, "exit code 1")
        assert run.state("left") is StageState.RETRYING
        assert decide(run.plan, run.status, run.now).wake_at == run.now + timedelta(seconds=wait)
        assert "left" not in run.ready
        run.now += timedelta(seconds=wait)
        assert "left" in run.ready
        run.start("left")
    run.end("left", Outcome.RETRYABLE, "exit code 2")
    assert run.state("left") is StageState.FAILED
    assert run.status.stages["left"].failure == "exit code 2"
    assert (run.state("right"), run.state("end"), run.status.state) == (
        StageState.SKIPPED, StageState.SKIPPED, RunState.FAILED,
    )  # fmt: skip
    assert BACKOFF.wait_s(3) == 3.0


def test_running_branches_end_by_themselves_after_a_failure() -> None:
    run = Run().start("top").end("top").start("left", "right").end("right", Outcome.PERMANENT, "exit code 78")
    assert run.status.state is RunState.RUNNING
    assert decide(run.plan, run.status, run.now).stop == ()
    run.end("left")
    assert (run.state("left"), run.state("end"), run.status.state) == (
        StageState.SUCCEEDED, StageState.SKIPPED, RunState.FAILED,
    )  # fmt: skip


def test_interruptions_cost_no_retry_but_end_some_time() -> None:
    run = Run((PlannedStage("only"),))
    for _ in range(MAX_INTERRUPTIONS):
        run.start("only").end("only", Outcome.INTERRUPTED, "lost")
        assert run.ready == ("only",)
    run.start("only").end("only", Outcome.INTERRUPTED, "lost")
    assert run.status.state is RunState.FAILED
    assert run.status.stages["only"].failure == "interrupted 11 times, last: lost"


def test_cancel() -> None:
    run = Run().start("top").end("top").start("left").on(CancelRequested())
    assert decide(run.plan, run.status, run.now).stop == ("left",)
    assert (run.state("right"), run.ready) == (StageState.SKIPPED, ())
    run.end("left", Outcome.INTERRUPTED, "stopped")
    assert (run.status.state, run.state("left")) == (RunState.CANCELLED, StageState.FAILED)
    assert Run().on(CancelRequested()).status.state is RunState.CANCELLED
    waiting = Run().start("top").end("top").start("left").end("left", Outcome.RETRYABLE).on(CancelRequested())
    assert waiting.status.state is RunState.CANCELLED


def test_events_that_do_not_fit_change_nothing() -> None:
    run = Run()
    before = run.status
    for event in (
        Started("end"),
        Started("unknown"),
        Ended("top", 1, Outcome.SUCCEEDED),
        Ended("none", 1, Outcome.PERMANENT),
    ):
        assert run.on(event).status == before
    run.start("top")
    before = run.status
    assert run.on(Started("top")).status == before
    assert run.on(Ended("top", 2, Outcome.SUCCEEDED)).status == before
    assert run.on(Ended("top", 0, Outcome.PERMANENT)).status == before


def test_random_walks_always_end_in_a_consistent_state() -> None:
    source = random.Random(7)
    ended = set()
    for _ in range(300):
        count = source.randint(1, 8)
        plan = tuple(
            PlannedStage(f"s{n}", tuple(f"s{d}" for d in range(n) if source.random() < 0.4), source.randint(0, 3))
            for n in range(count)
        )
        run = Run(plan)
        for _step in range(1000):
            if run.status.state.ended:
                break
            going = [n for n, s in run.status.stages.items() if s.state is StageState.RUNNING]
            moves = [Started(n) for n in run.ready]
            moves += [Ended(n, run.status.stages[n].attempts, source.choice(list(Outcome)), "r") for n in going]
            assert moves or decide(plan, run.status, run.now).wake_at, "stuck"
            if moves and source.random() < 0.95:
                before = run.status
                run.on(source.choice(moves))
                for name, status in before.stages.items():
                    if status.state.ended:
                        assert run.status.stages[name] == status, "a finished stage changed"
            elif source.random() < 0.1:
                run.on(CancelRequested())
            run.now += timedelta(seconds=source.random() * 2)
            for stage in plan:
                if run.state(stage.name) in {StageState.RUNNING, StageState.SUCCEEDED}:
                    assert all(run.state(d) is StageState.SUCCEEDED for d in stage.depends_on)
                assert run.status.stages[stage.name].failures <= stage.retries + 1
        assert run.status.state.ended
        ended.add(run.status.state)
        assert all(s.state.ended for s in run.status.stages.values())
    assert ended == {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}


def test_admission_is_first_come_first_served() -> None:
    budget = Claim(4, 1000, 1)
    small, large, gpu = Claim(1, 100), Claim(4, 100), Claim(1, 100, 1)
    assert admit([("a", small), ("b", small)], [], budget) == ["a", "b"]
    assert admit([("a", large), ("b", small)], [small], budget) == []
    assert admit([("a", small), ("b", large), ("c", small)], [small], budget) == ["a"]
    assert admit([("a", gpu), ("b", gpu)], [], budget) == ["a"]
    assert admit([("a", Claim(1, 950))], [small], budget) == []
