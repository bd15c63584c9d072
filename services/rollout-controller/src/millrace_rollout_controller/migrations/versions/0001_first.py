"""Deployments, the route table and the gateways heard of."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the first schema."""
    op.create_table(
        "deployments",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.UniqueConstraint("model", name="uq_deployments_model"),
    )
    op.create_table(
        "route_table",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("routes", sa.Text, nullable=False),
    )
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("applied", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Drop it."""
    for table in ("gateways", "route_table", "deployments"):
        op.drop_table(table)
