"""The worker that moves runs: it starts what may start, watches what runs, and writes down what ended.

The store is the truth. Each step reads the unfinished runs, asks the state machine what to do and does it, so a coordinator that was
killed at any point goes on where the store says. An attempt is written down as started before it is, and looked for afterwards.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError
from millrace_kit.server import Worker

from millrace_training_coordinator import metrics
from millrace_training_coordinator.changes import Changes
from millrace_training_coordinator.executor import Executor, Exit, Found, Launch, Place
from millrace_training_coordinator.manifest import Stage
from millrace_training_coordinator.results import (
    Output,
    StageFailedError,
    StageResult,
    classify,
    read_result,
)
from millrace_training_coordinator.runs import RunRecord, ancestors
from millrace_training_coordinator.scheduler import (
    Backoff,
    Claim,
    Ended,
    Outcome,
    StageState,
    Started,
    admit,
    apply,
    decide,
)
from millrace_training_coordinator.store import Store

log = logging.getLogger(__name__)

# Longest sleep between two looks at the store.
STEP_S = 1.0
# On top of the grace, how long an orderly stop waits for stages to end.
STOP_EXTRA_S = 3.0


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """How much runs at once, and how failures are repeated."""

    budget: Claim
    max_stages: int
    """Stages that run at once, whatever they claim."""
    backoff: Backoff
    max_active_runs: int
    max_unfinished_runs: int
    output_limit_bytes: int
    keep_finished_runs: int
    stop_grace_s: float
    terminate_on_stop: bool


class Runner:
    """Moves runs until it is stopped.

    Args:
        store: where runs stand.
        executor: what runs stages.
        limits: see there.
        peers: environment with the addresses of the services.
        changes: told of every change.
        clock: source of the time.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        *,
        limits: RunnerLimits,
        peers: Mapping[str, str],
        changes: Changes,
        clock: Clock,
    ) -> None:
        self._store = store
        self._executor = executor
        self._limits = limits
        self._peers = peers
        self._changes = changes
        self._clock = clock
        self._awake = asyncio.Event()
        self._running: dict[Place, Claim] = {}
        self._tasks: dict[Place, asyncio.Task[None]] = {}

    @property
    def worker(self) -> Worker:
        """The background task for a `Service`."""
        return Worker("runner", self.run)

    def wake(self) -> None:
        """Look at the store now."""
        self._awake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Move runs until `stop` is set."""
        await self._recover()
        try:
            while not stop.is_set():
                self._awake.clear()
                wake_at = await self._step()
                await self._pause(stop, wake_at)
            if self._limits.terminate_on_stop:
                await self._terminate()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._tasks.clear()

    async def _pause(self, stop: asyncio.Event, wake_at: datetime | None) -> None:
        """Wait for a change, the next retry or the end of an attempt; raises what an attempt's task raised."""
        seconds = STEP_S
        if wake_at is not None:
            seconds = max(0.0, min(seconds, (wake_at - self._clock.now()).total_seconds()))
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._awake.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        for place, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[place]
                task.result()

    async def _recover(self) -> None:
        """Take up every attempt that an earlier coordinator left running."""
        runs = await asyncio.to_thread(self._store.active, self._limits.max_unfinished_runs)
        for run in runs:
            for name, status in run.status.stages.items():
                if status.state is not StageState.RUNNING:
                    continue
                place = Place(run.id, name, status.attempts)
                found = await self._executor.recover(place)
                metrics.RECOVERED.labels(found.value).inc()
                log.info("run %s: attempt %d of stage %s is %s", run.id, place.attempt, name, found.value)
                if found is Found.LOST:
                    await self._ended(place, Outcome.INTERRUPTED, "lost while the coordinator was away")
                else:
                    self._watch(run, place, self._claim(await self._stage(run, name)))

    async def _stage(self, run: RunRecord, name: str) -> Stage:
        version = await asyncio.to_thread(self._store.version, run.new.pipeline_hash)
        return version.manifest.stage(name)

    def _claim(self, stage: Stage) -> Claim:
        return Claim(stage.resources.cpus, stage.resources.memory_mib, stage.resources.gpus)

    async def _step(self) -> datetime | None:
        """Do everything that can be done now; returns when to look again at the latest."""
        runs = await asyncio.to_thread(self._store.active, self._limits.max_active_runs)
        wakes: list[datetime] = []
        candidates: list[tuple[tuple[RunRecord, Stage], Claim]] = []
        for run in runs:
            decision = decide(run.new.plan, run.status, self._clock.now())
            for name in decision.stop:
                await self._executor.stop(Place(run.id, name, run.status.stages[name].attempts))
            if decision.wake_at is not None:
                wakes.append(decision.wake_at)
            for name in decision.start:
                stage = await self._stage(run, name)
                candidates.append(((run, stage), self._claim(stage)))
        # The machine may have shrunk since the pipeline was registered: what can never fit must not block the rest.
        fitting = [(c, claim) for c, claim in candidates if claim.fits(self._limits.budget)]
        for (run, stage), claim in candidates:
            if not claim.fits(self._limits.budget):
                await self._refuse(run, stage)
        room = max(0, self._limits.max_stages - len(self._running))
        for run, stage in admit(fitting, self._running.values(), self._limits.budget)[:room]:
            await self._start(run, stage)
        await self._count()
        return min(wakes, default=None)

    async def _count(self) -> None:
        for state, count in (await asyncio.to_thread(self._store.counts)).items():
            metrics.RUNS.labels(state).set(count)

    async def _refuse(self, run: RunRecord, stage: Stage) -> None:
        place = await self._begin(run, stage.name)
        if place is not None:
            await self._ended(place, Outcome.PERMANENT, "asks for more than this coordinator has")

    async def _begin(self, run: RunRecord, name: str) -> Place | None:
        """Write down that the next attempt starts; None when the run changed meanwhile and it must not."""
        now = self._clock.now()
        event, backoff = Started(name), self._limits.backoff
        before = run.status.stages[name].attempts
        changed = await asyncio.to_thread(
            self._store.change, run.id, lambda r: apply(r.new.plan, r.status, event, now, backoff)
        )
        self._changes.bump()
        status = changed.status.stages[name]
        if status.state is not StageState.RUNNING or status.attempts != before + 1:
            return None
        if status.failures:
            metrics.RETRIES.labels(run.new.pipeline, name).inc()
        return Place(run.id, name, status.attempts)

    async def _start(self, run: RunRecord, stage: Stage) -> None:
        place = await self._begin(run, stage.name)
        if place is None:
            return
        try:
            await self._executor.start(await self._launch(run, stage, place))
        except OSError as error:
            await self._ended(place, Outcome.RETRYABLE, f"could not be started: {error.strerror or error}")
        except MillraceError as error:
            await self._ended(place, Outcome.PERMANENT, f"could not be started: {error}")
        else:
            log.info("run %s: attempt %d of stage %s started", run.id, place.attempt, stage.name)
            self._watch(run, place, self._claim(stage))

    async def _launch(self, run: RunRecord, stage: Stage, place: Place) -> Launch:
        version = await asyncio.to_thread(self._store.version, run.new.pipeline_hash)
        inputs = {
            name: Place(run.id, name, run.status.stages[name].attempts)
            for name in ancestors(version.manifest, stage.name)
        }
        environment = {
            **self._peers,
            "MILLRACE_RUN_ID": run.id,
            "MILLRACE_STAGE": stage.name,
            "MILLRACE_ATTEMPT": str(place.attempt),
            "MILLRACE_SEED": str(run.new.seed),
            "MILLRACE_PARAMETERS": json.dumps(dict(run.new.parameters)),
            "MILLRACE_CODE_HASH": run.new.code_hash,
            "MILLRACE_LOCK_HASH": run.new.lock_hash,
            # The order of Python's sets is part of what a seed decides.
            "PYTHONHASHSEED": str(run.new.seed % 2**32),
            # cuBLAS is deterministic only with a fixed workspace.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        if run.new.reproduction_of:
            environment["MILLRACE_REPRODUCTION_OF"] = run.new.reproduction_of
        return Launch(place, version.name, stage, version.code_hash, version.archive_digest, inputs, environment)

    def _watch(self, run: RunRecord, place: Place, claim: Claim) -> None:
        self._running[place] = claim
        self._tasks[place] = asyncio.create_task(self._await_end(run, place), name=f"attempt {place}")

    async def _await_end(self, run: RunRecord, place: Place) -> None:
        started = self._clock.monotonic()
        try:
            exit_ = await self._executor.wait(place)
            outcome, reason, result, outputs = await asyncio.to_thread(
                self._judge, await self._stage(run, place.stage), place, exit_
            )
            seconds = self._clock.monotonic() - started
            metrics.STAGE_SECONDS.labels(run.new.pipeline, place.stage, outcome.value).observe(seconds)
            await self._ended(place, outcome, reason, result, outputs)
        finally:
            self._running.pop(place, None)
            self._awake.set()

    def _judge(
        self, stage: Stage, place: Place, exit_: Exit
    ) -> tuple[Outcome, str, StageResult | None, Sequence[Output]]:
        """How an attempt ended, all told; reads and keeps what it left."""
        outcome, reason = classify(exit_)
        try:
            if outcome is Outcome.SUCCEEDED:
                result = read_result(self._executor.result_folder(place))
                limit = self._limits.output_limit_bytes
                return outcome, "", result, self._executor.keep(place, stage.outputs, limit)
            if outcome is Outcome.PERMANENT:
                with contextlib.suppress(OSError):
                    read_result(self._executor.result_folder(place))  # raises when the stage's gate says why
        except StageFailedError as error:
            return Outcome.PERMANENT, f"{reason}: {error}" if reason else str(error), None, ()
        except OSError as error:
            return Outcome.RETRYABLE, f"its outputs could not be kept: {error.strerror or error}", None, ()
        return outcome, reason, None, ()

    async def _ended(
        self,
        place: Place,
        outcome: Outcome,
        reason: str,
        result: StageResult | None = None,
        outputs: Sequence[Output] = (),
    ) -> None:
        event, now, backoff = (
            Ended(place.stage, place.attempt, outcome, reason),
            self._clock.now(),
            self._limits.backoff,
        )
        run = await asyncio.to_thread(
            self._store.change,
            place.run_id,
            lambda r: apply(r.new.plan, r.status, event, now, backoff),
            stage=place.stage,
            result=result,
            outputs=outputs,
        )
        log.info(
            "run %s: attempt %d of stage %s: %s %s", run.id, place.attempt, place.stage, outcome.value.lower(), reason
        )
        self._changes.bump()
        self._awake.set()
        if run.state.ended:
            metrics.RUNS_ENDED.labels(run.new.pipeline, run.state.value).inc()
            log.info("run %s of %s ended: %s %s", run.id, run.new.pipeline, run.state.value, run.failure)
            await self._forget()

    async def _forget(self) -> None:
        """Remove working files of runs beyond those to keep; what cannot be removed now is when the next run ends."""
        for run_id in await asyncio.to_thread(self._store.to_forget, self._limits.keep_finished_runs):
            try:
                await self._executor.forget(run_id)
            except OSError as error:
                log.warning("run %s cannot be forgotten yet: %s", run_id, error)
            else:
                await asyncio.to_thread(self._store.mark_forgotten, run_id)

    async def _terminate(self) -> None:
        """End running attempts; they are written down as interrupted and run again after the next start."""
        for place in list(self._running):
            await self._executor.stop(place)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=self._limits.stop_grace_s + STOP_EXTRA_S)
