"""SQL store of pipelines and runs. Every change of a run is one transaction that also enqueues the message telling of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from millrace_kit.bus import Outgoing
from millrace_kit.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError
from millrace_kit.outbox import enqueue
from millrace_kit.sql import migrate, reading, writing
from sqlalchemy import Connection, Engine, Row, Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from millrace_training_coordinator.results import Output, StageResult
from millrace_training_coordinator.runs import NewRun, PipelineVersion, RunRecord
from millrace_training_coordinator.scheduler import PlannedStage, RunState, RunStatus, StageState, StageStatus
from millrace_training_coordinator.schema import OUTBOX, OUTPUT, PIPELINE, PIPELINE_VERSION, RUN, STAGE

MIGRATIONS = Path(__file__).parent / "migrations"
UNFINISHED = (RunState.PENDING.value, RunState.RUNNING.value)

Announce = Callable[[RunRecord], Outgoing]
"""Makes the message that tells of a run's change."""


class Store:
    """Pipelines and runs in one database.

    Args:
        engine: of `millrace_kit.sql.open_engine`; the schema is brought up to date.
        announce: makes the message enqueued with each change of a run.
        max_unfinished: most runs that are not finished.
    """

    def __init__(self, engine: Engine, announce: Announce, *, max_unfinished: int) -> None:
        migrate(engine, MIGRATIONS)
        self.engine = engine
        self._announce = announce
        self._max_unfinished = max_unfinished

    def register(self, version: PipelineVersion, now: datetime) -> None:
        """Make `version` the one that new runs take."""
        key = {"pipeline_hash": version.pipeline_hash}
        with writing(self.engine) as connection:
            known = select(PIPELINE_VERSION.c.name).filter_by(**key)
            if connection.execute(known).first() is None:
                connection.execute(insert(PIPELINE_VERSION).values(**asdict(version), **key, registered_at=now))
            changed = connection.execute(update(PIPELINE).where(PIPELINE.c.name == version.name).values(**key))
            if changed.rowcount == 0:
                connection.execute(insert(PIPELINE).values(name=version.name, **key))

    def pipeline(self, name: str) -> PipelineVersion:
        """The version that new runs of `name` take.

        Raises:
            NotFoundError: no such pipeline.
        """
        joined = PIPELINE_VERSION.join(PIPELINE, PIPELINE.c.pipeline_hash == PIPELINE_VERSION.c.pipeline_hash)
        found = self._versions(select(PIPELINE_VERSION).select_from(joined).where(PIPELINE.c.name == name))
        if not found:
            raise NotFoundError("pipeline", name)
        return found[0]

    def pipelines(self) -> Sequence[PipelineVersion]:
        """The current version of every pipeline, by name."""
        joined = PIPELINE_VERSION.join(PIPELINE, PIPELINE.c.pipeline_hash == PIPELINE_VERSION.c.pipeline_hash)
        return self._versions(select(PIPELINE_VERSION).select_from(joined).order_by(PIPELINE.c.name))

    def version(self, pipeline_hash: str) -> PipelineVersion:
        """The version with that hash.

        Raises:
            NotFoundError: no such version.
        """
        found = self._versions(select(PIPELINE_VERSION).where(PIPELINE_VERSION.c.pipeline_hash == pipeline_hash))
        if not found:
            raise NotFoundError("pipeline version", pipeline_hash)
        return found[0]

    def _versions(self, query: Select[Any]) -> list[PipelineVersion]:
        with reading(self.engine) as connection:
            rows = connection.execute(query).all()
        return [PipelineVersion(r.name, r.manifest_yaml, r.code_hash, r.archive_digest) for r in rows]

    def by_request(self, request_id: str, request_digest: str) -> RunRecord | None:
        """The run an earlier request with this id started.

        Raises:
            AlreadyExistsError: that request asked for something else.
        """
        with reading(self.engine) as connection:
            return self._by_request(connection, request_id, request_digest)

    def _by_request(self, connection: Connection, request_id: str, request_digest: str) -> RunRecord | None:
        row = connection.execute(select(RUN).where(RUN.c.request_id == request_id)).first()
        if row is None:
            return None
        if row.request_digest != request_digest:
            raise AlreadyExistsError("request", request_id, "it asked for another pipeline, other parameters or seed")
        return _load(connection, [row])[0]

    def create(self, new: NewRun) -> RunRecord:
        """Keep a new run, or return the one its request id already started.

        Raises:
            AlreadyExistsError: the request id was used for something else.
            ResourceExhaustedError: too many runs are not finished.
        """
        try:
            with writing(self.engine) as connection:
                return self.insert(connection, new)
        except IntegrityError:
            # On PostgreSQL two equal requests may pass the check together; the unique column decides.
            found = self.by_request(new.request_id, new.request_digest)
            if found is None:
                raise
            return found

    def insert(self, connection: Connection, new: NewRun) -> RunRecord:
        """`create` inside a transaction of the caller's."""
        if new.request_id:
            found = self._by_request(connection, new.request_id, new.request_digest)
            if found is not None:
                return found
        unfinished = connection.execute(select(func.count()).select_from(RUN).where(RUN.c.state.in_(UNFINISHED)))
        if unfinished.scalar_one() >= self._max_unfinished:
            raise ResourceExhaustedError("max_queued_runs", f"{self._max_unfinished} runs are not finished")
        values = {name: getattr(new, name) for name in _PLAIN}
        values |= {"parameters": json.dumps(dict(new.parameters)), "hardware": json.dumps(dict(new.hardware))}
        values |= {"request_id": new.request_id or None, "state": RunState.PENDING.value, "revision": 1}
        values |= {"cancel_requested": False, "reported": False, "forgotten": False}
        connection.execute(insert(RUN).values(**values))
        blank = {"state": StageState.WAITING.value, "attempts": 0, "failures": 0, "interruptions": 0, "failure": ""}
        rows = [
            {"run_id": new.id, "name": s.name, "position": n, "retries": s.retries, **blank}
            | {"depends_on": json.dumps(s.depends_on)}
            for n, s in enumerate(new.plan)
        ]
        connection.execute(insert(STAGE), rows)
        run = self._one(connection, new.id)
        enqueue(connection, OUTBOX, [self._announce(run)])
        return run

    def run(self, run_id: str) -> RunRecord:
        """A run by id.

        Raises:
            NotFoundError: no such run.
        """
        with reading(self.engine) as connection:
            return self._one(connection, run_id)

    def _one(self, connection: Connection, run_id: str) -> RunRecord:
        row = connection.execute(select(RUN).where(RUN.c.id == run_id)).first()
        if row is None:
            raise NotFoundError("run", run_id)
        return _load(connection, [row])[0]

    def runs(self, pipeline: str, limit: int) -> Sequence[RunRecord]:
        """The newest runs, of one pipeline or (empty) of all."""
        query = select(RUN).order_by(RUN.c.sequence.desc()).limit(limit)
        if pipeline:
            query = query.where(RUN.c.pipeline == pipeline)
        with reading(self.engine) as connection:
            return _load(connection, connection.execute(query).all())

    def active(self, limit: int) -> Sequence[RunRecord]:
        """The oldest runs that are not finished."""
        query = select(RUN).where(RUN.c.state.in_(UNFINISHED)).order_by(RUN.c.sequence).limit(limit)
        with reading(self.engine) as connection:
            return _load(connection, connection.execute(query).all())

    def counts(self) -> Mapping[str, int]:
        """How many runs are in each state."""
        with reading(self.engine) as connection:
            rows = connection.execute(select(RUN.c.state, func.count()).group_by(RUN.c.state)).all()
        return {state: count for state, count in rows}  # noqa: C416 - rows are no tuples for a type checker

    def change(
        self,
        run_id: str,
        step: Callable[[RunRecord], RunStatus],
        *,
        stage: str = "",
        result: StageResult | None = None,
        outputs: Sequence[Output] = (),
    ) -> RunRecord:
        """Take a run from one status to the next; a stage that thereby succeeds keeps `result` and `outputs`.

        Raises:
            NotFoundError: no such run.
        """
        with writing(self.engine) as connection:
            row = connection.execute(select(RUN).where(RUN.c.id == run_id).with_for_update()).first()
            if row is None:
                raise NotFoundError("run", run_id)
            before = _load(connection, [row])[0]
            after = step(before)
            if after == before.status:
                return before
            self._save(connection, before, after)
            if result is not None and after.stages[stage].state is StageState.SUCCEEDED:
                key = (STAGE.c.run_id == run_id) & (STAGE.c.name == stage)
                connection.execute(update(STAGE).where(key).values(result=json.dumps(asdict(result))))
                if outputs:
                    connection.execute(insert(OUTPUT), [{"run_id": run_id, **asdict(output)} for output in outputs])
            run = self._one(connection, run_id)
            enqueue(connection, OUTBOX, [self._announce(run)])
            return run

    def _save(self, connection: Connection, before: RunRecord, after: RunStatus) -> None:
        values = {
            "state": after.state.value,
            "cancel_requested": after.cancel_requested,
            "finished_at": after.finished_at,
            "revision": before.revision + 1,
        }
        connection.execute(update(RUN).where(RUN.c.id == before.id).values(**values))
        for name, status in after.stages.items():
            if status != before.status.stages[name]:
                key = (STAGE.c.run_id == before.id) & (STAGE.c.name == name)
                connection.execute(update(STAGE).where(key).values(**asdict(status) | {"state": status.state.value}))

    def reproduction(self, run_id: str) -> RunRecord | None:
        """The newest reproduction of a run that is under way or that nobody was told of."""
        query = select(RUN).where((RUN.c.reproduction_of == run_id) & RUN.c.reported.is_(False))
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(RUN.c.sequence.desc()).limit(1)).all()
            return _load(connection, rows)[0] if rows else None

    def mark_reported(self, run_id: str) -> None:
        """The caller of Reproduce has its answer."""
        with writing(self.engine) as connection:
            connection.execute(update(RUN).where(RUN.c.id == run_id).values(reported=True))

    def to_forget(self, keep: int) -> Sequence[str]:
        """Finished runs beyond the newest `keep` whose working files were not removed yet."""
        finished = select(RUN.c.id).where(RUN.c.state.not_in(UNFINISHED)).order_by(RUN.c.sequence.desc()).limit(keep)
        with reading(self.engine) as connection:
            kept = connection.execute(finished).scalars().all()
            query = select(RUN.c.id).where(RUN.c.state.not_in(UNFINISHED) & RUN.c.forgotten.is_(False))
            return [run_id for run_id in connection.execute(query).scalars() if run_id not in set(kept)]

    def mark_forgotten(self, run_id: str) -> None:
        """The run's working files are gone."""
        with writing(self.engine) as connection:
            connection.execute(update(RUN).where(RUN.c.id == run_id).values(forgotten=True))


