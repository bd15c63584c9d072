"""The tables of sources; `migrations/` makes them."""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Table, Text

from millrace_ingestion.tables import METADATA

# Every version of every source; `body` is the serialised Source, which holds no secret.
SOURCE = Table(
    "source",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("registered_at_us", BigInteger, nullable=False),
)

# What people and the service decided about a source: running, paused, failed, done or removed. `turn` rises with each look that is asked for.
SOURCE_STATE = Table(
    "source_state",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=False, server_default=""),
    Column("turn", BigInteger, nullable=False, server_default="0"),
    Column("last_run_us", BigInteger),
    Column("last_result", Text, nullable=False, server_default=""),
)

# Where reading of a partition began, when nothing had landed from it.
SOURCE_START = Table(
    "source_start",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("position", BigInteger, nullable=False),
)

# Files that landed whole, or cannot be read.
SOURCE_FILE = Table(
    "source_file",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("identity", Text, primary_key=True),
    Column("url", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("error", Text, nullable=False, server_default=""),
    Column("finished_at_us", BigInteger, nullable=False),
)

# Which process reads sources: one row, see `lease.py`.
SOURCE_LEASE = Table(
    "source_lease",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("beat", BigInteger, nullable=False),
)
