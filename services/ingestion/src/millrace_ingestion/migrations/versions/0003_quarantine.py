"""Batches that are held in the quarantine."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add the table, and the count beside the others."""
    op.add_column("batch", sa.Column("quarantined", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "quarantine",
        sa.Column("id", ID, primary_key=True, autoincrement=True),
        sa.Column("group_id", sa.Text, nullable=False),
        sa.Column("contract", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("column", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("received_at_us", sa.BigInteger, nullable=False),
        sa.Column("release_group_id", sa.Text),
        sa.Column("discarded_at_us", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_quarantine_group_id", "quarantine", ["group_id"])
    op.create_index("ix_quarantine_release_group_id", "quarantine", ["release_group_id"])
    op.create_index("ix_quarantine_contract", "quarantine", ["contract", "id"])
