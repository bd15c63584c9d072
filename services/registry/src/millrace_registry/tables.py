"""The registry's tables; `migrations` makes them. Instants are whole microseconds since 1970 (UTC)."""

from millrace_kit.outbox import outbox_table
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Table, Text, UniqueConstraint

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)
# SQLite numbers rows by itself only in a column of its own type INTEGER.
ID = BigInteger().with_variant(Integer, "sqlite")

MODEL = Table(
    "model",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("description", Text, nullable=False),
    Column("feature_service", Text, nullable=False),
    Column("outcome", Text),  # JSON, NULL for none
    Column("created_at_us", BigInteger, nullable=False),
)
VERSION = Table(
    "version",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("model", Text, ForeignKey("model.name"), nullable=False),
    Column("version", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("platform", Text, nullable=False),
    Column("signature", Text, nullable=False),  # JSON
    Column("lineage", Text, nullable=False),  # JSON
    Column("created_at_us", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    # Audit entry of the newest promotion to Production; NULL outside Production.
    Column("promoted", BigInteger),
    Column("spent_approvals", BigInteger, nullable=False),
    UniqueConstraint("model", "version"),
    Index("ix_version_digest", "digest"),
)
ARTIFACT = Table(
    "artifact",
    METADATA,
    Column("version_id", ID, ForeignKey("version.id"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
METRIC = Table(
    "metric",
    METADATA,
    Column("version_id", ID, ForeignKey("version.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Double, nullable=False),
)
TAG = Table(
    "tag",
    METADATA,
    Column("version_id", ID, ForeignKey("version.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
APPROVAL = Table(
    "approval",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("version_id", ID, ForeignKey("version.id"), nullable=False, index=True),
    Column("actor", Text, nullable=False),
    Column("to_stage", Text, nullable=False),
    Column("comment", Text, nullable=False),
    Column("approved_at_us", BigInteger, nullable=False),
)
ROLLOUT = Table(
    "rollout",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("version_id", ID, ForeignKey("version.id"), nullable=False),
    Column("deployment", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("against", Text, nullable=False),
    Column("evidence_sha256", Text, nullable=False),
    Column("evidence_size_bytes", BigInteger, nullable=False),
    Column("ended_at_us", BigInteger, nullable=False),
    UniqueConstraint("version_id", "evidence_sha256"),
)
AUDIT = Table(
    "audit",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("model", Text, nullable=False, index=True),
    Column("version", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
# One row: the newest audit entry, and the lock every change takes first.
AUDIT_HEAD = Table(
    "audit_head",
    METADATA,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("registry_id", Text, nullable=False),
    Column("last_id", BigInteger, nullable=False),
    Column("last_hash", Text, nullable=False),
)
OUTBOX = outbox_table(METADATA)
