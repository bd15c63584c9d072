"""Tables of the coordinator. Alembic's first revision creates exactly these; a later change comes with a revision of its own."""

from datetime import UTC, datetime, timedelta
from typing import Any

from millrace_kit.outbox import outbox_table
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime as whole microseconds since 1970: the same on every database, and it sorts."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """To microseconds."""
        return None if value is None else (value - EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """From microseconds."""
        return None if value is None else EPOCH + timedelta(microseconds=value)


METADATA = MetaData()
BIG_ID = BigInteger().with_variant(Integer, "sqlite")

PIPELINE_VERSION = Table(
    "pipeline_version",
    METADATA,
    Column("pipeline_hash", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("manifest_yaml", Text, nullable=False),
    Column("code_hash", Text, nullable=False),
    Column("archive_digest", Text, nullable=False),
    Column("registered_at", Instant, nullable=False),
)
# The version that new runs of a pipeline take.
PIPELINE = Table(
    "pipeline",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("pipeline_hash", Text, ForeignKey("pipeline_version.pipeline_hash"), nullable=False),
)
RUN = Table(
    "run",
    METADATA,
    Column("sequence", BIG_ID, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("request_id", Text, unique=True),
    Column("request_digest", Text, nullable=False),
    Column("pipeline", Text, nullable=False),
    Column("pipeline_hash", Text, ForeignKey("pipeline_version.pipeline_hash"), nullable=False),
    Column("parameters", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("cause", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("finished_at", Instant),
    Column("state", Text, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("code_hash", Text, nullable=False),
    Column("lock_hash", Text, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("reproduction_of", Text, nullable=False),
    # Whether the answer of a Reproduce call has told of this run.
    Column("reported", Boolean, nullable=False),
    # Whether logs and working files are gone.
    Column("forgotten", Boolean, nullable=False),
    Index("run_by_state", "state", "sequence"),
    Index("run_by_pipeline", "pipeline", "sequence"),
    Index("run_by_reproduction", "reproduction_of"),
    sqlite_autoincrement=True,
)
STAGE = Table(
    "stage",
    METADATA,
    Column("run_id", Text, ForeignKey("run.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("depends_on", Text, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("interruptions", Integer, nullable=False),
    Column("failure", Text, nullable=False),
    Column("retry_at", Instant),
    Column("started_at", Instant),
    Column("finished_at", Instant),
    # The meaning of result.json and its text, as JSON; null until the stage succeeded.
    Column("result", Text),
)
OUTPUT = Table(
    "output",
    METADATA,
    Column("run_id", Text, ForeignKey("run.id"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
# What became of every drift finding, for each pipeline that listens to the model.
RETRAIN = Table(
    "retrain",
    METADATA,
    Column("id", BIG_ID, primary_key=True, autoincrement=True),
    Column("finding_id", Text, nullable=False),
    Column("pipeline", Text, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("window_end", Instant),
    Column("decided_at", Instant, nullable=False),
    UniqueConstraint("finding_id", "pipeline", name="retrain_once"),
    Index("retrain_by_pipeline", "pipeline", "verdict", "window_end"),
    sqlite_autoincrement=True,
)
# Next offset to read of the drift topic, kept with the effects of what was read.
POSITION = Table(
    "bus_position",
    METADATA,
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("next_offset", BigInteger, nullable=False),
)
OUTBOX = outbox_table(METADATA)
