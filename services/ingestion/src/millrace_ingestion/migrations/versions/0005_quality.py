"""Quality figures of contracts and times."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "quality",
        sa.Column("contract", sa.Text, primary_key=True),
        sa.Column("start_us", sa.BigInteger, primary_key=True),
        sa.Column("first_version", sa.BigInteger, nullable=False),
        sa.Column("last_version", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_quality_start_us", "quality", ["start_us"])
