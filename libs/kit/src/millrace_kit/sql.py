"""SQL by SQLAlchemy, schema by Alembic: SQLite (WAL) on one machine, PostgreSQL in a cluster."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.pool import ConnectionPoolEntry

BUSY_TIMEOUT_MS = 10_000
POOL_SIZE = 10
POOL_TIMEOUT_S = 10


def open_engine(url: str) -> Engine:
    """An engine for `url` (`sqlite:////path` or `postgresql+psycopg://…`).

    SQLite runs in WAL mode with `synchronous=FULL`, so that what is committed survives kill -9 and power loss alike, and every
    transaction is `BEGIN IMMEDIATE`, so that two writers queue instead of failing half way.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_size=POOL_SIZE, pool_timeout=POOL_TIMEOUT_S, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "autocommit": True})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: object, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    return engine


def migrate(engine: Engine, scripts: Path) -> None:
    """Bring the schema to the newest revision of the Alembic folder `scripts`."""
    config = Config()
    config.set_main_option("script_location", str(scripts))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
