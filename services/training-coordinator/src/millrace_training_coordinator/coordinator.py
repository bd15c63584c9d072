"""What callers may ask of the coordinator; no gRPC, no processes."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from millrace_kit.clock import Clock, IdSource
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError

from millrace_training_coordinator import metrics
from millrace_training_coordinator.changes import Changes
from millrace_training_coordinator.codetrees import CodeTrees
from millrace_training_coordinator.manifest import Limits, parse_manifest
from millrace_training_coordinator.record import (
    Comparison,
    compare_outputs,
    differences,
    environment_facts,
    hash_lock_file,
)
from millrace_training_coordinator.runs import NewRun, PipelineVersion, RunRecord, RunRequest, plan_of
from millrace_training_coordinator.scheduler import Backoff, CancelRequested, RunState, apply
from millrace_training_coordinator.store import Store

log = logging.getLogger(__name__)

# All parameters of a run together, as JSON: they travel in one environment variable, which Linux limits to 128 KiB.
MAX_PARAMETERS_BYTES = 64 * 1024
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Two runs compared."""

    run_id: str
    comparisons: tuple[Comparison, ...]
    environment_differences: Mapping[str, str]

    @property
    def bit_equal(self) -> bool:
        """Whether every output has the same bytes."""
        return all(comparison.equal for comparison in self.comparisons)


