"""Definitions and training-set records in SQL: every definitions hash ever applied, and which is current."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from millrace_kit.errors import NotFoundError
from millrace_kit.sql import migrate, reading, writing
from sqlalchemy import Engine, insert, select, update

from millrace_feature.compiler import compile_registry
from millrace_feature.plan import Definitions, from_json, to_json
from millrace_feature.tables import applied_table, definitions_table, metadata, training_sets_table
from millrace_feature.versioning.history import keep_previous

__all__ = ["Catalog", "Stored", "metadata"]
SCRIPTS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Stored:
    """Definitions with the registry they came from."""

    definitions: Definitions
    registry: bytes


class Catalog:
    """What the service knows besides online values. Safe from any thread; every method raises UnavailableError without the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        migrate(engine, SCRIPTS)

    def apply(
        self, definitions: Definitions, registry: bytes, at: datetime, *, author: str = "", kept_s: int = 0
    ) -> bool:
        """Make `definitions` current; False when they were. Those that were stay pinned for `kept_s`."""
        with writing(self._engine) as connection:
            newest = connection.execute(
                select(applied_table.c.digest).order_by(applied_table.c.id.desc()).limit(1)
            ).scalar()
            if newest == definitions.digest:
                return False
            known = select(definitions_table.c.digest).where(definitions_table.c.digest == definitions.digest)
            if connection.execute(known).scalar() is None:
                row = {
                    "digest": definitions.digest,
                    "project": definitions.project,
                    "registry": registry,
                    "plan": to_json(definitions),
                }
                connection.execute(insert(definitions_table).values(row))
            connection.execute(insert(applied_table).values(digest=definitions.digest, at=at, author=author))
            if newest is not None:
                keep_previous(connection, newest, at, kept_s)
            return True

    def current_digest(self) -> str | None:
        """Hash of the definitions applied last."""
        with reading(self._engine) as connection:
            newest = select(applied_table.c.digest).order_by(applied_table.c.id.desc()).limit(1)
            return connection.execute(newest).scalar()

    def current(self) -> Stored | None:
        """The definitions applied last."""
        newest = self.current_digest()
        return self.get(newest) if newest is not None else None

    def get(self, digest: str) -> Stored:
        """The definitions with this hash.

        Raises:
            NotFoundError: they were never applied here.
        """
        with reading(self._engine) as connection:
            row = connection.execute(select(definitions_table).where(definitions_table.c.digest == digest)).first()
        if row is None:
            raise NotFoundError("definitions", digest)
        definitions = from_json(row.plan)
        if definitions.views and not definitions.feast_types:  # compiled by a version that did not keep Feast's types
            definitions = compile_registry(row.project, row.registry).definitions
        return Stored(definitions, row.registry)

    def put_training_set(self, digest: str, record: bytes) -> bytes:
        """Keep a serialized TrainingSet under its digest; returns the one kept first."""
        with writing(self._engine) as connection:
            kept = connection.execute(
                select(training_sets_table.c.record).where(training_sets_table.c.digest == digest)
            ).scalar()
            if kept is not None:
                return bytes(kept)
            connection.execute(insert(training_sets_table).values(digest=digest, record=record))
        return record

    def training_set(self, digest: str) -> bytes:
        """The serialized TrainingSet.

        Raises:
            NotFoundError: nothing was built with this digest.
        """
        with reading(self._engine) as connection:
            query = select(training_sets_table.c.record).where(training_sets_table.c.digest == digest)
            record = connection.execute(query).scalar()
        if record is None:
            raise NotFoundError("training set", digest)
        return bytes(record)

    def training_sets(self) -> list[str]:
        """Digests of all training sets."""
        with reading(self._engine) as connection:
            return list(connection.execute(select(training_sets_table.c.digest)).scalars())

    def replace_training_set(self, digest: str, record: bytes) -> None:
        """Keep `record` in place of the one under the same digest."""
        query = update(training_sets_table).where(training_sets_table.c.digest == digest).values(record=record)
        with writing(self._engine) as connection:
            connection.execute(query)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()
