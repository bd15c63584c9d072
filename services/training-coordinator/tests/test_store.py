"""One contract for both databases."""

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from millrace_kit.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError
from millrace_kit.sql import open_engine
from millrace_training_coordinator.convert import run_changed
from millrace_training_coordinator.results import Output, StageResult
from millrace_training_coordinator.runs import NewRun, PipelineVersion
from millrace_training_coordinator.scheduler import (
    Backoff,
    CancelRequested,
    Ended,
    Outcome,
    PlannedStage,
    RunState,
    StageState,
    Started,
    apply,
)
from millrace_training_coordinator.schema import METADATA, OUTBOX
from millrace_training_coordinator.store import Store
from sqlalchemy import func, select

from .conftest import manifest, stage

NOW = datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=UTC)
VERSION = PipelineVersion("demo", manifest(stages=[stage("a", "pass")]), "c" * 64, "d" * 64)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.sqlite"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def store(url: str):
    engine = open_engine(url)
    made = Store(engine, run_changed, max_unfinished=5)
    made.register(VERSION, NOW)
    yield made
    engine.dispose()


def new(run_id: str, **fields) -> NewRun:
    plan = (PlannedStage("a", (), 2), PlannedStage("b", ("a",)))
    made = NewRun(
        run_id, "demo", VERSION.pipeline_hash, plan, {"k": "v\0é"}, -5, "why", NOW, "c" * 64, "l" * 64, {"cpu": "x"}
    )
    return replace(made, **fields)


def step(event):
    return lambda run: apply(run.new.plan, run.status, event, NOW, Backoff())


def announced(store: Store) -> int:
    with store.engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(OUTBOX)).scalar_one()


def test_the_migrations_make_the_tables_of_the_schema(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_what_is_kept_comes_back(store: Store) -> None:
    made = store.create(new("r1"))
    assert store.run("r1") == made
    assert (made.new, made.revision, made.state) == (new("r1"), 1, RunState.PENDING)
    store.change("r1", step(Started("a")))
    result = StageResult('{"model": "m"}', "a" * 64, "defs", {"t": 3}, "m", "1.0.0")
    outputs = (Output("a/x", "0" * 64, 3),)
    after = store.change("r1", step(Ended("a", 1, Outcome.SUCCEEDED)), stage="a", result=result, outputs=outputs)
    assert after == store.run("r1")
    assert after.results == {"a": result}
    assert after.outputs == outputs
    assert (after.record.model, dict(after.record.table_versions)) == ("m", {"t": 3})
    assert after.status.stages["a"].finished_at == NOW
    assert (after.revision, announced(store)) == (3, 3)


def test_an_event_that_changes_nothing_is_not_announced(store: Store) -> None:
    store.create(new("r1"))
    assert store.change("r1", step(Started("b"))).revision == 1
    assert announced(store) == 1


def test_a_late_success_keeps_no_result(store: Store) -> None:
    store.create(new("r1"))
    store.change("r1", step(Started("a")))
    store.change("r1", step(Ended("a", 1, Outcome.RETRYABLE, "x")))
    late = store.change("r1", step(Ended("a", 1, Outcome.SUCCEEDED)), stage="a", result=StageResult("{}"))
    assert late.results == {}
    assert late.status.stages["a"].state is StageState.RETRYING


def test_request_ids(store: Store) -> None:
    first = store.create(new("r1", request_id="q", request_digest="1"))
    assert store.create(new("r2", request_id="q", request_digest="1")) == first
    with pytest.raises(AlreadyExistsError):
        store.create(new("r3", request_id="q", request_digest="2"))
    assert store.by_request("other", "1") is None
    assert [run.id for run in store.runs("", 10)] == ["r1"]


def test_equal_requests_at_once_give_one_run(store: Store) -> None:
    barrier = threading.Barrier(4)
    ids: list[str] = []

    def ask(number: int) -> None:
        barrier.wait()
        ids.append(store.create(new(f"r{number}", request_id="q", request_digest="1")).id)

    async def all_at_once() -> None:
        await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(4)))

    asyncio.run(all_at_once())
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_limit_on_unfinished_runs(store: Store) -> None:
    for number in range(5):
        store.create(new(f"r{number}"))
    with pytest.raises(ResourceExhaustedError):
        store.create(new("r5"))
    store.change("r0", step(CancelRequested()))
    store.create(new("r5"))
    assert [run.id for run in store.active(2)] == ["r1", "r2"]
    assert [run.id for run in store.runs("demo", 2)] == ["r5", "r4"]
    assert store.runs("other", 2) == []
    assert store.counts() == {"PENDING": 5, "CANCELLED": 1}


def test_pipelines(store: Store) -> None:
    assert store.pipeline("demo") == VERSION
    newer = replace(VERSION, code_hash="e" * 64)
    store.register(newer, NOW)
    store.register(newer, NOW)
    assert store.pipeline("demo") == newer
    assert store.pipelines() == [newer]
    assert store.version(VERSION.pipeline_hash) == VERSION
    store.register(VERSION, NOW)
    assert store.pipeline("demo") == VERSION
    for call in (lambda: store.pipeline("x"), lambda: store.version("x"), lambda: store.run("x")):
        with pytest.raises(NotFoundError):
            call()


def test_reproductions_are_found_until_told(store: Store) -> None:
    store.create(new("r1"))
    assert store.reproduction("r1") is None
    store.create(new("r2", reproduction_of="r1"))
    found = store.reproduction("r1")
    assert found is not None
    assert found.id == "r2"
    store.mark_reported("r2")
    assert store.reproduction("r1") is None


def test_what_may_be_forgotten(store: Store) -> None:
    for number in range(4):
        store.create(new(f"r{number}"))
    for number in range(3):
        store.change(f"r{number}", step(CancelRequested()))
    assert list(store.to_forget(1)) == ["r0", "r1"]
    store.mark_forgotten("r0")
    assert list(store.to_forget(1)) == ["r1"]
