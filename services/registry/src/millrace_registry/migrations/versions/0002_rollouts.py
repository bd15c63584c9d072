"""How rollouts of a version ended."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "rollout",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("version_id", ID, nullable=False),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("decision", sa.Text, nullable=False),
        sa.Column("against", sa.Text, nullable=False),
        sa.Column("evidence_sha256", sa.Text, nullable=False),
        sa.Column("evidence_size_bytes", sa.BigInteger, nullable=False),
        sa.Column("ended_at_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rollout"),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_rollout_version_id"),
        sa.UniqueConstraint("version_id", "evidence_sha256", name="uq_rollout_version_id"),
    )
