"""Manifests, statuses, evidence, routes and gateways in SQL.

Every change of a deployment names the revision it was made from; whoever comes second gets `ConflictError` and reads again. A status
and the evidence behind it are written in one transaction.
"""

from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from millrace_kit.errors import ConflictError
from millrace_kit.sql import migrate, open_engine, reading, writing
from pydantic import TypeAdapter
from sqlalchemy import Engine

from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.hub import GatewaySeen, Table
from millrace_rollout_controller.state import Route, Status
from millrace_rollout_controller.store import Row

metadata = sa.MetaData()
deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("model", sa.String(63), nullable=False, unique=True),
    sa.Column("manifest", sa.Text, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)
route_table = sa.Table(
    "route_table",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("routes", sa.Text, nullable=False),
)
gateways = sa.Table(
    "gateways",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("applied", sa.BigInteger, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
)
_ROUTES = TypeAdapter(tuple[Route, ...])


class SqlStore:
    """Blocking; callers use a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> "SqlStore":
        """Open the database and bring its schema up to date."""
        engine = open_engine(url)
        migrate(engine, Path(__file__).parent / "migrations")
        return cls(engine)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def get(self, name: str) -> Row | None:
        """One deployment; None when there is none of that name."""
        with reading(self._engine) as connection:
            found = connection.execute(sa.select(deployments).where(deployments.c.name == name)).one_or_none()
        return _row(found) if found is not None else None

    def rows(self) -> list[Row]:
        """Every deployment, by name."""
        with reading(self._engine) as connection:
            return [_row(found) for found in connection.execute(sa.select(deployments).order_by(deployments.c.name))]

    def create(self, row: Row) -> Row:
        """Add a deployment.

        Raises:
            ConflictError: the name or the model is taken.
        """
        try:
            with writing(self._engine) as connection:
                connection.execute(deployments.insert().values(**_values(row)))
        except sa.exc.IntegrityError:
            raise ConflictError(
                "DEPLOYMENT_CHANGED", "another deployment took the name or the model", {"name": row.name}
            ) from None
        return row

    def update(self, row: Row) -> Row:
        """Write `row`, which was read at `row.revision`; returns it with its new revision.

        Raises:
            ConflictError: it was changed meanwhile.
        """
        values = _values(row) | {"revision": row.revision + 1}
        mine = (deployments.c.name == row.name) & (deployments.c.revision == row.revision)
        with writing(self._engine) as connection:
            if connection.execute(deployments.update().where(mine).values(**values)).rowcount != 1:
                raise ConflictError("DEPLOYMENT_CHANGED", "it was changed meanwhile; try again", {"name": row.name})
        return Row(**{name: getattr(row, name) for name in Row.__slots__} | {"revision": row.revision + 1})

    def delete(self, name: str) -> None:
        """Remove a deployment."""
        with writing(self._engine) as connection:
            connection.execute(deployments.delete().where(deployments.c.name == name))

    def load_routes(self) -> Table:
        """The table last published."""
        with reading(self._engine) as connection:
            found = connection.execute(sa.select(route_table).where(route_table.c.id == 1)).one_or_none()
        return Table(found.generation, _ROUTES.validate_json(found.routes)) if found is not None else Table()

    def save_routes(self, table: Table) -> None:
        """Keep the table, before it is published."""
        routes = _ROUTES.dump_json(table.routes).decode()
        with writing(self._engine) as connection:
            connection.execute(route_table.delete())
            connection.execute(route_table.insert().values(id=1, generation=table.generation, routes=routes))

    def load_gateways(self) -> dict[str, GatewaySeen]:
        """Gateways heard of before."""
        with reading(self._engine) as connection:
            return {g.id: GatewaySeen(g.applied, g.seen_at) for g in connection.execute(sa.select(gateways))}

    def save_gateways(self, seen: dict[str, GatewaySeen]) -> None:
        """Keep who was heard of; the others are forgotten."""
        rows = [{"id": name, "applied": g.applied, "seen_at": g.seen_at} for name, g in seen.items()]
        with writing(self._engine) as connection:
            connection.execute(gateways.delete())
            if rows:
                connection.execute(gateways.insert(), rows)


def _values(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "model": row.model,
        "manifest": row.manifest,
        "generation": row.generation,
        "revision": row.revision,
        "deleting": row.deleting,
        "status": row.status.model_dump_json(),
        "evidence": row.evidence.model_dump_json(),
        "created_at": row.created_at.isoformat(),
    }


def _row(found: sa.Row[tuple[object, ...]]) -> Row:
    values = found._mapping  # noqa: SLF001 - SQLAlchemy's documented name
    return Row(
        name=values["name"],
        model=values["model"],
        manifest=values["manifest"],
        generation=values["generation"],
        revision=values["revision"],
        deleting=values["deleting"],
        status=Status.model_validate_json(values["status"]),
        evidence=Evidence.model_validate_json(values["evidence"]),
        created_at=datetime.fromisoformat(values["created_at"]),
    )
