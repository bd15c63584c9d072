"""SQL tables of definitions, their versions, access rules, the audit and training sets."""

from sqlalchemy import Boolean, Column, DateTime, Integer, LargeBinary, MetaData, String, Table, Text, false

metadata = MetaData()
definitions_table = Table(
    "definitions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("project", String(256), nullable=False),
    Column("registry", LargeBinary, nullable=False),
    Column("plan", Text, nullable=False),
)
applied_table = Table(
    "applied",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("digest", String(64), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("author", String(256), nullable=False, server_default=""),
    Column("rollback", Boolean, nullable=False, server_default=false()),
)
pins_table = Table(
    "pins",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("until", DateTime(timezone=True), nullable=True),
)
access_rules_table = Table(
    "access_rules",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("author", String(256), nullable=False),
    Column("permissions", LargeBinary, nullable=False),
)
audit_table = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("caller", String(256), nullable=False),
    Column("action", String(32), nullable=False),
    Column("resource", String(512), nullable=False),
    Column("allowed", Boolean, nullable=False),
    Column("detail", String(1024), nullable=False),
)
training_sets_table = Table(
    "training_sets",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("record", LargeBinary, nullable=False),
)
