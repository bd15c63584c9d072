"""Names and versions of fitted content: rows in SQL, never changed, whose content lies in the content-addressed store."""

from collections.abc import Callable
from typing import Literal

from millrace_kit.errors import NotFoundError, UnavailableError
from millrace_kit.sql import reading, writing
from sqlalchemy import Column, Engine, Integer, LargeBinary, String, Table, func, insert, select
from sqlalchemy.exc import IntegrityError

from millrace_feature.catalog import metadata

Kind = Literal["transformer", "selection"]
MAX_LISTED = 1000
MAX_TRIES = 8
"""Writers of one name that meet try so often for the next version."""

fitted_table = Table(
    "fitted",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False),
    Column("record", LargeBinary, nullable=False),
)


class FittedStore:
    """Records by kind, name and version; the tables are the catalog's. Safe from any thread.

    Every method raises UnavailableError without the database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def put(self, kind: Kind, name: str, digest: str, record: Callable[[int], bytes]) -> bytes:
        """Keep content as the next version of `name`; content that the name has already keeps its version.

        Args:
            kind: what it is.
            name: its name.
            digest: SHA-256 of its content.
            record: makes the record for a version.

        Returns:
            The record that is kept.
        """
        mine = (fitted_table.c.kind == kind) & (fitted_table.c.name == name)
        for _ in range(MAX_TRIES):
            try:
                with writing(self._engine) as connection:
                    known = select(fitted_table.c.record).where(mine & (fitted_table.c.digest == digest))
                    kept = connection.execute(known).scalar()
                    if kept is not None:
                        return bytes(kept)
                    newest = connection.execute(select(func.max(fitted_table.c.version)).where(mine)).scalar()
                    version = (newest or 0) + 1
                    made = record(version)
                    row = {"kind": kind, "name": name, "version": version, "digest": digest, "record": made}
                    connection.execute(insert(fitted_table).values(row))
                    return made
            except IntegrityError:  # somebody else took this version, or kept this content
                continue
        raise UnavailableError("BUSY", f"{kind} {name!r} is written by others all the time; try again")

    def get(self, kind: Kind, name: str, version: int) -> bytes:
        """One record; version 0 is the newest.

        Raises:
            NotFoundError: there is none.
        """
        query = select(fitted_table.c.record).where((fitted_table.c.kind == kind) & (fitted_table.c.name == name))
        if version:
            query = query.where(fitted_table.c.version == version)
        with reading(self._engine) as connection:
            record = connection.execute(query.order_by(fitted_table.c.version.desc()).limit(1)).scalar()
        if record is None:
            raise NotFoundError(kind, f"{name}@{version}" if version else name)
        return bytes(record)

    def listed(self, kind: Kind, name: str) -> list[bytes]:
        """Records by name, newest version first; of every name where `name` is empty."""
        query = select(fitted_table.c.record).where(fitted_table.c.kind == kind)
        if name:
            query = query.where(fitted_table.c.name == name)
        order = query.order_by(fitted_table.c.name, fitted_table.c.version.desc()).limit(MAX_LISTED)
        with reading(self._engine) as connection:
            return [bytes(record) for record in connection.execute(order).scalars()]