class Coordinator:
    """Pipelines and runs.

    Args:
        store: where both are kept.
        trees: code of the stages.
        limits: what a stage may ask for.
        lock_file: lock file of the stages' environment; empty for none.
        hardware: what stages run on, for the record.
        changes: told of every change.
        wake: makes the runner look at the store.
        clock: source of the time.
        new_id: source of run ids.
    """

    def __init__(
        self,
        store: Store,
        trees: CodeTrees,
        *,
        limits: Limits,
        lock_file: str,
        hardware: Callable[[], Mapping[str, str]],
        changes: Changes,
        wake: Callable[[], None],
        clock: Clock,
        new_id: IdSource,
    ) -> None:
        self._store = store
        self._trees = trees
        self._limits = limits
        self._lock_file = lock_file
        self._hardware = hardware
        self._changes = changes
        self._wake = wake
        self._clock = clock
        self._new_id = new_id
        self._reproducing = asyncio.Lock()

    async def register(self, manifest_yaml: str, code_tar_gz: bytes) -> PipelineVersion:
        """Check and keep a pipeline; the next run of its name takes it.

        Raises:
            InvalidArgumentError: the manifest or the archive is wrong.
        """

        def work() -> PipelineVersion:
            manifest = parse_manifest(manifest_yaml, self._limits)
            check_parameters(manifest.parameters, "manifest_yaml.parameters")
            code_hash, digest = self._trees.add(code_tar_gz)
            version = PipelineVersion(manifest.name, manifest_yaml, code_hash, digest)
            self._store.register(version, self._clock.now())
            return version

        version = await asyncio.to_thread(work)
        log.info("pipeline %s is now %s (code %s)", version.name, version.pipeline_hash, version.code_hash)
        return version

    async def start(self, request: RunRequest) -> RunRecord:
        """Start a run, or return the one that `request_id` started before.

        Raises:
            NotFoundError: no such pipeline.
            InvalidArgumentError: a parameter the pipeline does not have.
            AlreadyExistsError: the request id asked for something else before.
            ResourceExhaustedError: too many runs are not finished.
            FailedPreconditionError: the lock file cannot be read.
        """

        def work() -> RunRecord:
            if request.request_id:
                found = self._store.by_request(request.request_id, request.digest)
                if found is not None:
                    return found
            return self._store.create(self.new_run(self._store.pipeline(request.pipeline), request))

        run = await asyncio.to_thread(work)
        self._changed()
        return run

    def new_run(self, version: PipelineVersion, request: RunRequest) -> NewRun:
        """A run of `version`, not yet kept."""
        manifest = version.manifest
        for name in request.parameters:
            if name not in manifest.parameters:
                raise InvalidArgumentError(f"parameters[{name!r}]", f"pipeline {version.name} has no such parameter")
        parameters = {**manifest.parameters, **request.parameters}
        check_parameters(parameters, "parameters")
        return NewRun(
            self._new_id(),
            version.name,
            version.pipeline_hash,
            plan_of(manifest),
            parameters,
            manifest.seed if request.seed is None else request.seed,
            request.cause,
            self._clock.now(),
            version.code_hash,
            self._lock_hash(),
            self._hardware(),
            request.request_id,
            request.digest,
        )

    def _lock_hash(self) -> str:
        try:
            return hash_lock_file(self._lock_file)
        except OSError as error:
            message = f"the lock file {self._lock_file} cannot be read: {error.strerror}"
            raise FailedPreconditionError("LOCK_FILE_UNREADABLE", message, {"path": self._lock_file}) from error

    async def run(self, run_id: str) -> RunRecord:
        """A run by id."""
        return await asyncio.to_thread(self._store.run, run_id)

    async def runs(self, pipeline: str, limit: int) -> Sequence[RunRecord]:
        """The newest runs."""
        return await asyncio.to_thread(self._store.runs, pipeline, limit)

    async def cancel(self, run_id: str) -> RunRecord:
        """Ask for the end of a run; its stages are stopped soon after. Asking again changes nothing.

        Raises:
            NotFoundError: no such run.
            FailedPreconditionError: it ended in another way already.
        """
        now = self._clock.now()
        run = await asyncio.to_thread(
            self._store.change, run_id, lambda r: apply(r.new.plan, r.status, CancelRequested(), now, Backoff())
        )
        if run.state.ended and run.state is not RunState.CANCELLED:
            state = run.state.value
            raise FailedPreconditionError("RUN_ENDED", f"run {run_id} has {state}", {"run_id": run_id, "state": state})
        if run.state is RunState.CANCELLED and run.revision == 2:  # it had not started: no attempt will report its end
            metrics.RUNS_ENDED.labels(run.new.pipeline, run.state.value).inc()
        self._changed()
        return run

    async def reproduce(self, run_id: str) -> Reproduction:
        """Make a run again and compare. A call that is broken off loses nothing: the next one takes up the same reproduction.

        Raises:
            NotFoundError: no such run.
            FailedPreconditionError: the run did not succeed or declares no outputs, or its reproduction failed.
        """
        original = await self.run(run_id)
        if original.state is not RunState.SUCCEEDED:
            state = original.state.value
            message = f"run {run_id} is {state}; only a run that succeeded can be reproduced"
            raise FailedPreconditionError("RUN_NOT_SUCCEEDED", message, {"run_id": run_id, "state": state})
        async with self._reproducing:
            again = await asyncio.to_thread(self._reproduction_of, original)
        self._changed()
        again = await self._finished(again.id)
        await asyncio.to_thread(self._store.mark_reported, again.id)
        if again.state is not RunState.SUCCEEDED:
            message = f"reproduction {again.id} ended {again.state.value}: {again.failure or 'no reason'}"
            raise FailedPreconditionError("REPRODUCTION_FAILED", message, {"run_id": again.id})
        stages = frozenset(stage.name for stage in again.new.plan)
        return Reproduction(
            again.id,
            compare_outputs(original.outputs, again.outputs, stages),
            differences(_facts(original), _facts(again)),
        )

    def _reproduction_of(self, original: RunRecord) -> RunRecord:
        found = self._store.reproduction(original.id)
        if found is not None:
            return found
        version = self._store.version(original.new.pipeline_hash)
        plan = plan_of(version.manifest, effects=False)
        kept = {stage.name for stage in plan}
        if not any(output.path.partition("/")[0] in kept for output in original.outputs):
            message = f"run {original.id} kept no output of a stage without effects: nothing can be compared"
            raise FailedPreconditionError("NOTHING_TO_COMPARE", message, {"run_id": original.id})
        new = NewRun(
            self._new_id(),
            version.name,
            version.pipeline_hash,
            plan,
            original.new.parameters,
            original.new.seed,
            f"reproduction of run {original.id}",
            self._clock.now(),
            version.code_hash,
            self._lock_hash(),
            self._hardware(),
            reproduction_of=original.id,
        )
        return self._store.create(new)

    async def _finished(self, run_id: str) -> RunRecord:
        while True:
            count = self._changes.count
            run = await self.run(run_id)
            if run.state.ended:
                return run
            await self._changes.after(count, POLL_S)

    def _changed(self) -> None:
        self._changes.bump()
        self._wake()


def _facts(run: RunRecord) -> dict[str, str]:
    return environment_facts(run.new.lock_hash, run.new.hardware, run.record)


def check_parameters(parameters: Mapping[str, str], field: str) -> None:
    """Refuse parameters that are together too large for a stage's environment."""
    if len(json.dumps(dict(parameters)).encode()) > MAX_PARAMETERS_BYTES:
        raise InvalidArgumentError(field, f"are larger than {MAX_PARAMETERS_BYTES >> 10} KiB together")
