"""The table of joins' positions; `migrations/` makes it."""

from sqlalchemy import Column, Table, Text

from millrace_ingestion.tables import METADATA

# How far each join is, as JSON, and the step that it is in (empty: none). A removed join's stays: registered again it goes on there.
JOIN_POSITION = Table(
    "join_position",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("contract", Text, nullable=False),
    Column("identity", Text, nullable=False),
    Column("position", Text, nullable=False),
    Column("plan", Text, nullable=False, server_default=""),
)
