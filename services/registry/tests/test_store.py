"""The store's contract, held on SQLite and on a real PostgreSQL alike."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from millrace_api.events.v1 import events_pb2
from millrace_kit.clock import FakeClock
from millrace_kit.errors import (
    ConflictError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from millrace_kit.sql import migrate, open_engine, reading
from millrace_registry.app import MIGRATIONS
from millrace_registry.events import model_changed
from millrace_registry.models import Artifact, Content, Lineage, Model, OutcomeSpec, Signature, Stage, TensorSpec
from millrace_registry.store import SqlStore
from millrace_registry.tables import METADATA, OUTBOX
from sqlalchemy import Engine, select, text

START = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'r.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    engine = open_engine(url)
    migrate(engine, MIGRATIONS)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START)


@pytest.fixture
def store(engine: Engine, clock: FakeClock) -> SqlStore:
    store = SqlStore(engine, clock, model_changed)
    store.create_model(Model("m"))
    return store


def content(version: str = "1.0.0", **changes: object) -> Content:
    fields = {
        "model": "m",
        "version": version,
        "artifacts": (Artifact("labels.txt", "b" * 64, 0), Artifact("model.onnx", "a" * 64, 1 << 40)),
        "platform": "onnxruntime_onnx",
        "signature": Signature((TensorSpec("features", "FP32", (-1, 2)),), (), ("a", "é")),
        "lineage": Lineage(run_id="run", seed=(1 << 63) - 1),
        "metrics": {"auc": 0.1 + 0.2, "tiny": 5e-324},
        "tags": {"k": "v"},
    }
    return Content(**{**fields, **changes})  # type: ignore[arg-type]


def promote(store: SqlStore, version: str) -> None:
    store.approve("m", version, Stage.PRODUCTION, "bob", "")
    for stage in (Stage.TESTING, Stage.STAGING, Stage.PRODUCTION):
        store.transition("m", version, stage, "ann", 0)


def announced(engine: Engine) -> list[events_pb2.ModelChanged]:
    with reading(engine) as connection:
        values = connection.execute(select(OUTBOX.c.value).order_by(OUTBOX.c.id)).scalars()
        return [events_pb2.ModelChanged.FromString(bytes(value)) for value in values]


def test_migrations_make_the_tables_the_code_uses(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    migrate(engine, MIGRATIONS)  # a second start finds nothing to do


def test_values_come_back_as_they_went(store: SqlStore, clock: FakeClock) -> None:
    outcome = OutcomeSpec("outcomes", "flight_id", "late", 0.1 + 0.2)
    store.create_model(Model("n", "a\nb", "service", outcome))
    assert store.model("n") == Model("n", "a\nb", "service", outcome, START)
    clock.advance(1.5)
    made, _created = store.register(content(), "ann")
    found = store.version("m", "1.0.0")
    assert found == made
    assert found.content.difference(content()) == ""
    assert found.content.metrics == {"auc": 0.1 + 0.2, "tiny": 5e-324}
    assert found.created_at == clock.now()
    assert [m.name for m in store.models()] == ["m", "n"]


def test_a_refused_change_leaves_nothing(store: SqlStore, engine: Engine) -> None:
    store.register(content(), "ann")
    before = store.audit_page("", 0, 100)
    with pytest.raises(FailedPreconditionError):
        store.transition("m", "1.0.0", Stage.PRODUCTION, "ann", 0)
    with pytest.raises(ConflictError):
        store.transition("m", "1.0.0", Stage.TESTING, "ann", 9)
    with pytest.raises(NotFoundError):
        store.approve("m", "2.0.0", Stage.PRODUCTION, "bob", "")
    assert store.audit_page("", 0, 100) == before
    assert store.version("m", "1.0.0").revision == 1
    assert len(announced(engine)) == 1


def test_a_change_whose_announcement_fails_does_not_happen(engine: Engine, clock: FakeClock) -> None:
    def broken(**_arguments: object) -> None:
        raise ZeroDivisionError

    store = SqlStore(engine, clock, broken)  # type: ignore[arg-type]
    store.create_model(Model("m"))
    with pytest.raises(ZeroDivisionError):
        store.register(content(), "ann")
    assert store.versions("m") == []
    assert [e.action for e in store.audit_page("", 0, 10)] == ["CreateModel"]


def test_limits(engine: Engine, clock: FakeClock) -> None:
    store = SqlStore(engine, clock, model_changed, max_models=1, max_versions=1)
    store.create_model(Model("m"))
    store.create_model(Model("m"))
    with pytest.raises(ResourceExhaustedError):
        store.create_model(Model("n"))
    store.register(content(), "ann")
    store.register(content(), "ann")
    with pytest.raises(ResourceExhaustedError):
        store.register(content("1.0.1"), "ann")


def together(count: int, work: Callable[[int], object]) -> list[object]:
    """What `count` threads that start at once return or raise."""
    barrier, results = threading.Barrier(count), [None] * count

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = work(index)  # type: ignore[call-overload]
        except Exception as error:
            results[index] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(results)


def test_of_concurrent_transitions_one_wins(store: SqlStore, engine: Engine) -> None:
    store.register(content(), "ann")
    stages = [Stage.TESTING, Stage.ARCHIVED] * 4
    results = together(8, lambda n: store.transition("m", "1.0.0", stages[n], f"a{n}", 1))
    assert sorted(type(r).__name__ for r in results) == ["ConflictError"] * 7 + ["Version"]
    assert store.version("m", "1.0.0").revision == 2
    assert len(announced(engine)) == 2
    assert store.verify_audit() == 3


def test_concurrent_registrations_of_different_content(store: SqlStore) -> None:
    results = together(6, lambda n: store.register(content(platform=f"p{n}"), "ann"))
    assert sorted(type(r).__name__ for r in results) == ["AlreadyExistsError"] * 5 + ["tuple"]


def test_concurrent_changes_are_numbered_without_gaps_in_order(store: SqlStore, engine: Engine) -> None:
    results = together(8, lambda n: [store.register(content(f"1.{n}.{k}"), "ann") for k in range(4)])
    assert not [r for r in results if isinstance(r, Exception)]
    assert [e.sequence for e in announced(engine)] == list(range(2, 34))
    assert store.verify_audit() == 33


def test_newest_promotion_is_found_and_forgotten(store: SqlStore) -> None:
    for version in ("2.0.0", "1.0.0"):
        store.register(content(version), "ann")
        promote(store, version)
    assert store.version("m", "").content.version == "1.0.0"
    store.transition("m", "1.0.0", Stage.STAGING, "ann", 0)
    assert store.version("m", "").content.version == "2.0.0"
    store.transition("m", "2.0.0", Stage.ARCHIVED, "ann", 0)
    with pytest.raises(NotFoundError):
        store.version("m", "")


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit SET actor = 'eve' WHERE id = 3",
        "UPDATE audit SET at_us = at_us + 1 WHERE id = 3",
        "UPDATE audit SET hash = '" + "0" * 64 + "' WHERE id = 3",
        "DELETE FROM audit WHERE id = 3",
        "DELETE FROM audit WHERE id = 6",  # the newest
        "UPDATE audit SET id = 10 WHERE id = 6",
        "DELETE FROM audit",
        "UPDATE audit_head SET last_id = 5",
    ],
)
def test_a_tampered_audit_trail_shows(store: SqlStore, engine: Engine, tampering: str) -> None:
    store.register(content(), "ann")
    promote(store, "1.0.0")
    assert store.verify_audit() == 6
    assert len(store.audit_page("m", 0, 100)) == 6
    with engine.begin() as connection:
        connection.execute(text(tampering))
    with pytest.raises(DataLossError, match="audit trail") as caught:
        store.verify_audit()
    assert caught.value.reason == "AUDIT_TAMPERED"


def test_a_tampered_entry_is_not_listed(store: SqlStore, engine: Engine) -> None:
    store.register(content(), "ann")
    with engine.begin() as connection:
        connection.execute(text("UPDATE audit SET detail = 'nothing' WHERE id = 2"))
    assert len(store.audit_page("", 0, 1)) == 1
    with pytest.raises(DataLossError, match="entry 2"):
        store.audit_page("m", 0, 10)


def test_a_database_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'r.sqlite'}")
    store = SqlStore(engine, FakeClock(START), model_changed)  # no tables: SQLite answers with an OperationalError
    with pytest.raises(UnavailableError):
        store.models()