_PLAIN = (
    "id", "pipeline", "pipeline_hash", "seed", "cause", "created_at", "code_hash", "lock_hash", "request_digest",
    "reproduction_of",
)  # fmt: skip


def _load(connection: Connection, rows: Sequence[Row[Any]]) -> list[RunRecord]:
    """Whole runs for rows of `run`, in the same order."""
    if not rows:
        return []
    ids = [row.id for row in rows]
    stages: dict[str, list[Row[Any]]] = {run_id: [] for run_id in ids}
    for stage in connection.execute(select(STAGE).where(STAGE.c.run_id.in_(ids)).order_by(STAGE.c.position)):
        stages[stage.run_id].append(stage)
    outputs: dict[str, list[Output]] = {run_id: [] for run_id in ids}
    for output in connection.execute(select(OUTPUT).where(OUTPUT.c.run_id.in_(ids)).order_by(OUTPUT.c.path)):
        outputs[output.run_id].append(Output(output.path, output.sha256, output.size_bytes))
    return [_run(row, stages[row.id], tuple(outputs[row.id])) for row in rows]


def _run(row: Row[Any], stages: Sequence[Row[Any]], outputs: tuple[Output, ...]) -> RunRecord:
    plan = tuple(PlannedStage(s.name, tuple(json.loads(s.depends_on)), s.retries) for s in stages)
    plain = {name: getattr(row, name) for name in _PLAIN}
    new = NewRun(
        **plain,
        plan=plan,
        parameters=json.loads(row.parameters),
        hardware=json.loads(row.hardware),
        request_id=row.request_id or "",
    )
    status = RunStatus(
        {s.name: _stage_status(s) for s in stages}, RunState(row.state), row.cancel_requested, row.finished_at
    )
    results = {s.name: StageResult(**json.loads(s.result)) for s in stages if s.result is not None}
    return RunRecord(new, row.sequence, row.revision, status, results, outputs)


def _stage_status(row: Row[Any]) -> StageStatus:
    return StageStatus(
        StageState(row.state),
        row.attempts,
        row.failures,
        row.interruptions,
        row.failure,
        row.retry_at,
        row.started_at,
        row.finished_at,
    )
