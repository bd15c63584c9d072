"""Dead letters know where their record came from, and whether they are on the dead-letter topic."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; letters from before the topic was there are not put on it."""
    for column in (
        sa.Column("stage", sa.Text, nullable=False, server_default="TASK_PUT"),
        sa.Column("exception", sa.Text, nullable=False, server_default=""),
        sa.Column("origin_topic", sa.Text),
        sa.Column("origin_partition", sa.Integer),
        sa.Column("origin_offset", sa.BigInteger),
        sa.Column("origin_timestamp_ms", sa.BigInteger),
        sa.Column("origin_key", sa.LargeBinary),
        sa.Column("origin_value", sa.LargeBinary),
        sa.Column("origin_headers", sa.LargeBinary),
        sa.Column("published_at_us", sa.BigInteger, nullable=False, server_default="0"),
    ):
        op.add_column("dead_letter", column)
    op.execute("UPDATE dead_letter SET published_at_us = received_at_us")
    waits = sa.text("published_at_us = 0")
    op.create_index("ix_dead_letter_unpublished", "dead_letter", ["id"], sqlite_where=waits, postgresql_where=waits)
    op.create_index("ix_dead_letter_contract_time", "dead_letter", ["contract", "received_at_us"])
