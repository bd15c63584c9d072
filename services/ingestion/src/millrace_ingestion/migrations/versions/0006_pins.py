"""Table versions that somebody needs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "pin",
        sa.Column("contract", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True),
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("expires_at_us", sa.BigInteger),
        sa.Column("pinned_at_us", sa.BigInteger, nullable=False),
    )
