"""Values of outcomes beside the label, by segment; predictions that are kept and are no evidence."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and tables."""
    op.add_column("model_info", sa.Column("numeric", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("prediction", sa.Column("client", sa.Text(), nullable=False, server_default=""))
    op.add_column("prediction", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("prediction", sa.Column("cached", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("outcome", sa.Column("number", sa.Double()))
    op.add_column("outcome", sa.Column("columns", sa.Text()))
    sequence = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "tracked",
        sa.Column("seq", sequence, primary_key=True, autoincrement=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("lower", sa.Double()),
        sa.Column("upper", sa.Double()),
        sa.Column("segment", sa.Text(), nullable=False),
        sa.UniqueConstraint("model", "key"),
    )
    op.create_table(
        "value_total",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("segment", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.Column("square", sa.Double(), nullable=False),
        sa.Column("clipped", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "key", "version", "segment"),
    )
