"""How far joins are."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "join_position",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("contract", sa.Text, nullable=False),
        sa.Column("identity", sa.Text, nullable=False),
        sa.Column("position", sa.Text, nullable=False),
        sa.Column("plan", sa.Text, nullable=False, server_default=""),
    )
