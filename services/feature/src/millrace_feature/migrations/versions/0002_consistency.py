"""Sampled answers, and how far they were from the lake."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "consistency_samples",
        sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("feature_service", sa.String(256), nullable=False),
        sa.Column("entity", sa.Text, nullable=False),
        sa.Column("asked_us", sa.BigInteger, nullable=False),
        sa.Column("served_us", sa.BigInteger, nullable=False, index=True),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.Column("claimed_until_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "consistency_windows",
        sa.Column("window_us", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("feature_service", sa.String(256), primary_key=True),
        sa.Column("feature", sa.String(512), primary_key=True),
        sa.Column("width_us", sa.BigInteger, nullable=False),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("compared", "mismatched", "missing", "extra", "pairs")
        ),
        sa.Column("error", sa.Double, nullable=False),
    )
    op.create_table(
        "consistency_findings",
        sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("window_us", sa.BigInteger, nullable=False, index=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("feature_service", sa.String(256), nullable=False),
        sa.Column("feature", sa.String(512), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("entity", sa.Text, nullable=False),
        sa.Column("asked_us", sa.BigInteger, nullable=False),
        sa.Column("served_us", sa.BigInteger, nullable=False),
        sa.Column("expected", sa.Double),
        sa.Column("served", sa.Double),
        sa.Column("versions", sa.Text, nullable=False),
    )
