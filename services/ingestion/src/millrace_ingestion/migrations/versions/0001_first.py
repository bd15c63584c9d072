"""Contracts, commit groups, batches and dead letters."""

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
        "contract",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("registered_at_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "commit_group",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("contract", sa.Text, nullable=False),
        sa.Column("contract_version", sa.Integer, nullable=False),
        sa.Column("base_version", sa.BigInteger, nullable=False),
        sa.Column("table_version", sa.BigInteger),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
    )
    is_open = sa.text("table_version IS NULL")
    op.create_index(
        "ix_commit_group_open", "commit_group", ["contract"], sqlite_where=is_open, postgresql_where=is_open
    )
    op.create_table(
        "batch",
        sa.Column("contract", sa.Text, primary_key=True),
        sa.Column("source", sa.Text, primary_key=True),
        sa.Column("offset", sa.BigInteger, primary_key=True),
        sa.Column("group_id", sa.Text, nullable=False),
        sa.Column("accepted", sa.BigInteger, nullable=False),
        sa.Column("duplicates", sa.BigInteger, nullable=False),
        sa.Column("rejected", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_batch_group_id", "batch", ["group_id"])
    op.create_table(
        "dead_letter",
        sa.Column("id", ID, primary_key=True, autoincrement=True),
        sa.Column("group_id", sa.Text, nullable=False),
        sa.Column("contract", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("column", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("record_json", sa.Text, nullable=False),
        sa.Column("received_at_us", sa.BigInteger, nullable=False),
        sa.Column("replay_group_id", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_dead_letter_group_id", "dead_letter", ["group_id"])
    op.create_index("ix_dead_letter_replay_group_id", "dead_letter", ["replay_group_id"])
    op.create_index("ix_dead_letter_contract_reason", "dead_letter", ["contract", "reason", "id"])
