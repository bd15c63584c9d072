"""The database's rows as content, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from millrace_kit.content import ContentStore
from millrace_kit.errors import FailedPreconditionError
from millrace_kit.sql import reading
from sqlalchemy import Connection, Engine, Integer, MetaData, Table, func, insert, select, text

from millrace_ingestion.backup.manifest import Rows

# Rows of one chunk; a chunk of rows that have not changed since the last backup is the same content and costs nothing.
CHUNK_ROWS = 20_000
_ROWS = msgspec.msgpack.Decoder(list[list[Any]])


def dump(connection: Connection, metadata: MetaData, content: ContentStore) -> list[Rows]:
    """Store every row that the running transaction sees; returns where."""
    return [_dump_table(connection, table, content) for table in metadata.sorted_tables]


def _dump_table(connection: Connection, table: Table, content: ContentStore) -> Rows:
    chunks: list[str] = []
    count = 0
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=CHUNK_ROWS)
    for part in connection.execute(query).partitions(CHUNK_ROWS):
        rows = [[_plain(value) for value in row] for row in part]
        chunks.append(content.put_bytes(msgspec.msgpack.encode(rows)))
        count += len(rows)
    return Rows(str(table.name), [str(column.name) for column in table.columns], chunks, count)


def _plain(value: object) -> object:
    return bytes(value) if isinstance(value, memoryview) else value


def tables_of(engine: Engine) -> MetaData:
    """The database's own tables, whoever made them; what tells of its schema is none of them.

    Raises:
        UnavailableError: the database does not answer.
    """
    metadata = MetaData()
    with reading(engine) as connection:
        metadata.reflect(connection)
    metadata.remove(metadata.tables["alembic_version"])
    return metadata


def check_empty(connection: Connection, metadata: MetaData) -> None:
    """Refuse a database that holds anything.

    Raises:
        FailedPreconditionError: naming the first table with rows.
    """
    for table in metadata.sorted_tables:
        if connection.execute(select(table).limit(1)).first() is not None:
            message = f"table {table.name!r} of the database has rows: a restore needs an empty one"
            raise FailedPreconditionError("DATABASE_NOT_EMPTY", message, {"table": table.name})


def load(connection: Connection, metadata: MetaData, database: Sequence[Rows], content: ContentStore) -> int:
    """Insert the rows of a backup in the running transaction; returns how many.

    A table or column that a later program has no more is an error; columns it has gained take their defaults.
    """
    total = 0
    for rows in database:
        table = metadata.tables[rows.name]
        for values in _chunks(rows, content):
            records = [dict(zip(rows.columns, row, strict=True)) for row in values]
            connection.execute(insert(table), records)
            total += len(records)
        _continue_ids(connection, table)
    return total


def _chunks(rows: Rows, content: ContentStore) -> Iterator[list[list[Any]]]:
    for digest in rows.chunks:
        yield _ROWS.decode(content.read(digest))


def _continue_ids(connection: Connection, table: Table) -> None:
    """Let the next id of the database's own come after those that were inserted; SQLite does so by itself."""
    key = list(table.primary_key.columns)
    if connection.dialect.name != "postgresql" or len(key) != 1 or not isinstance(key[0].type, Integer):
        return
    newest = connection.execute(select(func.max(key[0]))).scalar()
    if newest is not None:
        # For a key that has no sequence this is setval(NULL, …), which does nothing.
        place = {"table": f'"{table.name}"', "column": key[0].name, "newest": newest}
        connection.execute(text("SELECT setval(pg_get_serial_sequence(:table, :column), :newest)"), place)
