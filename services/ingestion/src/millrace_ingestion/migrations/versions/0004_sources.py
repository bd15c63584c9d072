"""Sources that the service reads by itself, where they began, and the files they landed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "source",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("registered_at_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "source_state",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False, server_default=""),
        sa.Column("turn", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("last_run_us", sa.BigInteger),
        sa.Column("last_result", sa.Text, nullable=False, server_default=""),
    )
    op.create_table(
        "source_start",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "source_file",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("identity", sa.Text, primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("error", sa.Text, nullable=False, server_default=""),
        sa.Column("finished_at_us", sa.BigInteger, nullable=False),
    )
