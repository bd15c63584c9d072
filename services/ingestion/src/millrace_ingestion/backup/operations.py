"""Taking, checking and restoring backups.

A backup is a consistent point: the database is read in one transaction, and each table is taken at a version that this transaction may
know of, no earlier and (but for groups it knows as intents) no later. The service may go on meanwhile. A restored service sees what an
interrupted one sees: an intent whose commit is in the table is published again and completed, another is discarded, and producers that
send again from before the backup are answered with the first counts, those after it land.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from millrace_kit.clock import Clock, uuid7
from millrace_kit.sql import reading, writing
from sqlalchemy import Connection, Engine, func, select, text

from millrace_ingestion.backup import database
from millrace_ingestion.backup.lake_files import LakeFiles
from millrace_ingestion.backup.manifest import Backups, Manifest, Table
from millrace_ingestion.contracts import QUARANTINE_SUFFIX
from millrace_ingestion.tables import COMMIT, CONTRACT


@dataclass(frozen=True)
class Place:
    """A service's state: its database and its lake."""

    engine: Engine
    lake_url: str
    lake_options: Mapping[str, str]
    ids_folder: Path
    """Of the duplicate index, which follows the tables and is no part of a backup."""

    def files(self, backups: Backups) -> LakeFiles:
        """The lake's files."""
        return LakeFiles(self.lake_url, self.lake_options, backups.content)


def back_up(place: Place, backups: Backups, clock: Clock) -> Manifest:
    """Take a backup.

    Raises:
        UnavailableError: the database does not answer.
        DataLossError: the lake lacks a file.
        OSError: a store does not answer.
    """
    ids = backups.ids()
    before = {table.name: table for table in backups.read(ids[-1]).tables} if ids else {}
    lake = place.files(backups)
    with reading(place.engine) as connection:
        names = _contracts(connection)
    # Read before the transaction begins, so that the transaction knows each commit at least as an intent.
    versions = {name: version for name in names if (version := lake.version(name)) is not None}
    schema = database.tables_of(place.engine)
    with reading(place.engine) as connection:
        revision = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())
        completed = _completed(connection)
        names = _contracts(connection)
        rows = database.dump(connection, schema, backups.content)
    tables: list[Table] = []
    for name in names:
        version = max(versions.get(name, -1), completed.get(name, -1))
        if version >= 0:
            tables.append(lake.store(name, version, before.get(name)))
        # Read after the transaction, so that every batch that it knows as held is there.
        held = name + QUARANTINE_SUFFIX
        held_version = lake.version(held)
        if held_version is not None:
            tables.append(lake.store(held, held_version, before.get(held)))
    now = clock.now().astimezone(UTC)
    manifest = Manifest(f"{now:%Y%m%dT%H%M%S%fZ}-{uuid7()[-8:]}", now.isoformat(), revision, tables, rows)
    backups.write(manifest)
    return manifest


def _contracts(connection: Connection) -> list[str]:
    query = select(CONTRACT.c.name).distinct().order_by(CONTRACT.c.name)
    return [str(name) for name in connection.execute(query).scalars()]


def _completed(connection: Connection) -> dict[str, int]:
    query = select(COMMIT.c.contract, func.max(COMMIT.c.table_version).label("version")).group_by(COMMIT.c.contract)
    return {row.contract: int(row.version) for row in connection.execute(query) if row.version is not None}


def restore(place: Place, backups: Backups, backup_id: str = "") -> Manifest:
    """Put a backup, the newest without an id, into an empty database and lake. An attempt that was interrupted is simply made again.

    Raises:
        NotFoundError: there is no such backup.
        FailedPreconditionError: the place is not empty.
        DataLossError: something in the backup is not what its digest says.
    """
    manifest = backups.read(backup_id)
    lake = place.files(backups)
    schema = database.tables_of(place.engine)
    with reading(place.engine) as connection:
        database.check_empty(connection, schema)
    for table in manifest.tables:
        lake.check_free(table)
    shutil.rmtree(place.ids_folder, ignore_errors=True)
    for table in manifest.tables:
        lake.restore(table)
    # Last and at once: a service that starts before this point knows no contract and touches no table.
    with writing(place.engine) as connection:
        database.check_empty(connection, schema)
        database.load(connection, schema, manifest.database, backups.content)
    return manifest


def verify(backups: Backups, backup_id: str = "") -> Manifest:
    """Read everything that a backup names and compare digests.

    Raises:
        NotFoundError: there is no such backup, or it lacks content.
        DataLossError: content is not what its digest says.
    """
    manifest = backups.read(backup_id)
    for digest in sorted(set(contents(manifest))):
        backups.content.verify(digest)
    return manifest


def contents(manifest: Manifest) -> Iterable[str]:
    """Digests of everything that a backup names."""
    for table in manifest.tables:
        yield from (file.sha256 for file in (*table.data, *table.log))
    for rows in manifest.database:
        yield from rows.chunks
