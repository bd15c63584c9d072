"""SQL by SQLAlchemy, schema by Alembic: SQLite (WAL) on one machine, PostgreSQL in a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from millrace_kit.errors import UnavailableError

BUSY_TIMEOUT_MS = 10_000
POOL_SIZE = 10
POOL_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
# Longest that a server may leave sent bytes unacknowledged: a host that vanished is noticed then, not after the kernel's quarter of an hour.
UNACKNOWLEDGED_MS = 10_000
MIGRATION_LOCK = 0x6D696C6C
# Longest wait of a transaction for its turn; then it fails.
TURN_TIMEOUT_MS = 10_000


def open_engine(url: str) -> Engine:
    """An engine for `url` (`sqlite:////path` or `postgresql+psycopg://…`).

    SQLite runs in WAL mode with `synchronous=FULL`, so that what is committed survives kill -9 and power loss alike, and every
    transaction is `BEGIN IMMEDIATE`, so that two writers queue instead of failing half way; `reading` gives one that only reads.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        limits = {"connect_timeout": CONNECT_TIMEOUT_S, "tcp_user_timeout": UNACKNOWLEDGED_MS}
        return create_engine(
            parsed, pool_size=POOL_SIZE, pool_timeout=POOL_TIMEOUT_S, pool_pre_ping=True, connect_args=limits
        )
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    # isolation_level None keeps Python's sqlite3 from starting transactions by itself; the listener below starts them.
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: object, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        only_reads = connection.get_execution_options().get("millrace_reading", False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes; it commits when the block ends without an error.

    Raises:
        UnavailableError: the database does not answer, or the transaction did not get its turn in time.
    """
    with _answering(), engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: one consistent snapshot that waits for no writer.

    Raises:
        UnavailableError: the database does not answer.
    """
    with _answering(), engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            snapshot = connection.execution_options(millrace_reading=True)
        else:  # the default level would give each statement a snapshot of its own
            snapshot = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with snapshot.begin():
            yield snapshot


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (OperationalError, PoolTimeoutError) as error:
        raise UnavailableError("DATABASE_UNAVAILABLE", "the database did not answer") from error


def take_turn(connection: Connection, lock: int) -> None:
    """Wait until no other transaction holds `lock`; held to the end of this one. What is read afterwards is the newest there is.

    Replicas that look before they write take turns by it; SQLite's writers do so anyway.

    Raises:
        OperationalError: the turn did not come within `TURN_TIMEOUT_MS`; `writing` makes UnavailableError of it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = {TURN_TIMEOUT_MS}"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})


def migrate(engine: Engine, scripts: Path) -> None:
    """Bring the schema to the newest revision of the Alembic folder `scripts`.

    Raises:
        UnavailableError: the database does not answer.
    """
    config = Config()
    config.set_main_option("script_location", str(scripts))
    with writing(engine) as connection:
        if (
            connection.dialect.name == "postgresql"
        ):  # replicas that start together take turns; SQLite's writers do so anyway
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
