"""Models, versions, approvals, audit trail and outbox."""

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the first schema."""
    op.create_table(
        "model",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("feature_service", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_model"),
    )
    op.create_table(
        "version",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("platform", sa.Text, nullable=False),
        sa.Column("signature", sa.Text, nullable=False),
        sa.Column("lineage", sa.Text, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("promoted", sa.BigInteger),
        sa.Column("spent_approvals", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_version"),
        sa.ForeignKeyConstraint(["model"], ["model.name"], name="fk_version_model"),
        sa.UniqueConstraint("model", "version", name="uq_version_model"),
    )
    op.create_index("ix_version_digest", "version", ["digest"])
    op.create_table(
        "artifact",
        sa.Column("version_id", ID, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("version_id", "path", name="pk_artifact"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_artifact_version_id"),
    )
    for table, kind in (("metric", sa.Double), ("tag", sa.Text)):
        op.create_table(
            table,
            sa.Column("version_id", ID, nullable=False),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("value", kind, nullable=False),
            sa.PrimaryKeyConstraint("version_id", "name", name=f"pk_{table}"),
            sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=f"fk_{table}_version_id"),
        )
    op.create_table(
        "approval",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("version_id", ID, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("to_stage", sa.Text, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("approved_at_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_approval"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_approval_version_id"),
    )
    op.create_index("ix_approval_version_id", "approval", ["version_id"])
    _trail_and_outbox()


def _trail_and_outbox() -> None:
    op.create_table(
        "audit",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("previous_hash", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_model", "audit", ["model"])
    head = op.create_table(
        "audit_head",
        sa.Column("one", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("registry_id", sa.Text, nullable=False),
        sa.Column("last_id", sa.BigInteger, nullable=False),
        sa.Column("last_hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("one", name="pk_audit_head"),
    )
    op.bulk_insert(head, [{"one": 1, "registry_id": uuid4().hex, "last_id": 0, "last_hash": "0" * 64}])
    op.create_table(
        "outbox",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sqlite_autoincrement=True,
    )
