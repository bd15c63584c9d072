"""SQLite as the kit opens it: writers queue, readers see a snapshot and wait for nobody."""

import socket
import threading
from pathlib import Path

import pytest
from millrace_kit.errors import UnavailableError
from millrace_kit.sql import open_engine, reading, writing
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_engine(f"sqlite:///{tmp_path / 'state' / 't.sqlite'}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)"))
        connection.execute(text("INSERT INTO counter VALUES (1, 0)"))
    return engine


def value(engine: Engine) -> int:
    with reading(engine) as connection:
        return int(connection.execute(text("SELECT value FROM counter")).scalar_one())


def test_an_error_rolls_back(engine: Engine) -> None:
    def change() -> None:
        with engine.begin() as connection:
            connection.execute(text("UPDATE counter SET value = 7"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert value(engine) == 0


def test_read_modify_write_of_many_threads_loses_nothing(engine: Engine) -> None:
    def add() -> None:
        for _ in range(20):
            with engine.begin() as connection:
                now = connection.execute(text("SELECT value FROM counter")).scalar_one()
                connection.execute(text("UPDATE counter SET value = :v"), {"v": now + 1})

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(engine) == 80


def test_a_reader_does_not_wait_for_a_writer(engine: Engine) -> None:
    with engine.begin() as writer:
        writer.execute(text("UPDATE counter SET value = 1"))
        assert value(engine) == 0
    assert value(engine) == 1


@pytest.mark.postgres
def test_a_reader_of_postgres_sees_one_snapshot_and_may_not_write(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE counter (value INTEGER NOT NULL)"))
        connection.execute(text("INSERT INTO counter VALUES (1)"))
    with reading(engine) as reader:
        assert reader.execute(text("SELECT value FROM counter")).scalar_one() == 1
        with engine.begin() as writer:
            writer.execute(text("UPDATE counter SET value = 2"))
        assert reader.execute(text("SELECT value FROM counter")).scalar_one() == 1
    assert value(engine) == 2
    with pytest.raises(SQLAlchemyError, match="read-only"), reading(engine) as reader:
        reader.execute(text("UPDATE counter SET value = 3"))
    engine.dispose()


@pytest.mark.postgres
def test_a_database_that_went_away_is_unavailable_and_comes_back(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with reading(engine) as connection:
        number = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    other = open_engine(postgres_url)

    def ended_in_the_middle() -> None:
        with writing(engine) as connection:
            held = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            with writing(other) as killer:
                killer.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": held})
            connection.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError, match="did not answer"):
        ended_in_the_middle()
    with reading(engine) as connection:
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() != number
    engine.dispose()
    other.dispose()


def test_no_database_at_all_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        engine = open_engine(f"postgresql+psycopg://nobody@127.0.0.1:{taken.getsockname()[1]}/none")
        with pytest.raises(UnavailableError), reading(engine):
            pass
