"""The database's tables; `migrations/` makes them."""

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, Table, Text, text

METADATA = MetaData()
ID = BigInteger().with_variant(Integer, "sqlite")

# Every version of every contract; `body` is the serialised DataContract.
CONTRACT = Table(
    "contract",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("registered_at_us", BigInteger, nullable=False),
)

# Batches that are committed together. A group without `table_version` is an intent: see docs/decisions.
COMMIT = Table(
    "commit_group",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("contract", Text, nullable=False),
    Column("contract_version", Integer, nullable=False),
    Column("base_version", BigInteger, nullable=False),
    Column("table_version", BigInteger),
    Column("created_at_us", BigInteger, nullable=False),
)
Index(
    "ix_commit_group_open",
    COMMIT.c.contract,
    sqlite_where=text("table_version IS NULL"),
    postgresql_where=text("table_version IS NULL"),
)

# What became of each batch; answers a batch that is sent again.
BATCH = Table(
    "batch",
    METADATA,
    Column("contract", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("group_id", Text, nullable=False, index=True),
    Column("accepted", BigInteger, nullable=False),
    Column("duplicates", BigInteger, nullable=False),
    Column("rejected", BigInteger, nullable=False),
    Column("quarantined", BigInteger, nullable=False, server_default="0"),
)

# Refused records. One that a replay lands has the replay's group; `group_id` is the group of the batch it came with.
DEAD_LETTER = Table(
    "dead_letter",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("group_id", Text, nullable=False, index=True),
    Column("contract", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("column", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("record_json", Text, nullable=False),
    Column("received_at_us", BigInteger, nullable=False),
    Column("replay_group_id", Text, index=True),
    # Where it came from, for records of topics and files; see `origins.py`.
    Column("stage", Text, nullable=False, server_default="TASK_PUT"),
    Column("exception", Text, nullable=False, server_default=""),
    Column("origin_topic", Text),
    Column("origin_partition", Integer),
    Column("origin_offset", BigInteger),
    Column("origin_timestamp_ms", BigInteger),
    Column("origin_key", LargeBinary),
    Column("origin_value", LargeBinary),
    Column("origin_headers", LargeBinary),  # msgpack: [[name, bytes or nil], ...]
    # 0 until it is on the dead-letter topic.
    Column("published_at_us", BigInteger, nullable=False, server_default="0"),
    sqlite_autoincrement=True,
)
Index(
    "ix_dead_letter_unpublished",
    DEAD_LETTER.c.id,
    sqlite_where=text("published_at_us = 0"),
    postgresql_where=text("published_at_us = 0"),
)
Index("ix_dead_letter_contract_time", DEAD_LETTER.c.contract, DEAD_LETTER.c.received_at_us)
Index("ix_dead_letter_contract_reason", DEAD_LETTER.c.contract, DEAD_LETTER.c.reason, DEAD_LETTER.c.id)

# Table versions that somebody reads; their files and log entries stay until `expires_at_us`, null is for ever.
PIN = Table(
    "pin",
    METADATA,
    Column("contract", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("expires_at_us", BigInteger),
    Column("pinned_at_us", BigInteger, nullable=False),
)

# Quality figures of a contract and a time; see `quality.py`.
QUALITY = Table(
    "quality",
    METADATA,
    Column("contract", Text, primary_key=True),
    Column("start_us", BigInteger, primary_key=True),
    Column("first_version", BigInteger, nullable=False),
    Column("last_version", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

# Batches that are held; their records are in the table `<contract>__quarantine`. Groups as with dead letters.
QUARANTINE = Table(
    "quarantine",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("group_id", Text, nullable=False, index=True),
    Column("contract", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("column", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("received_at_us", BigInteger, nullable=False),
    Column("release_group_id", Text, index=True),
    Column("discarded_at_us", BigInteger),
    sqlite_autoincrement=True,
)
Index("ix_quarantine_contract", QUARANTINE.c.contract, QUARANTINE.c.id)
